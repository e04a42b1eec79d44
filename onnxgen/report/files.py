"""Report files: all or nothing, and refused before the work rather than after it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from onnxgen.errors import FileError


def check_writable(path: Path) -> None:
    """Notice before the work, not after it, that a report cannot be written.

    Raises:
        FileError: there is no such folder, it is not writable, or the path is a folder.
    """
    if path.is_dir():
        raise FileError(f"{path} cannot be written: it is a folder")
    if not path.parent.is_dir():
        raise FileError(f"{path} cannot be written: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise FileError(f"{path} cannot be written: the folder {path.parent} is not writable")


def write_text(path: Path, text: str) -> None:
    """Write a file that is never seen half written.

    Raises:
        FileError: it cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        try:
            scratch.write_text(text, encoding="utf-8")
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}") from error


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        FileError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{folder} cannot be made: {error.strerror}") from error
