"""The models that are damaged: stored exports, fused for each target or paged, and their verifier.

with Original(entry, folder, seed) as original:
    for subject in original.subjects(asked):
        subject.verify(damaged_bytes)
"""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import onnx

from onnxgen import pipeline_paged, testing
from onnxgen.analysis.roles import Roles, find_roles
from onnxgen.bounds import Bounds
from onnxgen.errors import OnnxgenError, RefusedError
from onnxgen.model_io import read_model
from onnxgen.pipeline import FuseOptions, fuse
from onnxgen.pipeline_paged import PageOptions, to_paged
from onnxgen.report.values import Proof
from onnxgen.runtime import Runtime
from onnxgen.targets.contract import Contract, read_contract
from onnxgen.targets.paged import PagedModel, PagedOptions
from onnxgen.verify.compare import verify_models
from onnxgen.verify.paged import prove_paged
from onnxgen.verify.paged_kernel import prove_operator

Array = npt.NDArray[Any]

FORMS: Mapping[str, FuseOptions | PagedOptions] = {
    "onnx": FuseOptions(),
    "ort": FuseOptions(target="ort"),
    "ort-right": FuseOptions(target="ort", padding="right"),
    "paged": PagedOptions(),
    "paged-last": PagedOptions(logits="last", slot_mapping=True),
    "paged-indices": PagedOptions(block_size=4, logits="indices"),
    "paged-ort": PagedOptions(flavor="ort"),
}
"""What is made of an export."""

_SMALL = 1 << 23
_QUIET = 0.02


class Memo(Runtime):
    """A runtime that computes what the original answers only once, whoever asks.

    Attributes:
        kept: the original.
        seen: of the latest run of another model, the feeds with the most tokens.
    """

    def __init__(self, kept: Path) -> None:
        super().__init__(threads=1, bounds=Bounds(timeout=60.0))
        self.kept = kept
        self.seen: dict[str, Array] = {}
        self._open: dict[Any, int] = {}
        self._keys: dict[int, Any] = {}
        self._answers: dict[Any, dict[str, Array]] = {}

    def load(
        self,
        model: bytes | Path,
        *,
        optimize: bool = False,
        folder: Path | None = None,
        packed: bool = True,
    ) -> int:
        if model != self.kept:
            return super().load(model, optimize=optimize, folder=folder, packed=packed)
        key = (optimize, self.twins)
        session = self._open.get(key)
        if session is None or session not in self._alive:
            session = self._open[key] = super().load(model, optimize=optimize)
            self._keys[session] = key
        return session

    def run(
        self, session: int, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        key = self._keys.get(session)
        if key is None:
            if _tokens(feeds) >= _tokens(self.seen):
                self.seen = dict(feeds)
            return super().run(session, feeds, outputs)
        digest = hashlib.blake2b()
        for name, array in feeds.items():
            digest.update(f"{name}{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array))
        place = (key, digest.digest(), tuple(outputs or ()))
        if place not in self._answers:
            answer = super().run(session, feeds, outputs)
            if sum(array.nbytes for array in answer.values()) > _SMALL:
                return answer
            self._answers[place] = answer
        return dict(self._answers[place])

    def unload(self, session: int) -> None:
        if session not in self._keys:
            super().unload(session)


def _tokens(feeds: Mapping[str, Array]) -> int:
    return next((array.size for array in feeds.values()), 0)


@dataclass
class Subject:
    """A model that was written, undamaged, and what it was written from.

    Attributes:
        name: `model/form target`.
        baseline: what the verifier says of it as it is.
        results: of a paged model, what it is; its blocks' size is the file's.
    """

    name: str
    original: Path
    model: onnx.ModelProto
    roles: Roles
    runtime: Memo
    folder: Path
    results: Sequence[PagedModel] = ()
    operator: bool = False
    baseline: Proof = field(default_factory=lambda: Proof("unverifiable", 0.0))
    dims: Mapping[str, int] = field(default_factory=dict)

    @property
    def contract(self) -> Contract:
        return read_contract(read_model(self.write(self.model)))

    def write(self, model: onnx.ModelProto) -> Path:
        path = self.folder / "damaged.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    def verify(self, model: onnx.ModelProto) -> Proof:
        """What a user is told of this model, in place of the one that was written."""
        if not self.results:
            return verify_models(self.original, model.SerializeToString(), runtime=self.runtime)
        sides = (self.original, [self.write(model)], self.results, self.roles, self.runtime)
        if not self.operator:
            return prove_paged(*sides)
        try:
            return prove_operator(*sides)[0]
        except RefusedError as error:
            return Proof("differs", 0.0, reason=f"ONNX Runtime cannot load: {error}")


def grown(entry: testing.CorpusEntry, seed: int) -> onnx.ModelProto:
    """The export with weights of a seed; every other seed's embeddings are small.

    Beside small embeddings an epsilon counts, and a layer's own output outweighs its input.
    """
    stored = testing.read_stored(entry.path)
    if seed % 2:
        for tensor in testing.tensors(stored):
            for prop in tensor.metadata_props:
                if prop.key == testing.GROW:
                    growth = testing.Growth.parse(prop.value)
                    if growth.std == 1.0 and "embed" in growth.key:
                        prop.value = prop.value.replace(" 1.0 ", f" {_QUIET} ", 1)
    return testing.grow(stored, seed)


@contextlib.contextmanager
def subjects(
    entry: testing.CorpusEntry, forms: Sequence[str], folder: Path, seed: int
) -> Iterator[list[Subject]]:
    """What becomes of an export in each form that takes it, verified as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "original.onnx"
    path.write_bytes(grown(entry, seed + zlib.crc32(entry.name.encode()) % 2).SerializeToString())
    roles = find_roles(read_model(path))
    found = []
    with Memo(path) as runtime:
        for form in forms:
            place = folder / form
            place.mkdir()
            for subject in _made(f"{entry.name} {form}", FORMS[form], path, place, roles, runtime):
                subject.dims = entry.info["dims"]
                subject.baseline = subject.verify(subject.model)
                found.append(subject)
        yield found


def _made(
    name: str,
    options: FuseOptions | PagedOptions,
    path: Path,
    folder: Path,
    roles: Roles,
    runtime: Memo,
) -> Iterator[Subject]:
    if isinstance(options, FuseOptions):
        output = folder / "written.onnx"
        fields = {"target": options.target, "padding": options.padding, "verify": False}
        with contextlib.suppress(OnnxgenError):
            fuse(path, FuseOptions(output=output, **fields), lambda _: None)
            yield Subject(name, path, onnx.load(output), roles, runtime, folder)
        return
    taken: list[Any] = []

    def take(*sides: Any) -> Any:
        """What the command proves, kept: its files are gone when it is done."""
        own = onnx.load(sides[1][0])
        taken[:] = [own, sides[2], sides[3]]
        raise _TakenError

    operator = options.flavor == "ort"
    patched = "prove_operator" if operator else "prove_paged"
    with mock.patch.object(pipeline_paged, patched, take):
        try:
            to_paged(path, PageOptions(folder / "out", options), lambda _: None)
        except _TakenError:
            pass
        except OnnxgenError:
            return
    model, results, own = taken
    yield Subject(name, path, model, own, runtime, folder, results[:1], operator)


class _TakenError(Exception):
    """What was wanted is there."""
