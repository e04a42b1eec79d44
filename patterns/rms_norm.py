"""RMS001: root mean square normalization, in any spelling of its square, its root and its product.

Replaces
    y = x * (mean(x^2, last axes) + epsilon)^(-1/2) * weight        (Zhang and Sennrich, 2019)
    -> RMSNormalization-23(x, weight; axis, epsilon, stash_type)

    The square is Mul(x, x) or Pow(x, 2); the root is Reciprocal(Sqrt), Div by Sqrt, Pow(-0.5), or
    Sqrt and Div; factors multiply in any order and grouping, with or without a weight, and casts
    to float and back around the normalization become stash_type.

Declines
    epsilon-not-constant: what is added to the mean is computed.
    axes: the mean is not over the last axes, or keeps no dimensions.

Numerics
    The same operations in the same precision; the order of the two multiplications may differ
    (1 unit in the last place).

Seen in
    torch.onnx.export, TorchScript and dynamo, torch 2.13; transformers' OnnxExporter 5.23.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute, constant, producer, scalar
from onnxgen.analysis.products import inverse_root_of, squared
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rule import Declined, Rewrite, Rule


class RMSNorm(Rule):
    """Anchored at the ReduceMean of the square."""

    code = "RMS001"
    kind = "rms_norm"
    anchors = frozenset({"ReduceMean"})

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        x = squared(node.inputs[0])
        if x is None:
            return None
        root = inverse_root_of(node.outputs[0])
        if root is None:
            return None
        axis = trailing_axis(facts, node)
        if axis is None:
            raise Declined(self, "axes", "the mean is not over the last axes", node)
        if root.epsilon is None:
            raise Declined(
                self, "epsilon-not-constant", "what is added to the mean is not a constant", node
            )
        normalized = _normalized(root.value, x, root.divides)
        if normalized is None:
            return None
        x, normalized, stash = _outside_casts(x, normalized)
        weight, result = _weighted(facts, normalized, x, axis)
        if weight is None:
            weight = _ones(facts, builder, x, axis)
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


def trailing_axis(facts: Facts, node: ir.Node) -> int | None:
    """The first of the last axes, from the end, that a Reduce runs over and keeps; else None."""
    rank = facts.shapes.rank(node.inputs[0])
    axes = attribute(node, "axes")
    if axes is None and len(node.inputs) > 1:
        found = constant(node.inputs[1])
        axes = None if found is None else found.reshape(-1).tolist()
    if not axes or not attribute(node, "keepdims", 1):
        return None
    if rank is None:
        return -1 if list(axes) == [-1] else None
    wanted = sorted(int(axis) % rank - rank for axis in axes)
    return wanted[0] if wanted == list(range(-len(wanted), 0)) else None


def _normalized(root: ir.Value, x: ir.Value, divides: bool) -> ir.Value | None:
    """x * root, or x / root where the root is not inverted."""
    for use in root.uses():
        node = use.node
        if divides and node.op_type == "Div" and node.inputs[0] is x and use.idx == 1:
            return node.outputs[0]
        if not divides and node.op_type == "Mul" and node.inputs[1 - use.idx] is x:
            return node.outputs[0]
    return None


def _outside_casts(x: ir.Value, y: ir.Value) -> tuple[ir.Value, ir.Value, ir.DataType]:
    """Input and output outside the casts to a wider type and back, and the wider type."""
    stash = x.dtype or ir.DataType.FLOAT
    cast = producer(x, "Cast")
    users = [use.node for use in y.uses()]
    narrow = None if cast is None else cast.inputs[0]
    if narrow is None or narrow.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return x, y, stash
    if len(users) == 1 and users[0].op_type == "Cast":
        if users[0].outputs[0].dtype == narrow.dtype:
            return narrow, users[0].outputs[0], stash
        return x, y, stash
    return x, y, stash


def _weighted(
    facts: Facts, y: ir.Value, x: ir.Value, axis: int
) -> tuple[ir.Value | None, ir.Value]:
    """The weight that the normalized value is multiplied by, and the product."""
    users = [use.node for use in y.uses()]
    if len(users) != 1 or users[0].op_type != "Mul" or y.is_graph_output():
        return None, y
    product = users[0]
    weight = product.inputs[1] if product.inputs[0] is y else product.inputs[0]
    shape, whole = facts.shapes.of(weight), facts.shapes.of(x)
    if weight is None or shape is None or whole is None or facts.is_activation(weight):
        return None, y
    if scalar(weight) is not None and len(shape) == 0:
        return None, y
    # A weight of the size of the normalized axes; leading axes of 1 would change no element, but
    # the operator wants none.
    if len(shape) != -axis or not facts.shapes.same_shape(shape, whole[axis:]):
        return None, y
    return weight, product.outputs[0]


def _ones(facts: Facts, builder: Builder, x: ir.Value, axis: int) -> ir.Value | None:
    shape = facts.shapes.of(x)
    if shape is None or x.dtype is None or not all(isinstance(s, int) for s in shape[axis:]):
        return None
    sizes = [int(size) for size in shape[axis:] if isinstance(size, int)]
    return builder.constant(np.ones(sizes, dtype=x.dtype.numpy()), "onnxgen/ones")
