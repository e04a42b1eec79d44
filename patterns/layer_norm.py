"""LAY001: layer normalization, in any spelling of its variance, its root and its product.

Replaces
    y = (x - mean(x)) * (variance(x) + epsilon)^(-1/2) * weight + bias    (Ba et al., 2016)
    -> LayerNormalization-17(x, weight, bias; axis, epsilon, stash_type)

    The variance is the mean of (x - mean)^2, squared by Mul or Pow; the mean may be computed
    twice. The root is any of RMS001's. Weight and bias may be missing. Casts to float and back
    around it become stash_type.

Declines
    epsilon-not-constant: what is added to the variance is computed.
    axes: the mean and the variance are not over the same last axes, or keep no dimensions.

Numerics
    The same operations in the same precision; the order of products may differ (1 unit in the
    last place).

Seen in
    TorchScript exports below opset 17; tf2onnx; hand-written graphs.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import producer
from onnxgen.analysis.products import inverse_root_of, scaled_by, squared, trailing_axis
from onnxgen.patterns.building import Builder
from onnxgen.patterns.norms import norm_bias, norm_weight, ones, outside_casts
from onnxgen.patterns.rule import Declined, Rewrite, Rule


class LayerNorm(Rule):
    """Anchored at the ReduceMean of the squared deviation."""

    code = "LAY001"
    kind = "layer_norm"
    anchors = frozenset({"ReduceMean"})

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        deviation = squared(node.inputs[0])
        centred = producer(deviation, "Sub")
        mean = None if centred is None else producer(centred.inputs[1], "ReduceMean")
        x = None if centred is None else centred.inputs[0]
        if deviation is None or x is None or mean is None or mean.inputs[0] is not x:
            return None
        root = inverse_root_of(node.outputs[0])
        if root is None:
            return None
        axis = trailing_axis(facts, node)
        if axis is None or trailing_axis(facts, mean) != axis:
            raise Declined(self, "axes", "the means are not over the same last axes", node, mean)
        if math.isnan(root.epsilon):
            raise Declined(
                self, "epsilon-not-constant", "what is added to the variance is no constant", node
            )
        normalized = scaled_by(root, deviation)
        if normalized is None:
            normalized = _scaled_twin(facts, root.value, x, axis, root.divides)
        if normalized is None or facts.shapes.rank(normalized) != facts.shapes.rank(x):
            return None  # an epsilon with more axes than x gives the result more, too
        weight, result = norm_weight(facts, normalized, x, axis)
        bias, result = norm_bias(facts, result, x, axis)
        x, result, stash = outside_casts(x, result)
        if weight is None and bias is None:
            weight, result = norm_weight(facts, result, x, axis)
            bias, result = norm_bias(facts, result, x, axis)
        if weight is None:
            weight = ones(facts, builder, x, axis)
        if weight is None or x.dtype is None:
            raise Declined(self, "axes", "the size of the normalized axes is not known", node)
        affine = [
            operand
            if operand is None or operand.dtype == x.dtype
            else builder.op("Cast", [operand], {"to": int(x.dtype)})
            for operand in (weight, bias)
        ]
        y = builder.op(
            "LayerNormalization",
            [x, *affine],
            {"axis": axis, "epsilon": root.epsilon, "stash_type": int(stash)},
        )
        fused = y.producer()
        assert fused is not None
        if result.dtype != x.dtype and result.dtype is not None:
            y = builder.op("Cast", [y], {"to": int(result.dtype)})
        return Rewrite(fused, ((result, y),), {"epsilon": root.epsilon, "axis": axis})


def _scaled_twin(
    facts: Facts, root: ir.Value, x: ir.Value, axis: int, divides: bool
) -> ir.Value | None:
    """The product with a second x - mean(x), where an exporter computed it twice."""
    for use in root.uses():
        node = use.node
        if node.op_type != ("Div" if divides else "Mul") or (divides and use.idx != 1):
            continue
        other = producer(node.inputs[1 - use.idx], "Sub")
        if other is None or other.inputs[0] is not x:
            continue
        twin = producer(other.inputs[1], "ReduceMean")
        if twin is not None and twin.inputs[0] is x and trailing_axis(facts, twin) == axis:
            return node.outputs[0]
    return None
