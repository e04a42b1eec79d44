"""Parts of a graph replaced by other graphs, whose values keep their names.

joined = Joined(model, [positions, …])
joined.put(0, part, inputs, outputs, exact_names=True)
model = joined.model()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import onnx
from onnx import TensorProto, helper

from onnxgen.contexts.cutting import every_node, graphs_of, reads_of
from onnxgen.contexts.order import collapsed
from onnxgen.errors import RefusedError


class Joined:
    """A model that is being put together.

    Args:
        main: the original, which is not changed.
        places: positions of the nodes that each part replaces.
    """

    def __init__(self, main: onnx.ModelProto, places: Sequence[Sequence[int]]) -> None:
        self._model = onnx.ModelProto()
        self._model.CopyFrom(main)
        self._main, self._places = main, places
        gone = {position for place in places for position in place}
        if len(gone) != sum(map(len, places)):
            raise ValueError("two places have a node in common")
        kept = [node for index, node in enumerate(main.graph.node) if index not in gone]
        self._new: list[list[onnx.NodeProto]] = [[] for _ in places]
        self._types: list[onnx.ValueInfoProto] = []
        self._keep: dict[int, str] = {}
        self._fixed = _constants(main.graph)
        self._used = {*_declared(main.graph), *_names(kept)}
        self._node_names = {node.name for node in kept if node.name}

    def put(
        self,
        index: int,
        part: onnx.ModelProto,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        exact_names: bool,
    ) -> None:
        """Put a part into its place.

        Args:
            index: of the place.
            part: its inputs and outputs are in the order of the names that follow.
            inputs, outputs: what they are called in the graph.
            exact_names: whether values of the part must keep their names.

        Raises:
            RefusedError: a name is in use that must be kept; an input is no tensor; the part needs
                another version of operators, or functions.
        """
        self._check(part)
        place = self._new[index]
        rename = self._renaming(part.graph, [*inputs, *outputs], exact_names)
        for value, name in zip(part.graph.input, inputs, strict=True):
            self._lead(place, name, rename(value.name), _rank(value))
        for node in part.graph.node:
            place.append(self._renamed(node, rename))
        for tensor in part.graph.initializer:
            found = self._model.graph.initializer.add()
            found.CopyFrom(tensor)
            found.name = rename(tensor.name)
        for value, name in zip(part.graph.output, outputs, strict=True):
            self._lead(place, rename(value.name), name, _rank(value))
        for value in [*part.graph.value_info, *part.graph.output]:
            self._types.append(_typed(value, rename(value.name)))

    def model(self) -> onnx.ModelProto:
        """The whole, its nodes in an order in which what is read was made before.

        Raises:
            ValueError: a place needs what it makes itself.
        """
        graph = self._model.graph
        nodes: list[onnx.NodeProto] = []
        for kind, index in collapsed(self._main.graph.node, self._places):
            nodes += self._new[index] if kind == "region" else [self._main.graph.node[index]]
        del graph.node[:]
        graph.node.extend(nodes)
        here = set(_names(nodes)) - {each.name for each in graph.output}
        types = {each.name: each for each in (*graph.value_info, *self._types) if each.name in here}
        del graph.value_info[:]
        graph.value_info.extend(types.values())
        read = {name for node in nodes for name in reads_of(node)}
        read |= {each.name for each in (*graph.input, *graph.output)}
        weights = [each for each in graph.initializer if each.name in read]
        del graph.initializer[:]
        graph.initializer.extend(weights)
        return self._model

    def _check(self, part: onnx.ModelProto) -> None:
        if part.functions or part.graph.sparse_initializer:
            raise RefusedError("what was compiled holds functions or sparse tensors")
        for tensor in part.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                raise RefusedError(f"the tensor '{tensor.name}' of a blob lies in another file")
        known = {_domain(each.domain): each.version for each in self._model.opset_import}
        needed = {_domain(node.domain) for node in every_node(part.graph.node)}
        for each in part.opset_import:
            domain = _domain(each.domain)
            if domain in needed and known.setdefault(domain, each.version) != each.version:
                raise RefusedError(
                    f"what was compiled needs version {each.version} of the operators of "
                    f"'{domain or 'ai.onnx'}', and the model has {known[domain]}"
                )
        have = {_domain(each.domain) for each in self._model.opset_import}
        new = ((domain, version) for domain, version in known.items() if domain not in have)
        self._model.opset_import.extend(helper.make_opsetid(*each) for each in new)

    def _renaming(
        self, graph: onnx.GraphProto, bound: Sequence[str], exact: bool
    ) -> Callable[[str], str]:
        """What the part's values are called here: each its own name, unless that is in use."""
        boundary = [each.name for each in (*graph.input, *graph.output)]
        pairs = zip(boundary, bound, strict=True)
        same = {name for name, other in pairs if name == other and name not in self._fixed}
        found: dict[str, str] = {"": ""}
        for name in dict.fromkeys([*_declared(graph), *_names(graph.node)]):
            if exact and name in self._used and name not in same:
                raise RefusedError(
                    f"the model has a value called '{name}', as what was compiled has: its provider "
                    "knows values by their names"
                )
            found[name] = name if name in same else self._new_name(name)
        return found.__getitem__

    def _lead(self, place: list[onnx.NodeProto], start: str, end: str, rank: int | None) -> None:
        """Nodes by which one value is there under another name too; none where the names are one."""
        if start == end:
            return
        shape = self._zeros(1 if rank is None else rank)
        if rank is None:
            sizes, same = (self._new_name(f"{end}_{each}") for each in ("sizes", "same"))
            place.append(helper.make_node("Shape", [start], [sizes]))
            place.append(helper.make_node("Add", [sizes, shape], [same]))
            shape = same
        place.append(helper.make_node("Reshape", [start, shape], [end]))  # 0: as it is

    def _zeros(self, count: int) -> str:
        """An input INT64 [count] of zeros unless it is given, which it never is: no constant."""
        if count not in self._keep:
            name = self._keep[count] = self._new_name(f"as_it_is_{count}")
            value = helper.make_tensor_value_info(name, TensorProto.INT64, [count])
            self._model.graph.input.append(value)
            zeros = helper.make_tensor(name, TensorProto.INT64, [count], [0] * count)
            self._model.graph.initializer.append(zeros)
        return self._keep[count]

    def _new_name(self, name: str) -> str:
        """The name, or one like it that is not in use."""
        found, number = name, 0
        while found in self._used:
            number += 1
            found = f"{name}_{number}"
        self._used.add(found)
        return found

    def _renamed(self, node: onnx.NodeProto, rename: Callable[[str], str]) -> onnx.NodeProto:
        found = onnx.NodeProto()
        found.CopyFrom(node)
        if any(map(graphs_of, node.attribute)):
            raise RefusedError("what was compiled holds a node with a graph inside")
        for names in (found.input, found.output):
            names[:] = [rename(name) for name in names]
        if found.name and found.name in self._node_names:
            number = 1
            while f"{node.name}_{number}" in self._node_names:
                number += 1
            found.name = f"{node.name}_{number}"
        self._node_names.add(found.name)
        return found


def _rank(value: onnx.ValueInfoProto) -> int | None:
    tensor = value.type.tensor_type
    return len(tensor.shape.dim) if tensor.HasField("shape") else None


def _typed(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    """A value's type; names of sizes go, which may stand for others here."""
    found = onnx.ValueInfoProto(name=name)
    found.type.CopyFrom(value.type)
    if found.type.WhichOneof("value") != "tensor_type" or not found.type.tensor_type.elem_type:
        raise RefusedError(f"'{value.name}' of what was compiled is of no tensor type")
    for dim in found.type.tensor_type.shape.dim:
        dim.ClearField("dim_param")
    return found


def _constants(graph: onnx.GraphProto) -> set[str]:
    """Values that follow from no input: an optimiser may make constants of them."""
    found = {each.name for each in graph.initializer} - {each.name for each in graph.input}
    for node in graph.node:
        if all(name in found for name in reads_of(node)):
            found.update(node.output)
    return found


def _declared(graph: onnx.GraphProto) -> Iterator[str]:
    return (value.name for value in (*graph.input, *graph.initializer, *graph.output))


def _names(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """Names of values that nodes and graphs within them have."""
    for node in every_node(nodes):
        yield from filter(None, (*node.input, *node.output))
        for attribute in node.attribute:
            for graph in graphs_of(attribute):
                yield from _declared(graph)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain
