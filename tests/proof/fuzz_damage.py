"""Damage to the content of a model that was right: each kind one idea, all by protobuf's means."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor as Field
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from tests.proof.fuzz_seeds import Draw

SIZES = (-(2**63), -(2**31), -7, -2, -1, 0, 1, 2, 3, 64, 2**16, 2**31 - 1, 2**31, 2**40, 2**63 - 1)
NAMES = (
    "",
    "/",
    "a/b/../c",
    "../../etc/passwd",
    "it's",
    '"quoted"',
    "two\nlines",
    "\r\x00\x1b[31m",
    "ΩΦ𝔘́",
    "\u202e",
    "x" * 70_000,
    "{name}",
    "%s%n",
    "[bold]red[/bold] [/]",
    "a=b",
    "input_ids",
    "past_key_values.0.key",
)
KINDS = tuple(v for v in TensorProto.DataType.values())


def fields(draw: Draw) -> ModelProto:
    """Fields of other values: valid protobuf, wrong content, anywhere in the model."""
    model = draw.model()
    for _ in range(draw.choice((1, 1, 2, 4, 12))):
        _change_field(draw, _somewhere(draw, model))
    return model


def _somewhere(draw: Draw, message: Any) -> Any:
    """A message inside of the given one; the deeper, the rarer to stop."""
    while True:
        inner = [
            value
            for field, value in message.ListFields()
            if field.type == Field.TYPE_MESSAGE and (not repeated(field) or value)
        ]
        if not inner or draw.random() < 0.12:
            return message
        chosen = draw.choice(inner)
        message = (
            draw.choice(chosen) if hasattr(chosen, "append") or hasattr(chosen, "add") else chosen
        )


def repeated(field: Any) -> bool:
    found = getattr(field, "is_repeated", None)
    return field.label == Field.LABEL_REPEATED if found is None else bool(found)


def _change_field(draw: Draw, message: Any) -> None:
    present = [field for field, _ in message.ListFields()]
    every = list(message.DESCRIPTOR.fields)
    field = draw.choice(present) if present and draw.random() < 0.8 else draw.choice(every)
    name = field.name
    if repeated(field):
        _change_list(draw, field, getattr(message, name))
    elif draw.random() < 0.25:
        message.ClearField(name)
    elif field.type == Field.TYPE_MESSAGE:
        getattr(message, name).SetInParent()
    else:
        setattr(message, name, _scalar(draw, field))


def _change_list(draw: Draw, field: Any, items: Any) -> None:
    at = draw.randrange(len(items)) if items else 0
    match draw.randrange(4):
        case 0 if items:
            del items[at]
        case 1 if items:
            items.append(items[at])
        case 2 if len(items) > 1:
            other = draw.randrange(len(items))
            first, second = items[at], items[other]
            if field.type == Field.TYPE_MESSAGE:
                kept = type(first).FromString(first.SerializeToString())
                first.CopyFrom(second)
                second.CopyFrom(kept)
            else:
                items[at], items[other] = second, first
        case _ if field.type == Field.TYPE_MESSAGE:
            items.add()
        case _ if items:
            items[at] = _scalar(draw, field)
        case _:
            items.append(_scalar(draw, field))


def _scalar(draw: Draw, field: Any) -> Any:
    match field.type:
        case Field.TYPE_STRING:
            return draw.choice(NAMES)
        case Field.TYPE_BYTES:
            return draw.choice((b"", b"\x00", b"\xff\xfe", b"x" * 70_000, draw.randbytes(16)))
        case Field.TYPE_FLOAT | Field.TYPE_DOUBLE:
            return draw.choice((0.0, -1.0, 1e-30, 1e30, float("inf"), float("nan"), 0.5))
        case Field.TYPE_ENUM:
            return draw.choice(list(field.enum_type.values_by_number))
        case Field.TYPE_INT32:
            return draw.choice([each for each in SIZES if -(2**31) <= each < 2**31] + list(KINDS))
        case Field.TYPE_UINT64:
            return draw.choice([each for each in SIZES if each >= 0])
        case _:
            return draw.choice(SIZES)


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for each in node.attribute:
            if each.type == AttributeProto.GRAPH:
                yield from graphs_of(each.g)


def nodes_of(model: ModelProto) -> list[NodeProto]:
    """Of the graph, of graphs in it, and of functions."""
    found = [node for graph in graphs_of(model.graph) for node in graph.node]
    return found + [node for function in model.functions for node in function.node]


def cycles(draw: Draw) -> ModelProto:
    """A node reads what follows from it, or itself; a subgraph reads its own node."""
    model = draw.model()
    nodes = list(model.graph.node)
    for _ in range(draw.choice((1, 1, 3))):
        at = draw.randrange(len(nodes))
        later = draw.choice(nodes[at : at + draw.choice((1, 2, 30))])
        inner = [n for each in nodes[at].attribute for g in graphs_of(each.g) for n in g.node]
        reader = draw.choice(inner) if inner else nodes[at]
        if reader.input and later.output:
            reader.input[draw.randrange(len(reader.input))] = draw.choice(later.output)
    if draw.random() < 0.3:
        draw.shuffle(nodes)
        model.graph.ClearField("node")
        model.graph.node.extend(nodes)
    return model


def types(draw: Draw) -> ModelProto:
    """Types and shapes missing, wrong, or of odd sizes; for inputs, outputs and what is between."""
    model = draw.model()
    graph = model.graph
    infos = [*graph.input, *graph.output, *graph.value_info]
    for info in draw.few(infos, 4):
        tensor = info.type.tensor_type
        match draw.randrange(8):
            case 0:
                info.ClearField("type")
            case 1:
                tensor.ClearField("shape")
            case 2:
                tensor.elem_type = draw.choice((*KINDS, 99, -1))
            case 3:
                del tensor.shape.dim[:]
            case 4:
                tensor.shape.dim.add().dim_value = draw.choice(SIZES)
            case 5 if tensor.shape.dim:
                draw.choice(tensor.shape.dim).dim_value = draw.choice(SIZES)
            case 6 if tensor.shape.dim:
                draw.choice(tensor.shape.dim).dim_param = draw.choice(NAMES)
            case _:
                for dim in tensor.shape.dim:
                    dim.Clear()
    if draw.random() < 0.2:
        graph.ClearField("value_info")
    return model


def disagreeing(draw: Draw) -> ModelProto:
    """Initializers whose shape, type, name and data do not fit each other."""
    model = draw.model()
    for tensor in draw.few(model.graph.initializer or [TensorProto()]):
        match draw.randrange(9):
            case 0:
                tensor.dims.append(draw.choice(SIZES))
            case 1 if tensor.dims:
                tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice(SIZES)
            case 2:
                del tensor.dims[:]
            case 3:
                tensor.data_type = draw.choice((*KINDS, 99))
            case 4:
                tensor.raw_data = tensor.raw_data[: draw.randrange(len(tensor.raw_data) + 1)]
            case 5:
                tensor.raw_data += draw.randbytes(draw.choice((1, 4, 5000)))
            case 6:
                tensor.ClearField("raw_data")
            case 7:
                tensor.float_data.extend([1.0, 2.0])
            case _:
                dims = sorted(tensor.dims, key=lambda _: draw.random())
                del tensor.dims[:]
                tensor.dims.extend(dims)
    return model


def constants(draw: Draw) -> ModelProto:
    """Axes, shapes and other small integers of odd values: huge, negative, none."""
    model = draw.model()
    tensors = [each for each in model.graph.initializer if _small_integers(each)]
    for node in nodes_of(model):
        tensors += [
            each.t for each in node.attribute if each.HasField("t") and _small_integers(each.t)
        ]
    for tensor in draw.few(tensors):
        values = onnx.numpy_helper.to_array(tensor).copy()
        kind = np.iinfo(values.dtype)
        chosen = np.clip([draw.choice(SIZES) for _ in range(values.size)], kind.min, kind.max)
        keep = np.array([draw.random() < 0.5 for _ in range(values.size)], bool)
        values = np.where(keep, values.ravel(), chosen).astype(values.dtype).reshape(values.shape)
        if draw.random() < 0.15:
            values = np.atleast_1d(values)[: draw.randrange(2)]
        if draw.random() < 0.1:
            values = np.concatenate([values.ravel()] * draw.choice((2, 30)))
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
    return model


def _small_integers(tensor: TensorProto) -> bool:
    kinds = (TensorProto.INT64, TensorProto.INT32)
    return (
        tensor.data_type in kinds and int(np.prod(tensor.dims)) <= 64 and not tensor.external_data
    )


def axes(draw: Draw) -> ModelProto:
    """Integer attributes, axes and permutations among them: negative, repeated, out of range."""
    model = draw.model()
    every = [each for node in nodes_of(model) for each in node.attribute]
    integers = [each for each in every if each.type in (AttributeProto.INT, AttributeProto.INTS)]
    for attribute in draw.few(integers, 4):
        if attribute.type == AttributeProto.INT:
            attribute.i = draw.choice((*SIZES, -3, -4, -5, 4, 5))
        elif draw.random() < 0.3:
            del attribute.ints[draw.randrange(len(attribute.ints) + 1) :]
        else:
            for at in range(len(attribute.ints)):
                if draw.random() < 0.5:
                    attribute.ints[at] = draw.choice((*SIZES, -3, -4, *attribute.ints))
    return model


def attributes(draw: Draw) -> ModelProto:
    """Attributes gone, of another type, twice, unknown, or references to no parameter."""
    model = draw.model()
    nodes = [node for node in nodes_of(model) if node.attribute] or nodes_of(model)
    for node in draw.few(nodes, 4):
        each = draw.choice(node.attribute) if node.attribute else node.attribute.add(name="axis")
        name = each.name
        match draw.randrange(8):
            case 0:
                node.attribute.remove(each)
            case 1 | 2:
                value = draw.choice(_VALUES)
                each.CopyFrom(helper.make_attribute(name, value))
            case 3:
                each.type = draw.choice(AttributeProto.AttributeType.values())
            case 4:
                node.attribute.append(each)
            case 5:
                each.ref_attr_name = draw.choice(("", "nothing", name))
            case 6:
                each.name = draw.choice((*NAMES, "axis", "to", "perm", "value"))
            case _:
                copy = node.attribute.add()
                copy.CopyFrom(helper.make_attribute(draw.choice(("axis", "epsilon", "x")), 7))
    return model


_VALUES = (
    1,
    -1,
    1.5,
    "text",
    b"\xff\xfe",
    [1, 2],
    [1.5],
    ["a", "b"],
    helper.make_tensor("t", TensorProto.FLOAT, [2], [1.0, 2.0]),
    helper.make_tensor("t", TensorProto.STRING, [1], [b"s"]),
    helper.make_tensor("t", TensorProto.INT64, [0], []),
    [helper.make_tensor("t", TensorProto.INT64, [1], [1])] * 2,
    helper.make_graph([], "g", [], []),
    [helper.make_graph([], "g", [], [])] * 2,
    helper.make_tensor_type_proto(1, [2]),
)


def wiring(draw: Draw) -> ModelProto:
    """Inputs and outputs of nodes gone, added, empty, or another value's; ops exchanged."""
    model = draw.model()
    nodes = nodes_of(model)
    names = [name for node in model.graph.node for name in (*node.input, *node.output)]
    for node in draw.few(nodes, 4):
        side = node.input if draw.random() < 0.7 else node.output
        match draw.randrange(7):
            case 0 if side:
                del side[draw.randrange(len(side)) :]
            case 1:
                side.append(draw.choice((*names[-40:], "", "new")))
            case 2 if side:
                side[draw.randrange(len(side))] = ""
            case 3 | 4 if node.input:
                node.input[draw.randrange(len(node.input))] = draw.choice(names)
            case 5:
                node.op_type = draw.choice(nodes).op_type
            case _:
                if len(node.input) > 1:
                    swapped = list(node.input)[::-1]
                    del node.input[:]
                    node.input.extend(swapped)
    return model
