"""The one mask that Attention accepts, [B, H, S, T], of those that are applied to viewed scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import constant, given, producer
from onnxgen.analysis.layouts import parts_of
from onnxgen.analysis.scores import Mask, constant_choice
from onnxgen.analysis.symbols import Dim, product
from onnxgen.analysis.views import Axis, Digit
from onnxgen.patterns.building import Builder


def attention_mask(
    facts: Facts,
    builder: Builder,
    masks: Sequence[Mask],
    layouts: Mapping[ir.Value, tuple[Axis, ...]],
    axes: tuple[Axis, Axis, Axis, Axis],
    rows: Dim,
    columns: Dim,
    dtype: ir.DataType,
) -> ir.Value | str | None:
    """One mask that the operator accepts: [.., S, T], bool or of the queries' type.

    Args:
        layouts: the axes of the scores that each mask is applied to.
        axes: the digits of batch, heads, rows and columns.

    Returns:
        None where there is no mask; the reason as text where one cannot be arranged.
    """
    bools: list[ir.Value] = []
    replaced: list[ir.Value] = []  # what keeps a score from being overwritten by a finite number
    floats: list[ir.Value] = []
    for mask in masks:
        condition, fill_number, inverted = mask.value, mask.fill, mask.inverted
        if fill_number is None:
            choice = constant_choice(mask.value) if mask.factor > 0 else None
            if choice is None or choice.fill != -np.inf:
                on_axes = on_heads(facts, builder, mask.value, layouts[mask.at], axes)
                if isinstance(on_axes, str):
                    return on_axes
                scaled = on_axes
                if mask.factor != 1.0:
                    number = np.array(mask.factor, dtype=np.float64)
                    assert scaled.dtype is not None
                    factor = builder.constant(number.astype(scaled.dtype.numpy()))
                    scaled = builder.op("Mul", [scaled, factor])
                if scaled.dtype != dtype:
                    scaled = builder.op("Cast", [scaled], {"to": int(dtype)})
                floats.append(scaled)
                continue
            condition, fill_number, inverted = choice.value, choice.fill, choice.inverted
        on_axes = on_heads(facts, builder, condition, layouts[mask.at], axes)
        if isinstance(on_axes, str):
            return on_axes
        keep = builder.op("Not", [on_axes]) if inverted else on_axes
        (bools if fill_number == -np.inf else replaced).append(keep)
    if replaced:
        # A number that replaces scores leaves rows that are masked everywhere uniform. One that is
        # added does so where it swallows them: this does. Of the very lowest ONNX Runtime makes
        # zeros.
        low = float(dtype.min) / 2
        floats.append(_lowered(builder, _all(builder, replaced), low, dtype))
    if not bools and not floats:
        return None
    if not floats:
        return _fitted(facts, builder, _all(builder, bools), rows, columns)
    if bools:
        floats.append(_lowered(builder, _all(builder, bools), -np.inf, dtype))
    joined = floats[0]
    for value in floats[1:]:
        joined = builder.op("Add", [joined, value])
    return _fitted(facts, builder, joined, rows, columns)


def _all(builder: Builder, keeps: Sequence[ir.Value]) -> ir.Value:
    joined = keeps[0]
    for keep in keeps[1:]:
        joined = builder.op("And", [joined, keep])
    return joined


def _lowered(builder: Builder, keep: ir.Value, low: float, dtype: ir.DataType) -> ir.Value:
    """0 where a score is kept, else what is added to it."""
    numbers = [builder.constant(np.array(n, dtype=dtype.numpy())) for n in (0, low)]
    return builder.op("Where", [keep, *numbers])


def _fitted(
    facts: Facts, builder: Builder, mask: ir.Value, rows: Dim, columns: Dim
) -> ir.Value | str:
    """The mask with two or four axes, the last two of them in full."""
    shape = facts.shapes.of(mask)
    assert shape is not None
    if len(shape) == 3:
        mask = builder.op("Unsqueeze", [mask, builder.ints(0)])
        shape = (1, *shape)
    full = ((1,) * (2 - len(shape)) + shape)[-2:]
    for size, wanted in zip(full, (rows, columns), strict=True):
        if isinstance(size, int) and isinstance(wanted, int) and size not in (1, wanted):
            return f"the mask has {size} where the scores have {wanted}"
    if not facts.shapes.same_shape(full, (rows, columns)):
        target = builder.sizes([*shape[:-2], rows, columns])
        if target is None:
            return "the mask's size cannot be computed"
        mask = builder.op("Expand", [mask, target])
    return mask


def on_heads(
    facts: Facts,
    builder: Builder,
    mask: ir.Value,
    layout: tuple[Axis, ...],
    wanted: tuple[Axis, Axis, Axis, Axis],
) -> ir.Value | str:
    """A mask that is broadcast to scores of this layout as one broadcast to [B, H, S, T].

    Args:
        layout: the axes of the scores, as digits.
        wanted: the digits of batch, heads, rows and columns.

    Returns:
        The mask with up to four axes; the reason as text where it cannot be arranged.
    """
    shape = facts.shapes.of(mask)
    if shape is None:
        return "the mask's rank is not known"
    if len(shape) > len(layout):
        return "the mask has more axes than the scores"
    own = layout[len(layout) - len(shape) :]
    if own == wanted[4 - len(shape) :] or (len(shape) <= 4 and all(size == 1 for size in shape)):
        return mask
    every = [digit for axis in layout for digit in axis]
    cut: list[list[Digit]] = []
    for axis in wanted:
        digits: list[Digit] = []
        for digit in axis:
            parts = parts_of(digit, every)
            if parts is None:
                return "the mask's axes are not those of batch and heads"
            digits.extend(parts)
        cut.append(digits)
    # The digits of the axes along which the mask differs, as they are and as they are wanted.
    there = [d for size, axis in zip(shape, own, strict=True) if size != 1 for d in axis]
    order = [digit for digits in cut for digit in digits if digit in there]
    if len(order) != len(there):
        return "the mask's axes are not those of batch and heads"
    return _arranged(facts, builder, mask, there, order, cut)


def each_head(
    facts: Facts,
    builder: Builder,
    sinks: ir.Value,
    layout: tuple[Axis, ...],
    wanted: tuple[Axis, Axis, Axis, Axis],
    dtype: ir.DataType,
) -> ir.Value | str:
    """A column that is joined to scores of this layout as one number a head, [H].

    Returns:
        The numbers; the reason as text where the column differs from row to row.
    """
    while (node := producer(sinks, "Expand")) is not None:
        sinks = given(node)
    arranged = on_heads(facts, builder, sinks, layout, wanted)
    if isinstance(arranged, str):
        return arranged
    shape = facts.shapes.of(arranged)
    count = product(digit.size for digit in wanted[1])
    if shape is None or any(
        size != 1 for axis, size in enumerate(shape, -len(shape)) if axis != -3
    ):
        return "the sinks differ from row to row"
    if not isinstance(count, int):
        return "the number of heads is not known"
    view = facts.views.of(sinks)
    numbers = None if view is None or view.scale != 1.0 else constant(view.source)
    if numbers is not None and numbers.size in (1, count) and sinks.dtype == dtype:
        # Only the heads' axis is longer than 1: whatever the view, the order is the same.
        return builder.constant(np.broadcast_to(numbers.reshape(-1), (count,)).copy(), "sinks")
    vector = builder.op("Reshape", [arranged, builder.ints(-1)])
    if len(shape) < 3 or shape[-3] == 1 != count:
        vector = builder.op("Expand", [vector, builder.ints(count)])
    return vector if vector.dtype == dtype else builder.op("Cast", [vector], {"to": int(dtype)})


def _arranged(
    facts: Facts,
    builder: Builder,
    mask: ir.Value,
    there: list[Digit],
    order: list[Digit],
    cut: Sequence[Sequence[Digit]],
) -> ir.Value | str:
    """The mask, which runs over the digits `there`, with these digits in each of four axes."""
    value: ir.Value | None = mask
    turn = [there.index(digit) for digit in order]
    if turn != sorted(turn):
        value = _reshaped(facts, builder, value, [digit.size for digit in there])
        if value is not None:
            value = builder.op("Transpose", [value], {"perm": turn})
    # An axis that the mask covers in part, a bias for each head of a group, is repeated in full.
    partly = [digits for digits in cut if any(d in order for d in digits)]
    if any(digit not in order for digits in partly for digit in digits):
        spread = [digit for digits in partly for digit in digits]
        sizes: list[Dim] = [digit.size if digit in order else 1 for digit in spread]
        value = _reshaped(facts, builder, value, sizes)
        target = builder.sizes([digit.size for digit in spread])
        if value is None or target is None:
            return "the mask's size cannot be computed"
        value = builder.op("Expand", [value, target])
    final = [product(d.size for d in digits) if digits in partly else 1 for digits in cut]
    value = _reshaped(facts, builder, value, final)
    return "the mask's size cannot be computed" if value is None else value


def _reshaped(
    facts: Facts, builder: Builder, value: ir.Value | None, sizes: list[Dim]
) -> ir.Value | None:
    if value is None:
        return None
    shape = facts.shapes.of(value)
    if shape is not None and facts.shapes.same_shape(shape, sizes):
        return value
    target = builder.target(value, sizes)
    return None if target is None else builder.op("Reshape", [value, target])
