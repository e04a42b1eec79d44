"""The float32 twin of a bfloat16 model: what ONNX Runtime can run of it on CPU.

    if holds_bfloat16(model):
        with tempfile.TemporaryDirectory() as folder:
            source = float32_twin(path, Path(folder))       # a path in it, or bytes

ONNX Runtime's CPU kernels know no bfloat16. In a twin every bfloat16 is float32: weights,
constants, the types that casts go to, inputs and outputs. It computes the same function without
rounding in between, so two models that are equal have equal twins, up to float32's noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from onnxgen.model_io import read_model

EMBEDDED = 1 << 28
"""Twins with more bytes of weights go to a file."""

# Attributes that hold an element type as a number.
_TYPES = frozenset(
    ["to", "dtype", "stash_type", "softmax_precision", "output_dtype", "output_datatype"]
)
_BFLOAT16, _FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def holds_bfloat16(model: ir.Model) -> bool:
    """Whether any value of a model is bfloat16, in subgraphs and functions too."""
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    return any(
        value.dtype == _BFLOAT16 or (value.const_value is not None and _is_narrow(value))
        for graph in graphs
        for value in _values(graph)
    ) or any(
        _widened(attribute) is not None
        for graph in graphs
        for node in graph.all_nodes()
        for attribute in node.attributes.values()
    )


def float32_twin(source: bytes | Path, folder: Path) -> bytes | Path:
    """Make a model's twin; weights are widened one at a time as they are written.

    Args:
        source: a serialized model, or a path.
        folder: where a twin with large weights is written, with external data.

    Raises:
        FileError: the path cannot be read as a model.
    """
    if isinstance(source, Path):
        model = read_model(source)
    else:
        model = ir.from_proto(onnx.ModelProto.FromString(source))
    widen(model)
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value]
    if sum(weight.nbytes for weight in weights) <= EMBEDDED:
        data: bytes = ir.to_proto(model).SerializeToString()
        return data
    path = folder / "twin.onnx"
    ir.save(model, path, external_data="twin.data")
    return path


def widen(model: ir.Model) -> None:
    """Make every bfloat16 of a model float32, in place.

    Functions are inlined: an attribute of a call may be a type inside.
    """
    if model.functions:
        InlinePass()(model)
        model.functions.clear()
    for value in _values(model.graph):
        if value.type is not None:
            value.type = _wide_type(value.type)
        if value.const_value is not None and _is_narrow(value):
            value.const_value = _wide_tensor(value.const_value)
    for node in model.graph.all_nodes():
        for attribute in list(node.attributes.values()):
            wide = _widened(attribute)
            if wide is not None:
                node.attributes[attribute.name] = wide


def widened(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """The array, or what it holds as float32 where it is bfloat16."""
    return array.astype(np.float32) if array.dtype == _BFLOAT16.numpy() else array


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


def _is_narrow(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.dtype == _BFLOAT16


def _wide_type(of: ir.TypeProtocol) -> ir.TypeProtocol:
    if isinstance(of, ir.TensorType) and of.dtype == _BFLOAT16:
        return ir.TensorType(_FLOAT)
    if isinstance(of, ir.SequenceType):
        return ir.SequenceType(_wide_type(of.elem_type))
    if isinstance(of, ir.OptionalType):
        return ir.OptionalType(_wide_type(of.elem_type))
    return of


def _wide_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor in float32, read and widened each time it is asked for."""
    return ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy().astype(np.float32)),
        dtype=_FLOAT,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
    )


def _widened(attribute: ir.Attr) -> ir.Attr | None:
    """The attribute in float32; None where it holds no bfloat16."""
    kind, name = attribute.type, attribute.name
    if attribute.is_ref():
        return None
    if kind == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _BFLOAT16:
        return ir.AttrTensor(name, _wide_tensor(attribute.as_tensor()))
    if kind == ir.AttributeType.TENSORS:
        tensors = attribute.as_tensors()
        if any(each.dtype == _BFLOAT16 for each in tensors):
            wide = [_wide_tensor(t) if t.dtype == _BFLOAT16 else t for t in tensors]
            return ir.AttrTensors(name, wide)
    if kind == ir.AttributeType.INT and name in _TYPES and attribute.as_int() == _BFLOAT16:
        return ir.AttrInt64(name, int(_FLOAT))
    if kind == ir.AttributeType.TYPE_PROTO:
        of = attribute.value
        wide_type = _wide_type(of.type)
        if wide_type != of.type:
            return ir.Attr(name, kind, ir.TypeAndShape(wide_type, of.shape))
    return None
