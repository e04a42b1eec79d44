"""The mask of ONNX Runtime's multi-head attentions, as one that the standard's takes.

A key mask says which keys may be seen; the others' scores are lowered by mask_filter_value, a
finite number (-10000 unless given), so that a row whose keys are all masked is not undefined.
unidirectional gives the keys behind a query the lowest number there is, in place of that. Then
attention_bias is added. The same numbers in the same order: rows that are masked everywhere, as
those of padded tokens, are what they were.

Shapes: B batch, S new tokens, P past, T total, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.symbols import Dim
from onnxgen.patterns.building import Builder
from onnxgen.patterns.contrib_parts import number_like, steps

LOWERED = -10000.0
"""mask_filter_value where it is not given."""


@dataclass(frozen=True)
class Lengths:
    """Sizes of an attention: B, S, P and T."""

    batch: Dim
    new: Dim
    past: Dim
    total: Dim


def joined_mask(
    facts: Facts,
    builder: Builder,
    lengths: Lengths,
    key_mask: ir.Value | None,
    bias: ir.Value | None,
    *,
    causal: bool,
    lowered: float,
    dtype: ir.DataType,
) -> tuple[ir.Value | None, bool] | str:
    """The mask, float [.., S, T], and whether is_causal says the rest; else why there is none.

    Args:
        key_mask: int [B,T], [B,S,T], or of one axis: ends [B], ends and starts [2B], or ends and
            what only packed attention reads [3B+2].
        bias: float [B or 1, H or 1, S, T].
        lowered: mask_filter_value.
    """
    if key_mask is None and (bias is None or not causal):
        return bias, causal
    op = builder.op
    lowest = float(dtype.min)
    zero, low, least = (number_like(builder, number, dtype) for number in (0, lowered, lowest))
    mask = zero
    if key_mask is not None:
        seen = _seen(facts, builder, lengths, key_mask)
        if isinstance(seen, str):
            return seen
        mask = op("Where", [seen, zero, low])
    if causal:
        sizes = [builder.sizes([size]) for size in (lengths.new, lengths.past, lengths.total)]
        new, past, total = sizes
        if new is None or past is None or total is None:
            return "the lengths cannot be computed"
        rows = op("Unsqueeze", [op("Add", [steps(builder, new), past]), builder.ints(1)])
        reached = op("LessOrEqual", [steps(builder, total), rows])
        mask = op("Where", [reached, mask, least])
    if bias is not None:
        mask = op("Add", [mask, bias])
    shape = facts.shapes.of(mask)
    if shape is None or not facts.shapes.same(shape[-2], lengths.new):
        one = builder.ints(1)
        rows_size = builder.sizes([lengths.new])
        if rows_size is None:
            return "the number of new tokens cannot be computed"
        target = op("Concat", [one, one, rows_size, one], {"axis": 0})
        mask = op("Expand", [mask, target])
    return mask, False


def _seen(facts: Facts, builder: Builder, lengths: Lengths, key_mask: ir.Value) -> ir.Value | str:
    """bool [B,1,S or 1,T]: the keys that a key mask lets be seen."""
    op, ints, shapes = builder.op, builder.ints, facts.shapes
    shape = shapes.of(key_mask)
    if shape is None or len(shape) not in (1, 2, 3):
        return "the key mask's shape is not known, or it has four axes"
    if len(shape) > 1:
        if not shapes.same(shape[-1], lengths.total):
            return "the key mask is not as long as the keys"
        zero = builder.constant(np.array(0, dtype=(key_mask.dtype or ir.DataType.INT32).numpy()))
        return op("Unsqueeze", [op("Greater", [key_mask, zero]), ints(*(1, 2)[: 4 - len(shape)])])
    length = builder.sizes([lengths.total])
    batch = builder.sizes([lengths.batch])
    if length is None or batch is None:
        return "the lengths cannot be computed"
    counts = op("Cast", [key_mask], {"to": int(ir.DataType.INT64)})
    keys, axes = steps(builder, length), ints(1, 2, 3)
    if shapes.same(shape[0], lengths.batch):
        return op("Less", [keys, op("Unsqueeze", [counts, axes])])
    ends = op("Slice", [counts, ints(0), batch])
    seen = op("Less", [keys, op("Unsqueeze", [ends, axes])])
    if shapes.same(shape[0], 3 * lengths.batch + 2):
        return seen
    if shapes.same(shape[0], 2 * lengths.batch):
        starts = op("Slice", [counts, batch, op("Add", [batch, batch])])
        reached = op("GreaterOrEqual", [keys, op("Unsqueeze", [starts, axes])])
        return op("And", [seen, reached])
    return "it is not known whether the key mask holds ends, or ends and starts"
