"""Groups of nodes of any graph, cut until each can be run in one piece."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from graphlib import CycleError, TopologicalSorter

import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxgen.analysis.convex import Wires, settle
from onnxgen.analysis.regions import find_regions
from tests.regions import assert_in_one_piece


@st.composite
def wired(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[int]]:
    """Nodes in order, what each reads, the group it is in, and those that no piece may have."""
    count = draw(st.integers(1, 16))
    sources = [
        draw(st.lists(st.integers(0, at - 1), max_size=3, unique=True)) if at else []
        for at in range(count)
    ]
    labels = draw(st.lists(st.integers(-1, 3), min_size=count, max_size=count))
    barred = draw(st.lists(st.integers(0, count - 1), max_size=2))
    return sources, labels, barred


@given(wired())
@settings(max_examples=400, deadline=None)
def test_pieces_of_any_graph(drawn: tuple[list[list[int]], list[int], list[int]]) -> None:
    sources, labels, barred = drawn
    usable = set(range(len(sources))) - set(barred)
    groups = [{at for at in usable if labels[at] == group} for group in range(4)]
    wires = Wires.between(sources, list(range(len(sources))))
    pieces = settle(wires, groups, usable)
    assert settle(wires, groups, usable) == pieces
    flat = [piece for parts in pieces for piece in parts]
    assert len({at for piece in flat for at in piece}) == sum(map(len, flat))
    assert all(usable.issuperset(piece) for piece in flat)
    for group, parts in zip(groups, pieces, strict=True):
        assert group <= {at for piece in parts for at in piece}
    assert not any(map(functools.partial(_returns, sources), flat))
    assert _has_order(sources, flat)
    if _has_order(sources, groups):  # nothing is cut, nor taken in, without need
        assert [[sorted(piece) for piece in parts] for parts in pieces] == [
            [sorted(group)] if group else [] for group in groups
        ]


@given(wired())
@settings(max_examples=100, deadline=None)
def test_places_of_any_model(drawn: tuple[list[list[int]], list[int], list[int]]) -> None:
    sources, labels, barred = drawn
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    nodes: list[ir.Node] = []
    for at, read in enumerate(sources):
        kind = "RandomNormalLike" if at in barred else "Constant" if labels[at] == 3 else "Sum"
        inputs = [x, *(nodes[each].outputs[0] for each in read)]
        attributes = {"value_float": 1.0} if kind == "Constant" else {}
        inputs = {"RandomNormalLike": inputs[-1:], "Constant": []}.get(kind, inputs)
        nodes.append(ir.node(kind, inputs, attributes, name=f"group.{labels[at]}/{kind}"))
        nodes[-1].outputs[0].name = f"v{at}"
    ends = [node.outputs[0] for node in nodes if not node.outputs[0].uses()]
    model = ir.Model(ir.Graph([x], ends, nodes=nodes, opset_imports={"": 20}), ir_version=10)
    places = {place.name: place for place in find_regions(model, r"group\.-?\d")}
    assert list(places.values()) == find_regions(model, r"group\.-?\d")
    assert_in_one_piece(model, list(places.values()))
    held = {at for place in places.values() for at in place.nodes}
    assert not held & set(barred)
    for at, node in enumerate(nodes):
        assert at in held or node.op_type != "Sum"


def _returns(sources: Sequence[Sequence[int]], piece: Sequence[int]) -> bool:
    """Whether a way leaves a piece and comes back."""
    left: set[int] = set()
    for at, read in enumerate(sources):
        gone = any(each in left or each in piece for each in read)
        if at not in piece and gone:
            left.add(at)
        elif left.intersection(read):
            return True
    return False


def _has_order(sources: Sequence[Sequence[int]], pieces: Sequence[Collection[int]]) -> bool:
    """Whether every piece can be run at once, and all one after the other."""
    unit = {at: -1 - piece for piece, held in enumerate(pieces) for at in held}
    before: dict[int, set[int]] = {}
    for at, read in enumerate(sources):
        own = unit.get(at, at)
        before.setdefault(own, set()).update({unit.get(each, each) for each in read} - {own})
    try:
        list(TopologicalSorter(before).static_order())
    except CycleError:
        return False
    return True
