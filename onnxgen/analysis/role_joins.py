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


@dataclass(frozen=True)
class Join:
    """An output that continues an input; `grows` is false where it merely passes it through."""

    past: str
    present: str
    axis: int
    grows: bool
    static: bool
    cap: int | None


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
    elif op in SCATTERS or (op in VIEWS and op not in ("Expand", "Tile", "GatherND")):
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
    grows = static = False
    cap: int | None = None
    for node, index in way:
        op = node.op_type
        joined: int | None = None
        if op == "Concat" and len(node.inputs) > 1:
            joined = node.attributes["axis"].as_int()
            # Layers stacked into one output are no growth.
            grows = grows or _lengthens(node, index)
        elif op in SCATTERS:
            grows = static = True
            default = 0 if op == "ScatterND" else -2
            joined = node.attributes.get_int("axis", default) if op != "ScatterND" else 0
        elif (node.domain, op) in _CACHES:
            grows, joined = True, len(axes) - 2
        elif op == "Slice":
            cap = _kept(node) or cap
        else:
            axes = _viewed(node, axes)
        if joined is not None and axis is None and -len(axes) <= joined < len(axes):
            axis = axes[joined]
    if axis is None:
        axis = _differing(past, present)
    return Join(str(past.name), str(present.name), axis, grows, static, None if static else cap)


def _lengthens(node: ir.Node, index: int) -> bool:
    # New keys and values are computed; a constant or a second input is not new.
    return any(
        v is not None and v.producer() is not None for i, v in enumerate(node.inputs) if i != index
    )


def _viewed(node: ir.Node, axes: list[int | None]) -> list[int | None]:
    match node.op_type:
        case "Transpose":
            perm = node.attributes.get_ints("perm", tuple(reversed(range(len(axes)))))
            return [axes[i] for i in perm] if len(perm) == len(axes) else axes
        case "Unsqueeze":
            for at in sorted(_ints(node, 1)):
                axes = [*axes[:at], None, *axes[at:]] if at >= 0 else axes
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
