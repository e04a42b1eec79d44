"""Blobs as tensors: their bytes in the model file, or each in a file beside it, named by its hash."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnx import TensorProto as T

from onnxgen.contexts.values import DOMAIN
from onnxgen.errors import FileError
from onnxgen.reading import BLOB
from onnxgen.scratch import create, scratch_path, sweep, sync

_ENDING = ".blob"


def inline_blobs(contents: Mapping[str, bytes]) -> dict[str, onnx.TensorProto]:
    """Tensors that hold the bytes themselves, by sha256."""
    return {name: _tensor(name, data) for name, data in contents.items()}


@contextmanager
def side_files(
    folder: Path, stem: str, contents: Mapping[str, bytes]
) -> Iterator[tuple[dict[str, onnx.TensorProto], list[Path]]]:
    """Files beside a model, `model.3c95c0305701.blob`, and tensors that name them.

    What is there already under such a name is kept where it holds the same. Files that were made here
    go again where the block raises, or takes nothing off the list that it is given.

    Raises:
        FileError: one cannot be written, or another content has its name.
    """
    made: list[Path] = []
    tensors: dict[str, onnx.TensorProto] = {}
    sweep(folder, stem, _ENDING)
    try:
        for name, data in contents.items():
            place = folder / f"{stem}.{name[:12]}{_ENDING}"
            if not _is_there(place, name):
                _write(place, stem, data)
                made.append(place)
            tensor = _tensor(name, b"")
            tensor.ClearField("raw_data")
            tensor.dims[:] = [len(data)]
            tensor.data_location = T.EXTERNAL
            for key, value in (("location", place.name), ("length", len(data))):
                tensor.external_data.add(key=key, value=str(value))
            tensors[name] = tensor
        yield tensors, made
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.unlink()


def blob_location(function: onnx.FunctionProto) -> str:
    """The file beside the model that a function's blob is in; "" where it is in the model."""
    if function.domain != DOMAIN:
        return ""
    entries = (
        entry.value
        for node in function.node
        for attribute in node.attribute
        if attribute.t.name.startswith(BLOB)
        for entry in attribute.t.external_data
        if entry.key == "location"
    )
    return next(entries, "")


def _tensor(name: str, data: bytes) -> onnx.TensorProto:
    return onnx.TensorProto(name=BLOB + name, data_type=T.UINT8, dims=[len(data)], raw_data=data)


def _is_there(place: Path, sha256: str) -> bool:
    if not os.path.lexists(place):
        return False
    if place.is_file() and not place.is_symlink():
        with place.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                return True
    raise FileError(f"{place} is there already and holds something else")


def _write(place: Path, stem: str, data: bytes) -> None:
    scratch = scratch_path(place.parent, stem, _ENDING)
    try:
        try:
            with create(scratch, []) as file:
                file.write(data)
                sync(file)
            os.replace(scratch, place)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(f"{place} cannot be written: {error.strerror}") from error
