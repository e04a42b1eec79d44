"""onnxgen: raise exported ONNX models to standard ops, lower them, and prove each step.

onnxgen.fuse(model) -> Result       model: a path, a proto, an onnx_ir.Model, an ONNXProgram
onnxgen.to_paged(model) -> Result
onnxgen.verify(original, rewritten) -> Proof
onnxgen.explain(model) -> list[Site]
onnxgen.inspect(model) -> Inspection
onnxgen.add_contexts(path, backends) -> Contexts
onnxgen.check_contexts(path) -> Contexts
onnxgen.load(path) -> Session               runs what a backend compiled, else the model itself
"""

from __future__ import annotations

# Kept free of heavy imports: the child process that runs ONNX Runtime starts from here. What the
# names below stand for is imported when one is first used.
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxgen.api import Result, explain, fuse, inspect, to_paged, verify
    from onnxgen.context_api import add_contexts, check_contexts
    from onnxgen.errors import (
        ExpectationError,
        FileError,
        ModelDiffersError,
        OnnxgenError,
        RefusedError,
        UsageError,
    )
    from onnxgen.report.values import Proof, Report
    from onnxgen.session import Session, load

__version__ = "0.1.0"
__all__ = [
    "ExpectationError",
    "FileError",
    "ModelDiffersError",
    "OnnxgenError",
    "Proof",
    "RefusedError",
    "Report",
    "Result",
    "Session",
    "UsageError",
    "__version__",
    "add_contexts",
    "check_contexts",
    "explain",
    "fuse",
    "inspect",
    "load",
    "to_paged",
    "verify",
]

_HOMES = {
    "onnxgen.api": ("Result", "explain", "fuse", "inspect", "to_paged"),
    "onnxgen.errors": (
        "ExpectationError",
        "FileError",
        "ModelDiffersError",
        "OnnxgenError",
        "RefusedError",
        "UsageError",
    ),
    "onnxgen.context_api": ("add_contexts", "check_contexts"),
    "onnxgen.report.values": ("Proof", "Report"),
    "onnxgen.session": ("Session", "load"),
}


def __getattr__(name: str) -> Any:
    if name == "verify":  # the package, which can be called
        return importlib.import_module("onnxgen.verify")
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(home), name)
            return value
    raise AttributeError(f"module 'onnxgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
