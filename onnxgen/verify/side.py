"""One of the models that are compared, as it is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from onnxgen.runtime import Picking, Runtime, RuntimeFailure
from onnxgen.verify.opened import Placed, Source, expose, opened
from onnxgen.verify.precision import without_leave

Array = npt.NDArray[Any]


class Side:
    """One of the two models; loaded again when a crash took its session along.

    Args:
        as_written: run what the nodes say, else what the runtime makes of them for a user.
        full: take from it the leave to round activations.
        inner: values inside that are to be answered too.
        packed, picking: as for `Runtime.load`.
    """

    def __init__(
        self,
        runtime: Runtime,
        source: Source,
        *,
        as_written: bool,
        full: bool = False,
        inner: Sequence[str] = (),
        packed: bool = True,
        picking: Picking | None = None,
    ) -> None:
        self.runtime = runtime
        self.source = source
        self.full = full
        self.inner = tuple(inner)
        self.packed = packed
        self.picking = picking
        self.session = 0
        self._as_written = as_written

    def load(self) -> None:
        source, folder = self.source, None
        if self.picking is not None:
            assert isinstance(source, Path)
            self.session = self.runtime.load(source, picking=self.picking)
            return
        if self.full or self.inner or isinstance(source, Placed):
            proto, folder = opened(source)
            if self.full:
                without_leave(proto)
            expose(proto, self.inner)
            source = proto.SerializeToString()
        if self._as_written:
            try:
                self.session = self._load(source, folder, optimize=False)
                return
            except RuntimeFailure:
                self._as_written = False  # some graphs load only with their constants folded
        self.session = self._load(source, folder, optimize=True)

    def _load(self, source: bytes | Path, folder: Path | None, *, optimize: bool) -> int:
        return self.runtime.load(source, optimize=optimize, folder=folder, packed=self.packed)

    def unload(self) -> None:
        self.runtime.unload(self.session)

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        try:
            return self.runtime.run(self.session, feeds, outputs)
        except RuntimeFailure as error:
            if "session was lost" not in str(error):
                raise
        self.load()
        return self.runtime.run(self.session, feeds, outputs)
