"""MOE002: rows times matrices that a router chooses, where MOE001 found no whole experts.

Replaces
    output[m, j] = rows[m] @ W[i[m, j]] + b[i[m, j]]
    -> onnxgen::GroupedMatMul(rows, W, i, b)                     (onnx/onnx #8193)
    sum over j of w[t, j] * (rows[t * k + j] @ W[i[t, j]] + b[i[t, j]])
    -> ReduceSum(GroupedMatMul(rows, W, i as [T*k, 1], b) * w)

    A mixture of attention has such products, for queries and for outputs, with attention in
    between; and so have experts that do something else between their products, or behind them,
    than an activation. Matrices gathered for each row, or one product for each group of rows.

Looks for
    1. rows times matrices of a stack that indices choose
    2. indices below the number of matrices
    3. an output whose size can be computed

Declines
    layout: a size that must be known is not.
        Expected: an output whose sizes follow from the inputs'.
        Change: make only batch and lengths dynamic when exporting.

Numerics
    The same products.

Seen in
    JetMoE, transformers 5.23, by dynamo and by transformers' exporter.

Example
    opset 20
    (float[t,8] x)
    => (float[t,8] y)
    <float[8,5] R, float[5,6,8] W1, float[5,8,6] W2>
    {
      l = MatMul(x, R)
      p = Softmax(l)
      w, i = TopK(p, [2])
      g = Gather(W1, i)
      c = Unsqueeze(x, [1, 3])
      h4 = MatMul(g, c)
      h = Squeeze(h4, [3])
      m = Softmax(h)
      g2 = Gather(W2, i)
      mc = Unsqueeze(m, [3])
      d4 = MatMul(g2, mc)
      d = Squeeze(d4, [3])
      u = Unsqueeze(w, [2])
      v_ = Mul(d, u)
      y = ReduceSum<keepdims = 0>(v_, [1])
    }
    becomes
        ...
        groupedmatmul_2 = onnxgen.GroupedMatMul:turned(x, W1, i)
        m = Softmax(groupedmatmul_2)
        reshape = Reshape(m, [-1,  6])
        reshape_2 = Reshape(i, [-1,  1])
        groupedmatmul = onnxgen.GroupedMatMul:turned(reshape, W2, reshape_2)
        d4 = Reshape(groupedmatmul, [-1,  2,  8,  1])
        ...
"""

from __future__ import annotations

import onnx_ir as ir

from onnxgen import functions
from onnxgen.analysis.expert_routing import bound_of, distinct
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.grouped import Grouped, grouped_at
from onnxgen.functions import grouped_matmul
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rule import Declined, Rewrite, Rule


class GroupedProducts(Rule):
    """Anchored at the product with a stack's first matrix, or with gathered ones."""

    code = "MOE002"
    kind = "grouped_matmul"
    anchors = frozenset({"MatMul", "Gemm"})

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        found = grouped_at(facts, node)
        if found is None:
            return None
        builder.passed(1)
        bound = bound_of(facts, found.indices)
        if bound is not None and bound > found.groups:
            return None
        builder.passed(2)
        op, ints = builder.op, builder.ints
        stack = found.source.value
        weights = facts.shapes.of(stack) or ()
        inner = weights[1 if found.source.turned else 2]
        assert isinstance(inner, int)
        rows = found.rows
        if facts.shapes.rank(rows) != 2:
            rows = op("Reshape", [rows, ints(-1, inner)])
        if stack.dtype is not None and rows.dtype != stack.dtype:
            rows = op("Cast", [rows], {"to": int(stack.dtype)})
        each = 1 if found.weights is not None else found.slots
        indices = found.indices
        if indices.dtype != ir.DataType.INT64:
            indices = op("Cast", [indices], {"to": int(ir.DataType.INT64)})
        if facts.shapes.rank(indices) != 2 or (facts.shapes.of(indices) or ())[-1] != each:
            indices = op("Reshape", [indices, ints(-1, each)])
        bias = None if found.bias is None else found.bias.value
        if bias is not None and facts.shapes.rank(bias) != 2:
            bias = op("Reshape", [bias, ints(found.groups, found.width)])
        overload = grouped_matmul.overload_of(turned=not found.source.turned, bias=bias is not None)
        (y,) = builder.ops(
            grouped_matmul.NAME,
            [rows, stack, indices, bias],
            1,
            domain=functions.DOMAIN,
            overload=overload,
        )
        fused = y.producer()
        assert fused is not None
        if found.weights is not None:
            y = _summed(builder, found, y)
        old = found.output
        if old.dtype is not None and y.dtype != old.dtype:
            y = op("Cast", [y], {"to": int(old.dtype)})
        shape = facts.shapes.of(old)
        target = None if shape is None else builder.target(y, shape)
        if target is None:
            raise Declined(self, "layout", "the output's size cannot be computed", node)
        y = op("Reshape", [y, target])
        details: dict[str, str | int | float | bool] = {
            "groups": found.groups,
            "slots": found.slots,
        }
        return Rewrite(
            fused,
            ((old, y),),
            details,
            choices={found.indices: found.groups},
            repeats=not distinct(facts, found.indices),
            loose=bound is None,
        )


def _summed(builder: Builder, found: Grouped, y: ir.Value) -> ir.Value:
    """[T, N]: the weighted sum of [T*k, 1, N] over the slots."""
    op, ints = builder.op, builder.ints
    assert found.weights is not None
    weights = op("Reshape", [found.weights, ints(-1, found.slots, 1)])
    if weights.dtype is not None and y.dtype != weights.dtype:
        y = op("Cast", [y], {"to": int(weights.dtype)})
    y = op("Reshape", [y, ints(-1, found.slots, found.width)])
    return op("ReduceSum", [op("Mul", [y, weights]), ints(1)], {"keepdims": 0})
