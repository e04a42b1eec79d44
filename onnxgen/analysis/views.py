"""Chains of views, composed into one map of axes.

Reshape, Transpose, Expand, Tile, Squeeze and Unsqueeze move elements and compute nothing. However
many of them an exporter wrote, together they are one map from a source tensor to the result,
which einops would write as `b s (h d) -> b h s d` or `b k t d -> b (k g) t d`:

    view = views.of(value)
    view.source    # the tensor that the chain starts from
    view.axes      # for each axis of the value, the digits of the source's axes it runs over

A digit is `(index // stride) % size` of one source axis, as in a mixed-radix number, so that
splitting and merging axes, in any order and through any detour, ends in the same map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from onnxgen.analysis.graph import attribute, names, scalar
from onnxgen.analysis.shapes import Shapes
from onnxgen.analysis.symbols import Dim, divide, product


@dataclass(frozen=True)
class Digit:
    """A factor of an axis: `(index // stride) % size` of source axis `axis`.

    `axis` None means that the elements are repeated `size` times.
    """

    axis: int | None
    stride: Dim
    size: Dim

    @property
    def repeats(self) -> bool:
        return self.axis is None


Axis: TypeAlias = tuple[Digit, ...]


@dataclass(frozen=True)
class View:
    """A value as a map of axes over its source, times a number.

    Attributes:
        source: where the chain starts: the output of a node that computes something.
        axes: the digits of each axis, outermost first; an axis of size 1 has none.
        scale: product of the constants the chain multiplied by on the way.
    """

    source: ir.Value
    axes: tuple[Axis, ...]
    scale: float = 1.0


class Views:
    """Views of a graph's values; asks `shapes` for sizes and remembers its answers."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._known: dict[ir.Value, View | None] = {}

    def of(self, value: ir.Value) -> View | None:
        """The view a value is, at least of itself; None where its rank is unknown."""
        chain = []
        step: ir.Value | None = value
        while step is not None and step not in self._known:
            chain.append(step)
            step = viewed(step)
        for each in reversed(chain):
            self._known[each] = self._compose(each)
        return self._known[value]

    def through(self, node: ir.Node, axes: tuple[Axis, ...]) -> tuple[Axis, ...] | None:
        """The axes of a view node's output, given those of what it views; None if not known."""
        found = self._apply(node, axes, node.outputs[0])
        return None if found is None else tuple(map(canonical, found))

    def forget(self) -> None:
        """Answers are remembered until the graph changes."""
        self._known.clear()

    def chain(self, value: ir.Value) -> list[ir.Value]:
        """The values from `value` back to its view's source, both included."""
        view = self.of(value)
        chain = [value]
        while view is not None and chain[-1] is not view.source:
            previous = viewed(chain[-1])
            if previous is None:
                break
            chain.append(previous)
        return chain

    def _compose(self, value: ir.Value) -> View | None:
        inner_value = viewed(value)
        inner = None if inner_value is None else self._known.get(inner_value)
        node = value.producer()
        if inner is not None and node is not None:
            factor = scalar_factor(node)
            if factor is not None:
                return View(inner.source, inner.axes, inner.scale * factor[1])
            axes = self._apply(node, inner.axes, value)
            if axes is not None:
                return View(inner.source, tuple(map(canonical, axes)), inner.scale)
        return self.identity(value)

    def identity(self, value: ir.Value) -> View | None:
        """A value as the view of itself."""
        shape = self._shapes.of(value)
        if shape is None:
            return None
        return View(value, tuple(self._axis(axis, size) for axis, size in enumerate(shape)))

    def _axis(self, axis: int, size: Dim) -> Axis:
        return () if size == 1 else (Digit(axis, 1, self._shapes.resolve(size)),)

    def _apply(
        self, node: ir.Node, axes: tuple[Axis, ...], output: ir.Value
    ) -> Sequence[Axis] | None:
        shape = self._shapes.of(output)
        if shape is None:
            return None
        match node.op_type:
            case "Identity":
                return axes
            case "Transpose":
                order = attribute(node, "perm", range(len(axes))[::-1])
                return [axes[axis] for axis in order]
            case "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten":
                return self._reshape([digit for axis in axes for digit in axis], shape)
            case "Expand":
                return self._expand(axes, shape)
            case "Tile":
                return self._tile(node, axes)
            case "Gather":
                return self._gather(node, axes)
            case "Concat" if _of_one(node):
                axis = attribute(node, "axis") % len(axes)
                repeated = (Digit(None, 1, len(node.inputs)), *axes[axis])
                return [*axes[:axis], repeated, *axes[axis + 1 :]]
        return None

    def _reshape(self, digits: list[Digit], shape: Sequence[Dim]) -> list[Axis] | None:
        """Deal the digits out to axes of the new sizes, splitting them where needed."""
        left = [digit for digit in reversed(digits) if digit.size != 1]
        axes: list[Axis] = []
        for size in shape:
            axis: list[Digit] = []
            missing = self._shapes.resolve(size)
            while missing != 1:
                if not left:
                    return None
                digit = left.pop()
                quotient = divide(missing, digit.size)
                if quotient is not None:
                    axis.append(digit)
                    missing = quotient
                    continue
                inner = divide(digit.size, missing)
                if inner is None:
                    return None
                axis.append(Digit(digit.axis, digit.stride * inner, missing))
                left.append(Digit(digit.axis, digit.stride, inner))
                missing = 1
            axes.append(tuple(axis))
        return None if left else axes

    def _expand(self, axes: tuple[Axis, ...], shape: Sequence[Dim]) -> list[Axis] | None:
        padded: tuple[Axis, ...] = ((),) * (len(shape) - len(axes)) + axes
        result: list[Axis] = []
        for axis, size in zip(padded, shape, strict=True):
            if not axis and size != 1:
                result.append((Digit(None, 1, self._shapes.resolve(size)),))
            elif self._shapes.same(product(digit.size for digit in axis), size):
                result.append(axis)
            else:
                return None
        return result

    def _tile(self, node: ir.Node, axes: tuple[Axis, ...]) -> list[Axis] | None:
        repeats = self._shapes.content(node.inputs[1])
        if repeats is None:
            return None
        return [
            axis if times == 1 else (Digit(None, 1, times), *axis)
            for axis, times in zip(axes, repeats.flat, strict=True)
        ]

    def _gather(self, node: ir.Node, axes: tuple[Axis, ...]) -> list[Axis] | None:
        """Gather along an axis with the indices 0 0 0 1 1 1 ... repeats its elements."""
        indices = self._shapes.content(node.inputs[1])
        if indices is None or indices.ndim != 1:
            return None
        axis = attribute(node, "axis", 0) % len(axes)
        size = product(digit.size for digit in axes[axis])
        if not isinstance(size, int) or indices.size % size:
            return None
        times = indices.size // size
        if times == 1 or list(indices) != [index // times for index in range(indices.size)]:
            return None
        repeated = (*axes[axis], Digit(None, 1, times))
        return [*axes[:axis], repeated, *axes[axis + 1 :]]


VIEW_OPS = names(
    """
    Identity Transpose Reshape Squeeze Unsqueeze Flatten Expand Tile Gather
    """
)


def viewed(value: ir.Value) -> ir.Value | None:
    """The tensor that a value is one view step, or one constant factor, away from."""
    node = value.producer()
    if node is None or value.index() != 0:
        return None
    if node.op_type in VIEW_OPS or _of_one(node):
        return node.inputs[0]
    factor = scalar_factor(node)
    return None if factor is None else factor[0]


def _of_one(node: ir.Node) -> bool:
    """Whether a node joins one tensor with itself, which repeats it."""
    return node.op_type == "Concat" and len(node.inputs) > 1 and len(set(node.inputs)) == 1


def scalar_factor(node: ir.Node) -> tuple[ir.Value, float] | None:
    """(x, c) where the node computes x * c for a constant number c, else None."""
    if node.op_type == "Mul":
        for x, c in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            number = scalar(c)
            if x is not None and number is not None and scalar(x) is None:
                return x, number
    if node.op_type == "Div" and node.inputs[0] is not None:
        number = scalar(node.inputs[1])
        if number:
            return node.inputs[0], 1.0 / number
    return None


def canonical(axis: Iterable[Digit]) -> Axis:
    """Adjacent digits of one source axis that together are one digit become it."""
    result: list[Digit] = []
    for digit in axis:
        if digit.size == 1:
            continue
        last = result[-1] if result else None
        if last is not None and last.axis == digit.axis:
            if digit.repeats:
                result[-1] = Digit(None, 1, last.size * digit.size)
                continue
            if last.stride == digit.stride * digit.size:
                result[-1] = Digit(digit.axis, digit.stride, last.size * digit.size)
                continue
        result.append(digit)
    return tuple(result)
