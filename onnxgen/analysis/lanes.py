"""What happens along the last axis, element by element.

A rotary embedding mixes the elements (lanes) of a head with one another: x[i] * cos - x[j] * sin.
Exporters say it with slices, halves, negations, stacks, reshapes to pairs, and concatenations in
many orders. Here each lane of the result is written out as a polynomial of the lanes of the one
tensor it is made from and of the tables it is multiplied by; spelling vanishes, the meaning stays:

    lanes(y)[0] = +1 * x[0] * cos[0]  -1 * x[24] * sin[0]

A head may lie over two axes, as pairs [D/2, 2]: its lanes are counted through.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import (
    FLOATS,
    attribute,
    constant,
    given,
    names,
    other_input,
    producer,
    scalar,
)
from onnxgen.analysis.lane_forms import Lane, Lanes, NotLanes, combine, product_of, sum_of
from onnxgen.analysis.view_shapes import slice_bounds

MAX_STEPS = 64
MAX_LANES = 1024


def candidates(facts: Facts, y: ir.Value) -> list[ir.Value]:
    """Activations that all of `y` is made from, nearest first: every path from `y` meets them.

    Paths lead through operators on the last axis only; the search ends at any other.
    """
    found: list[ir.Value] = []
    queue = [(-facts.order(y), 0, y)]  # the number in the middle keeps values from being compared
    queued = {y}
    branched = False
    for _ in range(1, MAX_STEPS):
        if not queue:
            break
        _, _, value = heapq.heappop(queue)
        if not queue and branched:
            found.append(value)
        node = producer(value)
        if node is None or node.op_type not in _LANE_OPS:
            break
        if node.op_type == "MatMul" and _moves(node) is None:
            break
        inputs = {v for v in node.inputs if v is not None and not _is_table(facts, node, v)}
        branched = branched or len(inputs | {each for _, _, each in queue}) > 1
        for each in node.inputs:
            if each in inputs and each not in queued:
                heapq.heappush(queue, (-facts.order(each), len(queued), each))
                queued.add(each)
    return found


def _is_table(facts: Facts, node: ir.Node, value: ir.Value) -> bool:
    """Whether what a node reads is a table: no activation, or one factor that is fed as it is."""
    if not facts.is_activation(value):
        return True
    if node.op_type != "Mul" or not _is_fed(value):
        return False
    other = other_input(node, value)
    return other is not None and facts.is_activation(other) and not _is_fed(other)


def _is_fed(value: ir.Value) -> bool:
    """Whether a value is an input of the graph, moved at most."""
    for _ in range(MAX_STEPS):
        node = value.producer()
        if node is None:
            return value.is_graph_input()
        if node.op_type == "Concat" and len(set(node.inputs)) == 1:
            value = given(node)  # two halves of one
        elif node.op_type in _MOVES:
            value = given(node)
        else:
            return False
    return False


def lanes(facts: Facts, y: ir.Value, x: ir.Value, leading: int | None = None) -> Lanes | None:
    """Each lane of `y` over lanes of `x` and of tables; None where they cannot be written out.

    Args:
        leading: how many axes are left alone, in `y` and in `x`; all but the last unless given.
    """
    shape = facts.shapes.of(y)
    if shape is None:
        return None
    try:
        return _Writer(facts, x, len(shape) - 1 if leading is None else leading).of(y)
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
        node = producer(value)
        rule = None if node is None else _LANE_OPS.get(node.op_type)
        if node is None or rule is None:
            raise NotLanes
        try:
            return rule(self, node, value)
        except (IndexError, ValueError) as error:  # not as many lanes as the shapes say
            raise NotLanes from error

    def _operand(self, node: ir.Node, index: int, output: ir.Value) -> Lanes:
        """An operand of an elementwise operator, or a part of a Concat: activation or table."""
        value = given(node, index)
        if value is self._x or not _is_table(self._facts, node, value):
            return self.of(value)
        number = scalar(value)
        if number is not None:
            return np.array({(): number}, dtype=object).reshape(())
        shape, rank = self._facts.shapes.of(value), self._facts.shapes.rank(output)
        if not shape or rank is None or rank <= self._leading:
            raise NotLanes
        sizes = shape[-min(len(shape), rank - self._leading) :]
        known = tuple(int(size) for size in sizes if isinstance(size, int))
        if len(known) != len(sizes) or int(np.prod(known)) > MAX_LANES:
            raise NotLanes
        signs = constant(value, MAX_LANES)
        if signs is not None and signs.size == int(np.prod(known)) and (abs(signs) == 1).all():
            result = np.empty(signs.size, dtype=object)
            result[:] = [{(): float(sign)} for sign in signs.reshape(-1)]
            return result.reshape(known)
        return self._leaf(value, known)

    def _leaf(self, value: ir.Value, sizes: tuple[int, ...]) -> Lanes:
        result = np.empty(int(np.prod(sizes)), dtype=object)
        for index in range(result.size):
            result[index] = {(Lane(value, index, len(sizes)),): 1.0}
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
        return self.of(given(node))

    def _add(self, node: ir.Node, value: ir.Value) -> Lanes:
        sign = -1.0 if node.op_type == "Sub" else 1.0
        first, second = (self._operand(node, index, value) for index in range(2))
        return combine(lambda a, b: sum_of(a, b, sign), first, second)

    def _multiply(self, node: ir.Node, value: ir.Value) -> Lanes:
        return combine(product_of, *(self._operand(node, index, value) for index in range(2)))

    def _divide(self, node: ir.Node, value: ir.Value) -> Lanes:
        number = scalar(node.inputs[1])
        if not number:
            raise NotLanes
        return combine(product_of, self.of(given(node)), np.array({(): 1 / number}, object))

    def _cast(self, node: ir.Node, value: ir.Value) -> Lanes:
        """To a wider type, of lanes that were only moved: nothing is rounded."""
        source, result = given(node), self.of(given(node))
        if source.dtype not in FLOATS or value.dtype not in FLOATS:
            raise NotLanes
        if source.dtype.itemsize >= value.dtype.itemsize:
            raise NotLanes
        for form in result.flat:
            if len(form) != 1 or any(len(t) != 1 or abs(f) != 1 for t, f in form.items()):
                raise NotLanes
        return result

    def _move(self, node: ir.Node, value: ir.Value) -> Lanes:
        """A product with a matrix that only moves lanes and changes signs."""
        moved, result = _moves(node), self.of(given(node))
        if moved is None or result.ndim != 1:
            raise NotLanes
        order, signs = moved
        turned = [product_of(result[i], {(): sign}) for i, sign in zip(order, signs, strict=True)]
        written = np.empty(len(turned), dtype=object)
        written[:] = turned
        return written

    def _negate(self, node: ir.Node, value: ir.Value) -> Lanes:
        return combine(product_of, self.of(given(node)), np.array({(): -1.0}, object))

    def _concat(self, node: ir.Node, value: ir.Value) -> Lanes:
        axis = self._axis(attribute(node, "axis"), value)
        parts = [self._operand(node, index, value) for index in range(len(node.inputs))]
        if any(part.ndim <= axis for part in parts):
            raise NotLanes
        return np.concatenate(parts, axis)

    def _slice(self, node: ir.Node, value: ir.Value) -> Lanes:
        source = given(node)
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
        source = given(node)
        axis = self._axis(attribute(node, "axis", 0), source)
        start = 0
        for output in node.outputs:
            size = self._sizes(output)[axis]
            if output is value:
                return self.of(source).take(range(start, start + size), axis)
            start += size
        raise NotLanes

    def _gather(self, node: ir.Node, value: ir.Value) -> Lanes:
        source, indices = given(node), constant(node.inputs[1], MAX_LANES)
        if indices is None:
            raise NotLanes
        return np.take(
            self.of(source), indices.astype(int), self._axis(attribute(node, "axis", 0), source)
        )

    def _reshape(self, node: ir.Node, value: ir.Value) -> Lanes:
        source = given(node)
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
        return self.of(given(node)).transpose(
            [axis - self._leading for axis in order[self._leading :]]
        )


_LANE_OPS: dict[str, Callable[[_Writer, ir.Node, ir.Value], Lanes]] = {
    "Identity": _Writer._same,
    "Cast": _Writer._cast,
    "MatMul": _Writer._move,
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


def _moves(node: ir.Node) -> tuple[list[int], list[float]] | None:
    """For each column of a constant matrix its only element that is not 0: row, and sign."""
    tensor = None if node.inputs[1] is None else node.inputs[1].const_value
    if tensor is None or len(tensor.shape) != 2 or tensor.shape[0] != tensor.shape[1]:
        return None  # a weight, which is not read
    matrix = constant(node.inputs[1])
    if matrix is None or matrix.dtype.kind not in "fV":
        return None
    matrix = matrix.astype(np.float64)
    found = matrix != 0
    if not (found.sum(0) == 1).all() or not (abs(matrix[found]) == 1).all():
        return None
    return found.argmax(0).tolist(), matrix.sum(0).tolist()


_MOVES = names("Identity Cast Reshape Transpose Unsqueeze Squeeze Slice Split Gather Expand")
