"""Backends by name: those of this package, and those that others bring by entry points.

    backend, device = find("openvino:CPU")

Importing this imports no runtime and no backend: one is imported when it is asked for.
"""

from __future__ import annotations

import functools
import importlib

from onnxgen.backends.interface import Backend, MissingError
from onnxgen.errors import UsageError

GROUP = "onnxgen.backends"  # of the entry points
_OWN = {"openvino": "onnxgen.backends.openvino:OpenVINO", "ort": "onnxgen.backends.ort:OnnxRuntime"}


def find(written: str) -> tuple[Backend, str]:
    """The backend and the device that a user means by `openvino:CPU`; asks no runtime if they are here.

    Raises:
        UsageError: it names no backend that is known, or no device.
    """
    name, _, device = written.partition(":")
    try:
        backend = named(name)
    except MissingError as error:
        raise UsageError(f"backend {written!r}: {error}.") from None
    if not device:
        here = ", ".join(f"{name}:{each}" for each in backend.devices()) or "none is here"
        raise UsageError(f"backend {written!r} names no device, as in NAME:DEVICE ({here}).")
    return backend, device


@functools.cache
def named(name: str) -> Backend:
    """The backend of a name; the same object every time.

    Raises:
        MissingError: none has this name, or what has it cannot be imported.
    """
    if name in _OWN:
        module, _, attribute = _OWN[name].partition(":")
        found: Backend = getattr(importlib.import_module(module), attribute)()
        return found
    for entry in _entry_points():
        if entry.name == name:
            try:
                made = entry.load()()
            except Exception as error:  # another's code: it may raise anything
                raise MissingError(
                    f"the entry point {entry.value!r} fails with {type(error).__name__}: {error}"
                ) from error
            if not isinstance(made, Backend) or made.name != name:
                raise MissingError(f"the entry point {entry.value!r} is no backend of this name")
            return made
    raise MissingError(f"no backend has this name (known are {', '.join(names())})")


def names() -> list[str]:
    """The names of all backends, whether their runtimes are here or not; those of this package first."""
    return list(dict.fromkeys([*_OWN, *sorted(entry.name for entry in _entry_points())]))


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    import importlib.metadata  # only here: it takes longer to import than the rest of this

    return list(importlib.metadata.entry_points(group=GROUP))
