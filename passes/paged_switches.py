"""Tables that switch on a sequence's length (longrope), for packed tokens of several sequences.

    T = table(positions, longest > edge)    ->    Where(own length > edge, T if true, T if false)

A model that sees one sequence asks once how long it is. Among packed tokens each asks for its own:
the condition is computed for every token, and the table for both answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import names
from onnxgen.analysis.paging import UnpageableError
from onnxgen.analysis.positions import Lengths
from onnxgen.patterns.building import Builder
from onnxgen.report.values import Obstacle

_ELEMENTWISE = names(
    """
    Add And Cast Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mul Not Or Sub
    """
)
_VIEWS = names("Identity Reshape Squeeze Unsqueeze")


class Switches:
    """Finds conditions on the longest sequence, and makes what depends on them each token's own.

    Attributes:
        found: (old, new) for the values that other things than tables read.
        leaves: what the new ones are made of.
    """

    def __init__(
        self, facts: Facts, builder: Builder, lengths: Lengths, totals: ir.Value, axis: int
    ) -> None:
        """Prepare.

        Args:
            totals: int64 [N], past and new tokens of each token's sequence.
            axis: where the tokens are among the model's batch (0) and sequence (1).
        """
        self._facts = facts
        self._builder = builder
        self._lengths = lengths
        self._totals = totals
        self._axis = axis
        self.found: list[tuple[ir.Value, ir.Value]] = []
        self.leaves: list[ir.Value] = []

    def is_switch(self, value: ir.Value) -> bool:
        """Whether a value is one condition for all tokens that are run together."""
        samples = self._lengths.samples(value) if value.dtype == ir.DataType.BOOL else ()
        return bool(samples) and all(array.size == 1 for _, array in samples)

    def split(self, condition: ir.Value) -> None:
        """Make everything that depends on a condition each token's own.

        Raises:
            UnpageableError: it does not follow from lengths alone, or something else than a table
                depends on it.
        """
        flags = self._own(condition)
        cone = self._cone(condition)
        for value in cone:
            if not any(self._facts.is_activation(o) for u, _ in value.uses() for o in u.outputs):
                continue
            at = 0 if self._axis == 0 else self._lengths.token_axis(value)
            samples = self._lengths.samples(value)
            if at is None or not samples:
                raise self._obstacle(f"{value.name!r} depends on the longest sequence", condition)
            both = [self._with(value, condition, answer, cone) for answer in (True, False)]
            shape = [-1 if axis == at else 1 for axis in range(samples[0][1].ndim)]
            own = self._builder.op("Reshape", [flags, self._builder.ints(*shape)])
            self.found.append((value, self._builder.op("Where", [own, *both])))

    def _cone(self, condition: ir.Value) -> list[ir.Value]:
        """What follows from a condition without the model's layers, in graph order."""
        reached = {condition}
        cone = []
        for node in self._facts.graph:
            if any(value in reached for value in node.inputs):
                outputs = [each for each in node.outputs if not self._facts.is_activation(each)]
                reached.update(outputs)
                cone += outputs
        return cone

    def _own(self, value: ir.Value) -> ir.Value:
        """A scalar that follows from the longest sequence, for each token's own: [N]."""
        meaning = self._lengths.meaning(value)
        if meaning is not None and meaning.kind == "total" and value.dtype is not None:
            own = self._totals
            if value.dtype != ir.DataType.INT64:
                own = self._builder.op("Cast", [own], {"to": int(value.dtype)})
            if meaning.offset:
                added = np.array(meaning.offset, dtype=value.dtype.numpy())
                own = self._builder.op("Add", [own, self._builder.constant(added)])
            return own
        node = value.producer()
        if node is None and value.const_value is not None and value.const_value.size == 1:
            number = value.const_value.numpy().reshape(())
            return self._builder.constant(np.array(number))
        if node is not None and node.op_type in _VIEWS and node.inputs[0] is not None:
            return self._own(node.inputs[0])
        if node is None or node.op_type not in _ELEMENTWISE:
            raise self._obstacle(f"{value.name!r} is no condition on a length", value)
        inputs = [self._own(each) for each in node.inputs if each is not None]
        return self._builder.op(node.op_type, inputs, _attributes(node))

    def _with(
        self, value: ir.Value, condition: ir.Value, answer: bool, cone: Sequence[ir.Value]
    ) -> ir.Value:
        """A value for one answer to the condition."""
        shape = self._lengths.samples(condition)[0][1].shape
        made = {condition: self._builder.constant(np.full(shape, answer))}
        needed = _between(value, set(cone))
        for each in cone:
            if each not in needed:
                continue
            node = each.producer()
            assert node is not None
            if len(node.outputs) != 1:
                raise self._obstacle(f"{node.op_type} depends on the longest sequence", condition)
            self.leaves += [v for v in node.inputs if v is not None and v not in made]
            inputs = [v if v is None else made.get(v, v) for v in node.inputs]
            made[each] = self._builder.op(
                node.op_type, inputs, _attributes(node), domain=node.domain
            )
        return made[value]

    @staticmethod
    def _obstacle(reason: str, at: ir.Value) -> UnpageableError:
        return UnpageableError([Obstacle("PAG008", reason, at.name or "")])


def _between(value: ir.Value, cone: set[ir.Value]) -> set[ir.Value]:
    """The part of a cone that a value is made of."""
    found: set[ir.Value] = set()
    pending = [value]
    while pending:
        each = pending.pop()
        if each in cone and each not in found:
            found.add(each)
            node = each.producer()
            pending += [v for v in node.inputs if v is not None] if node is not None else []
    return found


def _attributes(node: ir.Node) -> dict[str, object]:
    return {name: each.value for name, each in node.attributes.items()}
