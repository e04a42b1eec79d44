"""What a fused model still holds that should have become one operator, counted on its own.

    leftovers(model)            # Counter({"attention": 2, "norm": 1}); empty where nothing is left

Nothing of `onnxgen` is asked: a rule that misses its sites in silence is found out here. Each kind
is known by the arithmetic that no spelling can do without, followed through whatever stands
between:

    attention   a Softmax (or Exp over its sum) that leads from one product of activations into
                another; a router's leads out of a weight matrix
    norm        a mean of squares whose root something is divided by
    rotary      halves that change places, one of them negated: Concat(Neg(b), a); or the products
                a cos - b sin beside b cos + a sin
    cache       a cache that grows and enters no operator that holds caches
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np
import onnx
from onnx import numpy_helper

PRODUCTS = frozenset({"MatMul", "Einsum", "FusedMatMul"})
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


def leftovers(model: onnx.ModelProto, growing: Collection[str] = ()) -> Counter[str]:
    """How many sites of each kind the main graph still holds in parts.

    Args:
        growing: names of the past inputs that an output continues.
    """
    graph = Graph(model.graph)
    found = Counter(
        attention=sum(map(graph.attends, graph.softmaxes())),
        norm=sum(map(graph.norms, graph.graph.node)),
        rotary=graph.rotations(),
        cache=sum(not graph.held(name) for name in growing),
    )
    return +found


class Graph:
    """A graph with its producers, its readers, and which values are activations."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.producer: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        constant = {"", *self.constants}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
            self.producer.update((name, node) for name in node.output)
            if node.op_type == "Constant":
                self.constants.update((name, node.attribute[0].t) for name in node.output)
            if all(name in constant for name in node.input):
                constant.update(node.output)
        self.fixed = constant

    def number(self, name: str) -> float | None:
        """A constant of one element."""
        tensor = self.constants.get(name)
        if tensor is None or int(np.prod(tensor.dims)) != 1:
            return None
        return float(numpy_helper.to_array(tensor).reshape(-1)[0])

    def way(
        self, start: Iterable[str], up: bool, through: Callable[[onnx.NodeProto], bool]
    ) -> Iterator[onnx.NodeProto]:
        """Every node that is reached from values, upwards or downwards, ends included."""
        pending, seen = list(start), set[str]()
        while pending:
            name = pending.pop()
            if name in seen:
                continue
            seen.add(name)
            near = [self.producer[name]] if up and name in self.producer else []
            for node in near if up else self.readers.get(name, []):
                yield node
                if through(node):
                    pending += node.input if up else node.output

    # --- attention ------------------------------------------------------------------------------

    def softmaxes(self) -> Iterator[onnx.NodeProto]:
        """Softmax nodes, and divisions of an Exp by its own sum."""
        for node in self.graph.node:
            if node.op_type == "Softmax":
                yield node
            elif node.op_type == "Div":
                top, bottom = (self.behind(name) for name in node.input)
                parts = [each.op_type if each else "" for each in (top, bottom)]
                if parts == ["Exp", "ReduceSum"] and self.behind(bottom.input[0]) is top:
                    yield node

    def behind(self, name: str) -> onnx.NodeProto | None:
        """The node that makes a value, through views."""
        node = self.producer.get(name)
        while node is not None and node.op_type in VIEWS:
            node = self.producer.get(node.input[0])
        return node

    def attends(self, softmax: onnx.NodeProto) -> bool:
        """Whether it stands between two products of activations."""

        def inside(node: onnx.NodeProto) -> bool:
            return node.op_type not in ENDS

        def product(node: onnx.NodeProto) -> bool:
            return node.op_type in PRODUCTS and not any(n in self.fixed for n in node.input)

        return any(map(product, self.way(softmax.input, True, inside))) and any(
            map(product, self.way(softmax.output, False, inside))
        )

    # --- norms ----------------------------------------------------------------------------------

    def norms(self, node: onnx.NodeProto) -> bool:
        """Whether a node is a mean of squares whose root something is divided by."""
        if node.op_type not in ("ReduceMean", "ReduceSumSquare", "ReduceL2", "ReduceSum"):
            return False
        if node.op_type in ("ReduceMean", "ReduceSum") and not self.square(node.input[0]):
            return False
        if node.op_type != "ReduceMean" and node.input[0] in self.fixed:
            return False

        def inside(each: onnx.NodeProto) -> bool:
            return each.op_type in VIEWS | {"Add", "Div", "Mul", "Max", "Clip", "ReduceMean"} and (
                sum(name not in self.fixed for name in each.input) == 1
            )

        for each in self.way(node.output, False, inside):
            root = each.op_type == "Sqrt" or (
                each.op_type == "Pow" and self.number(each.input[1]) in (0.5, -0.5)
            )
            if root and node.op_type in ("ReduceMean", "ReduceSumSquare", "ReduceSum"):
                return node.op_type == "ReduceMean" or self.averaged(node)
        return False

    def averaged(self, node: onnx.NodeProto) -> bool:
        """Whether a sum is divided by a number, as a mean is."""
        return any(
            each.op_type in ("Div", "Mul") and any(name in self.fixed for name in each.input)
            for name in node.output
            for each in self.readers.get(name, [])
        )

    def square(self, name: str) -> bool:
        node = self.behind(name)
        if node is None or name in self.fixed:
            return False
        if node.op_type == "Pow":
            return self.number(node.input[1]) == 2.0
        return node.op_type == "Mul" and node.input[0] == node.input[1]

    # --- rotations ------------------------------------------------------------------------------

    def rotations(self) -> int:
        return sum(map(self.turns_halves, self.graph.node)) + self.crossed()

    def turns_halves(self, node: onnx.NodeProto) -> bool:
        """Concat(Neg(b), a) of parts a and b of one tensor, multiplied afterwards."""
        if node.op_type != "Concat" or len(node.input) != 2:
            return False
        makers = [self.behind(name) for name in node.input]
        negated = [m is not None and m.op_type == "Neg" for m in makers]
        if sum(negated) != 1:
            return False
        (neg,) = [m for m, is_neg in zip(makers, negated, strict=True) if is_neg and m is not None]
        other = node.input[negated.index(False)]
        sources = {self.source(neg.input[0]), self.source(other)}
        if len(sources) != 1 or sources & self.fixed:
            return False
        near = self.way(node.output, False, lambda each: each.op_type in VIEWS)
        return any(each.op_type == "Mul" for each in near)

    def source(self, name: str) -> str:
        """The tensor that a value is a part of."""
        node = self.producer.get(name)
        while node is not None and (node.op_type in PARTS or self.lengthens(node)):
            name = node.input[0]
            node = self.producer.get(name)
        return name

    def lengthens(self, node: onnx.NodeProto) -> bool:
        """Whether a node puts empty places behind a tensor."""
        makers = [self.producer.get(name) for name in node.input[1:]]
        empty = [maker is not None and maker.op_type == "ConstantOfShape" for maker in makers]
        return node.op_type == "Concat" and bool(empty) and all(empty)

    def crossed(self) -> int:
        """Pairs of a * c - b * s and b * c + a * s."""
        sums: Counter[frozenset[tuple[str, str]]] = Counter()
        for node in self.graph.node:
            if node.op_type == "Add":
                sums[self.products(node)] += 1
        found = 0
        for node in self.graph.node:
            if node.op_type != "Sub":
                continue
            pairs = [self.factors(name) for name in node.input]
            if len(pairs[0]) != 2 or len(pairs[1]) != 2:
                continue
            (a, c), (b, s) = pairs
            swapped = [{(b, c), (a, s)}, {(b, a), (c, s)}, {(s, c), (a, b)}, {(s, a), (c, b)}]
            wanted = {frozenset((min(p), max(p)) for p in each) for each in swapped}
            found += any(sums[each] for each in wanted)
        return found

    def products(self, node: onnx.NodeProto) -> frozenset[tuple[str, str]]:
        pairs = [self.factors(name) for name in node.input]
        return frozenset((min(pair), max(pair)) for pair in pairs if len(pair) == 2)

    def factors(self, name: str) -> tuple[str, ...]:
        """The factors of a product of two."""
        node = self.producer.get(name)
        return tuple(node.input) if node is not None and node.op_type == "Mul" else ()

    # --- caches ---------------------------------------------------------------------------------

    def held(self, past: str) -> bool:
        """Whether a past enters an operator that holds caches, through views and cuts only.

        A latent one cannot: what attends reads no view of it, but what weights make of it.
        """
        near = list(
            self.way([past], False, lambda n: n.op_type in VIEWS | {"Slice"} or self.lengthens(n))
        )
        if any(
            node.op_type in HOLDERS
            and any(
                index < len(node.input) and self.source(node.input[index]) == past
                for index in HOLDERS[node.op_type]
            )
            for node in near
        ):
            return True
        joined = [name for node in near if node.op_type not in VIEWS for name in node.output]
        after = list(self.way(joined, False, lambda each: each.op_type in VIEWS | {"Slice"}))
        return bool(joined) and not any(
            node.op_type in HOLDERS
            or (node.op_type in PRODUCTS and not any(name in self.fixed for name in node.input))
            for node in after
        )
