"""Weights that a quantiser packed: (code - zero point) * scale, by blocks of the contracted axis.

    MatMulNBits        codes [N, K/block, block*bits/8], scales [N * K/block],
                       zero points [N * ceil(K/block*bits/8)], each row in whole bytes
    DequantizeLinear   codes [N, K] or [K, N], scales [N] of whole rows, or by blocks [N, K/block]
                       or [K/block, N]; [E, ...] where experts are stacked; zero points alike

The first code is in a byte's lowest bits. Without zero points they are 2^(bits-1) for MatMulNBits
and 0 for DequantizeLinear, whose codes may be signed.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import CONTRIB, attribute, given, optional, producer

_WHOLE = (0, 1)  # accuracy_level: unset, float32
_CODES = {
    ir.DataType.INT4: 4,
    ir.DataType.UINT4: 4,
    ir.DataType.INT8: 8,
    ir.DataType.UINT8: 8,
}


@dataclass(frozen=True)
class Quantised:
    """What packed numbers are made of.

    Attributes:
        codes: the initializer.
        scales: the initializer; its type is the numbers'.
        zeros: the zero points' initializer.
        bits: of a code.
        block: how many codes along `axis` share a scale; 0 where whole rows do.
        axis: of the codes, from the last one, -1: the one in blocks, or the one that every index
            of has its own scale. None for MatMulNBits, whose layout is fixed.
        coarse: whether the quantiser gave leave to round what is multiplied to 8 bits.
        refused: why nothing can be made of it, if so.
    """

    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value | None
    bits: int
    block: int
    axis: int | None = None
    coarse: bool = False
    refused: str = ""

    def contracts(self, turned: bool) -> bool:
        """Whether `axis` is the contracted one of [N, K], or of [K, N] where it is turned."""
        return self.axis == (-2 if turned else -1)


def n_bits(facts: Facts, node: ir.Node) -> Quantised | None:
    """The weights of a MatMulNBits of activations; None for any other node."""
    if node.op_type != "MatMulNBits" or node.domain != CONTRIB:
        return None
    zeros = optional(node, 3)
    scales, bits, block = given(node, 2), attribute(node, "bits", 4), attribute(node, "block_size")
    if not all(map(_constant, (node.inputs[1], scales, zeros))):
        return None
    if not facts.is_activation(given(node)) or not block:
        return None
    level = attribute(node, "accuracy_level", 0)
    refused = ""
    if optional(node, 4) is not None:
        refused = "its rows are in another order (g_idx)"
    elif attribute(node, "K") % block:
        refused = f"its last block of {block} is padded: {attribute(node, 'K')} codes in a row"
    elif zeros is not None and zeros.dtype != ir.DataType.UINT8:
        refused = f"its zero points are {zeros.dtype}"
    coarse = level not in _WHOLE
    return Quantised(given(node, 1), scales, zeros, bits, block, coarse=coarse, refused=refused)


def dequantised(value: ir.Value) -> Quantised | None:
    """What a constant is made of that DequantizeLinear makes; None for anything else."""
    node = producer(value, "DequantizeLinear")
    if node is None:
        return None
    codes, scales, zeros = given(node), given(node, 1), optional(node, 2)
    bits = None if codes.dtype is None else _CODES.get(codes.dtype)
    if codes.dtype is None or bits is None or not all(map(_constant, (codes, scales, zeros))):
        return None
    assert codes.const_value is not None
    assert scales.const_value is not None
    rank, block = codes.const_value.shape.rank(), attribute(node, "block_size", 0)
    axis = attribute(node, "axis", 1) % rank
    refused = ""
    if value.dtype != scales.dtype:
        refused = f"{scales.dtype} scales make {value.dtype} numbers"
    elif scales.const_value.size == 1 and codes.const_value.shape[axis] != 1:
        refused = "one scale is for the whole of it"
    elif zeros is None and not codes.dtype.is_signed():
        refused = "its codes are unsigned and have no zero points"
    return Quantised(codes, scales, zeros, bits, block, axis - rank, refused=refused)


def _constant(value: ir.Value | None) -> bool:
    return value is None or (value.const_value is not None and not value.is_graph_input())
