"""Models whose nodes are known by what they make, and what every answer about places promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter

import onnx_ir as ir

from onnxgen.analysis.graph import read_by
from onnxgen.analysis.regions import Place, find_regions
from onnxgen.analysis.scopes import SCOPES
from tests.graphs import parse


def model_of(text: str, paths: Mapping[str, str] | None = None, opset: int = 23) -> ir.Model:
    """A model in ONNX text; nodes are known by their outputs, and have no names.

    Args:
        paths: module paths, and behind each the nodes that are in it.
    """
    model = ir.from_proto(parse(text, opset=opset))
    where = {name: path for path, held in (paths or {}).items() for name in held.split()}
    for node in model.graph:
        node.name = None
        path = where.pop(str(node.outputs[0].name), None)
        if path is not None:
            node.metadata_props[SCOPES] = path
    assert not where, f"no node makes {where}"
    return model


def places_of(model: ir.Model, which: str) -> dict[str, str]:
    """By name, what the nodes of each place make; held to what is promised of every answer."""
    places = find_regions(model, which)
    assert find_regions(model, which) == places
    assert_in_one_piece(model, places)
    nodes = list(model.graph)
    return {
        place.name: " ".join(str(nodes[at].outputs[0].name) for at in place.nodes)
        for place in places
    }


def assert_in_one_piece(model: ir.Model, places: Sequence[Place]) -> None:
    """Disjoint, sorted, and without a cycle when every place is drawn as one node."""
    within: dict[int, str] = {}
    for place in places:
        assert place.nodes
        assert list(place.nodes) == sorted(set(place.nodes))
        assert not within.keys() & set(place.nodes)
        within.update(dict.fromkeys(place.nodes, place.name))
    assert len({place.name for place in places}) == len(places)
    assert [p.nodes[0] for p in places] == sorted(p.nodes[0] for p in places)
    at = {node: index for index, node in enumerate(model.graph)}
    before: dict[object, set[object]] = {}
    for node, index in at.items():
        own = within.get(index, index)
        makers = (value.producer() for value in read_by(node))
        read = {within.get(at[maker], at[maker]) for maker in makers if maker in at}
        before.setdefault(own, set()).update(read - {own})
    list(TopologicalSorter(before).static_order())  # raises where there is a cycle
