"""From a Softmax, however it is written, down to the product with the values.

    p = Softmax(scores);   p @ v

What exporters put in between, guards against rows of NaN, the mask once more, views, the column of
sinks dropped, is seen through; anything else stops the walk, with the node named.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute, given, is_read, producer, uniform
from onnxgen.analysis.moments import trailing_axis
from onnxgen.analysis.scores import VIEWED, Sink, Stopped
from onnxgen.analysis.shape_rules import ELEMENTWISE
from onnxgen.analysis.symbols import Dim
from onnxgen.analysis.view_shapes import slice_bounds
from onnxgen.analysis.views import VIEW_OPS


@dataclass(frozen=True)
class Normalized:
    """A Softmax: one node, or the nodes that it was taken apart into.

    Attributes:
        scores: what it is taken of.
        value: the probabilities.
        last: whether they add up to one along the last axis.
    """

    scores: ir.Value
    value: ir.Value
    last: bool


def softmax_of(facts: Facts, node: ir.Node) -> Normalized | None:
    """The Softmax that a node is, or that it is the sum or the logarithm of.

    Softmax(x); Exp(LogSoftmax(x)); e / ReduceSum(e) and e * Reciprocal(ReduceSum(e)), e = Exp(x).
    """
    value = node.outputs[0]
    if node.op_type == "Softmax":
        return Normalized(given(node), value, _last_axis(facts, node))
    users = {use.node for use in value.uses()}
    if len(users) != 1 or value.is_graph_output():
        return None
    (user,) = users
    if node.op_type == "LogSoftmax":
        if user.op_type != "Exp":
            return None
        return Normalized(given(node), user.outputs[0], _last_axis(facts, node))
    exponent = producer(node.inputs[0], "Exp")
    if (
        node.op_type != "ReduceSum"
        or exponent is None
        or trailing_axis(facts, node) != -1
        or not attribute(node, "keepdims", 1)
    ):
        return None
    powers = exponent.outputs[0]
    if user.op_type == "Reciprocal" and user.domain in ("", "ai.onnx"):
        inverse = user.outputs[0]
        products = {use.node for use in inverse.uses()}
        if len(products) == 1 and products.copy().pop().op_type == "Mul":
            (multiplied,) = products
            if {*multiplied.inputs} == {powers, inverse}:
                return Normalized(given(exponent), multiplied.outputs[0], last=True)
    if user.op_type == "Div" and list(user.inputs) == [powers, value]:
        return Normalized(given(exponent), user.outputs[0], last=True)
    return None


@dataclass
class Down:
    """What the walk down from a Softmax found.

    Attributes:
        product: the node that multiplies probabilities and values.
        steps: what the probabilities become on the way, nearest to the Softmax first.
        kept: the bool masks that the probabilities are masked by once more, and whether inverted.
    """

    product: ir.Node
    steps: list[ir.Value] = field(default_factory=list)
    kept: list[tuple[ir.Value, bool]] = field(default_factory=list)


def walk_down(facts: Facts, probabilities: ir.Value, sink: Sink | None = None) -> Down | Stopped:
    """From a Softmax's output to the MatMul with the values.

    Args:
        sink: what was joined to the scores, which is dropped on the way.
    """
    value = probabilities
    steps: list[ir.Value] = []
    kept: list[tuple[ir.Value, bool]] = []
    while True:
        users = {use.node for use in value.uses()}
        guard = _nan_guard(value, users)
        if guard is None and (len(users) != 1 or value.is_graph_output()):
            reason = "the probabilities are read by more than the values' product"
            return Stopped(probabilities.producer(), reason)
        node = guard or users.pop()
        if sink is not None and node.op_type in ("Slice", "Split"):
            left = _without(facts, node, sink)
            if left is None:
                return Stopped(node, "not the sinks alone are dropped from the probabilities")
            steps.append(left)
            value, sink = left, None
            continue
        if node.op_type == "MatMul" and node.inputs[0] is value:
            if sink is not None:
                return Stopped(node, "the sinks have values")
            return Down(node, steps, kept)
        masked = None if guard is not None or sink is not None else _masked(facts, node, value)
        if masked is not None:
            kept.append(masked)
        elif guard is None and node.op_type not in VIEWED | {"Cast", "Dropout"}:
            return Stopped(node, f"{node.op_type} stands between the Softmax and p @ v")
        value = node.outputs[0]
        steps.append(value)


def plain_condition(condition: ir.Value, inverted: bool) -> tuple[ir.Value, bool]:
    """A bool without the Not in front of it."""
    while (node := producer(condition, "Not")) is not None:
        condition, inverted = given(node), not inverted
    return condition, inverted


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


def _last_axis(facts: Facts, softmax: ir.Node) -> bool:
    axis, rank = attribute(softmax, "axis", -1), facts.shapes.rank(softmax.inputs[0])
    return bool(axis == -1 or (rank is not None and axis == rank - 1))


def _nan_guard(value: ir.Value, users: set[ir.Node]) -> ir.Node | None:
    """Where(IsNaN(p), 0, p), or the other way round: zeroes the rows that are masked everywhere."""
    if {user.op_type for user in users} != {"IsNaN", "Where"} or len(users) != 2:
        return None
    where = next(user for user in users if user.op_type == "Where")
    condition, inverted = plain_condition(given(where), False)
    test = producer(condition, "IsNaN")
    if test is None or test.inputs[0] is not value or len(list(condition.uses())) != 1:
        return None
    zero, other = where.inputs[1:] if not inverted else where.inputs[:0:-1]
    return where if other is value and uniform(zero) == 0.0 else None


def _masked(facts: Facts, node: ir.Node, value: ir.Value) -> tuple[ir.Value, bool] | None:
    """The condition of Where(keep, p, 0), and whether it is inverted; None for any other node."""
    if node.op_type != "Where" or facts.is_activation(node.inputs[0]):
        return None
    if node.inputs[1] is value and uniform(node.inputs[2]) == 0.0:
        return plain_condition(given(node), False)
    if node.inputs[2] is value and uniform(node.inputs[1]) == 0.0:
        return plain_condition(given(node), True)
    return None


def _without(facts: Facts, node: ir.Node, sink: Sink) -> ir.Value | None:
    """The probabilities without those of the sinks, where that is all a node takes away."""
    shapes = facts.shapes
    scores = shapes.of(sink.at)
    rank = shapes.rank(node.inputs[0])
    if not scores or not rank:
        return None
    start: Dim = 1 if sink.first else 0
    if node.op_type == "Slice":
        bounds = slice_bounds(shapes, node)
        wanted = [(rank - 1, start, 1)]
        if bounds is None or [(axis, first, step) for axis, first, _, step in bounds] != wanted:
            return None
        return node.outputs[0] if shapes.same(bounds[0][2], scores[-1]) else None
    if node.op_type == "Split" and attribute(node, "axis", 0) % rank == rank - 1:
        used = [output for output in node.outputs if is_read(output)]
        index = 1 if sink.first else 0
        if len(node.outputs) == 2 and used == [node.outputs[index]]:
            size = shapes.of(used[0])
            return used[0] if size and shapes.same(size[-1], scores[-1]) else None
    return None
