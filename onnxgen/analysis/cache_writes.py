"""Rows that are written into a buffer of fixed length, read as what they have in common.

    write = write_of(facts, node)      # a ScatterND, ScatterElements, Where or Concat
    write.past, write.new              # the buffer, and the new rows in its layout
    write.axis, write.ramp             # where: new row i stands at ramp[i] along the axis

The spellings: ScatterND over the leading axes (index_copy, index_put) or with an index for each
of them; ScatterElements with an index for each element; `Where(arange == position, new, past)` of
one row; `Concat(past[:start], new, past[start + S:])`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute, constant, given, producer
from onnxgen.analysis.ramps import Ramp, aligned, ramp_of, whole_axes
from onnxgen.analysis.symbols import Dim

_TO_THE_END = 2**31 - 1
_UNKNOWN = "its sizes are not known"


@dataclass(frozen=True)
class Write:
    """New rows in a buffer.

    Attributes:
        past: the buffer.
        new: the rows; `order` puts their axes as the buffer has them.
        order: the permutation from the new rows' axes to the buffer's.
        axis: the buffer's axis that is written along.
        ramp: where the rows stand.
        runs: for axes of the ramp, the buffer's axes that they run over; `axis` among them.
        positions: the tensor that the ramp was read from, None where there is no such one.
    """

    past: ir.Value
    new: ir.Value
    order: tuple[int, ...]
    axis: int
    ramp: Ramp
    runs: Mapping[int, int]
    positions: ir.Value | None = None

    @property
    def along(self) -> int:
        """The ramp's axis that runs over the new rows."""
        return next(own for own, axis in self.runs.items() if axis == self.axis)


def write_of(facts: Facts, node: ir.Node) -> Write | str:
    """A node as a write of rows; the reason as text where it cannot be read as one."""
    if attribute(node, "reduction", "none") != "none":
        return "new rows are combined with old ones"
    match node.op_type:
        case "ScatterND":
            return _scatter_nd(facts, node)
        case "ScatterElements":
            return _scatter_elements(facts, node)
        case "Where":
            return _where(facts, node)
        case "Concat":
            return _concat(facts, node)
    return f"{node.op_type} is no write"


def _write(
    past: ir.Value, new: ir.Value, axis: int, ramp: Ramp, positions: ir.Value | None = None
) -> Write:
    """A write whose new rows, and whose ramp, have the buffer's axes."""
    axes = range(len(ramp.slopes))
    return Write(past, new, tuple(axes), axis, ramp, {each: each for each in axes}, positions)


def buffers_of(node: ir.Node) -> list[ir.Value]:
    """What a node may write into, if it is a write at all."""
    values: list[ir.Value | None] = []
    match node.op_type:
        case "ScatterND" | "ScatterElements":
            values = [node.inputs[0]]
        case "Where":
            values = [node.inputs[1], node.inputs[2]]
        case "Concat" if len(node.inputs) == 3:
            first = producer(node.inputs[0], "Slice")
            values = [] if first is None else [first.inputs[0]]
    return [value for value in values if value is not None]


def _scatter_nd(facts: Facts, node: ir.Node) -> Write | str:
    past, indices, new = (given(node, index) for index in range(3))
    shape, index_shape = facts.shapes.of(past), facts.shapes.of(indices)
    if shape is None or not index_shape or not isinstance(index_shape[-1], int):
        return _UNKNOWN
    width = index_shape[-1]
    if len(index_shape) != width + 1 or width > len(shape):
        return "its indices are not one for each axis"
    columns = [indices] if width == 1 else _columns(facts, indices, width)
    if columns is None:
        return "its indices are not one for each axis"
    ramps = [ramp_of(facts, column) for column in columns]
    along: dict[int, int] = {}  # axis of the buffer -> axis of the indices that covers it
    written: list[int] = []
    for axis, ramp in enumerate(ramps):
        covered = None if ramp is None else _covered(facts, ramp, index_shape, shape[axis])
        if covered is not None and covered not in along.values() and width > 1:
            along[axis] = covered
        else:
            written.append(axis)
    if len(written) != 1:
        return "another number of axes than one is written in part"
    (axis,) = written
    ramp = ramps[axis]
    left = [index for index in range(width) if index not in along.values()]
    if ramp is None or len(left) != 1:
        return "its indices are not one for each axis"
    along[axis] = left[0]
    order = (*(along[i] for i in range(width)), *range(width, len(shape)))
    runs = {own: each for each, own in along.items()}
    return Write(past, new, order, axis, ramp, runs, columns[axis])


def _columns(facts: Facts, indices: ir.Value, width: int) -> list[ir.Value] | None:
    """The columns [.., 1] that an index [.., width] is the concatenation of."""
    node = producer(indices, "Concat")
    while node is None:
        cast = producer(indices, "Cast", "Identity")
        if cast is None:
            return None
        indices = given(cast)
        node = producer(indices, "Concat")
    columns = [value for value in node.inputs if value is not None]
    rank = facts.shapes.rank(indices) or 0
    if len(columns) != width or attribute(node, "axis") % rank != rank - 1:
        return None
    return columns


def _covered(facts: Facts, ramp: Ramp, sizes: Sequence[Dim], full: Dim) -> int | None:
    """The index axis along which a column counts 0, 1, .. over a whole axis of the buffer."""
    rising = [axis for axis, slope in enumerate(ramp.slopes) if slope]
    if not rising and full == 1 and not ramp.start and not ramp.terms:
        return next((axis for axis, size in enumerate(sizes[:-1]) if size == 1), None)
    if len(rising) != 1 or ramp.slopes[rising[0]] != 1 or ramp.start or ramp.terms:
        return None
    return rising[0] if facts.shapes.same(sizes[rising[0]], full) else None


def _scatter_elements(facts: Facts, node: ir.Node) -> Write | str:
    past, indices, new = (given(node, index) for index in range(3))
    shape, ramp = facts.shapes.of(past), ramp_of(facts, indices)
    if shape is None or ramp is None:
        return _UNKNOWN
    axis = attribute(node, "axis", 0) % len(shape)
    return _write(past, new, axis, ramp, indices)


def _where(facts: Facts, node: ir.Node) -> Write | str:
    """`Where(arange(L) == position, new, past)`: one row, and only where it is."""
    condition, chosen, other = (given(node, index) for index in range(3))
    shape, found = facts.shapes.of(node.outputs[0]), _zero_where(facts, condition)
    if shape is None or found is None:
        return "what is chosen by is not the place of one row"
    difference, inverted = found
    new, past = (other, chosen) if inverted else (chosen, other)
    rank, new_shape = len(shape), facts.shapes.of(new)
    ahead = rank - len(difference.slopes)
    difference = difference.moved({i: i + ahead for i in range(rank - ahead)}, rank)
    rising = [axis for axis, slope in enumerate(difference.slopes) if slope]
    if len(rising) != 1 or abs(difference.slopes[rising[0]]) != 1:
        return "what is chosen by is not the place of one row"
    (axis,) = rising
    if not facts.shapes.same_shape(facts.shapes.of(past), shape) or new_shape is None:
        return _UNKNOWN
    if len(new_shape) != rank or new_shape[axis] != 1:
        return "the new rows are as many as the buffer's"
    # slope * row + rest == 0
    place = Ramp((0,) * rank).plus(
        replace(difference, slopes=(0,) * rank), -difference.slopes[axis]
    )
    return _write(past, new, axis, place)


def _zero_where(facts: Facts, condition: ir.Value) -> tuple[Ramp, bool] | None:
    """a - b of a condition `a == b`, and whether it is `a != b`; None for other conditions."""
    whole, rank = whole_axes(facts, condition), facts.shapes.rank(condition)
    if whole is None or rank is None:
        return None
    source, went = whole
    node = producer(source, "Equal", "Not")
    if node is None:
        return None
    if node.op_type == "Not":
        inner = _zero_where(facts, given(node))
        return None if inner is None else (inner[0].moved(went, rank), not inner[1])
    one, other = (aligned(facts, given(node, index), source) for index in (0, 1))
    if one is None or other is None:
        return None
    return one.plus(other, -1).moved(went, rank), False


def _concat(facts: Facts, node: ir.Node) -> Write | str:
    """`Concat(past[:start], new, past[start + S:])`."""
    shape = facts.shapes.of(node.outputs[0])
    parts = [value for value in node.inputs if value is not None]
    if shape is None or len(parts) != 3:
        return _UNKNOWN
    axis = attribute(node, "axis") % len(shape)
    before, after = _cut(facts, parts[0], axis), _cut(facts, parts[2], axis)
    rows, full = facts.shapes.of(parts[1]), None
    if before is None or after is None or before[0] is not after[0] or rows is None:
        return "its outer parts are not cut from one buffer"
    past, start, end = before
    _, resumed, until = after
    full = facts.shapes.of(past)
    if full is None or end is None or resumed is None or not _zero(start):
        return "its outer parts are not the buffer's start and end"
    if until is not None and (until.terms or not _reaches(until.start, full[axis])):
        return "its outer parts are not the buffer's start and end"
    # What lies between the two cuts is as long as the new rows.
    gap = resumed.plus(end, -1)
    length: Dim = gap.start
    for term in gap.terms:
        content = facts.shapes.content(term.source)
        if content is None or content.size != 1:
            return _UNKNOWN
        length = length + content.flat[0] * term.factor
    if not facts.shapes.same(length, rows[axis]):
        return "it leaves out another number of rows than are new"
    slopes = tuple(int(each == axis) for each in range(len(shape)))
    return _write(past, parts[1], axis, replace(end.moved({}, len(shape)), slopes=slopes))


def _zero(ramp: Ramp | None) -> bool:
    return ramp is not None and not ramp.start and not ramp.terms


def _reaches(end: int, full: Dim) -> bool:
    return end >= _TO_THE_END or (isinstance(full, int) and end >= full)


def _cut(
    facts: Facts, value: ir.Value, axis: int
) -> tuple[ir.Value, Ramp | None, Ramp | None] | None:
    """What `past[start:end]` along one axis, step 1, is cut from, and its ends."""
    node = producer(value, "Slice")
    if node is None or len(node.inputs) < 3:
        return None
    rank = facts.shapes.rank(node.inputs[0])
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    steps = constant(node.inputs[4]) if len(node.inputs) > 4 else None
    if rank is None or (steps is not None and steps.tolist() != [1]):
        return None
    if (axes.tolist() if axes is not None else [0]) not in ([axis], [axis - rank]):
        return None
    ends = [given(node, index) for index in (1, 2)]
    if any(facts.shapes.of(end) != (1,) for end in ends):
        return None
    start, end = (ramp_of(facts, each) for each in ends)
    return given(node), start, end
