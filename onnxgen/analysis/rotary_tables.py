"""Which lanes of rotary tables hold the same numbers, whatever the tables are computed from."""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from onnxgen.analysis.evaluate import CutError
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute, constant, given, producer, scalar
from onnxgen.analysis.lanes import Lane
from onnxgen.analysis.shape_rules import slice_bounds
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
            self._known[lane] = self._follow(*lane)
        return self._known[lane]

    def same(self, a: Lane, b: Lane) -> bool:
        """Whether two lanes hold the same numbers: one origin, or equal wherever they are run."""
        if self.origin(a) == self.origin(b):
            return True
        sampler = self._facts.sampler
        if sampler is None or any(map(self._facts.is_activation, (a[0], b[0]))):
            return False
        try:
            runs = [
                (one[..., a[1]], other[..., b[1]])
                for (_, one), (_, other) in zip(
                    sampler.samples(a[0]), sampler.samples(b[0]), strict=True
                )
            ]
        except CutError:
            return False
        return bool(runs) and all(
            one.shape == other.shape and (one == other).all() for one, other in runs
        )

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
                inner = self.origin((given(node), index))
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
                        return self.origin((given(node), start + index * step))
            case "Split" if attribute(node, "axis", 0) % rank == last:
                for output in node.outputs:
                    size = self._last(output)
                    if output is value or size is None:
                        break
                    index += size
                if size is not None:
                    return self.origin((given(node), index))
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
