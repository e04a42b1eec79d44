"""ORT002: the projections of queries, keys and values become one.

Replaces
    GroupQueryAttention(x @ Wq + bq, x @ Wk + bk, x @ Wv + bv, ...)
    -> GroupQueryAttention(x @ [Wq Wk Wv] + [bq bk bv], , , ...)

    Where an exporter split one projection, the split goes. Weights are joined when the model is
    written, one layer at a time.

Looks for
    1. a GroupQueryAttention with separate queries, keys and values
    2. three products of one tensor with constants, or three parts of one

Declines
    Nothing: what does not fit stays as it is, and is no site.

Numerics
    The same products.

Seen in
    every decoder without norms of heads.

Example
    <ir_version: 10, opset_import: ["" : 24, "com.microsoft" : 1]> g
    (int64[b,s] ids, float[b,3,p,16] past_k, float[b,3,p,16] past_v, int64[b,t] attention_mask)
    => (float[b,s,96] y, float[b,3,u,16] present_k, float[b,3,u,16] present_v)
    <float[37,50] table, float[50,96] wq, float[50,48] wk, float[50,48] wv>
    {
      x = Gather(table, ids)
      q = MatMul(x, wq)
      k = MatMul(x, wk)
      v = MatMul(x, wv)
      n = ReduceSum<keepdims = 0>(attention_mask, [1])
      n1 = Sub(n, 1)
      count = Cast<to = 6>(n1)
      l = Shape(attention_mask)
      t64 = Gather(l, 1)
      total = Cast<to = 6>(t64)
      y, present_k, present_v = com.microsoft.GroupQueryAttention<num_heads = 6,
          kv_num_heads = 3>(q, k, v, past_k, past_v, count, total)
    }
    becomes
        ...
        matmul = MatMul(x, packed)
        y, present_k, present_v = com.microsoft.GroupQueryAttention<num_heads = 6, kv_num_heads =
            3>(matmul, , , past_k, past_v, count, total)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxgen import derived
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import given, other_input, producer
from onnxgen.analysis.view_shapes import slice_bounds
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rule import Rewrite, Rule


@dataclass(frozen=True)
class _Projection:
    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None


class PackedProjections(Rule):
    """Anchored at GroupQueryAttention with separate keys and values."""

    code = "ORT002"
    kind = "projection"
    anchors = frozenset({"GroupQueryAttention"})

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        parts = list(node.inputs[:3])
        if any(part is None for part in parts):
            return None
        builder.passed(1)
        values = [given(node, index) for index in range(3)]
        packed = _whole(facts, values)
        if packed is None:
            projections = [_projection(value) for value in values]
            if any(each is None for each in projections):
                return None
            packed = _joined(builder, [each for each in projections if each is not None])
        if packed is None:
            return None
        attributes = {name: found.value for name, found in node.attributes.items()}
        outputs = builder.ops(
            "GroupQueryAttention",
            [packed, None, None, *node.inputs[3:]],
            len(node.outputs),
            attributes,
            domain="com.microsoft",
        )
        fused = outputs[0].producer()
        assert fused is not None
        return Rewrite(fused, tuple(zip(node.outputs, outputs, strict=True)))


def _whole(facts: Facts, values: Sequence[ir.Value]) -> ir.Value | None:
    """The tensor that queries, keys and values are the consecutive parts of, if they are."""
    source: ir.Value | None = None
    at = 0
    for value in values:
        node, shape = producer(value, "Split", "Slice"), facts.shapes.of(value)
        if node is None or shape is None or not isinstance(shape[-1], int):
            return None
        start = _start(facts, node, value)
        if start != at or (source is not None and given(node) is not source):
            return None
        source, at = given(node), at + shape[-1]
    whole = facts.shapes.of(source)
    return source if whole is not None and whole[-1] == at else None


def _start(facts: Facts, node: ir.Node, value: ir.Value) -> int | None:
    """Where on the last axis a part starts; None where it is cut along another."""
    rank = facts.shapes.rank(given(node))
    if node.op_type == "Split":
        axis = node.attributes["axis"].value if "axis" in node.attributes else 0
        if rank is None or axis % rank != rank - 1:
            return None
        start = 0
        for output in node.outputs:
            if output is value:
                return start
            size = facts.shapes.of(output)
            if size is None or not isinstance(size[-1], int):
                return None
            start += size[-1]
    bounds = slice_bounds(facts.shapes, node)
    if bounds is None or len(bounds) != 1 or rank is None or bounds[0][0] != rank - 1:
        return None
    start_at, step = bounds[0][1], bounds[0][3]
    return start_at if step == 1 and isinstance(start_at, int) else None


def _projection(value: ir.Value) -> _Projection | None:
    """x @ W, or x @ W + b, read by one node, of constants."""
    if len(list(value.uses())) != 1 or value.is_graph_output():
        return None
    add = producer(value, "Add")
    bias = None
    if add is not None:
        product = next((v for v in add.inputs if producer(v, "MatMul") is not None), None)
        bias = None if product is None else other_input(add, product)
        if product is None or bias is None or bias.const_value is None or bias.is_graph_input():
            return None
        if bias.const_value.shape.rank() != 1:
            return None
        value = product
    node = producer(value, "MatMul")
    if node is None or len(list(value.uses())) != 1:
        return None
    x, weight = given(node, 0), given(node, 1)
    if weight.const_value is None or weight.is_graph_input() or len(weight.uses()) != 1:
        return None
    return _Projection(x, weight, bias) if weight.const_value.shape.rank() == 2 else None


def _joined(builder: Builder, projections: Sequence[_Projection]) -> ir.Value | None:
    x, dtype = projections[0].x, projections[0].weight.dtype
    if any(each.x is not x or each.weight.dtype != dtype for each in projections):
        return None
    weights = [each.weight for each in projections]
    packed = builder.op("MatMul", [x, _side_by_side(builder, weights, axis=1)])
    if any(each.bias is not None for each in projections):
        biases = [
            each.bias
            if each.bias is not None
            else builder.constant(np.zeros(_columns(each), dtype=_kind(each)))
            for each in projections
        ]
        packed = builder.op("Add", [packed, _side_by_side(builder, biases, axis=0)])
    return packed


def _side_by_side(builder: Builder, values: Sequence[ir.Value], axis: int) -> ir.Value:
    tensors = [each.const_value for each in values if each.const_value is not None]
    return builder.derived(derived.joined([derived.whole(each) for each in tensors], axis))


def _columns(each: _Projection) -> int:
    assert each.weight.const_value is not None
    return int(each.weight.const_value.shape.numpy()[1])


def _kind(each: _Projection) -> np.dtype[np.generic]:
    assert each.weight.dtype is not None
    kind: np.dtype[np.generic] = each.weight.dtype.numpy()
    return kind
