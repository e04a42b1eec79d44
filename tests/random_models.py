"""The model that a spec stands for, written with onnxscript's builder: one function a choice.

    model = build(Spec(kv_heads=2, groups=3, mask="window", cache="BPKD"))

An embedding, a norm, attention around a residual, and for some specs a second such layer. Letters
as in `tests.random_spec`, and H query heads, V size of a value, M width, E encoder tokens, R turned
lanes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from tests.random_parts import END, VOCABULARY, M, Parts
from tests.random_spec import WINDOW, Spec


def build(spec: Spec) -> onnx.ModelProto:
    """The model of a spec, weights in it.

    Inputs: input_ids int64 [B,S]; position_ids, attention_mask, past_key, past_value and an
    encoder's states as the spec has them. Outputs: y [B,S,M], present_key, present_value.
    """
    return Writer(spec).model()


class Writer(Parts):
    """Puts the parts together, and writes caches, masks and attention."""

    def model(self) -> onnx.ModelProto:
        spec, op = self.spec, self.op
        x = op.Gather(self.weight("table", VOCABULARY, M), self.ids)
        q, k, v = self.projected(self.norm(x, "norm"))
        cos_sin = self.tables() if spec.rotary != "none" else None
        queries = self.headed(q, "q", spec.heads, spec.size, cos_sin)
        new_keys = self.headed(k, "k", spec.kv_heads, spec.size, cos_sin)
        new_values = self.headed(v, "v", spec.kv_heads, spec.width, None)
        k, v = self.cached(new_keys, "key", spec.size), self.cached(new_values, "value", spec.width)
        masks = self.masks()
        x = op.Add(x, self.mixed(self.attended(queries, k, v, masks), "first"))
        if spec.second == "shared":
            q = self.projection(self.norm(x, "norm2"), "q2", spec.heads * spec.size)
            queries = self.headed(q, "q2", spec.heads, spec.size, cos_sin)
            x = op.Add(x, self.mixed(self.attended(queries, k, v, masks), "second"))
        elif spec.second == "cross":
            x = op.Add(x, self.mixed(self.crossed(self.norm(x, "norm2")), "second"))
        self.output("y", x, "b", "s", M)
        self.graph.outputs.insert(0, self.graph.outputs.pop())
        if not spec.declared:
            for value in (value for node in self.graph for value in node.outputs):
                value.shape = value.shape if value.is_graph_output() else None
        return ir.to_proto(ir.Model(self.graph, ir_version=10))

    def crossed(self, x: Any) -> Any:
        """[B,H,S,V]: attention to an encoder's states, all of them or its real tokens."""
        spec, op = self.spec, self.op
        states = self.input("encoder_hidden_states", spec.dtype, "b", "e", M)
        heads = {
            "q": (x, spec.heads, spec.size),
            "k": (states, spec.kv_heads, spec.size),
            "v": (states, spec.kv_heads, spec.width),
        }
        q, k, v = (
            self.headed(self.projection(of, f"c{name}", n * d), f"c{name}", n, d, None)
            for name, (of, n, d) in heads.items()
        )
        keep = None
        if spec.padding:
            mask = self.input("encoder_attention_mask", "int64", "b", "e")
            keep = op.Unsqueeze(op.Cast(mask, to=ir.DataType.BOOL), [1, 2])
        if self.early:
            k = op.Transpose(k, perm=[0, 1, 3, 2])
        return self.attended(q, k, v, (keep, None))

    # --- caches ---------------------------------------------------------------------------------

    @property
    def early(self) -> bool:
        """Whether keys are transposed before they are repeated: [B,K,D,T]."""
        return self.spec.key == "early" or self.spec.cache == "BKDP"

    def cached(self, heads: Any, name: str, size: int) -> Any:
        """New heads [B,K,S,D] behind their past: [B,K,T,D], or [B,K,D,T] for early keys."""
        spec, op = self.spec, self.op
        key = name == "key"
        perm, total = [0, 1, 2, 3], heads
        if spec.cache != "none":
            past, axis = self.past(name)
            order = {1: [0, 2, 1, 3], 2: [0, 1, 2, 3], 3: [0, 1, 3, 2]}[axis]
            perm = order  # each is its own inverse
            new = heads if axis == 2 else op.Transpose(heads, perm=order)
            total = present = op.Concat(past, new, axis=axis)
            if spec.cache == "cropped":
                present = op.Slice(total, [1 - WINDOW], [END], [2])
            shape: list[str | int] = ["b", spec.kv_heads, size]
            shape.insert(axis, f"present of {name}")
            self.output(f"present_{name}", present, *shape)
        if key and self.early:
            perm = [perm[axis] for axis in (0, 1, 3, 2)]
        return total if perm == [0, 1, 2, 3] else op.Transpose(total, perm=perm)

    # --- masks ----------------------------------------------------------------------------------

    def masks(self) -> tuple[Any, Any]:
        """What stays, bool [S,T] or [B,1,S,T], and what is added, [1,H,S,T] or [B,1,S,T]."""
        spec, op = self.spec, self.op
        if spec.mask == "fed":
            return None, self.input("attention_mask", spec.dtype, "b", 1, "s", "t")
        if not spec.masked:
            return None, None
        past, total, _ = self.lengths()
        rows = op.Unsqueeze(op.Range(past, total, 1), [1])
        columns = op.Range(0, total, 1)
        distance = op.Sub(rows, columns)
        keep = None if spec.mask == "none" else op.LessOrEqual(columns, rows)
        if spec.mask == "window":
            keep = op.And(keep, op.Less(distance, WINDOW))
        elif spec.mask == "chunked":
            size = WINDOW
            keep = op.And(keep, op.Equal(op.Div(rows, size), op.Div(columns, size)))
        elif spec.mask == "band":
            keep = op.LessOrEqual(op.Abs(distance), WINDOW)
        if spec.padding:
            mask = self.input("attention_mask", "int64", "b", "t")
            if spec.cache == "cropped":
                mask = op.Slice(mask, op.Unsqueeze(op.Neg(total), [0]), [END], [1])
            real = op.Unsqueeze(op.Cast(mask, to=ir.DataType.BOOL), [1, 2])
            keep = real if keep is None else op.And(keep, real)
        if spec.guard == "open":
            keep = op.Or(keep, op.Not(self.sees(keep)))
        return keep, self.bias(distance)

    def sees(self, keep: Any) -> Any:
        """bool [..,S,1]: rows that see anything."""
        op = self.op
        seen = op.ReduceMax(op.Cast(keep, to=ir.DataType.INT32), [-1])
        return op.Cast(seen, to=ir.DataType.BOOL)

    def bias(self, distance: Any) -> Any:
        """What is added to the scores head by head, [1,H,S,T], or None."""
        spec, op, h = self.spec, self.op, self.spec.heads
        if spec.mask == "alibi":
            slopes = np.array([-0.5 / (i + 1) for i in range(h)], spec.dtype).reshape(1, h, 1, 1)
            away = op.Cast(distance, to=self.dtype)
            return op.Mul(away, self.constant(slopes, "slopes"))
        if spec.mask == "relative":
            bucket = op.Max(op.Min(distance, 8), 0)
            found = op.Gather(self.weight("relative", 9, h), bucket)
            return op.Unsqueeze(op.Transpose(found, perm=[2, 0, 1]), [0])
        return None

    def hidden(self, scores: Any, keep: Any) -> Any:
        """The scores with those that do not stay hidden."""
        op, low = self.op, float(self.dtype.min)
        low, zero = (-math.inf if "inf" in self.spec.masking else low), self.number(0.0)
        match self.spec.masking:
            case "where-inf" | "where-min":
                return op.Where(keep, scores, self.number(low))
            case "fill-min":
                return op.Where(op.Not(keep), self.number(low), scores)
            case "add-inf" | "add-min":
                return op.Add(scores, op.Where(keep, zero, self.number(low)))
        gone = op.Sub(self.number(1.0), op.Cast(keep, to=self.dtype))
        return op.Add(scores, op.Mul(gone, self.number(-1e4)))

    # --- attention ------------------------------------------------------------------------------

    def attended(self, q: Any, k: Any, v: Any, masks: tuple[Any, Any]) -> Any:
        """[B,H,S,V] from queries [B,H,S,D], keys [B,K,T,D] (or [B,K,D,T]) and values [B,K,T,V]."""
        spec, op = self.spec, self.op
        five = spec.repeat == "five-axes" and spec.groups > 1
        keep, bias = masks
        q = self.split_heads(q) if five else q
        k = self.repeated(k, [spec.size, -1] if self.early else [-1, spec.size])
        v = self.repeated(v, [-1, spec.width])
        if spec.layout == "merged":
            q = op.Reshape(q, op.Concat([-1], op.Shape(q, start=2, end=4), axis=0))
            k = op.Reshape(k, op.Concat([-1], op.Shape(k, start=2, end=4), axis=0))
            v = op.Reshape(v, op.Concat([-1], op.Shape(v, start=2, end=4), axis=0))
        scores = self.scored(q, k)
        if spec.softcap:
            cap = self.number(spec.softcap)
            scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
        # [B * H,S,T] becomes [B,H,S,T] and back where a mask differs from row to row of it
        apart = spec.layout == "merged" and (bias is not None or spec.padding)
        merged = op.Shape(scores)
        if apart:
            shape = op.Concat(
                op.Shape(self.ids, end=1), [spec.heads], op.Shape(scores, start=1), axis=0
            )
            scores = op.Reshape(scores, shape)
        if bias is not None:
            if five:  # [1,H,S,T] to [1,K,G,S,T]; [B,1,S,T], which is fed, to [B,1,1,S,T]
                fed = spec.mask == "fed"
                bias = op.Unsqueeze(bias, [1]) if fed else self.split_heads(bias)
            scores = op.Add(scores, bias)
        if keep is not None:
            wide = op.Unsqueeze(keep, [1]) if five and spec.padding else keep
            scores = self.hidden(scores, wide)
        p = self.softmax(scores)
        if apart:
            p = op.Reshape(p, merged)
        if spec.guard == "isnan" and keep is not None:
            p = op.Where(op.IsNaN(p), self.number(0.0), p)
        if spec.key == "einsum":
            lanes = "bks" if five else "s"
            y = op.Einsum(p, v, equation=self.equation("{}st,{}td->{}sd", lanes))
        else:
            y = op.MatMul(p, v)
        if five or spec.layout == "merged":
            y = op.Reshape(y, [0, spec.heads, -1, spec.width] if five else self.apart(y))
        if spec.guard == "unattended" and keep is not None:
            y = op.Where(self.sees(keep), y, self.number(0.0))
        return y

    def apart(self, y: Any) -> Any:
        """The target that makes [B * H,S,V] [B,H,S,V]."""
        op = self.op
        return op.Concat([-1, self.spec.heads], op.Shape(y, start=1, end=3), axis=0)

    def split_heads(self, x: Any) -> Any:
        """[B,H,..] as [B,K,G,..]."""
        k, g = self.spec.kv_heads, self.spec.groups
        rows = self.op.Shape(x, start=2, end=4)
        return self.op.Reshape(x, self.op.Concat([0, k, g], rows, axis=0))

    def repeated(self, x: Any, tail: list[int]) -> Any:
        """[B,K,..] as [B,H,..], tail the sizes of its last two axes, -1 the length."""
        spec, op = self.spec, self.op
        g, h = spec.groups, spec.heads
        if g == 1:
            return x
        match spec.repeat:
            case "five-axes":  # an Einsum needs no axis of size 1
                return x if spec.key == "einsum" else op.Unsqueeze(x, [2])
            case "gather":
                return op.Gather(x, [i // g for i in range(h)], axis=1)
            case "other-way":
                return op.Tile(x, [1, g, 1, 1])
            case "tile":
                wide = op.Tile(op.Unsqueeze(x, [2]), [1, 1, g, 1, 1])
            case "concat":
                wide = op.Concat(*[op.Unsqueeze(x, [2])] * g, axis=2)
            case _:
                wide = op.Expand(op.Unsqueeze(x, [2]), [1, 1, g, 1, 1])
        return op.Reshape(wide, [0, h, *tail])

    def scored(self, q: Any, k: Any) -> Any:
        """The scaled product of queries and keys."""
        spec, op = self.spec, self.op
        root = 1 / math.sqrt(spec.size)
        if spec.scale in ("on-q", "roots"):
            q = op.Mul(q, self.number(math.sqrt(root) if spec.scale == "roots" else root))
        if spec.scale in ("on-k", "roots"):
            k = op.Mul(k, self.number(math.sqrt(root) if spec.scale == "roots" else root))
        if spec.key == "einsum":
            lanes = "bks" if spec.repeat == "five-axes" and spec.groups > 1 else "s"
            right = "{}dt" if self.early else "{}td"
            scores = op.Einsum(q, k, equation=self.equation(f"{{}}sd,{right}->{{}}st", lanes))
        else:
            rank = 3 if spec.layout == "merged" else 4
            rank += spec.repeat == "five-axes" and spec.groups > 1
            order = [*range(rank - 2), rank - 1, rank - 2]
            scores = op.MatMul(q, k if self.early else op.Transpose(k, perm=order))
        match spec.scale:
            case "mul":
                return op.Mul(scores, self.number(root))
            case "div":
                return op.Div(scores, self.number(1 / root))
            case "measured":
                size = op.Cast(op.Gather(op.Shape(q), -1), to=ir.DataType.FLOAT)
                return op.Div(scores, op.Cast(op.Sqrt(size), to=self.dtype))
        return scores

    def equation(self, text: str, lanes: str) -> str:
        """An equation with the letters of the leading axes put in."""
        five = lanes == "bks"
        if five:  # key heads are shared by G query heads
            return text.format("bkg", "bk", "bkg")
        lead = "n" if self.spec.layout == "merged" else "bh"
        return text.format(lead, lead, lead)

    def softmax(self, scores: Any) -> Any:
        op = self.op
        if self.spec.softmax == "float":
            wide = op.Softmax(op.Cast(scores, to=ir.DataType.FLOAT), axis=-1)
            return op.Cast(wide, to=self.dtype)
        return op.Softmax(scores, axis=-1)
