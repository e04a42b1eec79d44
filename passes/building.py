"""Making nodes: names, constants, element types and shapes are taken care of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.dtypes import output_dtypes
from onnxgen.analysis.shapes import Shapes


class Builder:
    """Collects new nodes over a graph's values until they are inserted.

    Constants are registered with the graph at once (equal ones once); nodes are only collected,
    so that a rewrite can be checked, and dropped, before it touches the graph.
    """

    def __init__(self, graph: ir.Graph, shapes: Shapes) -> None:
        self.graph = graph
        self.shapes = shapes
        self.nodes: list[ir.Node] = []
        self._taken: set[str] = {node.name or "" for node in graph}
        self._taken |= {value.name or "" for node in graph for value in node.outputs}
        self._taken |= {value.name or "" for value in graph.inputs} | set(graph.initializers)
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    def take(self) -> list[ir.Node]:
        """The nodes collected since the last call."""
        nodes, self.nodes = self.nodes, []
        return nodes

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        *,
        name: str = "",
    ) -> ir.Value:
        """A new node with one output; the output is returned."""
        return self.ops(op_type, inputs, 1, attributes, name=name)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        attributes: dict[str, Any] | None = None,
        *,
        name: str = "",
    ) -> Sequence[ir.Value]:
        """A new node; trailing inputs that are None are left out."""
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        node = ir.node(op_type, given, attributes or {}, num_outputs=outputs)
        node.name = self.unique(name or f"onnxgen/{op_type}")
        for index, output in enumerate(node.outputs):
            output.name = self.unique(f"{node.name}:{index}" if index else f"{node.name}:out")
        dtypes = output_dtypes(node, self.graph.opset_imports.get("", 24))
        for output, dtype in zip(node.outputs, dtypes, strict=False):
            if dtype is not None:
                output.dtype = dtype
        self.shapes.infer(node)
        self.nodes.append(node)
        return node.outputs

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

    def ints(self, *numbers: int) -> ir.Value:
        """A constant int64 vector."""
        return self.constant(np.array(numbers, dtype=np.int64))

    def unique(self, name: str) -> str:
        """The name, with a number behind it if it is taken."""
        candidate, number = name, 1
        while candidate in self._taken:
            number += 1
            candidate = f"{name}_{number}"
        self._taken.add(candidate)
        return candidate
