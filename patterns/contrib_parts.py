"""What the rules for ONNX Runtime's attentions share: heads split and merged, masks joined.

Shapes: B batch, S new tokens, T total, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.patterns.building import Builder


def scalar(builder: Builder, number: int) -> ir.Value:
    """A constant int64 of no axes."""
    return builder.constant(np.array(number, dtype=np.int64))


def number_like(builder: Builder, number: float, dtype: ir.DataType) -> ir.Value:
    """A constant of no axes and a float type."""
    return builder.constant(np.array(number).astype(dtype.numpy()))


def split_heads(facts: Facts, builder: Builder, value: ir.Value, heads: int) -> ir.Value | None:
    """[B, S, H*D] as [B, H, S, D]; a tensor of four axes as it is. None where D is unknown."""
    shape = facts.shapes.of(value)
    if shape is not None and len(shape) == 4:
        return value
    if shape is None or len(shape) != 3 or not isinstance(shape[2], int) or shape[2] % heads:
        return None
    target = builder.ints(0, 0, heads, shape[2] // heads)
    return builder.op("Transpose", [builder.op("Reshape", [value, target])], {"perm": [0, 2, 1, 3]})


def merged_heads(facts: Facts, builder: Builder, value: ir.Value) -> ir.Value | None:
    """[B, H, S, D] as [B, S, H*D]; None where a size is unknown."""
    shape = facts.shapes.of(value)
    if shape is None or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        return None
    rows = builder.op("Transpose", [value], {"perm": [0, 2, 1, 3]})
    return builder.op("Reshape", [rows, builder.ints(0, 0, shape[1] * shape[3])])


def split_last(builder: Builder, value: ir.Value, sizes: Sequence[int]) -> list[ir.Value]:
    """The parts of a tensor's last axis."""
    return list(builder.ops("Split", [value, builder.ints(*sizes)], len(sizes), {"axis": -1}))


def steps(builder: Builder, length: ir.Value) -> ir.Value:
    """int64 [N]: 0, 1, 2 ... for a length N given as int64 [1]."""
    stop = builder.op("Squeeze", [length])
    return builder.op("Range", [scalar(builder, 0), stop, scalar(builder, 1)])
