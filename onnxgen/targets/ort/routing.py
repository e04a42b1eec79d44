"""Routers that the MoE kernel has inside: softmax and top-k, in either order, renormalised or not.

    v, i = TopK(Softmax(logits), k);  w = v   or   v / ReduceSum(v)
    v, i = TopK(logits, k);           w = Softmax(v)

both with a constant factor anywhere. `routed` says what of a MoE node's weights and indices that
is; casts, and views that keep the last axis, are looked through. Which experts are chosen has to
be the same to the last bit, so probabilities that a choice is made by must be float32, as the
kernel's are: in float16 different logits become equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import FLOATS, attribute, given, optional, producer, scalar, uniform
from onnxgen.analysis.moments import trailing_axis

_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_ULP = 2.0**-24


@dataclass(frozen=True)
class Routed:
    """A router of this kind.

    Attributes:
        logits: [.., E].
        normalized: whether the chosen weights add up to 1, before `factor`.
        factor: what they are multiplied by.
    """

    logits: ir.Value
    normalized: bool
    factor: float = 1.0


def routed(facts: Facts, weights: ir.Value, indices: ir.Value, experts: int) -> Routed | None:
    """The router of weights and indices, [T, k] each; None for another one."""
    return _Walk(facts, experts).router(weights, indices)


class _Walk:
    def __init__(self, facts: Facts, experts: int) -> None:
        self._facts = facts
        self._experts = experts

    def router(self, weights: ir.Value, indices: ir.Value) -> Routed | None:
        chosen = self._up(indices)
        top = producer(chosen, "TopK")
        if top is None or chosen is not top.outputs[1] or not self._largest(top):
            return None
        value, normalized, factor = self._up(weights), False, 1.0
        for _ in range(8):
            source = self._selected(value, top)
            if source is not None:
                return self._softmax_first(top, source, normalized, factor)
            node = producer(value, "Mul", "Div", "Softmax")
            if node is None:
                return None
            if node.op_type == "Softmax":
                source = self._selected(self._up(given(node)), top)
                selected_by = self._up(given(top), exact=True)
                if source is not selected_by or not self._over_last(node):
                    return None
                return Routed(selected_by, True, factor)
            scaled = self._scaled(node)
            if scaled is not None:
                if scaled[1] == 0:
                    return None
                # A factor before the sum goes with it.
                value, factor = scaled[0], factor if normalized else factor * scaled[1]
            elif self._is_share(node):
                normalized = True
                value = given(node)
            else:
                return None
            value = self._up(value)
        return None

    def _softmax_first(
        self, top: ir.Node, source: ir.Value, normalized: bool, factor: float
    ) -> Routed | None:
        """Probabilities of all experts, chosen by themselves or by their logits."""
        softmax = producer(source, "Softmax")
        if softmax is None or not self._over_last(softmax):
            return None
        logits = self._up(given(softmax), exact=True)
        by = self._up(given(top), exact=True)
        by_probabilities = by is source and source.dtype == ir.DataType.FLOAT
        return Routed(logits, normalized, factor) if by_probabilities or by is logits else None

    def _selected(self, value: ir.Value, top: ir.Node) -> ir.Value | None:
        """What a value's columns are picked from by the TopK, [.., E]; None if it is not so."""
        if value is top.outputs[0]:
            return self._up(given(top), exact=True)
        gather = producer(value, "GatherElements")
        if gather is None or self._up(given(gather, 1)) is not top.outputs[1]:
            return None
        rank = self._facts.shapes.rank(value)
        if rank is None or attribute(gather, "axis", 0) % rank != rank - 1:
            return None
        return self._up(given(gather))

    def _largest(self, top: ir.Node) -> bool:
        shape = self._facts.shapes.of(top.inputs[0])
        if shape is None or shape[-1] != self._experts or not attribute(top, "largest", 1):
            return False
        return attribute(top, "axis", -1) in (-1, len(shape) - 1)

    def _over_last(self, softmax: ir.Node) -> bool:
        rank = self._facts.shapes.rank(softmax.inputs[0])
        axis = attribute(softmax, "axis", -1)
        return axis == -1 or (rank is not None and axis == rank - 1)

    def _scaled(self, node: ir.Node) -> tuple[ir.Value, float] | None:
        """(value, factor) of a product with a number."""
        number = uniform(node.inputs[1])
        if node.op_type == "Div":
            return None if not number else (given(node), 1 / number)
        if number is not None:
            return given(node), number
        number = uniform(node.inputs[0])
        return None if number is None else (given(node, 1), number)

    def _is_share(self, node: ir.Node) -> bool:
        """v / ReduceSum(v), its guard against zero too small to be seen beside the sum."""
        if node.op_type != "Div":
            return False
        shape = self._facts.shapes.of(node.inputs[0])
        slots = shape[-1] if shape else None
        if not isinstance(slots, int):
            return False
        least = slots / self._experts  # the k largest of E numbers that add up to 1
        total = self._up(given(node, 1), any_width=True)
        guard = producer(total, "Add", "Max", "Clip")
        if guard is not None:
            pair = list(guard.inputs[:2])
            number = scalar(pair[1])
            if number is None and guard.op_type != "Clip":
                pair.reverse()
                number = scalar(pair[1])
            if number is None or pair[0] is None or optional(guard, 2) is not None:
                return False
            small = abs(number) < least * _ULP if guard.op_type == "Add" else number < least / 2
            # Probabilities may have been multiplied by less than one before the sum.
            if not small or not self._is_probability(given(node)):
                return False
            total = self._up(pair[0], any_width=True)
        node_of_sum = producer(total, "ReduceSum")
        if node_of_sum is None or trailing_axis(self._facts, node_of_sum) != -1:
            return False
        same = self._up(given(node_of_sum)) is self._up(given(node))
        return same and self._kept(node_of_sum, given(node, 1), given(node))

    def _is_probability(self, value: ir.Value) -> bool:
        """Whether columns are picked from a Softmax, with no factor in between."""
        node = producer(self._up(value), "TopK", "GatherElements")
        return node is not None and producer(self._up(given(node)), "Softmax") is not None

    def _kept(self, node: ir.Node, divisor: ir.Value, value: ir.Value) -> bool:
        """Whether each row is divided by its own sum: [.., 1] beside [.., k]."""
        shapes = self._facts.shapes
        of_sum, of_value = shapes.of(divisor), shapes.of(value)
        if of_sum is None or of_value is None or len(of_sum) != len(of_value):
            return False
        rows = zip(of_sum[:-1], of_value[:-1], strict=True)
        return of_sum[-1] == 1 and all(shapes.same(a, b) for a, b in rows)

    def _up(self, value: ir.Value, *, exact: bool = False, any_width: bool = False) -> ir.Value:
        """What a value is but for casts between floats, or integers, and views of its rows.

        Args:
            exact: a cast that rounds ends the way.
            any_width: the last axis may be one that a view added or took away.
        """
        shapes = self._facts.shapes
        while (node := producer(value, "Cast", *_VIEWS)) is not None:
            above = given(node)
            if node.op_type == "Cast":
                kinds = {above.dtype in FLOATS, value.dtype in FLOATS}
                rounds = exact and (above.dtype, value.dtype) not in _WIDENING
                if len(kinds) > 1 or rounds:
                    break
            elif not any_width:
                old, new = shapes.of(above), shapes.of(value)
                if not old or not new or not shapes.same(old[-1], new[-1]):
                    break
            value = above
        return value


_FLOAT, _DOUBLE = ir.DataType.FLOAT, ir.DataType.DOUBLE
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_WIDENING = frozenset(
    {*((half, wide) for half in _HALVES for wide in (_FLOAT, _DOUBLE)), (_FLOAT, _DOUBLE)}
    | {(each, each) for each in FLOATS}
)
