"""Calls of regions replaced by the nodes of their functions, under the names that the graph has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from onnxgen.contexts.cutting import graphs_of
from onnxgen.contexts.values import DOMAIN


@dataclass
class Taken:
    """A call that was replaced.

    Attributes:
        function: its name.
        inputs, outputs: of the call.
        positions: of its nodes, in the list of the graph's nodes.
    """

    function: str
    inputs: list[str]
    outputs: list[str]
    positions: list[int]


def inlined(
    graph: onnx.GraphProto, bodies: Mapping[str, onnx.FunctionProto]
) -> tuple[list[onnx.NodeProto], list[Taken], list[onnx.ValueInfoProto]]:
    """The graph's nodes without calls, what was replaced, and what is declared of values within.

    Names stay as they are in the function, unless somebody gave one of them to another value since.
    """
    nodes: list[onnx.NodeProto] = []
    taken: list[Taken] = []
    infos: list[onnx.ValueInfoProto] = []
    used = {name for node in graph.node for name in node.output}
    used |= {each.name for each in (*graph.input, *graph.initializer)}
    for node in graph.node:
        body = bodies.get(node.op_type) if node.domain == DOMAIN else None
        if body is None:
            nodes.append(node)
            continue
        names = dict(zip(body.input, node.input, strict=False))
        names |= dict(zip(body.output, node.output, strict=False))
        for each in body.node:
            for name in each.output:
                if name and name not in names:
                    names[name] = _free(name, used)
                    used.add(names[name])
        changed = {old: new for old, new in names.items() if old != new}
        start = len(nodes)
        nodes += [_renamed(each, changed) if changed else each for each in body.node]
        infos += [_info(each, names) for each in body.value_info]
        positions = list(range(start, len(nodes)))
        taken.append(Taken(node.op_type, list(node.input), list(node.output), positions))
    return nodes, taken, infos


def _free(name: str, used: set[str]) -> str:
    new, number = name, 0
    while new in used:
        number += 1
        new = f"{name}_{number}"
    return new


def _info(value: onnx.ValueInfoProto, names: Mapping[str, str]) -> onnx.ValueInfoProto:
    found = onnx.ValueInfoProto()
    found.CopyFrom(value)
    found.name = names.get(value.name, value.name)
    return found


def _renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    found = onnx.NodeProto()
    found.CopyFrom(node)
    for field in (found.input, found.output):
        field[:] = [names.get(name, name) for name in field]
    for attribute in found.attribute:
        for graph in graphs_of(attribute):
            _rename_within(graph, names)
    return found


def _rename_within(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename what a graph within a node takes from outside."""
    own = {each.name for each in (*graph.input, *graph.initializer)}
    own |= {name for node in graph.node for name in node.output}
    outer = {old: new for old, new in names.items() if old not in own}
    for node in graph.node:
        node.input[:] = [outer.get(name, name) for name in node.input]
        for attribute in node.attribute:
            for inner in graphs_of(attribute):
                _rename_within(inner, outer)
    for value in graph.output:
        value.name = outer.get(value.name, value.name)
