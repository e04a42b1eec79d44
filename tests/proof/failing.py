"""What Python writes and reads files with, failing at a chosen moment; for a process of its own."""

from __future__ import annotations

import builtins
import errno
import io
import mmap
import os
import signal
import sys
from collections.abc import Callable
from typing import Any


class Failing:
    """Replaces what Python writes and reads files with; counts, and at `at` strikes."""

    def __init__(self, kind: str, at: int, shared: mmap.mmap) -> None:
        self.kind, self.at, self.shared = kind, at, shared
        self.count = 0
        self._open = io.open
        for name in ("replace", "rename", "unlink", "fsync", "mkdir", "utime"):
            setattr(os, name, self._counted(name, getattr(os, name)))
        plain = os.open

        def create(path: Any, flags: int, *more: Any, **named: Any) -> int:
            if flags & os.O_CREAT:
                self.strike("create")
            return plain(path, flags, *more, **named)

        os.open = create
        io.open = self._opened
        builtins.open = self._opened

    def strike(self, event: str, half: Callable[[], object] = lambda: None) -> None:
        if (self.kind == "unread") != (event == "read"):
            return
        self.count += 1
        full = self.kind == "full" and event in ("create", "write", "fsync", "mkdir")
        if self.count != self.at and not (full and self.count > self.at):
            return
        self.shared[: len(event) + 1] = event.encode() + b"\0"
        if self.kind == "kill":
            half()
            os.kill(os.getpid(), signal.SIGKILL)
        if full or self.kind == "unread" or (self.kind == "error" and event != "unlink"):
            number = errno.ENOSPC if self.kind == "full" else errno.EIO
            raise OSError(number, os.strerror(number))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.strike(name)
            return call(*arguments, **named)

        return counted

    def _opened(self, file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        faults = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                view = memoryview(data).cast("B")
                whole = super().write
                faults.strike("write", lambda: whole(view[: len(view) // 2]))
                return whole(view)

            def readinto(self, buffer: Any) -> int:
                faults.strike("read")
                return super().readinto(buffer) or 0

            def readall(self) -> bytes:
                faults.strike("read")
                return super().readall()

        kind = mode.replace("b", "").replace("t", "")
        ours = not str(file).startswith(("/proc", "/sys", sys.prefix, sys.base_prefix, "/dev"))
        if kind in ("w", "x", "a"):
            writer = io.BufferedWriter(Raw(file, kind, closefd=named.get("closefd", True)))
            return writer if "b" in mode else io.TextIOWrapper(writer, named.get("encoding"))
        if mode == "rb" and ours and self.kind == "unread":
            return io.BufferedReader(Raw(file, "r"))
        return self._open(file, mode, *more, **named)
