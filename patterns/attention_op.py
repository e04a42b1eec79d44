"""ATT002: an Attention that an exporter wrote takes its cache inside and leaves repeats outside.

Replaces
    Attention(q, Expand(Concat(past_key, k)), Expand(Concat(past_value, v)), mask)
    -> Attention(q, k, v, mask, past_key, past_value) -> y, present_key, present_value

    Heads that are repeated for groups of query heads are taken as they are: the operator shares
    them itself. The mask, the scale and every other attribute stay.

Looks for
    1. an Attention of four axes, as an exporter wrote it, without a past
    2. keys and values of batch, heads, rows and columns
    3. a cache or repeated heads in front of it that go inside
    4. a mask, or none: is_causal would count otherwise

Declines
    causal: is_causal counts from the first key; with the cache inside it would count from the last
        (a Concat outside and inside mask different scores).
        Expected: a mask as an input where there is a cache.
        Change: export with an attention mask, as for padded batches.
    layout: keys or values cannot be read as batch, heads, rows and columns.
        Expected: views from a projection to [B, K, S, D].
        Change: make only batch and lengths dynamic when exporting.

Numerics
    The same operator on the same numbers.

Seen in
    torch.onnx.export(dynamo=True, opset_version=23), torch 2.13.

Example
    opset 23
    (float[b,6,s,20] q, float[b,3,s,20] k, float[b,3,s,20] v)
    => (float[b,6,s,20] y)
    {
      ku = Unsqueeze(k, [2])
      ke = Expand(ku, [1, 1, 2, 1, 1])
      kr = Reshape(ke, [0, 6, -1, 20])
      vu = Unsqueeze(v, [2])
      ve = Expand(vu, [1, 1, 2, 1, 1])
      vr = Reshape(ve, [0, 6, -1, 20])
      y = Attention<is_causal = 1>(q, kr, vr)
    }
    becomes
        y = Attention<is_causal = 1>(q, k, v)
"""

from __future__ import annotations

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute
from onnxgen.patterns.attending import attention, caches_of, heads_of
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rule import RULE, Declined, Rewrite, Rule, number


class ExportedAttention(Rule):
    """Anchored at an Attention of four axes without a past."""

    code = "ATT002"
    kind = "attention"
    anchors = frozenset({"Attention"})

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        if node.domain == "com.microsoft" or len(node.inputs) > 4 or len(node.outputs) > 1:
            return None
        if RULE in node.metadata_props:
            return None  # another rule's work, of which nothing is left to take inside
        q, k, v = node.inputs[:3]
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        view = facts.views.of(q) if q is not None else None
        if q is None or k is None or v is None or view is None or len(view.axes) != 4:
            return None
        queries = heads_of(facts, q, view.axes, queries=None)
        if isinstance(queries, str):
            return None
        builder.passed(1)
        keys, values = (heads_of(facts, each, view.axes, queries=queries) for each in (k, v))
        if isinstance(keys, str) or isinstance(values, str):
            raise Declined(self, "layout", f"keys: {keys}, values: {values}", node)
        builder.passed(2)
        if (keys.count, keys.groups) != (values.count, values.groups):
            return None
        plain_k, plain_v = keys.arranged(facts, builder), values.arranged(facts, builder)
        if plain_k is None or plain_v is None or (plain_k[1], plain_v[1]) != (1.0, 1.0):
            return None
        caches, cache = caches_of(facts, q, plain_k[0], plain_v[0], mask)
        if caches is not None:
            builder.passed(3)
        if caches and attribute(node, "is_causal", 0):
            raise Declined(self, "causal", "is_causal with a concatenated cache", node)
        if caches is None and plain_k[0] is k and plain_v[0] is v:
            return None  # nothing to gain
        attributes = {name: found.value for name, found in node.attributes.items()}
        fused, y, replaced = attention(builder, q, plain_k[0], plain_v[0], mask, caches, attributes)
        q_shape = facts.shapes.of(q)
        assert q_shape is not None  # a view of four axes has four sizes
        details = {
            "heads": number(q_shape[1]),
            "kv_heads": number(keys.count),
            "cache": cache,
            "mask": "none" if mask is None else "explicit",
        }
        return Rewrite(fused, ((node.outputs[0], y), *replaced), details, mask)
