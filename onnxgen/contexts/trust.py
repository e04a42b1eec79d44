"""Which blobs may be used: those of a list that the user gives, and those that this user added.

A blob is data from a stranger that a driver will parse, so it is used only when its sha256 is known
here. A list is a text file: a sha256 in hexadecimal first on each line, anything behind it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from onnxgen.contexts.places import config_folder
from onnxgen.errors import FileError, UsageError

_NAME = "trusted"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST = 1 << 24  # bytes of a list: some hundred thousand blobs
_logger = logging.getLogger("onnxgen.load")

Given = str | os.PathLike[str] | Iterable[str]


def trusted(given: Given | None = None) -> frozenset[str]:
    """The sha256 of every blob that may be used.

    Args:
        given: a file that lists them, or the hashes themselves.

    Raises:
        FileError: the file cannot be read.
        UsageError: something in it, or of what was given, is no sha256.
    """
    if given is None:
        own: Iterable[str] = ()
    elif isinstance(given, str | os.PathLike):
        own = _listed(Path(given))
    else:
        own = [str(each).strip().lower() for each in given]
        wrong = next((each for each in own if not _SHA256.fullmatch(each)), None)
        if wrong is not None:
            raise UsageError(f"trust holds {wrong[:80]!r}, which is no sha256")
    return frozenset(own) | _of_this_user()


def trust(hashes: Iterable[str], note: str) -> None:
    """Let this user's blobs be used, from now on.

    Raises:
        FileError: the list cannot be written.
    """
    path = config_folder() / _NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        # The note names a file, whose name need be no text.
        with os.fdopen(handle, "r+", encoding="utf-8", errors="replace") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(None, "it is no regular file")
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            lines = file.read().splitlines(keepends=True)
            known = {line.split()[0] for line in lines if line.split()}
            note = " ".join(note.split())
            if lines and not lines[-1].endswith("\n"):  # somebody edited it
                file.write("\n")
            file.writelines(f"{each}  {note}\n" for each in hashes if each not in known)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}") from error


def _of_this_user() -> frozenset[str]:
    """What this user added; a list that others may write is not believed."""
    path = config_folder() / _NAME
    try:
        status, folder = path.lstat(), path.parent.stat()
    except OSError:
        return frozenset()
    others = (status.st_mode | folder.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
    owners = {status.st_uid, folder.st_uid} - {os.geteuid()}
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or owners or others:
        _logger.warning("%s is not believed: others than its user may write it", path)
        return frozenset()
    try:
        return frozenset(_listed(path))
    except (FileError, UsageError) as error:
        _logger.warning("%s", error)
        return frozenset()


def _listed(path: Path) -> list[str]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise FileError(f"{path} cannot be read: it is no regular file")
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise FileError(f"{path} cannot be read: it has more than {_LARGEST} bytes")
        lines = data.decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is no text"
        raise FileError(f"{path} cannot be read: {cause}") from error
    words = [line.split()[0].lower() for line in lines if line.split() and line.strip()[0] != "#"]
    wrong = next((each for each in words if not _SHA256.fullmatch(each)), None)
    if wrong is not None:
        raise UsageError(f"{path} lists {wrong[:80]!r}, which is no sha256")
    return words
