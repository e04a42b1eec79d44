"""What a rule is.

A rule looks at one node, its anchor, and does one of three things: returns None (this is no site
of mine), raises `Declined` (it is one, but I must not touch it, and here is why), or makes nodes
with the builder and returns what they replace. On the way it tells the builder how many of the
steps that its page lists hold (`builder.passed`), so that a decline can say how far it got. It never changes the graph itself: the engine
(`onnxgen.passes.rewriting`) checks the new nodes against the old ones first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxgen import functions
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import CONTRIB
from onnxgen.analysis.symbols import Dim
from onnxgen.patterns.building import Builder
from onnxgen.patterns.pages import Page, page_of, reason_of
from onnxgen.report.values import Decline

_DOMAINS = ("", "ai.onnx", CONTRIB, functions.DOMAIN)

# Metadata of a node that a rule made: the rule's code.
RULE = "onnxgen.rule"

Details = Mapping[str, str | int | float | bool]


def number(dim: Dim) -> int | str:
    """A size for the report: a number where it is fixed, else how it is made up."""
    return dim if isinstance(dim, int) else str(dim)


@dataclass(frozen=True)
class Rewrite:
    """What a rule made.

    Attributes:
        node: the fused node.
        outputs: (old value, new value): the new one takes the old one's place everywhere.
        details: what was found, for the report.
        mask: for attention: the mask, bool or additive. Rows that it masks everywhere are
            nobody's answer: runtimes and decompositions give them zeros, a mean, or NaN.
        repairs: what it replaces runs for one sequence only; it is compared there.
        counts: for a cache that is written, int64 [B]: tokens of each row. Places of the cache,
            [B,K,L,D], behind them are nobody's.
        choices: computed indices that the new nodes read, [..,k], and how many there are to choose
            from, E: compared for any k different numbers below E in a row.
        repeats: whether a row of these may hold a number twice, too.
        loose: whether one may be below 0.
        nonnegative: computed values that the new nodes read, none of which is ever below zero.
        particular: whether it may hold for the very weights that it reads only: where random ones
            in their place show a difference, they are compared themselves.
    """

    node: ir.Node
    outputs: tuple[tuple[ir.Value, ir.Value], ...]
    details: Details = field(default_factory=dict)
    mask: ir.Value | None = None
    repairs: bool = False
    counts: ir.Value | None = None
    choices: Mapping[ir.Value, int] = field(default_factory=dict)
    repeats: bool = False
    loose: bool = False
    nonnegative: frozenset[ir.Value] = frozenset()
    particular: bool = False


class Declined(Exception):
    """A site was recognised and is kept, for the reason that the decline states."""

    def __init__(self, rule: Rule, code: str, reason: str, *nodes: ir.Node | None) -> None:
        self.stopped = next((node for node in nodes if node is not None), None)
        names = tuple(node.name or "" for node in nodes if node is not None)
        said = reason_of(type(rule), code)
        self.decline = Decline(
            rule.code, code, reason, names, expected=said.expected, change=said.change
        )
        super().__init__(reason)


class Rule(ABC):
    """One exporter idiom.

    Attributes:
        code: the rule's stable code, as `--disable` takes it.
        kind: what a site of it is called in the report.
        anchors: op types of the nodes it is shown.
    """

    code: str
    kind: str
    anchors: frozenset[str]

    def looks_at(self, node: ir.Node) -> bool:
        """Whether a node is an anchor."""
        return node.op_type in self.anchors and node.domain in _DOMAINS

    @property
    def page(self) -> Page:
        """What the rule's file says of it."""
        return page_of(type(self), self.code)

    @abstractmethod
    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        """See the module's docstring.

        Raises:
            Declined: the node anchors a site that must be kept.
        """

    def begin(self, model: ir.Model) -> None:  # noqa: B027 - most rules need not know
        """Told which model it is shown nodes of from here on."""

    def end(self) -> None:  # noqa: B027 - most rules need not know
        """Told that it has been shown every anchor."""

    def applied(self, rewrite: Rewrite) -> None:  # noqa: B027 - most rules need not know
        """Told that a rewrite of its own stands in the graph, checked."""
