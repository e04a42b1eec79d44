"""What happens along the last axis, element by element.

A rotary embedding mixes the elements (lanes) of a head with one another: x[i] * cos - x[j] * sin.
Exporters say it with slices, halves, negations, stacks, reshapes to pairs, and concatenations in
many orders. Here each lane of the result is written out as a polynomial of the lanes of the one
tensor it is made from and of the tables it is multiplied by; spelling vanishes, the meaning stays:

    lanes(y)[0] = +1 * x[0] * cos[0]  -1 * x[24] * sin[0]
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute, constant, producer, scalar
from onnxgen.analysis.shape_rules import slice_bounds
from onnxgen.analysis.views import VIEW_OPS

# One factor of a term: (value, lane), a lane of a tensor.
Lane: TypeAlias = tuple[ir.Value, int]
# A polynomial: product of lanes -> its number.
Form: TypeAlias = Mapping[tuple[Lane, ...], float]
Lanes: TypeAlias = "np.ndarray[Any, Any]"  # of forms

MAX_STEPS = 64
MAX_LANES = 1024


class NotLanes(Exception):
    """A step moves or mixes more than the last axis."""


def candidates(facts: Facts, y: ir.Value) -> list[ir.Value]:
    """Activations that all of `y` is made from, nearest first: every path from `y` meets them.

    Paths lead through operators on the last axis only; the search ends at any other.
    """
    found: list[ir.Value] = []
    queue = [(-facts.order(y), 0, y)]
    queued = {y}
    branched = False
    for step in range(1, MAX_STEPS):
        if not queue:
            break
        _, _, value = heapq.heappop(queue)
        if not queue and branched:
            found.append(value)
        node = producer(value)
        if node is None or node.op_type not in _LANE_OPS:
            break
        inputs = {v for v in node.inputs if v is not None and facts.is_activation(v)}
        branched = branched or len(inputs | {each for _, _, each in queue}) > 1
        for each in inputs - queued:
            queued.add(each)
            heapq.heappush(queue, (-facts.order(each), step, each))
    return found


def lanes(facts: Facts, y: ir.Value, x: ir.Value) -> Lanes | None:
    """Each lane of `y` over lanes of `x` and of tables; None where they cannot be written out."""
    shape = facts.shapes.of(y)
    if shape is None:
        return None
    try:
        return _Writer(facts, x, len(shape) - 1).of(y)
    except NotLanes:
        return None


class _Writer:
    """Writes out lanes with the first `leading` axes left alone."""

    def __init__(self, facts: Facts, x: ir.Value, leading: int) -> None:
        self._facts = facts
        self._x = x
        self._leading = leading
        self._known: dict[ir.Value, Lanes] = {}

    def of(self, value: ir.Value) -> Lanes:
        if value not in self._known:
            self._known[value] = self._write(value)
        return self._known[value]

    def _write(self, value: ir.Value) -> Lanes:
        if value is self._x:
            return self._leaf(value, self._sizes(value))
        if not self._facts.is_activation(value):
            return self._table(value)
        node = producer(value)
        rule = None if node is None else _LANE_OPS.get(node.op_type)
        if node is None or rule is None:
            raise NotLanes
        return rule(self, node, value)

    def _table(self, value: ir.Value) -> Lanes:
        number = scalar(value)
        if number is not None:
            return np.array({(): number}, dtype=object).reshape(())
        shape = self._facts.shapes.of(value)
        if not shape or not isinstance(shape[-1], int) or shape[-1] > MAX_LANES:
            raise NotLanes
        return self._leaf(value, (shape[-1],))

    def _leaf(self, value: ir.Value, sizes: tuple[int, ...]) -> Lanes:
        result = np.empty(int(np.prod(sizes)), dtype=object)
        for index in range(result.size):
            result[index] = {((value, index),): 1.0}
        return result.reshape(sizes)

    def _sizes(self, value: ir.Value) -> tuple[int, ...]:
        shape = self._facts.shapes.of(value)
        if shape is None or len(shape) < self._leading:
            raise NotLanes
        sizes = shape[self._leading :]
        if not all(isinstance(size, int) for size in sizes):
            raise NotLanes
        known = tuple(int(size) for size in sizes if isinstance(size, int))
        if int(np.prod(known)) > MAX_LANES:
            raise NotLanes
        return known

    def _axis(self, axis: int, value: ir.Value | None) -> int:
        """An axis counted among the lanes; raises where it is one of the leading axes."""
        rank = self._facts.shapes.rank(value)
        if rank is None or axis % rank < self._leading:
            raise NotLanes
        return axis % rank - self._leading

    # --- one method an operator ---------------------------------------------------------------

    def _same(self, node: ir.Node, value: ir.Value) -> Lanes:
        return self.of(_given(node, 0))

    def _add(self, node: ir.Node, value: ir.Value) -> Lanes:
        sign = -1.0 if node.op_type == "Sub" else 1.0
        return _combine(
            lambda a, b: _sum(a, b, sign), self.of(_given(node, 0)), self.of(_given(node, 1))
        )

    def _multiply(self, node: ir.Node, value: ir.Value) -> Lanes:
        return _combine(_product, self.of(_given(node, 0)), self.of(_given(node, 1)))

    def _divide(self, node: ir.Node, value: ir.Value) -> Lanes:
        number = scalar(node.inputs[1])
        if not number:
            raise NotLanes
        return _combine(_product, self.of(_given(node, 0)), np.array({(): 1 / number}, object))

    def _negate(self, node: ir.Node, value: ir.Value) -> Lanes:
        return _combine(_product, self.of(_given(node, 0)), np.array({(): -1.0}, object))

    def _concat(self, node: ir.Node, value: ir.Value) -> Lanes:
        axis = self._axis(attribute(node, "axis"), value)
        return np.concatenate([self.of(part) for part in node.inputs if part is not None], axis)

    def _slice(self, node: ir.Node, value: ir.Value) -> Lanes:
        source = _given(node, 0)
        bounds = slice_bounds(self._facts.shapes, node)
        if bounds is None:
            raise NotLanes
        result = self.of(source)
        for raw_axis, start, length, step in bounds:
            axis = self._axis(raw_axis, source)
            if not isinstance(start, int) or not isinstance(length, int):
                raise NotLanes
            result = result.take(range(start, start + length * step, step), axis)
        return result

    def _split(self, node: ir.Node, value: ir.Value) -> Lanes:
        source = _given(node, 0)
        axis = self._axis(attribute(node, "axis", 0), source)
        start = 0
        for output in node.outputs:
            size = self._sizes(output)[axis]
            if output is value:
                return self.of(source).take(range(start, start + size), axis)
            start += size
        raise NotLanes

    def _gather(self, node: ir.Node, value: ir.Value) -> Lanes:
        source, indices = _given(node, 0), constant(node.inputs[1], MAX_LANES)
        if indices is None:
            raise NotLanes
        return np.take(
            self.of(source), indices.astype(int), self._axis(attribute(node, "axis", 0), source)
        )

    def _reshape(self, node: ir.Node, value: ir.Value) -> Lanes:
        source = _given(node, 0)
        shapes = self._facts.shapes
        before, after = shapes.of(source), shapes.of(value)
        if (
            before is None
            or after is None
            or not shapes.same_shape(before[: self._leading], after[: self._leading])
        ):
            raise NotLanes
        return self.of(source).reshape(self._sizes(value))

    def _transpose(self, node: ir.Node, value: ir.Value) -> Lanes:
        order = attribute(node, "perm")
        if order is None or list(order[: self._leading]) != list(range(self._leading)):
            raise NotLanes
        return self.of(_given(node, 0)).transpose(
            [axis - self._leading for axis in order[self._leading :]]
        )


_LANE_OPS: dict[str, Callable[[_Writer, ir.Node, ir.Value], Lanes]] = {
    "Identity": _Writer._same,
    "Add": _Writer._add,
    "Sub": _Writer._add,
    "Mul": _Writer._multiply,
    "Div": _Writer._divide,
    "Neg": _Writer._negate,
    "Concat": _Writer._concat,
    "Slice": _Writer._slice,
    "Split": _Writer._split,
    "Gather": _Writer._gather,
    "Reshape": _Writer._reshape,
    "Unsqueeze": _Writer._reshape,
    "Squeeze": _Writer._reshape,
    "Transpose": _Writer._transpose,
}


def _given(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise NotLanes
    return value


def _combine(function: Callable[[Form, Form], Form], a: Lanes, b: Lanes) -> Lanes:
    try:
        a, b = np.broadcast_arrays(a, b)
    except ValueError as error:
        raise NotLanes from error
    result = np.empty(a.size, dtype=object)
    for index, (one, other) in enumerate(zip(a.flat, b.flat, strict=True)):
        result[index] = function(one, other)
    return result.reshape(a.shape)


def _sum(a: Form, b: Form, sign: float) -> Form:
    result = dict(a)
    for term, factor in b.items():
        total = result.get(term, 0.0) + sign * factor
        if total:
            result[term] = total
        else:
            result.pop(term, None)
    return result


def _product(a: Form, b: Form) -> Form:
    if len(a) * len(b) > 4:
        raise NotLanes
    result: dict[tuple[Lane, ...], float] = {}
    for left, one in a.items():
        for right, other in b.items():
            term = left + right
            result[term] = result.get(term, 0.0) + one * other
    return result


# --- tables -------------------------------------------------------------------------------------


class Tables:
    """Which lanes of tables hold the same numbers: cos[0] and cos[24] of Cos(Concat(f, f)).

    A lane is followed through concatenations, slices and elementwise operators to where its number
    comes from; lanes with one origin are equal. Nothing is run and nothing is guessed: two lanes
    that cannot be shown to be equal are different.
    """

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._known: dict[Lane, Hashable] = {}

    def origin(self, lane: Lane) -> Hashable:
        """A key that is equal for two lanes of one origin."""
        if lane not in self._known:
            self._known[lane] = self._follow(*lane)
        return self._known[lane]

    def _follow(self, value: ir.Value, index: int) -> Hashable:
        elements = constant(value)
        if elements is not None and elements.ndim:
            return ("constant", elements[..., index].tobytes(), elements.shape[:-1])
        node = producer(value)
        rank = self._facts.shapes.rank(value)
        if node is None or rank is None:
            return (value, index)
        last = rank - 1
        match node.op_type:
            case "Cos" | "Sin" | "Identity" | "Cast" | "Neg" | "Exp" | "Sqrt":
                inner = self.origin((_given(node, 0), index))
                return inner if node.op_type == "Identity" else (node.op_type, inner)
            case "Mul" | "Add" | "Sub" | "Div":
                operands = [self._operand(v, index) for v in node.inputs if v is not None]
                return (node.op_type, *operands)
            case "Concat" if attribute(node, "axis") % rank == last:
                for part in node.inputs:
                    size = self._last(part)
                    if part is None or size is None:
                        break
                    if index < size:
                        return self.origin((part, index))
                    index -= size
            case "Slice":
                bounds = slice_bounds(self._facts.shapes, node)
                if bounds is not None and len(bounds) == 1 and bounds[0][0] == last:
                    start, step = bounds[0][1], bounds[0][3]
                    if isinstance(start, int):
                        return self.origin((_given(node, 0), start + index * step))
            case "Split" if attribute(node, "axis", 0) % rank == last:
                for output in node.outputs:
                    size = self._last(output)
                    if output is value or size is None:
                        break
                    index += size
                if size is not None:
                    return self.origin((_given(node, 0), index))
            case _ if node.op_type in VIEW_OPS:
                return self._through_view(value, index)
        return (value, index)

    def _through_view(self, value: ir.Value, index: int) -> Hashable:
        """The lane of a view's source that a lane shows, where the last axis runs over no other."""
        view = self._facts.views.of(value)
        rank = None if view is None else self._facts.shapes.rank(view.source)
        if view is None or rank is None or view.source is value:
            return (value, index)
        source_lane = 0
        for digit in reversed(view.axes[-1]):
            if not isinstance(digit.size, int) or not isinstance(digit.stride, int):
                return (value, index)
            index, part = divmod(index, digit.size)
            if digit.axis == rank - 1:
                source_lane += part * digit.stride
            elif not digit.repeats:
                return (value, index)
        if any(digit.axis == rank - 1 for axis in view.axes[:-1] for digit in axis):
            return (value, index)
        return ("view", view.axes[:-1], view.scale, self.origin((view.source, source_lane)))

    def _operand(self, value: ir.Value, index: int) -> Hashable:
        size = self._last(value)
        if scalar(value) is not None or size is None:
            return value
        return self.origin((value, index if size > 1 else 0))

    def _last(self, value: ir.Value | None) -> int | None:
        shape = self._facts.shapes.of(value)
        return shape[-1] if shape and isinstance(shape[-1], int) else None
