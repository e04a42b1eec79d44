"""What ONNX Runtime's process may take of a machine: memory and time, and what it took.

A model's weights are mapped from their file, and pages of a file can be dropped: they cost a
machine nothing that it cannot take back. What is bounded is anonymous memory, which only the
process's end gives back. No resource limit counts that: RLIMIT_AS and RLIMIT_DATA count whole
mappings, and ONNX Runtime maps weights privately and writable, which both hold to be its own. So
the process is watched while it is waited for.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from onnxgen.errors import UsageError

SHARE = 0.75
"""Of the machine's memory, or of what its control group may take: the default bound."""

TIMEOUT = 600.0
"""Seconds that one load or one run may take."""

TIME = 4 * 3600.0
"""Seconds that all loads and runs of one command may take together."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Bounds:
    """How much ONNX Runtime may take.

    Attributes:
        timeout: seconds of one load or one run.
        time: seconds of all of them together.
        memory: bytes of anonymous memory of its process. Kept on Linux only; other systems do
            not say how much a process has.
    """

    timeout: float = field(default_factory=lambda: _told_seconds("ONNXGEN_TIMEOUT", TIMEOUT))
    time: float = field(default_factory=lambda: _told_seconds("ONNXGEN_TIME", TIME))
    memory: int = field(default_factory=lambda: _told_bytes("ONNXGEN_MEMORY"))


def anonymous_memory(process: int) -> int:
    """Bytes of a process that are in memory and in no file; 0 where the system does not say."""
    try:
        with open(f"/proc/{process}/statm", "rb") as file:
            _, resident, shared, *_ = file.read().split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * _PAGE


def machine_memory() -> int:
    """Bytes of memory that this process may use at most: the machine's, or its control group's."""
    found = [os.sysconf("SC_PHYS_PAGES") * _PAGE]
    try:
        groups = Path("/proc/self/cgroup").read_text("utf-8")
    except OSError:
        return found[0]
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (
            (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes")
            if controllers
            else (Path("/sys/fs/cgroup"), "memory.max")
        )
        # A group's limit holds for those in it. In a container the path may start elsewhere.
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts) + 1):
            try:
                limit = root.joinpath(*parts[:depth], name).read_text("ascii").strip()
            except OSError:
                continue
            found += [int(limit)] if limit.isdigit() else []
    return min(found)


def in_words(count: float) -> str:
    """Bytes for a person: "1.5 GB"."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def _told_seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not re.fullmatch(r"\d+(\.\d+)?", text) or float(text) == 0:
        raise UsageError(f"{name} is {text!r}: it is a number of seconds")
    return float(text)


def _told_bytes(name: str) -> int:
    text = os.environ.get(name, "")
    if not text:
        return int(SHARE * machine_memory())
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text, re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise UsageError(f"{name} is {text!r}: it is a number of bytes, such as 8GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])
