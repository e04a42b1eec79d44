"""A graph in which some regions are run by backends, as steps: parts for ONNX Runtime, and calls.

Nodes wait for the regions before them and go together, in as few parts as there can be; where one
region is all there is, that is the one step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from onnxgen.contexts.cutting import called, reads_of
from onnxgen.contexts.order import Item, collapsed
from onnxgen.contexts.types import as_proto
from onnxgen.contexts.values import Region


class UntypedError(Exception):
    """A value between two steps has a type that nobody knows; the message is a clause."""


@dataclass(frozen=True)
class Call:
    """A region that a backend runs."""

    region: Region


@dataclass(frozen=True)
class Nodes:
    """Nodes that ONNX Runtime runs, as a model; its initializers are those of the whole."""

    model: onnx.ModelProto

    @property
    def inputs(self) -> list[str]:
        """Names of values that come in."""
        return [each.name for each in self.model.graph.input]

    @property
    def outputs(self) -> list[str]:
        """Names of values that later steps or the user read."""
        return [each.name for each in self.model.graph.output]


def steps(
    proto: onnx.ModelProto,
    chosen: Sequence[Region],
    others: Sequence[Region],
    types: Mapping[str, str],
) -> list[Call | Nodes]:
    """What to run, in order.

    Args:
        proto: the original model, its initializers where they are.
        chosen: regions that backends run.
        others: the regions that are not; their nodes stay together.
        types: of values, see `contexts.types`.

    Raises:
        UntypedError: the type of a value that two steps share is missing.
        ValueError: a region needs what it makes itself.
    """
    regions = [*chosen, *others]
    order = collapsed(proto.graph.node, [region.nodes for region in regions])
    stages = _stages(proto, regions, order, len(chosen))
    found: list[Call | Nodes] = []
    for stage in sorted(set(stages.values())):
        items = [item for item in order if stages[item] == stage]
        if stage % 2:
            found += [Call(regions[number]) for _, number in items]
            continue
        positions = [
            position
            for kind, number in items
            for position in ([number] if kind == "node" else regions[number].nodes)
        ]
        found.append(_nodes(proto, sorted(positions), types))
    return found


def _stages(
    proto: onnx.ModelProto, regions: Sequence[Region], order: Sequence[Item], chosen: int
) -> dict[Item, int]:
    """When each runs: nodes at even times, calls at odd ones."""
    nodes = proto.graph.node
    of_node = {p: index for index, region in enumerate(regions) for p in region.nodes}
    makers: dict[str, Item] = {}
    reads: dict[Item, set[str]] = {item: set() for item in order}
    for position, node in enumerate(nodes):
        number = of_node.get(position)
        item: Item = ("node", position) if number is None else ("region", number)
        makers |= dict.fromkeys(node.output, item)
        reads[item].update(reads_of(node))
    found: dict[Item, int] = {}
    for item in order:
        called_by_backend = item[0] == "region" and item[1] < chosen
        stage = 1 if called_by_backend else 0
        for name in reads[item]:
            maker = makers.get(name)
            if maker is not None and maker != item:
                before = found[maker]
                same = before % 2 == stage % 2
                stage = max(stage, before + (2 if same and called_by_backend else 0 if same else 1))
        found[item] = stage
    return found


def _nodes(proto: onnx.ModelProto, positions: Sequence[int], types: Mapping[str, str]) -> Nodes:
    graph = proto.graph
    inside = set(positions)
    nodes = [graph.node[position] for position in positions]
    made = {name for node in nodes for name in node.output if name}
    reads = dict.fromkeys(name for node in nodes for name in reads_of(node) if name not in made)
    later = {
        name for p, node in enumerate(graph.node) if p not in inside for name in reads_of(node)
    }
    later |= {each.name for each in graph.output}
    fed = {each.name for each in graph.input}
    weights = {each.name: each for each in graph.initializer if each.name not in fed}
    model = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
    model.graph.name = "part"
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(weights[name] for name in reads if name in weights)
    model.graph.input.extend(_typed(name, types) for name in reads if name not in weights)
    outputs = [name for node in nodes for name in node.output if name and name in later]
    model.graph.output.extend(_typed(name, types) for name in outputs)
    model.functions.extend(called(proto, nodes))
    return Nodes(model)


def _typed(name: str, types: Mapping[str, str]) -> onnx.ValueInfoProto:
    if name not in types:
        raise UntypedError(f"the type of '{name}', which two parts share, is not known")
    return as_proto(name, types[name])
