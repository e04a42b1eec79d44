"""The nodes of each attention layer: from its projections to its output projection.

    groups = attention_layers(graph, wires, settled)     # positions of nodes, a list a layer

A layer is grown from its heart: an operator that attends, or, where none does, what lies between
the two products of activations around a Softmax (`analysis.resemblance`). Forwards it goes through
views, and gates, to a product with a weight; backwards through everything that only it reads, up to
products with weights. What layers share, such as masks and tables, is read by several of them, and
stays outside; so does what a projection reads: the layer's norm, and the residual stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

import onnx_ir as ir

from onnxgen.analysis.convex import NONE, Wires
from onnxgen.analysis.graph import CONTRIB, names
from onnxgen.analysis.resemblance import ENDS, PRODUCTS, VIEWS, resemblances
from onnxgen.functions import DOMAIN, paged_attention, sink_attention

STANDARD = names("Attention FlexAttention LinearAttention")
# Operators of ONNX Runtime that hold the projections of queries, keys and values too.
PROJECTING = names("Attention PackedAttention QAttention QOrderedAttention LongformerAttention")
ATTENDING: Mapping[str, frozenset[str]] = {
    "": STANDARD,
    "ai.onnx": STANDARD,
    CONTRIB: PROJECTING
    | names(
        """
        DecoderAttention DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention
        GroupQueryAttention LinearAttention MultiHeadAttention PackedMultiHeadAttention
        PagedAttention QOrderedLongformerAttention SparseAttention SparsePagedAttention
        """
    ),
    DOMAIN: frozenset({paged_attention.NAME, sink_attention.NAME}),
}
"""What attends, in one operator, by domain."""

# Products with a weight, in whatever numbers.
_WEIGHING = PRODUCTS | names(
    """
    Conv DynamicQuantizeMatMul FusedGemm Gemm GemmFloat8 GroupedMatMul MatMulBlockQuantizedFp4Weight
    MatMulBlockQuantizedFp8Weight MatMulBnb4 MatMulFpQ4 MatMulInteger MatMulInteger16
    MatMulIntegerToFloat MatMulNBits MatMulNBitsQkv QGemm QLinearConv QLinearMatMul QOrderedMatMul
    """
)
# What may stand between attention and its output projection: views, gates, rows made zeros.
_PASSED = VIEWS | names("DequantizeLinear Div DynamicQuantizeLinear Mul QuantizeLinear Slice Where")
# What a product of integers is followed by, before it is the projection.
_SCALING = names("Cast DequantizeLinear Mul")
_INTEGERS = names("MatMulInteger MatMulInteger16 QLinearMatMul QOrderedMatMul QGemm QLinearConv")
_SIZES = names("Shape Size")
_ANSWERED = VIEWS | {"Slice"}


def attention_layers(graph: ir.Graph, wires: Wires, fixed: Collection[int]) -> list[list[int]]:
    """The nodes of each attention layer, by their positions, in the order of the layers.

    Args:
        wires: of the graph's nodes.
        fixed: nodes that depend on constants alone; they are in no layer.
    """
    layers = _Layers(graph, wires, fixed)
    for node in graph:
        if node.op_type in ATTENDING.get(node.domain, ()):
            layers.add([layers.at[node]], [node.outputs[0]])
    around = [layers.around(f.node) for f in resemblances(graph) if f.kind == "attention"]
    above = Counter(index for scores, _, _ in around for index in scores)
    for scores, heart, ends in around:
        # Masks are products too in places: what leads into several Softmaxes is none's scores.
        layers.add([*(index for index in scores if above[index] == 1), *heart], ends)
    layers.grow_back()
    return layers.result()


class _Layers:
    """Which layer each node is in, as far as it is known."""

    def __init__(self, graph: ir.Graph, wires: Wires, fixed: Collection[int]) -> None:
        self.nodes, self.wires, self.fixed = list(graph), wires, frozenset(fixed)
        self.at = {node: index for index, node in enumerate(self.nodes)}
        self.place = {index: place for place, index in enumerate(wires.order)}
        self.label = [NONE] * len(self.nodes)
        self.edge: set[int] = set()  # nodes that projections read: no layer goes there
        known = (value for value in graph.initializers.values() if not value.is_graph_input())
        self.weights: set[ir.Value | None] = set(known)
        self.weights.update(value for index in fixed for value in self.nodes[index].outputs)

    def result(self) -> list[list[int]]:
        held: dict[int, list[int]] = {}
        for index, label in enumerate(self.label):
            if label != NONE:
                held.setdefault(label, []).append(index)
        return [held[label] for label in sorted(held)]

    # --- the heart ------------------------------------------------------------------------------

    def around(self, softmax: ir.Node) -> tuple[list[int], list[int], list[ir.Value]]:
        """What lies between products and a Softmax, from it to products, and what these give."""
        start = self.at[softmax]
        before = self._way(start, self.wires.sources)
        behind = self._way(start, self.wires.readers)
        scores: set[int] = set()
        for index in sorted(before, key=self.place.__getitem__):
            if self._multiplies(index) or scores.intersection(self.wires.sources[index]):
                scores.add(index)
        heart: set[int] = set()
        for index in sorted(behind, key=self.place.__getitem__, reverse=True):
            if self._multiplies(index) or heart.intersection(self.wires.readers[index]):
                heart.add(index)
        ends = [self.nodes[index].outputs[0] for index in behind if self._multiplies(index)]
        return sorted(scores), sorted(heart | {start}), ends

    def _way(self, start: int, near: list[list[int]]) -> list[int]:
        """Every node that is reached, not through sizes, up to where ways end."""
        pending, seen = list(near[start]), dict[int, None]()
        while pending:
            index = pending.pop()
            op_type = self.nodes[index].op_type
            if index not in seen and op_type not in _SIZES:
                seen[index] = None
                if op_type not in ENDS:
                    pending += near[index]
        return list(seen)

    def _multiplies(self, index: int) -> bool:
        """Whether a node is a product of activations."""
        node = self.nodes[index]
        return node.op_type in PRODUCTS and not self.weights.intersection(node.inputs)

    def add(self, heart: list[int], ends: Iterable[ir.Value]) -> None:
        """A layer, and what comes behind it; hearts that share nodes are of one layer."""
        first = min(self.place[each] for each in heart)
        label = next((self.label[each] for each in heart if self.label[each] != NONE), first)
        for index in heart:
            self.label[index] = label
        for end in ends:
            for index in self._to_projection(end):
                self.label[index] = label

    # --- forwards -------------------------------------------------------------------------------

    def _to_projection(self, value: ir.Value) -> list[int]:
        """The nodes from what attention gives to its output projection; none where there is none."""
        found: list[int] = []
        while (index := self._only_reader(value)) is not None:
            node = self.nodes[index]
            found.append(index)
            value = node.outputs[0]
            if self._projected(node):
                return found + self._rest_of(node)
            if node.op_type not in _PASSED:
                break
        return []

    def _rest_of(self, projection: ir.Node) -> list[int]:
        """What makes a product whole: scales where it is of integers, and its bias."""
        found: list[int] = []
        value, whole = projection.outputs[0], projection.op_type not in _INTEGERS
        while (index := self._only_reader(value)) is not None:
            node = self.nodes[index]
            biased = node.op_type == "Add" and bool(self.weights.intersection(node.inputs))
            if not biased and (whole or node.op_type not in _SCALING):
                break
            found.append(index)
            value = node.outputs[0]
            if biased:
                break
        return found

    def _only_reader(self, value: ir.Value) -> int | None:
        """The node that alone reads a value, for more than its size, if it is in no layer."""
        readers = {use.node for use in value.uses() if use.node.op_type not in _SIZES}
        index = self.at.get(next(iter(readers))) if len(readers) == 1 else None
        return None if index is None or self.label[index] != NONE else index

    # --- backwards ------------------------------------------------------------------------------

    def grow_back(self) -> None:
        """Take in what is read by one layer alone, up to its projections.

        A node comes behind all that it reads, so one pass from the end sees its readers settled.
        """
        answers: set[int] = set()  # views that only the graph's caller reads, such as a cache's
        for index in reversed(self.wires.order):
            node, readers = self.nodes[index], self.wires.readers[index]
            if node.op_type in _ANSWERED and answers.issuperset(readers):
                answers.add(index)
            if self.label[index] == NONE and index not in self.fixed:
                readers = [each for each in readers if each not in answers]
                labels = {self.label[each] for each in readers}
                sized = all(self.nodes[each].op_type in _SIZES for each in readers)
                if len(labels) != 1 or NONE in labels or sized or index in self.edge:
                    continue
                self.label[index] = labels.pop()
            if self.label[index] != NONE:
                self.edge.update(self._makers(self._projected(node)))
        for index in self.wires.order:
            if index in answers and self.label[index] == NONE:
                sources = {
                    self.label[each] for each in self.wires.sources[index] if each not in self.fixed
                }
                if len(sources) == 1:
                    self.label[index] = sources.pop()

    def _projected(self, node: ir.Node) -> list[ir.Value]:
        """What a node multiplies by a weight; [] where it does no such thing."""
        given = [value for value in node.inputs if value is not None]
        if node.domain == CONTRIB and node.op_type in PROJECTING:
            return given[:1]
        factors = given[:2] if node.op_type in ("Gemm", "FusedGemm") else given  # not its bias
        if node.op_type not in _WEIGHING or not self.weights.intersection(factors):
            return []
        return [value for value in given if value not in self.weights]

    def _makers(self, values: Iterable[ir.Value]) -> Iterator[int]:
        for value in values:
            maker = value.producer()
            if maker is not None and maker in self.at:
                yield self.at[maker]
