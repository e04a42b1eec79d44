"""Where a model comes apart into layers: the values that all of a token's way goes through.

    joints = find_joints(graph, facts)     # after each block of a residual stream

Shapes: B batch, S new tokens, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import read_by
from onnxgen.verify.landmarks import embeds_tokens

_NO_TOKENS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)  # lengths, places, choices
_SEEDS = ("embeds", "features", "pixels")


def find_joints(graph: ir.Graph, facts: Facts) -> list[ir.Value]:
    """The values that every way from the tokens to the last answer leads through, first to last.

    Caches and encoder states come in from the side, and do not count as ways of their own.
    """
    depths = _depths(graph, facts)
    answers = [
        value
        for value in graph.outputs
        if value in depths and facts.roles.outputs[str(value.name)].role in ("rows", "other")
    ]
    if not answers:
        return []
    sink = max(answers, key=lambda value: depths[value])
    behind = _behind(sink, depths)
    # A value covers the depths from its own to that of its last reader: a joint is alone there.
    starts: dict[int, int] = {}
    last: dict[ir.Value, float] = {value: depths[value] for value in behind}
    last[sink] = math.inf
    for value in behind:
        node = value.producer()
        for read in () if node is None else read_by(node):
            if read in behind:
                last[read] = max(last[read], depths[value])
    events: list[tuple[float, int]] = []
    for value in behind:
        starts[depths[value]] = starts.get(depths[value], 0) + 1
        if last[value] > depths[value]:
            events += [(depths[value], 1), (last[value], -1)]
    open_now, at = 0, 0
    events.sort()  # what ends at a depth ends before what begins there
    alone: set[int] = set()
    for depth in sorted(starts):
        while at < len(events) and events[at][0] <= depth:
            open_now += events[at][1]
            at += 1
        if open_now == 1 and starts[depth] == 1:
            alone.add(depth)
    return sorted((v for v in behind if depths[v] in alone), key=lambda value: depths[value])


def _depths(graph: ir.Graph, facts: Facts) -> dict[ir.Value, int]:
    """Of every value on a token's way the longest way to it, in values."""
    depths: dict[ir.Value, int] = {
        value: 0 for value in graph.inputs if facts.role(value) in _SEEDS
    }
    for node in graph:
        if node.op_type in ("Shape", "Size"):
            continue
        read = [depths[value] for value in read_by(node) if value in depths]
        if read or embeds_tokens(node, facts):
            deeper = 1 + max(read, default=0)
            depths.update((v, deeper) for v in node.outputs if v.dtype not in _NO_TOKENS)
    return depths


def _behind(sink: ir.Value, depths: Mapping[ir.Value, int]) -> Collection[ir.Value]:
    """The values on the tokens' way that the sink follows from, itself too."""
    found = {sink: None}
    pending = [sink]
    while pending:
        node = pending.pop().producer()
        for value in () if node is None else read_by(node):
            if value in depths and value not in found:
                found[value] = None
                pending.append(value)
    return found
