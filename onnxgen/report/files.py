"""Report files: all or nothing, and refused before the work rather than after it."""

from __future__ import annotations

import os
from pathlib import Path

from onnxgen.errors import FileError, UsageError
from onnxgen.places import check_place
from onnxgen.report.render import STARTS
from onnxgen.scratch import create, scratch_path, sweep


def check_writable(path: Path) -> None:
    """Notice before the work, not after it, that a report cannot be written.

    A report replaces only a report, of any kind: whatever else is there, such as a model's
    weights, is kept.

    Raises:
        FileError: nothing can be written there, or what is there cannot be read.
        UsageError: something else is there.
    """
    check_place(path)
    if not path.exists():
        return
    starts = tuple(start.encode() for start in STARTS.values())
    try:
        with path.open("rb") as file:
            there = file.read(max(map(len, starts)))
    except OSError as error:
        raise FileError(f"{path} cannot be replaced: {error.strerror}") from error
    if there and not there.startswith(starts):
        raise UsageError(
            f"{path} is there already and is no report of onnxgen: choose another file"
        )


def write_text(path: Path, text: str) -> None:
    """Write a file that is never seen half written.

    Raises:
        FileError: it cannot be written.
    """
    sweep(path.parent, path.name)
    scratch = scratch_path(path.parent, path.name)
    try:
        try:
            with create(scratch, []) as file:
                file.write(text.encode())
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
