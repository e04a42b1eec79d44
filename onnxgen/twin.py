"""The float32 twin of a model of a narrower type: the same function, without rounding in between.

    types = twin_types(model)
    if types:
        with tempfile.TemporaryDirectory() as folder:
            source = float32_twin(path, Path(folder), types)       # a path in it, or bytes

In a twin every number of these types is float32: weights, constants, the types that casts go to,
inputs and outputs. Two models that are equal have equal twins, up to float32's noise. Twins are run
of bfloat16, which ONNX Runtime's CPU kernels do not know; and of float16 where a model chooses
experts: of two that a router finds alike, rounding would choose one here and the other there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from onnxgen.model_io import read_model
from onnxgen.tensor_slots import tensor_slots

EMBEDDED = 1 << 28
"""Twins with more bytes of weights go to a file."""

# Attributes that hold an element type as a number.
_TYPES = frozenset(
    ["to", "dtype", "stash_type", "softmax_precision", "output_dtype", "output_datatype"]
)
_FLOAT = ir.DataType.FLOAT
Types: TypeAlias = frozenset[ir.DataType]
BFLOAT16: Types = frozenset({ir.DataType.BFLOAT16})
FLOAT16: Types = frozenset({ir.DataType.FLOAT16})
_CHOOSING = frozenset({"TopK", "ArgMax", "MoE", "QMoE"})


def unrunnable_types(model: ir.Model) -> Types:
    """bfloat16, where a model holds it: ONNX Runtime's CPU has no kernels for it."""
    return BFLOAT16 if holds(model, BFLOAT16) else frozenset()


def twin_types(model: ir.Model, rewritten: ir.Model | None = None) -> Types:
    """The types that a model is compared without, as a whole; none where it is compared as it is.

    Args:
        rewritten: what it is compared with. Roundings that only this one does count.
    """
    types = unrunnable_types(model)
    chooses = any(each is not None and has_choices(each) for each in (model, rewritten))
    return types | FLOAT16 if chooses and holds(model, FLOAT16) else types


def has_choices(model: ir.Model) -> bool:
    """Whether a small difference may change which experts, or tokens, a model goes on with."""
    return any(node.op_type in _CHOOSING for node in model.graph.all_nodes())


def holds(model: ir.Model, types: Types) -> bool:
    """Whether any value of a model is of these types, in subgraphs and functions too."""
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    return any(
        value.dtype in types or _is_narrow(value, types)
        for graph in graphs
        for value in _values(graph)
    ) or any(
        _widened(attribute, types) is not None
        for graph in graphs
        for node in graph.all_nodes()
        for attribute in node.attributes.values()
    )


def float32_twin(
    source: bytes | Path, folder: Path, types: Types, base: Path | None = None
) -> bytes | Path:
    """Make a model's twin; weights are widened one at a time as they are written.

    Args:
        source: a serialized model, or a path.
        types: what is widened.
        folder: where a twin with large weights is written, with external data.
        base: where the external data of a serialized model is; a twin in bytes refers to it too.

    Raises:
        FileError: the path cannot be read as a model.
    """
    if isinstance(source, Path):
        model = read_model(source)
    else:
        model = ir.from_proto(onnx.ModelProto.FromString(source))
        for slot in tensor_slots(model):
            if isinstance(slot.tensor, ir.ExternalTensor) and base is not None:
                slot.tensor.base_dir = str(base)
    widen(model, types)
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value]
    if sum(weight.nbytes for weight in weights) <= EMBEDDED:
        data: bytes = ir.to_proto(model).SerializeToString()
        return data
    path = folder / "twin.onnx"
    ir.save(model, path, external_data="twin.data")
    return path


def widen(model: ir.Model, types: Types) -> None:
    """Make everything of these types in a model float32, in place.

    Functions are inlined: an attribute of a call may be a type inside.
    """
    if model.functions:
        InlinePass()(model)
        model.functions.clear()
    for value in _values(model.graph):
        if value.type is not None:
            value.type = _wide_type(value.type, types)
        if value.const_value is not None and _is_narrow(value, types):
            value.const_value = _wide_tensor(value.const_value)
    for node in model.graph.all_nodes():
        for attribute in list(node.attributes.values()):
            wide = _widened(attribute, types)
            if wide is not None:
                node.attributes[attribute.name] = wide


def widened(array: npt.NDArray[np.generic], types: Types = BFLOAT16) -> npt.NDArray[np.generic]:
    """The array, or what it holds as float32 where it is of one of these types."""
    narrow = any(array.dtype == each.numpy() for each in types)
    return array.astype(np.float32) if narrow else array


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value of a graph and of its subgraphs."""
    graphs = [graph, *(inner for node in graph.all_nodes() for inner in _bodies(node))]
    for each in graphs:
        yield from each.inputs
        yield from each.initializers.values()
        for node in each:
            yield from node.outputs


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _is_narrow(value: ir.Value, types: Types) -> bool:
    return value.const_value is not None and value.const_value.dtype in types


def _wide_type(of: ir.TypeProtocol, types: Types) -> ir.TypeProtocol:
    if isinstance(of, ir.TensorType) and of.dtype in types:
        return ir.TensorType(_FLOAT)
    if isinstance(of, ir.SequenceType):
        return ir.SequenceType(_wide_type(of.elem_type, types))
    if isinstance(of, ir.OptionalType):
        return ir.OptionalType(_wide_type(of.elem_type, types))
    return of


def _wide_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor in float32, read and widened each time it is asked for."""
    return ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy().astype(np.float32)),
        dtype=_FLOAT,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
    )


def _widened(attribute: ir.Attr, types: Types) -> ir.Attr | None:
    """The attribute in float32; None where it holds nothing of these types."""
    kind, name = attribute.type, attribute.name
    if attribute.is_ref():
        return None
    if kind == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in types:
        return ir.AttrTensor(name, _wide_tensor(attribute.as_tensor()))
    if kind == ir.AttributeType.TENSORS:
        tensors = attribute.as_tensors()
        if any(each.dtype in types for each in tensors):
            wide = [_wide_tensor(t) if t.dtype in types else t for t in tensors]
            return ir.AttrTensors(name, wide)
    if kind == ir.AttributeType.INT and name in _TYPES and attribute.as_int() in types:
        return ir.AttrInt64(name, int(_FLOAT))
    if kind == ir.AttributeType.TYPE_PROTO:
        of = attribute.value
        wide_type = _wide_type(of.type, types)
        if wide_type != of.type:
            return ir.Attr(name, kind, ir.TypeAndShape(wide_type, of.shape))
    return None
