"""Making nodes: names, constants, element types and shapes are taken care of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.dtypes import output_dtypes
from onnxgen.analysis.shapes import Shapes
from onnxgen.analysis.symbols import Dim, Poly
from onnxgen.derived import DerivedTensor, Rows


class Builder:
    """Collects new nodes over a graph's values until they are inserted.

    Constants are registered with the graph at once (equal ones once); nodes are only collected,
    so that a rewrite can be checked, and dropped, before it touches the graph.
    """

    def __init__(self, graph: ir.Graph, shapes: Shapes) -> None:
        self.graph = graph
        self.shapes = shapes
        self.nodes: list[ir.Node] = []
        self.steps = 0  # of what the rule looks for, so many hold
        self._taken: set[str] = {node.name or "" for node in graph.all_nodes()}
        self._taken |= {value.name or "" for node in graph.all_nodes() for value in node.outputs}
        self._taken |= {value.name or "" for value in graph.inputs} | set(graph.initializers)
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._derived: dict[str, ir.Value] = {}

    def take(self) -> list[ir.Node]:
        """The nodes collected since the last call."""
        nodes, self.nodes = self.nodes, []
        return nodes

    def passed(self, step: int) -> None:
        """The rule's steps up to this one, counted from 1 as on its page, hold."""
        self.steps = max(self.steps, step)

    def drop(self) -> None:
        """Give up the collected nodes: nothing is read by them any more."""
        for node in self.take():
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)

    def keep(self, outputs: Iterable[ir.Value]) -> list[ir.Node]:
        """Give up the collected nodes that these values do not need; the others."""
        wanted, needed = list(outputs), set()
        made = set(self.nodes)
        while wanted:
            node = wanted.pop().producer()
            if node in made and node not in needed:
                needed.add(node)
                wanted.extend(value for value in node.inputs if value is not None)
        kept = [node for node in self.nodes if node in needed]
        self.nodes = [node for node in self.nodes if node not in needed]
        self.drop()
        self.nodes = kept
        return kept

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        *,
        domain: str = "",
        name: str = "",
    ) -> ir.Value:
        """A new node with one output; the output is returned."""
        return self.ops(op_type, inputs, 1, attributes, domain=domain, name=name)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        attributes: dict[str, Any] | None = None,
        *,
        domain: str = "",
        name: str = "",
        overload: str = "",
    ) -> Sequence[ir.Value]:
        """A new node; trailing inputs that are None are left out.

        A node of the domain `onnxgen` is all that calls one of `onnxgen.functions`.
        """
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        node = ir.node(
            op_type,
            given,
            attributes or {},
            domain=domain,
            overload=overload,
            num_outputs=outputs,
        )
        self.adopt(node, name)
        return node.outputs

    def adopt(self, node: ir.Node, name: str = "") -> None:
        """Collect a node that stands in no graph yet: it gets names, element types and shapes."""
        node.name = self.unique(name or f"onnxgen/{node.op_type}")
        for index, output in enumerate(node.outputs):
            output.name = self.unique(f"{node.name}:{index}" if index else f"{node.name}:out")
        dtypes = output_dtypes(node, self.graph.opset_imports.get("", 24))
        for output, dtype in zip(node.outputs, dtypes, strict=False):
            if dtype is not None:
                output.dtype = dtype
        self.shapes.infer(node)
        self.nodes.append(node)

    def constant(self, array: np.ndarray[Any, Any], name: str = "onnxgen/constant") -> ir.Value:
        """An initializer with these elements; an equal one is made once."""
        key = (array.dtype.str, array.shape, array.tobytes())
        found = self._constants.get(key)
        if found is None or found.name not in self.graph.initializers:
            tensor = ir.tensor(array)
            found = ir.Value(
                name=self.unique(name),
                shape=ir.Shape(array.shape),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            self.graph.register_initializer(found)
            self._constants[key] = found
        return found

    def derived(self, rows: Rows, name: str = "onnxgen/packed") -> ir.Value:
        """An initializer that is made from others when the model is written; equal ones once."""
        key = rows.outline(lambda tensor: str(id(tensor)))
        found = self._derived.get(key)
        if found is not None and found.name in self.graph.initializers:
            return found
        tensor = DerivedTensor(rows, self.unique(name))
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(rows.shape),
            type=ir.TensorType(rows.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        self._derived[key] = value
        return value

    def ints(self, *numbers: int) -> ir.Value:
        """A constant int64 vector."""
        return self.constant(np.array(numbers, dtype=np.int64))

    def sizes(self, dims: Sequence[Dim]) -> ir.Value | None:
        """An int64 vector of sizes, read off the graph's inputs; None where one is unknown."""
        return SizesOfInputs(self).tensor(dims, None)

    def target(self, value: ir.Value, dims: Sequence[Dim]) -> ir.Value | None:
        """What a Reshape of `value` to these sizes takes; None where a size is unknown.

        Or where one is nothing, in a model of batches of 0: Reshape reads a 0 as "as it was".
        """
        if 0 in dims:
            return None
        source = self.shapes.of(value)
        literal = None if source is None else literal_target(self.shapes, source, dims)
        return self.sizes(dims) if literal is None else self.ints(*literal)

    def unique(self, name: str) -> str:
        """The name, with a number behind it if it is taken."""
        candidate, number = name, 1
        while candidate in self._taken:
            number += 1
            candidate = f"{name}_{number}"
        self._taken.add(candidate)
        return candidate


_SIZE_OPS = {"div": "Div", "mod": "Mod", "min": "Min", "max": "Max"}


class SizesOfInputs:
    """Makes index tensors from the sizes of the graph's inputs, each part once."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder
        self._shapes = builder.shapes
        self._vectors: dict[Dim, ir.Value] = {}
        self._tensors: dict[tuple[object, ...], ir.Value] = {}

    def tensor(self, elements: Sequence[Dim], shape: tuple[int, ...] | None) -> ir.Value | None:
        """An int64 tensor of these sizes (a vector for shape None); None where one is unknown."""
        resolved = tuple(map(self._shapes.resolve, elements))
        key = (resolved, shape)
        if key not in self._tensors:
            made = self._make(resolved, shape)
            if made is None:
                return None
            self._tensors[key] = made
        return self._tensors[key]

    def known(self, dim: Dim) -> bool:
        """Whether a size can be computed from the inputs' sizes."""
        if not isinstance(dim, Poly):
            return True
        return all(
            part.name in self._shapes.origins
            if not part.arguments
            else part.name in _SIZE_OPS and all(map(self.known, part.arguments))
            for monomial, _ in dim.terms
            for part in monomial
        )

    def _make(self, elements: tuple[Dim, ...], shape: tuple[int, ...] | None) -> ir.Value | None:
        if not all(map(self.known, elements)):
            return None
        op, ints = self._builder.op, self._builder.ints
        parts: list[ir.Value] = []
        numbers: list[int] = []
        for element in elements:
            if isinstance(element, Poly):
                if numbers:
                    parts.append(ints(*numbers))
                    numbers = []
                parts.append(self._vector(element))
            else:
                numbers.append(int(element))
        if numbers or not parts:
            parts.append(ints(*numbers))
        vector = parts[0] if len(parts) == 1 else op("Concat", parts, {"axis": 0}, name="sizes")
        if shape is None or shape == (len(elements),):
            return vector
        if shape == ():
            return op("Squeeze", [vector], name="size")
        empty = {"allowzero": 1} if 0 in shape else {}
        return op("Reshape", [vector, ints(*shape)], empty, name="sizes")

    def _vector(self, dim: Dim) -> ir.Value:
        """A size as an int64 vector of one element."""
        if dim not in self._vectors:
            self._vectors[dim] = self._compute(dim)
        return self._vectors[dim]

    def _compute(self, dim: Dim) -> ir.Value:
        op, ints = self._builder.op, self._builder.ints
        if not isinstance(dim, Poly):
            return ints(int(dim))
        total: ir.Value | None = None
        for monomial, factor in dim.terms:
            term: ir.Value | None = None if factor == 1 and monomial else ints(factor)
            for part in monomial:
                if part.arguments:
                    operands = [self._vector(argument) for argument in part.arguments]
                    size = op(_SIZE_OPS[part.name], operands, name="size")
                else:
                    value, axis = self._shapes.origins[part.name]
                    size = op("Shape", [value], {"start": axis, "end": axis + 1}, name="size")
                term = size if term is None else op("Mul", [term, size], name="size")
            assert term is not None
            total = term if total is None else op("Add", [total, term], name="size")
        assert total is not None
        return total


def literal_target(
    shapes: Shapes, source: Sequence[Dim], result: Sequence[Dim]
) -> list[int] | None:
    """Reshape's constant target from `source` to `result`: sizes, 0 to keep, one -1."""
    target: list[int] = []
    for axis, size in enumerate(result):
        if isinstance(size, int):
            if size == 0:
                return None
            target.append(size)
        elif axis < len(source) and shapes.same(size, source[axis]):
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None
