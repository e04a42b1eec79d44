"""Files that are cut off while they are mapped: the system ends the process, here not unheard.

Weights are read from a mapping. Where another program cuts the file off, or its disk fails, reading
raises no exception: it is the signal SIGBUS, which Python cannot handle, since its own handlers run
only after the instruction that raises it again and again. So this one is C's, by ctypes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from onnxgen.errors import FileError

_SAID = b"Error: a file was cut off, or its disk failed, while it was read; nothing was written\n"
_cleaners: list[Callable[[], None]] = []


@contextmanager
def cut_off_in_words() -> Iterator[None]:
    """While this lasts, such an end is a sentence and the exit code of files; see `cleaned`."""
    if not hasattr(signal, "SIGBUS"):
        yield
        return
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_end)
    before = libc.signal(signal.SIGBUS, handler)
    try:
        yield
    finally:
        libc.signal(signal.SIGBUS, ctypes.c_void_p(before))


@contextmanager
def cleaned(clean: Callable[[], None]) -> Iterator[None]:
    """Clean up at the end of the block, and at an end by SIGBUS within it."""
    _cleaners.append(clean)
    try:
        yield
    finally:
        _cleaners.remove(clean)
        clean()


def _end(_: int) -> None:
    with contextlib.suppress(Exception):
        os.write(2, _SAID)
        for clean in _cleaners:
            clean()
    os._exit(FileError.exit_code)
