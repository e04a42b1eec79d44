"""Spellings of squares and inverse square roots that norms are written with, seen through."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from onnxgen.analysis.graph import other_input, producer, scalar


@dataclass(frozen=True)
class InverseRoot:
    """(mean + epsilon)^(-1/2).

    Attributes:
        value: the root.
        epsilon: what was added under the root; NaN where it is no constant.
        divides: `value` is the plain root, which its users divide by.
        bounded: the epsilon stands elsewhere: it is added to the root, or bounds the mean or the
            root from below.
    """

    value: ir.Value
    epsilon: float
    divides: bool = False
    bounded: bool = False


def squared(value: ir.Value | None) -> ir.Value | None:
    """x where the value is x * x or x ^ 2."""
    node = producer(value, "Mul", "Pow")
    if node is None:
        return None
    if node.op_type == "Pow":
        return node.inputs[0] if scalar(node.inputs[1]) == 2.0 else None
    return node.inputs[0] if node.inputs[0] is node.inputs[1] else None


def inverse_root_of(mean: ir.Value, *, rooted: bool = False) -> InverseRoot | None:
    """The inverse square root that is taken of a mean, an epsilon added, in any spelling.

    Args:
        rooted: the mean is its root already.
    """
    if rooted:
        return _inverted(mean, 0.0, bounded=False)
    under, epsilon = mean, 0.0
    added, bound = only_user(mean, "Add"), _bound(mean)
    if added is not None:
        number = scalar(other_input(added, mean))
        under, epsilon = added.outputs[0], math.nan if number is None else number
    elif bound is not None:
        under = bound
    bounded = bound is not None
    power = only_user(under, "Pow")
    if power is not None and power.inputs[0] is under:
        exponent = scalar(power.inputs[1])
        if exponent == -0.5:
            return InverseRoot(power.outputs[0], epsilon, bounded=bounded)
        return _inverted(power.outputs[0], epsilon, bounded) if exponent == 0.5 else None
    root = only_user(under, "Sqrt")
    return None if root is None else _inverted(root.outputs[0], epsilon, bounded)


def _bound(value: ir.Value) -> ir.Value | None:
    """The value, bounded from below."""
    node = only_user(value, "Max") or only_user(value, "Clip")
    return None if node is None else node.outputs[0]


def _inverted(root: ir.Value, epsilon: float, bounded: bool) -> InverseRoot:
    added, bound = only_user(root, "Add"), _bound(root)
    if added is not None and scalar(other_input(added, root)) is not None:
        root, bounded = added.outputs[0], True
    elif bound is not None:
        root, bounded = bound, True
    reciprocal = only_user(root, "Reciprocal")
    if reciprocal is not None:
        return InverseRoot(reciprocal.outputs[0], epsilon, bounded=bounded)
    division = only_user(root, "Div")
    if division is not None and division.inputs[1] is root and scalar(division.inputs[0]) == 1.0:
        return InverseRoot(division.outputs[0], epsilon, bounded=bounded)
    power = only_user(root, "Pow")
    if power is not None and power.inputs[0] is root and scalar(power.inputs[1]) == -1.0:
        return InverseRoot(power.outputs[0], epsilon, bounded=bounded)
    return InverseRoot(root, epsilon, divides=True, bounded=bounded)


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The node that alone reads a value, if it is of this type."""
    users = {use.node for use in value.uses()}
    if len(users) != 1:
        return None
    (node,) = users
    return node if node.op_type == op_type and node.domain in ("", "ai.onnx") else None


def scaled_by(root: InverseRoot, x: ir.Value) -> ir.Value | None:
    """x times the inverse root, or divided by the root."""
    for use in root.value.uses():
        node = use.node
        if root.divides and node.op_type == "Div" and node.inputs[0] is x and use.idx == 1:
            return node.outputs[0]
        if not root.divides and node.op_type == "Mul" and node.inputs[1 - use.idx] is x:
            return node.outputs[0]
    return None


def scaled_with_weight(
    root: InverseRoot, x: ir.Value, *, alone: bool = True
) -> tuple[ir.Value, ir.Value] | None:
    """(weight, product) where the inverse root is multiplied by a weight before it meets x.

    Args:
        alone: nothing else reads the weighted root.
    """
    for use in root.value.uses():
        node = use.node
        divided = node.op_type == "Div" and use.idx == 1
        if (node.op_type != "Mul" or root.divides) and not (divided and root.divides):
            continue
        weight, scale = node.inputs[1 - use.idx], node.outputs[0]
        if weight is None or (alone and len(scale.uses()) != 1):
            continue
        for met in scale.uses():
            if met.node.op_type == "Mul" and met.node.inputs[1 - met.idx] is x:
                return weight, met.node.outputs[0]
    return None
