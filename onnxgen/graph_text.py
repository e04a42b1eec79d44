"""Graphs in ONNX text: short to write, and compared without their names.

    parse(
        "(float[b,s,40] x) => (float[b,s,40] y) <float[40] w>"
        "{ n = Mul(x, 0.5)  y = Mul(n, w) }"
    )

The text is ONNX's own with two liberties. A tensor that is declared and made by no node is a
weight, with random values that depend on its name and shape. An argument may be a number or a
list of them: `2.0` and `[1.0, 2.0]` are float, `2` and `[1, 2]` int64, `0.5h` float16.

Two graphs are the same when their outputs are computed by the same operators with the same
attributes from the same inputs and constants: names and order do not count.
"""

from __future__ import annotations

import difflib
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]


# --- text to model ------------------------------------------------------------------------------


def parse(text: str, *, opset: int = 20, weights: Mapping[str, Array] | None = None) -> Any:
    """The model that a text describes; see the module's docstring.

    Args:
        opset: version of the default domain, where the text does not begin with `<ir_version`.
        weights: values for declared tensors; random ones are drawn for the others.
    """
    if not text.lstrip().startswith("<"):
        text = f'<ir_version: 10, opset_import: ["" : {opset}]> g {text}'
    constants: dict[str, Array] = {}
    start = text.index("{")  # where the nodes begin
    body = re.sub(r"\(([^()]*)\)", lambda call: f"({_arguments(call[1], constants)})", text[start:])
    model = onnx.parser.parse_model(text[:start] + body)
    graph = model.graph
    made = {name for node in graph.node for name in node.output}
    made |= {tensor.name for tensor in graph.initializer}
    for info in list(graph.value_info):
        if info.name in made:
            continue
        kind = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        shape = tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
        constants[info.name] = weight(info.name, shape).astype(kind)
        graph.value_info.remove(info)
    constants.update(weights or {})
    used = {name for node in graph.node for name in node.input}
    for name, values in constants.items():
        assert name in used or name not in (weights or {}), f"nothing reads the weight {name!r}"
        graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def weight(name: str, shape: Sequence[int]) -> Array:
    """Random values: matrices keep the scale of what they multiply, vectors are around 1."""
    rng = np.random.default_rng(zlib.crc32(f"{name}{tuple(shape)}".encode()))
    values = rng.standard_normal(shape)
    return values * 1.2 / np.sqrt(shape[-2]) if len(shape) > 1 else 1 + 0.3 * values


def _arguments(text: str, constants: dict[str, Array]) -> str:
    """Arguments of a node with numbers replaced by the names of constants."""
    names = []
    for argument in re.findall(r"\[[^\]]*\]|[^,\s][^,]*|(?<=,)\s*(?=,)", text):
        values = _numbers(argument.strip())
        if values is None:
            names.append(argument.strip())
            continue
        name = f"constant_{zlib.crc32(argument.strip().encode()):08x}"
        constants[name] = values
        names.append(name)
    return ", ".join(names)


def _numbers(text: str) -> Array | None:
    many = text.startswith("[")
    words = [word.strip() for word in text.strip("[]").split(",") if word.strip()]
    half = any(word.endswith("h") for word in words)
    words = [word.removesuffix("h") for word in words]
    if not all(re.fullmatch(r"-?(\d[\d.]*(e-?\d+)?|inf)", word) for word in words):
        return None
    if not words and not many:
        return None
    whole = all(re.fullmatch(r"-?\d+", word) for word in words) and not half
    kind = np.int64 if whole else np.float16 if half else np.float32
    numbers = [int(word) if whole else float(word) for word in words]
    return np.array(numbers if many else numbers[0]).astype(kind)


# --- what a graph computes, without its names ---------------------------------------------------


def outline(model: ir.Model | onnx.ModelProto) -> list[str]:
    """A graph as lines that are equal for graphs that differ in names and order only."""
    if isinstance(model, onnx.ModelProto):
        model = ir.from_proto(model)
    lines: list[str] = []
    known: dict[ir.Value | None, str] = {None: "_"}
    for value in model.graph.inputs:
        known[value] = value.name or ""
    for value in model.graph.initializers.values():
        known[value] = _constant(value)
    for output in model.graph.outputs:
        for node in _postorder(output):
            if node.outputs[0] in known:
                continue
            inputs = list(node.inputs)
            while inputs and inputs[-1] is None:
                inputs.pop()
            arguments = ", ".join(known[value] for value in inputs)
            number = f"%{len(lines)}"
            for index, each in enumerate(node.outputs):
                known[each] = f"{number}:{index}" if index else number
            given = [f"{a.name}={_attribute(a)}" for a in node.attributes.values()]
            domain = f"{node.domain}." if node.domain else ""
            lines.append(
                f"{number} = {domain}{node.op_type}({arguments}) {' '.join(sorted(given))}".strip()
            )
    lines.extend(f"{output.name} <- {known[output]}" for output in model.graph.outputs)
    return lines


def _postorder(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that a value is computed by, operands first, in the order of arguments."""
    done: set[ir.Node] = set()
    stack: list[tuple[ir.Node, bool]] = []
    if (node := value.producer()) is not None:
        stack.append((node, False))
    while stack:
        node, ready = stack.pop()
        if node in done:
            continue
        if ready:
            done.add(node)
            yield node
            continue
        stack.append((node, True))
        for each in reversed(node.inputs):
            source = None if each is None else each.producer()
            if source is not None and source not in done:
                stack.append((source, False))


def _constant(value: ir.Value) -> str:
    assert value.const_value is not None
    array = value.const_value.numpy()
    if array.size <= 12:
        numbers = ", ".join(f"{float(each):.5g}" for each in array.flat)
        return f"{array.dtype}{list(array.shape)}{{{numbers}}}"
    if array.dtype.kind != "f":
        return f"{array.dtype}{list(array.shape)}#{zlib.crc32(array.tobytes()):08x}"
    first = array.reshape(-1)[:3].astype(np.float64)
    mean = float(array.astype(np.float64).mean())
    numbers = " ".join(f"{float(each):.4g}" for each in (*first, mean))
    return f"{array.dtype}{list(array.shape)}{{{numbers}}}"


def _attribute(attribute: ir.Attr) -> str:
    value = attribute.value
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, (list, tuple)):
        return str(list(value))
    if hasattr(value, "numpy"):
        return str(value.numpy().tolist())
    return str(value)


def assert_same_graph(found: onnx.ModelProto, wanted: onnx.ModelProto) -> None:
    """Both compute the same by the same operators; the message shows where they part."""
    difference = difflib.unified_diff(
        outline(wanted), outline(found), "wanted", "found", lineterm="", n=99
    )
    message = "\n".join(difference)
    assert not message, message
