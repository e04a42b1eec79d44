"""Which values are never negative, whatever the model is fed: told from the nodes that make them."""

from __future__ import annotations

import onnx_ir as ir

from onnxgen.analysis.graph import constant, given, names, optional, producer, scalar

DEPTH = 64
"""Nodes above each other that are looked at."""


def nonnegative(value: ir.Value | None, depth: int = DEPTH) -> bool:
    """Whether no element is below zero; NaN, which only NaN or infinity make of them, aside."""
    if value is None or depth == 0:
        return False
    if value.dtype in _UNSIGNED:
        return True
    elements = constant(value)
    if elements is not None:
        return bool((elements >= 0).all())
    node = producer(value)
    if node is None:
        return False

    def all_of(inputs: range) -> bool:
        return all(
            nonnegative(node.inputs[at], depth - 1) for at in inputs if at < len(node.inputs)
        )

    kind, count = node.op_type, len(node.inputs)
    if kind in _ALWAYS:
        return True
    if kind in _LIKE_FIRST:
        return value is node.outputs[0] and all_of(range(1))
    if kind == "Split":
        return all_of(range(1))
    if kind == "Mul" and node.inputs[0] is node.inputs[1]:
        return True
    if kind in _LIKE_ALL:
        return all_of(range(count))
    if kind == "Max":
        return any(nonnegative(each, depth - 1) for each in node.inputs)
    if kind in ("Where", "ScatterElements", "ScatterND"):
        return all_of(range(1, 3)) if kind == "Where" else all_of(range(1)) and all_of(range(2, 3))
    if kind == "Pow":
        exponent = scalar(given(node, 1))
        return all_of(range(1)) or (exponent is not None and exponent % 2 == 0)
    if kind == "Clip":
        low, high = scalar(optional(node, 1)), optional(node, 2)
        bounded = high is None or nonnegative(high, depth - 1)
        return bounded and ((low is not None and low >= 0) or all_of(range(1)))
    return False


_UNSIGNED = frozenset(
    {
        ir.DataType.BOOL,
        ir.DataType.UINT8,
        ir.DataType.UINT16,
        ir.DataType.UINT32,
        ir.DataType.UINT64,
    }
)
_ALWAYS = names(
    "Softmax Sigmoid Relu Exp Abs Sqrt Softplus HardSigmoid ReduceL1 ReduceL2 ReduceSumSquare"
)
_LIKE_FIRST = names(
    """
    TopK Gather GatherElements GatherND Reshape Squeeze Unsqueeze Flatten Transpose Expand Tile
    Slice Identity Cast CastLike Dropout ReduceSum ReduceMax ReduceMin ReduceMean ReduceProd
    Reciprocal Floor Ceil Round CumSum
    """
)
_LIKE_ALL = names("Add Mul Div Min Sum Mean Concat")
