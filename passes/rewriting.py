"""The engine: shows nodes to rules, checks what they made, and puts it in the graph.

    for each rule, in order:      for each anchor, in graph order:
        rule -> new nodes -> check against the old ones -> splice -> old nodes that died removed

A rewrite whose check fails never reaches the graph; its site is reported as undone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import ancestors, is_read
from onnxgen.analysis.roles import Roles
from onnxgen.analysis.sampling import Sampler
from onnxgen.analysis.scopes import SCOPES, scope_of
from onnxgen.patterns.building import Builder
from onnxgen.patterns.pages import ENGINE
from onnxgen.patterns.rule import RULE, Declined, Rewrite, Rule
from onnxgen.report.values import Site

# Shows a rewrite's old and new values to the verifier: None where they agree, else the reason.
Check = Callable[[Facts, Rewrite, Sequence[ir.Node]], str | None]

REPLACED = "onnxgen.replaced"


@dataclass(frozen=True)
class NearMiss:
    """A node that a rule took for no site of its own, although some of its steps held."""

    rule: Rule
    node: ir.Node
    steps: int


@dataclass
class Rewriter:
    """Applies rules to one model's main graph.

    Attributes:
        check: compares a rewrite with what it replaces; None skips it.
        disabled: codes of rules to leave out.
    """

    model: ir.Model
    roles: Roles | None = None
    sampler: Sampler | None = None
    check: Check | None = None
    disabled: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.facts = Facts(self.model.graph, self.roles, self.sampler)
        self.builder = Builder(self.model.graph, self.facts.shapes)
        self._placed: list[tuple[int, Site]] = []
        self._kept_at: dict[ir.Node, tuple[int, Site]] = {}
        self.near: list[NearMiss] = []

    @property
    def sites(self) -> list[Site]:
        """What happened, in graph order."""
        return [site for _, site in sorted(self._placed, key=lambda placed: placed[0])]

    def apply(self, rule: Rule) -> None:
        """Show every anchor of the rule to it, last ones first, so that the largest site wins."""
        if rule.code in self.disabled:
            return
        rule.begin(self.model)
        for node in reversed([node for node in self.model.graph if rule.looks_at(node)]):
            if node.graph is None:
                continue  # went with an earlier site
            place = self.facts.order(node.outputs[0])
            site = self._try(rule, node)
            # Of two rules that keep one node the first has said why; one that fuses it wins.
            if site is not None and (site.status == "fused" or node not in self._kept_at):
                if node in self._kept_at:
                    self._placed.remove(self._kept_at.pop(node))
                self._placed.append((place, site))
                if site.status != "fused":
                    self._kept_at[node] = (place, site)
        rule.end()

    def _try(self, rule: Rule, node: ir.Node) -> Site | None:
        self.builder.steps = 0
        try:
            rewrite = rule.rewrite(self.facts, self.builder, node)
        except Declined as declined:
            self.builder.drop()
            return self._kept(rule, node, declined)
        if rewrite is None:
            self.builder.drop()
            if self.builder.steps:
                self.near.append(NearMiss(rule, node, self.builder.steps))
            return None
        nodes = self.builder.keep(new for _, new in rewrite.outputs)
        if self._cyclic(rewrite, nodes):
            self.builder.drop()
            why = "an input of the fused node needs its output"
            return self._kept(rule, node, Declined(rule, "cycle", why, node))
        place = max(self.facts.order(old) for old, _ in rewrite.outputs)
        for new in nodes:
            self.facts.added(new, place)
        reason = None if self.check is None else self.check(self.facts, rewrite, nodes)
        if reason is not None:
            self.builder.drop()
            return self._kept(rule, node, Declined(rule, "check-failed", reason, node))
        site = self._splice(rule, rewrite, self.builder.take())
        rule.applied(rewrite)
        return site

    def _kept(self, rule: Rule, node: ir.Node, declined: Declined) -> Site:
        """A site that stays, with how far the rule got and what it met there."""
        decline, steps = declined.decline, rule.page.steps
        whole = decline.code in ENGINE  # it was made, and stopped by the engine
        count = len(steps) if whole else min(self.builder.steps, len(steps))
        decline = replace(
            decline,
            reached=steps[:count],
            ahead=steps[count:],
            found="" if declined.stopped is None else self.facts.describe(declined.stopped),
        )
        undone = decline.code == "check-failed"
        status: Literal["kept", "undone"] = "undone" if undone else "kept"
        return Site(rule.kind, rule.code, node.name or "", scope_of([node]), status, decline)

    def _cyclic(self, rewrite: Rewrite, nodes: Sequence[ir.Node]) -> bool:
        """Whether a new node reads, however indirectly, an old value that it replaces."""
        made = {output for node in nodes for output in node.outputs}
        read = {v for node in nodes for v in node.inputs if v is not None and v not in made}
        first = min(self.facts.order(old) for old, _ in rewrite.outputs)
        late = [value for value in read if self.facts.order(value) >= first]
        replaced = {old.producer() for old, _ in rewrite.outputs}
        return bool(late) and any(node in replaced for node in ancestors(late, frozenset()))

    def _splice(self, rule: Rule, rewrite: Rewrite, nodes: Sequence[ir.Node]) -> Site:
        graph = self.model.graph
        producers = [p for old, _ in rewrite.outputs if (p := old.producer()) is not None]
        graph.insert_before(producers[-1], nodes)
        for old, new in rewrite.outputs:
            if new.shape is None:
                new.shape = old.shape
            # What is computed keeps its name: a graph output's is the model's interface, and by
            # the others two models can be compared inside.
            old.name, new.name = self.builder.unique(f"{old.name}:replaced"), old.name
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        removed = _remove_dead(graph, producers)
        gone = {node.name for node in removed}
        for node, (_, site) in list(self._kept_at.items()):
            stopped = site.decline.nodes if site.decline is not None else ()
            if node in removed or (stopped and gone.issuperset(stopped)):
                # What stopped it went with another's rewrite: it is kept no more.
                self._placed.remove(self._kept_at.pop(node))
        self.facts.views.forget()
        fused = rewrite.node
        # What takes the place of one of ours keeps its name and module: earlier sites speak of it.
        ours = (n for n in removed if n.op_type == fused.op_type and RULE in n.metadata_props)
        taken = next(ours, None)
        scope = scope_of(self._own(removed) if taken is None else [taken])
        for node in nodes:
            if scope:
                node.metadata_props.setdefault(SCOPES, scope)
            node.metadata_props[RULE] = rule.code
        fused.metadata_props[REPLACED] = ", ".join(
            sorted({name for node in removed for name in _replaced_by(node)})
        )
        name = f"{scope or rule.kind}/{fused.op_type}"
        fused.name = self.builder.unique(name) if taken is None else taken.name
        return Site(
            rule.kind,
            rule.code,
            fused.name or "",
            scope,
            "fused",
            replaced=len(removed),
            details=dict(rewrite.details),
        )

    def _own(self, removed: Sequence[ir.Node]) -> Sequence[ir.Node]:
        """Those that carry activations: masks and tables go with the first layer that reads them."""
        carrying = [n for n in removed if any(map(self.facts.is_activation, n.outputs))]
        return carrying or removed


def _replaced_by(node: ir.Node) -> list[str]:
    """The exporter's nodes that a node stands for: itself, or those it replaced before."""
    names = node.metadata_props.get(REPLACED, node.name or "")
    return [name for name in names.split(", ") if name]


def _remove_dead(graph: ir.Graph, roots: Sequence[ir.Node]) -> list[ir.Node]:
    """Remove the nodes whose outputs nobody reads any more, from the roots upwards."""
    dead: dict[ir.Node, None] = {}
    pending = list(roots)
    while pending:
        node = pending.pop()
        if node.graph is not graph or node in dead or any(map(is_read, node.outputs)):
            continue
        dead[node] = None
        pending.extend(
            source for v in node.inputs if v is not None and (source := v.producer()) is not None
        )
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
    graph.remove(dead)  # at once: each call looks through all outputs of the graph
    return list(dead)
