"""Spellings of squares and inverse square roots that norms are written with, seen through."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute, constant, other_input, producer, scalar


@dataclass(frozen=True)
class InverseRoot:
    """(mean + epsilon)^(-1/2).

    Attributes:
        value: the root.
        epsilon: what was added under the root; NaN where it is no constant.
        divides: `value` is the plain root, which its users divide by.
    """

    value: ir.Value
    epsilon: float
    divides: bool = False


def squared(value: ir.Value | None) -> ir.Value | None:
    """x where the value is x * x or x ^ 2."""
    node = producer(value, "Mul", "Pow")
    if node is None:
        return None
    if node.op_type == "Pow":
        return node.inputs[0] if scalar(node.inputs[1]) == 2.0 else None
    return node.inputs[0] if node.inputs[0] is node.inputs[1] else None


def inverse_root_of(mean: ir.Value) -> InverseRoot | None:
    """The inverse square root that is taken of a mean, an epsilon added, in any spelling."""
    under, epsilon = mean, 0.0
    added = _only_user(mean, "Add")
    if added is not None:
        number = scalar(other_input(added, mean))
        under, epsilon = added.outputs[0], math.nan if number is None else number
    power = _only_user(under, "Pow")
    if power is not None and power.inputs[0] is under:
        exponent = scalar(power.inputs[1])
        if exponent == -0.5:
            return InverseRoot(power.outputs[0], epsilon)
        return _inverted(power.outputs[0], epsilon) if exponent == 0.5 else None
    root = _only_user(under, "Sqrt")
    return None if root is None else _inverted(root.outputs[0], epsilon)


def _inverted(root: ir.Value, epsilon: float) -> InverseRoot:
    reciprocal = _only_user(root, "Reciprocal")
    if reciprocal is not None:
        return InverseRoot(reciprocal.outputs[0], epsilon)
    division = _only_user(root, "Div")
    if division is not None and division.inputs[1] is root and scalar(division.inputs[0]) == 1.0:
        return InverseRoot(division.outputs[0], epsilon)
    power = _only_user(root, "Pow")
    if power is not None and power.inputs[0] is root and scalar(power.inputs[1]) == -1.0:
        return InverseRoot(power.outputs[0], epsilon)
    return InverseRoot(root, epsilon, divides=True)


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
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
