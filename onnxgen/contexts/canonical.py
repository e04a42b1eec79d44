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
from onnxgen.contexts.types import as_text


def subgraph_sha256(model: onnx.ModelProto) -> str:
    """Of a region in canonical names, see `cutting.cut_out`; weights by type, not by content."""
    return hashlib.sha256(canonical_text(model).encode()).hexdigest()


def canonical_text(model: onnx.ModelProto) -> str:
    """A line for each opset, input, node, output and function, each ended by a newline."""
    return "".join(f"{line}\n" for line in _lines(model))


def _lines(model: onnx.ModelProto) -> Iterator[str]:
    yield "onnxgen subgraph 1"
    yield from _opsets(model.opset_import)
    for value in model.graph.input:
        yield f"input {value.name} {as_text(value)}"
    yield from map(_node, model.graph.node)
    yield f"output {_names(each.name for each in model.graph.output)}"
    for function in model.functions:
        yield f"function {' '.join(map(_quoted, key_of(function)))} {_names(function.input)}"
        yield f"attributes {_names(sorted(function.attribute))}"
        yield from (f"default {_attribute(each)}" for each in function.attribute_proto)
        yield from _opsets(function.opset_import)
        yield from map(_node, function.node)
        yield f"output {_names(function.output)}"


def _opsets(opsets: Iterable[onnx.OperatorSetIdProto]) -> Iterator[str]:
    for each in opsets:
        yield f"opset {_quoted('' if each.domain == 'ai.onnx' else each.domain)} {each.version}"


def _node(node: onnx.NodeProto) -> str:
    domain = "" if node.domain == "ai.onnx" else node.domain
    called = " ".join(map(_quoted, (domain, node.op_type, node.overload)))
    attributes = " ".join(map(_attribute, node.attribute))
    return f"node {called} {_names(node.input)} {_names(node.output)} {{{attributes}}}"


def _names(names: Iterable[str]) -> str:
    return f"({','.join(names)})"


def _quoted(text: str | bytes) -> str:
    """Bytes of a text in hexadecimal, so that nothing in it can be taken for a mark of ours."""
    return "'" + (text.encode() if isinstance(text, str) else text).hex() + "'"


def _attribute(attribute: onnx.AttributeProto) -> str:
    return f"{_quoted(attribute.name)}={_value(attribute)}"


def _value(attribute: onnx.AttributeProto) -> str:
    if attribute.ref_attr_name:
        return f"ref {_quoted(attribute.ref_attr_name)}"
    kind = A.AttributeType.Name(attribute.type).lower()
    match attribute.type:
        case A.FLOAT:
            return f"{kind} {_float(attribute.f)}"
        case A.INT:
            return f"{kind} {attribute.i}"
        case A.STRING:
            return f"{kind} {_quoted(attribute.s)}"
        case A.FLOATS:
            return f"{kind} {_names(map(_float, attribute.floats))}"
        case A.INTS:
            return f"{kind} {_names(map(str, attribute.ints))}"
        case A.STRINGS:
            return f"{kind} {_names(map(_quoted, attribute.strings))}"
        case A.TENSOR:
            return f"{kind} {_tensor(attribute.t)}"
        case A.TENSORS:
            return f"{kind} {_names(map(_tensor, attribute.tensors))}"
        case A.GRAPH:
            return f"{kind} {_graph(attribute.g)}"
        case A.GRAPHS:
            return f"{kind} {_names(map(_graph, attribute.graphs))}"
    # Sparse tensors and types: rare, and written as protobuf writes them.
    return f"{kind} {_quoted(attribute.SerializeToString(deterministic=True))}"


def _float(value: float) -> str:
    """The bits of a float32, so that no two are one text."""
    return struct.pack(">f", value).hex()


def _tensor(tensor: onnx.TensorProto) -> str:
    shape = ",".join(map(str, tensor.dims))
    digest = hashlib.sha256(_content(tensor)).hexdigest()
    return f"{T.DataType.Name(tensor.data_type)}[{shape}]:{digest}"


def _content(tensor: onnx.TensorProto) -> bytes:
    """A tensor's bytes as raw_data has them; of strings, each one's length in 8 bytes before it."""
    if tensor.data_type == T.STRING:
        each = (struct.pack("<Q", len(text)) + text for text in tensor.string_data)
        return b"".join(each)
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    array = onnx.numpy_helper.to_array(tensor)
    return onnx.numpy_helper.from_array(array).raw_data


def _graph(graph: onnx.GraphProto) -> str:
    tensors = " ".join(f"{each.name}={_tensor(each)}" for each in graph.initializer)
    nodes = " ".join(map(_node, graph.node))
    inputs = _names(each.name for each in graph.input)
    outputs = _names(each.name for each in graph.output)
    return f"[{inputs} {tensors} {nodes} {outputs}]"
