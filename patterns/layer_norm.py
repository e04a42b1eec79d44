"""LAY001: layer normalization, in any spelling of its variance, its root and its product.

Replaces
    y = (x - mean(x)) * (variance(x) + epsilon)^(-1/2) * weight + bias    (Ba et al., 2016)
    -> LayerNormalization-17(x, weight, bias; axis, epsilon, stash_type)

    The variance is the mean of (x - mean)^2, or of x^2 less mean^2; means and roots are any of
    RMS001's, and the mean may be computed twice. Weight and bias may be missing, and the product
    be multiplied out: x * g + (bias - mean * g), with g = weight / root. Casts to float and back
    around it become stash_type.

Looks for
    1. a variance: a mean of squared deviations, or of squares less the squared mean, over the last
       axes
    2. one over its root
    3. x less its mean, times that
    4. an epsilon that is a constant and is added under the root
    5. a weight and a bias of the axes' size, or none

Declines
    epsilon-not-constant: what is added to the variance is computed.
        Expected: a constant.
        Change: export with the epsilon as a number of the configuration, not as a tensor.
    epsilon-place: the epsilon is added to the root, or bounds the variance or the root from below.
        Expected: sqrt(variance + epsilon).
        Change: none: the operator adds it under the root, and another place is another function.
    axes: the mean and the variance are not over the same last axes, or keep no dimensions.
        Expected: the last axis, or the last few, of fixed sizes, for both.
        Change: none: the operator has the last axes only; a transposed model would fit.

Numerics
    The same operations in the same precision; the order of products may differ (1 unit in the
    last place). Where the variance was a difference of squares, the operator's is more exact.

Seen in
    TorchScript exports below opset 17; tf2onnx (multiplied out); flax (a difference of squares);
    hand-written graphs.

Example
    opset 20
    (float[b,s,40] x)
    => (float[b,s,40] y)
    <float[40] w, float[40] c>
    {
      m = ReduceMean(x, [-1])
      d = Sub(x, m)
      p = Mul(d, d)
      v = ReduceMean(p, [-1])
      e = Add(v, 0.00001)
      r = Sqrt(e)
      n = Div(d, r)
      g = Mul(n, w)
      y = Add(g, c)
    }
    becomes
        y = LayerNormalization<axis = -1, epsilon = 1e-05, stash_type = 1>(x, w, c)
"""

from __future__ import annotations

import math
from dataclasses import replace

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import other_input, producer, scalar
from onnxgen.analysis.moments import REDUCTIONS, Mean, mean_by, mean_of
from onnxgen.analysis.products import (
    InverseRoot,
    inverse_root_of,
    only_user,
    scaled_by,
    scaled_with_weight,
    squared,
)
from onnxgen.patterns.building import Builder
from onnxgen.patterns.norms import fits, norm_bias, norm_weight, ones, outside_casts
from onnxgen.patterns.rule import Declined, Rewrite, Rule


class LayerNorm(Rule):
    """Anchored at the reduction of the squared deviation, or of the square."""

    code = "LAY001"
    kind = "layer_norm"
    anchors = frozenset(REDUCTIONS)

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        found = _variance(facts, node)
        if found is None:
            return None
        builder.passed(1)
        variance, mean = found
        x, axis = variance.x, variance.axis if variance.axis == mean.axis else None
        root = inverse_root_of(variance.value, rooted=variance.rooted)
        if root is None:
            return None
        builder.passed(2)
        normalized = _scaled(facts, root, x, mean)
        affine = _multiplied_out(facts, root, x, mean)
        if normalized is None and affine is None:
            return None
        builder.passed(3)
        if root.bounded:
            reason = "the epsilon is added to the root, or is a bound: the operator adds it inside"
            raise Declined(self, "epsilon-place", reason, node)
        if axis is None:
            reason = "the means are not over the same last axes"
            raise Declined(self, "axes", reason, node, mean.value.producer())
        if math.isnan(root.epsilon):
            raise Declined(
                self, "epsilon-not-constant", "what is added to the variance is no constant", node
            )
        builder.passed(4)
        weight: ir.Value | None
        bias: ir.Value | None
        if normalized is not None:
            weight, result = norm_weight(facts, normalized, x, axis)
            bias, result = norm_bias(facts, result, x, axis)
        else:
            assert affine is not None
            weight, bias, result = affine
        if facts.shapes.rank(result) != facts.shapes.rank(x):
            return None  # an epsilon with more axes than x gives the result more, too
        x, result, stash = outside_casts(x, result)
        if weight is None and bias is None:
            weight, result = norm_weight(facts, result, x, axis)
            bias, result = norm_bias(facts, result, x, axis)
        if weight is None:
            weight = ones(facts, builder, x, axis)
        if weight is None or x.dtype is None:
            raise Declined(self, "axes", "the size of the normalized axes is not known", node)
        operands = [
            operand
            if operand is None or operand.dtype == x.dtype
            else builder.op("Cast", [operand], {"to": int(x.dtype)})
            for operand in (weight, bias)
        ]
        y = builder.op(
            "LayerNormalization",
            [x, *operands],
            {"axis": axis, "epsilon": root.epsilon, "stash_type": int(stash)},
        )
        fused = y.producer()
        assert fused is not None
        if result.dtype != x.dtype and result.dtype is not None:
            y = builder.op("Cast", [y], {"to": int(result.dtype)})
        return Rewrite(fused, ((result, y),), {"epsilon": root.epsilon, "axis": axis})


def _variance(facts: Facts, node: ir.Node) -> tuple[Mean, Mean] | None:
    """The variance of x that a reduction is the heart of, and the mean of x that it is about."""
    square = mean_by(facts, node)
    if square is None or not square.squares:
        return None
    centred = producer(square.x, "Sub")
    if centred is not None:
        x, mean = centred.inputs[0], mean_of(facts, centred.inputs[1])
        if mean is not None and mean.x is x and not mean.squares:
            return replace(square, x=mean.x), mean
    less = only_user(square.value, "Sub")
    if less is None or less.inputs[0] is not square.value or square.rooted:
        return None
    mean = mean_of(facts, squared(less.inputs[1]))
    if mean is None or mean.x is not square.x or mean.squares:
        return None
    value = less.outputs[0]
    clamped = only_user(value, "Max") or only_user(value, "Relu")
    if clamped is not None and (
        clamped.op_type == "Relu" or scalar(other_input(clamped, value)) == 0.0
    ):
        value = clamped.outputs[0]  # what rounding makes of a variance is never below 0
    return replace(square, value=value), mean


def _deviation(facts: Facts, value: ir.Value | None, x: ir.Value, mean: Mean) -> bool:
    """Whether a value is x less its mean."""
    node = producer(value, "Sub")
    return node is not None and node.inputs[0] is x and _is_mean(facts, node.inputs[1], mean)


def _is_mean(facts: Facts, value: ir.Value | None, mean: Mean) -> bool:
    """Whether a value is this mean, which may be computed again."""
    if value is mean.value:
        return True
    other = mean_of(facts, value)
    return other is not None and replace(other, value=mean.value) == mean and mean.axis is not None


def _scaled(facts: Facts, root: InverseRoot, x: ir.Value, mean: Mean) -> ir.Value | None:
    """The product of the inverse root with x less its mean, which may be computed again."""
    for use in root.value.uses():
        if use.node.op_type not in ("Mul", "Div") or len(use.node.inputs) != 2:
            continue
        other = use.node.inputs[1 - use.idx]
        if other is not None and _deviation(facts, other, x, mean):
            found = scaled_by(root, other)
            if found is not None:
                return found
    return None


def _multiplied_out(
    facts: Facts, root: InverseRoot, x: ir.Value, mean: Mean
) -> tuple[ir.Value | None, ir.Value | None, ir.Value] | None:
    """(weight, bias, result) of x * g + (bias - mean * g), or x * g - mean * g."""
    axis = mean.axis
    grouped = scaled_with_weight(root, x, alone=False)
    plain = scaled_by(root, x)
    if grouped is not None and axis is not None and fits(facts, grouped[0], x, axis):
        weight, turned = grouped[0], grouped[1]
    elif plain is not None and not root.divides:
        weight, turned = None, plain
    else:
        return None
    product = turned.producer()
    scale = None if product is None else other_input(product, x)
    users = [use.node for use in turned.uses()]
    if scale is None or len(users) != 1:
        return None
    (end,) = users
    rest = other_input(end, turned) if end.op_type in ("Add", "Sub") else None
    bias: ir.Value | None = None
    if end.op_type == "Add":
        less = producer(rest, "Sub")
        if less is None or axis is None or not fits(facts, less.inputs[0], x, axis):
            return None
        bias, rest = less.inputs
    elif end.inputs[0] is not turned:
        return None
    shift = producer(rest, "Mul")
    if shift is None or scale not in shift.inputs:
        return None
    if not _is_mean(facts, other_input(shift, scale), mean):
        return None
    return weight, bias, end.outputs[0]
