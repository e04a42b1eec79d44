"""Spellings of squares and inverse square roots that norms are written with, seen through."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxgen.analysis.graph import producer, scalar


@dataclass(frozen=True)
class InverseRoot:
    """(mean + epsilon)^(-1/2).

    Attributes:
        value: the root.
        epsilon: what was added under the root; None where it is no constant.
        divides: `value` is the plain root, which its users divide by.
    """

    value: ir.Value
    epsilon: float | None
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
    add = _only_user(mean, "Add")
    known: float | None = 0.0
    if add is not None:
        other = add.inputs[1] if add.inputs[0] is mean else add.inputs[0]
        known = scalar(other)
        under = add.outputs[0]
    epsilon_or_none = known if known is not None else None
    del epsilon
    power = _only_user(under, "Pow")
    if power is not None and power.inputs[0] is under:
        exponent = scalar(power.inputs[1])
        if exponent == -0.5:
            return InverseRoot(power.outputs[0], epsilon_or_none)
        if exponent == 0.5:
            return _inverted(power.outputs[0], epsilon_or_none)
    root = _only_user(under, "Sqrt")
    return None if root is None else _inverted(root.outputs[0], epsilon_or_none)


def _inverted(root: ir.Value, epsilon: float | None) -> InverseRoot:
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
