"""Products of rows with matrices chosen out of a stack, however rows are brought to them.

    MatMul or Gemm with a stack's matrices -> those with the other matrices of the same stack
    their rows -> back through moved rows -> the input
    what follows from all of them -> the first value of as many rows as the input has, times k:
        the output, [M, k, N] in some view; or k times fewer: their weighted sum

As for whole experts (`analysis.experts`) what lies between is not read, but run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxgen.analysis.expert_features import biased_of
from onnxgen.analysis.expert_routing import frontiers, joins
from onnxgen.analysis.expert_weights import Product, Source, product_of
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import FLOATS, attribute, given, producer
from onnxgen.analysis.symbols import Dim, divide, product

MAX_SLOTS = 64
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
_VIEWS = ("Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Expand", "Tile", "Cast")
_SELECTS = ("Gather", "GatherND", "Slice", "Split")
# What may stand between a group's products and the rows put back in order, or summed.
_ARRANGES = frozenset(
    (*_VIEWS, *_SELECTS, "Concat", "ScatterND", "ScatterElements", "Mul", "Add", "ReduceSum")
)


@dataclass(frozen=True)
class Grouped:
    """Rows times the matrices that they choose.

    Attributes:
        output: [M, k, N] in some view; their weighted sum where there are weights.
        rows: the input, [.., K], M rows in all.
        source: a stack of weights, and which way round its matrices are.
        bias: of each group, or None.
        indices: int [M, k] in some view; [M/k, k] where there are weights.
        slots: k.
        weights: float as the indices, or None.
        groups: how many matrices the stack holds.
        width: N.
    """

    output: ir.Value
    rows: ir.Value
    source: Source
    bias: Source | None
    indices: ir.Value
    slots: int
    weights: ir.Value | None
    groups: int
    width: int


def grouped_at(facts: Facts, node: ir.Node) -> Grouped | None:
    """The products that a node is one of, or all of."""
    own = product_of(facts, node)
    if own is None or not (own.source.whole or own.source.expert == 0):
        return None
    shape = facts.shapes.of(own.source.value)
    if shape is None or len(shape) != 3 or not all(isinstance(size, int) for size in shape):
        return None
    groups, *sizes = (size for size in shape if isinstance(size, int))
    width = sizes[1 if own.source.turned else 0]
    products = [own] if own.source.whole else _others(facts, own, groups)
    if products is None:
        return None
    ends = [each.node.outputs[0] for each in products]
    bias: Source | None = None
    for value in _arranged(facts, ends, alone=own.source.whole):
        found = biased_of(facts, value)
        if found is not None:
            bias = found[0].biases[0]
        for rows in _inputs(facts, products):
            made = _found(facts, value, rows, own.source, bias, groups, width)
            if made is not None:
                return made
    return None


def _others(facts: Facts, own: Product, groups: int) -> list[Product] | None:
    """The products with every matrix of the stack, in their order, each once."""
    found: dict[int, Product] = {}
    pending, seen = [own.source.value], {own.source.value}
    while pending:
        for use in pending.pop().uses():
            each = product_of(facts, use.node) if facts.known(use.node) else None
            if each is not None and each.source.value is own.source.value:
                number = each.source.expert
                if number is None or number in found or each.source.turned != own.source.turned:
                    return None
                found[number] = each
            elif producer(use.node.outputs[0], *_VIEWS, *_SELECTS, "Transpose") is not None:
                new = [v for v in use.node.outputs if v not in seen]
                seen.update(new)
                pending.extend(new)
    return [found[at] for at in range(groups)] if set(found) == set(range(groups)) else None


def _arranged(facts: Facts, ends: list[ir.Value], *, alone: bool) -> Iterator[ir.Value]:
    """The values that a group's products come together in, while rows are only arranged."""
    if alone:
        yield ends[0]
    for value in joins(facts, ends, set(), choosing=True):
        node = value.producer()
        if node is None or node.op_type not in _ARRANGES or value.dtype not in FLOATS:
            return
        yield value


def _inputs(facts: Facts, products: list[Product]) -> list[ir.Value]:
    """What all of the rows may be taken from, farthest first."""
    chains = [_chain(facts, each.rows) for each in products]
    return [v for v in reversed(chains[0]) if all(v in chain for chain in chains[1:])]


def _chain(facts: Facts, rows: ir.Value) -> list[ir.Value]:
    chain = [rows]
    for _ in range(24):
        node = producer(chain[-1], *_VIEWS, *_SELECTS)
        if node is None or (node.op_type == "Gather" and attribute(node, "axis", 0) != 0):
            break
        chain.append(given(node))
    return chain


def _found(
    facts: Facts,
    output: ir.Value,
    rows: ir.Value,
    source: Source,
    bias: Source | None,
    groups: int,
    width: int,
) -> Grouped | None:
    """What an output is of these rows, if what it follows from beside them is a choice."""
    given_shape, made_shape = facts.shapes.of(rows), facts.shapes.of(output)
    stack = facts.shapes.of(source.value) or ()
    inner = stack[1 if source.turned else 2]
    if not given_shape or made_shape is None or given_shape[-1] != inner or width not in made_shape:
        return None
    count = facts.shapes.resolve(product(given_shape[:-1]))
    total = divide(facts.shapes.resolve(product(made_shape)), width)
    if total is None:
        return None
    slots, fewer = divide(total, count), divide(count, total)
    if isinstance(slots, int) and 1 <= slots <= MAX_SLOTS:
        indices = _choice(facts, output, rows, count, slots, weighed=False)
        if indices is not None:
            return Grouped(output, rows, source, bias, indices[0], slots, None, groups, width)
    if isinstance(fewer, int) and 1 <= fewer <= MAX_SLOTS:
        both = _choice(facts, output, rows, total, fewer, weighed=True)
        if both is not None:
            return Grouped(output, rows, source, bias, both[0], fewer, both[1], groups, width)
    return None


def _choice(
    facts: Facts, output: ir.Value, rows: ir.Value, count: Dim, slots: int, *, weighed: bool
) -> tuple[ir.Value, ir.Value | None] | None:
    """The indices, and the weights, that an output follows from beside the rows."""
    for found in frontiers(facts, output, rows, count, slots):
        integers = [v for v in found if v.dtype in _INTEGERS and found[v] == slots]
        floats = [v for v in found if v.dtype in FLOATS and found[v] == slots]
        if len(integers) == 1 and len(floats) == weighed and len(found) == 1 + weighed:
            return integers[0], floats[0] if weighed else None
    return None
