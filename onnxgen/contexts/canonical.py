"""What a subgraph is, as text, and its sha256: equal for graphs that compute the same the same way.

The text is stated in docs/contexts.md, exactly enough to be written by another program.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator

import onnx
from onnx import AttributeProto as A
from onnx import TensorProto as T

from onnxgen.contexts.cutting import key_of
from onnxgen.contexts.types import type_text
from onnxgen.contexts.weights import bytes_of


def subgraph_sha256(model: onnx.ModelProto) -> str:
    """Of a region in canonical names, see `cutting.cut_out`; weights by type, not by content."""
    return hashlib.sha256(canonical_text(model).encode()).hexdigest()


def canonical_text(model: onnx.ModelProto) -> str:
    """A line for each opset, input, node, output and function, each ended by a newline."""
    return "".join(f"{line}\n" for line in _lines(model))


def _lines(model: onnx.ModelProto) -> Iterator[str]:
    yield "onnxgen subgraph 1"
    yield from _opsets(model.opset_import)
    yield from (f"input {_value(each)}" for each in model.graph.input)
    yield from map(_node, model.graph.node)
    yield from (f"output {_value(each)}" for each in model.graph.output)
    for function in model.functions:
        yield f"function {' '.join(map(_quoted, key_of(function)))} {_names(function.input)}"
        yield f"attributes {_list(map(_quoted, function.attribute))}"
        yield from (f"default {_attribute(each)}" for each in function.attribute_proto)
        yield from _opsets(function.opset_import)
        yield from map(_node, function.node)
        yield f"results {_names(function.output)}"


def _opsets(opsets: Iterable[onnx.OperatorSetIdProto]) -> Iterator[str]:
    for each in opsets:
        yield f"opset {_quoted(each.domain)} {each.version}"


def _node(node: onnx.NodeProto) -> str:
    called = " ".join(map(_quoted, (node.domain, node.op_type, node.overload)))
    attributes = " ".join(map(_attribute, node.attribute))
    return f"node {called} {_names(node.input)} {_names(node.output)} {{{attributes}}}"


def _value(value: onnx.ValueInfoProto) -> str:
    """A value's name, and its type where one is declared."""
    return f"{value.name} {type_text(value.type)}".rstrip()


def _names(names: Iterable[str]) -> str:
    return _list(name or "-" for name in names)


def _list(texts: Iterable[str]) -> str:
    return f"({','.join(texts)})"


def _quoted(text: str | bytes) -> str:
    """Bytes of a text in hexadecimal, so that nothing in it can be taken for a mark of ours."""
    return "'" + (text.encode() if isinstance(text, str) else text).hex() + "'"


def _attribute(attribute: onnx.AttributeProto) -> str:
    return f"{_quoted(attribute.name)}={_content(attribute)}"


def _content(attribute: onnx.AttributeProto) -> str:
    kind = A.AttributeType.Name(attribute.type).lower()
    if attribute.ref_attr_name:
        return f"{kind} of {_quoted(attribute.ref_attr_name)}"
    match attribute.type:
        case A.FLOAT:
            return f"{kind} {_float(attribute.f)}"
        case A.INT:
            return f"{kind} {attribute.i}"
        case A.STRING:
            return f"{kind} {_quoted(attribute.s)}"
        case A.FLOATS:
            return f"{kind} {_list(map(_float, attribute.floats))}"
        case A.INTS:
            return f"{kind} {_list(map(str, attribute.ints))}"
        case A.STRINGS:
            return f"{kind} {_list(map(_quoted, attribute.strings))}"
        case A.TENSOR:
            return f"{kind} {_tensor(attribute.t)}"
        case A.TENSORS:
            return f"{kind} {_list(map(_tensor, attribute.tensors))}"
        case A.GRAPH:
            return f"{kind} {_graph(attribute.g)}"
        case A.GRAPHS:
            return f"{kind} {_list(map(_graph, attribute.graphs))}"
        case A.SPARSE_TENSOR:
            return f"{kind} {_sparse(attribute.sparse_tensor)}"
        case A.SPARSE_TENSORS:
            return f"{kind} {_list(map(_sparse, attribute.sparse_tensors))}"
        case A.TYPE_PROTO:
            return f"{kind} ({type_text(attribute.tp)})"
        case A.TYPE_PROTOS:
            return f"{kind} {_list(f'({type_text(each)})' for each in attribute.type_protos)}"
    raise ValueError(kind)  # `cutting` has refused it


def _float(value: float) -> str:
    """The bits of a float32, so that no two are one text."""
    return struct.pack(">f", value).hex()


def _tensor(tensor: onnx.TensorProto) -> str:
    shape = ",".join(map(str, tensor.dims))
    digest = hashlib.sha256(bytes_of(tensor)).hexdigest()
    return f"{T.DataType.Name(tensor.data_type)}[{shape}]:{digest}"


def _sparse(tensor: onnx.SparseTensorProto) -> str:
    sizes = _list(map(str, tensor.dims))
    return f"{_tensor(tensor.values)} {_tensor(tensor.indices)} {sizes}"


def _graph(graph: onnx.GraphProto) -> str:
    tensors = " ".join(f"{each.name}={_tensor(each)}" for each in graph.initializer)
    nodes = " ".join(map(_node, graph.node))
    inputs, outputs = _list(map(_value, graph.input)), _list(map(_value, graph.output))
    return f"[{inputs} {tensors} {nodes} {outputs}]"
