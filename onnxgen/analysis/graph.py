"""Small questions about nodes and values that every pattern asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir


def names(text: str) -> frozenset[str]:
    """Op types written one after the other."""
    return frozenset(text.split())


FLOATS = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
)
CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

# A node whose output is no function of its inputs alone is never folded, merged or cut out.
NONDETERMINISTIC = names(
    """
    RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial Bernoulli
    """
)


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """An attribute's plain Python value, or the default where it is not given."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The standard-domain node that makes a value, if it is one of `op_types` (any if none)."""
    node = None if value is None else value.producer()
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    return node if not op_types or node.op_type in op_types else None


def optional(node: ir.Node, index: int) -> ir.Value | None:
    """An input that may be missing."""
    return node.inputs[index] if index < len(node.inputs) else None


def has_subgraph(node: ir.Node) -> bool:
    """Whether a node carries graphs of its own (If, Loop, Scan): those read outer values too."""
    return any(
        found.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for found in node.attributes.values()
    )


def constant(value: ir.Value | None, limit: int = 65536) -> np.ndarray[Any, Any] | None:
    """A constant's elements; None for what is computed, or holds more than `limit` elements."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    tensor = value.const_value
    if tensor.dtype == ir.DataType.STRING:  # no number, whatever is asked of it
        return None
    return tensor.numpy() if tensor.size <= limit else None


def scalar(value: ir.Value | None) -> float | None:
    """The number that a constant of one element holds, whatever its shape; None otherwise."""
    found = constant(value, limit=1)
    if found is None or found.size != 1 or found.dtype.kind not in "fiuV":
        return None
    return float(found.reshape(()).astype(np.float64))


def uniform(value: ir.Value | None) -> float | None:
    """The number that every element of a tensor is, however it is spread out; None otherwise."""
    for _ in range(8):
        number = scalar(value)
        node = producer(value, *_SPREADS)
        if number is not None or node is None:
            return number
        if node.op_type == "ConstantOfShape":
            tensor = attribute(node, "value")
            return 0.0 if tensor is None else float(tensor.numpy().reshape(()).astype(np.float64))
        value = node.inputs[0]
    return None


_SPREADS = ("ConstantOfShape", "Expand", "Tile", "Reshape", "Unsqueeze", "Squeeze", "Identity")


def given(node: ir.Node, index: int = 0) -> ir.Value:
    """An input that the operator does not let be missing."""
    value = node.inputs[index]
    assert value is not None
    return value


def is_read(value: ir.Value) -> bool:
    """Whether a node or the graph's caller reads a value."""
    return bool(value.uses()) or value.is_graph_output()


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The second operand of a binary node whose first is `value`, in either order."""
    first, second = node.inputs[:2]
    return second if first is value else first


def ancestors(values: Iterable[ir.Value], stop: frozenset[ir.Value]) -> Iterator[ir.Node]:
    """Nodes that the values are computed by, nearest first, not going past `stop`."""
    seen: set[ir.Node] = set()
    pending = [value for value in values if value not in stop]
    while pending:
        node = pending.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(v for v in node.inputs if v is not None and v not in stop)


def read_by(node: ir.Node) -> list[ir.Value]:
    """The values a node reads, those its subgraphs capture included."""
    read = [value for value in node.inputs if value is not None]
    for found in node.attributes.values():
        for graph in (
            [found.value]
            if found.type == ir.AttributeType.GRAPH
            else found.value
            if found.type == ir.AttributeType.GRAPHS
            else []
        ):
            inner = {output for each in graph.all_nodes() for output in each.outputs}
            inner.update(graph.inputs, graph.initializers.values())
            for each in graph.all_nodes():
                read.extend(v for v in each.inputs if v is not None and v not in inner)
    return read
