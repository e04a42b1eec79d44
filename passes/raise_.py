"""Raise: recognise what an exporter decomposed, and say it in one standard operator each.

The order matters: norms and rotary embeddings first, so that attention's inputs end at them.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxgen import functions
from onnxgen.analysis.roles import Roles
from onnxgen.analysis.sampling import Sampler
from onnxgen.passes.rewriting import Check, NearMiss, Rewriter
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
    near: list[NearMiss] | None = None,
) -> list[Site]:
    """Apply raising rules to the main graph, in place; returns what happened at each site.

    Args:
        near: takes the nodes at which rules got somewhere and then found nothing of their own.
    """
    rewriter = Rewriter(model, roles, sampler, check, disabled)
    for rule in rules:
        rewriter.apply(rule)
    functions.declare(model)
    if near is not None:
        near += rewriter.near
    return rewriter.sites
