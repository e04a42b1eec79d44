"""Bringing a mask from the scores that it is applied to, however viewed, to [B, H, S, T]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import constant, given, producer
from onnxgen.analysis.layouts import parts_of
from onnxgen.analysis.symbols import Dim, product
from onnxgen.analysis.views import Axis, Digit
from onnxgen.patterns.building import Builder


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
