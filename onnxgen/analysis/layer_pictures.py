"""One layer of a model, before and after, as a picture.

    before = snapshot(model.graph)      # names only: the model may be rewritten then
    ...
    picture = layer_picture(before, snapshot(model.graph), sites)

Which nodes are in a layer the exporter's module paths say. Where it left none, a layer is what
one attention follows from and the one before it does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import pairwise

import onnx_ir as ir

from onnxgen.analysis.scopes import path_of
from onnxgen.report.layers import is_number, layers_of
from onnxgen.report.pictures import Drawing, Picture, PictureNode
from onnxgen.report.values import Site

MOST = 240
"""Nodes of a picture; a person can follow no more."""
_STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class _Seen:
    """A node as it was: nothing of it changes when the model does."""

    name: str
    op: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    path: str | None
    replaced: tuple[str, ...]


@dataclass
class Snapshot:
    """A graph's nodes in order, by names.

    Attributes:
        nodes: all of the main graph, a subgraph's reads being its node's.
        inputs, outputs: names of the graph's.
    """

    nodes: list[_Seen]
    inputs: set[str]
    outputs: set[str]


def snapshot(graph: ir.Graph, replaced: str = "") -> Snapshot:
    """The graph as it is now; `replaced` is the metadata key under which nodes name others."""
    nodes = [
        _Seen(
            node.name or "",
            node.op_type if node.domain in _STANDARD else f"{node.domain}::{node.op_type}",
            tuple(dict.fromkeys(_reads(node))),
            tuple(value.name or "" for value in node.outputs),
            path_of(node),
            tuple(filter(None, node.metadata_props.get(replaced, "").split(", "))),
        )
        for node in graph
    ]
    given = {value.name or "" for value in graph.inputs} - set(graph.initializers)
    return Snapshot(nodes, given, {value.name or "" for value in graph.outputs})


def _reads(node: ir.Node) -> Iterator[str]:
    inside = [node]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inside += attribute.as_graph().all_nodes()
    for each in inside:
        yield from (value.name or "" for value in each.inputs if value is not None)


def layer_picture(before: Snapshot, after: Snapshot, sites: Sequence[Site]) -> Picture | None:
    """The layer in which most kinds of sites were fused; None where none was.

    Args:
        before: the model as exported.
        after: the model as written, its nodes with the names of those that they replaced.
        sites: what was found in it, raising and lowering.
    """
    fused = [site for site in sites if site.status == "fused"]
    if not fused:
        return None
    made = {site.node for site in fused}
    into = {name: node.name for node in after.nodes if node.name in made for name in node.replaced}
    there = {node.name for node in after.nodes}
    layer = _richest(fused)
    if layer and any(_within(node.path, layer) for node in before.nodes):
        sides = [_of_module(side, layer) for side in (before, after)]
    else:
        layer, sides = _without_paths(before, after, fused, into)
    if not (sides[0] and sides[1]):
        return None
    return Picture(
        layer,
        _draw(before, sides[0], layer, lambda n: into.get(n.name, ""), there),
        _draw(after, sides[1], layer, lambda n: n.name if n.name in made else "", there),
    )


def _richest(sites: Sequence[Site]) -> str:
    kinds: dict[str, Counter[str]] = {}
    for site, layer in zip(sites, layers_of(sites), strict=True):
        if layer and site.scope:
            kinds.setdefault(layer, Counter())[site.kind] += 1
    return max(kinds, key=lambda each: (len(kinds[each]), kinds[each].total()), default="")


def _within(path: str | None, layer: str) -> bool:
    return path is not None and (path == layer or path.startswith(f"{layer}."))


def _of_module(side: Snapshot, layer: str) -> set[int]:
    """Nodes of a module, and those without a path that only it reads."""
    inside = {at for at, node in enumerate(side.nodes) if _within(node.path, layer)}
    readers = _readers(side)
    for at in reversed(range(len(side.nodes))):
        node = side.nodes[at]
        if node.path is None and not side.outputs.intersection(node.makes):
            users = {user for name in node.makes for user in readers.get(name, ())}
            if users and users <= inside:
                inside.add(at)
    return inside


def _readers(side: Snapshot) -> dict[str, list[int]]:
    readers: dict[str, list[int]] = {}
    for at, node in enumerate(side.nodes):
        for name in node.reads:
            readers.setdefault(name, []).append(at)
    return readers


def _without_paths(
    before: Snapshot, after: Snapshot, fused: Sequence[Site], into: dict[str, str]
) -> tuple[str, list[set[int]]]:
    """What one attention follows from and the one before it does not; else what sites replaced."""
    attentions = {site.node for site in fused if site.kind == "attention"}
    ends = [node.makes[0] for node in after.nodes if node.name in attentions and node.makes]
    for first, second in pairwise(ends):
        sides = [_above(side, second) - _above(side, first) for side in (before, after)]
        if all(len(side) > 1 for side in sides):
            at = ends.index(second) + 1
            return f"from attention {at - 1} to attention {at}", sides
    if len(before.nodes) <= MOST:
        return "the whole model", [set(range(len(side.nodes))) for side in (before, after)]
    made = set(into.values())
    return "what was fused", [
        {at for at, node in enumerate(before.nodes) if node.name in into},
        {at for at, node in enumerate(after.nodes) if node.name in made},
    ]


def _above(side: Snapshot, value: str) -> set[int]:
    """The nodes that a value follows from."""
    makers = {name: at for at, node in enumerate(side.nodes) for name in node.makes if name}
    found: set[int] = set()
    pending = [value]
    while pending:
        at = makers.get(pending.pop())
        if at is not None and at not in found:
            found.add(at)
            pending.extend(side.nodes[at].reads)
    return found


def _draw(
    side: Snapshot,
    chosen: set[int],
    layer: str,
    site_of: Callable[[_Seen], str],
    there: Collection[str],
) -> Drawing:
    """The chosen nodes, and the values that come in and go out."""
    constants = {at for at in chosen if side.nodes[at].op == "Constant"}
    shown = _fewer(side, chosen - constants, layer)
    drawing = Drawing(constants=len(constants), hidden=len(chosen) - len(constants) - len(shown))
    makers = {name: at for at, node in enumerate(side.nodes) for name in node.makes if name}
    outside = set(makers) | side.inputs
    places: dict[str, int] = {}

    def place(name: str) -> int | None:
        if name not in places and makers.get(name) not in chosen and name in outside:
            if name in makers and side.nodes[makers[name]].op == "Constant":
                return None
            places[name] = len(drawing.nodes)
            drawing.nodes.append(PictureNode(name, ""))
        return places.get(name)

    order = TopologicalSorter(
        {at: [m for n in side.nodes[at].reads if (m := makers.get(n)) in shown] for at in shown}
    )
    for at in order.static_order():
        node = side.nodes[at]
        reads = {found for name in node.reads if (found := place(name)) is not None}
        site = site_of(node)
        gone = not site and node.name not in there
        places.update((name, len(drawing.nodes)) for name in node.makes if name)
        drawing.nodes.append(PictureNode(node.name, node.op, tuple(sorted(reads)), site, gone))
    readers = _readers(side)
    for at in sorted(shown):
        for name in side.nodes[at].makes:
            if name in side.outputs or any(user not in chosen for user in readers.get(name, ())):
                drawing.nodes.append(PictureNode(name, "", (places[name],)))
    return drawing


def _fewer(side: Snapshot, nodes: set[int], layer: str) -> set[int]:
    """Not more than a person can follow: of modules that are counted, such as experts, the first."""
    if len(nodes) > MOST:
        nodes = {at for at in nodes if not _repeated(side.nodes[at].path, layer)}
    return set(sorted(nodes)[:MOST])


def _repeated(path: str | None, layer: str) -> bool:
    inner = (path or "").removeprefix(layer).split(".")
    return any(is_number(part) and int(part) > 0 for part in inner)
