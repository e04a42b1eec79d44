"""Where a model holds tensors: initializers and attributes, of subgraphs and functions too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir


class EmbeddedTensor(ir.Tensor[Any]):
    """A weight embedded in the model file that was read: a view of the mapped file."""

    __slots__ = ()


@dataclass(frozen=True)
class TensorSlot:
    """A place of a model that holds a tensor.

    Attributes:
        tensor: what it holds.
        initializer: whether it is an initializer, of any graph, rather than an attribute.
        swap: puts another tensor there and returns what undoes that.
    """

    tensor: ir.TensorProtocol
    initializer: bool
    swap: Callable[[ir.TensorProtocol], Callable[[], None]]


def tensor_slots(model: ir.Model) -> Iterator[TensorSlot]:
    """Every tensor of a model: initializers and attributes, of subgraphs and functions too."""
    functions = list(model.functions.values())
    graphs = [*model.graphs(), *(graph for f in functions for graph in f.subgraphs())]
    for graph in graphs:
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield TensorSlot(value.const_value, True, partial(_swap_value, value))
    roots: list[ir.Graph | ir.Function] = [model.graph, *functions]
    for root in roots:
        for node in ir.traversal.RecursiveGraphIterator(root):
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                name = attribute.name
                if attribute.type == ir.AttributeType.TENSOR:
                    yield TensorSlot(attribute.value, False, partial(_swap_tensor, node, name, 0))
                elif attribute.type == ir.AttributeType.TENSORS:
                    for index, tensor in enumerate(attribute.value):
                        yield TensorSlot(tensor, False, partial(_swap_tensor, node, name, index))


def _swap_value(value: ir.Value, tensor: ir.TensorProtocol) -> Callable[[], None]:
    old, value.const_value = value.const_value, tensor
    return lambda: setattr(value, "const_value", old)


def _swap_tensor(
    node: ir.Node, name: str, index: int, tensor: ir.TensorProtocol
) -> Callable[[], None]:
    old = node.attributes[name]
    if old.type == ir.AttributeType.TENSOR:
        node.attributes[name] = ir.AttrTensor(name, tensor, doc_string=old.doc_string)
    else:
        tensors = [*old.value[:index], tensor, *old.value[index + 1 :]]
        node.attributes[name] = ir.AttrTensors(name, tensors, doc_string=old.doc_string)
    return lambda: node.attributes.__setitem__(name, old)
