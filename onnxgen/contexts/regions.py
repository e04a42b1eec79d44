"""What a region of a graph takes and gives, told from its nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx

from onnxgen.contexts.canonical import subgraph_sha256
from onnxgen.contexts.cutting import cut_out, reads_of
from onnxgen.contexts.types import as_text
from onnxgen.contexts.values import Region
from onnxgen.contexts.weights import Weights


def outlined(proto: onnx.ModelProto, name: str, nodes: Sequence[int]) -> Region:
    """A region without types and hashes: what comes in, from where, and what others read of it."""
    graph = proto.graph
    inside = set(nodes)
    made = [each for position in nodes for each in graph.node[position].output if each]
    own = set(made)
    reads = dict.fromkeys(
        each for position in nodes for each in reads_of(graph.node[position]) if each not in own
    )
    fed = {each.name for each in graph.input}  # an initializer that may be fed is an input
    kept = {each.name for each in graph.initializer} - fed
    read = {each.name for each in graph.output}
    for position, node in enumerate(graph.node):
        if position not in inside:
            read.update(reads_of(node))
    inputs = tuple(each for each in reads if each not in kept)
    weights = tuple(each for each in reads if each in kept)
    outputs = tuple(each for each in made if each in read)
    return Region(name, tuple(nodes), inputs, weights, outputs, (), (), "", "")


def described(
    proto: onnx.ModelProto, region: Region, types: Mapping[str, str], weights: Weights
) -> Region:
    """The region with its types and its hashes.

    Args:
        types: of every value that it takes or gives, see `contexts.types`.

    Raises:
        RefusedError: backends cannot be given it, see `cutting.cut_out`.
    """
    typed = replace(
        region,
        input_types=tuple(types[each] for each in region.inputs),
        output_types=tuple(types[each] for each in region.outputs),
    )
    return replace(
        typed,
        subgraph=subgraph_sha256(cut_out(proto, typed)),
        weights_sha256=weights.sha256(typed.weights),
    )


def declared_types(proto: onnx.ModelProto) -> dict[str, str]:
    """Types that the graph declares, or that ONNX infers from what it declares."""
    found: dict[str, str] = {}
    graph = proto.graph
    inferred = onnx.shape_inference.infer_shapes(proto).graph.value_info if graph.node else []
    for value in (*inferred, *graph.value_info, *graph.output, *graph.input):
        if text := as_text(value):
            found[value.name] = text
    return found
