"""ONNX Runtime: the graph that it optimised for this machine's CPU, and what its providers compile.

    OnnxRuntime().compile(part, "cpu")                           # see ort_cpu.py
    OnnxRuntime().compile(part, "OpenVINOExecutionProvider")     # see ort_compile.py

Any other device is an execution provider that is installed and that writes EPContext nodes.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnxgen.backends import ort_compile, ort_cpu
from onnxgen.backends.interface import (
    Backend,
    BackendError,
    Compiled,
    Identity,
    Loaded,
    MissingError,
    Part,
)
from onnxgen.backends.ort_session import FORM, check_seal, open_session, options, runtime


class OnnxRuntime(Backend):
    """The backend; see this module."""

    name = "ort"

    def devices(self) -> list[str]:
        try:
            runtime()
        except MissingError:
            return []
        return [ort_cpu.DEVICE, *ort_compile.devices()]

    def identity(self, device: str) -> Identity:
        return ort_cpu.identity() if device == ort_cpu.DEVICE else ort_compile.identity(device)

    def refuses(self, made: Identity, device: str) -> str:
        if device == ort_cpu.DEVICE:
            return super().refuses(made, device)
        return ort_compile.refuses(made, device)

    def compile(self, part: Part, device: str) -> Iterator[Compiled]:
        if device == ort_cpu.DEVICE:
            return ort_cpu.compile_part(part)
        return ort_compile.compile_part(part, device)

    def load(self, blob: bytes, form: str, device: str) -> Loaded:
        if form != FORM:
            raise BackendError(f"it knows no blobs of the form {form!r}")
        check_seal(blob)
        if device == ort_cpu.DEVICE:
            return open_session(blob, options(), ort_cpu.PROVIDERS)
        return open_session(blob, ort_compile.settings(device), None)
