"""What is known about a graph while it is rewritten: shapes, views, and what runs on inputs alone."""

from __future__ import annotations

import onnx_ir as ir

from onnxgen.analysis.graph import FLOATS, names, uniform
from onnxgen.analysis.roles import Roles
from onnxgen.analysis.sampling import Sampler
from onnxgen.analysis.shapes import Shapes
from onnxgen.analysis.symbols import Dim, atom
from onnxgen.analysis.views import Views


class Facts:
    """The analyses of one graph, kept up to date as rewrites add nodes.

    Attributes:
        graph: the main graph.
        opset: version of the default domain.
        shapes: symbolic shapes and contents.
        views: composed views.
        sampler: runs what makes masks and tables; None where nothing may be run.
    """

    def __init__(
        self, graph: ir.Graph, roles: Roles | None = None, sampler: Sampler | None = None
    ) -> None:
        self.graph = graph
        self.sampler = sampler
        self._roles = roles
        self.opset = graph.opset_imports.get("", 24)
        self.shapes = Shapes(graph, sizes_in_use(roles))
        self.views = Views(self.shapes)
        self._activations: dict[ir.Value, bool] = {}
        self._constants: set[ir.Value] = set()
        self._order: dict[ir.Node, int] = {}
        for index, node in enumerate(graph):
            self.added(node, index)

    @property
    def roles(self) -> Roles:
        """What the graph's inputs and outputs are for; nothing is known where none were given."""
        return Roles({}, {}) if self._roles is None else self._roles

    def added(self, node: ir.Node, order: int) -> None:
        """Take note of a new node at a place (its shapes are inferred by whoever made it)."""
        self._order[node] = order
        self._classify(node)

    def order(self, value: ir.Value) -> int:
        """Where in the graph a value is made, -1 for inputs: later ones depend on earlier ones."""
        node = value.producer()
        return -1 if node is None else self._order.get(node, -1)

    def known(self, node: ir.Node) -> bool:
        """Whether a node has its place in the graph; one that is only being made has none yet."""
        return node in self._order

    def is_activation(self, value: ir.Value | None) -> bool:
        """Whether a value carries activations: it went through a weight matrix or a cache.

        Masks, positions, rotary tables and index arithmetic are no activations: they follow from
        integer inputs and constants, and can be computed on their own.
        """
        if value is None:
            return False
        if value not in self._activations:
            self._activations[value] = (
                value.is_graph_input()
                and (value.dtype in FLOATS or self.role(value) in _CACHES)
                and self.role(value) not in ("mask", "encoder_mask")
            )
        return self._activations[value]

    def role(self, value: ir.Value) -> str:
        """What a graph input is for, "unknown" where nobody said."""
        role = None if self._roles is None else self._roles.inputs.get(value.name or "")
        return "unknown" if role is None else role.role

    def describe(self, node: ir.Node) -> str:
        """A node with what it reads, for a person: `Mul(float32[B, 6, S, 20], 0.5)`.

        Sizes are called by their letters where the roles say which they are.
        """
        read = [self._described(value) for value in node.inputs]
        domain = f"{node.domain}::" if node.domain not in ("", "ai.onnx") else ""
        return f"{domain}{node.op_type}({', '.join(read)})"

    def _described(self, value: ir.Value | None) -> str:
        if value is None:
            return "-"
        shape = self.shapes.of(value)
        if self._is_constant(value) and shape is not None and len(shape) < 2:
            number = uniform(value)
            if number is not None:
                return f"{number:g}"
        kind = "?" if value.dtype is None else str(value.dtype).lower()
        sizes = "..." if shape is None else ", ".join(map(self._size, shape))
        return f"{kind}[{sizes}]"

    def _size(self, size: Dim) -> str:
        text = str(size)
        for name, role in self.roles.inputs.items():
            for axis, letter in enumerate(role.axes):
                text = text.replace(f"{name}[{axis}]", letter or f"{name}[{axis}]")
        return text

    def _classify(self, node: ir.Node) -> None:
        if node.op_type in ("Shape", "Size"):
            carries = False  # sizes, not elements
        else:
            carries = any(self.is_activation(value) for value in node.inputs)
            carries = carries or (
                node.op_type in _CONTRACTIONS
                and any(self._is_matrix(value) for value in node.inputs)
            )
        constant = all(v is None or self._is_constant(v) for v in node.inputs)
        for output in node.outputs:
            self._activations[output] = carries
            if constant:
                self._constants.add(output)

    def _is_matrix(self, value: ir.Value | None) -> bool:
        """A constant with two or more axes that are longer than 1; a rotary frequency has one.

        Weights may be computed from constants: dequantized, transposed, one added.
        """
        if value is None or not self._is_constant(value):
            return False
        return sum(size != 1 for size in self.shapes.of(value) or ()) >= 2

    def _is_constant(self, value: ir.Value) -> bool:
        if value.producer() is None:
            return value.const_value is not None and not value.is_graph_input()
        return value in self._constants


def sizes_in_use(roles: Roles | None) -> dict[str, Dim]:
    """The sizes of the inputs' axes in ordinary use: one batch, one new and one past length.

    Exporters read the same length off whichever input is at hand, so that nothing in the graph
    alone says that the batch of the ids and of a cache are one. Its users do: these equations hold
    in every run that the roles describe. Caches cropped to one length share one of their own,
    and a counted cache may hold more places than tokens.
    """
    if roles is None:
        return {}
    first: dict[str, Dim] = {}
    sizes: dict[str, Dim] = {}
    for name, role in roles.inputs.items():
        pair = roles.pair_of(name)
        for axis, (letter, size) in enumerate(zip(role.axes, role.shape, strict=False)):
            cap = pair.cap if letter == "P" and pair is not None else None
            own = letter == "P" and pair is not None and pair.window
            if isinstance(size, int):  # some exporters name a fixed size's symbol "6"
                sizes[f"{name}[{axis}]"] = size
                continue
            if letter not in ("B", "S", "P", "E"):
                continue
            if own:
                continue
            kind = letter if cap is None else f"{letter} up to {cap}"
            sizes[f"{name}[{axis}]"] = first.setdefault(kind, atom(f"{name}[{axis}]"))
    # What may be a cache nobody understood could hold tokens too.
    unsaid = any(r.role == "unknown" and len(r.shape) > 2 for r in roles.inputs.values())
    apart = any(pair.static or pair.cap or pair.counted for pair in roles.pairs)
    if "S" in first and not unsaid and not apart:
        total = first["S"] + first.get("P", 0)
        for name, role in roles.inputs.items():
            for axis, (letter, size) in enumerate(zip(role.axes, role.shape, strict=False)):
                if letter == "T" and not isinstance(size, int):
                    sizes[f"{name}[{axis}]"] = total
    return sizes


_CACHES = frozenset({"past", "static_past", "cross_past"})  # quantized ones hold integers
_CONTRACTIONS = names(
    """
    MatMul Gemm Conv Einsum MatMulInteger MatMulNBits QLinearMatMul FusedMatMul FusedGemm FusedConv
    DynamicQuantizeMatMul MatMulIntegerToFloat MatMulBnb4 MatMulFpQ4 QGemm
    """
)
