"""Lower: say canonical operators as the target's own, by the target's rules."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxgen import functions
from onnxgen.analysis.roles import Roles
from onnxgen.analysis.sampling import Sampler
from onnxgen.passes.rewriting import Check, Rewriter
from onnxgen.patterns.rule import Rule
from onnxgen.report.values import Site


def lower_model(
    model: ir.Model,
    rules: Sequence[Rule],
    roles: Roles | None = None,
    *,
    sampler: Sampler | None = None,
    check: Check | None = None,
    disabled: frozenset[str] = frozenset(),
) -> list[Site]:
    """Apply a target's rules to the main graph, in place; returns what happened at each site."""
    model.graph.opset_imports.setdefault("com.microsoft", 1)  # `tidy` drops it where unused
    rewriter = Rewriter(model, roles, sampler, check, disabled)
    for rule in rules:
        rewriter.apply(rule)
    functions.declare(model)  # those that nothing calls any more go
    return rewriter.sites
