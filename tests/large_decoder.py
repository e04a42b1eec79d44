"""A decoder of any size, spelled as exporters do, its weights in a file beside it.

    path = write_decoder(folder, Sizes(layers=32, hidden=4096), contents="random")

Contents "random" fill the file with numbers of a trained model's size; "sparse" leave a hole that
reads as zeros and takes no room.

Shapes: B batch, S new tokens, P past, T both, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BLOCK = 1 << 22  # random numbers; each weight is cut out of as many as it takes


@dataclass(frozen=True)
class Sizes:
    """How large the decoder is; `bytes` says what that comes to."""

    layers: int = 2
    hidden: int = 96
    inner: int = 160
    heads: int = 6
    kv_heads: int = 2
    vocabulary: int = 128

    @property
    def size(self) -> int:
        """D."""
        return self.hidden // self.heads

    def weights(self) -> Iterator[tuple[str, list[int]]]:
        """Every weight's name and shape."""
        rows = self.kv_heads * self.size
        yield "embed", [self.vocabulary, self.hidden]
        for layer in range(self.layers):
            at = f"layers.{layer}."
            yield at + "norm1", [self.hidden]
            yield at + "q", [self.hidden, self.hidden]
            yield at + "k", [self.hidden, rows]
            yield at + "v", [self.hidden, rows]
            yield at + "o", [self.hidden, self.hidden]
            yield at + "norm2", [self.hidden]
            yield at + "gate", [self.hidden, self.inner]
            yield at + "up", [self.hidden, self.inner]
            yield at + "down", [self.inner, self.hidden]
        yield "norm", [self.hidden]
        yield "head", [self.hidden, self.vocabulary]

    @property
    def bytes(self) -> int:
        return sum(4 * int(np.prod(shape)) for _, shape in self.weights())


def write_decoder(
    folder: Path, sizes: Sizes, contents: Literal["random", "sparse"] = "random"
) -> Path:
    """Write model.onnx and model.data; returns the first."""
    tensors, offset = [], 0
    with (folder / "model.data").open("wb") as file:
        rng = np.random.default_rng(0)
        block = rng.standard_normal(BLOCK, np.float32)
        for name, shape in sizes.weights():
            tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT)
            tensor.data_location = TensorProto.EXTERNAL
            count = int(np.prod(shape))
            for key, value in (
                ("location", "model.data"),
                ("offset", offset),
                ("length", 4 * count),
            ):
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            if contents == "random":
                start = int(rng.integers(BLOCK))
                scale = np.float32(1 / np.sqrt(shape[0]) if len(shape) > 1 else 0.1)
                # What layers add stays small beside what a token is, as training leaves it: else
                # rounding grows from layer to layer, in any runtime.
                if name.endswith((".o", ".down")):
                    scale /= np.float32(np.sqrt(2 * sizes.layers))
                scale = np.float32(1) if name == "embed" else scale
                shift = np.float32(0 if len(shape) > 1 else 1)
                rolled = np.roll(block, start) * scale + shift
                for done in range(0, count, BLOCK):
                    file.write(rolled[: count - done].tobytes())
            offset += 4 * count
        file.truncate(offset)
    path = folder / "model.onnx"
    path.write_bytes(_model(sizes, tensors).SerializeToString())
    return path


def _model(sizes: Sizes, tensors: list[TensorProto]) -> onnx.ModelProto:
    graph = _Graph(sizes, tensors)
    return helper.make_model(
        graph.proto(), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )


class _Graph:
    """Writes the nodes, one module after the other."""

    def __init__(self, sizes: Sizes, tensors: list[TensorProto]) -> None:
        self.sizes = sizes
        self.tensors = tensors
        self.nodes: list[onnx.NodeProto] = []
        self.inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["B", length])
            for name, length in (("input_ids", "S"), ("attention_mask", "T"), ("position_ids", "S"))
        ]
        self.outputs: list[onnx.ValueInfoProto] = []
        self.scope = ""

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"/{self.scope}/{kind}_{len(self.nodes)}"
        output = f"{name}_output_0"
        self.nodes.append(helper.make_node(kind, inputs, [output], name, **attributes))
        return output

    def constant(self, value: object, dtype: type = np.int64) -> str:
        array = np.array(value, dtype)
        name = f"constant.{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(array, name))
        return name

    def proto(self) -> onnx.GraphProto:
        x = self.op("Gather", "embed", "input_ids")
        cos, sin = self.tables()
        mask = self.mask()
        for layer in range(self.sizes.layers):
            x = self.layer(layer, x, cos, sin, mask)
        self.scope = "model"
        logits = self.op("MatMul", self.norm(x, "norm"), "head")
        self.nodes[-1].output[0] = "logits"
        del logits
        shape = ["B", "S", self.sizes.vocabulary]
        info = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
        return helper.make_graph(
            self.nodes, "decoder", self.inputs, [info, *self.outputs], self.tensors
        )

    def tables(self) -> tuple[str, str]:
        """cos and sin [B,1,S,D]."""
        self.scope = "model/rotary_emb"
        size = self.sizes.size
        steps = 1 / 10000.0 ** (np.arange(0, size, 2) / size)
        places = self.op("Cast", self.op("Unsqueeze", "position_ids", self.constant([2])), to=1)
        angles = self.op("Mul", places, self.constant(steps, np.float32))
        both = self.op("Unsqueeze", self.op("Concat", angles, angles, axis=-1), self.constant([1]))
        return self.op("Cos", both), self.op("Sin", both)

    def mask(self) -> str:
        """float [B,1,S,T]: 0 where a key may be seen."""
        self.scope = "model"
        past = self.op("Shape", "past.0.key", start=2, end=3)
        new = self.op("Shape", "input_ids", start=1, end=2)
        total = self.op("Add", past, new)
        zero, one = self.constant(0), self.constant(1)
        columns = self.op("Range", zero, self.op("Squeeze", total), one)
        rows = self.op("Add", self.op("Range", zero, self.op("Squeeze", new), one), past)
        seen = self.op("LessOrEqual", columns, self.op("Unsqueeze", rows, self.constant([1])))
        kept = self.op("Cast", self.op("Unsqueeze", "attention_mask", self.constant([1, 2])), to=9)
        both = self.op("And", self.op("Unsqueeze", seen, self.constant([0, 1])), kept)
        lowest = self.constant(np.finfo(np.float32).min, np.float32)
        return self.op("Where", both, self.constant(0.0, np.float32), lowest)

    def norm(self, x: str, weight: str) -> str:
        squares = self.op("Pow", x, self.constant(2.0, np.float32))
        mean = self.op("ReduceMean", squares, self.constant([-1]))
        root = self.op("Sqrt", self.op("Add", mean, self.constant(1e-6, np.float32)))
        return self.op("Mul", weight, self.op("Mul", x, self.op("Reciprocal", root)))

    def layer(self, layer: int, x: str, cos: str, sin: str, mask: str) -> str:
        sizes, at = self.sizes, f"layers.{layer}."
        self.scope = f"model/{at[:-1]}/self_attn"
        normed = self.norm(x, at + "norm1")
        q = self.turned(self.heads(normed, at + "q", sizes.heads), cos, sin)
        k = self.turned(self.heads(normed, at + "k", sizes.kv_heads), cos, sin)
        v = self.heads(normed, at + "v", sizes.kv_heads)
        k, v = (self.cached(each, f"{layer}.{kind}") for each, kind in ((k, "key"), (v, "value")))
        k, v = self.repeated(k), self.repeated(v)
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = self.op("Mul", scores, self.constant(sizes.size**-0.5, np.float32))
        weights = self.op("Softmax", self.op("Add", scores, mask), axis=-1)
        y = self.op("Transpose", self.op("MatMul", weights, v), perm=[0, 2, 1, 3])
        y = self.op("Reshape", y, self.constant([0, 0, sizes.hidden]))
        x = self.op("Add", x, self.op("MatMul", y, at + "o"))
        self.scope = f"model/{at[:-1]}/mlp"
        normed = self.norm(x, at + "norm2")
        gate = self.op("MatMul", normed, at + "gate")
        gate = self.op("Mul", gate, self.op("Sigmoid", gate))
        wide = self.op("Mul", gate, self.op("MatMul", normed, at + "up"))
        return self.op("Add", x, self.op("MatMul", wide, at + "down"))

    def heads(self, x: str, weight: str, count: int) -> str:
        """[B,count,S,D]."""
        split = self.constant([0, 0, count, self.sizes.size])
        return self.op(
            "Transpose", self.op("Reshape", self.op("MatMul", x, weight), split), perm=[0, 2, 1, 3]
        )

    def turned(self, x: str, cos: str, sin: str) -> str:
        half = self.sizes.size // 2
        last, end = self.constant([3]), self.constant([np.iinfo(np.int64).max])
        first = self.op("Slice", x, self.constant([0]), self.constant([half]), last)
        second = self.op("Slice", x, self.constant([half]), end, last)
        turned = self.op("Concat", self.op("Neg", second), first, axis=-1)
        return self.op("Add", self.op("Mul", x, cos), self.op("Mul", turned, sin))

    def cached(self, x: str, name: str) -> str:
        """[B,K,T,D]: behind its past."""
        for names, length, infos in (("past", "P", self.inputs), ("present", "T", self.outputs)):
            shape = ["B", self.sizes.kv_heads, length, self.sizes.size]
            infos.append(helper.make_tensor_value_info(f"{names}.{name}", TensorProto.FLOAT, shape))
        self.nodes.append(
            helper.make_node(
                "Concat",
                [f"past.{name}", x],
                [f"present.{name}"],
                f"/{self.scope}/Concat.{name}",
                axis=2,
            )
        )
        return f"present.{name}"

    def repeated(self, x: str) -> str:
        """[B,H,T,D]."""
        sizes = self.sizes
        groups = sizes.heads // sizes.kv_heads
        shape = self.op("Shape", x)
        batch, length = (
            self.op("Slice", shape, self.constant([a]), self.constant([a + 1])) for a in (0, 2)
        )
        kinds = {"wide": (sizes.kv_heads, groups), "flat": (sizes.heads,)}
        targets = {
            name: self.op(
                "Concat",
                batch,
                *(self.constant([n]) for n in counts),
                length,
                self.constant([sizes.size]),
                axis=0,
            )
            for name, counts in kinds.items()
        }
        wide = self.op("Expand", self.op("Unsqueeze", x, self.constant([2])), targets["wide"])
        return self.op("Reshape", wide, targets["flat"])
