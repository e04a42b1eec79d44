"""A region of a model as a model of its own, in canonical names: regions that are alike are equal.

    model = cut_out(proto, region)          # inputs i0 …, weights w0 … as further inputs
    part = part_of(opened, region)          # that, and where the contents of the weights are

What is dropped is what changes nothing that is computed: names of nodes and values, documentation,
metadata, declared types within. What stays is the order of nodes, which is topological.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx
from onnx import AttributeProto as A

from onnxgen.backends.interface import Part
from onnxgen.contexts.types import as_proto, elements
from onnxgen.contexts.values import Region
from onnxgen.contexts.weights import Weights
from onnxgen.element_types import bits_of
from onnxgen.errors import RefusedError
from onnxgen.reading import Opened

Key = tuple[str, str, str]
_GRAPH, _GRAPHS = A.GRAPH, A.GRAPHS
# Where an attribute holds its value: one, or several.
_ONE = {
    A.FLOAT: "f",
    A.INT: "i",
    A.STRING: "s",
    A.TENSOR: "t",
    A.GRAPH: "g",
    A.SPARSE_TENSOR: "sparse_tensor",
    A.TYPE_PROTO: "tp",
}
_SEVERAL = {
    A.FLOATS: "floats",
    A.INTS: "ints",
    A.STRINGS: "strings",
    A.TENSORS: "tensors",
    A.GRAPHS: "graphs",
    A.SPARSE_TENSORS: "sparse_tensors",
    A.TYPE_PROTOS: "type_protos",
}


def part_of(opened: Opened, region: Region) -> Part:
    """A region to be compiled. Its model's weights are inputs; their contents stay on disk."""
    weights = Weights(opened)
    contents = tuple(weights[name] for name in region.weights)
    for name, weight in zip(region.weights, contents, strict=True):
        if weight.dtype == onnx.TensorProto.STRING:
            raise RefusedError(f"the weight '{name}' holds texts, which backends are not given")
    return Part(cut_out(opened.proto, region), len(region.inputs), contents)


def cut_out(proto: onnx.ModelProto, region: Region) -> onnx.ModelProto:
    """The region as a model in canonical names; see docs/contexts.md, "The canonical form".

    Raises:
        RefusedError: it holds what the canonical form has no words for, or an attribute's tensor
            lies in another file.
        KeyError: something is read before it is made.
    """
    model = onnx.ModelProto(ir_version=max(proto.ir_version, 10))
    names = _Names()
    kinds = {each.name: (each.data_type, each.dims) for each in proto.graph.initializer}
    for index, (name, kind) in enumerate(zip(region.inputs, region.input_types, strict=True)):
        model.graph.input.append(as_proto(names.give(name, f"i{index}"), kind))
    for index, name in enumerate(region.weights):
        kind = elements(*kinds[name])
        model.graph.input.append(as_proto(names.give(name, f"w{index}"), kind))
    nodes = [proto.graph.node[position] for position in region.nodes]
    model.graph.node.extend(names.node(node) for node in nodes)
    for name, kind in zip(region.outputs, region.output_types, strict=True):
        model.graph.output.append(as_proto(names[name], kind))
    model.graph.name = "region"
    functions = called(proto, nodes)
    model.functions.extend(_canonical_function(each) for each in functions)
    keys = [key_of(each) for each in proto.functions]
    twice = next((key_of(each) for each in functions if keys.count(key_of(each)) > 1), None)
    if twice is not None:
        raise RefusedError(f"the model has two functions {'::'.join(twice[:2])}")
    used = {node.domain for node in every_node(nodes)}
    used |= {opset.domain for each in functions for opset in each.opset_import}
    used = {standard(each) for each in (*used, *(each.domain for each in functions))}
    known = [each for each in proto.opset_import if standard(each.domain) in used]
    model.opset_import.extend(_opsets(known))
    return model


def standard(domain: str) -> str:
    """A domain under its one name: that of the standard has two."""
    return "" if domain == "ai.onnx" else domain


def every_node(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes and those of the graphs within them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in graphs_of(attribute):
                yield from every_node(graph.node)


def graphs_of(attribute: onnx.AttributeProto) -> Sequence[onnx.GraphProto]:
    """The graphs that an attribute holds."""
    if attribute.type == _GRAPH:
        return [attribute.g]
    return attribute.graphs if attribute.type == _GRAPHS else []


def reads_of(node: onnx.NodeProto) -> list[str]:
    """Names that a node reads, those that graphs within it take from outside too, each once."""
    found = dict.fromkeys(name for name in node.input if name)
    for attribute in node.attribute:
        for graph in graphs_of(attribute):
            own = {each.name for each in graph.input} | {each.name for each in graph.initializer}
            inner: dict[str, None] = {}
            for each in graph.node:
                inner |= dict.fromkeys(name for name in reads_of(each) if name not in own)
                own |= set(each.output)
            inner |= dict.fromkeys(each.name for each in graph.output if each.name not in own)
            found |= inner
    return list(found)


def called(proto: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> list[onnx.FunctionProto]:
    """The model's functions that nodes call, and those that these call, sorted."""
    functions = {key_of(each): each for each in proto.functions}
    found: dict[Key, onnx.FunctionProto] = {}
    pending = [*every_node(nodes)]
    while pending:
        node = pending.pop()
        key = (standard(node.domain), node.op_type, node.overload)
        if key in functions and key not in found:
            found[key] = functions[key]
            pending += every_node(functions[key].node)
    return [found[key] for key in sorted(found)]


def key_of(function: onnx.FunctionProto) -> Key:
    """What a node names to call it."""
    return standard(function.domain), function.name, function.overload


def _opsets(opsets: Iterable[onnx.OperatorSetIdProto]) -> list[onnx.OperatorSetIdProto]:
    """Sorted, each once."""
    known = sorted({(standard(each.domain), each.version) for each in opsets})
    return [onnx.OperatorSetIdProto(domain=domain, version=each) for domain, each in known]


def _canonical_function(function: onnx.FunctionProto) -> onnx.FunctionProto:
    names = _Names()
    defaults = sorted(function.attribute_proto, key=lambda each: each.name)
    found = onnx.FunctionProto(
        name=function.name,
        domain=standard(function.domain),
        overload=function.overload,
        attribute=sorted(function.attribute),
        attribute_proto=[_attribute(each, names) for each in defaults],
    )
    found.opset_import.extend(_opsets(function.opset_import))
    found.input.extend(names.give(name, f"i{index}") for index, name in enumerate(function.input))
    found.node.extend(names.node(node) for node in function.node)
    found.output.extend(names[name] for name in function.output)
    return found


class _Names:
    """Canonical names of values: `v0`, `v1`, … in the order in which they are made."""

    def __init__(
        self, known: Mapping[str, str] | None = None, made: list[int] | None = None
    ) -> None:
        self._known = dict(known or {})
        self._made = made if made is not None else [0]

    def __getitem__(self, name: str) -> str:
        return self._known[name] if name else ""

    def give(self, name: str, canonical: str = "") -> str:
        if not name:
            return ""
        if not canonical:
            canonical = f"v{self._made[0]}"
            self._made[0] += 1
        self._known[name] = canonical
        return canonical

    def node(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """A node without what changes nothing; its attributes sorted by name."""
        domain = standard(node.domain)
        found = onnx.NodeProto(op_type=node.op_type, domain=domain, overload=node.overload)
        found.input.extend(self[name] for name in node.input)
        attributes = sorted(node.attribute, key=lambda each: each.name)
        found.attribute.extend(_attribute(each, self) for each in attributes)
        found.output.extend(self.give(name) for name in node.output)
        return found

    def graph(self, graph: onnx.GraphProto) -> onnx.GraphProto:
        """A graph within a node, which sees the values around it."""
        if graph.sparse_initializer:
            raise RefusedError("a graph within a node has sparse initializers")
        inner = _Names(self._known, self._made)
        found = onnx.GraphProto(name="g")
        for value in graph.input:
            found.input.append(_bare(value, inner.give(value.name)))
        fed = {each.name for each in graph.input}  # an initializer of that name is its default
        for tensor in graph.initializer:
            weight = _bare_tensor(tensor)
            weight.name = inner[tensor.name] if tensor.name in fed else inner.give(tensor.name)
            found.initializer.append(weight)
        found.node.extend(inner.node(node) for node in graph.node)
        for value in graph.output:
            found.output.append(_bare(value, inner[value.name]))
        return found


def _attribute(attribute: onnx.AttributeProto, names: _Names) -> onnx.AttributeProto:
    """An attribute with its value, and with nothing that its type does not name."""
    kind = attribute.type
    found = A(name=attribute.name, type=kind, ref_attr_name=attribute.ref_attr_name)
    if attribute.ref_attr_name:
        return found
    if kind in _SEVERAL:
        values = getattr(attribute, _SEVERAL[kind])
        getattr(found, _SEVERAL[kind]).extend(_bare_value(each, names) for each in values)
    elif kind in _ONE:
        value = _bare_value(getattr(attribute, _ONE[kind]), names)
        if kind in (A.FLOAT, A.INT, A.STRING):
            setattr(found, _ONE[kind], value)
        else:
            getattr(found, _ONE[kind]).CopyFrom(value)
    else:
        raise RefusedError(f"the attribute '{attribute.name}' has no type that is known")
    return found


def _bare_value(value: Any, names: _Names) -> Any:
    """One value of an attribute."""
    if isinstance(value, onnx.GraphProto):
        return names.graph(value)
    if isinstance(value, onnx.TensorProto):
        return _bare_tensor(value)
    if isinstance(value, onnx.SparseTensorProto):
        parts = (_bare_tensor(each) for each in (value.values, value.indices))
        values, indices = parts
        return onnx.SparseTensorProto(values=values, indices=indices, dims=value.dims)
    return value


def _bare(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    """A value of a graph within: its element type stays, the names of its sizes go."""
    found = onnx.ValueInfoProto(name=name)
    if value.HasField("type"):
        found.type.CopyFrom(value.type)
        if value.type.HasField("tensor_type"):
            for dim in found.type.tensor_type.shape.dim:
                dim.ClearField("dim_param")
    return found


def _bare_tensor(tensor: onnx.TensorProto) -> onnx.TensorProto:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise RefusedError(
            f"the tensor '{tensor.name}' of an attribute, or of a graph within a node, lies in "
            "another file, which backends are not given"
        )
    if tensor.HasField("segment") or bits_of(tensor.data_type) is None:
        raise RefusedError(f"the tensor '{tensor.name}' is in segments, or of a type not known")
    found = onnx.TensorProto()
    found.CopyFrom(tensor)
    for field in ("name", "doc_string", "metadata_props"):
        found.ClearField(field)
    return found
