"""Whether the files of a model are still those that were opened.

files = Files(opened)
...
files.check()         # before another program opens them by their names
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from onnx import TensorProto as T

from onnxgen.errors import FileError
from onnxgen.reading import Opened, is_blob
from onnxgen.wire import tensors_of


class Files:
    """The model file and its data files, as the system knows them now; blobs are not among them."""

    def __init__(self, opened: Opened) -> None:
        self._states = {path: _state(path) for path in _files(opened)}

    def check(self) -> None:
        """See that nobody has replaced one, or written to it.

        Raises:
            FileError: somebody has.
        """
        for path, state in self._states.items():
            if _state(path) != state:
                raise FileError(f"{path} has changed since it was loaded: load it again")


def _files(opened: Opened) -> Iterator[Path]:
    yield opened.path
    for tensor in tensors_of(opened.proto):
        if tensor.data_location == T.EXTERNAL and not is_blob(tensor):
            yield from (
                opened.folder / each.value
                for each in tensor.external_data
                if each.key == "location"
            )


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
