"""What RMSNorm and LayerNorm share: the weight, the bias, and the casts around them."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import other_input, producer
from onnxgen.patterns.building import Builder

NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

MOST_ONES = 1 << 20  # what a norm is over; wider than any model


def outside_casts(x: ir.Value, y: ir.Value) -> tuple[ir.Value, ir.Value, ir.DataType]:
    """Input and output outside the casts to a wider type and back, and the type inside."""
    stash = x.dtype or ir.DataType.FLOAT
    cast, users = producer(x, "Cast"), [use.node for use in y.uses()]
    narrow = None if cast is None else cast.inputs[0]
    if narrow is None or narrow.dtype not in NARROW or len(users) != 1:
        return x, y, stash
    back = users[0]
    if back.op_type == "Cast" and back.outputs[0].dtype == narrow.dtype:
        return narrow, back.outputs[0], stash
    return x, y, stash


def narrowed(y: ir.Value) -> ir.Value | None:
    """The cast to a narrower type that alone reads a normalized value."""
    users = [use.node for use in y.uses()]
    if len(users) != 1 or users[0].op_type != "Cast" or y.is_graph_output():
        return None
    cast = users[0].outputs[0]
    return cast if cast.dtype in NARROW and y.dtype not in NARROW else None


def norm_weight(
    facts: Facts, y: ir.Value, x: ir.Value, axis: int
) -> tuple[ir.Value | None, ir.Value]:
    """The weight that the normalized value is multiplied by, and the product; else None and y."""
    return _operand(facts, y, x, axis, "Mul")


def norm_bias(
    facts: Facts, y: ir.Value, x: ir.Value, axis: int
) -> tuple[ir.Value | None, ir.Value]:
    """The bias that is added to the normalized value, and the sum; else None and y."""
    return _operand(facts, y, x, axis, "Add")


def _operand(
    facts: Facts, y: ir.Value, x: ir.Value, axis: int, op_type: str
) -> tuple[ir.Value | None, ir.Value]:
    users = [use.node for use in y.uses()]
    if len(users) != 1 or users[0].op_type != op_type or y.is_graph_output():
        return None, y
    operand = other_input(users[0], y)
    # Exactly the normalized axes: anything else is another product that follows the norm.
    return (operand, users[0].outputs[0]) if fits(facts, operand, x, axis) else (None, y)


def fits(facts: Facts, operand: ir.Value | None, x: ir.Value, axis: int) -> bool:
    """Whether a value is a weight of exactly the normalized axes."""
    whole = facts.shapes.of(x)
    return (
        operand is not None
        and whole is not None
        and not facts.is_activation(operand)
        and facts.shapes.same_shape(facts.shapes.of(operand), whole[axis:])
    )


def ones(facts: Facts, builder: Builder, x: ir.Value, axis: int) -> ir.Value | None:
    """A weight of ones for a norm without one; None where its size is not known, or none has it."""
    shape = facts.shapes.of(x)
    if shape is None or x.dtype is None or not all(isinstance(s, int) for s in shape[axis:]):
        return None
    sizes = [int(size) for size in shape[axis:] if isinstance(size, int)]
    if math.prod(sizes) > MOST_ONES:
        return None
    return builder.constant(np.ones(sizes, dtype=x.dtype.numpy()), "onnxgen/ones")
