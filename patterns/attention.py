"""ATT001: scaled dot-product attention around a Softmax, whatever leads to it and away from it.

Replaces
    Softmax(scale * q @ k^T, capped, + masks) @ v                    (Vaswani et al., 2017)
    -> Attention-23(q, k, v, mask, past_key, past_value; scale, softcap) -> y, presents

    Queries, keys and values are followed through views to batch, heads, rows and columns
    (`analysis.views`): transposes, detours through flattened tensors, repeated key/value heads.
    Factors on q, on k, on both or on the scores become one scale. A Concat of past and new keys
    and values along the sequence moves into the node. The mask stays as the model computes it.
    Scores may be viewed on the way, with masks and biases added to any view of them.

    With a column of sinks joined to the scores, and dropped from the probabilities, the node is
    onnxgen::SinkAttention (`onnxgen.functions.sink_attention`): the standard has no such operator.

Looks for
    1. a Softmax over the last axis, or one that is written out
    2. above it scores: q @ k^T, scaled, capped, masked, joined with sinks, cast or viewed
    3. below it p @ v
    4. scores and probabilities of batch, heads, rows and columns
    5. queries, keys and values of that layout, with heads of keys that divide the queries'
    6. a mask of the scores' shape, and sinks that are one number a head

Declines
    scores: something unknown stands between the Softmax and q @ k, or before p @ v.
        Expected: a factor, a cap, masks, biases, sinks, casts and views between q @ k and the
        Softmax; views, casts and the same mask between it and p @ v.
        Change: export the model in inference mode and with attn_implementation="sdpa" or "eager";
        an attention of another form is not supported.
    layout: an operand cannot be read as batch, heads, rows and columns.
        Expected: views (Reshape, Transpose, Expand, Slice, Concat ...) from a projection to [B, H,
        S, D].
        Change: sizes that are fixed while exporting are read where computed ones are not: make only
        batch and lengths dynamic.
    groups: keys and values do not have the same heads, or these do not divide the queries'.
        Expected: K key and value heads, H query heads, H a multiple of K.
        Change: none: the operator has no such sharing.
    mask: the mask cannot be brought to [.., S, T].
        Expected: a mask that broadcasts to batch, heads, rows and columns of the scores.
        Change: none yet: a mask that is laid out otherwise than the scores is not supported.
    sinks: what is joined to the scores is not one number a head.
        Expected: a column of the scores that is the same for every row and token.
        Change: none: no operator has it.
    cap-order: a mask is applied before the cap, where the operator applies it behind.
        Expected: the cap on the scores, and masks behind it.
        Change: export with attn_implementation="eager", where the model's own code applies the mask
        last.

Numerics
    The same sums in another order: about 1e-6 of the output's standard deviation in fp32. Rows
    that are masked everywhere are zeros where the mask is -inf (the decomposition gives NaN, or
    zeros behind its guard). What is added stays what is added. A finite number that replaces
    scores becomes half the lowest, which is added: rows that are masked everywhere are uniform
    with both. It assumes that a row sees a score that is above the number by 104 or more, so that
    what is masked weighs nothing beside it.

Seen in
    torch.onnx.export, TorchScript and dynamo, torch 2.13; transformers' OnnxExporter 5.23.

Example
    opset 20
    (int64[b,s] ids, int64[b,s] attention_mask)
    => (float[b,6,s,20] y)
    <float[37,50] table, float[50,120] wq, float[50,120] wk, float[50,120] wv>
    {
      x = Gather(table, ids)
      qp = MatMul(x, wq)
      q4 = Reshape(qp, [0, 0, 6, 20])
      q = Transpose<perm = [0, 2, 1, 3]>(q4)
      kp = MatMul(x, wk)
      k4 = Reshape(kp, [0, 0, 6, 20])
      kt = Transpose<perm = [0, 2, 3, 1]>(k4)
      vp = MatMul(x, wv)
      v4 = Reshape(vp, [0, 0, 6, 20])
      v = Transpose<perm = [0, 2, 1, 3]>(v4)
      m = Cast<to = 9>(attention_mask)
      keep = Unsqueeze(m, [1, 2])
      s0 = MatMul(q, kt)
      s1 = Div(s0, 4.472136)
      s2 = Where(keep, s1, -inf)
      p = Softmax<axis = -1>(s2)
      y = MatMul(p, v)
    }
    becomes
        ...
        reshape = Reshape(kp, [ 0,  0,  6, 20])
        transpose = Transpose<perm = (0, 2, 1, 3)>(reshape)
        ...
        y = Attention<scale = 0.223607>(q, transpose, v, expand)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import FLOATS, given, producer
from onnxgen.analysis.layouts import layouts
from onnxgen.analysis.probabilities import (
    Down,
    Normalized,
    attends,
    plain_condition,
    softmax_of,
    walk_down,
)
from onnxgen.analysis.scores import Mask, Scores, Stopped, constant_choice, walk_up
from onnxgen.analysis.symbols import divide, product
from onnxgen.analysis.views import Axis, canonical
from onnxgen.patterns.attending import (
    Heads,
    attention,
    caches_of,
    heads_of,
)
from onnxgen.patterns.building import Builder
from onnxgen.patterns.masking import attention_mask, each_head
from onnxgen.patterns.rule import Declined, Rewrite, Rule, number

Layouts: TypeAlias = Mapping[ir.Value, tuple[Axis, ...]]


class SoftmaxAttention(Rule):
    """Anchored at the Softmax, or at the sum or logarithm of one that is written out."""

    code = "ATT001"
    kind = "attention"
    anchors = frozenset({"Softmax", "LogSoftmax", "ReduceSum"})

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        softmax = softmax_of(facts, node)
        if softmax is None:
            return None
        builder.passed(1)
        up = walk_up(facts, softmax.scores)
        down = walk_down(facts, softmax.value, None if isinstance(up, Stopped) else up.sink)
        if (isinstance(up, Stopped) or isinstance(down, Stopped)) and not attends(facts, node):
            return None  # a router's Softmax, or a classifier's: nothing is attended to
        for step, stopped in ((2, up), (3, down)):
            if isinstance(stopped, Stopped):
                raise Declined(self, "scores", stopped.reason, stopped.node or node)
            builder.passed(step)
        assert isinstance(up, Scores)
        assert isinstance(down, Down)
        if not softmax.last:
            raise Declined(self, "scores", "the Softmax is not over the last axis", node)
        if up.masks_before_cap:
            raise Declined(self, "cap-order", "a mask is applied before the cap", node)
        scores = [step.outputs[0] for step, _ in reversed(up.steps)]
        steps = [*scores, softmax.value, *down.steps]
        layout = layouts(facts, up.contraction, steps)
        if isinstance(layout, str):
            raise Declined(self, "layout", layout, up.contraction)
        scores_found = masked_again(up, down)
        if scores_found is None:
            raise Declined(self, "scores", "the probabilities are masked by another mask", node)
        builder.passed(4)
        return self._emit(facts, builder, softmax, scores_found, down, layout)

    def _operands(
        self, facts: Facts, up: Scores, down: Down, layout: Layouts
    ) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values; with the heads as they are repeated where they cannot be shared."""
        try:
            return self._shared(facts, up, down, layout, shared=True)
        except Declined as declined:
            try:
                return self._shared(facts, up, down, layout, shared=False)
            except Declined:
                raise declined from None

    def _shared(
        self, facts: Facts, up: Scores, down: Down, layout: Layouts, *, shared: bool
    ) -> tuple[Heads, Heads, Heads]:
        contraction = up.contraction
        above, below = layout[contraction.outputs[0]], layout[given(down.product, 0)]
        found: list[Heads] = []
        for name, value, axes in (
            ("queries", given(contraction, 0), above),
            ("keys", given(contraction, 1), above),
            ("values", uncast(given(down.product, 1)), below),
        ):
            queries = found[0] if found else None
            heads = heads_of(facts, value, axes, queries=queries, shared=shared)
            if isinstance(heads, str):
                raise Declined(self, "layout", f"{name}: {heads}", contraction, value.producer())
            found.append(heads)
        q, k, v = found
        whole, k = rows_to_heads(q, k, above)
        other, v = rows_to_heads(q, v, below)
        if (whole.heads, whole.rows) != (other.heads, other.rows) or below[-1] != above[-1]:
            raise Declined(self, "layout", "p @ v has other heads than q @ k", down.product)
        if k.groups != v.groups or k.count != v.count:
            raise Declined(self, "groups", "keys and values have different heads", contraction)
        if divide(whole.count, k.count) != k.groups:
            raise Declined(
                self, "groups", f"{whole.count} query heads on {k.count} key heads", contraction
            )
        return whole, k, v

    def _emit(
        self,
        facts: Facts,
        builder: Builder,
        softmax: Normalized,
        up: Scores,
        down: Down,
        layout: Layouts,
    ) -> Rewrite:
        q, k, v = self._operands(facts, up, down, layout)
        queries = q.arranged(facts, builder)
        keys = k.arranged(facts, builder, transposed=True)
        values = v.arranged(facts, builder)
        for name, arranged in (("queries", queries), ("keys", keys), ("values", values)):
            if arranged is None:
                raise Declined(self, "layout", f"{name} cannot be rearranged", up.contraction)
        assert queries is not None
        assert keys is not None
        assert values is not None
        builder.passed(5)
        dtype = given(up.contraction).dtype  # of the product of queries and keys
        queries, keys, values = (cast(builder, each, dtype) for each in (queries, keys, values))
        scale = up.scale
        for heads, (_, inside) in ((q, queries), (k, keys)):
            view = facts.views.of(heads.value)
            assert view is not None
            scale *= view.scale / inside
        value_view = facts.views.of(v.value)
        assert value_view is not None
        if value_view.scale != values[1]:
            raise Declined(self, "layout", "the values are scaled on the way", down.product)
        q_shape, k_shape = facts.shapes.of(queries[0]), facts.shapes.of(keys[0])
        assert dtype is not None
        assert q_shape is not None
        assert k_shape is not None
        below = layout[given(down.product, 0)]
        axes = (q.batch, q.heads, q.rows, below[-1])
        mask = attention_mask(facts, builder, up.masks, layout, axes, q_shape[2], k_shape[2], dtype)
        if isinstance(mask, str):
            raise Declined(self, "mask", mask, softmax.value.producer())
        caches, cache = caches_of(facts, queries[0], keys[0], values[0], mask)
        attributes: dict[str, int | float] = {"scale": scale}
        if up.softcap:
            attributes["softcap"] = up.softcap
        precision = softmax.scores.dtype
        if precision is not None and precision != dtype:
            attributes["softmax_precision"] = int(precision)
        sinks: ir.Value | None = None
        if up.sink is not None:
            column = each_head(facts, builder, up.sink.value, layout[up.sink.at], axes, dtype)
            if isinstance(column, str):
                raise Declined(self, "sinks", column, softmax.value.producer())
            sinks = column
        fused, y, replaced = attention(
            builder, queries[0], keys[0], values[0], mask, caches, attributes, sinks
        )
        old = down.product.outputs[0]
        if old.dtype is not None and old.dtype != dtype:
            y = builder.op("Cast", [y], {"to": int(old.dtype)})
        if below != axes:
            shape = facts.shapes.of(old)
            target = None if shape is None else builder.target(y, list(shape))
            if target is None:
                raise Declined(self, "layout", "the output's size cannot be computed", down.product)
            y = builder.op("Reshape", [y, target])
        details: dict[str, str | int | float | bool] = {
            "heads": number(q.count),
            "kv_heads": number(k.count),
            "head_size": number(q_shape[3]),
            "scale": scale,
            "cache": cache,
            "mask": "explicit" if mask is not None else "none",
        }
        if sinks is not None:
            details["sinks"] = "one a head"
        return Rewrite(fused, ((old, y), *replaced), details, mask)


def uncast(value: ir.Value) -> ir.Value:
    """What a value is cast from, if it is cast: repeated heads are seen through behind it."""
    node = producer(value, "Cast")
    return given(node) if node is not None and given(node).dtype in FLOATS else value


def cast(
    builder: Builder, arranged: tuple[ir.Value, float], dtype: ir.DataType | None
) -> tuple[ir.Value, float]:
    value, factor = arranged
    if dtype is None or value.dtype == dtype:
        return arranged
    return builder.op("Cast", [value], {"to": int(dtype)}), factor


def masked_again(up: Scores, down: Down) -> Scores | None:
    """The scores with the masks that probabilities are masked by once more; None for others.

    Where(keep, p, 0) behind Where(keep, s, fill) changes the rows that are masked everywhere: they
    are zeros, as those that are filled with -inf are.
    """
    masks = list(up.masks)
    for condition, inverted in down.kept:
        for index, mask in enumerate(masks):
            found = constant_choice(mask.value) if mask.fill is None else mask
            if found is None or (mask.fill is None and mask.factor <= 0):
                continue
            if plain_condition(found.value, found.inverted) == (condition, inverted):
                masks[index] = Mask(found.value, mask.at, -np.inf, found.inverted)
                break
        else:
            return None
    return replace(up, masks=masks)


def rows_to_heads(q: Heads, other: Heads, axes: tuple[Axis, ...]) -> tuple[Heads, Heads]:
    """Query heads that an exporter put among the rows, where they share keys, made heads again.

    For one new token, [B, K, G, D] @ [B, K, D, T] computes G query heads on each key head without
    repeating it. The digits of the rows that come from the axes of heads and head size are heads.

    Args:
        q: the queries as they are read.
        other: keys or values.
        axes: the scores that are their product, or that they are multiplied by.

    Returns:
        The queries' heads and rows as these scores have them; keys or values with their groups.
    """
    heads = [digit for axis in axes[:-2] for digit in axis][len(q.batch) :]
    rows = axes[-2]
    own = {digit.axis for digit in (*q.heads, *q.columns)}
    count = next((i for i, d in enumerate(rows) if d.axis not in own), len(rows))
    size = product(digit.size for digit in rows[:count])
    return (
        replace(q, heads=canonical((*heads, *rows[:count])), rows=rows[count:]),
        replace(other, groups=other.groups * size),
    )
