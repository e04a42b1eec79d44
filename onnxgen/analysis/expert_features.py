"""What stands between an expert's two products, read along the features.

Rows are gathered, sorted, cut apart and joined on the way, each exporter in its own manner: none of
that touches a feature, and is passed over. What is left is an activation: elementwise operators on
the features of the first product, or on its two halves (`functions.activation`). Whether rows end
where they should is shown by running, not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from onnxgen.analysis.expert_weights import Product, Source, bias_of, product_of
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import FLOATS, attribute, given, names, optional, producer, scalar
from onnxgen.analysis.view_shapes import slice_bounds
from onnxgen.functions.activation import NAMES, OPERATORS, Activation, Term

# Which features of a product: all, or every `step`th of them from `start` on, `count` in all.
MAX_NODES = 4000
ROW_MOVES = names(
    """
    Identity Squeeze Unsqueeze Flatten Reshape Transpose Expand Tile Gather GatherND
    """
)
_PIECEWISE = {"LeakyRelu": 0.01, "Elu": 1.0}  # and their default alpha
_WORDS = {op: word for word, (op, _) in OPERATORS.items() if op not in ("Cast", "CastLike")}


@dataclass(frozen=True)
class Selection:
    """Which features of a product: `count` of them, every `step`th from `start` on."""

    start: int
    step: int
    count: int


@dataclass(frozen=True)
class Biased:
    """The first products of one or all experts, with their biases.

    Attributes:
        products: one, or one for each expert whose rows are joined.
        biases: as many; None where there is none.
    """

    products: tuple[Product, ...]
    biases: tuple[Source | None, ...]


@dataclass
class Features:
    """What an expert makes of its first products before the second.

    Attributes:
        term: the activation, of "a" and "b".
        leaves: the products that a and b are, and which of their features.
    """

    term: Term
    leaves: list[tuple[Biased, Selection | None]] = field(default_factory=list)


class Unread(Exception):
    """What stands between the products cannot be read; says what, and where.

    Attributes:
        node: what stopped the reading.
        products: the second products, where these are known.
    """

    def __init__(self, reason: str, node: ir.Node | None = None) -> None:
        self.node = node
        self.products: tuple[ir.Node, ...] = ()
        super().__init__(reason)


def features_of(facts: Facts, rows: ir.Value) -> Features:
    """What the rows of a second product are, as an activation of first products.

    Raises:
        Unread: it is no elementwise function of one or two features.
    """
    reading = _Reading(facts)
    term = reading.term(rows, None)
    leaves = [leaf for leaf, _ in sorted(reading.leaves.items(), key=lambda item: item[1])]
    return Features(term, leaves)


def biased_of(facts: Facts, value: ir.Value) -> tuple[Biased, ir.Value] | None:
    """The products with biases that a value is, rows moved or not, and where the first one ends."""
    return _Reading(facts).biased(value)


class _Reading:
    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.leaves: dict[tuple[Biased, Selection | None], int] = {}
        self.nodes = 0

    def term(self, value: ir.Value, selection: Selection | None) -> Term:
        number = scalar(value)
        if number is not None:
            return number
        found = self.biased(value)
        if found is not None:
            return self._leaf(found[0], selection)
        node = producer(value)
        self.nodes += 1
        if node is None or self.nodes > MAX_NODES:
            raise Unread(f"{value.name!r} is no product with weights of experts", node)
        kind = node.op_type
        if kind in ("Split", "Slice", "Gather") and selection is None:
            picked = self._picked(node, value)
            if picked is not None:
                return self.term(*picked)
        if self.moves_rows(node):
            return self.term(given(node), selection)
        if kind == "Concat":
            parts = [self.term(v, selection) for v in node.inputs if v is not None]
            if attribute(node, "axis", 0) == 0 and all(part == parts[0] for part in parts):
                return parts[0]
        elif kind == "Cast" and given(node).dtype in FLOATS and value.dtype in FLOATS:
            inner = self.term(given(node), selection)
            return self._cast(inner, given(node).dtype, value.dtype)
        elif kind == "Clip":
            return self._clip(node, selection)
        elif kind == "Gelu":
            name = "gelutanh" if attribute(node, "approximate", "none") == "tanh" else "gelu"
            return _put(Activation(NAMES[name]).term, self.term(given(node), selection))
        elif kind == "Swish":
            inner = self.term(given(node), selection)
            alpha = float(attribute(node, "alpha", 1.0))
            scaled: Term = inner if alpha == 1.0 else ("mul", (alpha, inner))
            return "mul", (inner, ("sigmoid", (scaled,)))
        elif kind in _PIECEWISE:
            alpha = float(attribute(node, "alpha", _PIECEWISE[kind]))
            return _bent(kind, alpha, self.term(given(node), selection))
        elif kind in _WORDS:
            return self._elementwise(node, _WORDS[kind], selection)
        raise Unread(f"{kind} stands between its products, and is no activation", node)

    def moves_rows(self, node: ir.Node) -> bool:
        """Whether a node moves whole rows of features and changes none."""
        if producer(node.outputs[0], *ROW_MOVES) is None:
            return node.op_type in ("Slice", "Split") and self._cuts_rows(node)
        before, after = (self._width(v) for v in (given(node), node.outputs[0]))
        if node.op_type == "Gather":
            return attribute(node, "axis", 0) == 0 and before == after
        return before is not None and before == after

    def biased(self, value: ir.Value) -> tuple[Biased, ir.Value] | None:
        """First products, joined and moved as they may be, with the biases added to them."""
        chain = [value]
        for _ in range(12):
            node = chain[-1].producer()
            if node is None:
                return None
            product = product_of(self.facts, node)
            if product is not None:
                bias = bias_of(self.facts, product.bias)
                if product.bias is not None and bias is None:
                    return None
                return Biased((product,), (bias,)), product.rows
            if producer(chain[-1]) is None:
                return None
            if node.op_type == "Add":
                return self._added(node)
            if node.op_type == "Concat" and attribute(node, "axis", 0) == 0:
                return self._joined(node)
            if not self.moves_rows(node) or node.op_type in ("Slice", "Split"):
                return None
            chain.append(given(node))
        return None

    def _added(self, node: ir.Node) -> tuple[Biased, ir.Value] | None:
        for index in (0, 1):
            bias = bias_of(self.facts, node.inputs[1 - index])
            found = None if bias is None else self.biased(given(node, index))
            if found is not None and all(each is None for each in found[0].biases):
                whole = bias is not None and bias.whole
                if len(found[0].products) > 1 and not whole:
                    return None
                biases = (bias,) * len(found[0].products)
                return Biased(found[0].products, biases), found[1]
        return None

    def _joined(self, node: ir.Node) -> tuple[Biased, ir.Value] | None:
        products: list[Product] = []
        biases: list[Source | None] = []
        rows: ir.Value | None = None
        for value in node.inputs:
            found = None if value is None else self.biased(value)
            if found is None:
                return None
            products += found[0].products
            biases += found[0].biases
            rows = rows or found[1]
        return None if rows is None else (Biased(tuple(products), tuple(biases)), rows)

    def _leaf(self, biased: Biased, selection: Selection | None) -> Term:
        # The letter is given by the order in which they are met; which is which is in `leaves`.
        number = self.leaves.setdefault((biased, selection), len(self.leaves))
        if number > 1:
            raise Unread("the activation reads more than two features", biased.products[0].node)
        return "ab"[number]

    def _elementwise(self, node: ir.Node, word: str, selection: Selection | None) -> Term:
        operands = tuple(self.term(v, selection) for v in node.inputs if v is not None)
        if len(operands) != OPERATORS[word][1]:
            raise Unread(f"{node.op_type} of {len(operands)} operands is not read", node)
        return word, operands

    def _clip(self, node: ir.Node, selection: Selection | None) -> Term:
        term = self.term(given(node), selection)
        for word, bound in (("max", optional(node, 1)), ("min", optional(node, 2))):
            if bound is not None:
                number = scalar(bound)
                if number is None:
                    raise Unread("a bound of Clip is computed", node)
                term = (word, (term, number))
        return term

    def _cast(self, term: Term, before: ir.DataType | None, after: ir.DataType | None) -> Term:
        if before == after:
            return term
        return ("float" if after == ir.DataType.FLOAT else "narrow", (term,))

    def _picked(self, node: ir.Node, value: ir.Value) -> tuple[ir.Value, Selection] | None:
        """The product that a Split, Slice or Gather takes features of, and which."""
        source = given(node)
        shape = self.facts.shapes.of(source)
        if shape is None:
            return None
        rank = len(shape)
        found = self._span(node, value, rank)
        if found is None:
            return None
        axis, start, count, step = found
        size = shape[axis]
        if not isinstance(size, int):
            return None
        inner = all(each == 1 for each in shape[axis + 1 :])
        if inner and size == self._width(source):
            split = producer(source, "Reshape")
            whole = None if split is None else self._width(given(split))
            if count == 1 and size == 2 and whole is not None and split is not None:
                return given(split), Selection(start, 2, whole // 2)  # ... [.., I, 2]
            return source, Selection(start, step, count)
        split = producer(source, "Reshape")
        if split is None or axis != rank - 2 or size != 2 or count != 1:
            return None
        rest, whole = shape[-1], self._width(given(split))
        if not isinstance(rest, int) or whole != 2 * rest:
            return None
        return given(split), Selection(start * rest, 1, rest)  # [.., 2, I]

    def _span(self, node: ir.Node, value: ir.Value, rank: int) -> tuple[int, int, int, int] | None:
        """(axis, first, how many, step) of what is taken."""
        shapes = self.facts.shapes
        if node.op_type == "Split":
            axis, start = attribute(node, "axis", 0) % rank, 0
            for output in node.outputs:
                shape = shapes.of(output)
                if shape is None or not isinstance(shape[axis], int):
                    return None
                size = shape[axis]
                assert isinstance(size, int)
                if output is value:
                    return axis, start, size, 1
                start += size
            return None
        if node.op_type == "Gather":
            number = scalar(node.inputs[1])
            axis = attribute(node, "axis", 0) % rank
            return None if number is None else (axis, int(number), 1, 1)
        bounds = slice_bounds(shapes, node)
        if bounds is None or len(bounds) != 1:
            return None
        axis, first, length, step = bounds[0]
        if not isinstance(first, int) or not isinstance(length, int):
            return None
        return axis, first, length, step

    def _cuts_rows(self, node: ir.Node) -> bool:
        before, after = (self._width(v) for v in (given(node), node.outputs[0]))
        return before is not None and before == after

    def _width(self, value: ir.Value) -> int | None:
        """How many features a row has: the last axis that is not 1."""
        shape = self.facts.shapes.of(value)
        long = [size for size in shape or () if size != 1]
        return long[-1] if long and isinstance(long[-1], int) else None


def _bent(kind: str, alpha: float, x: Term) -> Term:
    """LeakyRelu, PRelu's like: alpha x below zero; Elu: alpha (exp(x) - 1) there."""
    below: Term = ("min", (x, 0.0))
    if kind == "Elu":
        below = ("sub", (("exp", (below,)), 1.0))
    return "add", (("max", (x, 0.0)), ("mul", (alpha, below)))


def _put(term: Term, operand: Term) -> Term:
    """A term of "a" with another term in its place."""
    if isinstance(term, tuple):
        return term[0], tuple(_put(each, operand) for each in term[1])
    return operand if term == "a" else term
