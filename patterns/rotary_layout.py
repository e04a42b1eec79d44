"""Where RotaryEmbedding wants the axes of x and of its tables, and how they get there.

The operator takes x as [B, H, S, D], or as [B, S, H*D] with the number of heads told, and tables
[B, S, R/2]. Here x has any leading axes before its D lanes, and the tables vary along some of them:

    [B, H, S, D], [B, S, D]      as they are
    [B, S, H, D]                 transposed
    [S, H, D], tables [S, 1, .]  [1, S, H*D]            (a vision tower without a batch)
    [S, B, H, D]                 [S, B*H, 1, D]         (sequence first)
    [B, S, 2, H, D]              [B, S, 2*H, D]         (queries and keys rotated together)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.lane_forms import Lane
from onnxgen.analysis.symbols import Dim
from onnxgen.analysis.views import Axis
from onnxgen.patterns.arranging import arranged
from onnxgen.patterns.building import Builder

HEADS_LAST = [0, 2, 1, 3]


@dataclass(frozen=True)
class Layout:
    """How [leading axes.., D] is shown to the operator.

    Attributes:
        batch, new: the leading axis that is the operator's B, its S; None where it has size 1.
        sizes: B and S, as the operator sees them.
        heads: how many heads, where the operator must be told or may be.
        leading: the leading axes it is reshaped to, a -1 where heads and lanes become one axis.
        transposed: the second and third axis are exchanged after that.
    """

    batch: int | None
    new: int | None
    sizes: tuple[Dim, Dim]
    heads: Dim | None
    leading: tuple[Dim, ...] | None = None
    transposed: bool = False


def find_layout(leading: Sequence[Dim], varies: Collection[int]) -> Layout | None:
    """The layout for tables that vary along some of the leading axes; None where there is none.

    Tables that vary along no axis serve one new token, and any axis of size 1 is its.
    """
    match len(leading):
        case 1:
            return Layout(None, 0, (1, leading[0]), 1, (1, leading[0]))
        case 2:
            first, second = leading
            if 0 not in varies or 1 in varies or second == 1:
                return Layout(0, 1, (first, second), 1)
            if isinstance(second, int):
                return Layout(None, 0, (1, first), second, (1, first, -1))
            return Layout(0, None, (first, 1), second, (first, second, 1))
        case 3:
            batch, second, third = leading
            if 1 in varies and 2 in varies:
                return None
            if 2 in varies or (1 not in varies and second != 1 and (third == 1 or not varies)):
                return Layout(0, 2, (batch, third), second)
            if 1 in varies or second == 1 or not varies:
                return Layout(0, 1, (batch, second), third, transposed=True)
            heads = second * third
            return Layout(0, None, (batch, 1), heads, (batch, heads, 1))
        case 4:
            return _merged(leading, varies)
    return None


def _merged(leading: Sequence[Dim], varies: Collection[int]) -> Layout | None:
    """Two axes that the tables do not vary along become one."""
    for axis in (2, 1, 0):
        if axis in varies or axis + 1 in varies:
            continue
        together = (*leading[:axis], leading[axis] * leading[axis + 1], *leading[axis + 2 :])
        found = find_layout(together, {each - (each > axis) for each in varies})
        if found is not None:
            batch, new = (
                None if each is None or each == axis else each + (each > axis)
                for each in (found.batch, found.new)
            )
            return replace(found, batch=batch, new=new, leading=found.leading or together)
    return None


def varying(facts: Facts, tables: Collection[Lane], leading: int) -> set[int]:
    """The leading axes of x along which a table has more than one element."""
    found = set()
    for value, axes in {(lane.value, lane.axes) for lane in tables}:
        shape = facts.shapes.of(value) or ()
        rows = shape[: len(shape) - axes]
        found |= {leading - len(rows) + axis for axis, size in enumerate(rows) if size != 1}
    return found


def shown(builder: Builder, x: ir.Value, layout: Layout) -> ir.Value | None:
    """x as the operator takes it; None where a size is not known."""
    if layout.leading is not None:
        shape = builder.shapes.of(x)
        assert shape is not None
        lanes, leading = shape[-1], layout.leading
        if leading[-1] == -1:
            assert layout.heads is not None
            sizes = (*leading[:-1], layout.heads * lanes)
        else:
            sizes = (*leading, lanes)
        reshaped = reshape(builder, x, sizes)
        if reshaped is None:
            return None
        x = reshaped
    return builder.op("Transpose", [x], {"perm": HEADS_LAST}) if layout.transposed else x


def returned(
    builder: Builder, y: ir.Value, layout: Layout, sizes: Sequence[Dim]
) -> ir.Value | None:
    """What the operator gave, with its axes as before; None where a size is not known."""
    if layout.transposed:
        y = builder.op("Transpose", [y], {"perm": HEADS_LAST})
    return y if layout.leading is None else reshape(builder, y, sizes)


def reshape(builder: Builder, value: ir.Value, sizes: Sequence[Dim]) -> ir.Value | None:
    """The value with these sizes; None where one is not known."""
    if builder.shapes.same_shape(builder.shapes.of(value), sizes):
        return value
    target = builder.target(value, sizes)
    return None if target is None else builder.op("Reshape", [value, target])


def picked(builder: Builder, value: ir.Value, lanes: Sequence[int]) -> ir.Value:
    """These lanes of a value's last axis."""
    shape = builder.shapes.of(value)
    assert shape is not None
    count, start, step = len(lanes), lanes[0], lanes[1] - lanes[0] if len(lanes) > 1 else 1
    if step > 0 and list(lanes) == list(range(start, start + step * count, step)):
        if start == 0 and step == 1 and count == shape[-1]:
            return value
        bounds = (start, start + step * (count - 1) + 1, -1, step)
        return builder.op("Slice", [value, *(builder.ints(n) for n in bounds)])
    order = np.arange(count).reshape(-1)
    for rows in range(2, count // 2 + 1):
        if count % rows or count != shape[-1]:
            continue
        if list(lanes) == order.reshape(rows, -1).T.reshape(-1).tolist():
            # Neighbours apart, or together: a Transpose is several times as fast as a Gather.
            leading = [0] * (len(shape) - 1)
            target = builder.ints(*leading, rows, count // rows)
            pairs = builder.op("Reshape", [value, target])
            perm = [*range(len(leading)), len(leading) + 1, len(leading)]
            turned = builder.op("Transpose", [pairs], {"perm": perm})
            return builder.op("Reshape", [turned, builder.ints(*leading, count)])
    return builder.op("Gather", [value, builder.ints(*lanes)], {"axis": -1})


def table(
    facts: Facts, builder: Builder, lanes: Sequence[Lane], layout: Layout, leading: int
) -> ir.Value | None:
    """Lanes of tables as one table [B, S, R/2]; None where a size is not known.

    The operator does not broadcast, and tables of batch 1 are usual, so they are expanded: `tidy`
    takes that out again where the sizes are equal whatever is fed.
    """
    parts: list[list[Lane]] = []
    for lane in lanes:
        if not parts or parts[-1][0].value is not lane.value:
            parts.append([])
        parts[-1].append(lane)
    made = []
    for part in parts:
        rows = _rows(facts, builder, part[0], layout, leading)
        if rows is None:
            return None
        chosen = picked(builder, rows, [lane.at for lane in part])
        target = builder.sizes((*layout.sizes, len(part)))
        if target is None:  # a length that no input tells, which the table has
            target = builder.sizes((layout.sizes[0], 1, len(part)))
            shape = facts.shapes.of(chosen)
            if shape is None or shape[1] == 1:
                return None
        if target is None:
            return None
        made.append(builder.op("Expand", [chosen, target]))
    return made[0] if len(made) == 1 else builder.op("Concat", made, {"axis": -1})


def _rows(
    facts: Facts, builder: Builder, lane: Lane, layout: Layout, leading: int
) -> ir.Value | None:
    """A table as [B, S, lanes], or with sizes of 1."""
    value, _, axes = lane
    view, shape = facts.views.of(value), facts.shapes.of(value)
    assert view is not None
    assert shape is not None
    own = len(shape) - axes  # how many of the leading axes the table has, the last ones
    kept: list[Axis] = []
    for axis in (layout.batch, layout.new):
        position = -1 if axis is None else axis - leading + own
        kept.append(view.axes[position] if position >= 0 else ())
    lanes = tuple(digit for each in view.axes[own:] for digit in each)
    found = arranged(facts, builder, value, (kept[0], kept[1], lanes))
    if found is not None and found[1] == view.scale:
        return found[0]
    sizes: list[Dim] = []
    for axis in (layout.batch, layout.new):
        position = -1 if axis is None else axis - leading + own
        sizes.append(shape[position] if position >= 0 else 1)
    count: Dim = 1
    for size in shape[own:]:
        count = count * size
    return reshape(builder, value, (*sizes, count))
