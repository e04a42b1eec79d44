"""Integer tensors that count: `start + arange(S)`, however an exporter wrote it.

    ramp = ramp_of(facts, positions)     # Add(Range(0, S, 1), Unsqueeze(length))
    ramp.slopes                          # (1,): each element is one more than the one before
    ramp.terms                           # (Term(length, 1, ()),): what the first of them is

What a static cache is written at is read this way: rows that are neighbours are one write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.evaluate import Array
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import constant, given

_INTEGERS = {ir.DataType.INT64, ir.DataType.INT32}
_DEEPEST = 64


@dataclass(frozen=True)
class Term:
    """A tensor that is added `factor` times.

    Attributes:
        source: the tensor.
        factor: how many times.
        axes: for each axis of the source the ramp's axis that it runs along, None for size 1.
    """

    source: ir.Value
    factor: int
    axes: tuple[int | None, ...]


@dataclass(frozen=True)
class Ramp:
    """An integer tensor: element [i, j, ..] is start + slopes[0]*i + slopes[1]*j + .. + terms.

    Attributes:
        slopes: one for each axis.
        start: a number.
        terms: what is added and not known.
        indexes: a term is an index into a table that counts: what is said holds where that index
            is not negative (a negative one counts from the table's end).
    """

    slopes: tuple[int, ...]
    start: int = 0
    terms: tuple[Term, ...] = ()
    indexes: bool = False

    @property
    def varying(self) -> frozenset[int]:
        """The axes along which it changes in a way that is not known."""
        return frozenset(a for term in self.terms for a in term.axes if a is not None)

    def plus(self, other: Ramp, factor: int = 1) -> Ramp:
        """The sum with `factor` times another of the same rank; what cancels is gone."""
        slopes = (a + factor * b for a, b in zip(self.slopes, other.slopes, strict=True))
        terms: dict[tuple[ir.Value, tuple[int | None, ...]], int] = {}
        for times, ramp in ((1, self), (factor, other)):
            for term in ramp.terms:
                key = (term.source, term.axes)
                terms[key] = terms.get(key, 0) + times * term.factor
        return Ramp(
            tuple(slopes),
            self.start + factor * other.start,
            tuple(Term(value, times, axes) for (value, axes), times in terms.items() if times),
            self.indexes or other.indexes,
        )

    def moved(self, went: Mapping[int, int], rank: int) -> Ramp:
        """The same with `rank` axes, each of its own where `went` says; others are of size 1."""
        slopes = [0] * rank
        for old, new in went.items():
            slopes[new] = self.slopes[old]
        terms = tuple(
            replace(each, axes=tuple(None if a is None else went.get(a) for a in each.axes))
            for each in self.terms
        )
        return replace(self, slopes=tuple(slopes), terms=terms)


def ramp_of(facts: Facts, value: ir.Value, depth: int = 0) -> Ramp | None:
    """What an integer tensor counts; itself as a term where nothing is known of it.

    None where its rank is not known, or where it holds no integers.
    """
    shape = facts.shapes.of(value)
    if shape is None or value.dtype not in _INTEGERS:
        return None
    axes = tuple(None if size == 1 else axis for axis, size in enumerate(shape))
    itself = Ramp((0,) * len(shape), 0, (Term(value, 1, axes),))
    if depth > _DEEPEST:
        return itself
    whole = whole_axes(facts, value)
    if whole is None:
        return itself
    source, went = whole
    if source is value:
        return _made(facts, value, depth) or itself
    inner = ramp_of(facts, source, depth + 1)
    return itself if inner is None else inner.moved(went, len(shape))


def whole_axes(facts: Facts, value: ir.Value) -> tuple[ir.Value, dict[int, int]] | None:
    """The source of a view that only moves and repeats whole axes, and where each of them went.

    Axes of size 1 are in no place. None where axes were split, merged or multiplied.
    """
    view = facts.views.of(value)
    if view is None:
        return None
    if view.source is value or view.scale != 1.0:
        return value, {axis: axis for axis in range(len(view.axes))}
    sizes = facts.shapes.of(view.source)
    went: dict[int, int] = {}
    for index, axis in enumerate(view.axes):
        if not axis or all(digit.repeats for digit in axis):
            continue
        (digit, *more) = axis
        if more or digit.axis is None or digit.stride != 1 or digit.axis in went or sizes is None:
            return None
        if not facts.shapes.same(digit.size, sizes[digit.axis]):
            return None
        went[digit.axis] = index
    return view.source, went


def aligned(facts: Facts, operand: ir.Value, result: ir.Value, depth: int = 0) -> Ramp | None:
    """An operand as it is broadcast to a result; None where run time may repeat its elements."""
    ramp = ramp_of(facts, operand, depth + 1)
    shape, wanted = facts.shapes.of(operand), facts.shapes.of(result)
    if ramp is None or shape is None or wanted is None:
        return None
    ahead = len(wanted) - len(shape)
    for size, full in zip(shape, wanted[ahead:], strict=True):
        if size != 1 and not facts.shapes.same(size, full):
            return None
    went = {axis: axis + ahead for axis, size in enumerate(shape) if size != 1}
    return ramp.moved(went, len(wanted))


def _made(facts: Facts, value: ir.Value, depth: int) -> Ramp | None:
    """A tensor that is no view, by the operator that makes it."""
    elements = constant(value)
    if elements is not None:
        return _counted(elements)
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    match node.op_type:
        case "Cast":
            return ramp_of(facts, given(node), depth + 1)
        case "Range":
            step = constant(node.inputs[2], 1)
            start = ramp_of(facts, given(node), depth + 1)
            if step is None or start is None or start.slopes:
                return None
            return replace(start, slopes=(int(step.item()),))
        case "Add" | "Sub":
            one, other = (aligned(facts, given(node, i), value, depth) for i in (0, 1))
            if one is None or other is None:
                return None
            return one.plus(other, 1 if node.op_type == "Add" else -1)
        case "Slice":
            return _sliced(facts, node, depth)
        case "Gather":
            return _gathered(facts, node, depth)
    return None


def _counted(elements: Array) -> Ramp | None:
    """A constant that counts evenly along each axis."""
    if not elements.size:
        return None
    start = int(elements.flat[0])
    origin = (0,) * elements.ndim
    slopes = [
        int(elements[(*origin[:axis], 1, *origin[axis + 1 :])]) - start if size > 1 else 0
        for axis, size in enumerate(elements.shape)
    ]
    counted = np.full(elements.shape, start, dtype=np.int64)
    for slope, index in zip(slopes, np.indices(elements.shape), strict=True):
        counted += slope * index
    return Ramp(tuple(slopes), start) if np.array_equal(elements, counted) else None


def _sliced(facts: Facts, node: ir.Node, depth: int) -> Ramp | None:
    """`table[start:end]` of one axis: from `start` on."""
    table, starts = ramp_of(facts, given(node), depth + 1), given(node, 1)
    if table is None or facts.shapes.of(starts) != (1,):
        return None
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 else np.zeros(1, int)
    steps = constant(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1, int)
    if axes is None or steps is None or int(steps[0]) != 1:
        return None
    rank = len(table.slopes)
    axis = int(axes[0]) % rank
    first = ramp_of(facts, starts, depth + 1)
    if axis in table.varying or first is None or (not first.terms and first.start < 0):
        return None
    return _from(table, table.slopes[axis], first.moved({}, rank))


def _gathered(facts: Facts, node: ir.Node, depth: int) -> Ramp | None:
    """`table[index]` of a table that counts, or that holds one number."""
    table, index = (ramp_of(facts, given(node, i), depth + 1) for i in (0, 1))
    if table is None or index is None or len(table.slopes) != 1 or table.varying:
        return None
    rank, (slope,) = len(index.slopes), table.slopes
    if facts.shapes.of(given(node)) == (1,):
        return table.moved({}, rank)
    if not index.terms and (index.start < 0 or any(each < 0 for each in index.slopes)):
        return None
    found = _from(table.moved({}, rank), slope, index)
    return replace(found, slopes=tuple(slope * each for each in index.slopes))


def _from(table: Ramp, slope: int, index: Ramp) -> Ramp:
    """A table that grows by `slope`, from an index on."""
    moved = table.plus(replace(index, slopes=(0,) * len(index.slopes)), slope)
    return replace(moved, indexes=moved.indexes or bool(slope and index.terms))
