"""Damage to the bytes of a model: cut, flipped, nested deeper than anyone writes by hand."""

from __future__ import annotations

import itertools

from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    OperatorSetIdProto,
    TensorProto,
    ValueInfoProto,
    helper,
)

from tests.proof.fuzz_seeds import Draw

HOSTILE = (0, 1, 2, 127, 128, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def truncated(draw: Draw) -> bytes:
    """Ends early: in the middle, or some bytes before its end."""
    data = draw.model().SerializeToString()
    return data[: draw.choice((draw.randrange(len(data)), max(0, len(data) - draw.randint(1, 99))))]


def flipped(draw: Draw) -> bytes:
    """Bytes of other values, left out, put in, or moved; mostly not of weights."""
    data = bytearray(draw.model().SerializeToString())
    for _ in range(draw.choice((1, 1, 2, 5, 40))):
        at = draw.randrange(max(1, len(data)))
        match draw.randrange(5):
            case 0:
                data[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([(data[at] if data else 0) ^ (1 << draw.randrange(8))])
            case 2:
                del data[at : at + draw.choice((1, 2, 9, 300))]
            case 3:
                data[at:at] = draw.randbytes(draw.choice((1, 2, 9)))
            case _:
                other = draw.randrange(max(1, len(data)))
                data[at : at + 20] = data[other : other + 20]
    return bytes(data)


def garbage(draw: Draw) -> bytes:
    """No model at all: random bytes, text, nothing, a tag whose length is a lie."""
    match draw.randrange(5):
        case 0:
            return draw.randbytes(draw.choice((0, 1, 2, 17, 4000)))
        case 1:
            return draw.choice(
                ('{"ir_version": 9}', "<html>", "version https://git-lfs\n")
            ).encode()
        case 2:
            return varint(draw.randrange(1, 30) << 3 | 2) + varint(draw.choice(HOSTILE)) + b"x" * 9
        case 3:
            head = ModelProto(ir_version=10).SerializeToString()
            return head + b"".join(field(7, b"") for _ in range(draw.choice((1, 2, 5000))))
        case _:
            return b"\x0b" * draw.choice((1, 90, 30_000)) + b"\x0c"  # groups, which none writes


def nested(draw: Draw) -> bytes:
    """If, Loop or Scan nested up to 10,000 deep; types of types; dims by the million."""
    depth = draw.choice((2, 10, 25, 30, 31, 32, 33, 34, 60, 100, 1000, 10_000))
    match draw.randrange(4):
        case 0 | 1:
            return _nest(draw, depth)
        case 2:
            return _types(draw, depth)
        case _:
            return _long(draw, depth)


def _nest(draw: Draw, depth: int) -> bytes:
    """A model whose graph holds a node that holds a graph, and so on."""
    op = draw.choice(("If", "If", "Loop", "Scan"))
    both = op == "If" and depth <= 12 and draw.random() < 0.5
    graph = _body(op, b"")
    for _ in range(depth):
        graph = _body(op, graph, both=both)
    graph += field(11, info_of("c", TensorProto.BOOL))
    graph += field(11, info_of("x", TensorProto.FLOAT))
    return _model(graph)


def info_of(name: str, kind: int, shape: tuple[int, ...] | None = ()) -> bytes:
    info: ValueInfoProto = helper.make_tensor_value_info(name, kind, shape)
    return info.SerializeToString()


def _body(op: str, inner: bytes, both: bool = False) -> bytes:
    """A graph of one node: with a body, or an Identity where there is none deeper."""
    out = field(12, info_of("y", TensorProto.FLOAT))
    if not inner:
        node = NodeProto(op_type="Identity", input=["x"], output=["y"])
        return field(1, node.SerializeToString()) + field(2, b"body") + out
    node = NodeProto(op_type=op, input=["c"] if op == "If" else ["", "c", "x"], output=["y"])
    if op == "Scan":
        node = NodeProto(op_type=op, input=["x"], output=["y"])
    names = ["then_branch", "else_branch"] if op == "If" else ["body"]
    data = node.SerializeToString()
    shallow = GraphProto(name="s", node=[NodeProto(op_type="Identity", input=["x"], output=["y"])])
    shallow.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, ()))
    for name in names:
        deep = inner if name != "else_branch" or both else shallow.SerializeToString()
        head = AttributeProto(name=name, type=AttributeProto.GRAPH).SerializeToString()
        data += field(5, head + field(6, deep))
    if op == "Scan":
        data += field(5, helper.make_attribute("num_scan_inputs", 1).SerializeToString())
    return field(1, data) + field(2, b"body") + out


def _types(draw: Draw, depth: int) -> bytes:
    """An input that is a sequence, an optional or a map of one of one ..."""
    number = draw.choice((4, 9, 5))
    kind = helper.make_tensor_type_proto(1, [2]).SerializeToString()
    for _ in range(depth):
        inner = field(1, kind) if number != 5 else b"\x08\x07" + field(2, kind)
        kind = field(number, inner)
    info = field(1, b"x") + field(2, kind)
    node = NodeProto(op_type="Identity", input=["x"], output=["y"])
    graph = field(1, node.SerializeToString()) + field(2, b"g") + field(11, info)
    return _model(graph + field(12, field(1, b"y") + field(2, kind)))


def _long(draw: Draw, depth: int) -> bytes:
    """Long where others are deep: chains of nodes, dims, opsets, names."""
    graph = b""
    dims = (2,)
    match draw.randrange(4):
        case 0:
            names = ["x", *(f"v{at}" for at in range(depth - 1)), "y"]
            op = draw.choice(("Relu", "Neg", "Identity", "Nope"))
            for before, after in itertools.pairwise(names):
                node = NodeProto(op_type=op, input=[before], output=[after])
                graph += field(1, node.SerializeToString())
        case 1:
            dims = (1,) * depth
            graph = field(
                1, NodeProto(op_type="Relu", input=["x"], output=["y"]).SerializeToString()
            )
        case 2:
            node = NodeProto(op_type="Concat", input=["x"] * depth, output=["y"])
            node.attribute.append(helper.make_attribute("axis", 0))
            graph = field(1, node.SerializeToString())
        case _:
            node = NodeProto(op_type="Split", input=["x"], output=["y"])
            node.output.extend(f"o{at}" for at in range(depth))
            graph = field(1, node.SerializeToString())
    graph += field(2, b"g") + field(11, info_of("x", TensorProto.FLOAT, dims))
    return _model(graph + field(12, info_of("y", TensorProto.FLOAT, None)))


def _model(graph: bytes) -> bytes:
    head = ModelProto(ir_version=10, opset_import=[OperatorSetIdProto(version=20)])
    return head.SerializeToString() + field(7, graph)


def field(number: int, content: bytes) -> bytes:
    """A field of the wire format with its tag and length."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
