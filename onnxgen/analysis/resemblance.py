"""What looks like an attention, a norm, a rotation, a cache or a mixture of experts in parts.

    resemblances(graph)         # what a graph holds in parts that one operator could say

No rule is asked: a rule that misses its sites in silence is found out here. Each kind is known by
the arithmetic that no spelling can do without, followed through whatever stands between:

    attention   a Softmax (or Exp over its sum) that leads from one product of activations into
                another; a router's leads out of a weight matrix
    norm        a mean of squares whose root something is divided by
    rotary      halves that change places, one of them negated: Concat(Neg(b), a); or the products
                a cos - b sin beside b cos + a sin
    cache       a cache that grows and enters no operator that holds caches
    moe         a choice (TopK) whose indices lead to products, and not into an operator that takes
                them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxgen.analysis.graph import scalar

PRODUCTS = frozenset({"MatMul", "Einsum", "FusedMatMul"})
# Operators that take what a router chose.
CHOSEN = frozenset({"MoE", "QMoE", "GroupedMatMul"})
# Where a way ends: what lies behind is another part of the model.
ENDS = PRODUCTS | {
    *("Gemm", "Conv", "MatMulNBits", "MatMulInteger", "Attention", "MultiHeadAttention"),
    *("GroupQueryAttention", "LayerNormalization", "RMSNormalization", "TopK", "Gather"),
    *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization"),
    *("GatherND", "GatherElements", "ScatterND", "ScatterElements", "ArgMax", "NonZero", "Loop"),
}
VIEWS = frozenset(
    {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Identity", "Cast", "Flatten"}
)
PARTS = VIEWS | {"Slice", "Split", "Gather"}
HOLDERS = {"Attention": (4, 5), "GroupQueryAttention": (3, 4), "MultiHeadAttention": (6, 7)} | {
    "TensorScatter": (0,)
}


@dataclass(frozen=True)
class Resemblance:
    """One place.

    Attributes:
        kind: "attention", "norm", "rotary", "cache" or "moe".
        node: its heart, such as the Softmax; of a cache, the first node that reads it.
        value: of a cache, the past.
    """

    kind: str
    node: ir.Node
    value: ir.Value | None = None


def resemblances(graph: ir.Graph, growing: Collection[str] = ()) -> list[Resemblance]:
    """Every place of a graph, not of its subgraphs, kind by kind in graph order.

    Args:
        growing: names of the past inputs that an output continues.
    """
    parts = _Parts(graph)
    pasts = [value for value in graph.inputs if value.name in growing]
    return [
        *(Resemblance("attention", node) for node in parts.softmaxes() if parts.attends(node)),
        *(Resemblance("norm", node) for node in graph if parts.norms(node)),
        *(Resemblance("rotary", node) for node in graph if parts.turns_halves(node)),
        *(Resemblance("rotary", node) for node in parts.crossed()),
        *(Resemblance("moe", node) for node in graph if parts.chooses(node)),
        *(
            Resemblance("cache", next(iter(past.uses())).node, past)
            for past in pasts
            if past.uses() and not parts.held(past)
        ),
    ]


class _Parts:
    """A graph, and which of its values are constants."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.fixed: set[ir.Value] = set(graph.initializers.values()) - set(graph.inputs)
        for node in graph:
            if node.op_type == "Constant" or all(v is None or v in self.fixed for v in node.inputs):
                self.fixed.update(node.outputs)

    def computed(self, node: ir.Node) -> list[ir.Value]:
        """What a node reads that is no constant."""
        return [value for value in node.inputs if value is not None and value not in self.fixed]

    def way(
        self, start: Iterable[ir.Value | None], up: bool, through: Callable[[ir.Node], bool]
    ) -> Iterator[ir.Node]:
        """Every node that is reached from values, upwards or downwards, ends included."""
        pending, seen = list(start), set[ir.Value]()
        while pending:
            value = pending.pop()
            if value is None or value in seen:
                continue
            seen.add(value)
            maker = value.producer()
            near = [maker] if up and maker is not None else []
            for node in near if up else [use.node for use in value.uses()]:
                yield node
                if through(node):
                    pending += node.inputs if up else node.outputs

    def product(self, node: ir.Node) -> bool:
        """Whether a node multiplies activations."""
        return node.op_type in PRODUCTS and len(self.computed(node)) == len(node.inputs)

    # --- attention ------------------------------------------------------------------------------

    def softmaxes(self) -> Iterator[ir.Node]:
        """Softmax nodes, and divisions of an Exp by its own sum."""
        for node in self.graph:
            if node.op_type == "Softmax":
                yield node
            elif node.op_type == "Div":
                top, bottom = (_behind(value) for value in node.inputs)
                if top is None or bottom is None:
                    continue
                kinds = (top.op_type, bottom.op_type)
                if kinds == ("Exp", "ReduceSum") and _behind(bottom.inputs[0]) is top:
                    yield node

    def attends(self, softmax: ir.Node) -> bool:
        """Whether it stands between two products of activations."""

        def inside(node: ir.Node) -> bool:
            return node.op_type not in ENDS

        return any(map(self.product, self.way(softmax.inputs, True, inside))) and any(
            map(self.product, self.way(softmax.outputs, False, inside))
        )

    # --- norms ----------------------------------------------------------------------------------

    def norms(self, node: ir.Node) -> bool:
        """Whether a node is a mean of squares whose root something is divided by."""
        if node.op_type not in ("ReduceMean", "ReduceSumSquare", "ReduceSum"):
            return False
        if node.op_type != "ReduceSumSquare" and not self.square(node.inputs[0]):
            return False
        if node.inputs[0] in self.fixed:
            return False

        def inside(each: ir.Node) -> bool:
            return each.op_type in VIEWS | {"Add", "Div", "Mul", "Max", "Clip", "ReduceMean"} and (
                len(self.computed(each)) == 1
            )

        for each in self.way(node.outputs, False, inside):
            root = each.op_type == "Sqrt" or (
                each.op_type == "Pow" and _number(each.inputs[1]) in (0.5, -0.5)
            )
            if root:
                return node.op_type == "ReduceMean" or self.averaged(node)
        return False

    def averaged(self, node: ir.Node) -> bool:
        """Whether a sum is divided by a number, as a mean is."""
        return any(
            use.node.op_type in ("Div", "Mul") and any(v in self.fixed for v in use.node.inputs)
            for value in node.outputs
            for use in value.uses()
        )

    def square(self, value: ir.Value | None) -> bool:
        node = _behind(value)
        if node is None or value in self.fixed:
            return False
        if node.op_type == "Pow":
            return _number(node.inputs[1]) == 2.0
        return node.op_type == "Mul" and node.inputs[0] is node.inputs[1]

    # --- rotations ------------------------------------------------------------------------------

    def turns_halves(self, node: ir.Node) -> bool:
        """Concat(Neg(b), a) of parts a and b of one tensor, multiplied afterwards."""
        if node.op_type != "Concat" or len(node.inputs) != 2:
            return False
        makers = [_behind(value) for value in node.inputs]
        negated = [maker for maker in makers if maker is not None and maker.op_type == "Neg"]
        if len(negated) != 1:
            return False
        other = node.inputs[1 - makers.index(negated[0])]
        sources = {_source(negated[0].inputs[0]), _source(other)}
        if len(sources) != 1 or sources & self.fixed:
            return False
        near = self.way(node.outputs, False, lambda each: each.op_type in VIEWS)
        return any(each.op_type == "Mul" for each in near)

    def crossed(self) -> Iterator[ir.Node]:
        """The differences of pairs of a * c - b * s and b * c + a * s."""
        sums: Counter[frozenset[frozenset[ir.Value]]] = Counter()
        for node in self.graph:
            if node.op_type == "Add":
                sums[frozenset(pair for v in node.inputs if (pair := _factors(v)))] += 1
        for node in self.graph:
            pairs = [tuple(_factors(value)) for value in node.inputs]
            if node.op_type != "Sub" or any(len(pair) != 2 for pair in pairs):
                continue
            (a, c), (b, s) = pairs
            swapped = [{(b, c), (a, s)}, {(b, a), (c, s)}, {(s, c), (a, b)}, {(s, a), (c, b)}]
            if any(sums[frozenset(map(frozenset, each))] for each in swapped):
                yield node

    # --- experts --------------------------------------------------------------------------------

    def chooses(self, node: ir.Node) -> bool:
        """Whether what a TopK chooses leads to products, rather than into one operator."""
        if node.op_type != "TopK" or len(node.outputs) < 2 or node.inputs[0] in self.fixed:
            return False

        def inside(each: ir.Node) -> bool:
            return each.op_type not in (ENDS - _CHOICES) | CHOSEN

        near = list(self.way(node.outputs[1:], False, inside))
        return any(each.op_type in PRODUCTS | {"Gemm", "MatMulNBits", "Loop"} for each in near)

    # --- caches ---------------------------------------------------------------------------------

    def held(self, past: ir.Value) -> bool:
        """Whether a past enters an operator that holds caches, through views and cuts only.

        A latent one cannot: what attends reads no view of it, but what weights make of it.
        """
        near = list(
            self.way([past], False, lambda n: n.op_type in VIEWS | {"Slice"} or _lengthens(n))
        )
        if any(
            index < len(node.inputs) and _source(node.inputs[index]) is past
            for node in near
            for index in HOLDERS.get(node.op_type, ())
        ):
            return True
        joined = [value for node in near if node.op_type not in VIEWS for value in node.outputs]
        after = list(self.way(joined, False, lambda each: each.op_type in VIEWS | {"Slice"}))
        return bool(joined) and not any(
            node.op_type in HOLDERS or self.product(node) for node in after
        )


_CHOICES = frozenset(
    {"Gather", "GatherND", "GatherElements", "ScatterND", "ScatterElements", "NonZero", "TopK"}
)


def _number(value: ir.Value | None) -> float | None:
    """A constant of one element, a Constant node's too: models that no pass has seen are asked."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Constant" or "value" not in node.attributes:
        return scalar(value)
    return scalar(ir.Value(name="constant", const_value=node.attributes["value"].as_tensor()))


def _behind(value: ir.Value | None) -> ir.Node | None:
    """The node that makes a value, through views."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in VIEWS:
        source = node.inputs[0]
        node = None if source is None else source.producer()
    return node


def _source(value: ir.Value | None) -> ir.Value | None:
    """The tensor that a value is a part of."""
    node = None if value is None else value.producer()
    while node is not None and (node.op_type in PARTS or _lengthens(node)):
        value = node.inputs[0]
        node = None if value is None else value.producer()
    return value


def _lengthens(node: ir.Node) -> bool:
    """Whether a node puts empty places behind a tensor."""
    makers = [None if value is None else value.producer() for value in node.inputs[1:]]
    empty = [maker is not None and maker.op_type == "ConstantOfShape" for maker in makers]
    return node.op_type == "Concat" and bool(empty) and all(empty)


def _factors(value: ir.Value | None) -> frozenset[ir.Value]:
    """The factors of a product of two."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Mul":
        return frozenset()
    return frozenset(each for each in node.inputs if each is not None)
