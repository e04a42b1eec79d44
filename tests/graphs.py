"""Graphs in ONNX text, before and after: what a rewriting test is made of.

    assert_raised(
        "(float[b,s,40] x) => (float[b,s,40] y) <float[40] w>"
        "{ sq = Pow(x, 2.0)  m = ReduceMean(sq, [-1])  e = Add(m, 0.00001)"
        "  r = Sqrt(e)  n = Div(x, r)  y = Mul(n, w) }",
        "(float[b,s,40] x) => (float[b,s,40] y) <float[40] w>"
        "{ y = RMSNormalization<axis = -1, epsilon = 0.00001, stash_type = 1>(x, w) }",
        "RMS001",
    )

The text is ONNX's own with two liberties. A tensor that is declared and made by no node is a
weight, with random values that depend on its name and shape. An argument may be a number or a
list of them: `2.0` and `[1.0, 2.0]` are float, `2` and `[1, 2]` int64, `0.5h` float16.

Two graphs are the same when their outputs are computed by the same operators with the same
attributes from the same inputs and constants: names and order do not count. Every comparison is
followed by a run of both on ONNX Runtime, at lengths that are different from one another.
"""

from __future__ import annotations

import atexit
import difflib
import functools
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
from onnx import helper, numpy_helper

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.roles import Roles, find_roles
from onnxgen.analysis.sampling import Sampler
from onnxgen.passes.normalize import normalize, set_dtypes
from onnxgen.passes.raise_ import raise_model
from onnxgen.passes.tidy import tidy
from onnxgen.report.values import Decline, Site
from onnxgen.runtime import Runtime
from onnxgen.twin import BFLOAT16, unrunnable_types, widen, widened
from onnxgen.verify.rewrites import RewriteChecker

Array = np.ndarray[Any, Any]

# What the symbols of a text stand for when it is run; any other gets a length of its own.
LENGTHS: tuple[dict[str, int], ...] = (
    {"b": 2, "s": 5, "p": 7, "t": 12, "e": 9},
    {"b": 3, "s": 1, "p": 4, "t": 5, "e": 8},
)
# Largest difference over the standard deviation of what the original computes.
TOLERANCE = {"float32": 1e-5, "float64": 1e-5, "float16": 1e-2}


@functools.cache
def runtime() -> Runtime:
    """One child process for all tests of a worker."""
    shared = Runtime(threads=1)
    atexit.register(shared.close)
    return shared


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


# --- running ------------------------------------------------------------------------------------


def run(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs by name, on ONNX Runtime as the graph is written: nothing optimized.

    Of a model that holds bfloat16 its float32 twin is run.
    """
    model, feeds = runnable(model), {name: widened(array) for name, array in feeds.items()}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


def runnable(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, or its float32 twin where it holds bfloat16."""
    as_ir = ir.from_proto(model)
    if not unrunnable_types(as_ir):
        return model
    widen(as_ir, BFLOAT16)
    return ir.to_proto(as_ir)


def feeds_of(model: onnx.ModelProto, lengths: Mapping[str, int], seed: int = 0) -> dict[str, Array]:
    """Random inputs; masks leave the first past place of the second row out, positions count."""
    rng = np.random.default_rng(seed)
    lengths = dict(lengths)
    feeds: dict[str, Array] = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        shape = [
            lengths.setdefault(dim.dim_param, 13 + 4 * len(lengths))
            if dim.dim_param
            else dim.dim_value
            for dim in tensor.shape.dim
        ]
        if "mask" in value.name and dtype.kind in "bi":
            values = np.ones(shape, dtype)
            if len(shape) > 1 and shape[0] > 1 and shape[-1] > 1:
                values[1, ..., 0] = 0
        elif "position" in value.name:
            values = np.broadcast_to(np.arange(shape[-1]) + lengths.get("p", 0), shape)
        elif dtype.kind == "b":
            values = rng.random(shape) < 0.7
            values[..., 0] = True
        elif dtype.kind == "i":
            values = rng.integers(0, 11, shape)
        else:
            values = rng.standard_normal(shape)
        feeds[value.name] = np.ascontiguousarray(values.astype(dtype)).reshape(shape)
    return feeds


def assert_same_numbers(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    lengths: Sequence[Mapping[str, int]] = LENGTHS,
) -> None:
    """Both compute the same, wherever what the first computes is a number."""
    for seed, each in enumerate(lengths):
        feeds = feeds_of(before, each, seed)
        old, new = run(before, feeds), run(after, feeds)
        assert list(old) == list(new)
        for name, a in old.items():
            b = new[name]
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            known = np.isfinite(a.astype(np.float64))
            assert known.any(), f"{name} is no number anywhere: {each}"
            wide, other = a[known].astype(np.float64), b[known].astype(np.float64)
            difference = np.abs(wide - other).max() / (wide.std() or 1.0)
            assert difference <= TOLERANCE.get(str(a.dtype), 0.0), (name, each, difference)


# --- raising ------------------------------------------------------------------------------------


@dataclass
class Raised:
    """A graph before and after raising.

    Attributes:
        before: as it was given.
        normal: normalized and tidied only.
        after: raised and tidied.
        sites: what the rules said.
        checker: what compared every rewrite.
    """

    before: onnx.ModelProto
    normal: onnx.ModelProto
    after: onnx.ModelProto
    sites: list[Site]
    checker: RewriteChecker

    @property
    def fused(self) -> list[Site]:
        return [site for site in self.sites if site.status == "fused"]

    def node(self, op_type: str) -> onnx.NodeProto:
        """The only node of a type that is left."""
        (node,) = [node for node in self.after.graph.node if node.op_type == op_type]
        return node

    def count(self, op_type: str) -> int:
        return sum(node.op_type == op_type for node in self.after.graph.node)


def raised(
    before: str | onnx.ModelProto,
    *,
    opset: int = 20,
    lengths: Sequence[Mapping[str, int]] = LENGTHS,
    disabled: frozenset[str] = frozenset(),
) -> Raised:
    """Normalize, raise with every rewrite checked, tidy; both run and compared."""
    proto = parse(before, opset=opset) if isinstance(before, str) else before
    normal, _ = normalized(proto)
    model, roles = normalized(proto)
    checker = RewriteChecker(runtime(), roles)
    sampler = Sampler(model.graph, roles, runtime())
    sites = raise_model(model, roles, sampler=sampler, check=checker, disabled=disabled)
    tidy(model)
    tidy(normal)
    result = Raised(proto, ir.to_proto(normal), ir.to_proto(model), sites, checker)
    assert_same_numbers(proto, result.after, lengths)
    return result


def normalized(proto: onnx.ModelProto, opset: int = 24) -> tuple[ir.Model, Roles]:
    """A model in the form that the rules meet, and its roles."""
    model = ir.from_proto(proto)
    roles = find_roles(model)
    normalize(model, opset, runtime(), roles)
    return model, roles


def facts_of(before: str | onnx.ModelProto, *, opset: int = 20) -> tuple[Facts, dict[str, Any]]:
    """The analyses of a graph as it is written, and its values by name."""
    proto = parse(before, opset=opset) if isinstance(before, str) else before
    model = ir.from_proto(proto)
    set_dtypes(model)
    values: dict[str, Any] = {value.name or "": value for value in model.graph.inputs}
    values |= dict(model.graph.initializers)
    values |= {out.name or "": out for node in model.graph for out in node.outputs}
    return Facts(model.graph), values


def assert_raised(
    before: str | onnx.ModelProto, after: str | None, *codes: str, opset: int = 20
) -> Raised:
    """The graph becomes `after`, by exactly these rules, once each time they are named."""
    result = raised(before, opset=opset)
    declined = [site.decline for site in result.sites if site.decline is not None]
    assert not declined, declined
    assert sorted(site.rule for site in result.sites) == sorted(codes)
    if after is not None:
        assert_same_graph(result.after, parse(after, opset=24))
    return result


def assert_kept(
    before: str | onnx.ModelProto,
    rule: str,
    code: str,
    *,
    opset: int = 20,
    lengths: Sequence[Mapping[str, int]] = LENGTHS,
    disabled: frozenset[str] = frozenset(),
) -> Decline:
    """The rule's only site is kept, for this reason, and the graph is as it was."""
    result = raised(before, opset=opset, lengths=lengths, disabled=disabled)
    assert {site.status for site in result.sites} == {"kept"}, result.sites
    (decline,) = [site.decline for site in result.sites if site.rule == rule]
    assert decline is not None
    assert (decline.rule, decline.code) == (rule, code), decline
    assert decline.reason
    assert_same_graph(result.after, result.normal)
    return decline


def assert_untouched(before: str | onnx.ModelProto, *, opset: int = 20) -> None:
    """No rule finds anything in the graph."""
    result = raised(before, opset=opset)
    assert result.sites == []
    assert_same_graph(result.after, result.normal)
