"""How the contents of small index tensors follow from one another: what shapes are computed from."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.graph import attribute
from onnxgen.analysis.shape_rules import output_shapes
from onnxgen.analysis.symbols import (
    Dim,
    atom,
    evaluate,
    floor_divide,
    maximum,
    minimum,
    modulo,
    never_negative,
    product,
)
from onnxgen.analysis.view_shapes import slice_bounds

if TYPE_CHECKING:
    from onnxgen.analysis.shapes import Content, Shapes


def output_content(shapes: Shapes, node: ir.Node) -> Content | None:
    """Elements of the first output where it is an index tensor small enough to follow."""
    rule = _CONTENT_RULES.get(node.op_type)
    if rule is None:
        return None
    try:
        return rule(shapes, node)
    except (IndexError, ValueError, TypeError, ZeroDivisionError):
        return None  # an invalid graph: the runtime will say so


def _contents(shapes: Shapes, node: ir.Node) -> list[Any] | None:
    contents = [shapes.content(value) for value in node.inputs if value is not None]
    return None if any(content is None for content in contents) else contents


def _content_shape(shapes: Shapes, node: ir.Node) -> Content | None:
    shape = shapes.of(node.inputs[0])
    if shape is None:
        return None
    part = shape[slice(attribute(node, "start"), attribute(node, "end"))]
    return _array(part, (len(part),))


def _array(elements: Sequence[Dim], shape: tuple[int, ...]) -> Content:
    result = np.empty(len(elements), dtype=object)
    result[:] = list(elements)
    return result.reshape(shape)


def _content_elementwise(function: Callable[..., Any]) -> Callable[..., Content | None]:
    def rule(shapes: Shapes, node: ir.Node) -> Content | None:
        contents = _contents(shapes, node)
        if contents is None:
            return None
        arrays = np.broadcast_arrays(*contents)
        elements = [function(*each) for each in zip(*(a.flat for a in arrays), strict=True)]
        return None if any(e is None for e in elements) else _array(elements, arrays[0].shape)

    return rule


def _compare(function: Callable[[int, int], bool]) -> Callable[[Dim, Dim], bool | None]:
    def rule(a: Dim, b: Dim) -> bool | None:
        difference = a - b
        return function(difference, 0) if isinstance(difference, int) else None

    return rule


def _equal(a: Dim, b: Dim) -> bool | None:
    difference = a - b
    if isinstance(difference, int):
        return difference == 0
    # A size is never negative: the usual question is whether it is -1.
    return False if never_negative(difference - 1) or never_negative(-1 - difference) else None


def _where(condition: Any, a: Dim, b: Dim) -> Dim | None:
    if a == b:
        return a
    return (a if condition else b) if isinstance(condition, (bool, np.bool_, int)) else None


def _content_cast(shapes: Shapes, node: ir.Node) -> Content | None:
    target = attribute(node, "to")
    if target not in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL):
        return None  # contents are integers: a float would be rounded
    content = shapes.content(node.inputs[0])
    if content is None or target != ir.DataType.BOOL:
        return content
    return _content_elementwise(lambda e: bool(e) if isinstance(e, int) else None)(shapes, node)


def _content_by_numpy(function: Callable[[ir.Node, list[Any]], Any]) -> Callable[..., Any]:
    def rule(shapes: Shapes, node: ir.Node) -> Content | None:
        contents = _contents(shapes, node)
        return None if contents is None else np.asarray(function(node, contents), dtype=object)

    return rule


def _content_reshape(shapes: Shapes, node: ir.Node) -> Content | None:
    content = shapes.content(node.inputs[0])
    shape = output_shapes(shapes, node)
    if content is None or not shape or shape[0] is None:
        return None
    if not all(isinstance(size, int) for size in shape[0]):
        return None
    return content.reshape([int(evaluate(size, {}) or 0) for size in shape[0]])


def _content_slice(shapes: Shapes, node: ir.Node) -> Content | None:
    content, bounds = shapes.content(node.inputs[0]), slice_bounds(shapes, node)
    if content is None:
        return None
    if bounds is None:
        return _content_slice_back(shapes, node, content)
    index = [slice(None)] * content.ndim
    for axis, start, length, step in bounds:
        if not isinstance(start, int) or not isinstance(length, int):
            return None
        index[axis] = slice(start, start + length * step, step)
    return content[tuple(index)]


def _content_slice_back(shapes: Shapes, node: ir.Node, content: Content) -> Content | None:
    """With steps below zero: how exporters turn the pairs of a Pad around."""
    given = [shapes.content(value) for value in node.inputs[1:]]
    if len(given) != 4 or any(each is None for each in given):
        return None
    index: list[Any] = [slice(None)] * content.ndim
    for start, end, axis, step in zip(
        *(each.flat for each in given if each is not None), strict=True
    ):
        if not all(isinstance(each, int) for each in (start, end, axis, step)):
            return None
        size = content.shape[axis]
        last = None if step < 0 and end < -size else end
        index[axis] = slice(start, last, step)
    found: Content = content[tuple(index)]
    return found


def _content_scatter(shapes: Shapes, node: ir.Node) -> Content | None:
    """Elements of a vector replaced at known places."""
    contents = _contents(shapes, node)
    if contents is None or contents[0].ndim != 1 or attribute(node, "reduction", "none") != "none":
        return None
    result: Content = contents[0].copy()
    for index, element in zip(contents[1].flat, contents[2].flat, strict=True):
        result[int(index)] = element
    return result


def _content_range(shapes: Shapes, node: ir.Node) -> Content | None:
    ends = _contents(shapes, node)
    if ends is None or not all(isinstance(end.flat[0], int) for end in ends):
        return None
    numbers = range(*(int(end.flat[0]) for end in ends))
    return _array(list(numbers), (len(numbers),)) if len(numbers) <= 64 else None


def _content_constant_of_shape(shapes: Shapes, node: ir.Node) -> Content | None:
    target = shapes.content(node.inputs[0])
    tensor = attribute(node, "value")
    if target is None or not all(isinstance(size, int) for size in target.flat):
        return None
    if tensor is None or tensor.dtype not in (ir.DataType.INT64, ir.DataType.BOOL):
        return None
    if int(np.prod([int(size) for size in target.flat])) > 64:
        return None
    return np.full([int(size) for size in target.flat], tensor.numpy().item(), dtype=object)


def _content_expand(shapes: Shapes, node: ir.Node) -> Content | None:
    content, shape = shapes.content(node.inputs[0]), output_shapes(shapes, node)
    if content is None or not shape or shape[0] is None:
        return None
    if not all(isinstance(size, int) for size in shape[0]):
        return None
    sizes = [int(evaluate(size, {}) or 0) for size in shape[0]]
    return np.broadcast_to(content, sizes).copy() if np.prod(sizes) <= 64 else None


def _content_reduce(function: Callable[[Sequence[Dim]], Dim]) -> Callable[..., Content | None]:
    def rule(shapes: Shapes, node: ir.Node) -> Content | None:
        content = shapes.content(node.inputs[0])
        shape = output_shapes(shapes, node)
        if content is None or content.ndim > 1 or not shape or shape[0] is None:
            return None
        return _array([function(list(content.flat))], (1,) * len(shape[0]))

    return rule


_CONTENT_RULES: dict[str, Callable[[Shapes, ir.Node], Content | None]] = {
    "Shape": _content_shape,
    "Size": lambda shapes, node: (
        None if (shape := shapes.of(node.inputs[0])) is None else _array([product(shape)], ())
    ),
    "Identity": lambda shapes, node: shapes.content(node.inputs[0]),
    "Cast": _content_cast,
    "Add": _content_elementwise(operator.add),
    "Sub": _content_elementwise(operator.sub),
    "Mul": _content_elementwise(operator.mul),
    "Div": _content_elementwise(floor_divide),
    "Mod": _content_elementwise(modulo),
    "Neg": _content_elementwise(lambda a: 0 - a),
    "Min": _content_elementwise(minimum),
    "Max": _content_elementwise(maximum),
    "Abs": _content_elementwise(lambda a: a if never_negative(a) else atom("abs", a)),
    "Equal": _content_elementwise(_equal),
    "Less": _content_elementwise(_compare(operator.lt)),
    "Greater": _content_elementwise(_compare(operator.gt)),
    "LessOrEqual": _content_elementwise(_compare(operator.le)),
    "GreaterOrEqual": _content_elementwise(_compare(operator.ge)),
    "Not": _content_elementwise(lambda a: not a),
    "Where": _content_elementwise(_where),
    "Reshape": _content_reshape,
    "Squeeze": _content_reshape,
    "Unsqueeze": _content_reshape,
    "Expand": _content_expand,
    "Slice": _content_slice,
    "Concat": _content_by_numpy(lambda node, c: np.concatenate(c, axis=attribute(node, "axis"))),
    "Gather": _content_by_numpy(
        lambda node, c: np.take(c[0], c[1].astype(int), axis=attribute(node, "axis", 0))
    ),
    "Transpose": _content_by_numpy(lambda node, c: np.transpose(c[0], attribute(node, "perm"))),
    "Range": _content_range,
    "ScatterElements": _content_scatter,
    "ConstantOfShape": _content_constant_of_shape,
    "ReduceProd": _content_reduce(product),
    "ReduceSum": _content_reduce(lambda elements: sum(elements, start=0)),
}
