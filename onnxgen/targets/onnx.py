"""The target `onnx`: standard operators, at the opset where all that raising writes has kernels."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from onnxgen.analysis.graph import is_read
from onnxgen.errors import UsageError

# Attention, RMSNormalization and RotaryEmbedding are of opset 23; 24 is what we normalize to.
LOWEST, DEFAULT = 23, 24
# IR versions above this are refused by ONNX Runtime 1.31.
HIGHEST_IR = 13


def opset_for(before: int, wanted: int | None) -> int:
    """The opset to write: the one that was asked for, else 24, or the input's if that is newer.

    Raises:
        UsageError: the wanted one is below what fused operators need, or below the input's.
    """
    if wanted is None:
        return max(before, DEFAULT)
    newest = onnx.defs.onnx_opset_version()
    if not LOWEST <= wanted <= newest:
        raise UsageError(
            f"--opset {wanted}: fused operators need {LOWEST} to {newest}, "
            f"the newest that the installed onnx knows"
        )
    if wanted < before:
        raise UsageError(f"--opset {wanted}: the model has opset {before}, which is newer")
    return wanted


def finish(model: ir.Model, version: str, target: str = "onnx") -> None:
    """State what wrote the model, in a form that the installed runtimes read."""
    opset = model.graph.opset_imports.get("", DEFAULT)
    needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    model.ir_version = max(needed, min(model.ir_version or needed, HIGHEST_IR))
    for node in model.graph:
        for output in node.outputs[1:]:
            if node.domain == "com.microsoft" and not is_read(output):
                output.name = ""  # asked for by nobody; some cannot be computed at all
    model.metadata_props["onnxgen.version"] = version
    model.metadata_props["onnxgen.target"] = target
