"""Packed codes as numbers, in standard operators."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from onnxgen.functions.making import ints


def emit_numbers(
    op: OpBuilder, codes: ir.Value, scales: ir.Value, zeros: ir.Value | None, bits: int
) -> ir.Value:
    """(codes - zeros) * scales, [N, K] of the scales' type.

    Args:
        codes: uint8 [N, K*bits/8], the first of a byte's codes in its lowest bits.
        scales: [N, blocks], each for K/blocks codes of a row.
        zeros: uint8 [N, blocks*bits/8], rounded up; None for 2^(bits-1).
        bits: 4 or 8.
    """
    rows, blocks = (op.Shape(scales, start=at, end=at + 1) for at in (0, 1))
    flat = op.Reshape(scales, ints(op, -1))
    if zeros is None:
        middle = op.Constant(value=ir.tensor(np.array(2 ** (bits - 1), np.uint8)))
        points = op.Expand(middle, op.Shape(flat))
    else:
        each = op.Slice(_unpacked(op, zeros, bits), ints(op, 0), blocks, ints(op, 1))
        points = op.Reshape(each, ints(op, -1))
    # [N*blocks, K/blocks]: what blocks share is an axis of its own, which every opset has.
    together = op.Reshape(
        _unpacked(op, codes, bits), op.Concat(op.Shape(flat), ints(op, -1), axis=0)
    )
    numbers = op.DequantizeLinear(together, flat, points, axis=0)
    return op.Reshape(numbers, op.Concat(rows, ints(op, -1), axis=0))


def _unpacked(op: OpBuilder, codes: ir.Value, bits: int) -> ir.Value:
    """uint8 [N, M] of [N, M*bits/8]."""
    if bits == 8:
        return codes
    low = op.BitwiseAnd(codes, op.Constant(value=ir.tensor(np.array(15, np.uint8))))
    shift = op.Constant(value=ir.tensor(np.array(4, np.uint8)))
    high = op.BitShift(codes, shift, direction="RIGHT")
    pair = op.Concat(op.Unsqueeze(low, ints(op, 2)), op.Unsqueeze(high, ints(op, 2)), axis=2)
    return op.Reshape(pair, ints(op, 0, -1))
