"""What no rule took for a site, although it looks like one: nothing is passed over in silence.

    raised graph -> resemblances (no rule is asked) - kept sites -> the nearest rule, how far it got

Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.resemblance import ENDS, Resemblance, resemblances
from onnxgen.analysis.roles import Roles
from onnxgen.analysis.scopes import scope_of
from onnxgen.passes.rewriting import NearMiss
from onnxgen.patterns.rule import Rule
from onnxgen.report.values import Decline, Site

_KINDS = {
    "attention": ("attention",),
    "norm": ("rms_norm", "layer_norm"),
    "rotary": ("rotary",),
    "cache": ("cache", "attention"),
    "moe": ("moe", "grouped_matmul"),
}
_GROWING = ("past", "static_past")
_AROUND = 64  # nodes that are looked at around a place
_REPORT = "please report the model: a place that no rule recognises is a gap of onnxgen"


def missed(
    graph: ir.Graph,
    roles: Roles,
    sites: Sequence[Site],
    near: Sequence[NearMiss],
    rules: Sequence[Rule],
    disabled: frozenset[str] = frozenset(),
) -> list[Site]:
    """Places of a raised graph that look like sites and are neither fused nor kept.

    Args:
        sites: what the rules said.
        near: nodes at which a rule got somewhere and then took them for nothing of its own.
        rules: all rules, in order.
        disabled: codes of those that were left out.

    Returns:
        Kept sites, each with the nearest rule and how far that got.
    """
    growing = [name for name, role in roles.inputs.items() if role.role in _GROWING]
    facts = Facts(graph, roles)
    kept = {
        (site.kind, name)
        for site in sites
        if site.status != "fused" and site.decline is not None
        for name in (site.node, *site.decline.nodes)
    }
    found: list[Site] = []
    for place in resemblances(graph, growing):
        around = list(_around(place))
        kinds = _KINDS[place.kind]
        if any((kind, node.name) in kept for node in around for kind in kinds):
            continue
        found.append(_site(facts, place, _nearest(place, around, near, rules), disabled))
    found += _in_subgraphs(facts, graph, rules)
    return found


def _around(place: Resemblance) -> Iterator[ir.Node]:
    """A place's heart and the nodes near it that belong to no other part of the model."""
    pending, seen = [place.node], {place.node}
    while pending and len(seen) < _AROUND:
        node = pending.pop(0)
        yield node
        if node.op_type in ENDS and node is not place.node:
            continue
        makers = (None if value is None else value.producer() for value in node.inputs)
        users = (use.node for value in node.outputs for use in value.uses())
        for each in (*makers, *users):
            if each is not None and each not in seen:
                seen.add(each)
                pending.append(each)


def _nearest(
    place: Resemblance, around: Sequence[ir.Node], near: Sequence[NearMiss], rules: Sequence[Rule]
) -> NearMiss:
    """The rule that got furthest there; else one that is shown such nodes."""
    kinds = _KINDS[place.kind]
    tried = [each for each in near if each.rule.kind in kinds and each.node in around]
    if tried:
        return max(tried, key=lambda each: each.steps)
    fit = [rule for rule in rules if rule.kind in kinds and len(rule.page.steps) > 1]
    shown = [rule for rule in fit if place.node.op_type in rule.anchors]
    return NearMiss((shown or fit)[0], place.node, 0)


def _site(facts: Facts, place: Resemblance, nearest: NearMiss, disabled: frozenset[str]) -> Site:
    rule, steps = nearest.rule, nearest.rule.page.steps
    ahead = steps[nearest.steps :]
    if rule.code in disabled:
        code, reason = "disabled", f"{rule.code} was left out"
        change = f"run without --disable {rule.code}"
    elif place.value is not None:
        code, change = "cache-outside", _REPORT
        reason = f"the cache {place.value.name!r} grows outside of what attends to it"
    else:
        code, change = "not-recognised", _REPORT
        reason = "it looks like one, and no rule took it for one"
    return Site(
        "cache" if place.value is not None else rule.kind,
        rule.code,
        place.node.name or "",
        scope_of([place.node]),
        "kept",
        Decline(
            rule.code,
            code,
            reason,
            (nearest.node.name or "",),
            reached=steps[: nearest.steps],
            ahead=ahead,
            expected=ahead[0] if ahead else "",
            found=facts.describe(nearest.node),
            change=change,
        ),
    )


def _in_subgraphs(facts: Facts, graph: ir.Graph, rules: Sequence[Rule]) -> Iterator[Site]:
    """Places in bodies of If, Loop and Scan, which no rule is shown."""
    for node in graph:
        for attribute in node.attributes.values():
            bodies = (
                [attribute.as_graph()]
                if attribute.type == ir.AttributeType.GRAPH
                else attribute.as_graphs()
                if attribute.type == ir.AttributeType.GRAPHS
                else []
            )
            for body in bodies:
                for place in resemblances(body):
                    rule = _nearest(place, [], [], rules).rule
                    reason = f"it stands in {attribute.name} of {node.op_type} {node.name!r}"
                    decline = Decline(
                        rule.code,
                        "subgraph",
                        reason,
                        (place.node.name or "", node.name or ""),
                        ahead=rule.page.steps,
                        expected="the main graph, or branches of an If on one bool input",
                        found=f"{place.node.op_type} in a subgraph",
                        change="export the parts as models of their own, or without control flow",
                    )
                    scope = scope_of([place.node])
                    yield Site(rule.kind, rule.code, place.node.name or "", scope, "kept", decline)
                yield from _in_subgraphs(facts, body, rules)
