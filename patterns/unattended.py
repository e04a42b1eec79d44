"""ATT003: rows that see nothing are zeros by a bool mask, not by a Where behind the attention.

Replaces
    Where(nothing, 0, Attention(q, k, v, mask))      nothing: the rows of mask that see no key
    -> Attention(q, k, v, keep)                      keep: the same mask as bool

    Both masks are run on a grid of lengths and paddings (`masks.PROBES`): each element of the old
    one is 0 or the lowest number, and the Where picks just the rows that hold no 0.

Looks for
    1. a Where that replaces rows of an Attention by zeros
    2. rows that, run on a grid of lengths and paddings, are just those that the mask hides
       everywhere

Declines
    Nothing: what does not fit stays as it is, and is no site.

Numerics
    The same: a bool mask leaves a row that sees nothing zeros, as ONNX Runtime runs it.

Seen in
    transformers' OnnxExporter 5.23, every attention ("unattended rows").

Example
    opset 23
    (int64[b,s] ids, int64[b,t] attention_mask, float[b,3,p,20] past_k, float[b,3,p,20] past_v)
    => (float[b,6,s,20] y, float[b,3,t,20] present_k, float[b,3,t,20] present_v)
    <float[37,50] table, float[50,120] wq, float[50,60] wk, float[50,60] wv>
    {
      x = Gather(table, ids)
      qp = MatMul(x, wq)
      kp = MatMul(x, wk)
      vp = MatMul(x, wv)
      q3 = Reshape(qp, [0, 0, 6, 20])
      k3 = Reshape(kp, [0, 0, 3, 20])
      v3 = Reshape(vp, [0, 0, 3, 20])
      q = Transpose<perm = [0, 2, 1, 3]>(q3)
      k = Transpose<perm = [0, 2, 1, 3]>(k3)
      v = Transpose<perm = [0, 2, 1, 3]>(v3)
      tl = Shape<start = 1, end = 2>(attention_mask)
      tt = Squeeze(tl, [0])
      sl = Shape<start = 1, end = 2>(ids)
      ss = Squeeze(sl, [0])
      pp = Sub(tt, ss)
      cols = Range(0, tt, 1)
      rows = Range(pp, tt, 1)
      ru = Unsqueeze(rows, [1])
      causal = LessOrEqual(cols, ru)
      am = Cast<to = 9>(attention_mask)
      au = Unsqueeze(am, [1, 2])
      keep = And(causal, au)
      mask = Identity(keep)
      kn = Cast<to = 7>(keep)
      n = ReduceMax(kn, [-1])
      nothing = Equal(n, 0)
      a, present_k, present_v = Attention<scale = 0.31>(q, k, v, mask, past_k, past_v)
      y = Where(nothing, 0.0, a)
    }
    becomes
        ...
        y, present_k, present_v = Attention<scale = 0.31>(q, k, v, keep, past_k, past_v)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.evaluate import CutError
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import given, producer, uniform
from onnxgen.analysis.masks import PROBES
from onnxgen.analysis.scores import MASKED, constant_choice
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rule import Rewrite, Rule


class UnattendedRows(Rule):
    """Anchored at the Where."""

    code = "ATT003"
    kind = "unattended"
    anchors = frozenset({"Where"})

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        nothing, zeros, y = node.inputs
        attention = producer(y, "Attention")
        if attention is None or nothing is None or y is None or uniform(zeros) != 0.0:
            return None
        mask = attention.inputs[3] if len(attention.inputs) > 3 else None
        alone = y is attention.outputs[0] and len(list(y.uses())) == 1 and not y.is_graph_output()
        if mask is None or not alone or facts.is_activation(mask) or facts.is_activation(nothing):
            return None
        shape = facts.shapes.of(node.outputs[0])
        if not facts.shapes.same_shape(shape, facts.shapes.of(y)):
            return None
        builder.passed(1)
        if not _rows_without_keys(facts, nothing, mask):
            return None
        inputs = list(attention.inputs)
        inputs[3] = _as_bool(builder, mask)
        attributes = {name: each.value for name, each in attention.attributes.items()}
        outputs = builder.ops("Attention", inputs, len(attention.outputs), attributes)
        fused = outputs[0].producer()
        assert fused is not None
        presents = zip(attention.outputs[1:], outputs[1:], strict=True)
        return Rewrite(fused, ((node.outputs[0], outputs[0]), *presents), {}, inputs[3])


def _rows_without_keys(facts: Facts, nothing: ir.Value, mask: ir.Value) -> bool:
    """Whether `nothing`, [B,1,S,1], is where a row of `mask`, [..,S,T], hides every key."""
    if facts.sampler is None:
        return False
    try:
        masks = facts.sampler.samples(mask, PROBES)
        rows = facts.sampler.samples(nothing, PROBES)
    except CutError:
        return False
    if not masks or [shape for shape, _ in masks] != [shape for shape, _ in rows]:
        return False
    for (_, found), (_, picked) in zip(masks, rows, strict=True):
        seen = found if found.dtype == bool else found == 0
        if found.dtype != bool and (found[~seen] > np.finfo(found.dtype).min / 2).any():
            return False
        hidden = ~seen.any(axis=-1, keepdims=True)
        if picked.ndim != 4 or picked.shape[-1] != 1 or picked.shape[-2] != hidden.shape[-2]:
            return False
        if not (picked == hidden).all():
            return False
    return True


def _as_bool(builder: Builder, mask: ir.Value) -> ir.Value:
    """The mask as true where a key is seen; the bool that it was made of where that shows."""
    if mask.dtype == ir.DataType.BOOL:
        return mask
    choice = constant_choice(mask)
    if choice is None:
        assert mask.dtype is not None
        lowest = np.array(MASKED, dtype=mask.dtype.numpy())
        return builder.op("Greater", [mask, builder.constant(lowest)])
    made = producer(choice.value, "Not")
    if choice.inverted and made is not None:
        return given(made)
    return builder.op("Not", [choice.value]) if choice.inverted else choice.value
