"""MSA001: com.microsoft GroupQueryAttention, as the standard says it.

Replaces
    GroupQueryAttention(q, k, v, past_key, past_value, seqlens_k, total_sequence_length,
                        cos_cache?, sin_cache?, position_ids?, attention_bias?)
    -> RotaryEmbedding-23(q, cos_cache, sin_cache, places), TensorScatter-24(past, k, places),
       Attention-24(q, keys, values, mask)

    The cache is lengthened to max(P, total_sequence_length) places, or has places to spare; new
    keys and values are written where each row's tokens end (`patterns.contrib_places`), and one
    mask for all layers says what a query sees: keys up to its own place, of a window W the last
    W. Where no row can differ from another, past_key and past_value of Attention do the same.
    Packed queries, keys and values are split.

Looks for
    1. the operator, of the forms that ONNX Runtime runs on CPU
    2. queries, keys and values with heads of known sizes
    3. lengths of the cache that can be computed

Declines
    quantized-cache: the cache is stored in fewer bits.
        Expected: a cache of float32, float16 or bfloat16.
        Change: build the model with a cache that is not quantised.
    window-cache: the cache has about the window's size (sliding_window_cache). How many positions
        it holds is the runtime's choice, in bounds, so that no graph can tell where they stand.
        Expected: a cache that holds every token.
        Change: build the model without the sliding window cache.
    unsupported: norms of queries and keys inside, scores as an output, ragged queries, a window of
        0, one past without the other.
        Expected: the operator without these.
        Change: none: the standard has no such attention.
    layout: sizes of heads, tables or caches are not known.
        Expected: fixed head sizes; tables and caches of a known rank.
        Change: give the inputs static head sizes.

Numerics
    The same sums in another order: about 1e-6. Rows of padding in a prompt, which the operator
    leaves undefined, become what their queries see. Places of the cache behind a row's tokens
    keep what was there, as in a shared buffer; without one the operator writes zeros there.

Seen in
    onnxruntime-genai's model builder 0.18; onnxruntime.transformers 1.32.

Example
    opset 20
    <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g
    (int64[b,s] ids, float[b,3,p,d] past_k, float[b,3,p,d] past_v, int64[b,t] attention_mask)
    => (float[b,s,96] y, float[b,3,u,d] present_k, float[b,3,u,d] present_v)
    <float[37,50] table, float[50,96] wq, float[50,48] wk, float[50,48] wv>
    {
      x = Gather(table, ids)
      q = MatMul(x, wq)
      k = MatMul(x, wk)
      v = MatMul(x, wv)
      n = ReduceSum<keepdims = 0>(attention_mask, [1])
      n1 = Sub(n, 1)
      count = Cast<to = 6>(n1)
      l = Shape(attention_mask)
      t64 = Gather(l, 1)
      total = Cast<to = 6>(t64)
      y, present_k, present_v = com.microsoft.GroupQueryAttention<num_heads = 6, kv_num_heads =
          3>(q, k, v, past_k, past_v, count, total)
    }
    becomes
        ...
        reshape = Reshape(q, [ 0,  0,  6, 16])
        transpose = Transpose<perm = (0, 2, 1, 3)>(reshape)
        reshape_2 = Reshape(k, [ 0,  0,  3, 16])
        transpose_2 = Transpose<perm = (0, 2, 1, 3)>(reshape_2)
        reshape_3 = Reshape(v, [ 0,  0,  3, 16])
        transpose_3 = Transpose<perm = (0, 2, 1, 3)>(reshape_3)
        ...
        concat_2 = Concat<axis = 2>(past_k, constantofshape)
        present_k = TensorScatter(concat_2, transpose_2, max)
        concat_4 = Concat<axis = 2>(past_v, constantofshape)
        present_v = TensorScatter(concat_4, transpose_3, max)
        attention = Attention<scale = 0.25>(transpose, present_k, present_v, lessorequal)
        transpose_4 = Transpose<perm = (0, 2, 1, 3)>(attention)
        y = Reshape(transpose_4, [ 0,  0, 96])
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute, given, optional
from onnxgen.patterns.attending import attended
from onnxgen.patterns.building import Builder
from onnxgen.patterns.contrib_parts import merged_heads, split_heads, split_last
from onnxgen.patterns.contrib_places import Places
from onnxgen.patterns.rule import Declined, Rewrite, Rule

_QUANTIZED = ("k_quant_type", "v_quant_type")


class GroupQueryAttention(Rule):
    """Anchored at the operator."""

    code = "MSA001"
    kind = "attention"
    anchors = frozenset({"GroupQueryAttention"})

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        self._check(node)
        builder.passed(1)
        heads, kv_heads = int(attribute(node, "num_heads")), int(attribute(node, "kv_num_heads"))
        q, k, v = self._operands(facts, builder, node, heads, kv_heads)
        builder.passed(2)
        places = Places.of(facts, builder, node)
        if places is None:
            raise Declined(self, "layout", "the lengths of the cache cannot be computed", node)
        if attribute(node, "do_rotary", 0):
            q = self._rotated(facts, builder, node, q, places, heads)
            k = self._rotated(facts, builder, node, k, places, kv_heads)
        q_shape = facts.shapes.of(q)
        assert q_shape is not None  # [B, H, S, D]: it was made so
        head_size = q_shape[3]
        assert isinstance(head_size, int)
        scale = attribute(node, "scale", 0.0) or head_size**-0.5
        attributes: dict[str, int | float] = {"scale": scale}
        if attribute(node, "softcap", 0.0):
            attributes["softcap"] = attribute(node, "softcap")
        causal = bool(attribute(node, "causal", 1))
        sinks = self._sinks(builder, node, heads, q)
        window = attribute(node, "local_window_size", -1)
        mask = places.mask(causal, window, optional(node, 10), explicit=sinks is not None)
        if mask is None and causal:
            attributes["is_causal"] = 1
        past = optional(node, 3), optional(node, 4)
        if not places.plain:
            presents = self._written(facts, builder, node, places, k, v)
            (y,) = attended(builder, [q, *presents, mask], attributes, sinks)
        elif past[0] is not None:
            y, *presents = attended(builder, [q, k, v, mask, *past], attributes, sinks)
        else:
            presents = [k, v]
            (y,) = attended(builder, [q, k, v, mask], attributes, sinks)
        fused, result = y.producer(), merged_heads(facts, builder, y)
        assert fused is not None
        assert result is not None
        cache = "none" if past[0] is None else "concatenated" if places.plain else "written"
        details = {
            "heads": heads,
            "kv_heads": kv_heads,
            "head_size": head_size,
            "scale": scale,
            "cache": cache,
            "mask": "none" if mask is None else "explicit",
        }
        new = (result, *presents)
        counts = None if places.plain else places.counts
        return Rewrite(
            fused, tuple(zip(node.outputs, new, strict=False)), details, mask, counts=counts
        )

    def _check(self, node: ir.Node) -> None:
        """Raises: Declined, where the operator is asked for what is not raised."""
        scales = optional(node, 12) is not None or optional(node, 13) is not None
        if scales or any(attribute(node, name, "NONE") != "NONE" for name in _QUANTIZED):
            raise Declined(self, "quantized-cache", "the cache is stored in fewer bits", node)
        if attribute(node, "sliding_window_cache", 0):
            reason = "its cache holds as many positions as the runtime chooses to keep"
            raise Declined(self, "window-cache", reason, node)
        reasons = {
            "it normalizes queries and keys itself": optional(node, 14) or optional(node, 15),
            "its queries are ragged": optional(node, 16),
            "its scores are an output": attribute(node, "qk_output", 0) or len(node.outputs) > 3,
            "its window is 0": attribute(node, "local_window_size", -1) == 0,
            "it has one past only": (optional(node, 3) is None) != (optional(node, 4) is None),
        }
        for reason, holds in reasons.items():
            if holds:
                raise Declined(self, "unsupported", reason, node)

    def _sinks(self, builder: Builder, node: ir.Node, heads: int, q: ir.Value) -> ir.Value | None:
        """What a Softmax may look away at, [H]: input 11, or 0 for each head."""
        given_sinks = optional(node, 11)
        if given_sinks is not None or attribute(node, "smooth_softmax", -1) != 1:
            return given_sinks
        kind = q.dtype.numpy() if q.dtype is not None else np.float32
        return builder.constant(np.zeros(heads, kind), "onnxgen/sinks")

    def _operands(
        self, facts: Facts, builder: Builder, node: ir.Node, heads: int, kv_heads: int
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Queries, keys and values as [B, heads, S, D]."""
        counts, values = (heads, kv_heads, kv_heads), list(node.inputs[:3])
        shape = facts.shapes.of(node.inputs[0])
        if values[1] is None:
            width = None if shape is None or len(shape) != 3 else shape[2]
            if not isinstance(width, int) or width % sum(counts):
                raise Declined(self, "layout", "the size of the packed heads is not known", node)
            size = width // sum(counts)
            values = [*split_last(builder, given(node), [size * count for count in counts])]
        q, k, v = (
            None if value is None else split_heads(facts, builder, value, count)
            for value, count in zip(values, counts, strict=True)
        )
        if q is None or k is None or v is None:
            raise Declined(self, "layout", "the size of the heads is not known", node)
        return q, k, v

    def _rotated(
        self,
        facts: Facts,
        builder: Builder,
        node: ir.Node,
        x: ir.Value,
        places: Places,
        heads: int,
    ) -> ir.Value:
        cos, sin = given(node, 7), given(node, 8)
        shape, table = facts.shapes.of(x), facts.shapes.of(cos)
        if shape is None or table is None or not isinstance(table[1], int):
            raise Declined(self, "layout", "the size of the rotary tables is not known", node)
        attributes = {"interleaved": int(attribute(node, "rotary_interleaved", 0))}
        if 2 * table[1] != shape[3]:
            attributes |= {"rotary_embedding_dim": 2 * table[1], "num_heads": heads}
        inputs = [x, cos, sin, places.positions(optional(node, 9))]
        return builder.op("RotaryEmbedding", inputs, attributes)

    def _written(
        self,
        facts: Facts,
        builder: Builder,
        node: ir.Node,
        places: Places,
        k: ir.Value,
        v: ir.Value,
    ) -> list[ir.Value]:
        presents = []
        for index, new in ((3, k), (4, v)):
            cache = given(node, index)
            shape = facts.shapes.of(cache)
            sizes = None if shape is None else (builder.sizes(shape[:2]), builder.sizes(shape[3:]))
            if sizes is None or sizes[0] is None or sizes[1] is None:
                raise Declined(self, "layout", "the size of the cache cannot be computed", node)
            presents.append(places.written(cache, new, (sizes[0], sizes[1])))
        return presents
