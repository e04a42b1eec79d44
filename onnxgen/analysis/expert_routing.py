"""What a router says, and where what follows from it comes together again.

    joins(facts, values, reached)           one value after the other that all of it goes through
    frontiers(facts, output, tokens, ...)   what the output needs to know of each token, beside it

Neither asks how tokens are brought to their experts: only which values that takes.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import (
    FLOATS,
    ancestors,
    attribute,
    constant,
    given,
    optional,
    producer,
    scalar,
    uniform,
)
from onnxgen.analysis.symbols import Dim, product

MAX_NODES = 20_000
CHOOSING = frozenset({"TopK", "ArgMax"})
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
_MOVES = ("Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Cast", "Expand")


@dataclass(frozen=True)
class Routing:
    """What a router says of each token.

    Attributes:
        weights: float [T, k], [.., S, k] or [T]; [T, E] where there are no indices.
        indices: int alike, None where every expert has a weight.
        slots: k, or E.
    """

    weights: ir.Value
    indices: ir.Value | None
    slots: int


def joins(
    facts: Facts, values: Collection[ir.Value], reached: set[ir.Value], *, choosing: bool = False
) -> Iterator[ir.Value]:
    """The values that all that follows from some values goes through, nearest first.

    Graph outputs on the way, which show the routing itself, do not count.

    Args:
        reached: gets what follows from them, so far.
        choosing: whether to go past nodes that choose.
    """
    left = {v: len(v.uses()) for v in values if v.uses()}
    reached.update(left)
    queue: list[tuple[int, int]] = []
    met: dict[int, ir.Node] = {}
    ends: list[ir.Value] = []

    def push(value: ir.Value) -> bool:
        for use in value.uses():
            if not facts.known(use.node):
                return False  # a subgraph reads it
            key = id(use.node)
            if key not in met:
                met[key] = use.node
                heapq.heappush(queue, (facts.order(use.node.outputs[0]), key))
        return True

    if not all(push(value) for value in left):
        return
    for _ in range(MAX_NODES):
        if not queue:
            yield from ends
            return
        current = met[heapq.heappop(queue)[1]]
        if chooses(current) and not choosing:
            return  # the last one to choose tells of the mixture
        for value in current.inputs:
            if value in left:
                left[value] -= 1
                if not left[value]:
                    del left[value]
        for output in current.outputs:
            if output.uses():
                reached.add(output)
                left[output] = len(output.uses())
                if not push(output):
                    return
            elif output.is_graph_output() and output.dtype in FLOATS:
                reached.add(output)
                ends.append(output)
        if len(left) == 1:
            yield next(iter(left))


def chooses(node: ir.Node) -> bool:
    """Whether a node chooses by how good something is; a TopK of integers sorts what was chosen."""
    return node.op_type in CHOOSING and given(node).dtype in FLOATS


def routings(
    facts: Facts,
    output: ir.Value,
    tokens: ir.Value,
    experts: int,
    products: Collection[ir.Node],
) -> Iterator[Routing]:
    """What a mixture's sum needs to know beside the tokens, nearest to it first."""
    rows = product((facts.shapes.of(tokens) or ())[:-1])
    for found in frontiers(facts, output, tokens, rows, experts, products):
        floats = [v for v in found if v.dtype in FLOATS]
        others = [v for v in found if v.dtype not in FLOATS]
        if not floats:
            return
        if len(floats) > 1:
            continue
        weights, slots = floats[0], found[floats[0]]
        if not others and slots == experts:
            yield Routing(weights, None, slots)
        match = len(others) == 1 and found[others[0]] == slots
        if match and others[0].dtype in _INTEGERS:
            yield Routing(weights, others[0], slots)


def frontiers(
    facts: Facts,
    output: ir.Value,
    tokens: ir.Value,
    rows: Dim,
    most: int,
    products: Collection[ir.Node] = (),
) -> Iterator[Mapping[ir.Value, int]]:
    """Sets of values that an output follows from, with the tokens, and from nothing else computed.

    Each holds for every row a few numbers; the sets come in the order of how near they are.

    Args:
        rows: how many rows there are.
        most: so many numbers at most are few.
        products: what follows from these has rows of experts, however many.

    Yields:
        how many numbers each value holds for a row, by value.
    """
    moved = _moved(facts, output, tokens, products)
    open_values: dict[ir.Value, int] = {}
    pending = [output]
    seen = {output, tokens}
    for opened in range(MAX_NODES):
        while pending:
            node = pending.pop().producer()
            if node is None:
                return
            for value in node.inputs:
                if value is tokens and opened and node.op_type not in ("Shape", "Size"):
                    return  # what was open follows from nothing else: it cannot be left out
                if value is None or value in seen or not facts.is_activation(value):
                    continue
                seen.add(value)
                if node.op_type in ("Shape", "Size"):
                    continue
                slots = None if value in moved else _slots(facts, value, rows, most)
                if slots is not None:
                    open_values[value] = slots
                else:
                    pending.append(value)
            if len(seen) > MAX_NODES:
                return
        if not open_values:
            return
        yield dict(open_values)
        last = max(open_values, key=lambda value: (facts.order(value), value.index() or 0))
        del open_values[last]
        pending.append(last)


def _moved(
    facts: Facts, output: ir.Value, tokens: ir.Value, products: Collection[ir.Node]
) -> set[ir.Value]:
    """What follows from products, or from sorting the choice: its rows are no tokens."""
    nodes: dict[ir.Node, None] = {}
    before = set(ancestors([tokens], frozenset()))  # other layers' sorts are none of ours
    pending, seen = [output], {output, tokens}
    while pending and len(nodes) < MAX_NODES:
        node = pending.pop().producer()
        if node is None or node in before or node.op_type in ("Shape", "Size"):
            continue
        nodes[node] = None
        inputs = [v for v in node.inputs if v is not None and v not in seen]
        seen.update(inputs)
        pending += inputs
    moved: set[ir.Value] = set()
    for node in sorted(nodes, key=lambda each: facts.order(each.outputs[0])):
        starts = node in products or (node.op_type == "TopK" and not chooses(node))
        if starts or any(value in moved for value in node.inputs):
            moved.update(node.outputs)
    return moved


def closest(found: Sequence[Routing]) -> Routing | None:
    """The routing to take: a matrix of weights that a few are scattered into is these few."""
    first = found[0] if found else None
    if first is None or first.indices is not None:
        return first
    scatter = producer(first.weights, "ScatterElements")
    for each in found[1:] if scatter is not None else ():
        assert scatter is not None
        zeros = uniform(scatter.inputs[0]) == 0.0
        if zeros and [each.indices, each.weights] == list(scatter.inputs[1:]):
            return each
    return first


def bound_of(facts: Facts, indices: ir.Value | None, steps: int = 12) -> int | None:
    """Of how many experts each of some indices surely is one, 0 to bound - 1; None if unknown."""
    fixed = constant(indices)
    if fixed is not None and fixed.size and fixed.dtype.kind == "i":
        return int(fixed.max()) + 1 if fixed.min() >= 0 else None
    node = producer(indices)
    if node is None or steps == 0:
        return None
    first, number = node.inputs[0], scalar(optional(node, 1))
    last: Dim | None = None
    match node.op_type:
        case "TopK" | "ArgMax":
            shape = facts.shapes.of(first)
            axis = attribute(node, "axis", -1 if node.op_type == "TopK" else 0)
            last = shape[axis] if shape else None
        case kind if kind in _MOVES:
            return bound_of(facts, first, steps - 1)
        case "Concat" | "Where":
            parts = node.inputs[1:] if node.op_type == "Where" else node.inputs
            bounds = [bound_of(facts, each, steps - 1) for each in parts]
            known = [each for each in bounds if each is not None]
            return max(known) if len(known) == len(bounds) else None
        case "Gather" | "GatherND" if constant(first) is not None:  # a table of experts
            return bound_of(facts, first, steps - 1)
        case "Mod" if number is not None and number >= 1 and not attribute(node, "fmod", 0):
            return int(number)
        case "Add" if number is not None and number >= 0:
            inner = bound_of(facts, first, steps - 1)
            return None if inner is None else inner + int(number)
    return last if isinstance(last, int) else None


def distinct(facts: Facts, indices: ir.Value) -> bool:
    """Whether the numbers of a row surely differ: one alone does, and those of one TopK do."""
    shape = facts.shapes.of(indices)
    if shape is None or shape[-1] == 1:
        return shape is not None
    value = indices
    for _ in range(8):
        node = producer(value, *_MOVES)
        if node is None:
            break
        value = given(node)
    node, made = producer(value, "TopK"), facts.shapes.of(value)
    if node is None or made is None or made[-1] != shape[-1]:
        return False
    axis: int = attribute(node, "axis", -1)
    return axis % len(made) == len(made) - 1


def _slots(facts: Facts, value: ir.Value, rows: Dim, experts: int) -> int | None:
    """How many numbers a value holds for each token, if it holds a few for each."""
    shape = facts.shapes.of(value)
    if not shape:
        return None
    last = shape[-1]
    few = last if isinstance(last, int) and 1 <= last <= experts else None
    if few is not None and facts.shapes.same(product(shape[:-1]), rows):
        return few
    return 1 if facts.shapes.same(product(shape), rows) else None
