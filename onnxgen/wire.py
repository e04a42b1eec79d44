"""The protobuf wire format, as far as a model's weights need it.

A protobuf library copies every weight it parses. Here the weights of a model file are cut out of
its bytes and stay where they are, on disk; `serializer` writes them back one at a time.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx

from onnxgen.element_types import bits_of

# Field numbers of onnx.proto; every field met here is of wire type 2, length-delimited.
GRAPH = 7  # ModelProto.graph
INITIALIZER = 5  # GraphProto.initializer
RAW_DATA = 9  # TensorProto.raw_data
_DELIMITED = 2
_FIXED_SIZES = {1: 8, 5: 4}  # wire type -> bytes

WORTH_CUTTING = 4096  # bytes; smaller tensors are left to the library


class WireError(ValueError):
    """The bytes are not a protobuf message; the message says what is wrong."""


@dataclass(frozen=True)
class Weight:
    """Where the raw data of one initializer of the main graph lies in the file."""

    name: str
    dtype: int  # its number in onnx.TensorProto
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class _Field:
    number: int
    wire_type: int
    start: int  # of its tag
    body: int  # of its content
    end: int


def cut_weights(data: mmap.mmap) -> tuple[bytes, list[Weight]]:
    """Split a serialised model into the model without its large weights, and where they are.

    The first part parses as a ModelProto in which those initializers have no data.

    Raises:
        WireError: the bytes are no protobuf message, or end too early.
    """
    model: list[bytes] = []
    weights: list[Weight] = []
    for field in _fields(data, 0, len(data)):
        if (field.number, field.wire_type) != (GRAPH, _DELIMITED):
            model.append(data[field.start : field.end])
            continue
        graph: list[bytes] = []
        for inner in _fields(data, field.body, field.end):
            cut = _cut(data, inner)
            if cut is None:
                graph.append(data[inner.start : inner.end])
            else:
                header, weight = cut
                graph.append(delimited(INITIALIZER, len(header)) + header)
                weights.append(weight)
        model.append(delimited(GRAPH, sum(map(len, graph))))
        model.extend(graph)
    return b"".join(model), weights


def _cut(data: mmap.mmap, field: _Field) -> tuple[bytes, Weight] | None:
    """An initializer's header and its weight; None for what is not worth cutting."""
    large = field.end - field.body >= WORTH_CUTTING
    if (field.number, field.wire_type) != (INITIALIZER, _DELIMITED) or not large:
        return None
    rest: list[bytes] = []
    raw: _Field | None = None
    for part in _fields(data, field.body, field.end):
        if (part.number, part.wire_type) == (RAW_DATA, _DELIMITED):
            raw = part
        else:
            rest.append(data[part.start : part.end])
    if raw is None or raw.end - raw.body < WORTH_CUTTING:
        return None
    header = b"".join(rest)
    tensor = onnx.TensorProto.FromString(header)
    bits = bits_of(tensor.data_type)
    if not tensor.name or bits is None or bits < 8:
        return None
    place = (raw.body, raw.end - raw.body)
    return header, Weight(tensor.name, tensor.data_type, tuple(tensor.dims), *place)


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[_Field]:
    while start < end:
        key, body = _varint(data, start, end)
        number, wire_type = key >> 3, key & 7
        if number == 0:
            raise WireError(f"there is no field 0, which byte {start} names")
        if wire_type == _DELIMITED:
            length, body = _varint(data, body, end)
            stop = body + length
        elif wire_type == 0:
            _, stop = _varint(data, body, end)
        elif wire_type in _FIXED_SIZES:
            stop = body + _FIXED_SIZES[wire_type]
        else:
            raise WireError(f"byte {start} begins a field of unknown type {wire_type}")
        if stop > len(data):
            raise WireError(f"it is truncated, at least {stop - len(data)} bytes are missing")
        if stop > end:
            raise WireError(f"the field that begins at byte {start} does not fit where it is")
        yield _Field(number, wire_type, start, body, stop)
        start = stop


def _varint(data: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    value = 0
    for index in range(10):
        if start + index >= end:
            raise WireError("it ends in the middle of a number")
        byte = data[start + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, start + index + 1
    raise WireError(f"the number at byte {start} is too long")


def delimited(number: int, length: int) -> bytes:
    """The tag and length that precede a length-delimited field's content."""
    out = bytearray()
    for value in (number << 3 | _DELIMITED, length):
        while value >= 0x80:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out)


def tensors_of(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initializers and attributes, of subgraphs and functions too."""
    yield from _tensors_of_graph(proto.graph)
    for function in proto.functions:
        yield from _tensors_of_nodes(function.node)


def _tensors_of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == onnx.AttributeProto.TENSORS:
                yield from attribute.tensors
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from _tensors_of_graph(attribute.g)
            elif attribute.type == onnx.AttributeProto.GRAPHS:
                for graph in attribute.graphs:
                    yield from _tensors_of_graph(graph)
