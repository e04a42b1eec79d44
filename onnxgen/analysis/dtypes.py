"""Element types of a node's outputs, read off the operator's schema."""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir

from onnxgen.analysis import contrib_shapes
from onnxgen.analysis.graph import attribute

_TYPE_ATTRIBUTES = {"Cast": "to", "ConstantOfShape": "value", "Constant": "value"}
_BY_NAME = {f"tensor({dtype.name.lower()})": dtype for dtype in ir.DataType} | {
    "tensor(float)": ir.DataType.FLOAT,
    "tensor(double)": ir.DataType.DOUBLE,
}


def output_dtypes(node: ir.Node, opset: int) -> list[ir.DataType | None]:
    """The element type of each output; None where neither schema nor inputs tell it."""
    if node.op_type in ("Cast", "EyeLike", "RandomNormalLike") and attribute(node, "to"):
        return [ir.DataType(attribute(node, "to"))]
    if node.op_type == "ConstantOfShape":
        tensor = attribute(node, "value")
        return [ir.DataType.FLOAT if tensor is None else tensor.dtype]
    if node.op_type in ("DequantizeLinear", "QuantizeLinear") and node.domain in ("", "ai.onnx"):
        return [_quantized(node)]
    schema = _schema(node.op_type, node.domain, opset)
    if schema is None:  # of a domain onnx does not know
        return contrib_shapes.output_dtypes(node)
    input_types, output_types = schema
    bound: dict[str, ir.DataType] = {}
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype is not None and input_types:
            bound.setdefault(input_types[min(index, len(input_types) - 1)], value.dtype)
    return [
        _BY_NAME.get(name) or bound.get(name) or output.dtype
        for output, name in zip(
            node.outputs,
            (output_types[min(i, len(output_types) - 1)] for i in range(len(node.outputs))),
            strict=True,
        )
    ]


def _quantized(node: ir.Node) -> ir.DataType | None:
    """What an attribute says; else the scale's type back, and the zero point's type there."""
    given = attribute(node, "output_dtype", 0)
    if given:
        return ir.DataType(given)
    if node.op_type == "DequantizeLinear":
        return None if node.inputs[1] is None else node.inputs[1].dtype
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    return ir.DataType.UINT8 if zero is None else zero.dtype


@functools.cache
def _schema(op_type: str, domain: str, opset: int) -> tuple[list[str], list[str]] | None:
    """Type names (or the schema's type variables) of inputs and outputs."""
    try:
        schema = onnx.defs.get_schema(op_type, opset, "" if domain == "ai.onnx" else domain)
    except onnx.defs.SchemaError:
        return None
    # A type variable that allows one type is that type.
    only = {
        each.type_param_str: each.allowed_type_strs[0]
        for each in schema.type_constraints
        if len(each.allowed_type_strs) == 1
    }
    return (
        [only.get(each.type_str, each.type_str) for each in schema.inputs],
        [only.get(each.type_str, each.type_str) for each in schema.outputs],
    )
