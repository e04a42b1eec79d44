"""From a Softmax up to the contraction of queries and keys.

    scores = scale * (q @ k^T),  capped,  + masks

The way down to the values is told in `analysis.probabilities`. Scales, caps and masks are collected on the way in whatever order and number an exporter wrote
them. What else stands in between stops the walk, with the node named.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import (
    FLOATS,
    ancestors,
    attribute,
    given,
    producer,
    uniform,
)
from onnxgen.analysis.views import VIEW_OPS, scalar_factor

# What is added to, or written over, a masked score is at least this low: -1e4 as bfloat16 has it.
MASKED = -9984.0


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
        floor: below which no score is let fall; then rows that are masked everywhere are uniform.
        sink: what is joined to the scores for the Softmax, and dropped behind it.
        steps: the nodes between, nearest to the Softmax first, with the scores they take.
    """

    contraction: ir.Node
    scale: float = 1.0
    softcap: float = 0.0
    masks: list[Mask] = field(default_factory=list)
    masks_before_cap: bool = False
    floor: float = -np.inf
    sink: Sink | None = None
    steps: list[tuple[ir.Node, ir.Value]] = field(default_factory=list)


@dataclass(frozen=True)
class Stopped:
    """The walk ended at a node it does not know."""

    node: ir.Node | None
    reason: str


def walk_up(facts: Facts, value: ir.Value) -> Scores | Stopped:
    """From a Softmax's input to the contraction that its scores come from."""
    # Nobody sees it before the walk has ended, and that sets the contraction.
    found = Scores(contraction=None)  # type: ignore[arg-type]
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
    if node.op_type in VIEWED or (node.op_type == "Cast" and _is_float(node.inputs[0])):
        return given(node)
    floored = _floored(node)
    if floored is not None:
        found.floor = floored[1]
        return floored[0]
    if node.op_type == "Mul":
        for scores, kept in (node.inputs, node.inputs[::-1]):
            for index, each in enumerate(found.masks):
                replacing = None if kept is None else _replacing(each, kept)
                if scores is not None and replacing is not None:
                    found.masks[index] = replacing
                    return scores
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
    if mask.fill is not None:
        mask = replace(mask, fill=max(mask.fill, found.floor))
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


VIEWED = VIEW_OPS - {"Expand", "Tile", "Gather"}


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
        return _scaled_choice(value)
    kept, gone = uniform(node.inputs[1]), uniform(node.inputs[2])
    for inverted, zero, fill in ((False, kept, gone), (True, gone, kept)):
        if zero == 0.0 and fill is not None and fill <= MASKED:
            return Choice(node.inputs[0], fill, inverted)
    return None


def _scaled_choice(value: ir.Value) -> Choice | None:
    """Cast(gone) * fill, where fill is finite: 0 * -inf would be NaN."""
    factor = scalar_factor(node) if (node := producer(value, "Mul")) is not None else None
    cast = None if factor is None else producer(factor[0], "Cast")
    gone = None if cast is None else cast.inputs[0]
    if factor is None or gone is None or gone.dtype != ir.DataType.BOOL:
        return None
    return (
        Choice(gone, factor[1], True) if math.isfinite(factor[1]) and factor[1] <= MASKED else None
    )


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


def _floored(node: ir.Node) -> tuple[ir.Value, float] | None:
    """(x, c) where the node is max(x, c), for a c that no score of a key that is seen reaches."""
    if node.op_type == "Max" and len(node.inputs) == 2:
        for x, low in (node.inputs, node.inputs[::-1]):
            floor = uniform(low)
            if x is not None and floor is not None and floor <= MASKED:
                return x, floor
    if node.op_type == "Clip" and len(node.inputs) == 2:
        floor = uniform(node.inputs[1])
        if floor is not None and floor <= MASKED:
            return given(node), floor
    return None


def _replacing(mask: Mask, kept: ir.Value) -> Mask | None:
    """An additive mask that is (1 - kept) * c for a bool `kept`, c as low as a mask's: where the
    scores are multiplied by `kept` too, it replaces them by c.
    """
    value, factor = mask.value, mask.factor
    while (node := producer(value)) is not None and (scaled := scalar_factor(node)) is not None:
        value, factor = scaled[0], factor * scaled[1]
    node, flag = producer(value, "Sub"), producer(kept, "Cast")
    if node is None or flag is None or given(flag).dtype != ir.DataType.BOOL:
        return None
    if mask.fill is not None or factor > MASKED:
        return None
    if uniform(node.inputs[0]) != 1.0 or node.inputs[1] is not kept:
        return None
    return Mask(given(flag), mask.at, factor)


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype in FLOATS
