"""Exported models to test with: graphs real exporters wrote, with weights grown from a seed.

    for entry in corpus():
        model = entry.load()                                   # an onnx.ModelProto, weights and all
        feeds = entry.feeds(batch=2, new=4, past=3)            # inputs by name

The stored files hold everything the exporter wrote except random weights: each of those is a
tensor without data whose metadata says how to grow it. Every form of one model grows the same
weights, so two exports of one model can be compared with each other.

Shapes: B batch, S new tokens, P past tokens, K key/value heads, D head size, E encoder tokens.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import lzma
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

GROW = "onnxgen.grow"
"""Key of a stored tensor's metadata that says how to grow it; see `Growth`."""

CORPUS = "onnxgen.corpus"
"""Key of a stored model's metadata that says what it is, as JSON; see `CorpusEntry.info`."""

_FOLDER = Path(__file__).resolve().parent.parent / "tests" / "corpus"
_DEMO = Path(__file__).resolve().parent / "demo" / "decoder.onnx.xz"


@dataclass(frozen=True)
class Growth:
    """How to grow a weight: draw a parameter from a normal distribution, cut, permute, reshape.

    Attributes:
        key: what the seed derives from; a parameter's path where the tensor is a whole parameter.
        mean: mean of the distribution.
        std: standard deviation of the distribution.
        shape: the parameter's shape.
        axes: the permutation of the parameter's axes that the exporter stored, or ().
        part: what was cut out of the parameter, as in `2,:112`, or "".
    """

    key: str
    mean: float
    std: float
    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()
    part: str = ""

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        shape += f"[{self.part}]" if self.part else ""
        axes = ",".join(map(str, self.axes)) or "-"
        return f"normal {self.mean!r} {self.std!r} {shape} {axes} {self.key}"

    @classmethod
    def parse(cls, text: str) -> Growth:
        """Read the text that `str` writes.

        Raises:
            ValueError: the text is none of it.
        """
        kind, mean, std, shape, axes, key = text.split(" ", 5)
        if kind != "normal":
            raise ValueError(f"unknown distribution {kind!r} in {text!r}")
        shape, _, part = shape.removesuffix("]").partition("[")
        return cls(
            key=key,
            mean=float(mean),
            std=float(std),
            shape=tuple(int(dim) for dim in shape.split("x") if dim),
            axes=() if axes == "-" else tuple(int(axis) for axis in axes.split(",")),
            part=part,
        )

    @staticmethod
    def indices(part: str) -> tuple[int | slice, ...]:
        """Read a part, `2,:112`, as what indexes an array."""
        return tuple(
            slice(*(int(end) if end else None for end in text.split(":")))
            if ":" in text
            else int(text)
            for text in part.split(",")
        )

    def values(self, seed: int = 0) -> npt.NDArray[np.float32]:
        """Return the grown parameter, float32, in the order of axes that the exporter stored."""
        digest = hashlib.sha256(f"{seed}:{self.key}".encode()).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
        drawn = generator.standard_normal(math.prod(self.shape)) * self.std + self.mean
        values = drawn.astype(np.float32).reshape(self.shape)
        values = values[self.indices(self.part)] if self.part else values
        return values.transpose(self.axes) if self.axes else values


@dataclass(frozen=True)
class CorpusEntry:
    """One stored export: a model in a form, for instance llama as `dynamo20`.

    A form is an exporter (`torchscript`, `dynamo18`, `dynamo20`, `dynamo23`, `transformers`,
    `builder`, which is onnxruntime-genai's), followed by what is special about the export:
    `-eager`, `-decode` (one new token), `-static` (a cache of fixed length), `-prefill` (no past),
    `-fp16`, `-cropped` (sliding layers keep the last W-1 tokens), `-sliding` (a cache that knows
    its window, not cropped), `-batched`, `-looped`, `-dense`, `-bmm` (how experts run),
    `-unsqueezed` (Llama 4's rotary table), `-optimized` (by ONNX Runtime's transformers
    optimizer).
    """

    model: str
    form: str
    path: Path

    @property
    def name(self) -> str:
        """`model/form`."""
        return f"{self.model}/{self.form}"

    @cached_property
    def stored(self) -> onnx.ModelProto:
        """The model as stored, without its random weights. Do not change it."""
        return read_stored(self.path)

    @cached_property
    def info(self) -> dict[str, Any]:
        """What the model is, as recorded when it was exported.

        Keys: `model`, `form`, `kind`, `torch`, `transformers`, `opset`, `dims`, `inputs` and
        `outputs` (name to `role`, `shape`, `dtype`), `runs` (the [batch, new, past] that were run
        and agree with torch) and `fails` (those that the export itself does not support, with
        what happened).
        """
        return _info(self.stored)

    def load(self, seed: int = 0) -> onnx.ModelProto:
        """Return a new copy of the model with its weights grown."""
        return grow(read_stored(self.path), seed)

    def feeds(
        self, batch: int = 1, new: int = 4, past: int = 0, seed: int = 0
    ) -> dict[str, npt.NDArray[Any]]:
        """Make inputs for this entry; see `make_feeds`."""
        return make_feeds(self.info, batch, new, past, seed)


def corpus(pattern: str = "*", folder: Path | None = None) -> list[CorpusEntry]:
    """List the stored exports, sorted by name.

    Args:
        pattern: a shell pattern over `model/form`, for instance `llama/*` or `*/dynamo20*`.
        folder: where the corpus is; by default the one of this checkout (wheels have none).
    """
    folder = folder or _FOLDER
    suffix = ".onnx.xz"
    entries = [
        CorpusEntry(path.parent.name, path.name.removesuffix(suffix), path)
        for path in sorted(folder.glob(f"*/*{suffix}"))
    ]
    return [entry for entry in entries if fnmatch.fnmatchcase(entry.name, pattern)]


def load_corpus_model(path: Path | str, seed: int = 0) -> onnx.ModelProto:
    """Read a stored export and grow its weights.

    Args:
        path: an `.onnx.xz` file, or `model/form` of the checkout's corpus.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.name.endswith(".onnx.xz"):
        path = _FOLDER / f"{path}.onnx.xz"
    return grow(read_stored(path), seed)


def read_stored(path: Path) -> onnx.ModelProto:
    """Read a stored export as it is, its random weights without data.

    Raises:
        FileNotFoundError: there is no such file.
    """
    model = onnx.ModelProto()
    model.ParseFromString(lzma.decompress(path.read_bytes()))
    return model


def grow(model: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """Fill in the weights that were left out of a stored model, in place, and return it.

    The same seed grows the same weights on every machine. Tensors that have data, and models
    that were not stored by the corpus, are left alone.
    """
    for tensor in tensors(model):
        for index, prop in enumerate(tensor.metadata_props):
            if prop.key == GROW:
                values = Growth.parse(prop.value).values(seed).reshape(tuple(tensor.dims))
                dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
                tensor.raw_data = np.ascontiguousarray(values, dtype=dtype).tobytes()
                del tensor.metadata_props[index]
                break
    return model


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a model: initializers and tensor attributes, subgraphs included."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR:
            yield attribute.t
        elif attribute.type == onnx.AttributeProto.GRAPH:
            yield from _graph_tensors(attribute.g)
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            for graph in attribute.graphs:
                yield from _graph_tensors(graph)


def make_feeds(
    info: Mapping[str, Any], batch: int = 1, new: int = 4, past: int = 0, seed: int = 0
) -> dict[str, npt.NDArray[Any]]:
    """Make inputs for a corpus model from what is recorded about it.

    Token ids, past tensors and hidden states are random, the mask is all ones (int64 [B, P+S]),
    positions count from P.

    Args:
        info: `CorpusEntry.info`.
        batch: B.
        new: S; ignored where the length is fixed: decode exports, images, audio.
        past: P; ignored where the model takes no past.
        seed: of the random values.

    Raises:
        ValueError: an input has a role this does not know.
    """
    dims = info["dims"]
    generator = np.random.default_rng(seed)
    for entry in info["inputs"].values():
        if entry["role"] == "ids" and isinstance(entry["shape"][1], int):
            new = entry["shape"][1]  # a decode export takes one token
    sizes = {"B": batch, "S": new, "P": past, "P+S": past + new, "E": 8}
    if dims.get("window"):  # what a sliding layer keeps of the past, when its cache is cropped
        sizes["C"] = min(past, dims["window"] - 1)
    feeds: dict[str, npt.NDArray[Any]] = {}
    for name, entry in info["inputs"].items():
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in entry["shape"]]
        role, dtype = entry["role"], np.dtype(entry["dtype"])
        values: npt.NDArray[Any]
        if role == "ids":
            values = generator.integers(0, dims["vocab"], shape)
        elif role in ("mask", "encoder_mask"):
            values = np.ones(shape)
        elif role in ("positions", "cache_positions"):
            values = np.broadcast_to(np.arange(past, past + new), shape)
        elif role == "past_length":
            values = np.full(shape, past)
        elif role == "types":
            values = generator.integers(0, 2, shape)
        elif role == "constant":
            values = np.asarray(entry["value"]).reshape(shape)
        elif role in ("static_key", "static_value"):  # zeros where nothing was written yet
            values = generator.standard_normal(shape)
            values[:, :, past:] = 0
        elif role in ("past_key", "past_value", "cross_key", "cross_value", "features"):
            values = generator.standard_normal(shape)
        else:
            raise ValueError(f"input {name!r} has the unknown role {role!r}")
        feeds[name] = np.ascontiguousarray(values.astype(dtype)).reshape(shape)
    return feeds


def write_demo_model(folder: Path) -> Path:
    """Write the packaged demo decoder, its weights grown and embedded, as `demo.onnx`.

    Args:
        folder: an existing folder; a `demo.onnx` in it is replaced.

    Returns:
        The path of the written model.
    """
    path = folder / "demo.onnx"
    path.write_bytes(grow(read_stored(_DEMO)).SerializeToString())
    return path


def _info(model: onnx.ModelProto) -> dict[str, Any]:
    for prop in model.metadata_props:
        if prop.key == CORPUS:
            info: dict[str, Any] = json.loads(prop.value)
            return info
    raise ValueError(f"the model has no {CORPUS!r} in its metadata")
