"""Raise: recognise what an exporter decomposed, and say it in one standard operator each.

The order matters: norms and rotary embeddings first, so that attention's inputs end at them.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxgen import functions
from onnxgen.analysis.roles import Roles
from onnxgen.analysis.sampling import Sampler
from onnxgen.passes.rewriting import Check, Rewriter
from onnxgen.patterns import RULES
from onnxgen.patterns.rule import Rule
from onnxgen.report.values import Site


def raise_model(
    model: ir.Model,
    roles: Roles | None = None,
    *,
    sampler: Sampler | None = None,
    check: Check | None = None,
    disabled: frozenset[str] = frozenset(),
    rules: Sequence[Rule] = RULES,
) -> list[Site]:
    """Apply raising rules to the main graph, in place; returns what happened at each site."""
    rewriter = Rewriter(model, roles, sampler, check, disabled)
    for rule in rules:
        rewriter.apply(rule)
    functions.declare(model)
    return rewriter.sites
