"""MSA002: com.microsoft MultiHeadAttention, as the standard says it.

Replaces
    MultiHeadAttention(q, k, v, bias?, key_padding_mask?, attention_bias?, past_key?, past_value?)
    -> Attention-23(q, k, v, mask, past_key, past_value) -> y, presents

    Queries, keys and values come as [B, S, H*D], keys and values of another sequence also as
    [B, H, L, D]. The bias of all three is added to each. Masks become one (`contrib_mask`).

Looks for
    1. the operator, of the forms that ONNX Runtime runs on CPU
    2. queries, keys and values with heads of known sizes
    3. lengths, and a mask of a known form

Declines
    packed: queries, keys and values are packed along an axis of their own: no CPU kernel.
        Expected: three inputs [B, S, H * D], or heads already split.
        Change: optimise the model for CPU, or without packing.
    shared-buffer: the cache is written in place, or read through an indirection.
        Expected: past and present as tensors of their own.
        Change: convert the model without past_present_share_buffer and without beam search inside.
    unsupported: scores are an output, there is one past without the other, or a bias on keys that
        are split.
        Expected: the operator without these.
        Change: none: the standard has no such attention.
    layout: sizes of heads or the mask's form are not known.
        Expected: fixed head sizes, a mask [B], [B, T] or [B, 1, S, T].
        Change: give the inputs static head sizes.

Numerics
    The same sums in another order: about 1e-6.

Seen in
    onnxruntime.transformers (vit, clip, whisper, stable diffusion), optimum O2 and up.

Example
    opset 20
    <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g
    (int64[b,s] ids, float[b,6,e,20] k2, float[b,6,e,20] v2)
    => (float[b,s,120] y)
    <float[37,50] table, float[50,120] wq>
    {
      x = Gather(table, ids)
      q = MatMul(x, wq)
      y = com.microsoft.MultiHeadAttention<num_heads = 6>(q, k2, v2)
    }
    becomes
        ...
        reshape = Reshape(q, [ 0,  0,  6, 20])
        transpose = Transpose<perm = (0, 2, 1, 3)>(reshape)
        attention = Attention<scale = 0.223607>(transpose, k2, v2)
        transpose_2 = Transpose<perm = (0, 2, 1, 3)>(attention)
        y = Reshape(transpose_2, [  0,   0, 120])
"""

from __future__ import annotations

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute, given, optional
from onnxgen.patterns.building import Builder
from onnxgen.patterns.contrib_mask import LOWERED, Lengths, joined_mask
from onnxgen.patterns.contrib_parts import attended, split_heads, split_last
from onnxgen.patterns.rule import Declined, Rewrite, Rule


class MultiHeadAttention(Rule):
    """Anchored at the operator."""

    code = "MSA002"
    kind = "attention"
    anchors = frozenset({"MultiHeadAttention"})

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        self._check(facts, node)
        builder.passed(1)
        heads = int(attribute(node, "num_heads"))
        values = self._biased(facts, builder, node)
        parts = [split_heads(facts, builder, value, heads) for value in values]
        q, k, v = parts
        if q is None or k is None or v is None:
            raise Declined(self, "layout", "the size of the heads is not known", node)
        builder.passed(2)
        shapes = facts.shapes
        q_shape, k_shape = shapes.of(q), shapes.of(k)
        past_key, past_value = optional(node, 6), optional(node, 7)
        past = (0, 0, 0, 0) if past_key is None else shapes.of(past_key)
        if q_shape is None or k_shape is None or past is None or q.dtype is None:
            raise Declined(self, "layout", "the lengths are not known", node)
        lengths = Lengths(q_shape[0], q_shape[2], past[2], past[2] + k_shape[2])
        joined = joined_mask(
            facts,
            builder,
            lengths,
            optional(node, 4),
            optional(node, 5),
            causal=bool(attribute(node, "unidirectional", 0)),
            lowered=attribute(node, "mask_filter_value", LOWERED),
            dtype=q.dtype,
        )
        if isinstance(joined, str):
            raise Declined(self, "layout", joined, node)
        made = attended(
            facts, builder, q, k, v, joined, (past_key, past_value), attribute(node, "scale", 0.0)
        )
        outputs = zip(node.outputs, (made.y, made.present_key, made.present_value), strict=False)
        return Rewrite(made.node, tuple(outputs), made.details, joined[0])

    def _check(self, facts: Facts, node: ir.Node) -> None:
        """Raises: Declined, where the operator is asked for what is not raised."""
        ranks = [facts.shapes.rank(optional(node, index)) for index in range(3)]
        if 5 in ranks or optional(node, 1) is None or optional(node, 2) is None:
            raise Declined(self, "packed", "queries, keys and values are packed", node)
        if optional(node, 8) is not None or optional(node, 9) is not None:
            raise Declined(self, "shared-buffer", "the cache is written in place", node)
        if len(node.outputs) > 3:
            raise Declined(self, "unsupported", "its scores are an output", node)
        if (optional(node, 6) is None) != (optional(node, 7) is None):
            raise Declined(self, "unsupported", "it has one past only", node)
        if optional(node, 3) is not None and 4 in ranks:
            raise Declined(self, "unsupported", "a bias on keys that are split in heads", node)

    def _biased(self, facts: Facts, builder: Builder, node: ir.Node) -> list[ir.Value]:
        """Queries, keys and values with the bias added."""
        values = [given(node, index) for index in range(3)]
        bias = optional(node, 3)
        if bias is None:
            return values
        widths = [shape[-1] if (shape := facts.shapes.of(v)) else None for v in values]
        sizes = [width for width in widths if isinstance(width, int)]
        if len(sizes) != 3:
            raise Declined(self, "layout", "the size of the heads is not known", node)
        parts = split_last(builder, bias, sizes)
        return [builder.op("Add", [value, part]) for value, part in zip(values, parts, strict=True)]
