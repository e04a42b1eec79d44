"""onnxgen::PagedTokens and onnxgen::PagedKeys: which slots a run's tokens are written to and read from.

The sequences of a run stand behind one another in one row of N tokens, without padding. Their keys
and values lie in pools of blocks; a table names the blocks of each sequence in order. What follows
from these lengths alone is worked out once for all layers:

    PagedTokens(cumulative, past, block_table, tokens, slot_mapping?)
        -> positions [N], totals [N], places [N, 2], spread [B, S], collect [N]

        row = how many sequences end at or before a token        [N]
        positions = past[row] + token - cumulative[row]
        totals = past and new tokens of row
        places = (block, offset) of each token's key             block_table[row, positions // BS]
        spread = the token at each place of a padded batch       any token where there is none
        collect = where each token stands in that batch

    PagedKeys(cumulative, past, block_table, slopes?) -> slots [B, L], mask [B, 1 or H, S, L]

        slots = the slot of each key that any new token of a sequence sees; behind them its last
                one again, which is finite (free slots may hold NaN) and masked
        mask = bool: which of them each new token sees; with slopes (ALiBi) what is added to the
               scores instead, slope * (key's position - query's), -inf where it is not seen

Inputs
    cumulative int32 [B + 1]: where each sequence's new tokens begin, and N.
    past int32 [B]: how many tokens of each sequence are in the pools already.
    block_table int32 [B, M]: -1 where a sequence has no block.
    tokens [N, ..]: whose length is N. slot_mapping int32 [N]: block * BS + offset of each token,
    -1 for one that is not written. slopes [H] of the scores' type.
    B sequences, S the most new tokens of one, L the most keys of one, BS the size of a block.

Attributes
    block_size; of PagedKeys in overloads "window": window, how many keys a token sees, itself
    counted; "chunk": chunk, the size of the chunks whose keys are seen by their own tokens.

Both fail, and nothing is written, where a token has no block or cumulative does not end with N.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder

from onnxgen.functions.making import ints, made

TOKENS, KEYS = "PagedTokens", "PagedKeys"
NO_BLOCK = "block_table names no block for a token"
NOT_ALL = "cumulative_sequence_lengths does not end with the number of tokens"
INT64, BOOL = ir.DataType.INT64.value, ir.DataType.BOOL.value


def build_tokens(overload: str, opset: int) -> ir.Function:
    """One overload of PagedTokens: "" or "mapped".

    Raises:
        KeyError: there is none of this name.
    """
    if overload not in ("", "mapped"):
        raise KeyError(overload)

    def body(
        op: OpBuilder,
        cumulative: ir.Value,
        past: ir.Value,
        table: ir.Value,
        tokens: ir.Value,
        mapping: ir.Value | None,
    ) -> list[ir.Value]:
        size = _attribute(op, "block_size")
        starts, ends = _edges(op, cumulative)
        count = op.Shape(tokens, start=0, end=1)
        number = _range(op, count)
        missing = op.Min(
            op.Abs(op.Sub(op.Slice(ends, ints(op, -1), ints(op, 1 << 30)), count)), ints(op, 1)
        )
        number = op.Add(number, op.Gather(ints(op, 0), missing, axis=0))
        before = op.GreaterOrEqual(_column(op, number), op.Unsqueeze(ends, ints(op, 0)))
        row = op.ReduceSum(op.Cast(before, to=INT64), ints(op, 1), keepdims=0)
        offset = op.Sub(number, op.Gather(starts, row, axis=0))
        kept = op.Cast(past, to=INT64)
        positions = op.Add(op.Gather(kept, row, axis=0), offset)
        totals = op.Gather(op.Add(kept, op.Sub(ends, starts)), row, axis=0)
        if mapping is None:
            at = op.Concat(_column(op, row), _column(op, op.Div(positions, size)), axis=1)
            block = op.GatherND(op.Cast(table, to=INT64), at)
            gone = op.Min(op.Neg(op.Min(op.ReduceMin(block, keepdims=1), ints(op, 0))), ints(op, 1))
            block = op.Add(block, op.Gather(ints(op, 0), gone, axis=0))
            within = op.Mod(positions, size)
        else:
            slot = op.Cast(mapping, to=INT64)
            block, within = op.Div(slot, size), op.Mod(slot, size)
            # -1 stays one: PagedAttention writes such a row nowhere.
            block = op.Where(op.Less(slot, ints(op, 0)), ints(op, -1), block)
        places = op.Concat(_column(op, block), _column(op, within), axis=1)
        most = op.ReduceMax(op.Sub(ends, starts), keepdims=1)
        wide = op.Add(_column(op, starts), op.Unsqueeze(_range(op, most), ints(op, 0)))
        spread = op.Min(wide, op.Sub(count, ints(op, 1)))
        collect = op.Add(op.Mul(row, most), offset)
        return [positions, totals, places, spread, collect]

    inputs = {
        "cumulative": True,
        "past": True,
        "block_table": True,
        "tokens": True,
        "slot_mapping": overload == "mapped",
    }
    attributes = [ir.Attr("block_size", ir.AttributeType.INT, None)]
    outputs = ("positions", "totals", "places", "spread", "collect")
    return made(TOKENS, overload, opset, inputs, outputs, attributes, body)


def build_keys(overload: str, opset: int) -> ir.Function:
    """One overload of PagedKeys: "", "window" or "chunk", with "_slopes" or without.

    Raises:
        KeyError: there is none of this name.
    """
    parts = overload.split("_") if overload else []
    if parts not in (
        [],
        ["window"],
        ["chunk"],
        ["slopes"],
        ["window", "slopes"],
        ["chunk", "slopes"],
    ):
        raise KeyError(overload)

    def body(
        op: OpBuilder,
        cumulative: ir.Value,
        past: ir.Value,
        table: ir.Value,
        slopes: ir.Value | None,
    ) -> list[ir.Value]:
        size = _attribute(op, "block_size")
        starts, ends = _edges(op, cumulative)
        new, kept = op.Sub(ends, starts), op.Cast(past, to=INT64)
        total = op.Add(kept, new)
        zero, one = ints(op, 0), ints(op, 1)
        first = op.Mul(kept, zero)
        if "window" in parts:
            width = _attribute(op, "window")
            first = op.Max(op.Sub(kept, op.Sub(width, one)), zero)
        if "chunk" in parts:
            chunk = _attribute(op, "chunk")
            first = op.Mul(op.Div(kept, chunk), chunk)
        most = op.ReduceMax(op.Sub(total, first), keepdims=1)
        keys = op.Add(_column(op, first), op.Unsqueeze(_range(op, most), zero))  # [B, L]
        last = op.Max(op.Sub(total, one), zero)
        held = op.Min(keys, _column(op, last))
        block = op.GatherElements(op.Cast(table, to=INT64), op.Div(held, size), axis=1)
        # A sequence of no tokens at all may have no block; nothing that it reads is seen.
        block = op.Where(_column(op, op.Greater(total, zero)), block, zero)
        gone = op.Min(op.Neg(op.Min(op.ReduceMin(block, keepdims=0), zero)), one)
        slots = op.Add(
            op.Mul(block, size), op.Add(op.Mod(held, size), op.Gather(zero, gone, axis=0))
        )
        queries = op.Add(
            _column(op, kept), op.Unsqueeze(_range(op, op.ReduceMax(new, keepdims=1)), zero)
        )
        key = op.Unsqueeze(keys, ints(op, 1, 2))  # [B, 1, 1, L]
        query = op.Unsqueeze(queries, ints(op, 1, 3))  # [B, 1, S, 1]
        mask = op.LessOrEqual(key, query)
        if "window" in parts:
            mask = op.And(mask, op.Greater(key, op.Sub(query, width)))
        if "chunk" in parts:
            mask = op.And(mask, op.Equal(op.Div(key, chunk), op.Div(query, chunk)))
        if slopes is not None:
            away = op.CastLike(op.Sub(key, query), slopes)
            added = op.Mul(away, op.Unsqueeze(slopes, ints(op, 0, 2, 3)))
            mask = op.Where(
                mask, added, op.CastLike(op.Constant(value_float=float("-inf")), slopes)
            )
        return [slots, mask]

    inputs = {"cumulative": True, "past": True, "block_table": True, "slopes": "slopes" in parts}
    attributes = [
        ir.Attr(name, ir.AttributeType.INT, None)
        for name in ("block_size", "window", "chunk")
        if name == "block_size" or name in parts
    ]
    return made(KEYS, overload, opset, inputs, ("slots", "mask"), attributes, body)


def _edges(op: OpBuilder, cumulative: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Where the new tokens of each sequence begin and end, int64 [B]."""
    wide = op.Cast(cumulative, to=INT64)
    starts = op.Slice(wide, ints(op, 0), ints(op, -1))
    return starts, op.Slice(wide, ints(op, 1), ints(op, 1 << 30))


def _range(op: OpBuilder, count: ir.Value) -> ir.Value:
    """0, 1, .. up to a number that is a vector of one element."""
    scalar = op.Squeeze(count, ints(op, 0))
    return op.Range(op.Constant(value_int=0), scalar, op.Constant(value_int=1))


def _column(op: OpBuilder, vector: ir.Value) -> ir.Value:
    """[N] as [N, 1]."""
    return op.Unsqueeze(vector, ints(op, 1))


def _attribute(op: OpBuilder, name: str) -> ir.Value:
    """An integer attribute of the function as an int64 scalar."""
    return op.Constant(value_int=ir.RefAttr("value_int", name, ir.AttributeType.INT))
