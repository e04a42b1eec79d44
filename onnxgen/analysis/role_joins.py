"""Where an output comes from: the input that it continues, such as a cache that grows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from onnxgen.analysis.role_uses import SCATTERS, VIEWS

# Past input of each present output.
_CACHES: dict[tuple[str, str], dict[int, int]] = {
    ("", "Attention"): {1: 4, 2: 5},
    ("onnxgen", "SinkAttention"): {1: 4, 2: 5},
    ("com.microsoft", "Attention"): {1: 4},
    ("com.microsoft", "MultiHeadAttention"): {1: 6, 2: 7},
    ("com.microsoft", "GroupQueryAttention"): {1: 3, 2: 4},
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): {1: 5, 2: 6},
}
# A cache may be kept in fewer bits than it is computed with.
_CODED = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Join:
    """An output that continues an input; `grows` is false where it merely passes it through.

    `writer` is the node that writes into a static cache; see `CachePair` for the others.
    """

    past: str
    present: str
    axis: int
    grows: bool
    static: bool
    cap: int | None
    writer: ir.Node | None = None
    counted: bool = False
    window: int = 0


# The nodes between an input and an output, each with the input by which it is entered.
_Way = tuple[tuple[ir.Node, int], ...]


def find_joins(graph: ir.Graph) -> list[Join]:
    """Every output that continues or copies a graph input, in output order."""
    inputs = {value for value in graph.inputs if value.name not in graph.initializers}
    found = (_join(output, inputs) for output in graph.outputs)
    return [join for join in found if join is not None]


def _join(output: ir.Value, inputs: set[ir.Value]) -> Join | None:
    """Follow an output backwards to the input it continues; the shortest way wins."""
    queue: list[tuple[ir.Value, _Way]] = [(output, ())]
    seen: set[ir.Value] = set()
    copied: Join | None = None
    for value, way in queue:  # grows while it is walked
        if value in seen:
            continue
        seen.add(value)
        if value in inputs:
            join = _replay(value, output, way)
            if join.grows:
                return join
            copied = copied or join
            continue
        node = value.producer()
        if node is not None:
            queue.extend(_sources(node, value, way))
    return copied


def _sources(node: ir.Node, value: ir.Value, way: _Way) -> list[tuple[ir.Value, _Way]]:
    """The values that this one continues, each with its way to the output."""
    op = node.op_type
    caches = _CACHES.get((node.domain, op))
    indices: Iterable[int]
    if caches is not None:
        number = caches.get(value.index() or 0)
        indices = [number] if number is not None else []
    elif op == "If":
        at = value.index() or 0
        bodies = [a.as_graph() for a in node.attributes.values()]
        return [(body.outputs[at], way) for body in bodies]
    elif op in ("Concat", "Where"):
        indices = range(len(node.inputs))
    elif (
        op in SCATTERS or op in _CODED or (op in VIEWS and op not in ("Expand", "Tile", "GatherND"))
    ):
        indices = [0]
    else:
        return []
    continued = [(node.inputs[i], i) for i in indices if i < len(node.inputs)]
    return [(source, ((node, i), *way)) for source, i in continued if source is not None]


def _replay(past: ir.Value, present: ir.Value, way: _Way) -> Join:
    """Walk from the input to the output and see on which of its axes it is joined."""
    rank = len(past.shape) if past.shape is not None else 4
    axes: list[int | None] = list(range(rank))
    axis: int | None = None
    grows = static = counted = longer = False
    window = 0
    cap: int | None = None
    writer: ir.Node | None = None
    for node, index in way:
        op = node.op_type
        joined: int | None = None
        if op == "Concat" and _around_new(node):
            grows = static = True
            writer, joined = node, node.attributes["axis"].as_int()
        elif op == "Concat" and len(node.inputs) > 1:
            joined = node.attributes["axis"].as_int()
            # Layers stacked into one output are no growth.
            grows, longer = grows or _lengthens(node, index), True
        elif op in SCATTERS:
            # What was lengthened first has places for as many tokens as come.
            counted = longer and op == "TensorScatter"
            grows, static = True, not counted
            writer = node
            default = -2 if op == "TensorScatter" else 0
            given = op != "ScatterND"
            joined = node.attributes.get_int("axis", default) if given else _written_axis(node)
        elif op == "Where" and index > 0:
            row = _chosen_axis(node, len(axes))
            if row is not None and _lengthens(node, index, 1):
                grows = static = True
                writer, joined = node, row
        elif (node.domain, op) in _CACHES:
            grows, joined = True, len(axes) - 2
            counted = op == "GroupQueryAttention" and _holds_input(node.inputs[5])
            if node.attributes.get_int("sliding_window_cache", 0):
                window = node.attributes.get_int("local_window_size", 0)
        elif op == "Slice":
            cap = _kept(node) or cap
        else:
            axes = _viewed(node, axes)
        if joined is not None and axis is None and -len(axes) <= joined < len(axes):
            axis = axes[joined]
    if axis is None:
        axis = _differing(past, present)
    kept = None if static else cap
    return Join(
        str(past.name), str(present.name), axis, grows, static, kept, writer, counted, window
    )


def _lengthens(node: ir.Node, index: int, first: int = 0) -> bool:
    # New keys and values are computed; a constant or a second input is not new.
    others = [v for i, v in enumerate(node.inputs) if i != index and i >= first and v is not None]
    makers = [maker for value in others if (maker := value.producer()) is not None]
    return any(maker.op_type not in ("Constant", "ConstantOfShape") for maker in makers)


def _around_new(node: ir.Node) -> bool:
    """True for `Concat(past[:start], new, past[end:])`."""
    if len(node.inputs) != 3:
        return False
    makers = [None if value is None else value.producer() for value in node.inputs]
    outer = [maker for maker in (makers[0], makers[2]) if maker is not None]
    return len(outer) == 2 and all(
        maker.op_type == "Slice" and maker.inputs[0] is outer[0].inputs[0] for maker in outer
    )


def _written_axis(node: ir.Node) -> int:
    """The axis that a ScatterND writes in part, where its indices are columns for many axes.

    The other columns count over whole axes: they follow from sizes, not from what inputs hold.
    """
    indices = node.inputs[1]
    maker = None if indices is None else indices.producer()
    while maker is not None and maker.op_type in ("Cast", "Identity"):
        indices = maker.inputs[0]
        maker = None if indices is None else indices.producer()
    if maker is None or maker.op_type != "Concat":
        return 0
    told = [index for index, column in enumerate(maker.inputs) if _holds_input(column)]
    return told[-1] if told else len(maker.inputs) - 1


def _holds_input(value: ir.Value | None) -> bool:
    """Whether a value follows from what graph inputs hold, not from their sizes alone."""
    pending, seen = [value], set()
    while pending:
        each = pending.pop()
        if each is None or each in seen:
            continue
        seen.add(each)
        maker = each.producer()
        if maker is None:
            if each.is_graph_input() and not each.is_initializer():
                return True
        elif maker.op_type not in ("Shape", "Size"):
            pending.extend(maker.inputs)
    return False


def _chosen_axis(node: ir.Node, rank: int) -> int | None:
    """The one axis along which a Where's condition `arange == position` varies."""
    way: list[ir.Node] = []
    value = node.inputs[0]
    while value is not None and (maker := value.producer()) is not None:
        if maker.op_type == "Equal":
            break
        if maker.op_type not in (*VIEWS, "Not"):
            return None
        way.insert(0, maker)
        value = maker.inputs[0]
    if value is None or value.producer() is None:
        return None
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    if shape is not None:
        long = [index for index, size in enumerate(shape) if size != 1]
        if len(long) == 1:
            return rank - len(shape) + long[0]
    axes: list[int | None] = [0]
    for step in way:
        axes = _viewed(step, axes)
    return rank - len(axes) + axes.index(0) if 0 in axes and len(axes) <= rank else None


def _viewed(node: ir.Node, axes: list[int | None]) -> list[int | None]:
    match node.op_type:
        case "Transpose":
            perm = node.attributes.get_ints("perm", tuple(reversed(range(len(axes)))))
            return [axes[i] for i in perm] if len(perm) == len(axes) else axes
        case "Unsqueeze":
            for at in sorted(_ints(node, 1)):
                at = at if at >= 0 else at + len(axes) + 1
                axes = [*axes[:at], None, *axes[at:]]
            return axes
        case "Squeeze":
            gone = {at % len(axes) for at in _ints(node, 1)} if axes else set()
            return [a for i, a in enumerate(axes) if i not in gone]
        case "Gather":
            at = node.attributes.get_int("axis", 0)
            return [a for i, a in enumerate(axes) if i != at]
        case "Reshape":
            shape = node.outputs[0].shape
            return axes if shape is not None and len(shape) == len(axes) else [None] * len(axes)
    return axes


def _differing(past: ir.Value, present: ir.Value) -> int:
    """The axis on which two shapes differ; the second last where they do not say."""
    if past.shape is None:
        return 2
    rank = len(past.shape)
    if present.shape is not None and len(present.shape) == rank:
        both = zip(past.shape, present.shape, strict=True)
        differ = [i for i, (a, b) in enumerate(both) if i > 0 and a != b]
        if len(differ) == 1:
            return differ[0]
    return max(rank - 2, 0)


def _kept(node: ir.Node) -> int | None:
    """W-1 of `x[..., -(W-1):, :]`, None for another slice."""
    starts = _ints(node, 1)
    if len(starts) == 1 and starts[0] < -1:
        return -starts[0]
    return None


def _ints(node: ir.Node, index: int) -> list[int]:
    """A constant integer input, as a list; empty where it is absent or computed."""
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return [] if tensor is None else [int(x) for x in tensor.numpy().ravel()]
