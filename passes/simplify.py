"""Simplify: nodes that change nothing are taken out.

    Cast(x: T, to T) -> x          Reshape, Expand to the shape it has -> x
    x * 1, x / 1     -> x          Transpose in order -> x
    Concat(x)        -> x          Slice of everything -> x
    x and True       -> x          Squeeze(Unsqueeze(x)) -> x
    Dropout(x)       -> x          Transpose(Transpose(x)) -> Transpose(x) -> x

Each keeps every bit of every element. Sizes come from `onnxgen.analysis.shapes`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.graph import attribute, constant, is_read, names, producer, scalar
from onnxgen.analysis.shapes import Shapes
from onnxgen.analysis.view_shapes import slice_bounds
from onnxgen.analysis.views import Views


def simplify(model: ir.Model) -> None:
    """Take out nodes of the main graph that change nothing, in place."""
    graph = model.graph
    shapes = Shapes(graph)
    views = Views(shapes)
    gone: list[ir.Node] = []
    for node in list(graph):
        if node.domain not in ("", "ai.onnx") or not node.outputs:
            continue
        _merge_transposes(node)
        rule = _RULES.get(node.op_type)
        same = None if rule is None else rule(shapes, node)
        output = node.outputs[0]
        if same is None and node.op_type in _TURNS:
            same = _turned_back(views, output)
        if same is None or any(map(is_read, node.outputs[1:])):
            continue
        if output.is_graph_output() and not _gives_name(output, same):
            continue
        output.replace_all_uses_with(same, replace_graph_outputs=True)
        gone.append(node)
    graph.remove(gone, safe=True)


def _gives_name(output: ir.Value, same: ir.Value) -> bool:
    """Give an output's name, which is the model's interface, to the value that takes its place.

    False where that has a name of its own that others know: an input's, or another output's.
    """
    if same.producer() is None or same.is_graph_output() or same.is_initializer():
        return False
    name, own = output.name, same.name
    output.name, same.name = own, name
    same.shape = same.shape or output.shape
    return True


def _same_shape(shapes: Shapes, node: ir.Node) -> ir.Value | None:
    source = node.inputs[0]
    kept = shapes.same_shape(shapes.of(source), shapes.of(node.outputs[0]))
    return source if kept else None


def _cast(shapes: Shapes, node: ir.Node) -> ir.Value | None:
    source = node.inputs[0]
    return source if source is not None and source.dtype == attribute(node, "to") else None


def _times_one(shapes: Shapes, node: ir.Node) -> ir.Value | None:
    operands = [(node.inputs[0], node.inputs[1])]
    if node.op_type == "Mul":
        operands.append((node.inputs[1], node.inputs[0]))
    for x, one in operands:
        if scalar(one) == 1.0 and shapes.same_shape(shapes.of(x), shapes.of(node.outputs[0])):
            return x
    return None


def _and_true(shapes: Shapes, node: ir.Node) -> ir.Value | None:
    for x, other in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        found = constant(other)
        kept = shapes.same_shape(shapes.of(x), shapes.of(node.outputs[0]))
        if found is not None and found.size and found.all() and kept:
            return x
    return None


def _transpose(shapes: Shapes, node: ir.Node) -> ir.Value | None:
    order = attribute(node, "perm")
    return node.inputs[0] if order is not None and list(order) == sorted(order) else None


def _dropout(shapes: Shapes, node: ir.Node) -> ir.Value | None:
    training = constant(node.inputs[2]) if len(node.inputs) > 2 else np.array(False)
    return node.inputs[0] if training is not None and not training.any() else None


def _slice(shapes: Shapes, node: ir.Node) -> ir.Value | None:
    bounds, source = slice_bounds(shapes, node), shapes.of(node.inputs[0])
    if bounds is None or source is None:
        return None
    whole = all(
        start == 0 and step == 1 and shapes.same(length, source[axis])
        for axis, start, length, step in bounds
    )
    return node.inputs[0] if whole else None


def _turned_back(views: Views, value: ir.Value) -> ir.Value | None:
    """The tensor that a chain of views ends in again."""
    view, step = views.of(value), value
    while view is not None:
        node = step.producer()
        if node is None or node.op_type not in _TURNS or node.inputs[0] is None:
            return None
        step = node.inputs[0]
        known = views.of(step)
        if known is not None and known.source is view.source and known.axes == view.axes:
            return step
    return None


def _merge_transposes(node: ir.Node) -> None:
    if node.op_type != "Transpose":
        return
    inner = producer(node.inputs[0], "Transpose")
    outer_order = attribute(node, "perm")
    inner_order = None if inner is None else attribute(inner, "perm")
    if inner is not None and outer_order is not None and inner_order is not None:
        merged = [inner_order[axis] for axis in outer_order]
        node.attributes["perm"] = ir.AttrInt64s("perm", merged)
        node.replace_input_with(0, inner.inputs[0])


_TURNS = names("Reshape Transpose Squeeze Unsqueeze")
_RULES: dict[str, Callable[[Shapes, ir.Node], ir.Value | None]] = {
    "Cast": _cast,
    "Reshape": _same_shape,
    "Expand": _same_shape,
    "Mul": _times_one,
    "Div": _times_one,
    "And": _and_true,
    "Transpose": _transpose,
    "Slice": _slice,
    "Concat": lambda shapes, node: node.inputs[0] if len(node.inputs) == 1 else None,
    "Dropout": _dropout,
    "Identity": lambda shapes, node: node.inputs[0],
}
