"""ORT001: Attention with a growing cache becomes GroupQueryAttention, its rotary embedding inside.

Replaces
    Attention-23(RotaryEmbedding(q), RotaryEmbedding(k), v, mask, past_key, past_value)
    -> com.microsoft GroupQueryAttention(q, k, v, past_key, past_value, seqlens_k,
       total_sequence_length, cos_cache, sin_cache, , attention_bias)

    A mask whose family is known is said by attributes (causal, local_window_size) and, for
    padding, by the input mask alone, of zeros and ones; any other goes in as attention_bias, so
    does one that follows from positions that no guard compares. Sinks are head_sink.

    Tables that are a function of a token's place become caches (`rotary_caches`). Where that is
    an input, position_ids, the operator counts for itself and the guard compares: given the
    input, it ignores it on a first prompt (CPU, ONNX Runtime 1.32), and left padding shifts it.
    So for any padding, and for other tables, the rotary embedding stays outside.

Looks for
    1. an Attention that continues a cache
    2. heads and head sizes that the kernel takes
    3. a mask that attributes, the input mask or a bias can say
    4. queries, keys, values and the output as [B, S, heads * D]

Declines
    no-cache: nothing is continued; the standard operator is as good.
        Expected: past_key and past_value.
        Change: none needed; export with past and present for a model that generates.
    layout: queries, keys, values or the output have no [B, S, heads * D].
        Expected: four axes [B, H, S, D] of fixed heads and head size.
        Change: make only batch and lengths dynamic when exporting.
    kernel: what the kernel does not take: K and V of different sizes, D that is no multiple of 8,
        or scores as an output.
        Expected: keys and values of one head size, a multiple of 8.
        Change: none: --target onnx has no such limit.
    causal: is_causal counts from the first key where there is no mask to tell.
        Expected: a mask, or is_causal, but not both.
        Change: export with an attention mask only.

Numerics
    The same sums; probabilities in float.

Seen in
    what raising gives for every decoder with a cache; target of onnxruntime-genai's builder.

Example
    opset 24
    (int64[b,s] ids, float[b,3,p,24] past_k, float[b,3,p,24] past_v)
    => (float[b,6,s,24] y, float[b,3,t,24] present_k, float[b,3,t,24] present_v)
    <float[37,50] table, float[50,144] wq, float[50,72] wk, float[50,72] wv>
    {
      x = Gather(table, ids)
      qp = MatMul(x, wq)
      kp = MatMul(x, wk)
      vp = MatMul(x, wv)
      q4 = Reshape(qp, [0, 0, 6, 24])
      k4 = Reshape(kp, [0, 0, 3, 24])
      v4 = Reshape(vp, [0, 0, 3, 24])
      q = Transpose<perm = [0, 2, 1, 3]>(q4)
      k = Transpose<perm = [0, 2, 1, 3]>(k4)
      v = Transpose<perm = [0, 2, 1, 3]>(v4)
      y, present_k, present_v = Attention<is_causal = 1>(q, k, v, , past_k, past_v)
    }
    becomes
        ...
        groupqueryattention, present_k, present_v = com.microsoft.GroupQueryAttention<num_heads = 6,
            kv_num_heads = 3, scale = 0.204124>(qp, kp, vp, past_k, past_v, seqlens_k, cast)
        reshape = Reshape(groupqueryattention, [ 0,  0,  6, 24])
        y = Transpose<perm = (0, 2, 1, 3)>(reshape)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxgen import functions
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute, producer
from onnxgen.analysis.masks import MaskFamily
from onnxgen.patterns.building import Builder
from onnxgen.patterns.operands import merged_heads, rows_first, scale_of
from onnxgen.patterns.rule import Declined, Rewrite, Rule
from onnxgen.targets.contract import Contract, Padding
from onnxgen.targets.ort.lengths import Lengths, input_mask
from onnxgen.targets.ort.rotary_caches import RotaryCaches, rotary_caches

INT32 = int(ir.DataType.INT32)
DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class _Masking:
    """How a mask is said.

    Attributes:
        causal: the kernel's causal attribute.
        window: local_window_size, -1 for none.
        padding: whether keys of padded tokens are hidden by the input mask.
        bias: a mask that goes in as it is.
    """

    causal: bool
    window: int = -1
    padding: bool = False
    bias: ir.Value | None = None


class GroupQuery(Rule):
    """Anchored at the standard Attention, and at ours with sinks.

    Attributes:
        contract: what the attentions lowered so far assume.
    """

    code = "ORT001"
    kind = "attention"
    anchors = frozenset({"Attention", "SinkAttention"})

    def __init__(self, padding: Padding, length: int, families: Mapping[str, MaskFamily]) -> None:
        self._padding: Padding = padding
        self._length = length
        self._families = families
        self._caches: dict[tuple[ir.Value | None, ...], RotaryCaches | str] = {}
        self._promised: dict[ir.Node, Contract] = {}
        self.contract = Contract()

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        if node.domain not in ("", "ai.onnx", functions.DOMAIN):
            return None
        inputs = [*node.inputs, *[None] * (7 - len(node.inputs))]
        q, k, v, mask, past_key, past_value, last = inputs[:7]
        sinks = last if node.op_type == "SinkAttention" else None
        if past_key is None or past_value is None or (last is not None and sinks is None):
            raise Declined(self, "no-cache", "it continues no cache", node)
        assert q is not None
        assert k is not None
        assert v is not None
        builder.passed(1)
        heads, kv_heads = self._check(facts, node, q, k, v)
        builder.passed(2)
        found = self._rotary(facts, q, k, past_key)
        rotary, said = (None, found) if isinstance(found, str) else (found, "inside")
        positions = rotary[0].positions if rotary is not None else None
        masking = self._masking(facts, node, mask, past_key, positions)
        builder.passed(3)
        operands = [
            rows_first(facts, builder, value, count, turned=not inside)
            for value, count, inside in (
                (q, heads, rotary is not None),
                (k, kv_heads, rotary is not None),
                (v, kv_heads, False),
            )
        ]
        for value, operand in zip((q, k, v), operands, strict=True):
            if operand is None:
                raise Declined(self, "layout", f"{value.name!r} cannot be rearranged", node)
        packed, factors = zip(*(operand for operand in operands if operand), strict=True)
        if factors[2] != 1.0 or factors[1] != 1.0:
            raise Declined(self, "layout", "keys or values are scaled on the way", node)
        queries = packed[0]
        lengths = Lengths(facts, builder, input_mask(facts, past_key))
        total = lengths.total(queries, past_key)
        guarded = masking.padding and lengths.mask is not None
        if guarded:
            total = lengths.of_zeros_and_ones(total)
        padding: Padding = self._padding if guarded else "any"
        rows = lengths.rows(total, queries, padding, positions)
        bias = masking.bias
        if bias is not None:
            bias = _added(builder, bias, queries)
        elif guarded and self._padding == "any":
            bias = lengths.bias(queries, total)
        scalar_total = builder.op("Cast", [builder.op("Squeeze", [total])], {"to": INT32})
        attributes: dict[str, int | float] = {"num_heads": heads, "kv_num_heads": kv_heads}
        attributes["scale"] = scale_of(facts, node, q) * factors[0]
        if attribute(node, "softcap", 0.0):
            attributes["softcap"] = attribute(node, "softcap")
        if not masking.causal:
            attributes["causal"] = 0
        if masking.window > 0:
            attributes["local_window_size"] = masking.window
        tables: list[ir.Value | None] = [None, None]
        if rotary is not None:
            attributes |= {"do_rotary": 1, "rotary_interleaved": rotary[1]}
            kind = queries.dtype.numpy() if queries.dtype is not None else np.float32
            tables = [
                builder.constant(np.ascontiguousarray(table.astype(kind)), f"onnxgen/{name}_cache")
                for name, table in (("cos", rotary[0].cos), ("sin", rotary[0].sin))
            ]
        outputs = builder.ops(
            "GroupQueryAttention",
            [*packed, past_key, past_value, rows, scalar_total, *tables, None, bias, sinks],
            3,
            attributes,
            domain=DOMAIN,
        )
        fused = outputs[0].producer()
        assert fused is not None
        y = self._joined(facts, builder, node, outputs[0], heads)
        replaced = (y, *zip(node.outputs[1:], outputs[1:], strict=False))
        self._promised[fused] = Contract(
            self._padding if guarded or positions is not None else "any",
            None if rotary is None else len(rotary[0].cos),
            chunked_batches=False,
        )
        details = {
            "mask": "attention_bias" if bias is not None else "attributes",
            "rotary": said,
        }
        return Rewrite(fused, replaced, details, mask)

    def applied(self, rewrite: Rewrite) -> None:
        self.contract = self.contract.both(self._promised[rewrite.node])

    def _check(
        self, facts: Facts, node: ir.Node, q: ir.Value, k: ir.Value, v: ir.Value
    ) -> tuple[int, int]:
        """Numbers of query and key heads, where the kernel takes the sizes."""
        shapes = [facts.shapes.of(each) or () for each in (q, k, v)]
        if any(len(shape) != 4 for shape in shapes):
            raise Declined(self, "layout", "queries, keys and values do not have four axes", node)
        (_, heads, _, size), (_, kv_heads, _, _), (_, _, _, width) = shapes
        if not (isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(size, int)):
            raise Declined(self, "layout", "heads and head size are not fixed", node)
        if size != width or size % 8:
            raise Declined(
                self, "kernel", f"keys have {size} and values {width} columns a head", node
            )
        if attribute(node, "qk_matmul_output_mode", 0) or len(node.outputs) > 3:
            raise Declined(self, "kernel", "the scores are an output", node)
        return heads, kv_heads

    def _masking(
        self,
        facts: Facts,
        node: ir.Node,
        mask: ir.Value | None,
        past: ir.Value,
        positions: ir.Value | None,
    ) -> _Masking:
        """How the node's mask is said; `positions` are those that a guard finds to count."""
        if mask is None:
            return _Masking(causal=bool(attribute(node, "is_causal", 0)))
        if attribute(node, "is_causal", 0):
            raise Declined(self, "causal", "is_causal beside a mask", node)
        family = self._families.get(node.name or "")
        known = family is not None and family.kind in ("full", "causal", "window")
        if family is None or not known or family.slopes or family.faint:
            return _Masking(causal=False, bias=mask)
        uncounted = set(family.counted) - ({positions.name} if positions is not None else set())
        if uncounted or (family.padding and input_mask(facts, past) is None):
            return _Masking(causal=False, bias=mask)
        window = family.size if family.kind == "window" else -1
        return _Masking(family.kind != "full", window, family.padding)

    def _rotary(
        self, facts: Facts, q: ir.Value, k: ir.Value, past: ir.Value
    ) -> tuple[RotaryCaches, int] | str:
        """What queries and keys are both rotated by; where it stays outside, that, and why."""
        nodes = [producer(each, "RotaryEmbedding") for each in (q, k)]
        pair = facts.roles.pair_of(past.name or "")
        if nodes[0] is None or nodes[1] is None:
            return "none"
        if pair is None or pair.cap is not None:
            return "outside: in a cropped cache a token's place is not its position"
        if q.dtype == ir.DataType.BFLOAT16:
            # They are rounded where a float32 twin's tables are not: no proof.
            return "outside: caches of bfloat16 cannot be proven"
        first, second = nodes[0], nodes[1]
        key = (*first.inputs[1:], *second.inputs[1:])
        for name in ("interleaved", "rotary_embedding_dim"):
            if attribute(first, name, 0) != attribute(second, name, 0):
                return "outside: queries and keys are rotated differently"
        if key not in self._caches:
            both = [rotary_caches(facts, each, self._length) for each in (first, second)]
            self._caches[key] = _one(both)
        caches = self._caches[key]
        size = facts.shapes.of(q)
        if isinstance(caches, str):
            return f"outside: {caches}"
        columns = caches.cos.shape[-1]
        if size is None or columns % 8 or columns * 2 > size[-1]:
            return "outside: the kernel rotates multiples of 16 columns only"
        if caches.positions is not None and self._padding == "any":
            return f"outside: {caches.positions.name!r} may say any position"
        return caches, int(attribute(first, "interleaved", 0))

    def _joined(
        self, facts: Facts, builder: Builder, node: ir.Node, rows: ir.Value, heads: int
    ) -> tuple[ir.Value, ir.Value]:
        """(old, new): the output as [B, S, H * D] where that is all that is read of it."""
        y = node.outputs[0]
        merged = merged_heads(facts, y)
        if merged is not None:
            return merged, rows
        shape = facts.shapes.of(y)
        assert shape is not None
        target = builder.target(rows, [shape[0], shape[2], heads, shape[3]])
        if target is None:
            raise Declined(self, "layout", "the output's size cannot be computed", node)
        split = builder.op("Reshape", [rows, target])
        return y, builder.op("Transpose", [split], {"perm": [0, 2, 1, 3]})


def _one(both: Sequence[RotaryCaches | str]) -> RotaryCaches | str:
    """The caches that queries and keys share; the reason where they differ."""
    q, k = both
    if isinstance(q, str) or isinstance(k, str):
        return q if isinstance(q, str) else str(k)
    same = np.array_equal(q.cos, k.cos) and np.array_equal(q.sin, k.sin)
    if not same or q.positions is not k.positions:
        return "queries and keys are rotated differently"
    return q


def _added(builder: Builder, mask: ir.Value, queries: ir.Value) -> ir.Value:
    """A mask as [B or 1, H or 1, S, T] of the queries' type, to be added to the scores."""
    assert queries.dtype is not None
    kind = queries.dtype.numpy()
    if mask.dtype == ir.DataType.BOOL:
        low = builder.constant(np.array(float(queries.dtype.min), dtype=kind))
        zero = builder.constant(np.array(0, dtype=kind))
        mask = builder.op("Where", [mask, zero, low])
    elif mask.dtype != queries.dtype:
        mask = builder.op("Cast", [mask], {"to": int(queries.dtype)})
    rank = builder.shapes.rank(mask) or 4
    if rank < 4:
        mask = builder.op("Unsqueeze", [mask, builder.ints(*range(4 - rank))])
    return mask
