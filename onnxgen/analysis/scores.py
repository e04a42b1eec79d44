"""From a Softmax up to the contraction of queries and keys, and down to that of the values.

    scores = scale * (q @ k^T),  capped,  + masks;   probabilities = Softmax(scores);   p @ v

Scales, caps and masks are collected on the way in whatever order and number an exporter wrote
them. What else stands in between stops the walk, with the node named.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import (
    FLOATS,
    ancestors,
    attribute,
    given,
    is_read,
    producer,
    scalar,
    uniform,
)
from onnxgen.analysis.shape_rules import ELEMENTWISE, slice_bounds
from onnxgen.analysis.symbols import Dim
from onnxgen.analysis.views import VIEW_OPS, scalar_factor

# What is added to, or written over, a masked score is at least this low.
MASKED = -1e4


@dataclass(frozen=True)
class Mask:
    """One mask on the scores, broadcast to them.

    Attributes:
        value: additive numbers of a float type, or a bool that says which scores stay (or go).
        at: the scores that it is applied to: they may have been viewed since the contraction.
        fill: for a bool: what is written over the masked scores; None for an additive mask.
        inverted: for a bool: True marks the scores that go.
        factor: for an additive mask: the number it is multiplied by further down.
    """

    value: ir.Value
    at: ir.Value
    fill: float | None = None
    inverted: bool = False
    factor: float = 1.0


@dataclass(frozen=True)
class Sink:
    """One more score for every row, joined to the others before the Softmax.

    Attributes:
        value: the sinks, broadcast to [.., S, 1].
        at: the scores that they are joined to.
        first: whether they stand before the scores.
    """

    value: ir.Value
    at: ir.Value
    first: bool


@dataclass
class Scores:
    """What the walk up from a Softmax found.

    Attributes:
        contraction: the node that multiplies queries and keys.
        scale: product of all numbers the scores are multiplied by.
        softcap: c of c * tanh(scores / c); 0 for none.
        masks: those nearest to the Softmax first.
        masks_before_cap: whether a mask is applied before the cap.
        sink: what is joined to the scores for the Softmax, and dropped behind it.
        steps: the nodes between, nearest to the Softmax first, with the scores they take.
    """

    contraction: ir.Node
    scale: float = 1.0
    softcap: float = 0.0
    masks: list[Mask] = field(default_factory=list)
    masks_before_cap: bool = False
    sink: Sink | None = None
    steps: list[tuple[ir.Node, ir.Value]] = field(default_factory=list)


@dataclass(frozen=True)
class Stopped:
    """The walk ended at a node it does not know."""

    node: ir.Node | None
    reason: str


def walk_up(facts: Facts, value: ir.Value) -> Scores | Stopped:
    """From a Softmax's input to the contraction that its scores come from."""
    found = Scores(contraction=None)  # type: ignore[arg-type]  # set where the walk ends
    while True:
        node = producer(value)
        if node is None:
            return Stopped(value.producer(), "the scores are not computed by a standard operator")
        if node.op_type == "MatMul" and all(map(facts.is_activation, node.inputs)):
            found.contraction = node
            return found
        step = _step(facts, node, found)
        if isinstance(step, Stopped):
            return step
        if isinstance(step, _Sum):
            return _through_sum(facts, step, found)
        value = step
        found.steps.append((node, value))


@dataclass(frozen=True)
class _Sum:
    """Two activations are added: one may be the scores, the other a bias computed from q or k."""

    node: ir.Node
    operands: tuple[ir.Value, ir.Value]


def _step(facts: Facts, node: ir.Node, found: Scores) -> ir.Value | _Sum | Stopped:
    """The scores one node further up; what the node does to them is noted in `found`."""
    capped = bool(found.softcap)
    cap, factor = _cap(node), scalar_factor(node)
    if cap is not None:
        if capped or found.scale != 1.0:
            return Stopped(node, "the scores are capped, and then capped or scaled again")
        value, found.softcap, inner = cap
        found.scale *= inner
        return value
    if factor is not None:
        found.scale *= factor[1]
        return factor[0]
    if node.op_type in _VIEWED or (node.op_type == "Cast" and _is_float(node.inputs[0])):
        return given(node)
    if node.op_type in ("Add", "Sub"):
        a, b = given(node), given(node, 1)
        if facts.is_activation(a) and facts.is_activation(b):
            shifted = not capped and found.sink is None and a is not b
            if shifted and _shifts(facts, a, b):
                return a
            if node.op_type == "Add" and a is not b:
                return _Sum(node, (a, b))
        elif facts.is_activation(a) or (node.op_type == "Add" and facts.is_activation(b)):
            value, mask = (a, b) if facts.is_activation(a) else (b, a)
            sign = -1.0 if node.op_type == "Sub" else 1.0
            return _masked(found, node, Mask(mask, value, factor=sign * _factor(found)))
        return Stopped(node, "two tensors are added where scores and a mask were expected")
    if node.op_type == "Where":
        mask_found = _where(facts, node)
        if mask_found is None or found.scale <= 0:
            return Stopped(node, "a Where on the scores writes no constant mask")
        return _masked(found, node, mask_found)
    if node.op_type == "Concat":
        return _sink(facts, node, found)
    return Stopped(node, f"{node.op_type} stands between the Softmax and q @ k")


def _sink(facts: Facts, node: ir.Node, found: Scores) -> ir.Value | Stopped:
    """The scores that a column is joined to; the column is noted."""
    rank = facts.shapes.rank(node.outputs[0])
    plain = found.sink is None and not found.masks and found.scale == 1.0 and not found.softcap
    if plain and rank and len(node.inputs) == 2 and attribute(node, "axis") % rank == rank - 1:
        for scores, column in (node.inputs, node.inputs[::-1]):
            size, other = facts.shapes.of(column), facts.shapes.of(scores)
            if scores and column and size and other and size[-1] == 1 and other[-1] != 1:
                found.sink = Sink(column, scores, first=column is node.inputs[0])
                return scores
    return Stopped(node, "something is joined to the scores that is no column of sinks")


def _masked(found: Scores, node: ir.Node, mask: Mask) -> ir.Value:
    found.masks.append(mask)
    found.masks_before_cap = found.masks_before_cap or bool(found.softcap)
    return mask.at


def _factor(found: Scores) -> float:
    return 1.0 if found.softcap else found.scale


def _shifts(facts: Facts, scores: ir.Value, shift: ir.Value) -> bool:
    """Whether every score of a row is shifted alike, which a Softmax does not notice."""
    size, shape = facts.shapes.of(shift), facts.shapes.of(scores)
    return bool(size and shape and size[-1] == 1 and shape[-1] != 1 and len(size) <= len(shape))


def _through_sum(facts: Facts, added: _Sum, found: Scores) -> Scores | Stopped:
    """The one operand that leads to a contraction; the other is a bias, whatever computes it."""
    stopped = Stopped(added.node, "two tensors are added where scores and a mask were expected")
    if found.softcap:
        return stopped
    for scores, bias in (added.operands, added.operands[::-1]):
        above = walk_up(facts, scores)
        if isinstance(above, Stopped) or above.sink or (above.softcap and found.scale != 1.0):
            continue
        if any(node is above.contraction for node in ancestors([bias], frozenset())):
            continue
        outer = [replace(mask, factor=mask.factor * found.scale) for mask in above.masks]
        found.masks += [Mask(bias, scores, factor=found.scale), *outer]
        found.steps += [(added.node, scores), *above.steps]
        found.contraction, found.softcap = above.contraction, above.softcap
        found.scale *= above.scale
        found.masks_before_cap = above.masks_before_cap
        return found
    return stopped


_VIEWED = VIEW_OPS - {"Expand", "Tile", "Gather"}


@dataclass
class Down:
    """What the walk down from a Softmax found.

    Attributes:
        product: the node that multiplies probabilities and values.
        steps: what the probabilities become on the way, nearest to the Softmax first.
    """

    product: ir.Node
    steps: list[ir.Value] = field(default_factory=list)


def walk_down(facts: Facts, softmax: ir.Node, sink: Sink | None = None) -> Down | Stopped:
    """From a Softmax's output to the MatMul with the values, through casts and the NaN guard.

    Args:
        sink: what was joined to the scores, which is dropped on the way.
    """
    value = softmax.outputs[0]
    steps: list[ir.Value] = []
    while True:
        users = {use.node for use in value.uses()}
        guard = _nan_guard(value, users)
        if guard is None and (len(users) != 1 or value.is_graph_output()):
            return Stopped(softmax, "the probabilities are read by more than the values' product")
        node = guard or users.pop()
        if sink is not None and node.op_type in ("Slice", "Split"):
            kept = _without(facts, node, sink)
            if kept is None:
                return Stopped(node, "not the sinks alone are dropped from the probabilities")
            steps.append(kept)
            value, sink = kept, None
            continue
        if node.op_type == "MatMul" and node.inputs[0] is value:
            if sink is not None:
                return Stopped(node, "the sinks have values")
            return Down(node, steps)
        if guard is None and node.op_type not in _VIEWED | {"Cast", "Dropout"}:
            return Stopped(node, f"{node.op_type} stands between the Softmax and p @ v")
        value = node.outputs[0]
        steps.append(value)


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


@dataclass(frozen=True)
class Choice:
    """Where(value, 0, fill), or Where(value, fill, 0) if inverted."""

    value: ir.Value
    fill: float
    inverted: bool


def constant_choice(value: ir.Value) -> Choice | None:
    """An additive mask that is Where(keep, 0, -inf) said as the bool it comes from."""
    node = producer(value, "Where")
    if node is None or node.inputs[0] is None:
        return None
    kept, gone = uniform(node.inputs[1]), uniform(node.inputs[2])
    for inverted, zero, fill in ((False, kept, gone), (True, gone, kept)):
        if zero == 0.0 and fill is not None and fill <= MASKED:
            return Choice(node.inputs[0], fill, inverted)
    return None


def _where(facts: Facts, node: ir.Node) -> Mask | None:
    condition, a, b = node.inputs
    if condition is None or a is None or b is None or facts.is_activation(condition):
        return None
    for scores, other, inverted in ((a, b, False), (b, a, True)):
        fill = uniform(other)
        if facts.is_activation(scores) and fill is not None and fill <= MASKED:
            return Mask(condition, scores, fill, inverted)
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


def _nan_guard(value: ir.Value, users: set[ir.Node]) -> ir.Node | None:
    """Where(IsNaN(p), 0, p), which zeroes the rows that are masked everywhere."""
    if {user.op_type for user in users} != {"IsNaN", "Where"} or len(users) != 2:
        return None
    where = next(user for user in users if user.op_type == "Where")
    test = producer(where.inputs[0], "IsNaN")
    if test is None or test.inputs[0] is not value or where.inputs[2] is not value:
        return None
    if len(list(test.outputs[0].uses())) != 1 or scalar(where.inputs[1]) != 0.0:
        return None
    return where


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


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype in FLOATS
