"""The order of a graph in which some regions are one node each."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Literal

import onnx

from onnxgen.contexts.cutting import reads_of

Item = tuple[Literal["node", "region"], int]


def collapsed(nodes: Sequence[onnx.NodeProto], regions: Sequence[Sequence[int]]) -> list[Item]:
    """Nodes, by position, and regions, by number, so that what is read was made before.

    Of what may come next the one that came first in the graph does.

    Raises:
        ValueError: a region needs what itself makes first: it is not convex.
    """
    of_node = {position: index for index, region in enumerate(regions) for position in region}
    items: list[Item] = [("region", index) for index in range(len(regions))]
    items += [("node", index) for index in range(len(nodes)) if index not in of_node]
    first = {item: item[1] if item[0] == "node" else min(regions[item[1]]) for item in items}
    makers: dict[str, Item] = {}
    for position, node in enumerate(nodes):
        for name in node.output:
            makers[name] = _item(position, of_node)
    waits: dict[Item, set[Item]] = {item: set() for item in items}
    for position, node in enumerate(nodes):
        item = _item(position, of_node)
        waits[item] |= {makers[name] for name in reads_of(node) if name in makers}
    readers: dict[Item, list[Item]] = {item: [] for item in items}
    for item, needed in waits.items():
        needed.discard(item)
        for each in needed:
            readers[each].append(item)
    left = {item: len(needed) for item, needed in waits.items()}
    ready = [(first[item], item) for item in items if not left[item]]
    heapq.heapify(ready)
    found: list[Item] = []
    while ready:
        _, item = heapq.heappop(ready)
        found.append(item)
        for reader in readers[item]:
            left[reader] -= 1
            if not left[reader]:
                heapq.heappush(ready, (first[reader], reader))
    if len(found) != len(items):
        raise ValueError("a region needs what it makes itself")
    return found


def _item(position: int, of_node: dict[int, int]) -> Item:
    region = of_node.get(position)
    return ("node", position) if region is None else ("region", region)


def is_sorted(nodes: Sequence[onnx.NodeProto]) -> bool:
    """Whether no node reads what a later one makes."""
    later = {name for node in nodes for name in node.output if name}
    for node in nodes:
        if not later.isdisjoint(reads_of(node)):
            return False
        later.difference_update(node.output)
    return True


def put_in_order(graph: onnx.GraphProto) -> None:
    """Sort a graph's nodes where a file has them in no order, as some runtimes allow.

    Raises:
        ValueError: they wait for each other in a circle.
    """
    if not is_sorted(graph.node):
        nodes = list(graph.node)
        order = collapsed(nodes, [])
        del graph.node[:]
        graph.node.extend(nodes[position] for _, position in order)
