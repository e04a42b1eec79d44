"""Where files may be written: into a folder that takes them, over nothing but a regular file."""

from __future__ import annotations

import os
from pathlib import Path

from onnxgen.errors import FileError


def check_place(path: Path) -> None:
    """Notice before the work, not after it, that a file cannot be written.

    Raises:
        FileError: there is no such folder, it is not writable, or the path is a folder or
            another thing that is no regular file: moving a file there would remove a device.
    """
    if os.path.isdir(path):
        raise FileError(f"{path} cannot be written: it is a folder")
    # What links in /dev lead to, such as stdout, may be a regular file: the link is not.
    special = os.path.realpath(path.parent) == "/dev" or not os.path.isfile(path)
    if os.path.exists(path) and special:
        raise FileError(f"{path} cannot be written: it is not a regular file")
    if not os.path.isdir(path.parent):
        raise FileError(f"{path} cannot be written: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise FileError(f"{path} cannot be written: the folder {path.parent} is not writable")


def default_output(model: Path) -> Path:
    """MODEL with .fused.onnx: `model.onnx` gives `model.fused.onnx`, beside it."""
    return model.with_name(f"{stem(model)}.fused.onnx")


def default_folder(model: Path) -> Path:
    """MODEL with .paged: `model.onnx` gives the folder `model.paged`, beside it."""
    return model.with_name(f"{stem(model)}.paged")


def stem(model: Path) -> str:
    """A model's name without its ending."""
    return model.stem if model.suffix.lower() == ".onnx" else model.name


def same_place(path: Path, other: Path) -> bool:
    """Whether two paths are one file, or would be once they exist."""
    if os.path.exists(path) and os.path.exists(other):
        return os.path.samefile(path, other)
    return _real(path) == _real(other)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path.parent)) / path.name
