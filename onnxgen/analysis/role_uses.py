"""What an input is used for: it is followed until something tells its purpose.

The way leads through views and arithmetic, to a table whose rows it names, to Cos and Sin, a
Softmax, a convolution, a place in a cache.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxgen.analysis.graph import ancestors, given


def _ops(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Values stay values: the data input is input 0 unless all inputs are data.
VIEWS = _ops(
    "Identity Cast CastLike Reshape Transpose Unsqueeze Squeeze Expand Slice Flatten Gather "
    "GatherND GatherElements Tile Split Pad Trilu"
)
_ALL_DATA = _ops("Concat Add Sub Mul Div Mod Max Min Clip Sum Neg Abs Floor Range")
# What comes out is no longer the input's own numbers.
_DERIVED = _ops(
    "CumSum ReduceSum ReduceMax ReduceMin ArgMax ArgMin Equal Less LessOrEqual Greater "
    "GreaterOrEqual And Or Not Xor BitwiseAnd BitwiseOr BitwiseNot NonZero IsNaN Sign "
    "ScatterND ScatterElements OneHot Exp Log Tanh Erf Sigmoid"
)
_NORMS = _ops(
    "LayerNormalization SimplifiedLayerNormalization SkipLayerNormalization RMSNormalization "
    "SkipSimplifiedLayerNormalization ReduceMean ReduceSumSquare ReduceL2 Pow LpNormalization "
    "BatchNormalization InstanceNormalization GroupNormalization"
)
_PRODUCTS = _ops("MatMul Gemm MatMulNBits MatMulInteger DynamicQuantizeMatMul Einsum")
SCATTERS = {"ScatterND": 1, "ScatterElements": 1, "Scatter": 1, "TensorScatter": 2}
# Operators that hold a whole attention: what each of their inputs is for.
_ATTENTIONS: dict[tuple[str, str], dict[int, str]] = {
    ("", "Attention"): {1: "key", 2: "key", 3: "score", 4: "key", 5: "key", 6: "length"},
    ("onnxgen", "SinkAttention"): {1: "key", 2: "key", 3: "score", 4: "key", 5: "key"},
    ("com.microsoft", "Attention"): {3: "score", 4: "key", 5: "score"},
    ("com.microsoft", "MultiHeadAttention"): {1: "key", 2: "key", 4: "score", 5: "score"},
    ("com.microsoft", "GroupQueryAttention"): {5: "length", 6: "length", 9: "angle", 10: "score"},
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): {1: "key", 2: "key", 3: "score"},
}


@dataclass(frozen=True)
class Table:
    """A table that an input indexes: its rows, and whether by its very numbers."""

    rows: int
    direct: bool


@dataclass
class Evidence:
    """What one input is used for.

    Attributes:
        tables: tables it indexes whose rows are added to a main path.
        angles: "direct" or "derived" where it becomes angles (Cos, Sin, a rotary's table).
        scores: the Softmax and Attention nodes it has a say in.
        lengths: it counts keys for a fused attention.
        writes: it says where a cache is written.
        apart: rows of new tokens are counted from it: it holds a number for each sequence.
        branch: it is the condition of an If.
        convolved, projected, normed, added, attended: what a float input meets.
        any_use: what it holds is used.
        measured: its sizes are read.
    """

    tables: list[Table] = field(default_factory=list)
    angles: str = ""
    scores: list[ir.Node] = field(default_factory=list)
    lengths: bool = False
    writes: bool = False
    apart: bool = False
    branch: bool = False
    convolved: bool = False
    projected: bool = False
    normed: bool = False
    added: bool = False
    attended: bool = False
    any_use: bool = False
    measured: bool = False


class Uses:
    """Walks over one graph (without function calls; If and Loop bodies included)."""

    def __init__(self, graph: ir.Graph, writers: Collection[ir.Node] = ()) -> None:
        """Look at a graph, in which `writers` write into static caches."""
        self.graph = graph
        self._writers = writers
        self.inputs = {v: str(v.name) for v in graph.inputs if v.name not in graph.initializers}
        self._live = self._reach(self.inputs)

    def reach(self, names: Iterable[str]) -> set[ir.Value]:
        """Every value that depends on what is in one of these inputs, not on its shape alone."""
        names = set(names)
        return self._reach(value for value, name in self.inputs.items() if name in names)

    def _reach(self, start: Iterable[ir.Value]) -> set[ir.Value]:
        reached = set(start)
        for node in self.graph.all_nodes():
            if node.op_type in ("Shape", "Size"):
                continue
            holds_graph = any(
                a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
                for a in node.attributes.values()
            )
            if holds_graph or any(value in reached for value in node.inputs):
                reached.update(node.outputs)
        return reached

    def of(self, value: ir.Value) -> Evidence:
        """What the input is used for."""
        found = Evidence()
        is_float = value.dtype is not None and value.dtype.is_floating_point()
        best: dict[ir.Value, bool] = {}
        stack = [(value, True)]
        while stack:
            current, direct = stack.pop()
            if best.get(current, False) or (current in best and not direct):
                continue
            best[current] = direct
            for node, index in current.uses():
                if node.op_type in ("Shape", "Size"):
                    found.measured = True
                    continue
                found.any_use = True
                step = self._step(node, index, direct, is_float, found)
                if step is not None:
                    stack.extend((out, step) for out in node.outputs)
        return found

    def _step(
        self, node: ir.Node, index: int, direct: bool, is_float: bool, found: Evidence
    ) -> bool | None:
        """Note what this use tells; return whether the outputs still carry it directly, or None."""
        op, fused = node.op_type, _ATTENTIONS.get((node.domain, node.op_type))
        if fused is not None:
            self._note_attention(node, fused.get(index, ""), direct, found)
            return None
        if op == "Softmax":
            found.scores.append(node)
        elif op in ("Cos", "Sin") or (op == "RotaryEmbedding" and index > 0):
            _note_angle(found, direct)
        elif op == "If":
            found.branch = True
        elif op in ("Conv", "ConvInteger", "ConvTranspose"):
            found.convolved = True
        elif op in _NORMS:
            found.normed = True
        elif op == "EmbedLayerNormalization":
            self._note_embedding(node, index, direct, found)
        elif op in ("Gather", "GatherElements", "GatherBlockQuantized") and index == 1:
            self._note_table(node, direct, found)
        elif SCATTERS.get(op) == index or self._places(node, index):
            found.writes = True
        elif op in _PRODUCTS:
            return self._product(node, index, direct, is_float, found)
        elif op == "Slice" and index in (1, 2) and not is_float:
            return False
        elif op in VIEWS:
            return direct if index == 0 else None
        elif op == "Where":
            return direct and index > 0
        elif op in _DERIVED:
            return False
        elif op in _ALL_DATA:
            others = [v for i, v in enumerate(node.inputs) if i != index]
            mixed = any(v in self._live for v in others if v is not None)
            if mixed and op in ("Add", "Sum"):
                found.added = True
            if op == "Add" and not mixed and _is_column(node.inputs[index]):
                found.apart = True
            # `cumsum(mask) * mask` is made of the mask, but no longer it. Positions times
            # frequencies that depend on the longest of them (longrope) are angles.
            turned = op == "Mul" and _is_real(given(node, index))
            return direct and not (mixed and op != "Concat" and not turned)
        return None

    def _places(self, node: ir.Node, index: int) -> bool:
        """Whether an input of a node says where a row of a static cache is chosen or cut."""
        if node.op_type == "Where":
            return index == 0 and node in self._writers
        if node.op_type == "Slice" and index in (1, 2):
            return any(user in self._writers for user, _ in node.outputs[0].uses())
        return False

    def _product(
        self, node: ir.Node, index: int, direct: bool, is_float: bool, found: Evidence
    ) -> bool | None:
        others = [v for i, v in enumerate(node.inputs) if i != index and v is not None]
        if any(value in self._live for value in others):
            if direct and not is_float and self._apart(others):
                return direct  # frequencies that depend on the longest position (longrope)
            found.attended = True
            return None
        if is_float:
            found.projected = True
            return None
        return direct  # positions times inverse frequencies

    def _apart(self, values: Iterable[ir.Value]) -> bool:
        """Whether no weights or states are in these values, only what follows from numbers."""
        found = list(ancestors(values, frozenset()))
        return not any(node.op_type in _PRODUCTS or node.op_type == "Softmax" for node in found)

    def _note_attention(self, node: ir.Node, use: str, direct: bool, found: Evidence) -> None:
        if use == "score":
            found.scores.append(node)
        elif use == "length":
            found.lengths = True
        elif use == "angle":
            _note_angle(found, direct)
        elif use == "key":
            found.attended = True

    def _note_embedding(self, node: ir.Node, index: int, direct: bool, found: Evidence) -> None:
        if index == 7:
            found.lengths = True
        table = {0: 2, 1: 4, 8: 3}.get(index)
        if table is not None:
            found.tables.append(Table(_rows(node.inputs[table]), direct))

    def _note_table(self, node: ir.Node, direct: bool, found: Evidence) -> None:
        table = node.inputs[0]
        if table is None or table in self._live:
            return
        if self._rows_turn(node.outputs[0]):
            _note_angle(found, direct)
        else:
            found.tables.append(Table(_rows(table), direct))

    def _rows_turn(self, rows: ir.Value) -> bool:
        """True where a table's rows are angles, or cosines and sines that others are scaled by.

        Rows of an embedding meet a sum, a norm or a product with weights as well; a rotary's
        rows meet nothing but Mul.
        """
        seen: set[ir.Value] = set()
        stack, scaled = [rows], False
        while stack:
            value = stack.pop()
            if value in seen:
                continue
            seen.add(value)
            for node, index in value.uses():
                op = node.op_type
                if op in ("Cos", "Sin") or (op == "RotaryEmbedding" and index > 0):
                    return True
                if op in _NORMS or op in _PRODUCTS or op in ("Add", "Sub", "Sum", "Conv"):
                    return False
                if op in ("Mul", "Div"):
                    other = node.inputs[1 - index]
                    if other in self._live:
                        scaled = True
                        continue
                if op in ("Mul", "Div", "Concat", "Where", *VIEWS, *_DERIVED):
                    stack.extend(node.outputs)
        return scaled


def _is_column(value: ir.Value | None) -> bool:
    """True for a vector with an axis behind it: [B] as [B, 1]."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Cast", "Identity"):
        value = node.inputs[0]
        node = None if value is None else value.producer()
    if node is None or node.op_type != "Unsqueeze" or node.inputs[0] is None:
        return False
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = None if axes is None else ir.convenience.get_const_tensor(axes)
    shape = node.inputs[0].shape
    vector = shape is not None and len(shape) == 1
    return vector and tensor is not None and tensor.numpy().ravel().tolist() in ([1], [-1])


def _rows(table: ir.Value | None) -> int:
    """Rows of a constant table, through the views and scales it is stored behind."""
    for _ in range(8):
        if table is None:
            return 0
        tensor = ir.convenience.get_const_tensor(table)
        shape = tensor.shape if tensor is not None else table.shape
        if shape is not None and len(shape) and isinstance(shape[0], int):
            return int(shape[0])
        node = table.producer()
        table = node.inputs[0] if node is not None and node.inputs else None
    return 0


def _is_real(value: ir.Value) -> bool:
    """Whether a value that was followed from whole numbers has become a real one."""
    step: ir.Value | None = value
    while step is not None and step.dtype is None:
        node = step.producer()
        if node is None or node.op_type not in VIEWS:
            return False
        if node.op_type == "Cast":
            return ir.DataType(node.attributes["to"].as_int()).is_floating_point()
        step = node.inputs[0]
    return step is not None and step.dtype is not None and step.dtype.is_floating_point()


def _note_angle(found: Evidence, direct: bool) -> None:
    found.angles = "direct" if direct or found.angles == "direct" else "derived"
