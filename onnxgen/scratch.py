"""Files and folders under temporary names beside their place, and what killed runs left of them.

A file is locked while the run that made it goes on. The lock ends with the process, however that
ends; so a file that is not locked, and is not being written just now, is nobody's, and the next run
on the same output removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_FRESH = 60.0  # seconds in which a file without a lock may still be about to get it


def scratch_path(folder: Path, stem: str, suffix: str = "") -> Path:
    """A new name in a folder: `.model.fused.3c95c0305701.onnx`."""
    return folder / f".{stem}.{secrets.token_hex(6)}{suffix}"


def create(path: Path, created: list[Path]) -> BinaryIO:
    """Open a new file for writing, locked; never an existing one, never through a link."""
    created.append(path)
    file = os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), "wb")
    _lock(file.fileno())
    return file


@contextmanager
def held(paths: list[Path]) -> Iterator[None]:
    """Keep files locked that are written and closed."""
    with contextlib.ExitStack() as stack:
        for path in paths:
            handle = os.open(path, os.O_RDONLY)
            stack.callback(os.close, handle)
            _lock(handle)
        yield


def sweep(folder: Path, stem: str, suffix: str = "") -> None:
    """Remove what killed runs left under names that `scratch_path` makes."""
    name = re.compile(rf"\.{re.escape(stem)}\.[0-9a-f]{{12}}{re.escape(suffix)}")
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            if name.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    _remove_if_nobodys(path)


def _remove_if_nobodys(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(handle)
        if time.time() - status.st_mtime > _FRESH and _lock(handle):
            shutil.rmtree(path) if stat.S_ISDIR(status.st_mode) else path.unlink()
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file; False where another has, or the file system knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sync(file: BinaryIO) -> None:
    """Have a file's content on the disk."""
    file.flush()
    os.fsync(file.fileno())
