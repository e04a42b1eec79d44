"""Mixtures of experts, found from what chooses: from a router's TopK to the sum over its experts.

    TopK or ArgMax -> ... everything that follows from it ... -> one value again: the output
    output -> back through sums and weights -> second products -> activations -> first products
           -> back through moved rows -> the tokens
    output -> back, as far as needed, until all that is left to know is, of each token, a few
              numbers of experts and what each of them weighs: the routing

Between these three ends lies an exporter's way of bringing tokens to experts: weights gathered for
each token, rows sorted by expert, a loop over experts, or all experts on all tokens and a mask. It
is not read. What it computes is shown to be the mixture by running it (`verify.rewrites`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxgen.analysis.expert_features import (
    Biased,
    Features,
    Unread,
    biased_of,
    features_of,
)
from onnxgen.analysis.expert_numbers import number_of
from onnxgen.analysis.expert_routing import MAX_NODES, chooses, joins
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import FLOATS, attribute, constant, given, producer
from onnxgen.analysis.symbols import Dim, product
from onnxgen.analysis.views import scalar_factor

MAX_JOINS = 60


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts.

    Attributes:
        output: its sum, [.., H] for the tokens.
        tokens: [.., H].
        count: of experts.
        first: the features of the experts, each of one or of all: as many as `second`.
        second: the second products with their biases.
        scaled: whether weights multiply the experts' inputs.
    """

    output: ir.Value
    tokens: ir.Value
    count: int
    first: tuple[Features, ...]
    second: tuple[Biased, ...]
    scaled: bool

    @property
    def products(self) -> set[ir.Node]:
        """The first products."""
        leaves = (biased for features in self.first for biased, _ in features.leaves)
        return {each.node for biased in leaves for each in biased.products}


def mixture_of(facts: Facts, node: ir.Node) -> Mixture | None:
    """The mixture that a TopK or ArgMax chooses the experts of, as much of the sum as there is.

    Raises:
        Unread: there is one, and what its experts compute cannot be read.
    """
    if not chooses(node):
        return None
    best: Mixture | None = None
    unread: Unread | None = None
    ends: frozenset[ir.Node] = frozenset()
    reached: set[ir.Value] = set()
    for number, value in enumerate(joins(facts, node.outputs, reached)):
        shape = facts.shapes.of(value)
        if value.dtype not in FLOATS or not shape or not isinstance(shape[-1], int):
            continue
        try:
            found = _ends(facts, value, reached)
        except Unread as error:
            unread, found = unread or error, []
            if ends:
                break
        nodes = frozenset(biased.products[0].node for biased, _ in found)
        if (ends and nodes != ends) or number > MAX_JOINS or (ends and _scales(value)):
            break  # what follows is more than the sum: the residual, another layer
        if not found or not any(_of_many(biased, len(found)) for biased, _ in found):
            continue
        try:
            mixture = _mixture(facts, value, found, reached)
        except Unread as error:
            error.products = tuple(sorted(nodes, key=lambda each: facts.order(each.outputs[0])))
            unread = unread or error
            continue
        ends = nodes
        if best is None or len(shape) <= 2 or (facts.shapes.rank(best.output) or 0) > 2:
            best = mixture
    if best is None and unread is not None:
        raise unread
    return best


def _numbered(
    facts: Facts, ends: Sequence[tuple[Biased, ir.Value]]
) -> list[tuple[Biased, ir.Value]]:
    """Second products in the order of the numbers that experts are chosen by, where these tell."""
    if any(biased.products[0].source.expert is not None for biased, _ in ends):
        return list(ends)
    numbers = [number_of(facts, biased.products[0]) for biased, _ in ends]
    known = {number for number in numbers if number is not None}
    if known != set(range(len(ends))):
        return list(ends)
    return [ends[numbers.index(number)] for number in range(len(ends))]


def _of_many(biased: Biased, products: int) -> bool:
    """Whether a product is one of several experts'."""
    source = biased.products[0].source
    return source.whole or source.expert is not None or products > 1


def _scales(value: ir.Value) -> bool:
    """Whether a value is one behind a constant factor: that stays where it is."""
    node = value.producer()
    return node is not None and scalar_factor(node) is not None


def _mixture(
    facts: Facts,
    output: ir.Value,
    ends: Sequence[tuple[Biased, ir.Value]],
    reached: Collection[ir.Value],
) -> Mixture:
    shape = facts.shapes.of(output) or ()
    ends = list(ends)
    ends.sort(key=lambda found: facts.order(found[0].products[0].node.outputs[0]))
    ends = _numbered(facts, ends)
    second = tuple(biased for biased, _ in ends)
    first = tuple(features_of(facts, rows) for _, rows in ends)
    tokens: list[tuple[ir.Value, bool]] = []
    for features in first:
        for biased, _ in features.leaves:
            for each in biased.products:
                found = _tokens(facts, each.rows, shape, reached)
                if found is None:
                    raise Unread("the first products are not of rows of tokens", each.node)
                if found not in tokens:
                    tokens.append(found)
    if len(tokens) != 1:
        raise Unread("the first products are not of the same tokens", output.producer())
    counts = {_count(facts, biased, len(second)) for biased in second}
    if len(counts) != 1 or (count := counts.pop()) is None:
        raise Unread("how many experts there are is not known", output.producer())
    return Mixture(output, tokens[0][0], count, first, second, tokens[0][1])


def _ends(
    facts: Facts, output: ir.Value, reached: Collection[ir.Value]
) -> list[tuple[Biased, ir.Value]]:
    """The second products that a value is a weighted sum of, and their rows.

    Args:
        reached: what follows from the router's choice. Nothing is found where a summand does not,
            and is weighed by nothing that does: a shared expert's, or the residual.

    Raises:
        Unread: a constant is added to them, or scales them.
    """
    found: dict[ir.Node, tuple[Biased, ir.Value]] = {}
    width = (facts.shapes.of(output) or (1,))[-1]
    changed: ir.Node | None = None
    pending, seen = [output], {output}
    while pending and len(seen) < MAX_NODES:
        value = pending.pop()
        node = value.producer()
        if node is None or not facts.is_activation(value):
            continue
        ending = biased_of(facts, value)
        if ending is not None:
            for product_, bias in zip(ending[0].products, ending[0].biases, strict=True):
                found[product_.node] = (Biased((product_,), (bias,)), product_.rows)
            continue
        if producer(value) is None:
            continue
        if value not in reached and node.op_type not in (*_MOVES, "Cast"):
            continue
        changed = changed or (node if _changes(node) else None)
        weighs = node.op_type in _WEIGHING or value not in reached
        summands = [v for v in _summands(facts, node) if _has(facts, v, width)]
        if not weighs and any(each not in reached for each in summands):
            return []
        for follow in summands:
            if follow not in seen:
                seen.add(follow)
                pending.append(follow)
    if changed is not None and found:
        reason = "a constant changes what an expert's second product gives"
        raise Unread(reason, changed)
    return list(found.values())


def _changes(node: ir.Node) -> bool:
    """Whether a node adds a constant to the rows of experts, or scales them by one."""
    neutral = {"Add": 0.0, "Sub": 0.0, "Sum": 0.0, "Mul": 1.0, "Div": 1.0}.get(node.op_type)
    return neutral is not None and any(
        value is not None
        and value.const_value is not None
        and not value.is_graph_input()
        and not _all(value, neutral)
        for value in node.inputs
    )


def _all(value: ir.Value, number: float) -> bool:
    found = constant(value)
    return found is not None and bool((found == number).all())


def _has(facts: Facts, value: ir.Value, size: Dim) -> bool:
    """Whether an axis of a value may have a size: weights of tokens have none of the features."""
    shape = facts.shapes.of(value)
    return shape is None or size in shape


def _summands(facts: Facts, node: ir.Node) -> Sequence[ir.Value]:
    """What a node adds up, weighs or moves, of rows of features."""
    match node.op_type:
        case "Add" | "Mul" | "Sum" | "MatMul":
            inputs = [v for v in node.inputs if v is not None]
        case "Where":
            inputs = [given(node, 1), given(node, 2)]
        case "ScatterND" | "ScatterElements":
            inputs = [given(node, 0), given(node, 2)]
        case "Concat":
            inputs = [v for v in node.inputs if v is not None]
        case "Slice" | "Split" | "Cast" | "CastLike" | "ReduceSum" | "Div":
            inputs = [given(node)]
        case kind if kind in _MOVES and (kind != "Gather" or attribute(node, "axis", 0) == 0):
            inputs = [given(node)]
        case _:
            return ()
    return [v for v in inputs if v.dtype in FLOATS and facts.is_activation(v)]


_WEIGHING = frozenset({"Mul", "MatMul", "Where"})
_MOVES = (
    "Identity",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Reshape",
    "Transpose",
    "Expand",
    "Tile",
    "Gather",
    "GatherND",
    "GatherElements",
)


def _tokens(
    facts: Facts, rows: ir.Value, shape: Sequence[Dim], reached: Collection[ir.Value]
) -> tuple[ir.Value, bool] | None:
    """The tokens that rows are taken from, and whether weights multiplied them on the way.

    Args:
        reached: what follows from the router's choice. No tokens do, though as many rows may.
    """
    tokens, width = product(shape[:-1]), shape[-1]
    scaled = False
    value = rows
    for _ in range(24):
        size = facts.shapes.of(value)
        node = producer(value)
        if node is None:
            return (value, scaled) if _is_tokens(facts, size, tokens, width) else None
        if node.op_type == "Mul" and not scaled:
            weighed = _weighed(facts, node)
            if weighed is not None:
                value, scaled = weighed, True
                continue
        if value not in reached and _is_tokens(facts, size, tokens, width):
            return _flat(facts, value, tokens, width), scaled
        if node.op_type not in (*_MOVES, "Cast", "Slice", "Split"):
            return None
        value = given(node)
    return None


def _flat(facts: Facts, value: ir.Value, tokens: Dim, width: Dim) -> ir.Value:
    """The tokens as [T, H], where they are on the way to where they come from."""
    step = value
    while facts.shapes.rank(step) != 2:
        node = producer(step, "Unsqueeze", "Squeeze", "Reshape", "Identity", "Flatten")
        if node is None or not _is_tokens(facts, facts.shapes.of(given(node)), tokens, width):
            return value
        step = given(node)
    return step


def _is_tokens(facts: Facts, shape: Sequence[Dim] | None, tokens: Dim, width: Dim) -> bool:
    return bool(shape and shape[-1] == width and facts.shapes.same(product(shape[:-1]), tokens))


def _weighed(facts: Facts, node: ir.Node) -> ir.Value | None:
    """The rows that a Mul weighs each by a number of its own, computed at run time."""
    for index in (0, 1):
        weight, rows = given(node, index), given(node, 1 - index)
        shape, other = facts.shapes.of(weight), facts.shapes.of(rows)
        if shape and other and shape[-1] == 1 and other[-1] != 1 and facts.is_activation(weight):
            return rows
    return None


def _count(facts: Facts, biased: Biased, products: int) -> int | None:
    """How many experts a second product is one of."""
    source = biased.products[0].source
    if source.whole or source.expert is not None:
        shape = facts.shapes.of(source.value)
        assert shape is not None
        return shape[0] if isinstance(shape[0], int) else None
    return products
