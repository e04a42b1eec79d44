"""onnxgen::PagedAttention: attention over keys and values that lie in pools of blocks.

    PagedAttention(query, key?, value?, key_cache, value_cache, places?, slots, mask, spread,
                   collect, sinks?) -> output, key_cache_out?, value_cache_out?

    key_cache_out = key_cache with each token's key at its place; value_cache_out alike
    output = Attention(query, key_cache_out[slots], value_cache_out[slots], mask) of each sequence

    PagedCache(rows, cache, places, slots) -> context, cache_out

    cache_out = cache with each token's row at its place; context = cache_out[slots]: rows [N, K*D]
    to context [B, L, K*D], of a layer that computes its keys and values from what it keeps

The slots, the mask, the places and how tokens are spread over a batch come from
`functions.paged_plan`, once for all layers. Past and present bound to one buffer are written in
place: nothing of the pools is copied.

Inputs (N tokens, H query heads, K key heads, D and Dv sizes of a key and a value; NB blocks of BS)
    query [N, H*D], key [N, K*D], value [N, K*Dv]: one float type.
    key_cache [NB, BS, K, D], value_cache [NB, BS, K, Dv]: that type or a narrower one.
    places int64 [N, 2], slots int64 [B, L], mask [B, 1 or H, S, L], spread int64 [B, S], collect
    int64 [N]. sinks [H].

Attributes
    num_heads, kv_num_heads, scale, and softcap in overloads with a cap.

Overloads name what is given, joined by "_": "shared" for a layer that reads another's pools and
writes nothing (no key, value, places, no pools out), "gathered" where key [B, L, K*D] and value
[B, L, K*Dv] are what is attended, and there are no pools, places nor slots, "mapped" where a place may be -1 (not
written), "cast" where the pools' type differs, "bias" for a mask that is added, "cap" for softcap,
"sinks", "float" for a Softmax in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder

from onnxgen.functions.making import ints, made
from onnxgen.functions.sink_attention import sunk

NAME, CACHE = "PagedAttention", "PagedCache"
# Places of the inputs.
QUERY, KEY, VALUE, KEY_CACHE, VALUE_CACHE, PLACES, SLOTS, MASK, SPREAD, COLLECT, SINKS = range(11)
_PARTS = ("shared", "gathered", "mapped", "cast", "bias", "cap", "sinks", "float")


def overload_of(**given: bool) -> str:
    """The overload for what is given, by the words of the module's text."""
    return "_".join(part for part in _PARTS if given.get(part))


def build(overload: str, opset: int) -> ir.Function:
    """One overload.

    Raises:
        KeyError: there is none of this name.
    """
    parts = overload.split("_") if overload else []
    if (
        parts != [part for part in _PARTS if part in parts]
        or len({"shared", "gathered", "mapped"} & set(parts)) > 1
    ):
        raise KeyError(overload)
    gathered = "gathered" in parts
    own = "shared" not in parts and not gathered

    def body(op: OpBuilder, *given: ir.Value) -> list[ir.Value]:
        query, key, value, keys, values, places, slots, mask, spread, collect, sinks = given
        if own:
            keys = _written(op, keys, key, places, "mapped" in parts)
            values = _written(op, values, value, places, "mapped" in parts)
        q = op.Gather(query, spread, axis=0)  # [B, S, H*D]
        k = key if gathered else _read(op, keys, slots)  # [B, L, K*D]
        v = value if gathered else _read(op, values, slots)
        if "cast" in parts:
            k, v = op.CastLike(k, q), op.CastLike(v, q)
        attend: Callable[..., ir.Value] = _sunk if "sinks" in parts else _plain
        y = attend(op, q, k, v, mask, sinks, parts)
        output = op.Gather(
            op.Reshape(y, op.Concat(ints(op, -1), op.Shape(y, start=2), axis=0)), collect, axis=0
        )
        return [output, keys, values] if own else [output]

    inputs = {
        "query": True,
        "key": own or gathered,
        "value": own or gathered,
        "key_cache": not gathered,
        "value_cache": not gathered,
        "places": own,
        "slots": not gathered,
        "mask": True,
        "spread": True,
        "collect": True,
        "sinks": "sinks" in parts,
    }
    attributes = [
        ir.Attr("num_heads", ir.AttributeType.INT, None),
        ir.Attr("kv_num_heads", ir.AttributeType.INT, None),
        ir.Attr("scale", ir.AttributeType.FLOAT, None),
    ]
    if "cap" in parts:
        attributes.append(ir.Attr("softcap", ir.AttributeType.FLOAT, None))
    outputs = ("output", "key_cache_out", "value_cache_out") if own else ("output",)
    return made(NAME, overload, opset, inputs, outputs, attributes, body)


def build_cache(overload: str, opset: int) -> ir.Function:
    """One overload of PagedCache: "", "mapped", "cast" or both.

    Raises:
        KeyError: there is none of this name.
    """
    parts = overload.split("_") if overload else []
    if parts != [part for part in ("mapped", "cast") if part in parts]:
        raise KeyError(overload)

    def body(
        op: OpBuilder, rows: ir.Value, cache: ir.Value, places: ir.Value, slots: ir.Value
    ) -> list[ir.Value]:
        written = _written(op, cache, rows, places, "mapped" in parts)
        context = _read(op, written, slots)
        return [op.CastLike(context, rows) if "cast" in parts else context, written]

    inputs = dict.fromkeys(("rows", "cache", "places", "slots"), True)
    return made(CACHE, overload, opset, inputs, ("context", "cache_out"), [], body)


def _read(op: OpBuilder, pool: ir.Value, slots: ir.Value) -> ir.Value:
    """The rows [B, L, K*D] of a pool [NB, BS, K, D] at slots [B, L]."""
    return op.Gather(op.Flatten(pool, axis=2), slots, axis=0)


def _written(
    op: OpBuilder, pool: ir.Value, rows: ir.Value, places: ir.Value, mapped: bool
) -> ir.Value:
    """A pool [NB, BS, K, D] with rows [N, K*D] at their places."""
    heads = op.Concat(ints(op, -1), op.Shape(pool, start=2), axis=0)
    rows = op.CastLike(op.Reshape(rows, heads), pool)
    if mapped:
        # ScatterND skips nothing, and -1 is its last block. A row that is not to be written
        # repeats the first that is; where none is, the first slot gets what it holds.
        wanted = op.GreaterOrEqual(
            op.Slice(places, ints(op, 0), ints(op, 1), ints(op, 1)), ints(op, 0)
        )
        first = op.ArgMax(op.Cast(wanted, to=ir.DataType.INT32.value), axis=0, keepdims=0)  # [1]
        place = op.Max(op.Gather(places, first, axis=0), ints(op, 0))  # [1, 2]
        old = op.GatherND(pool, place)  # [1, K, D]
        row = op.Where(
            op.Unsqueeze(op.Gather(wanted, first, axis=0), ints(op, 2)),
            op.Gather(rows, first, axis=0),
            old,
        )
        rows = op.Where(op.Unsqueeze(wanted, ints(op, 2)), rows, row)
        places = op.Where(wanted, places, place)
    return op.ScatterND(pool, places, rows)


def _plain(
    op: OpBuilder,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    mask: ir.Value,
    sinks: ir.Value | None,
    parts: list[str],
) -> ir.Value:
    """[B, S, H*Dv] of the standard operator."""
    attributes: dict[str, Any] = {
        "q_num_heads": _reference("q_num_heads", "num_heads"),
        "kv_num_heads": _reference("kv_num_heads", "kv_num_heads"),
        "scale": ir.RefAttr("scale", "scale", ir.AttributeType.FLOAT),
    }
    if "cap" in parts:
        attributes["softcap"] = ir.RefAttr("softcap", "softcap", ir.AttributeType.FLOAT)
    if "float" in parts:
        attributes["softmax_precision"] = ir.DataType.FLOAT.value
    return op.Attention(q, k, v, mask, **attributes)


def _sunk(
    op: OpBuilder,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    mask: ir.Value,
    sinks: ir.Value,
    parts: list[str],
) -> ir.Value:
    """[B, S, H*Dv] with sinks."""

    def heads(rows: ir.Value, number: str) -> ir.Value:
        """[B, R, heads * D] as [B, heads, R, D]."""
        count = op.Constant(value_int=ir.RefAttr("value_int", number, ir.AttributeType.INT))
        shape = op.Concat(ints(op, 0, 0), op.Unsqueeze(count, ints(op, 0)), ints(op, -1), axis=0)
        return op.Transpose(op.Reshape(rows, shape), perm=[0, 2, 1, 3])

    kind = "bias" if "bias" in parts else "bool"
    found = sunk(
        op,
        heads(q, "num_heads"),
        heads(k, "kv_num_heads"),
        heads(v, "kv_num_heads"),
        mask,
        sinks,
        [kind, *parts],
    )
    rows = op.Transpose(found, perm=[0, 2, 1, 3])
    return op.Reshape(rows, ints(op, 0, 0, -1))


def _reference(name: str, of: str) -> ir.Attr:
    return ir.RefAttr(name, of, ir.AttributeType.INT)
