"""The parts of a random model around its attention: inputs, norms, projections, heads, rotary.

Each method of `Parts` writes one part in the spelling that the spec says, with onnxscript's
builder. Letters as in `tests.random_models`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder

from tests.graphs import weight
from tests.random_spec import Spec

M, VOCABULARY = 26, 37
END = 2**31 - 1
TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


class Parts:
    """A graph that is being written."""

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
        """What a projection's weights are multiplied by.

        The scale of the scores, where it is folded in them; in float16 a half for queries, so that
        its noise on softer scores stays well inside what is allowed.
        """
        soft = 0.5 if self.spec.dtype == "float16" else 1.0
        root = 1 / math.sqrt(self.spec.size) if self.spec.scale == "none" else 1.0
        gains = {"q": soft * root, "q2": soft * root, "qkv": math.sqrt(soft * root), "cq": soft}
        return gains.get(name, 1.0)

    def constant(self, array: np.ndarray[Any, Any], name: str) -> Any:
        known = self.graph.initializers.get(name)
        return known or self.op.initializer(ir.tensor(array, name=name), name)

    def number(self, number: float) -> Any:
        return self.constant(np.array(number, self.spec.dtype), f"number {number!r}")

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
        around_zero = gain * (weight(f"b{name}", (n,)) - 1)
        bias = self.constant(around_zero.astype(spec.dtype), f"b{name}") if spec.bias else None
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

    def mixed(self, y: Any, name: str) -> Any:
        """The heads' answers [B,H,S,V] as [B,S,M]."""
        size = self.spec.heads * self.spec.width
        rows = self.op.Reshape(self.op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, size])
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

    # --- lengths --------------------------------------------------------------------------------

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
