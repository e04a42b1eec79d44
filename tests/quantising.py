"""Experts as quantisers leave them: small models, and the numbers that their codes stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
E, H, INNER, K = 5, 64, 96, 2

ROUTERS = {
    "normalised": "Softmax TopK share",
    "shares": "Softmax TopK",
    "sigmoid": "Sigmoid TopK",
    "signed": "Tanh TopK",
}


def packed(codes: Array, bits: int) -> Array:
    """Codes [..., M] as bytes [..., ceil(M*bits/8)], the first in the lowest bits."""
    per = 8 // bits
    room = np.zeros((*codes.shape[:-1], -codes.shape[-1] % per), np.int64)
    each = np.concatenate([codes.astype(np.int64), room], -1)
    each = each.reshape(*each.shape[:-1], -1, per)
    return sum(each[..., at] << (bits * at) for at in range(per)).astype(np.uint8)


@dataclass
class Codes:
    """A weight [N, K]: codes without a sign, scales and zero points by block of a row.

    Attributes:
        codes: [N, K]; scales, zeros: [N, K/block].
    """

    codes: Array
    scales: Array
    zeros: Array
    bits: int

    @property
    def block(self) -> int:
        return int(self.codes.shape[1] // self.scales.shape[1])

    def numbers(self) -> Array:
        """[N, K] in float64."""
        spread = [np.repeat(each, self.block, 1) for each in (self.zeros, self.scales)]
        return (self.codes - spread[0].astype(np.float64)) * spread[1].astype(np.float64)


def drawn(
    rng: np.random.Generator, rows: int, inner: int, bits: int, block: int, *, zeros: bool
) -> Codes:
    """Random ones; blocks of whole rows where the block is 0; middle zero points unless `zeros`."""
    blocks = inner // block if block else 1
    middle = 2 ** (bits - 1)
    scales = (0.5 + rng.random((rows, blocks))) / middle / np.sqrt(inner) * 2
    return Codes(
        rng.integers(0, 2**bits, (rows, inner)),
        scales.astype(np.float32),
        rng.integers(0, 2**bits, (rows, blocks)) if zeros else np.full((rows, blocks), middle),
        bits,
    )


@dataclass
class Model:
    """A mixture of gated experts, every one of them on all tokens, and a mask.

    Args:
        how: "n_bits": MatMulNBits. "columns": DequantizeLinear of [K, N] before a MatMul; "rows":
            of [N, K], transposed behind it; "stack": of [E, K, N], cut apart behind it.
        signed: whether DequantizeLinear's codes are.
        zeros: whether there are zero points.
        level: MatMulNBits' accuracy_level.
        biases: "" for none; "inside" MatMulNBits, or "added" behind any product.
    """

    how: str = "n_bits"
    bits: int = 4
    block: int = 32
    zeros: bool = True
    signed: bool = True
    router: str = "normalised"
    level: int = 0
    hidden: int = H
    inner: int = INNER
    seed: int = 0
    kind: Any = np.float32
    activation: str = "Sigmoid"
    biases: str = ""
    weights: dict[str, list[Codes]] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        sizes = dict.fromkeys(("gate", "up"), (self.inner, self.hidden))
        for name, size in (sizes | {"down": (self.hidden, self.inner)}).items():
            self.weights[name] = [
                drawn(rng, *size, self.bits, self.block, zeros=self.zeros) for _ in range(E)
            ]
        self.added = {
            name: rng.standard_normal((E, found[0].codes.shape[0])).astype(self.kind)
            for name, found in self.weights.items()
        }
        columns = rng.standard_normal((self.hidden, E)) / np.sqrt(self.hidden)
        self.columns = columns.astype(self.kind)

    def proto(self) -> onnx.ModelProto:
        self._router()
        matrices = {} if self.how == "n_bits" else {n: self._matrices(n) for n in self.weights}
        for e in range(E):
            gate, up = (self._product(n, e, "x", matrices) for n in ("gate", "up"))
            act = self._node("Mul", [gate, self._node(self.activation, [gate])])
            down = self._product("down", e, self._node("Mul", [act, up]), matrices)
            weighs = self._node("Gather", ["W", self._held(f"e{e}", np.array([e]))], axis=1)
            self._node("Mul", [down, weighs], [f"y{e}"])
        total = self._node("Sum", [f"y{e}" for e in range(E)])
        self._node("Add", [total, "x"], ["y"])
        of = helper.np_dtype_to_tensor_dtype(np.dtype(self.kind))
        infos = [helper.make_tensor_value_info(n, of, ["t", self.hidden]) for n in "xy"]
        graph = helper.make_graph(self.nodes, "g", infos[:1], infos[1:], self.tensors)
        imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10)

    def wanted(self, x: Array) -> Array:
        """What it computes, in float64."""
        x = x.astype(np.float64)
        logits = x @ self.columns.astype(np.float64)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        p = {"sigmoid": 1 / (1 + np.exp(-logits)), "signed": np.tanh(logits)}.get(self.router, p)
        y = x.copy()
        each = {name: [c.numbers() for c in found] for name, found in self.weights.items()}
        for t, row in enumerate(p):
            chosen = np.argsort(-row)[:K]
            total = row[chosen].sum() if self.router == "normalised" else 1.0
            for e in chosen:
                a, b = (each[n][e] @ x[t] + self._bias(n, e) for n in ("gate", "up"))
                inner = a / (1 + np.exp(-a)) * b
                y[t] += row[e] / total * (each["down"][e] @ inner + self._bias("down", e))
        return y

    def _bias(self, name: str, e: int) -> Any:
        return self.added[name][e].astype(np.float64) if self.biases else 0.0

    def _router(self) -> None:
        logits = self._node("MatMul", ["x", self._held("R", self.columns)])
        first = ROUTERS[self.router].split()
        p = self._node(first[0], [logits])
        self._node("TopK", [p, self._held("k", np.array([K]))], ["v", "i"])
        w = "v"
        if "share" in first:
            total = self._node("ReduceSum", ["v", self._held("last", np.array([-1]))])
            w = self._node("Div", ["v", total])
        zero = self._held("zero", np.zeros((1, 1), self.kind))
        zeros = self._node("Expand", [zero, self._node("Shape", [p])])
        self._node("ScatterElements", [zeros, "i", w], ["W"], axis=1)

    def _product(self, name: str, e: int, x: str, matrices: dict[str, list[str]]) -> str:
        y = self._unbiased(name, e, x, matrices)
        if self.biases != "added":
            return y
        return self._node("Add", [y, self._held("added", self.added[name][e])])

    def _unbiased(self, name: str, e: int, x: str, matrices: dict[str, list[str]]) -> str:
        if matrices:
            return self._node("MatMul", [x, matrices[name][e]])
        codes = self.weights[name][e]
        rows, inner = codes.codes.shape
        inputs = [
            x,
            self._held("B", packed(codes.codes, self.bits).reshape(rows, inner // codes.block, -1)),
            self._held("S", codes.scales.astype(self.kind).reshape(-1)),
        ]
        if self.zeros:
            inputs.append(self._held("Z", packed(codes.zeros, self.bits).reshape(-1)))
        if self.biases == "inside":
            room = [""] * (5 - len(inputs))  # no zero points, no g_idx
            inputs += [*room, self._held("bias", self.added[name][e])]
        sizes = {"K": inner, "N": rows, "bits": self.bits, "block_size": codes.block}
        return self._node(
            "MatMulNBits", inputs, domain="com.microsoft", accuracy_level=self.level, **sizes
        )

    def _matrices(self, name: str) -> list[str]:
        """[K, N] of each expert."""
        found = self.weights[name]
        if self.how == "stack":
            cut = [self._dequantised(found, 1)]
            outputs = [f"{name}{e}" for e in range(E)]
            sizes = self._held("ones", np.ones(E, np.int64))
            self._node("Split", [*cut, sizes], [f"{each}s" for each in outputs], axis=0)
            first = self._held("first", np.array([0]))
            return [self._node("Squeeze", [f"{each}s", first]) for each in outputs]
        if self.how == "columns":
            return [self._dequantised([each], 0) for each in found]
        return [
            self._node("Transpose", [self._dequantised([each], 1)], perm=[1, 0]) for each in found
        ]

    def _dequantised(self, found: Sequence[Codes], axis: int) -> str:
        parts = [[c.codes for c in found], [c.scales for c in found], [c.zeros for c in found]]
        codes, scales, zeros = (np.stack(each) for each in parts)
        if self.how != "rows":
            codes, scales, zeros = (each.swapaxes(1, 2) for each in (codes, scales, zeros))
        if self.how != "stack":
            codes, scales, zeros = codes[0], scales[0], zeros[0]
        said = {"axis": axis, "block_size": self.block}
        if not self.block:
            free = codes.ndim - 2 if self.how == "rows" else codes.ndim - 1
            said, scales, zeros = {"axis": free}, scales.reshape(-1), zeros.reshape(-1)
        low = 2 ** (self.bits - 1) if self.signed else 0
        inputs = [self._coded(codes - low), self._held("S", scales.astype(self.kind))]
        if self.zeros or not self.signed:
            inputs.append(self._coded(zeros - low))
        return self._node("DequantizeLinear", inputs, **said)

    def _coded(self, codes: Array) -> str:
        word = f"{'' if self.signed else 'U'}INT{self.bits}"
        name = f"Q{len(self.tensors)}"
        kind = TensorProto.DataType.Value(word)
        self.tensors.append(helper.make_tensor(name, kind, codes.shape, codes.flatten().tolist()))
        return name

    def _held(self, name: str, array: Array) -> str:
        name = f"{name}_{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _node(
        self, kind: str, inputs: Sequence[str], outputs: Sequence[str] = (), **attributes: Any
    ) -> str:
        outputs = outputs or [f"{kind}_{len(self.nodes)}"]
        self.nodes.append(helper.make_node(kind, inputs, outputs, **attributes))
        return outputs[0]
