"""MSA003: com.microsoft Attention, with its projections inside, as the standard says it.

Replaces
    Attention(x, weights, bias?, mask_index?, past?, attention_bias?)
    -> MatMul, Add, Split, Attention-23(q, k, v, mask, past_key, past_value) -> y, presents

    The weights of queries, keys and values stand side by side, and so they stay. A past and a
    present [2, B, H, T, D] are taken apart and put together. Masks become one (`contrib_mask`).

Looks for
    1. the operator, of the forms that ONNX Runtime runs on CPU
    2. weights of queries, keys and values with heads of known sizes
    3. a past of a known shape, and a mask of a known form

Declines
    shared-buffer: the cache is written in place.
        Expected: past and present as tensors of their own.
        Change: convert the model without past_present_share_buffer.
    rotary: it rotates queries and keys itself: no CPU kernel.
        Expected: rotary embeddings outside.
        Change: optimise the model without fusing the rotary embedding.
    layout: sizes of heads or the mask's form are not known, or the mask has four axes.
        Expected: fixed head sizes, a mask [B], [B, T] or [B, S, T].
        Change: give the inputs static head sizes.

Numerics
    The same sums in another order: about 1e-6.

Seen in
    onnxruntime.transformers and optimum O1 and up (bert, gpt2).

Example
    opset 20
    <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g
    (int64[b,s] ids)
    => (float[b,s,120] y)
    <float[37,50] table, float[50,360] w, float[360] wb>
    {
      x = Gather(table, ids)
      y = com.microsoft.Attention<num_heads = 6>(x, w, wb)
    }
    becomes
        ...
        matmul = MatMul(x, w)
        add = Add(matmul, wb)
        split, split_1, split_2 = Split<axis = -1>(add, [120, 120, 120])
        reshape = Reshape(split, [ 0,  0,  6, 20])
        transpose = Transpose<perm = (0, 2, 1, 3)>(reshape)
        reshape_2 = Reshape(split_1, [ 0,  0,  6, 20])
        transpose_2 = Transpose<perm = (0, 2, 1, 3)>(reshape_2)
        reshape_3 = Reshape(split_2, [ 0,  0,  6, 20])
        transpose_3 = Transpose<perm = (0, 2, 1, 3)>(reshape_3)
        attention = Attention<scale = 0.223607>(transpose, transpose_2, transpose_3)
        transpose_4 = Transpose<perm = (0, 2, 1, 3)>(attention)
        y = Reshape(transpose_4, [  0,   0, 120])
"""

from __future__ import annotations

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import CONTRIB, attribute, given, optional
from onnxgen.analysis.symbols import divide
from onnxgen.patterns.building import Builder
from onnxgen.patterns.contrib_mask import LOWERED, Lengths, joined_mask
from onnxgen.patterns.contrib_parts import attended, scalar, split_heads, split_last
from onnxgen.patterns.rule import Declined, Rewrite, Rule


class PackedAttention(Rule):
    """Anchored at the operator."""

    code = "MSA003"
    kind = "attention"
    anchors = frozenset({"Attention"})

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        if node.domain != CONTRIB:
            return None
        if attribute(node, "past_present_share_buffer", 0) or optional(node, 6) is not None:
            raise Declined(self, "shared-buffer", "the cache is written in place", node)
        if attribute(node, "do_rotary", 0):
            raise Declined(self, "rotary", "it rotates queries and keys itself", node)
        builder.passed(1)
        heads = int(attribute(node, "num_heads"))
        sizes = self._sizes(facts, node, heads)
        qkv = builder.op("MatMul", [given(node), given(node, 1)])
        bias = optional(node, 2)
        if bias is not None:
            qkv = builder.op("Add", [qkv, bias])
        parts = split_last(builder, qkv, sizes)
        q, k, v = (split_heads(facts, builder, part, heads) for part in parts)
        shape = None if q is None else facts.shapes.of(q)
        past, past_shape = optional(node, 4), facts.shapes.of(optional(node, 4))
        if q is None or k is None or v is None or shape is None or q.dtype is None:
            raise Declined(self, "layout", "the size of the heads is not known", node)
        builder.passed(2)
        if past is not None and (past_shape is None or len(past_shape) != 5):
            raise Declined(self, "layout", "the shape of the past is not known", node)
        held = 0 if past_shape is None else past_shape[3]
        joined = joined_mask(
            facts,
            builder,
            Lengths(shape[0], shape[2], held, held + shape[2]),
            optional(node, 3),
            optional(node, 5),
            causal=bool(attribute(node, "unidirectional", 0)),
            lowered=attribute(node, "mask_filter_value", LOWERED),
            dtype=q.dtype,
        )
        if isinstance(joined, str):
            raise Declined(self, "layout", joined, node)
        pasts: tuple[ir.Value | None, ir.Value | None] = (None, None)
        if past is not None:
            key, value = (
                builder.op("Gather", [past, scalar(builder, index)], {"axis": 0})
                for index in (0, 1)
            )
            pasts = key, value
        scale = attribute(node, "scale", 0.0)
        made = attended(facts, builder, q, k, v, joined, pasts, scale)
        outputs = [(node.outputs[0], made.y)]
        if len(node.outputs) > 1:
            both = [
                builder.op("Unsqueeze", [each, builder.ints(0)])
                for each in (made.present_key, made.present_value)
            ]
            outputs.append((node.outputs[1], builder.op("Concat", both, {"axis": 0})))
        return Rewrite(made.node, tuple(outputs), made.details, joined[0])

    def _sizes(self, facts: Facts, node: ir.Node, heads: int) -> list[int]:
        """Columns of the weights that make queries, keys and values."""
        found = attribute(node, "qkv_hidden_sizes")
        shape = facts.shapes.of(given(node, 1))
        third = None if shape is None or len(shape) != 2 else divide(shape[1], 3)
        sizes = [int(size) for size in found] if found else [third] * 3
        known = [size for size in sizes if isinstance(size, int) and size % heads == 0]
        if len(known) != 3:
            raise Declined(self, "layout", "the size of the heads is not known", node)
        return known
