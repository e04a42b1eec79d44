"""Bringing a tensor into a wanted arrangement of axes: the value that has it, or new nodes."""

from __future__ import annotations

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.symbols import Dim, divide, product
from onnxgen.analysis.views import Axis, Digit
from onnxgen.patterns.building import Builder


def arranged(
    facts: Facts, builder: Builder, value: ir.Value, axes: tuple[Axis, ...]
) -> tuple[ir.Value, float] | None:
    """The source of a value's view with these axes, and the factor it is already multiplied by.

    A tensor on the way from the source to `value` that is arranged so is taken as it is;
    otherwise the source is reshaped, transposed and reshaped. None where a size is not known.
    """
    view = facts.views.of(value)
    if view is None:
        return None
    for each in reversed(facts.views.chain(value)):
        known = facts.views.of(each)
        if known is not None and known.source is view.source and known.axes == axes:
            return each, known.scale
    return _built(facts, builder, view.source, axes)


def _built(
    facts: Facts, builder: Builder, source: ir.Value, axes: tuple[Axis, ...]
) -> tuple[ir.Value, float] | None:
    wanted = [digit for axis in axes for digit in axis]
    shape = facts.shapes.of(source)
    if shape is None or any(digit.repeats for digit in wanted):
        return None
    permutation = _permutation(facts, source, axes)
    if permutation is not None:
        return builder.op("Transpose", [source], {"perm": permutation}), 1.0
    # The source's axes as the digits that are wanted of them, outermost first.
    split: list[Digit] = []
    for axis, size in enumerate(shape):
        digits = [digit for digit in wanted if digit.axis == axis]
        digits.sort(key=lambda digit: sum(_inside(other, digit) for other in digits), reverse=True)
        if not facts.shapes.same(product(digit.size for digit in digits), size):
            return None
        stride: Dim = 1
        for digit in reversed(digits):
            if digit.stride != stride:
                return None
            stride = stride * digit.size
        split.extend(digits)
    result = source
    if len(split) != len(shape) or any(size == 1 for size in shape):
        reshaped = _reshape(builder, result, [digit.size for digit in split])
        if reshaped is None:
            return None
        result = reshaped
    order = [split.index(digit) for digit in wanted]
    if order != sorted(order):
        result = builder.op("Transpose", [result], {"perm": order})
    final = [product(digit.size for digit in axis) for axis in axes]
    if any(len(axis) != 1 for axis in axes):
        return None if (last := _reshape(builder, result, final)) is None else (last, 1.0)
    return result, 1.0


def _permutation(facts: Facts, source: ir.Value, axes: tuple[Axis, ...]) -> list[int] | None:
    """The order of the source's own axes that gives the wanted ones, if one does."""
    own = facts.views.identity(source)
    if own is None or len(own.axes) != len(axes):
        return None
    order: list[int] = []
    for wanted in axes:
        found = (i for i, axis in enumerate(own.axes) if axis == wanted and i not in order)
        index = next(found, None)
        if index is None:
            return None
        order.append(index)
    return order


def _inside(inner: Digit, outer: Digit) -> bool:
    return inner.stride != outer.stride and divide(outer.stride, inner.stride) is not None


def _reshape(builder: Builder, value: ir.Value, sizes: list[Dim]) -> ir.Value | None:
    target = builder.target(value, sizes)
    return None if target is None else builder.op("Reshape", [value, target])
