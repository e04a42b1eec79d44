"""Which lanes of rotary tables hold the same numbers, whatever the tables are computed from."""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from onnxgen.analysis.evaluate import Array, CutError
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute, constant, given, names, producer, scalar
from onnxgen.analysis.lane_forms import Lane
from onnxgen.analysis.reads import reads_of
from onnxgen.analysis.sampling import TABLE_SHAPES
from onnxgen.analysis.view_shapes import slice_bounds
from onnxgen.analysis.views import VIEW_OPS


class Tables:
    """Which lanes of tables hold the same numbers: cos[0] and cos[24] of Cos(Concat(f, f)).

    A lane is followed through concatenations, slices and elementwise operators to where its number
    comes from; lanes with one origin are equal. Where that does not tell, the tables are run.
    """

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._known: dict[Lane, Hashable] = {}

    def origin(self, lane: Lane) -> Hashable:
        """A key that is equal for two lanes of one origin."""
        if lane not in self._known:
            self._known[lane] = self._follow(lane)
        return self._known[lane]

    def same(self, a: Lane, b: Lane, *, opposite: bool = False) -> bool:
        """Whether two lanes hold the same numbers, or numbers of opposite sign.

        They do with one origin, or where they are equal in every run.
        """
        origins = [self.origin(a), self.origin(b)]
        if opposite:
            for one, other in (origins, origins[::-1]):
                if one == ("Neg", other):
                    return True
        elif origins[0] == origins[1]:
            return True
        runs = [self._runs(a), self._runs(b)]
        return (
            bool(runs[0])
            and len(runs[0]) == len(runs[1])
            and all(
                one.shape == other.shape and (one == (-other if opposite else other)).all()
                for one, other in zip(*runs, strict=True)
            )
        )

    def _runs(self, lane: Lane) -> list[Array]:
        """What a lane holds, in each run; nothing where it cannot be run."""
        elements, sampler = constant(lane.value), self._facts.sampler
        if elements is not None:
            return [_lane(elements, lane)]
        if sampler is None or self._facts.is_activation(lane.value) or _picks(lane.value):
            return []
        further = sampler.further(lane.value)
        if isinstance(further, str):
            return []
        try:
            samples = sampler.samples(lane.value, (*TABLE_SHAPES, *further))
        except CutError:
            return []
        return [_lane(array, lane) for _, array in samples]

    def _follow(self, lane: Lane) -> Hashable:
        value, index, axes = lane
        if axes > 1:
            return self._through_view(lane)
        elements = constant(value)
        if elements is not None and elements.ndim:
            return ("constant", elements[..., index].tobytes(), elements.shape[:-1])
        node = producer(value)
        rank = self._facts.shapes.rank(value)
        if node is None or rank is None:
            return lane
        last = rank - 1
        op = node.op_type
        if op == "Identity":
            return self.origin(Lane(given(node), index))
        if op == "Neg":
            return ("Neg", self.origin(Lane(given(node), index)))
        if op in _ELEMENTWISE:
            operands = [None if v is None else self._operand(v, index) for v in node.inputs]
            return (op, _attributes(node), *operands)
        if op == "Concat":
            return self._part(node, lane, last)
        if op == "Slice":
            return self._sliced(node, lane, last)
        if op == "Split":
            return self._split(node, lane, last)
        if op == "Gather":
            return self._gathered(node, lane)
        return self._through_view(lane) if op in VIEW_OPS else lane

    def _part(self, node: ir.Node, lane: Lane, last: int) -> Hashable:
        index, axis = lane.at, attribute(node, "axis") % (last + 1)
        if axis != last:
            return (
                "Concat",
                axis,
                *(self.origin(Lane(given(node, i), index)) for i in range(len(node.inputs))),
            )
        for part in node.inputs:
            size = self._last(part)
            if part is None or size is None:
                break
            if index < size:
                return self.origin(Lane(part, index))
            index -= size
        return lane

    def _sliced(self, node: ir.Node, lane: Lane, last: int) -> Hashable:
        """A slice of the lanes; or of other axes, the same for every lane."""
        bounds = slice_bounds(self._facts.shapes, node)
        if bounds is None:
            return lane
        at, rest = lane.at, []
        for axis, start, length, step in bounds:
            if axis == last and not isinstance(start, int):
                return lane
            if axis == last and isinstance(start, int):
                at = start + at * step
            else:
                rest.append((axis, start, length, step))
        inner = self.origin(Lane(given(node), at))
        return ("Slice", tuple(rest), inner) if rest else inner

    def _split(self, node: ir.Node, lane: Lane, last: int) -> Hashable:
        if attribute(node, "axis", 0) % (last + 1) != last:
            return self._elsewhere(node, lane.at, lane.value.index())
        index = lane.at
        for output in node.outputs:
            if output is lane.value:
                return self.origin(Lane(given(node), index))
            size = self._last(output)
            if size is None:
                break
            index += size
        return lane

    def _gathered(self, node: ir.Node, lane: Lane) -> Hashable:
        """A Gather of lanes by constants; or along another axis, the same for every lane."""
        source = given(node)
        rank = self._facts.shapes.rank(source)
        indices = constant(node.inputs[1])
        if rank is None:
            return lane
        axis = attribute(node, "axis", 0) % rank
        if axis != rank - 1:
            return self._elsewhere(node, lane.at)
        size = self._last(source)
        if indices is None or indices.ndim != 1 or size is None:
            return lane
        return self.origin(Lane(source, int(indices[lane.at]) % size))

    def _elsewhere(self, node: ir.Node, index: int, output: int | None = 0) -> Hashable:
        """What a node does to other axes, the same for every lane, and the lane it does it to."""
        others = tuple(map(self._identity, node.inputs[1:]))
        inner = self.origin(Lane(given(node), index))
        return (node.op_type, _attributes(node), output, others, inner)

    def _identity(self, value: ir.Value | None) -> Hashable:
        elements = constant(value, 1024)
        return value if elements is None else (elements.tobytes(), elements.shape)

    def _through_view(self, lane: Lane) -> Hashable:
        """The lane of a view's source that a lane shows, where the lanes run over no other axis."""
        value, index, axes = lane
        view = self._facts.views.of(value)
        rank = None if view is None else self._facts.shapes.rank(view.source)
        if view is None or rank is None or (view.source is value and axes == 1):
            return lane
        source_lane = 0
        for digit in reversed([digit for axis in view.axes[-axes:] for digit in axis]):
            if not isinstance(digit.size, int) or not isinstance(digit.stride, int):
                return lane
            index, part = divmod(index, digit.size)
            if digit.axis == rank - 1:
                source_lane += part * digit.stride
            elif not digit.repeats:
                return lane
        leading = view.axes[:-axes]
        if any(digit.axis == rank - 1 for axis in leading for digit in axis):
            return lane
        return ("view", leading, view.scale, self.origin(Lane(view.source, source_lane)))

    def _operand(self, value: ir.Value, index: int) -> Hashable:
        size = self._last(value)
        number = scalar(value)
        if number is not None or size is None:
            return value if number is None else number
        return self.origin(Lane(value, index if size > 1 else 0))

    def _last(self, value: ir.Value | None) -> int | None:
        shape = self._facts.shapes.of(value)
        return shape[-1] if shape and isinstance(shape[-1], int) else None


# Operators that work on each element alone. Neg is told apart: signs are compared.
_ELEMENTWISE = names(
    """
    Abs Add Cast Ceil Clip Cos Div Equal Exp Floor Greater GreaterOrEqual Less LessOrEqual Log Max
    Min Mod Mul Not Pow Reciprocal Round Sin Sqrt Sub Where
    """
)


def _picks(value: ir.Value) -> bool:
    """Whether rows of a constant are picked by what is computed: no runs show all of them."""
    return any(
        node.op_type in _PICKING
        and constant(node.inputs[0], limit=1 << 28) is not None
        and constant(node.inputs[1], limit=1 << 28) is None
        for node in reads_of(value).nodes
    )


_PICKING = names("Gather GatherElements GatherND")


def _attributes(node: ir.Node) -> Hashable:
    return tuple(sorted((name, str(found.value)) for name, found in node.attributes.items()))


def _lane(array: Array, lane: Lane) -> Array:
    """One lane of a table that was run."""
    leading = array.shape[: array.ndim - lane.axes]
    found: Array = array.reshape(*leading, -1)[..., lane.at]
    return found
