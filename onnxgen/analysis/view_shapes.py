"""How the output shapes of views follow from their inputs': what moves, repeats, pads or picks.

    RULES["Reshape"](shapes, node)     [(ids[0], ids[1], 6, 48)]
    slice_bounds(shapes, node)         [(2, 0, past[2], 1)]: axis, start, length, step

None stands for a shape of which not even the rank is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.graph import attribute
from onnxgen.analysis.symbols import (
    Dim,
    broadcast,
    divide,
    floor_divide,
    maximum,
    minimum,
    never_negative,
    product,
)

MAX_RANK = 64  # of a shape that is told by a tensor; ONNX Runtime takes no more than that

if TYPE_CHECKING:
    from onnxgen.analysis.shapes import Shape, Shapes


def broadcast_shapes(operands: Sequence[Shape | None]) -> Shape | None:
    """numpy broadcasting; None where the shape of an operand is unknown."""
    known = [shape for shape in operands if shape is not None]
    if len(known) != len(operands):
        return None
    rank = max((len(shape) for shape in known), default=0)
    result: list[Dim] = [1] * rank
    for shape in known:
        for axis, size in enumerate(shape, start=rank - len(shape)):
            result[axis] = broadcast(result[axis], size)
    return tuple(result)


def axes_of(shapes: Shapes, node: ir.Node, index: int = 1) -> list[int] | None:
    """Axes given as an input (opset 13 and up) or as an attribute; None where unknown."""
    given = attribute(node, "axes")
    if given is not None:
        return list(given)
    if len(node.inputs) > index and node.inputs[index] is not None:
        content = shapes.content(node.inputs[index])
        if content is None or not all(isinstance(axis, int) for axis in content.flat):
            return None
        return [int(axis) for axis in content.flat]
    return []


def shape_of_content(shapes: Shapes, node: ir.Node, index: int) -> list[Dim] | None:
    """A target shape: its content, or unknown sizes where only its length is known."""
    if len(node.inputs) <= index:
        return None
    content = shapes.content(node.inputs[index])
    if content is not None:
        return list(content.flat)
    length = shapes.of(node.inputs[index])
    if length and isinstance(length[0], int) and length[0] <= MAX_RANK:
        return [shapes.unknown("dim") for _ in range(length[0])]
    return None


def _reshape(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    source, target = shapes.of(node.inputs[0]), shape_of_content(shapes, node, 1)
    if target is None:
        return [None]
    if not attribute(node, "allowzero", 0):
        kept = source or tuple(shapes.unknown("dim") for _ in target)
        target = [
            kept[axis] if isinstance(size, int) and size == 0 and axis < len(kept) else size
            for axis, size in enumerate(target)
        ]
    if any(isinstance(size, int) and size == -1 for size in target):
        rest = product(s for s in target if not (isinstance(s, int) and s == -1))
        exact = (
            None
            if source is None
            else divide(shapes.resolve(product(source)), shapes.resolve(rest))
        )
        missing = shapes.unknown("dim") if exact is None else exact
        target = [missing if isinstance(s, int) and s == -1 else s for s in target]
    return [tuple(target)]


def _flatten(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    source = shapes.of(node.inputs[0])
    if source is None:
        return [None]
    axis = attribute(node, "axis", 1)
    axis += len(source) if axis < 0 else 0
    return [(product(source[:axis]), product(source[axis:]))]


def _expand(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    target = shape_of_content(shapes, node, 1)
    return [
        broadcast_shapes([shapes.of(node.inputs[0]), None if target is None else tuple(target)])
    ]


def _tile(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    source, repeats = shapes.of(node.inputs[0]), shapes.content(node.inputs[1])
    if source is None or repeats is None:
        return [None]
    return [tuple(size * times for size, times in zip(source, repeats.flat, strict=True))]


def _pad(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    source, pads = shapes.of(node.inputs[0]), shapes.content(node.inputs[1])
    if source is None:
        return [None]
    axes = shapes.content(node.inputs[3]) if len(node.inputs) > 3 else np.arange(len(source))
    if pads is None or axes is None or pads.size != 2 * axes.size:
        return [tuple(shapes.unknown("dim") for _ in source)]
    result = list(source)
    for axis, before, after in zip(
        axes.flat, pads.flat[: axes.size], pads.flat[axes.size :], strict=True
    ):
        result[int(axis)] = result[int(axis)] + before + after
    return [tuple(result)]


def _transpose(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    source = shapes.of(node.inputs[0])
    if source is None:
        return [None]
    order = attribute(node, "perm", range(len(source))[::-1])
    return [tuple(source[axis] for axis in order)]


def _unsqueeze(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    source, axes = shapes.of(node.inputs[0]), axes_of(shapes, node)
    if source is None or axes is None:
        return [None]
    rank = len(source) + len(axes)
    new = {axis % rank for axis in axes}
    if len(new) != len(axes):
        raise ValueError("an axis is named twice")
    rest = iter(source)
    return [tuple(1 if axis in new else next(rest) for axis in range(rank))]


def _squeeze(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    source, axes = shapes.of(node.inputs[0]), axes_of(shapes, node)
    if source is None or axes is None:
        return [None]
    gone = (
        {axis % len(source) for axis in axes}
        if axes
        else {axis for axis, size in enumerate(source) if size == 1}
    )
    return [tuple(size for axis, size in enumerate(source) if axis not in gone)]


def _concat(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    parts = [shapes.of(value) for value in node.inputs]
    known = [part for part in parts if part is not None]
    if not known:
        return [None]
    joined = attribute(node, "axis") % len(known[0])
    result = list(known[0])
    for axis in range(len(result)):
        if axis == joined:
            result[axis] = (
                sum((part[axis] for part in known), start=0)
                if len(known) == len(parts)
                else shapes.unknown("dim")
            )
        else:
            for part in known[1:]:
                result[axis] = shapes.merge(result[axis], part[axis])
    return [tuple(result)]


def _split(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    source = shapes.of(node.inputs[0])
    if source is None:
        return [None] * len(node.outputs)
    axis = attribute(node, "axis", 0) % len(source)
    lengths = shapes.content(node.inputs[1]) if len(node.inputs) > 1 else None
    sizes: list[Dim]
    if lengths is not None:
        sizes = list(lengths.flat)
    else:
        equal = divide(source[axis], len(node.outputs))
        sizes = [shapes.unknown("dim") if equal is None else equal for _ in node.outputs]
    return [(*source[:axis], size, *source[axis + 1 :]) for size in sizes]


def slice_bounds(shapes: Shapes, node: ir.Node) -> list[tuple[int, Dim, Dim, int]] | None:
    """What a Slice takes: (axis, start, length, step) for each axis; None where unknown."""
    source = shapes.of(node.inputs[0])
    given = [shapes.content(value) for value in node.inputs[1:]]
    if source is None or len(given) < 2 or given[0] is None or given[1] is None:
        return None
    count = given[0].size
    axes = given[2] if len(given) > 2 and node.inputs[3] is not None else np.arange(count)
    steps = given[3] if len(given) > 3 and node.inputs[4] is not None else np.ones(count, int)
    if axes is None or steps is None:
        return None
    result = []
    for start, end, raw_axis, step in zip(
        given[0].flat, given[1].flat, axes.flat, steps.flat, strict=True
    ):
        axis = int(raw_axis) % len(source)
        size = source[axis]
        if not isinstance(step, (int, np.integer)) or step < 1:
            return None
        first, last = _clamp(start, size), _clamp(end, size)
        length = last - first
        if not never_negative(length):
            length = maximum(0, length)
        if step > 1:
            length = floor_divide(length + (int(step) - 1), int(step))
        result.append((axis, first, length, int(step)))
    return result


def _clamp(index: Dim, size: Dim) -> Dim:
    if isinstance(index, int) and index >= 2**31 - 1:
        return size  # how exporters say "to the end"
    if isinstance(index, int) and index < 0:
        return maximum(0, size + index)
    if not isinstance(index, int) and never_negative(0 - index):
        index = size + index
        return index if never_negative(index) else maximum(0, index)
    return minimum(index, size)


def _slice(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    source, bounds = shapes.of(node.inputs[0]), slice_bounds(shapes, node)
    if source is None:
        return [None]
    result = list(source)
    if bounds is None:
        axes = shapes.content(node.inputs[3]) if len(node.inputs) > 3 else None
        if axes is None:
            return [tuple(shapes.unknown("dim") for _ in source)]
        for axis in axes.flat:
            result[int(axis)] = shapes.unknown("dim")
        return [tuple(result)]
    for axis, _, length, _ in bounds:
        result[axis] = length
    return [tuple(result)]


def _gather(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    source, indices = shapes.of(node.inputs[0]), shapes.of(node.inputs[1])
    if source is None or indices is None:
        return [None]
    axis = attribute(node, "axis", 0) % len(source)
    return [(*source[:axis], *indices, *source[axis + 1 :])]


def _gather_nd(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    source, indices = shapes.of(node.inputs[0]), shapes.of(node.inputs[1])
    if source is None or not indices or not isinstance(indices[-1], int):
        return [None]
    batch = attribute(node, "batch_dims", 0)
    return [(*indices[:-1], *source[batch + indices[-1] :])]


RULES: dict[str, Callable[[Shapes, ir.Node], Sequence[Shape | None]]] = {
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Expand": _expand,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "GatherElements": lambda shapes, node: [shapes.of(node.inputs[1])],
    "Pad": _pad,
}
