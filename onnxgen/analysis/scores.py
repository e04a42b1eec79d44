"""From a Softmax up to the contraction of queries and keys, and down to that of the values.

    scores = scale * (q @ k^T),  capped,  + masks;   probabilities = Softmax(scores);   p @ v

Scales, caps and masks are collected on the way in whatever order and number an exporter wrote
them. What else stands in between stops the walk, with the node named.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import FLOATS, attribute, given, producer, scalar
from onnxgen.analysis.shape_rules import ELEMENTWISE
from onnxgen.analysis.views import VIEW_OPS, scalar_factor

# What is added to, or written over, a masked score is at least this low: -1e4 as bfloat16 has it.
MASKED = -9984.0


@dataclass(frozen=True)
class Mask:
    """One mask on the scores, broadcast to them.

    Attributes:
        value: additive numbers of a float type, or a bool that says which scores stay (or go).
        fill: for a bool: what is written over the masked scores; None for an additive mask.
        inverted: for a bool: True marks the scores that go.
        factor: for an additive mask: the number it is multiplied by further down.
    """

    value: ir.Value
    fill: float | None = None
    inverted: bool = False
    factor: float = 1.0


@dataclass
class Scores:
    """What the walk up from a Softmax found.

    Attributes:
        contraction: the node that multiplies queries and keys.
        scale: product of all numbers the scores are multiplied by.
        softcap: c of c * tanh(scores / c); 0 for none.
        masks: those nearest to the Softmax first.
        masks_before_cap: whether a mask is applied before the cap.
    """

    contraction: ir.Node
    scale: float = 1.0
    softcap: float = 0.0
    masks: list[Mask] = field(default_factory=list)
    masks_before_cap: bool = False


@dataclass(frozen=True)
class Stopped:
    """The walk ended at a node it does not know."""

    node: ir.Node | None
    reason: str


def walk_up(facts: Facts, value: ir.Value) -> Scores | Stopped:
    """From a Softmax's input to the contraction that its scores come from."""
    scale, softcap, before_cap = 1.0, 0.0, False
    masks: list[Mask] = []
    while True:
        node = producer(value)
        if node is None:
            return Stopped(value.producer(), "the scores are not computed by a standard operator")
        factor = scalar_factor(node)
        cap = _cap(node)
        if cap is not None:
            if softcap or scale != 1.0:
                return Stopped(node, "the scores are capped, and then capped or scaled again")
            value, softcap, inner = cap
            scale *= inner
        elif factor is not None:
            value = factor[0]
            scale *= factor[1]
        elif node.op_type == "Cast" and _is_float(node.inputs[0]) and _is_float(value):
            value = given(node)
        elif node.op_type == "Add":
            a, b = node.inputs[0], node.inputs[1]
            if a is None or b is None or facts.is_activation(a) == facts.is_activation(b):
                return Stopped(node, "two tensors are added where scores and a mask were expected")
            value, mask = (a, b) if facts.is_activation(a) else (b, a)
            masks.append(Mask(mask, factor=1.0 if softcap else scale))
            before_cap = before_cap or bool(softcap)
        elif node.op_type == "Where":
            found = _where(facts, node)
            if found is None:
                return Stopped(node, "a Where on the scores writes no constant mask")
            value, mask_found = found
            masks.append(mask_found)
            before_cap = before_cap or bool(softcap)
        elif node.op_type == "MatMul" and all(map(facts.is_activation, node.inputs)):
            return Scores(node, scale, softcap, masks, before_cap)
        else:
            return Stopped(node, f"{node.op_type} stands between the Softmax and q @ k")


def walk_down(softmax: ir.Node) -> ir.Node | Stopped:
    """From a Softmax's output to the MatMul with the values, through casts and the NaN guard."""
    value = softmax.outputs[0]
    while True:
        users = {use.node for use in value.uses()}
        guarded = _nan_guard(value, users)
        if guarded is not None:
            value = guarded
            continue
        if len(users) != 1 or value.is_graph_output():
            return Stopped(softmax, "the probabilities are read by more than the values' product")
        (node,) = users
        if node.op_type == "MatMul" and node.inputs[0] is value:
            return node
        if node.op_type in ("Cast", "Identity", "Dropout"):
            value = node.outputs[0]
            continue
        return Stopped(node, f"{node.op_type} stands between the Softmax and p @ v")


def attends(facts: Facts, softmax: ir.Node) -> bool:
    """Whether a Softmax stands between two products of activations, whatever else is in between.

    Elementwise operators, views, and parts and joins lead on; a weight matrix, a norm, a Gather or
    a TopK end the way: a router's probabilities choose experts, they attend to nothing.
    """

    def reaches(upwards: bool) -> bool:
        pending, seen = [softmax], {softmax}
        while pending:
            node = pending.pop()
            if upwards:
                near = [
                    value.producer()
                    for value in node.inputs
                    if value is not None and facts.is_activation(value)
                ]
            else:
                near = [use.node for output in node.outputs for use in output.uses()]
            for each in near:
                if each is None or each in seen or len(seen) > MAX_NEAR:
                    continue
                seen.add(each)
                if each.op_type in ("MatMul", "Einsum") and all(
                    map(facts.is_activation, each.inputs)
                ):
                    return True
                if each.op_type in _LEADS_ON:
                    pending.append(each)
        return False

    return reaches(upwards=True) and reaches(upwards=False)


MAX_NEAR = 60
_LEADS_ON = (ELEMENTWISE | VIEW_OPS | {"Slice", "Concat", "Split", "Pad", "ReduceMax"}) - {"Gather"}


def last_axis(facts: Facts, softmax: ir.Node) -> bool:
    """Whether a Softmax runs over its last axis."""
    axis, rank = attribute(softmax, "axis", -1), facts.shapes.rank(softmax.inputs[0])
    return bool(axis == -1 or (rank is not None and axis == rank - 1))


def constant_choice(value: ir.Value) -> Mask | None:
    """An additive mask that is Where(keep, 0, -inf) said as the bool it comes from."""
    node = producer(value, "Where")
    if node is None or node.inputs[0] is None:
        return None
    kept, gone = scalar(node.inputs[1]), scalar(node.inputs[2])
    for inverted, zero, fill in ((False, kept, gone), (True, gone, kept)):
        if zero == 0.0 and fill is not None and fill <= MASKED:
            return Mask(node.inputs[0], fill, inverted)
    return None


def _where(facts: Facts, node: ir.Node) -> tuple[ir.Value, Mask] | None:
    condition, a, b = node.inputs
    if condition is None or a is None or b is None or facts.is_activation(condition):
        return None
    for scores, other, inverted in ((a, b, False), (b, a, True)):
        fill = scalar(other)
        if facts.is_activation(scores) and fill is not None and fill <= MASKED:
            return scores, Mask(condition, fill, inverted)
    return None


def _cap(node: ir.Node) -> tuple[ir.Value, float, float] | None:
    """(x, c, s) where the node computes c * tanh(x * s / c), else None."""
    factor = scalar_factor(node)
    tanh = None if factor is None else producer(factor[0], "Tanh")
    if factor is None or tanh is None:
        return None
    inner = producer(tanh.inputs[0])
    scaled = None if inner is None else scalar_factor(inner)
    if scaled is None:
        return (given(tanh), factor[1], factor[1])
    return scaled[0], factor[1], scaled[1] * factor[1]


def _nan_guard(value: ir.Value, users: set[ir.Node]) -> ir.Value | None:
    """Where(IsNaN(p), 0, p), which zeroes the rows that are masked everywhere."""
    if {user.op_type for user in users} != {"IsNaN", "Where"} or len(users) != 2:
        return None
    where = next(user for user in users if user.op_type == "Where")
    test = producer(where.inputs[0], "IsNaN")
    if test is None or test.inputs[0] is not value or where.inputs[2] is not value:
        return None
    if len(list(test.outputs[0].uses())) != 1 or scalar(where.inputs[1]) != 0.0:
        return None
    return where.outputs[0]


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype in FLOATS
