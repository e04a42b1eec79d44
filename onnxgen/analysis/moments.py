"""Means, and means of squares, over the last axes: by whatever reduction they are computed.

    ReduceMean(v)    ReduceSum(v) / n    ReduceSum(v) * (1/n)        v = x, x * x, x ^ 2
    ReduceSumSquare(x) / n               ReduceL2(x) / sqrt(n): its root

An axis that the reduction drops may be put back by an Unsqueeze, before the division or after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute, constant, given, other_input, producer, scalar
from onnxgen.analysis.products import only_user, squared

REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2")


@dataclass(frozen=True)
class Mean:
    """What a reduction computes over x.

    Attributes:
        x: what the mean is of.
        value: the mean, once it is divided and has the axes of x.
        axis: the first of the last axes it is over, from the end; None where those are others.
        squares: it is the mean of x^2.
        rooted: it is the root of that already.
    """

    x: ir.Value
    value: ir.Value
    axis: int | None
    squares: bool
    rooted: bool = False


def mean_by(facts: Facts, node: ir.Node) -> Mean | None:
    """The mean that a reduction is the heart of; None where it is a sum, or of something else."""
    if producer(node.outputs[0], *REDUCTIONS) is None:
        return None
    source, root = given(node), squared(node.inputs[0])
    rooted = node.op_type == "ReduceL2"
    own = node.op_type in ("ReduceSumSquare", "ReduceL2")
    x = source if own or root is None else root
    count = _count(facts, node)
    value, divided = node.outputs[0], node.op_type == "ReduceMean"
    for _ in range(3):
        step = _step(value, None if divided else math.sqrt(count) if rooted else count)
        if step is None:
            break
        value, divides = step
        divided |= divides
    if not divided:
        return None
    axis = trailing_axis(facts, node)
    whole, shape = facts.shapes.of(x), facts.shapes.of(value)
    if axis is not None and not attribute(node, "keepdims", 1):
        kept = None if whole is None else (*whole[:axis], *(1,) * -axis)
        if not facts.shapes.same_shape(kept, shape):
            axis = None
    return Mean(x, value, axis, own or root is not None, rooted)


def mean_of(facts: Facts, value: ir.Value | None) -> Mean | None:
    """The mean of x that a value is, with the axes of x."""
    step = value
    for _ in range(4):
        node = producer(step, "Unsqueeze", "Div", "Mul", *REDUCTIONS)
        if node is None:
            return None
        if node.op_type in REDUCTIONS:
            found = mean_by(facts, node)
            return found if found is not None and found.value is value else None
        first = node.inputs[0]
        step = other_input(node, given(node)) if scalar(first) is not None else first
    return None


def _step(value: ir.Value, count: float | None) -> tuple[ir.Value, bool] | None:
    """The value one step on, over an Unsqueeze or the division by a count, and whether that."""
    unsqueezed = only_user(value, "Unsqueeze")
    if unsqueezed is not None:
        return unsqueezed.outputs[0], False
    if count is None or math.isnan(count):
        return None
    division, product = only_user(value, "Div"), only_user(value, "Mul")
    if division is not None and division.inputs[0] is value:
        number = scalar(division.inputs[1])
        if number is not None and math.isclose(number, count, rel_tol=1e-6):
            return division.outputs[0], True
    if product is not None:
        number = scalar(other_input(product, value))
        if number is not None and math.isclose(number * count, 1.0, rel_tol=1e-6):
            return product.outputs[0], True
    return None


def trailing_axis(facts: Facts, node: ir.Node) -> int | None:
    """The first of the last axes, from the end, that a reduction runs over; else None."""
    rank, axes = facts.shapes.rank(node.inputs[0]), _axes(node)
    if not axes:
        return None
    if rank is None:
        return -1 if axes == [-1] else None
    wanted = sorted(axis % rank - rank for axis in axes)
    return wanted[0] if wanted == list(range(-len(wanted), 0)) else None


def _axes(node: ir.Node) -> list[int]:
    axes = attribute(node, "axes")
    if axes is None and len(node.inputs) > 1:
        found = constant(node.inputs[1])
        axes = None if found is None else found.reshape(-1).tolist()
    return [int(axis) for axis in axes or ()]


def _count(facts: Facts, node: ir.Node) -> float:
    """How many elements are reduced to one; NaN where that is not known."""
    shape, axes = facts.shapes.of(node.inputs[0]), _axes(node)
    if shape is None or not axes:
        return math.nan
    sizes = [shape[axis % len(shape)] for axis in axes]
    known = [size for size in sizes if isinstance(size, int)]
    return float(math.prod(known)) if len(known) == len(sizes) else math.nan
