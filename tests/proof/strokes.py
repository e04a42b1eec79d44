"""What is done to a copy of a model to damage it; the copy comes last, so that `partial` takes the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

Array = npt.NDArray[Any]
Place = tuple[tuple[int, ...], int]
"""(() or (number of a function,), number of a node in it)."""

Op = tuple[str, Sequence[Any], dict[str, Any]]
"""(type, inputs, .. for what is changed, attributes)."""

_FAR = np.iinfo(np.int32).max


class Copy:
    """A model that is being damaged."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model

    def nodes(self, path: tuple[int, ...]) -> Any:
        """The nodes of the main graph (), or of function i (i,)."""
        return self.model.functions[path[0]].node if path else self.model.graph.node

    def node(self, place: Place) -> onnx.NodeProto:
        node: onnx.NodeProto = self.nodes(place[0])[place[1]]
        return node

    def tensor(self, name: str) -> onnx.TensorProto:
        """An initializer of the main graph, or what a Constant of it holds."""
        for tensor in self.model.graph.initializer:
            if tensor.name == name:
                return tensor
        for node in self.model.graph.node:
            if node.op_type == "Constant" and name in node.output:
                return node.attribute[0].t
        raise KeyError(name)

    def insert(self, place: Place, nodes: Sequence[onnx.NodeProto]) -> None:
        """Put nodes before a node; its number is another afterwards."""
        holder = self.nodes(place[0])
        for node in reversed(nodes):
            holder.insert(place[1], node)

    def constant(self, values: Any) -> str:
        """A new initializer of the main graph."""
        name = f"damage.{len(self.model.graph.initializer)}"
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def chain(self, name: str, ops: Sequence[Op]) -> tuple[list[onnx.NodeProto], str]:
        """Ops one after the other, and what the last makes."""
        made = []
        for number, (kind, inputs, attributes) in enumerate(ops):
            out = f"damage.{name}.{number}"
            given = [name if each is ... else each for each in inputs]
            made.append(helper.make_node(kind, given, [out], **attributes))
            name = out
        return made, name

    def moved(self, name: str, axis: int) -> tuple[list[onnx.NodeProto], str]:
        """Nodes that move a value by one place along an axis, the last to the front."""
        ends = [self.constant(np.array([each], np.int64)) for each in (-1, _FAR, 0, axis)]
        last, first, out = (f"damage.{name}.{each}" for each in ("last", "first", "moved"))
        return [
            helper.make_node("Slice", [name, ends[0], ends[1], ends[3]], [last]),
            helper.make_node("Slice", [name, ends[2], ends[0], ends[3]], [first]),
            helper.make_node("Concat", [last, first], [out], axis=axis),
        ], out

    def rename(self, old: str, new: str, start: int = 0) -> None:
        """Let every use of a value in the main graph, from a node on, be of another."""
        for node in self.model.graph.node[start:]:
            _rename(node, old, new)


def _rename(node: onnx.NodeProto, old: str, new: str) -> None:
    for index, name in enumerate(node.input):
        if name == old:
            node.input[index] = new
    for attribute in node.attribute:
        for inner in attribute.g.node:
            _rename(inner, old, new)


def put_attribute(place: Place, name: str, value: Any, copy: Copy) -> None:
    """Set an attribute, or drop it for None."""
    node = copy.node(place)
    kept = [each for each in node.attribute if each.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    if value is not None:
        node.attribute.append(helper.make_attribute(name, value))


def put(name: str, change: Callable[[Array], Array], copy: Copy) -> None:
    """Let a constant hold what a function makes of it, in its type."""
    tensor = copy.tensor(name)
    old = numpy_helper.to_array(tensor)
    new = np.ascontiguousarray(np.asarray(change(old)).astype(old.dtype))
    tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))


def put_at(name: str, at: int, value: Any, copy: Copy) -> None:
    """Another element of a constant."""

    def change(values: Array) -> Array:
        new = values.copy()
        new.flat[at] = value
        return new

    put(name, change, copy)


def retype(place: Place, op_type: str, copy: Copy) -> None:
    """Another op with the same inputs."""
    copy.node(place).op_type = op_type


def rewire(place: Place, index: int, name: str, copy: Copy) -> None:
    """Another value as a node's input; "" leaves it out."""
    copy.node(place).input[index] = name


def exchange(place: Place, a: int, b: int, copy: Copy) -> None:
    """Two inputs of a node in each other's place."""
    node = copy.node(place)
    node.input[a], node.input[b] = node.input[b], node.input[a]


def bypass(place: Place, index: int, copy: Copy) -> None:
    """A node's first output is one of its inputs."""
    node = copy.node(place)
    through = helper.make_node("Identity", [node.input[index]], [node.output[0]])
    if len(node.output) > 1:  # the others are still made, the first under another name
        node.output[0] = "damage.unused"
        copy.insert(place, [through])
    else:
        node.CopyFrom(through)


def edge(place: Place, index: int, ops: Sequence[Op], copy: Copy) -> None:
    """Ops between a node's input and what it was."""
    node = copy.node(place)
    made, node.input[index] = copy.chain(node.input[index], ops)
    copy.insert(place, made)


def shift_edge(place: Place, index: int, step: Any, copy: Copy) -> None:
    """A node's integer input, so much greater."""
    edge(place, index, [("Add", [..., copy.constant(step)], {})], copy)


def move_edge(place: Place, index: int, axis: int, copy: Copy) -> None:
    """A node's input, moved along an axis."""
    node = copy.node(place)
    made, node.input[index] = copy.moved(node.input[index], axis)
    copy.insert(place, made)


def pick(place: Place, index: int, axis: int, picked: Array, copy: Copy) -> None:
    """A node's input, its elements along an axis in another order."""
    edge(place, index, [("Gather", [..., copy.constant(picked)], {"axis": axis})], copy)


def narrow(place: Place, pair: tuple[int, int], kept: int, width: int, copy: Copy) -> None:
    """Angles of the columns behind are 0: cosines 1, sines 0."""
    mask = copy.constant(np.arange(width) < kept)
    node = copy.node(place)
    made = []
    for index, rest in zip(pair, (1.0, 0.0), strict=True):
        name, like, out = node.input[index], f"damage.like.{index}", f"damage.narrow.{index}"
        made.append(helper.make_node("CastLike", [copy.constant(np.float32(rest)), name], [like]))
        made.append(helper.make_node("Where", [mask, name, like], [out]))
        node.input[index] = out
    copy.insert(place, made)


def move_output(name: str, axis: int, copy: Copy) -> None:
    """One of the graph's outputs, moved along an axis."""
    hidden = f"damage.{name}"
    for node in copy.model.graph.node:
        for index, each in enumerate(node.output):
            node.output[index] = hidden if each == name else each
    copy.rename(name, hidden)
    made, _ = copy.moved(hidden, axis)
    made[-1].output[0] = name
    copy.model.graph.node.extend(made)


def move_input(name: str, axis: int, copy: Copy) -> None:
    """One of the graph's inputs, moved along an axis, for all that read it."""
    made, last = copy.moved(name, axis)
    copy.rename(name, last)
    copy.insert(((), 0), made)


def shift_input(name: str, step: Any, copy: Copy) -> None:
    """One of the graph's integer inputs, so much greater, for all that read it."""
    made, last = copy.chain(name, [("Add", [..., copy.constant(step)], {})])
    copy.rename(name, last)
    copy.insert(((), 0), made)


def cross_inputs(a: str, b: str, copy: Copy) -> None:
    """Two of the graph's inputs, read in each other's place."""
    copy.rename(a, "damage.crossed")
    copy.rename(b, a)
    copy.rename("damage.crossed", b)


def cross_outputs(a: str, b: str, copy: Copy) -> None:
    """Two of the graph's outputs, each under the other's name."""
    other = {a: b, b: a}
    for node in copy.model.graph.node:
        for index, name in enumerate(node.output):
            node.output[index] = other.get(name, name)
        for index, name in enumerate(node.input):
            node.input[index] = other.get(name, name)


def rename_from(old: str, new: str, number: int, copy: Copy) -> None:
    """From a node on, what read a value reads another."""
    copy.rename(old, new, number)
