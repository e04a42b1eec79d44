"""A written model, read for where it can be damaged.

What types and shapes values have is known from one run of the undamaged model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from tests.proof.strokes import Copy, Place

Array = npt.NDArray[Any]
Change = Callable[[Copy], None]
Kind = tuple[np.dtype[Any], tuple[int, ...]]


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong.

    Attributes:
        kind: what sort of thing.
        where: the node, value or constant, and what became of it.
        change: does it to a copy.
    """

    kind: str
    where: str
    change: Change

    def made(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A damaged copy."""
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        self.change(Copy(copy))
        return copy


class View:
    """The undamaged model.

    Attributes:
        kinds: dtype and shape of every value of the main graph that is known, by name.
        constants: values of initializers and Constants, by name.
        nodes: (place, node) of the main graph; `inner`: those of the functions.
        inputs, outputs: names of the graph's.
    """

    def __init__(self, model: onnx.ModelProto, kinds: Mapping[str, Kind]) -> None:
        self.model = model
        self.kinds = dict(kinds)
        self.constants = {t.name: t for t in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        for name, tensor in self.constants.items():
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            self.kinds.setdefault(name, (dtype, tuple(tensor.dims)))
        self.nodes: list[tuple[Place, onnx.NodeProto]] = [
            (((), number), node) for number, node in enumerate(model.graph.node)
        ]
        self.inner: list[tuple[Place, onnx.NodeProto]] = [
            (((index,), number), node)
            for index, function in enumerate(model.functions)
            for number, node in enumerate(function.node)
        ]
        self.inputs = [each.name for each in model.graph.input if each.name not in self.constants]
        self.outputs = [each.name for each in model.graph.output]
        self.born = dict.fromkeys((*self.inputs, *self.constants), -1)
        for (_, number), node in self.nodes:
            self.born.update(dict.fromkeys(node.output, number))

    def values(self, name: str) -> Array:
        """What a constant holds."""
        return numpy_helper.to_array(self.constants[name])

    def shape(self, name: str) -> tuple[int, ...] | None:
        found = self.kinds.get(name)
        return None if found is None else found[1]

    def alike(self, a: str, b: str) -> bool:
        """Whether two values have one type and shape."""
        return a in self.kinds and self.kinds[a] == self.kinds.get(b)

    def floating(self, name: str) -> bool:
        found = self.kinds.get(name)
        return found is not None and np.issubdtype(found[0], np.floating)

    def integral(self, name: str) -> bool:
        found = self.kinds.get(name)
        return found is not None and np.issubdtype(found[0], np.integer)

    def edges(self) -> Iterator[tuple[Place, onnx.NodeProto, int, str]]:
        """(place, node, number of an input, its name) of the main graph, constants left out."""
        for place, node in self.nodes:
            for index, name in enumerate(node.input):
                if name and name not in self.constants:
                    yield place, node, index, name

    def source(self, name: str) -> onnx.NodeProto | None:
        number = self.born.get(name, -1)
        return None if number < 0 else self.nodes[number][1]

    @staticmethod
    def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
        for each in node.attribute:
            if each.name == name and not each.ref_attr_name:
                return helper.get_attribute_value(each)
        return default


def label(node: onnx.NodeProto) -> str:
    """A node, for a reader."""
    return f"{node.op_type} {node.name or node.output[0]}"
