"""Tidy: what raising left behind is taken out, and the graph put in order.

dead nodes -> nodes that change nothing -> tables sliced before they are computed -> duplicates
-> topological order, unique names
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from onnxgen.passes.normalize import drop_dead, merge_duplicates
from onnxgen.passes.simplify import simplify


def tidy(model: ir.Model) -> None:
    """Clean up after rewriting, in place."""
    model.graph.sort()
    drop_dead(model)
    merge_duplicates(model)
    simplify(model)
    drop_dead(model)
    merge_duplicates(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.NameFixPass()(model)
