"""RMS001: root mean square normalization, in any spelling of its square, its root and its product.

Replaces
    y = x * (mean(x^2, last axes) + epsilon)^(-1/2) * weight        (Zhang and Sennrich, 2019)
    -> RMSNormalization-23(x, weight; axis, epsilon, stash_type)

    The square is Mul(x, x) or Pow(x, 2); the mean is any of `analysis.moments`; the root is
    Reciprocal(Sqrt), Div by Sqrt, Pow(-0.5), or Sqrt and Div; factors multiply in any order and
    grouping, with or without a weight, and casts to float and back around the normalization become
    stash_type. Where only the result is narrowed before the weight, the weight is widened instead
    and the product narrowed.

Looks for
    1. a mean of squares over the last axes
    2. one over its root
    3. x times that
    4. an epsilon that is a constant and is added under the root
    5. a weight of the axes' size, or none

Declines
    epsilon-not-constant: what is added to the mean is computed.
        Expected: a constant.
        Change: export with the epsilon as a number of the configuration, not as a tensor.
    epsilon-place: the epsilon is added to the root, or bounds the mean or the root from below.
        Expected: sqrt(mean + epsilon).
        Change: none: the operator adds it under the root, and another place is another function.
    axes: the mean is not over the last axes, or keeps no dimensions.
        Expected: the last axis, or the last few, of fixed sizes.
        Change: none: the operator has the last axes only; a transposed model would fit.

Numerics
    The same operations in the same precision; the order of the two multiplications may differ
    (1 unit in the last place).

Seen in
    torch.onnx.export, TorchScript and dynamo, torch 2.13; transformers' OnnxExporter 5.23.

Example
    opset 20
    (float[b,s,40] x)
    => (float[b,s,40] y)
    <float[40] w>
    {
      q = Pow(x, 2.0)
      m = ReduceMean(q, [-1])
      e = Add(m, 0.00001)
      r = Sqrt(e)
      n = Div(x, r)
      y = Mul(n, w)
    }
    becomes
        y = RMSNormalization<axis = -1, epsilon = 1e-05, stash_type = 1>(x, w)
"""

from __future__ import annotations

import math

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.moments import REDUCTIONS, mean_by
from onnxgen.analysis.products import inverse_root_of, scaled_by, scaled_with_weight
from onnxgen.patterns.building import Builder
from onnxgen.patterns.norms import fits, narrowed, norm_weight, ones, outside_casts
from onnxgen.patterns.rule import Declined, Rewrite, Rule


class RMSNorm(Rule):
    """Anchored at the reduction of the square."""

    code = "RMS001"
    kind = "rms_norm"
    anchors = frozenset(REDUCTIONS)

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        mean = mean_by(facts, node)
        if mean is None or not mean.squares:
            return None
        builder.passed(1)
        root = inverse_root_of(mean.value, rooted=mean.rooted)
        if root is None:
            return None
        builder.passed(2)
        x, axis = mean.x, mean.axis
        normalized, grouped = scaled_by(root, x), scaled_with_weight(root, x)
        if normalized is None and grouped is None:
            return None
        builder.passed(3)
        if root.bounded:
            reason = "the epsilon is added to the root, or is a bound: the operator adds it inside"
            raise Declined(self, "epsilon-place", reason, node)
        if axis is None:
            raise Declined(self, "axes", "the mean is not over the last axes", node)
        if math.isnan(root.epsilon):
            raise Declined(
                self, "epsilon-not-constant", "what is added to the mean is not a constant", node
            )
        builder.passed(4)
        if normalized is not None:
            weight, result = norm_weight(facts, normalized, x, axis)
        elif grouped is not None and fits(facts, grouped[0], x, axis):
            weight, result = grouped
        else:
            return None
        if facts.shapes.rank(result) != facts.shapes.rank(x):
            return None  # an epsilon with more axes than x gives the result more, too
        x, result, stash = outside_casts(x, result)
        for step in (result, narrowed(result)):
            if weight is None and step is not None:
                weight, product = norm_weight(facts, step, x, axis)
                result = result if weight is None else product
        if weight is None:
            weight = ones(facts, builder, x, axis)
        if weight is None:
            raise Declined(self, "axes", "the size of the normalized axes is not known", node)
        assert x.dtype is not None
        if weight.dtype != x.dtype:
            weight = builder.op("Cast", [weight], {"to": int(x.dtype)})
        y = builder.op(
            "RMSNormalization",
            [x, weight],
            {"axis": axis, "epsilon": root.epsilon, "stash_type": int(stash)},
        )
        out = y
        if result.dtype is not None and result.dtype != x.dtype:
            out = builder.op("Cast", [y], {"to": int(result.dtype)})
        fused = y.producer()
        assert fused is not None
        return Rewrite(fused, ((result, out),), {"epsilon": root.epsilon, "axis": axis})
