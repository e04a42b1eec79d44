"""Where each row's tokens stand in GroupQueryAttention's cache, as nodes that compute it.

    n[b]   = seqlens_k[b] + 1                      tokens of row b, past and new
    at[b]  = max(n[b] - S, 0)                      place of its first new one
    length = max(P, total_sequence_length)         places of the cache

In a prompt (S = total_sequence_length) rows with less than S tokens end in padding, so at = 0.
Where seqlens_k follows from sizes alone and is P + S - 1, at = P in every row: `plain`.

Shapes: B batch, S new tokens, P past, T total_sequence_length, L length, K heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import given, optional, producer
from onnxgen.analysis.shapes import Shapes
from onnxgen.analysis.symbols import Dim, maximum
from onnxgen.patterns.building import Builder
from onnxgen.patterns.contrib_parts import number_like, steps

_VIEWS = ("Cast", "Expand", "Reshape", "Unsqueeze", "Squeeze", "Tile")
_INT64 = {"to": int(ir.DataType.INT64)}


@dataclass(frozen=True)
class Places:
    """Places of tokens; every value is int64.

    Attributes:
        plain: the new tokens of every row stand behind the whole past, and nothing behind them.
        at: [B]: place of each row's first new token.
        rows: [B,S]: place of each new token.
        counts: [B]: tokens of each row.
        new, past, total, length: [1]: S, P, T and L.
        spare: whether L can be larger than T.
    """

    builder: Builder
    plain: bool
    at: ir.Value
    rows: ir.Value
    counts: ir.Value
    new: ir.Value
    past: ir.Value
    total: ir.Value
    length: ir.Value
    spare: bool

    @classmethod
    def of(cls, facts: Facts, builder: Builder, node: ir.Node) -> Places | None:
        """The places of a GroupQueryAttention; None where a size cannot be computed."""
        op, ints, shapes = builder.op, builder.ints, facts.shapes
        q, cache = shapes.of(node.inputs[0]), shapes.of(optional(node, 3))
        held: Dim = 0 if cache is None else cache[2]
        if q is None or (optional(node, 3) is not None and cache is None):
            return None
        batch, new, past = (builder.sizes([size]) for size in (q[0], q[1], held))
        if batch is None or new is None or past is None:
            return None
        content = shapes.content(given(node, 6))
        known = None if content is None or content.size != 1 else content.flat[0]
        total = None if known is None else builder.sizes([known])
        length = None if known is None else builder.sizes([maximum(held, known)])
        if total is None:
            total = op("Reshape", [op("Cast", [given(node, 6)], _INT64), ints(1)])
        if length is None:
            length = op("Max", [past, total])
        fits = known is not None and shapes.same(known, held + q[1])
        everywhere = _same_everywhere(shapes, given(node, 5))
        plain = cache is None or (
            fits and everywhere is not None and shapes.same(everywhere + 1, held + q[1])
        )
        counts = op("Add", [op("Cast", [given(node, 5)], _INT64), ints(1)])
        counts = op("Reshape", [counts, ints(-1)])
        if plain:
            at = op("Expand", [past, batch])
        else:
            at = op("Max", [op("Sub", [counts, new]), ints(0)])
        rows = op("Add", [op("Unsqueeze", [at, ints(1)]), steps(builder, new)])
        spare = not (plain or fits)
        return cls(builder, plain, at, rows, counts, new, past, total, length, spare)

    def positions(self, position_ids: ir.Value | None) -> ir.Value:
        """[B,S]: rotary positions. Of a prompt's position_ids only the first number is read."""
        if position_ids is None:
            return self.rows
        op, ints = self.builder.op, self.builder.ints
        first = op("Slice", [position_ids, ints(0, 0), ints(1, 1), ints(0, 1)])
        counted = op("Add", [first, steps(self.builder, self.new)])
        prompt = op("Equal", [self.new, self.total])
        return op("Where", [prompt, counted, position_ids])

    def written(self, cache: ir.Value, new: ir.Value, sizes: tuple[ir.Value, ir.Value]) -> ir.Value:
        """[B,K,L,D]: a cache with the new keys or values at their places.

        Args:
            sizes: int64 vectors of B and K, and of D.
        """
        op = self.builder.op
        free = op("Sub", [self.length, self.past])
        shape = op("Concat", [sizes[0], free, sizes[1]], {"axis": 0})
        dtype = cache.dtype or ir.DataType.FLOAT
        zero = ir.tensor(np.zeros(1, dtype=dtype.numpy()))
        zeros = op("ConstantOfShape", [shape], {"value": zero})
        longer = op("Concat", [cache, zeros], {"axis": 2})
        return op("TensorScatter", [longer, new, self.at])

    def mask(
        self, causal: bool, window: int, bias: ir.Value | None, *, explicit: bool = False
    ) -> ir.Value | None:
        """The keys that each query sees: bool [B,1,S,L], or bias [.., S, L] with -inf elsewhere.

        None where the operator's own is_causal, or nothing, says the same.

        Args:
            explicit: whether is_causal cannot be said.
        """
        op, ints = self.builder.op, self.builder.ints
        said = not causal or (bias is None and not explicit)
        if self.plain and window < 0 and said:
            return bias
        keys = steps(self.builder, self.length)
        if causal:
            rows = op("Unsqueeze", [self.rows, ints(1, 3)])
            seen = op("LessOrEqual", [keys, rows])
            if window > 0:
                recent = op("Greater", [keys, op("Sub", [rows, ints(window)])])
                seen = op("And", [seen, recent])
        else:
            seen = op("Less", [keys, op("Unsqueeze", [self.counts, ints(1, 2, 3)])])
            one = ints(1)
            full = op("Concat", [one, one, self.new, one], {"axis": 0})
            seen = op("Expand", [seen, full])
        if bias is None:
            return seen
        dtype = bias.dtype or ir.DataType.FLOAT
        if self.spare:
            behind = op("Sub", [self.length, self.total])
            pads = op("Concat", [ints(0, 0, 0, 0, 0, 0, 0), behind], {"axis": 0})
            bias = op("Pad", [bias, pads])
        return op("Where", [seen, bias, number_like(self.builder, -np.inf, dtype)])


def _same_everywhere(shapes: Shapes, value: ir.Value | None) -> Dim | None:
    """The size that every element of a tensor is; None where they may differ."""
    for _ in range(16):
        content = shapes.content(value)
        if content is not None and content.size:
            first: Dim = content.flat[0]
            return first if all(shapes.same(first, each) for each in content.flat) else None
        node = producer(value, *_VIEWS)
        if node is None:
            return None
        value = node.inputs[0]
    return None
