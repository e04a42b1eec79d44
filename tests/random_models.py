"""The model that a spec stands for, written with onnxscript's builder: one function a choice.

    model = build(Spec(kv_heads=2, groups=3, mask="window", cache="BPKD"))

An embedding, a norm, attention around a residual, and for some specs a second such layer. Letters
as in `tests.random_spec`, and H query heads, V size of a value, M width, E encoder tokens, R turned
lanes. A value's layout stands in its name: `k_BKTD`, or `k_BKDT` with the last two axes swapped.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript import GraphBuilder

from tests.graphs import weight
from tests.random_spec import WINDOW, Spec

M, VOCABULARY, LONGEST = 26, 37, 320
END = 2**31 - 1
TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


def build(spec: Spec) -> onnx.ModelProto:
    """The model of a spec, weights in it.

    Inputs: input_ids int64 [B,S]; position_ids, attention_mask, past_key, past_value and an
    encoder's states as the spec has them. Outputs: y [B,S,M], present_key, present_value.
    """
    return Writer(spec).model()


class Writer:
    """Writes one model; each method writes one part of it in the spelling that the spec says."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.dtype = TYPES[spec.dtype]
        opsets = {"": 20, "com.microsoft": 1}
        self.graph = ir.Graph([], [], nodes=[], opset_imports=opsets, name="random")
        self.op = GraphBuilder(self.graph).op
        self.ids = self.input("input_ids", "int64", "b", "s")

    def input(self, name: str, dtype: str, *shape: str | int) -> Any:
        known = [value for value in self.graph.inputs if value.name == name]
        if known:
            return known[0]
        kind = ir.DataType.INT64 if dtype == "int64" else TYPES[dtype]
        value = ir.val(name, dtype=kind, shape=list(shape))
        self.graph.inputs.append(value)
        return value

    def output(self, name: str, value: Any, *shape: str | int) -> None:
        value = self.op.Identity(value) if value in self.graph.outputs else value
        value.name, value.dtype, value.shape = name, self.dtype, ir.Shape(shape)
        self.graph.outputs.append(value)

    def weight(self, name: str, *shape: int, gain: float = 1.0) -> Any:
        return self.constant((gain * weight(name, shape)).astype(self.spec.dtype), name)

    def gain(self, name: str) -> float:
        """What a projection's weights are multiplied by: the scale, where it is folded in them."""
        if self.spec.scale != "none" or name[0] == "c":
            return 1.0
        root = 1 / math.sqrt(self.spec.size)
        return {"q": root, "q2": root, "qkv": math.sqrt(root)}.get(name, 1.0)

    def constant(self, array: np.ndarray[Any, Any], name: str) -> Any:
        known = self.graph.initializers.get(name)
        return known or self.op.initializer(ir.tensor(array, name=name), name)

    def number(self, number: float) -> Any:
        return self.constant(np.array(number, self.spec.dtype), f"number {number!r}")

    # --- the whole ------------------------------------------------------------------------------

    def model(self) -> onnx.ModelProto:
        spec, op = self.spec, self.op
        x = op.Gather(self.weight("table", VOCABULARY, M), self.ids)
        q, k, v = self.projected(self.norm(x, "norm"))
        cos_sin = self.tables() if spec.rotary != "none" else None
        q_BHSD = self.headed(q, "q", spec.heads, spec.size, cos_sin)
        k_BKSD = self.headed(k, "k", spec.kv_heads, spec.size, cos_sin)
        v_BKSD = self.headed(v, "v", spec.kv_heads, spec.width, None)
        k, v = self.cached(k_BKSD, "key", spec.size), self.cached(v_BKSD, "value", spec.width)
        masks = self.masks()
        x = op.Add(x, self.mixed(self.attended(q_BHSD, k, v, masks), "first"))
        if spec.second == "shared":
            q = self.projection(self.norm(x, "norm2"), "q2", spec.heads * spec.size)
            q_BHSD = self.headed(q, "q2", spec.heads, spec.size, cos_sin)
            x = op.Add(x, self.mixed(self.attended(q_BHSD, k, v, masks), "second"))
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

    # --- norms and projections ------------------------------------------------------------------

    def norm(self, x: Any, name: str) -> Any:
        spec, op = self.spec, self.op
        if spec.norm == "none":
            return op.Add(x, self.number(0.1))
        w = self.weight(f"{name} weight", M)
        if spec.norm.startswith("layer"):
            deviation = op.Sub(x, op.ReduceMean(x, [-1]))
            square = (
                op.Mul(deviation, deviation) if spec.norm == "layer-mul" else op.Pow(deviation, 2.0)
            )
            root = op.Sqrt(op.Add(op.ReduceMean(square, [-1]), self.number(1e-3)))
            return op.Add(op.Mul(op.Div(deviation, root), w), self.weight(f"{name} bias", M))
        return self.rms(x, w, spec.norm)

    def rms(self, x: Any, w: Any, spelling: str) -> Any:
        """An RMS norm, in float32 whatever the model's type, as transformers writes it."""
        op, half = self.op, self.spec.dtype != "float32"
        wide = op.Cast(x, to=ir.DataType.FLOAT) if half else x
        square = op.Pow(wide, 2.0) if spelling == "rms-pow" else op.Mul(wide, wide)
        mean = op.Add(op.ReduceMean(square, [-1]), 1e-5)
        match spelling:
            case "rms-mul":
                y = op.Mul(wide, op.Pow(mean, -0.5))
            case "rms-pow":
                y = op.Mul(wide, op.Reciprocal(op.Sqrt(mean)))
            case _:
                y = op.Div(wide, op.Sqrt(mean))
        return op.Mul(w, op.Cast(y, to=self.dtype) if half else y)

    def projected(self, x: Any) -> Sequence[Any]:
        """Queries, keys and values as [B,S,heads * size]."""
        spec, op = self.spec, self.op
        sizes = [spec.heads * spec.size, spec.kv_heads * spec.size, spec.kv_heads * spec.width]
        match spec.packed:
            case "qkv":
                packed = self.projection(x, "qkv", sum(sizes))
                return op.Split(packed, sizes, axis=-1, _outputs=3)
            case "kv":
                packed = self.projection(x, "kv", sum(sizes[1:]))
                q = self.projection(x, "q", sizes[0])
                return (q, *op.Split(packed, sizes[1:], axis=-1, _outputs=2))
            case "by-head":
                parts = [spec.groups, 1, 1]
                packed = self.projection(x, "qkv", sum(sizes))
                shape = [0, 0, spec.kv_heads, sum(parts), spec.size]
                split = op.Split(op.Reshape(packed, shape), parts, axis=3, _outputs=3)
                return [op.Reshape(each, [0, 0, n]) for each, n in zip(split, sizes, strict=True)]
        return [self.projection(x, name, n) for name, n in zip("qkv", sizes, strict=True)]

    def projection(self, x: Any, name: str, n: int) -> Any:
        """[B,S,M] to [B,S,N]."""
        spec, op, m = self.spec, self.op, M
        gain = self.gain(name)
        bias = self.weight(f"b{name}", n, gain=gain) if spec.bias else None
        if spec.projection in ("gemm", "linear"):
            turned = spec.projection == "linear"
            w = self.weight(f"w{name}", *((n, m) if turned else (m, n)), gain=gain)
            flat = op.Gemm(op.Reshape(x, [-1, m]), w, bias, transB=int(turned))
            return op.Reshape(flat, op.Concat(op.Shape(x, start=0, end=2), [n], axis=0))
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        match spec.projection:
            case "nbits":
                blocks = -(-m // 16)
                packed = rng.integers(0, 256, (n, blocks, 8)).astype(np.uint8)
                scales = (gain * rng.uniform(0.02, 0.05, n * blocks)).astype(spec.dtype)
                quantized = [self.constant(packed, f"w{name}"), self.constant(scales, f"s{name}")]
                sizes = {"K": m, "N": n, "bits": 4, "block_size": 16}
                y = op.MatMulNBits(x, *quantized, **sizes, _domain="com.microsoft")
                y.dtype = self.dtype
            case "dequantized":
                integers = rng.integers(-127, 128, (m, n)).astype(np.int8)
                scales = (gain * rng.uniform(0.002, 0.004, n)).astype(spec.dtype)
                quantized = [self.constant(integers, f"w{name}"), self.constant(scales, f"s{name}")]
                y = op.MatMul(x, op.DequantizeLinear(*quantized, axis=1))
            case _:
                y = op.MatMul(x, self.weight(f"w{name}", m, n, gain=gain))
        return y if bias is None else op.Add(y, bias)

    def mixed(self, y_BHSV: Any, name: str) -> Any:
        """The heads' answers as [B,S,M]."""
        size = self.spec.heads * self.spec.width
        rows = self.op.Reshape(self.op.Transpose(y_BHSV, perm=[0, 2, 1, 3]), [0, 0, size])
        return self.op.MatMul(rows, self.weight(f"{name} out", size, M))

    # --- heads, rotary --------------------------------------------------------------------------

    def headed(self, x: Any, name: str, heads: int, size: int, cos_sin: Any) -> Any:
        """[B,S,heads * size] to [B,heads,S,size], normed and turned on the way."""
        spec, op = self.spec, self.op
        x = op.Reshape(x, [0, 0, heads, size])
        if spec.head_norm and name[0] in "qk":
            x = self.rms(x, self.weight(f"{name} norm", size, gain=self.gain(name)), "rms-div")
        if cos_sin and spec.turned_at == "rows":
            x = self.turned(x, *(op.Unsqueeze(table, [2]) for table in cos_sin))
        x = op.Transpose(x, perm=[0, 2, 1, 3])
        if cos_sin and spec.turned_at == "heads":
            x = self.turned(x, *(op.Unsqueeze(table, [1]) for table in cos_sin))
        return x

    def tables(self) -> tuple[Any, Any]:
        """cos and sin, [B,S,R/2], or [1,S,R/2] where positions are counted."""
        spec, op, half = self.spec, self.op, self.spec.turned // 2
        if spec.tables == "counted":
            past, total, _ = self.lengths()
            positions = op.Unsqueeze(op.Range(past, total, 1), [0])
        else:
            positions = self.input("position_ids", "int64", "b", "s")
        frequencies = np.array([0.7**i for i in range(half)], np.float32)
        if spec.tables == "gathered":
            angles = np.arange(10000, dtype=np.float32)[:, None] * frequencies
            both = (("cos", np.cos(angles)), ("sin", np.sin(angles)))
            cos, sin = (
                op.Gather(self.constant(array.astype(spec.dtype), f"{name} table"), positions)
                for name, array in both
            )
            return cos, sin
        wide = op.Unsqueeze(op.Cast(positions, to=ir.DataType.FLOAT), [2])
        angles = op.Mul(wide, self.constant(frequencies, "frequencies"))
        cos, sin = (op.Cast(each, to=self.dtype) for each in (op.Cos(angles), op.Sin(angles)))
        return cos, sin

    def turned(self, x: Any, cos: Any, sin: Any) -> Any:
        """x [..,D] with its first R lanes turned."""
        spec, op, r = self.spec, self.op, self.spec.turned
        rest = None
        if r < spec.size:
            x, rest = op.Slice(x, [0], [r], [-1]), op.Slice(x, [r], [END], [-1])
        half = r // 2
        match spec.rotary:
            case "halves" | "split":
                if spec.rotary == "split":
                    low, high = op.Split(x, [half, half], axis=-1, _outputs=2)
                else:
                    low, high = op.Slice(x, [0], [half], [-1]), op.Slice(x, [half], [END], [-1])
                other = op.Concat(op.Neg(high), low, axis=-1)
                cos, sin = op.Concat(cos, cos, axis=-1), op.Concat(sin, sin, axis=-1)
                y = op.Add(op.Mul(x, cos), op.Mul(other, sin))
            case "parts":
                low, high = op.Split(x, [half, half], axis=-1, _outputs=2)
                y = op.Concat(*self._turn(low, high, cos, sin), axis=-1)
            case _:
                if spec.rotary == "complex":
                    pairs = op.Reshape(x, [0, 0, 0, half, 2])
                    even, odd = (op.Gather(pairs, i, axis=-1) for i in (0, 1))
                else:
                    even, odd = (op.Slice(x, [i], [END], [-1], [2]) for i in (0, 1))
                both = [op.Unsqueeze(each, [-1]) for each in self._turn(even, odd, cos, sin)]
                y = op.Reshape(op.Concat(*both, axis=-1), [0, 0, 0, r])
        return y if rest is None else op.Concat(y, rest, axis=-1)

    def _turn(self, a: Any, b: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
        op = self.op
        first = op.Sub(op.Mul(a, cos), op.Mul(b, sin))
        return first, op.Add(op.Mul(b, cos), op.Mul(a, sin))

    # --- caches ---------------------------------------------------------------------------------

    @property
    def early(self) -> bool:
        """Whether keys are transposed before they are repeated: [B,K,D,T]."""
        return self.spec.key == "early" or self.spec.cache == "BKDP"

    def past(self, name: str) -> tuple[Any, int]:
        """The past of keys or values, and the axis it grows along."""
        spec = self.spec
        size = spec.size if name == "key" else spec.width
        k, layout = spec.kv_heads, spec.cache
        if layout == "BPKD":
            return self.input(f"past_{name}", spec.dtype, "b", "p", k, size), 1
        if layout == "BKDP" and name == "key":
            return self.input(f"past_{name}", spec.dtype, "b", k, size, "p"), 3
        return self.input(f"past_{name}", spec.dtype, "b", k, "p", size), 2

    def cached(self, new_BKSD: Any, name: str, size: int) -> Any:
        """[B,K,T,D], or [B,K,D,T] for keys that are transposed early; the present is an output."""
        spec, op = self.spec, self.op
        key = name == "key"
        perm, total = [0, 1, 2, 3], new_BKSD
        if spec.cache != "none":
            past, axis = self.past(name)
            order = {1: [0, 2, 1, 3], 2: [0, 1, 2, 3], 3: [0, 1, 3, 2]}[axis]
            perm = order  # each is its own inverse
            new = new_BKSD if axis == 2 else op.Transpose(new_BKSD, perm=order)
            total = present = op.Concat(past, new, axis=axis)
            if spec.cache == "cropped":
                present = op.Slice(total, [1 - WINDOW], [END], [2])
            shape: list[str | int] = ["b", spec.kv_heads, size]
            shape.insert(axis, f"present of {name}")
            self.output(f"present_{name}", present, *shape)
        if key and self.early:
            perm = [perm[axis] for axis in (0, 1, 3, 2)]
        return total if perm == [0, 1, 2, 3] else op.Transpose(total, perm=perm)

    def lengths(self) -> tuple[Any, Any, Any]:
        """Past, total and new length, int64 scalars."""
        op = self.op
        new = op.Squeeze(op.Shape(self.ids, start=1, end=2), [0])
        if self.spec.cache == "none":
            past = op.Sub(new, new)
        else:
            value, axis = self.past("key")
            past = op.Squeeze(op.Shape(value, start=axis, end=axis + 1), [0])
        return past, op.Add(past, new), new

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
            case "five-axes":
                return op.Unsqueeze(x, [2])
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
            return text.format("bkg", "bkz", "bkg")
        lead = "n" if self.spec.layout == "merged" else "bh"
        return text.format(lead, lead, lead)

    def softmax(self, scores: Any) -> Any:
        op = self.op
        if self.spec.softmax == "float":
            wide = op.Softmax(op.Cast(scores, to=ir.DataType.FLOAT), axis=-1)
            return op.Cast(wide, to=self.dtype)
        return op.Softmax(scores, axis=-1)
