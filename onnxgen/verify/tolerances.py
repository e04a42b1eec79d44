"""How far apart two models may be: by the type that the original computes in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from onnxgen.runtime import Runtime

TOLERANCES: Mapping[ir.DataType, float] = {
    ir.DataType.DOUBLE: 1e-4,
    ir.DataType.FLOAT: 1e-4,
    ir.DataType.FLOAT16: 1e-2,
    ir.DataType.BFLOAT16: 1e-4,  # run as float32 twins
}
"""Largest allowed difference, over the original output's standard deviation."""

INNER = 10
"""Tolerances that a value inside may be apart: products of small numbers carry more noise."""


def tolerance(model: ir.Model, runtime: Runtime) -> float:
    """The largest allowed difference for a model, as the runtime runs it."""
    kind = compute_type(model)
    return TOLERANCES[ir.DataType.BFLOAT16 if kind in runtime.twins else kind]


def names_of(types: Iterable[ir.DataType]) -> tuple[str, ...]:
    """Types in words, for the report."""
    return tuple(sorted(each.name.lower() for each in types))


def compute_type(model: ir.Model) -> ir.DataType:
    """The floating point type that most weights have; where there are none, the inputs'."""
    counts: dict[ir.DataType, int] = {}

    def count(tensor: ir.TensorProtocol | None) -> None:
        if tensor is not None and tensor.dtype in TOLERANCES:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + int(tensor.size)

    for value in model.graph.initializers.values():
        count(value.const_value)
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for node in (node for graph in graphs for node in graph.all_nodes()):
        attribute = node.attributes.get("value") if node.op_type == "Constant" else None
        if attribute is not None and attribute.type == ir.AttributeType.TENSOR:
            count(attribute.as_tensor())
    for value in model.graph.inputs:
        if not counts and value.dtype is not None and value.dtype in TOLERANCES:
            return value.dtype
    return max(counts, key=lambda dtype: counts[dtype], default=ir.DataType.FLOAT)
