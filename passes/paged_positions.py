"""Positions of packed tokens: what a model made of masks and pasts is made of lengths.

    outputs <- .. <- a value that says positions      <- mask, position_ids, pasts
                     the tokens' own in its place        nobody asks any more

Whatever still asks for an old input afterwards is not understood. A table that switches on the
longest position (longrope) is made for both cases, and each token takes its sequence's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import ancestors
from onnxgen.analysis.mixing import JOINING
from onnxgen.analysis.paging import UnpageableError
from onnxgen.analysis.positions import Lengths, Meaning
from onnxgen.passes.paged_switches import Switches
from onnxgen.patterns.building import Builder
from onnxgen.report.values import Obstacle

_TOKENS = ("ids", "embeds", "type_ids")


@dataclass(frozen=True)
class TokenLengths:
    """What is known of packed tokens.

    Attributes:
        positions: int64 [N].
        totals: int64 [N], past and new tokens of each token's sequence.
        count: int64 [1], N.
        longest: int64 [1], what stands for the length of a model's keys.
        axis: where the tokens are among the model's batch (0) and sequence (1).
    """

    positions: ir.Value
    totals: ir.Value
    count: ir.Value
    longest: ir.Value
    axis: int


def page_positions(
    facts: Facts, builder: Builder, asked: list[ir.Value], tokens: TokenLengths
) -> tuple[list[tuple[ir.Value, ir.Value]], bool]:
    """(old, new) for every value that says positions or lengths, and whether a table switches.

    Args:
        asked: values that are needed, of which attention knows nothing.

    Raises:
        UnpageableError: something else of the old inputs is asked for.
    """
    found = _Positions(facts, builder, tokens)
    return found.replaced(asked), bool(found.switches.found)


@dataclass
class _Positions:
    facts: Facts
    builder: Builder
    tokens: TokenLengths
    found: list[tuple[ir.Value, ir.Value]] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.facts.sampler is not None
        self.lengths = Lengths(self.facts.sampler)
        self.dropped = self._depending()
        self.switches = Switches(
            self.facts, self.builder, self.lengths, self.tokens.totals, self.tokens.axis
        )

    def _depending(self) -> set[ir.Value]:
        """Every value that follows from what is fed no more: all inputs but tokens and weights."""
        graph = self.facts.graph
        reached = {
            value
            for value in graph.inputs
            if self.facts.role(value) not in _TOKENS and value.name not in graph.initializers
        }
        for node in self.facts.graph:
            sizes = node.op_type in ("Shape", "Size")
            if any(value in reached for value in node.inputs if value is not None):
                outputs = [
                    each for each in node.outputs if sizes or not self.facts.is_activation(each)
                ]
                reached.update(outputs)
        return reached

    def replaced(self, asked: list[ir.Value]) -> list[tuple[ir.Value, ir.Value]]:
        obstacles: list[Obstacle] = []
        seen: set[ir.Value] = set()
        pending = list(asked)
        for condition in self._conditions(asked):
            self.switches.split(condition)
        pending += self.switches.leaves
        self.found += self.switches.found
        seen.update(old for old, _ in self.switches.found)
        while pending:
            value = pending.pop()
            if value in seen:
                continue
            seen.add(value)
            if value in self.dropped:
                new = self._said(value)
                if new is not None:
                    self.found.append((value, new))
                    continue
                if value.is_graph_input():
                    obstacles.append(Obstacle("PAG008", self._why(value), value.name or ""))
                    continue
            node = value.producer()
            if node is None:
                continue
            if value in self.dropped and node.op_type in JOINING:
                reason = f"{value.name!r} depends on the positions of all tokens"
                obstacles.append(Obstacle("PAG008", reason, node.name or ""))
            pending.extend(each for each in node.inputs if each is not None)
        if obstacles:
            raise UnpageableError(obstacles)
        return self.found

    def _why(self, value: ir.Value) -> str:
        """Why an input cannot be left out."""
        if self.facts.role(value) in ("unknown", "constant_like"):
            return f"what it computes depends on input {value.name!r}, which a paged model lacks"
        return f"input {value.name!r} is asked for by something that is no attention"

    def _conditions(self, asked: list[ir.Value]) -> list[ir.Value]:
        """Conditions on the longest sequence that are asked for, in graph order."""
        needed = set(ancestors(asked, frozenset()))
        return [
            value
            for node in self.facts.graph
            if node in needed
            for value in node.outputs
            if value in self.dropped and self.switches.is_switch(value)
        ]

    def _said(self, value: ir.Value) -> ir.Value | None:
        """What stands for a value among packed tokens; None where it says no more than it is."""
        meaning = self.lengths.meaning(value)
        if meaning is None and value.is_graph_input() and self.facts.role(value) == "positions":
            meaning = self._input(value)
        if meaning is None or value.dtype is None:
            return None
        op, ints, axis = self.builder.op, self.builder.ints, self.tokens.axis
        match meaning.kind:
            case "always":
                return self.builder.constant(np.ones([dim or 1 for dim in meaning.dims], bool))
            case "position":
                new = self.tokens.positions
                if axis == 0 and self._batch(meaning) is None:
                    return None
            case "total":
                new = self.tokens.longest
            case "new":
                new = self.tokens.count if axis == 1 else ints(1)
            case _:
                new = self.tokens.count if axis == 0 else ints(1)
        if value.dtype != ir.DataType.INT64:
            new = op("Cast", [new], {"to": int(value.dtype)})
        if meaning.offset:
            added = np.array(meaning.offset, dtype=value.dtype.numpy())
            new = op("Add", [new, self.builder.constant(added)])
        if meaning.kind != "position":
            sizes = [1 if dim is None else dim for dim in meaning.dims]
            return new if sizes == [1] else op("Reshape", [new, ints(*sizes)])
        return self._spread(new, meaning)

    @staticmethod
    def _batch(meaning: Meaning) -> int | None:
        """The axis of the batch, of a model of one new token: the first that is as long as it.

        What is said of one row is said of every row.
        """
        return next((i for i, dim in enumerate(meaning.dims) if dim in (None, 1)), None)

    def _input(self, value: ir.Value) -> Meaning | None:
        """An input of positions means what its axes say."""
        each = self.facts.roles.inputs[value.name or ""]
        if "S" not in each.axes:
            return None
        dims = tuple(
            None if letter in ("B", "S") else dim if isinstance(dim, int) else 1
            for letter, dim in zip(each.axes, each.shape, strict=True)
        )
        return Meaning("position", each.axes.index("S"), 0, dims)

    def _spread(self, vector: ir.Value, meaning: Meaning) -> ir.Value:
        """[N] along the tokens' axis of a value, the axis of the other one of size 1."""
        op, ints = self.builder.op, self.builder.ints
        assert meaning.axis is not None
        sizes = [1 if dim is None else dim for dim in meaning.dims]
        at = meaning.axis
        if self.tokens.axis == 0:
            at = self._batch(meaning) or 0
        plain = [-1 if i == at else 1 for i in range(len(sizes))]
        new = vector if plain == [-1] else op("Reshape", [vector, ints(*plain)])
        if any(size > 1 for size in sizes):
            wide = [
                self.builder.ints(size) if i != at else self.tokens.count
                for i, size in enumerate(sizes)
            ]
            new = op("Expand", [new, op("Concat", wide, {"axis": 0})])
        return new
