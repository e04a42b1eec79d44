"""What is damaged: drawn models, parts of real exports, whole ones, and what we made of them.

    draw = Draw("0/cycles/17")
    model = draw.model()                  # an onnx.ModelProto of its own, to be damaged

Everything follows from the text that the draw is named by.
"""

from __future__ import annotations

import atexit
import functools
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import onnx
from onnx import helper

from onnxgen import pipeline, pipeline_paged
from onnxgen.errors import OnnxgenError
from onnxgen.targets.paged import PagedOptions
from onnxgen.testing import CorpusEntry, corpus
from tests.random_models import build
from tests.random_spec import CHOICES, Spec, fitted

T = TypeVar("T")
LIGHT = 4_000_000  # bytes of a whole export that is fused in a second
FLOAT = onnx.TensorProto.FLOAT


class Draw(random.Random):
    """A source of choices, and of models to damage.

    Attributes:
        files: what lies beside the model, by name; a kind may add some.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.files: dict[str, bytes] = {}

    def few(self, items: Sequence[T], most: int = 3) -> list[T]:
        """One to `most` different ones, as many as there are."""
        return self.sample(list(items), min(len(items), self.randint(1, most)))

    def model(self) -> onnx.ModelProto:
        """Mostly a small model; now and then a whole export, or what we wrote ourselves."""
        pick = self.random()
        if pick < 0.50:
            return self.drawn()
        if pick < 0.80:
            return self.part()
        if pick < 0.97:
            return self.ours()
        return onnx.ModelProto.FromString(_export(self.choice(_light())))

    def drawn(self) -> onnx.ModelProto:
        """An attention of one or two layers; every second one continues a cache."""
        return onnx.ModelProto.FromString(_drawn(self.randrange(200)))

    def part(self) -> onnx.ModelProto:
        """The first nodes of a real export: an embedding, a mask, half a layer or a whole one."""
        entry = self.choice(_entries())
        return onnx.ModelProto.FromString(_part(entry, self.choice((45, 110))))

    def ours(self) -> onnx.ModelProto:
        """What fuse or to-paged wrote, metadata and functions of ours in it."""
        way = self.choice(list(_WAYS))
        return onnx.ModelProto.FromString(_ours(way, self.randrange(6)))


@functools.cache
def _entries() -> list[CorpusEntry]:
    """One form of each model: the others differ in what fuzzing does not."""
    forms: dict[str, list[CorpusEntry]] = {}
    for entry in corpus():
        forms.setdefault(entry.model, []).append(entry)
    return [found[at % len(found)] for at, found in enumerate(forms.values())]


@functools.cache
def _light() -> list[CorpusEntry]:
    names = ("clip_vision", "bert", "distilbert", "deepseek_v3", "deepseek_v2", "ernie4_5_moe")
    return [each for each in _entries() if each.model in names]


@functools.lru_cache(maxsize=8)
def _export(entry: CorpusEntry) -> bytes:
    return entry.load().SerializeToString()


@functools.lru_cache(maxsize=400)
def _drawn(number: int) -> bytes:
    choice = random.Random(number)
    options = {name: choice.choice(values) for name, values in CHOICES.items()}
    if number % 2:
        options |= {"cache": choice.choice(("BKPD", "BPKD", "BKDP")), "mask": "causal"}
    return build(fitted(Spec(**options))).SerializeToString()


def _part(entry: CorpusEntry, nodes: int) -> bytes:
    """The first nodes of an export; what the last ones make are its outputs."""
    path = _kept() / f"{entry.model}-{entry.form}-{nodes}"
    if not path.exists():
        path.write_bytes(_cut(entry, nodes))
    return path.read_bytes()


@functools.cache
def _kept() -> Path:
    """A folder for what is made once and too large to hold; it goes with the process."""
    folder = tempfile.TemporaryDirectory(prefix="onnxgen-seeds-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _cut(entry: CorpusEntry, nodes: int) -> bytes:
    model = onnx.ModelProto.FromString(_export(entry))
    graph = model.graph
    del graph.node[nodes:]
    read = {name for node in graph.node for name in node.input}
    kept = [each for each in graph.initializer if each.name in read or _captured(graph)]
    graph.ClearField("initializer")
    graph.initializer.extend(kept)
    known = {each.name: each for each in graph.value_info}
    open_ends = [name for node in graph.node for name in node.output if name and name not in read]
    graph.ClearField("output")
    for name in open_ends[-3:]:
        graph.output.append(known.get(name) or helper.make_tensor_value_info(name, FLOAT, None))
    return model.SerializeToString()


def _captured(graph: onnx.GraphProto) -> bool:
    return any(each.type == each.GRAPH for node in graph.node for each in node.attribute)


_WAYS: dict[str, Callable[[Path, Path], object]] = {
    "onnx": lambda path, out: _fuse(path, out, "onnx"),
    "ort": lambda path, out: _fuse(path, out, "ort"),
    "portable": lambda path, out: _page(path, out, "portable"),
    "operator": lambda path, out: _page(path, out, "ort"),
}


def _fuse(path: Path, out: Path, target: str) -> None:
    options = pipeline.FuseOptions(output=out / "model.onnx", target=target, verify=False)
    pipeline.fuse(path, options, lambda message: None)


def _page(path: Path, out: Path, flavor: str) -> None:
    paged = PagedOptions(16, "all", None, False, flavor)
    options = pipeline_paged.PageOptions(output=out, paged=paged, verify=False)
    pipeline_paged.to_paged(path, options, lambda message: None)


@functools.cache
def _ours(way: str, number: int) -> bytes:
    """The first drawn decoder from `number` on that this way takes."""
    for at in range(number, 200, 6):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "in.onnx"
            path.write_bytes(_drawn(at))
            try:
                _WAYS[way](path, Path(folder))
                return (Path(folder) / "model.onnx").read_bytes()
            except OnnxgenError:
                continue
    raise LookupError(f"no drawn model is fit for {way}")
