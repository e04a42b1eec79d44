"""Shapes of every value with symbolic sizes, and the contents of small integer tensors.

One pass in topological order. Exporters compute the shapes they reshape to from Shape, Gather,
Concat and arithmetic; following contents as well as shapes turns all of that into sizes, which
is what views are composed from (`analysis.views`).

    shapes = Shapes(graph)
    shapes.of(value)        # (ids[0], 6, past[2] + ids[1], 48), or None: rank unknown
    shapes.content(value)   # array of sizes for an index tensor, or None
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxgen import functions
from onnxgen.analysis import content_rules, shape_rules
from onnxgen.analysis.graph import CONTRIB
from onnxgen.analysis.symbols import (
    Atom,
    Dim,
    Poly,
    atom,
    broadcast,
    polynomial,
    terms_of,
)
from onnxgen.errors import RefusedError

Shape: TypeAlias = tuple[Dim, ...]
Content: TypeAlias = "np.ndarray[Any, Any]"  # of sizes

# Index tensors up to this many elements are followed by content; no shape is longer.
MAX_CONTENT = 64
LARGEST = 2**63 - 1


class Shapes:
    """Symbolic shapes and index contents of a graph's values, extended as nodes are added.

    Every free size of a graph input is a symbol of its own, `past_key[2]`. Sizes that an
    operator needs to be equal (the axes that Concat does not join) are merged, so that the
    batch of the ids and the batch of a cache become one: compare with `same`.

    Attributes:
        origins: for each symbol, the graph input and the axis it is the size of.
    """

    def __init__(self, graph: ir.Graph, assumed: Mapping[str, Dim] | None = None) -> None:
        """Infer the shapes of every value of a graph.

        Args:
            assumed: sizes that symbols are taken to have; nothing unless given.
        """
        self._shapes: dict[ir.Value, Shape] = {}
        self._contents: dict[ir.Value, Content] = {}
        self._merged: dict[Atom, Dim] = {}
        self._resolved: dict[Poly, Dim] = {}
        self._fresh = 0
        self._assumed = assumed or {}
        self.origins: dict[str, tuple[ir.Value, int]] = {}
        for value in (*graph.inputs, *graph.initializers.values()):
            self._declare(value)
        for node in graph:
            self.infer(node)

    def of(self, value: ir.Value | None) -> Shape | None:
        """The shape, one size an axis; None where even the rank is unknown."""
        if value is None:
            return None
        if value not in self._shapes and value.producer() is None:
            self._declare(value)
        return self._shapes.get(value)

    def rank(self, value: ir.Value | None) -> int | None:
        shape = self.of(value)
        return None if shape is None else len(shape)

    def content(self, value: ir.Value | None) -> Content | None:
        """The elements of a small integer or boolean tensor as sizes; None where unknown."""
        if value is None:
            return None
        if value not in self._shapes and value.producer() is None:
            self._declare(value)
        return self._contents.get(value)

    def same(self, a: Dim, b: Dim) -> bool:
        """Whether two sizes are equal, given what the operators demand to be equal."""
        return a == b or self.resolve(a) == self.resolve(b)

    def same_shape(self, a: Sequence[Dim] | None, b: Sequence[Dim] | None) -> bool:
        return a is not None and b is not None and len(a) == len(b) and all(map(self.same, a, b))

    def resolve(self, dim: Dim) -> Dim:
        """A size with merged symbols replaced by one representative."""
        if not isinstance(dim, Poly) or not self._merged:
            return dim
        known = self._resolved.get(dim)
        if known is None:
            known = self._resolved[dim] = self._resolve(dim)
        return known

    def _resolve(self, dim: Poly) -> Dim:
        total: Dim = 0
        for monomial, factor in dim.terms:
            part: Dim = factor
            for each in monomial:
                part = part * self._representative(each)
            total = total + part
        return total

    def merge(self, a: Dim, b: Dim) -> Dim:
        """Note that an operator needs `a == b`; returns the better known of the two.

        Raises:
            ValueError: they are two different numbers.
        """
        a, b = self.resolve(a), self.resolve(b)
        if isinstance(a, int) and isinstance(b, int) and a != b:
            raise ValueError(f"{a} is not {b}")
        zero = a - b
        for monomial, factor in sorted(terms_of(zero), key=_better_gone):
            if len(monomial) == 1 and abs(factor) == 1:
                rest = (zero - polynomial({monomial: factor})) * -factor
                if monomial[0] not in _atoms(rest):
                    self._merged[monomial[0]] = rest
                    self._resolved.clear()
                    return self.resolve(a)
        return a if isinstance(a, int) else b

    def unknown(self, hint: str) -> Dim:
        """A size nobody knows, different from every other."""
        self._fresh += 1
        return atom(f"?{hint}{self._fresh}")

    def infer(self, node: ir.Node) -> None:
        """Shapes and contents of a node's outputs, from its inputs'.

        Rules take for granted what their operators demand: axes that are there, sizes that
        divide, as many starts as ends. Where they find nothing, nobody can run the node.

        Raises:
            RefusedError: the node cannot take inputs of such shapes.
        """
        try:
            self._infer(node)
        except (LookupError, ValueError, ArithmeticError, StopIteration) as error:
            given = ", ".join(_shown(self.of(value)) for value in node.inputs)
            raise RefusedError(
                f"node '{node.name}' ({node.op_type}) cannot take inputs of the shapes {given}: "
                "the model is damaged, or says wrong shapes"
            ) from error

    def _infer(self, node: ir.Node) -> None:
        # An operator of a domain that nobody knows may bear a standard one's name.
        known = node.domain in ("", "ai.onnx", CONTRIB, functions.DOMAIN)
        shapes = shape_rules.output_shapes(self, node) if known else None
        for index, output in enumerate(node.outputs):
            shape = shapes[index] if shapes is not None and index < len(shapes) else None
            if shape is None and output.shape is not None:
                shape = tuple(
                    size if isinstance(size, int) else self.unknown("dim") for size in output.shape
                )
            if shape is not None:
                shape = tuple(map(self.resolve, shape))
                if any(isinstance(size, int) and not 0 <= size <= LARGEST for size in shape):
                    raise ValueError(f"no tensor has the shape {_shown(shape)}")
                self._shapes[output] = shape
        content = content_rules.output_content(self, node) if known else None
        if content is not None and content.size <= MAX_CONTENT and not _overflows(content):
            self._contents[node.outputs[0]] = content
            self._shapes[node.outputs[0]] = content.shape

    def _declare(self, value: ir.Value) -> None:
        tensor = value.const_value
        if tensor is not None:
            self._shapes[value] = tuple(int(size) for size in tensor.shape.numpy())
            if tensor.size <= MAX_CONTENT and tensor.dtype in _INDEX_TYPES:
                self._contents[value] = tensor.numpy().astype(object)
            return
        if value.shape is not None:
            names = [f"{value.name}[{axis}]" for axis in range(len(value.shape))]
            self.origins |= {name: (value, axis) for axis, name in enumerate(names)}
            self._shapes[value] = tuple(
                size if isinstance(size, int) else self._assumed.get(name, atom(name))
                for size, name in zip(value.shape, names, strict=True)
            )

    def _representative(self, part: Atom) -> Dim:
        if part.arguments:
            arguments = tuple(map(self.resolve, part.arguments))
            if part.name == "bcast":
                return functools.reduce(broadcast, arguments)
            return polynomial({(Atom(part.name, arguments),): 1})
        merged = self._merged.get(part)
        return polynomial({(part,): 1}) if merged is None else self.resolve(merged)


_INDEX_TYPES = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL}


def _better_gone(term: tuple[tuple[Atom, ...], int]) -> bool:
    """Sorts sizes that no input has before those of inputs: they are merged into the latter."""
    return not any(part.arguments or part.name.startswith("?") for part in term[0])


def _atoms(dim: Dim) -> set[Atom]:
    found: set[Atom] = set()
    if isinstance(dim, Poly):
        for monomial, _ in dim.terms:
            for part in monomial:
                found.add(part)
                for argument in part.arguments:
                    found |= _atoms(argument)
    return found


def _overflows(content: Content) -> bool:
    """Whether arithmetic left the range of int64, where a runtime begins again at its other end."""
    return any(isinstance(each, int) and not -LARGEST <= each <= LARGEST for each in content.flat)


def _shown(shape: Shape | None) -> str:
    return "?" if shape is None else f"[{', '.join(map(str, shape))}]"
