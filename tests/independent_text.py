"""The canonical text of a region, written from docs/contexts.md alone: nothing of onnxgen is used."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto as A
from onnx import TensorProto as T

# --- tensors and types --------------------------------------------------------------------------


def bytes_of(tensor: onnx.TensorProto, folder: Path | None = None) -> bytes:
    """A tensor's contents, little-endian, as raw_data has them."""
    if tensor.data_location == T.EXTERNAL:
        assert folder is not None
        where = {each.key: each.value for each in tensor.external_data}
        data = (folder / where["location"]).read_bytes()
        start = int(where.get("offset", 0))
        return data[start : start + int(where["length"])] if "length" in where else data[start:]
    if tensor.data_type == T.STRING:
        return b"".join(struct.pack("<Q", len(each)) + each for each in tensor.string_data)
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    kind = T.DataType.Name(tensor.data_type)
    if kind in ("FLOAT", "COMPLEX64"):
        return np.array(tensor.float_data, "<f4").tobytes()
    if kind in ("DOUBLE", "COMPLEX128"):
        return np.array(tensor.double_data, "<f8").tobytes()
    if kind == "INT64":
        return np.array(tensor.int64_data, "<i8").tobytes()
    if kind in ("UINT64", "UINT32"):
        return np.array(tensor.uint64_data, "<u8" if kind == "UINT64" else "<u4").tobytes()
    width = {"INT32": 4, "FLOAT16": 2, "BFLOAT16": 2, "INT16": 2, "UINT16": 2}.get(kind, 1)
    cells = (value & (1 << 8 * width) - 1 for value in tensor.int32_data)
    return b"".join(each.to_bytes(width, "little") for each in cells)


def elements(kind: int, sizes: Sequence[int | str]) -> str:
    """`FLOAT[2,?]`."""
    return f"{T.DataType.Name(kind)}[{','.join(map(str, sizes))}]"


def _type(kind: onnx.TypeProto) -> str:
    which = kind.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        inner = getattr(kind, which)
        if inner.elem_type == 0:
            text = ""
        elif inner.HasField("shape"):
            sizes = [
                dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else "?"
                for dim in inner.shape.dim
            ]
            text = elements(inner.elem_type, sizes)
        else:
            text = T.DataType.Name(inner.elem_type)
        return text if which == "tensor_type" else f"SPARSE({text})"
    if which == "sequence_type":
        return f"SEQUENCE({_type(kind.sequence_type.elem_type)})"
    if which == "optional_type":
        return f"OPTIONAL({_type(kind.optional_type.elem_type)})"
    if which == "map_type":
        key = T.DataType.Name(kind.map_type.key_type)
        return f"MAP({key},{_type(kind.map_type.value_type)})"
    if which == "opaque_type":
        return f"OPAQUE({_hex(kind.opaque_type.domain)},{_hex(kind.opaque_type.name)})"
    return ""


# --- the canonical text -------------------------------------------------------------------------


def canonical_lines(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, str],
    weights: Sequence[str],
    outputs: Mapping[str, str],
) -> Iterator[str]:
    """The canonical text of nodes of a model, line by line; inputs and outputs with their types."""
    functions = _called(model, nodes)
    used = {_domain(node.domain) for node in _every(nodes)}
    for (domain, _, _), function in functions:
        used |= {domain, *(_domain(each.domain) for each in function.opset_import)}
    yield "onnxgen subgraph 1"
    yield from _opsets([each for each in model.opset_import if _domain(each.domain) in used])
    initializers = {each.name: each for each in model.graph.initializer}
    names = _Names({}, iter(range(1 << 62)))
    for number, (name, kind) in enumerate(inputs.items()):
        names.known[name] = f"i{number}"
        yield f"input i{number} {kind}"
    for number, name in enumerate(weights):
        names.known[name] = f"w{number}"
        tensor = initializers[name]
        yield f"input w{number} {elements(tensor.data_type, tensor.dims)}"
    for node in nodes:
        yield names.node(node)
    for name, kind in outputs.items():
        yield f"output {names.known[name]} {kind}"
    for key, function in functions:
        yield from _function(key, function)


def _function(key: tuple[str, str, str], function: onnx.FunctionProto) -> Iterator[str]:
    names = _Names({}, iter(range(1 << 62)))
    defaults = sorted(function.attribute_proto, key=lambda each: each.name)
    written = [f"default {names.attribute(each)}" for each in defaults]
    inputs = [names.give(name, f"i{at}") for at, name in enumerate(function.input)]
    yield f"function {' '.join(map(_hex, key))} {_list(inputs)}"
    yield f"attributes {_list(map(_hex, sorted(function.attribute)))}"
    yield from written
    yield from _opsets(function.opset_import)
    for node in function.node:
        yield names.node(node)
    yield f"results {_list(map(names.get, function.output))}"


class _Names:
    """Names given so far, and the numbers that are left."""

    def __init__(self, known: dict[str, str], numbers: Iterator[int]) -> None:
        self.known = known
        self.numbers = numbers

    def get(self, name: str) -> str:
        return self.known[name] if name else "-"

    def give(self, name: str, canonical: str = "") -> str:
        if not name:
            return "-"
        self.known[name] = canonical or f"v{next(self.numbers)}"
        return self.known[name]

    def node(self, node: onnx.NodeProto) -> str:
        inputs = _list(map(self.get, node.input))
        attributes = sorted(node.attribute, key=lambda each: each.name)
        written = " ".join(map(self.attribute, attributes))
        outputs = _list(map(self.give, node.output))
        key = " ".join(map(_hex, (_domain(node.domain), node.op_type, node.overload)))
        return f"node {key} {inputs} {outputs} {{{written}}}"

    def attribute(self, attribute: onnx.AttributeProto) -> str:
        kind = A.AttributeType.Name(attribute.type).lower()
        return f"{_hex(attribute.name)}={kind} {self._value(kind, attribute)}"

    def _value(self, kind: str, attribute: onnx.AttributeProto) -> str:
        if attribute.ref_attr_name:
            return f"of {_hex(attribute.ref_attr_name)}"
        one = {
            "float": ("f", _float),
            "int": ("i", str),
            "string": ("s", _hex),
            "tensor": ("t", _tensor),
            "graph": ("g", self.graph),
            "sparse_tensor": ("sparse_tensor", _sparse),
            "type_proto": ("tp", lambda each: f"({_type(each)})"),
        }
        if kind in one:
            field, write = one[kind]
            return str(write(getattr(attribute, field)))
        _, write = one[kind.removesuffix("s")]
        return _list(write(each) for each in getattr(attribute, kind))

    def graph(self, graph: onnx.GraphProto) -> str:
        inner = _Names(dict(self.known), self.numbers)
        inputs = _list([_value(inner.give(each.name), each.type) for each in graph.input])
        fed = {each.name for each in graph.input}
        tensors = []
        for each in graph.initializer:
            name = inner.get(each.name) if each.name in fed else inner.give(each.name)
            tensors.append(f"{name}={_tensor(each)}")
        nodes = [inner.node(node) for node in graph.node]
        outputs = _list(_value(inner.get(each.name), each.type) for each in graph.output)
        return f"[{inputs} {' '.join(tensors)} {' '.join(nodes)} {outputs}]"


def _value(name: str, kind: onnx.TypeProto) -> str:
    return f"{name} {_type(kind)}" if _type(kind) else name


def _called(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]
) -> list[tuple[tuple[str, str, str], onnx.FunctionProto]]:
    functions = {(_domain(f.domain), f.name, f.overload): f for f in model.functions}
    found: dict[tuple[str, str, str], onnx.FunctionProto] = {}
    pending = list(_every(nodes))
    while pending:
        node = pending.pop()
        key = (_domain(node.domain), node.op_type, node.overload)
        if key in functions and key not in found:
            found[key] = functions[key]
            pending += _every(functions[key].node)
    return sorted(found.items(), key=lambda item: item[0])


def _every(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.type == A.GRAPH else ()), *attribute.graphs):
                yield from _every(graph.node)


def _opsets(opsets: Sequence[onnx.OperatorSetIdProto]) -> Iterator[str]:
    for domain, version in sorted({(_domain(each.domain), each.version) for each in opsets}):
        yield f"opset {_hex(domain)} {version}"


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _hex(text: str | bytes) -> str:
    return f"'{(text.encode() if isinstance(text, str) else text).hex()}'"


def _float(value: float) -> str:
    return struct.pack(">f", value).hex()


def _tensor(tensor: onnx.TensorProto) -> str:
    digest = hashlib.sha256(bytes_of(tensor)).hexdigest()
    return f"{elements(tensor.data_type, tensor.dims)}:{digest}"


def _sparse(tensor: onnx.SparseTensorProto) -> str:
    return f"{_tensor(tensor.values)} {_tensor(tensor.indices)} {_list(map(str, tensor.dims))}"


def _list(texts: Any) -> str:
    return f"({','.join(texts)})"
