"""One of the models that are compared, as it is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from onnxgen.runtime import Runtime, RuntimeFailure
from onnxgen.verify.precision import in_full_precision

Array = npt.NDArray[Any]
Source = Path | bytes


class Side:
    """One of the two models; loaded again when a crash took its session along."""

    def __init__(
        self, runtime: Runtime, source: Source, *, as_written: bool, full: bool = False
    ) -> None:
        self.runtime = runtime
        self.source = source
        self.full = full
        self.session = 0
        self._as_written = as_written

    def load(self) -> None:
        source, folder = in_full_precision(self.source) if self.full else (self.source, None)
        if self._as_written:
            try:
                self.session = self.runtime.load(source, optimize=False, folder=folder)
                return
            except RuntimeFailure:
                self._as_written = False  # some graphs load only with their constants folded
        self.session = self.runtime.load(source, optimize=True, folder=folder)

    def unload(self) -> None:
        self.runtime.unload(self.session)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        try:
            return self.runtime.run(self.session, feeds)
        except RuntimeFailure as error:
            if "session was lost" not in str(error):
                raise
        self.load()
        return self.runtime.run(self.session, feeds)
