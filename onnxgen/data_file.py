"""The data file of a model: its large tensors behind one another, and its content's hash as name.

    data = DataFile(folder, "model.fused", created)
    offset, length = data.add(tensor)      # any number of them
    name = data.finish()                   # model.fused.3c95c0305701.data

Tensors that come from files are copied in pieces, and derived ones made in pieces: none is in
memory as a whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from onnxgen.derived import DerivedTensor, bytes_of
from onnxgen.scratch import create, scratch_path, sync

ALIGNMENT = 4096  # of each tensor, so that it can be mapped
CHUNK = 4 * 1024 * 1024
HOLE = 64 * 1024  # zeros are left out of the file from here


class DataFile:
    """The one data file of an output, written tensor by tensor; equal tensors once.

    Args:
        folder: where it goes.
        stem: what its name begins with.
        created: gets every path that was created, so that it can be removed.
    """

    def __init__(self, folder: Path, stem: str, created: list[Path]) -> None:
        self._folder = folder
        self._stem = stem
        self._created = created
        self._mark: tuple[int, int] | None = None
        self._file: BinaryIO | None = None
        self._path = scratch_path(folder, stem, ".data")
        self._hash = hashlib.sha256()
        self._size = 0
        self._places: dict[str, tuple[int, int]] = {}

    def add(self, tensor: ir.TensorProtocol) -> tuple[int, int]:
        """Append a tensor's bytes and return their offset and length."""
        key = _identity(tensor)
        if key not in self._places:
            self._append(bytes(-self._size % ALIGNMENT))
            start = self._size
            for chunk in content_of(tensor):
                self._append(chunk)
            if self._size - start != tensor.nbytes:
                raise OSError(
                    None,
                    f"tensor '{tensor.name}' has {self._size - start} bytes, not {tensor.nbytes}",
                )
            self._places[key] = (start, tensor.nbytes)
        return self._places[key]

    def finish(self, *, passing: bool = False) -> str:
        """Give the file its name, which holds the hash of its content; "" when it is empty.

        Of a model that is never committed it keeps its temporary name (`passing`).

        A file of that name is used as it is, and marked, by its time: whoever made it is
        perhaps about to remove it.
        """
        if self._file is None:
            return ""
        with self._file as file:
            file.truncate(self._size)  # a hole at the end is part of it too
            sync(file)
        if passing:
            return self._path.name
        digest = self._hash.hexdigest()
        for name in (f"{self._stem}.{digest[:12]}.data", f"{self._stem}.{digest}.data"):
            final = self._folder / name
            if not os.path.lexists(final):
                os.rename(self._path, final)
                self._final, self._mark = final, _mark(final)
                return name
            if _holds(final, digest):
                with contextlib.suppress(OSError):
                    os.utime(final)
                self._path.unlink()
                return name
        raise OSError(None, f"{final} is there already and holds something else")

    def remove(self) -> None:
        """Remove the file, if it was made here and no other run uses it."""
        with contextlib.suppress(OSError):
            if self._mark is not None and self._mark == _mark(self._final):
                self._final.unlink()

    def _append(self, content: bytes) -> None:
        if self._file is None:
            self._file = create(self._path, self._created)
        if len(content) >= HOLE and content == bytes(len(content)):
            self._file.seek(len(content), os.SEEK_CUR)  # it reads as zeros
        else:
            self._file.write(content)
        self._hash.update(content)
        self._size += len(content)


def _identity(tensor: ir.TensorProtocol) -> str:
    """A text that is equal for tensors of equal bytes: the same one, place in a file, or origin."""
    if isinstance(tensor, ir.ExternalTensor):
        return f"{tensor.path}:{tensor.offset}:{tensor.nbytes}"
    if isinstance(tensor, DerivedTensor):
        return tensor.rows.outline(_identity)
    return str(id(tensor))


def content_of(tensor: ir.TensorProtocol) -> Iterator[bytes]:
    """A tensor's bytes, in pieces where they come from a file or are derived."""
    if not isinstance(tensor, ir.ExternalTensor):
        yield from bytes_of(tensor)
        return
    left = tensor.nbytes
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset or 0)
        while left and (chunk := file.read(min(CHUNK, left))):
            left -= len(chunk)
            yield chunk


def _holds(path: Path, digest: str) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def _mark(path: Path) -> tuple[int, int]:
    """Which file it is, and when somebody last said to use it."""
    status = path.lstat()
    return status.st_ino, status.st_mtime_ns
