"""Graphs written to be hostile, further: bodies, sequences, attention and norms of odd ranks."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from tests.proof.fuzz_damage import SIZES
from tests.proof.fuzz_graphs import BOOL, FLOAT, INT64, info, integers, model, node
from tests.proof.fuzz_seeds import Draw

FLOAT16, DOUBLE, BFLOAT16 = TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16


def subgraphs(draw: Draw) -> ModelProto:
    """Bodies of If, Loop and Scan that read or give the wrong values, too many, too few, or outer ones."""
    op = draw.choice(("If", "If", "Loop", "Scan"))
    then, other = _branch(draw), _branch(draw)
    if op == "If":
        condition = draw.choice(("c", "c", "flag", "x", ""))
        given = [node(op, condition or "_", "y", then_branch=then, else_branch=other)]
        if draw.random() < 0.2:
            given[0].attribute.pop()
    elif op == "Loop":
        loop: list[Any] = [info("i", INT64, ()), info("k", BOOL, ()), info("v")]
        then.input.extend(loop[: draw.randrange(4)])
        then.output.insert(0, info(draw.choice(("k", "c", "y")), BOOL, ()))
        given = [node(op, draw.choice(("n c x", "n _ x", "_ c x", "n c", "")), "y", body=then)]
    else:
        then.input.extend([info("a"), info("b2")][: draw.randrange(3)])
        given = [
            node(op, "x", "y", body=then, num_scan_inputs=draw.choice((0, 1, 1, 2, -1, 2**40)))
        ]
    nodes = [node("Relu", "x", "p"), *given, node("Relu", "p", "q")]
    if draw.random() < 0.3:
        draw.shuffle(nodes)
    n = integers("n", draw.choice((0, 1, 3, 10**9, 2**62)), scalar=True)
    flag = helper.make_tensor("flag", BOOL, (), [draw.random() < 0.5])
    return model(nodes, [n, flag], [info("x"), info("c", BOOL, ())], [info("y"), info("q")])


def _branch(draw: Draw, depth: int = 0) -> GraphProto:
    """A body that gives what it makes, or an outer value, an initializer, or nothing."""
    names = ["x", "p", "q", "y", "inner", "w", "c", "nothing"]
    nodes: list[NodeProto] = []
    for at in range(draw.randrange(4)):
        op = draw.choice(("Relu", "Identity", "Add", "If"))
        if op == "If":
            if depth < 3:
                branches = {
                    "then_branch": _branch(draw, depth + 1),
                    "else_branch": _branch(draw, depth + 1),
                }
                nodes.append(helper.make_node("If", ["c"], [f"inner{at}"], **branches))
        else:
            read = [draw.choice(names) for _ in range(2 if op == "Add" else 1)]
            nodes.append(
                helper.make_node(op, read, [draw.choice(("inner", "y", "p", f"inner{at}"))])
            )
    made = [name for each in nodes for name in each.output]
    outs = [
        info(draw.choice((*made, *names)), dims=None) for _ in range(draw.choice((1, 1, 1, 0, 2)))
    ]
    weight = helper.make_tensor(draw.choice(("w", "x", "p")), FLOAT, (4,), [1.0] * 4)
    tensors = [weight] if draw.random() < 0.5 else []
    return helper.make_graph(nodes, draw.choice(("body", "")), [], outs, tensors)


def containers(draw: Draw) -> ModelProto:
    """Sequences, optionals and maps: fed, made, read and given."""
    tensor = helper.make_tensor_type_proto(FLOAT, ("b", 4))
    sequence = helper.make_sequence_type_proto(tensor)
    key_map = helper.make_map_type_proto(draw.choice((INT64, 8)), draw.choice((tensor, sequence)))
    kind = draw.choice(
        (
            sequence,
            helper.make_optional_type_proto(tensor),
            helper.make_optional_type_proto(sequence),
            helper.make_sequence_type_proto(sequence),
            key_map,
            helper.make_sequence_type_proto(key_map),
            helper.make_sparse_tensor_type_proto(FLOAT, (4, 4)),
        )
    )
    q = helper.make_value_info("q", kind)
    ways: list[tuple[list[NodeProto], list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]] = [
        ([node("Identity", "q", "y")], [q], [helper.make_value_info("y", kind)]),
        ([node("SequenceAt", "q n", "y")], [q], [info("y", dims=None)]),
        ([node("OptionalGetElement", "q", "y")], [q], [info("y", dims=None)]),
        ([node("OptionalHasElement", "q", "y")], [q], [info("y", BOOL, ())]),
        ([node("SequenceConstruct", "x x", "q")], [info("x")], [q]),
        ([node("SequenceEmpty", "", "q")], [], [q]),
        (
            [node("SequenceMap", "q", "y", body=_relu_body())],
            [q],
            [helper.make_value_info("y", kind)],
        ),
        ([node("Optional", "x", "q")], [info("x")], [q]),
        ([node("Optional", "", "q", type=kind)], [], [q]),
        (
            [node("SequenceConstruct", "x x", "s"), node("SequenceAt", "s n", "y")],
            [info("x")],
            [info("y", dims=None)],
        ),
        ([node("Relu", "x", "y")], [info("x"), q], [info("y", dims=None)]),
        ([node("ZipMap", "x", "q", domain="ai.onnx.ml", classlabels_int64s=[1])], [info("x")], [q]),
        (
            [node("Loop", "n _ q", "y", body=_sequence_body(kind))],
            [q],
            [helper.make_value_info("y", kind)],
        ),
    ]
    nodes, inputs, outputs = draw.choice(ways)
    return model(nodes, [integers("n", draw.choice((0, 1, -1)), scalar=True)], inputs, outputs)


def _relu_body() -> GraphProto:
    return helper.make_graph([node("Relu", "a", "z")], "body", [info("a")], [info("z")])


def _sequence_body(kind: onnx.TypeProto) -> GraphProto:
    ins = [info("i", INT64, ()), info("c", BOOL, ()), helper.make_value_info("v", kind)]
    outs = [info("d", BOOL, ()), helper.make_value_info("w", kind)]
    nodes = [node("Identity", "c", "d"), node("Identity", "v", "w")]
    return helper.make_graph(nodes, "body", ins, outs)


SHAPES = (
    (),
    (1,),
    (4,),
    ("b",),
    ("b", 4),
    (4, 4),
    ("b", "s", 4),
    (2, 3, 4),
    ("b", 2, "s", 2),
    (0, 4),
    None,
)
OPERATORS: dict[str, tuple[str, int, dict[str, tuple[Any, ...]]]] = {
    "Attention": ("", 6, {"q_num_heads": (2, 0, -1, 2**40), "kv_num_heads": (2, 1, 3), "scale": (0.0, 1.0),
                          "is_causal": (0, 1, 7), "softcap": (-1.0, 5.0), "qk_matmul_output_mode": (0, 9)}),
    "RotaryEmbedding": ("", 4, {"num_heads": (0, 2, -3), "rotary_embedding_dim": (0, 2, 99), "interleaved": (0, 1, 5)}),
    "RMSNormalization": ("", 2, {"axis": (-1, 0, 9), "epsilon": (0.0, 1e-6)}),
    "LayerNormalization": ("", 3, {"axis": (-1, 0, 9), "stash_type": (1, 11, 99)}),
    "TensorScatter": ("", 3, {"axis": (-2, 0, 7), "mode": ("linear", "circular", "odd")}),
    "GroupQueryAttention": ("com.microsoft", 9, {"num_heads": (2, 0, 3), "kv_num_heads": (1, 0, 2), "do_rotary": (0, 1)}),
    "MultiHeadAttention": ("com.microsoft", 8, {"num_heads": (2, 0, -1), "unidirectional": (0, 1), "scale": (1.0,)}),
    "PagedAttention": ("com.microsoft", 9, {"num_heads": (2,), "kv_num_heads": (1,)}),
    "SkipLayerNormalization": ("com.microsoft", 5, {"epsilon": (1e-6,)}),
    "SkipSimplifiedLayerNormalization": ("com.microsoft", 4, {"epsilon": (1e-6,)}),
    "EmbedLayerNormalization": ("com.microsoft", 8, {}),
    "SimplifiedLayerNormalization": ("", 2, {"axis": (-1,), "stash_type": (1,)}),
    "MoE": ("com.microsoft", 8, {"k": (1, 2, 99), "activation_type": ("silu", "odd")}),
    "QMoE": ("com.microsoft", 14, {"k": (1, 99), "expert_weight_bits": (4, 3)}),
    "MatMulNBits": ("com.microsoft", 4, {"K": (4, 0, -1), "N": (4, 2**40), "bits": (4, 3), "block_size": (16, 0)}),
    "FusedMatMul": ("com.microsoft", 2, {"transA": (0, 1), "transB": (1,), "alpha": (0.0, 2.0)}),
    "BiasGelu": ("com.microsoft", 2, {}),
    "DecoderMaskedMultiHeadAttention": ("com.microsoft", 9, {"num_heads": (2,)}),
    "PackedMultiHeadAttention": ("com.microsoft", 7, {"num_heads": (2,)}),
    "RelativePositionBias": ("com.microsoft", 3, {"max_distance": (8, 0)}),
    "GatedRelativePositionBias": ("com.microsoft", 7, {"num_heads": (2,)}),
    "Einsum": ("", 3, {"equation": ("ij,jk->ik", "...i,...j->...ij", "ii->", "a,b,c->", "->", "i j", "ij->ijk", "é,b->b")}),
    "TopK": ("", 2, {"axis": (-1, 9), "largest": (0, 1)}),
    "Softmax": ("", 1, {"axis": (-1, 2, 99)}),
    "ScatterElements": ("", 3, {"axis": (0, -9), "reduction": ("add", "odd")}),
    "GatherND": ("", 2, {"batch_dims": (0, 5, -1)}),
    "Reshape": ("", 2, {"allowzero": (0, 1)}),
    "Transpose": ("", 1, {"perm": ([1, 0], [0, 0], [5], [-1])}),
    "Split": ("", 2, {"axis": (0, 9), "num_outputs": (1, 3, 0, 2**31)}),
    "Concat": ("", 4, {"axis": (0, -1, 9)}),
    "Slice": ("", 5, {}),
    "Where": ("", 3, {}),
    "Expand": ("", 2, {}),
    "Squeeze": ("", 2, {}),
    "Trilu": ("", 2, {"upper": (0, 1)}),
    "CumSum": ("", 2, {"exclusive": (0, 1)}),
    "Conv": ("", 3, {"group": (1, 0, -1), "pads": ([0], [-1, 5])}),
    "LSTM": ("", 8, {"hidden_size": (4, -1)}),
    "Resize": ("", 4, {"mode": ("nearest", "odd")}),
    "DequantizeLinear": ("", 3, {"axis": (1, 9), "block_size": (0, 16, -1)}),
}  # fmt: skip


def skeletons(draw: Draw) -> ModelProto:
    """Operators we know over values of odd ranks, types, sizes and numbers of inputs."""
    inputs: list[onnx.ValueInfoProto] = [info("x")]
    tensors: list[TensorProto] = []
    nodes: list[NodeProto] = []
    values = ["x"]
    for number in range(draw.choice((1, 1, 2, 4))):
        op = draw.choice(list(OPERATORS))
        domain, most, choices = OPERATORS[op]
        given = []
        for at in range(draw.choice((most, most, draw.randrange(most + 2)))):
            given.append(_operand(draw, f"v{number}_{at}", inputs, tensors, values))
        made = [f"o{number}_{at}" for at in range(draw.choice((1, 1, 1, 2, 3, 5)))]
        attributes = {
            key: draw.choice(found) for key, found in choices.items() if draw.random() < 0.7
        }
        nodes.append(
            helper.make_node(op, given, made, name=f"n{number}", domain=domain, **attributes)
        )
        values += made
    outputs = [
        info(name, draw.choice((FLOAT, FLOAT, FLOAT16)), None)
        for name in values[-2:]
        if name != "x"
    ]
    opset = draw.choice((23, 24, 24, 20, 17, 13, 9))
    return model(nodes, tensors, inputs, outputs, opset)


def _operand(
    draw: Draw, name: str, inputs: list[Any], tensors: list[Any], values: list[str]
) -> str:
    """An input of a node: an earlier value, a new input, a weight, a small constant, none."""
    kind = draw.choice(
        (FLOAT, FLOAT, FLOAT, INT64, FLOAT16, BOOL, TensorProto.INT32, BFLOAT16, DOUBLE)
    )
    pick = draw.random()
    if pick < 0.35:
        return draw.choice(values)
    if pick < 0.45:
        return ""
    if pick < 0.65:
        inputs.append(info(name, kind, draw.choice(SHAPES)))
        return name
    if pick < 0.85:
        dims = [each for each in draw.choice(SHAPES) or () if isinstance(each, int)]
        size = 1
        for dim in dims:
            size *= dim
        width = {FLOAT: 4, INT64: 8, DOUBLE: 8, BOOL: 1, TensorProto.INT32: 4}.get(kind, 2)
        raw = bytes(draw.choice((0, 1)) for _ in range(size * width))
        tensors.append(TensorProto(name=name, data_type=kind, dims=dims, raw_data=raw))
        return name
    chosen = [
        draw.choice((0, 1, -1, 2, 4, draw.choice(SIZES)))
        for _ in range(draw.choice((0, 1, 1, 2, 3)))
    ]
    tensors.append(integers(name, *chosen, scalar=len(chosen) == 1 and draw.random() < 0.5))
    return name
