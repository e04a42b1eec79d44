"""A backend for tests: ONNX Runtime in a disguise, and it fails where it is told to.

    fake = use_fakes(monkeypatch)["fake"]
    model = with_regions(path, {"first": [0, 1]}, ["fake:CPU"])
    fake.fails = "bind"                                # or "run 3", its third run

A blob is the part's own model; every weight is given to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxgen.backends import registry
from onnxgen.backends.interface import (
    Array,
    Backend,
    BackendError,
    Call,
    Compiled,
    Identity,
    Loaded,
    MissingError,
    Part,
    Weight,
)
from onnxgen.contexts.cutting import part_of
from onnxgen.contexts.forms import Encoding, Held, encode
from onnxgen.contexts.regions import declared_types, described, outlined
from onnxgen.contexts.sides import inline_blobs, side_files
from onnxgen.contexts.trust import trust
from onnxgen.contexts.values import Blob, Context, Table
from onnxgen.contexts.weights import Weights
from onnxgen.reading import open_model

NAMES = ("fake", "other")
HERE = Identity("Fake", "1.0", "a device", "", "x=1")


@dataclass
class Fake(Backend):
    """The backend.

    Attributes:
        fails: where it raises: "identity", "refuses", "load", "bind", "run 3"; or what else it does:
            "outputs", one too many.
        error: what it raises.
        hook: called whenever it runs.
        here: what it says it is.
        loads, runs: how often it was asked.
    """

    name: str = "fake"
    fails: str = ""
    error: Exception = field(default_factory=lambda: BackendError("it was told to"))
    hook: Callable[[], object] = lambda: None
    here: Identity = HERE
    loads: int = 0
    runs: int = 0

    def devices(self) -> list[str]:
        return ["CPU"]

    def identity(self, device: str) -> Identity:
        self.may_fail("identity")
        if device != "CPU":
            raise MissingError(f"it has no {device}")
        return self.here

    def refuses(self, made: Identity, device: str) -> str:
        self.may_fail("refuses")
        return super().refuses(made, device)

    def compile(self, part: Part, device: str) -> Iterator[Compiled]:
        positions = tuple(range(len(part.weights)))
        yield Compiled(part.model.SerializeToString(), "fake", positions)

    def load(self, blob: bytes, form: str, device: str) -> Loaded:
        self.loads += 1
        self.may_fail("load")
        return _Loaded(self, blob)

    def may_fail(self, where: str) -> None:
        if self.fails == where:
            raise self.error


class _Loaded(Loaded):
    def __init__(self, fake: Fake, blob: bytes) -> None:
        self._fake = fake
        options = ort.SessionOptions()
        options.log_severity_level = 4
        self._session = ort.InferenceSession(blob, options, providers=["CPUExecutionProvider"])

    def bind(self, parameters: Sequence[Weight]) -> Call:
        self._fake.may_fail("bind")
        names = [each.name for each in self._session.get_inputs()]

        def call(inputs: Sequence[Array]) -> list[Array]:
            self._fake.hook()
            self._fake.runs += 1
            self._fake.may_fail(f"run {self._fake.runs}")
            arrays = [*inputs, *(weight.array for weight in parameters)]
            found = self._session.run(None, dict(zip(names, arrays, strict=True)))
            return found * 2 if self._fake.fails == "outputs" else list(found)

        return call


def use_fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    """Two backends of this kind, known by their names until the test ends."""
    fakes = {name: Fake(name) for name in NAMES}
    real = registry.named

    def named(name: str) -> Backend:
        return fakes[name] if name in fakes else real(name)

    monkeypatch.setattr(registry, "named", named)
    return fakes


def with_regions(
    path: Path,
    regions: Mapping[str, Sequence[int]],
    backends: Sequence[str] | Mapping[str, Sequence[str]],
    encoding: Encoding = "function",
    *,
    trusted: bool = True,
    beside: bool = False,
) -> Path:
    """A model beside `path` in which fakes compiled regions, given by positions of their nodes.

    Args:
        backends: of every region, or by region.
        trusted: whether this user added them.
        beside: blobs are files beside the model.
    """
    opened = open_model(path)
    weights, types = Weights(opened), declared_types(opened.proto)
    table, contents = Table(types=types), dict[str, bytes]()
    for name, nodes in regions.items():
        outline = outlined(opened.proto, name, nodes)
        region = described(opened.proto, outline, types, weights)
        [compiled] = Fake().compile(part_of(opened, region), "CPU")
        sha256 = hashlib.sha256(compiled.blob).hexdigest()
        contents[sha256] = compiled.blob
        blob = Blob(sha256, len(compiled.blob))
        contexts = [
            Context(each, HERE, blob, compiled.form, compiled.parameters)
            for each in (backends[name] if isinstance(backends, Mapping) else backends)
        ]
        table.regions.append(replace(region, contexts=tuple(contexts)))
    output = path.with_name(f"{path.stem}.{encoding}.onnx")
    tensors = inline_blobs(contents)
    if beside:
        with side_files(path.parent, output.stem, contents) as (tensors, made):
            made.clear()  # they stay
    held = Held(onnx.load(path), table, tensors)
    output.write_bytes(encode(held, encoding).SerializeToString())
    if trusted:
        trust(contents, "a test")
    return output


def answers(path: Path, feeds: Mapping[str, Any]) -> list[Any]:
    """What ONNX Runtime alone makes of a file."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def assert_equal(found: Sequence[Any], wanted: Sequence[Any]) -> None:
    """Arrays are equal, their types too."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
