"""Regions compiled by backends: what each made, the best way first, and the next where it was wrong.

    compiled = CompiledBy("openvino:CPU", opened)
    contexts = compiled.contexts(regions, progress)     # one for each region, and their blobs
    compiled.next_way()                                 # another way to compile; False: none is left

Regions that are alike are compiled once; they share a blob where all that differs between them, their
weights, is given to it rather than inside of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

from onnxgen.backends.interface import BackendError, Compiled
from onnxgen.backends.registry import find
from onnxgen.contexts.cutting import part_of
from onnxgen.contexts.values import Blob, Context, Region
from onnxgen.contexts.weights import Weights
from onnxgen.errors import FileError, RefusedError
from onnxgen.reading import Opened


class CompiledBy:
    """What one backend makes of the regions of a model.

    Attributes:
        backend: `name:device`.
        blobs: the bytes of every blob that `contexts` named, by sha256.
        failure: what the backend said when it had no further way.

    Raises:
        UsageError: there is no such backend.
        RefusedError: its package or its device is not here.
    """

    def __init__(self, backend: str, opened: Opened) -> None:
        self.backend = backend
        self.blobs: dict[str, bytes] = {}
        self.failure = ""
        self._opened = opened
        self._weights = Weights(opened)
        self._compiler, self._device = find(backend)
        self._way = 0
        self._ways: dict[str, _Ways] = {}
        try:
            self._identity = self._compiler.identity(self._device)
        except Exception as error:  # a backend of somebody else's may raise anything
            raise RefusedError(f"{backend} cannot compile here: {_clause(error)}") from error

    def contexts(self, regions: Sequence[Region], progress: Callable[[str], None]) -> list[Context]:
        """A context for each region, compiled in the present way.

        Raises:
            RefusedError: the backend cannot compile a region.
            FileError: it has no room for files of its own.
        """
        self.blobs = {}
        found: list[Context] = []
        shared: dict[str, Compiled] = {}
        for number, region in enumerate(regions, 1):
            progress(f"{self.backend} compiles region {number}/{len(regions)}: {region.name}")
            compiled = shared.get(region.subgraph)
            if compiled is None or not self._holds(compiled, region, regions):
                compiled = self._compiled(region)
                shared.setdefault(region.subgraph, compiled)
            sha256 = hashlib.sha256(compiled.blob).hexdigest()
            self.blobs[sha256] = compiled.blob
            blob = Blob(sha256, len(compiled.blob))
            found.append(
                Context(self.backend, self._identity, blob, compiled.form, compiled.parameters)
            )
        return found

    def next_way(self) -> bool:
        """Compile in another way from here on; False where the backend has none."""
        self._way += 1
        return any(ways.get(self._way) is not None for ways in self._ways.values())

    def _compiled(self, region: Region) -> Compiled:
        key = f"{region.subgraph} {region.weights_sha256}"
        if key not in self._ways:
            part = part_of(self._opened, region)
            self._ways[key] = _Ways(self._compiler.compile(part, self._device))
        ways = self._ways[key]
        found = ways.get(self._way) or ways.last
        if found is None:
            raise RefusedError(
                f"{self._opened.path}: {self.backend} cannot compile region '{region.name}': "
                f"{ways.failure}"
            )
        return found

    def _holds(self, compiled: Compiled, region: Region, regions: Sequence[Region]) -> bool:
        """Whether what was compiled of a region like this one is right for this one too."""
        first = next(each for each in regions if each.subgraph == region.subgraph)
        given = set(compiled.parameters)
        inside = [index for index in range(len(region.weights)) if index not in given]
        one, other = (
            self._weights.sha256([each.weights[index] for index in inside])
            for each in (first, region)
        )
        return one == other


def _clause(error: Exception) -> str:
    """What a backend said; of an error that is none of its own, what it is."""
    said = str(error) if isinstance(error, BackendError) else f"it raised {error!r}"
    return " ".join(said.split())


class _Ways:
    """The ways in which a part can be compiled, each made when it is asked for."""

    def __init__(self, made: Iterator[Compiled]) -> None:
        self._made = made
        self._found: list[Compiled] = []
        self.failure = "it knows no way"

    @property
    def last(self) -> Compiled | None:
        return self._found[-1] if self._found else None

    def get(self, number: int) -> Compiled | None:
        """The way with this number, from 0; None where there are not as many."""
        while len(self._found) <= number:
            try:
                self._found.append(next(self._made))
            except StopIteration:
                return None
            except MemoryError:
                raise
            except OSError as error:  # of a temporary folder: it is full, or is not there
                cause = error.strerror or str(error)
                raise FileError(f"what is compiled cannot be written: {cause}") from error
            except Exception as error:  # as above
                self.failure = _clause(error)
                return None
        return self._found[number]
