"""How com.microsoft QMoE takes quantised experts, and which it computes exactly.

    fc [E, N, K*bits/8]; scales [E, N, K/block_size], zero points [E, N, ceil(K/block_size*bits/8)]
    the same with a scale a row: scales [E, N], zero points [E, N], 8 bits only; no block_size

The bytes are the base operator's. Both weights have one block_size, at least 16, a power of 2.

What is declined
    accuracy: 8 bits in blocks. The CPU kernel rounds what it multiplies to 8 bits, told to or not.
    blocks: of different sizes in fc1 and fc2, or of a size that the kernel has not.
    layout: zero points of 4 bits, one a row: two rows would share a byte.

2 bits, which the kernel has and computes in 8 bits at some sizes, are never raised.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnxgen.derived import Rows
from onnxgen.functions import moe

SMALLEST = 16


class Unfit(Exception):
    """Not for this kernel: the decline's code, and why."""

    def __init__(self, code: str, reason: str) -> None:
        self.code = code
        super().__init__(reason)


def packed(
    weights: Mapping[int, Rows | None], bits: int
) -> tuple[list[Rows | None], dict[str, int]]:
    """The weights in the order in which QMoE takes them, and what it is told of them.

    Args:
        weights: by their places in the base operator, fc3 joined to fc1.

    Raises:
        Unfit: the kernel does not take them, or rounds.
    """
    sizes = {_block(weights, at, bits) for at in (moe.FC1, moe.FC2)}
    told = {"expert_weight_bits": bits, "weights_prepacked": 0}
    found = dict(weights)
    if all(_blocks(weights, at) == 1 for at in (moe.FC1, moe.FC2)):
        for at in (moe.FC1, moe.FC2):
            zeros, scales = weights[moe.ZEROS[at]], weights[moe.SCALES[at]]
            assert scales is not None
            found[moe.SCALES[at]] = scales.reshaped(scales.shape[1])
            if zeros is not None and bits < 8:
                raise Unfit("layout", "4-bit zero points, one a row, would share bytes")
            if zeros is not None:
                found[moe.ZEROS[at]] = zeros.reshaped(zeros.shape[1])
    elif bits == 8:
        raise Unfit("accuracy", "of 8-bit blocks the CPU kernel makes 8-bit products")
    else:
        size = min(sizes)
        if len(sizes) > 1 or size < SMALLEST or size & (size - 1):
            text = " and ".join(map(str, sorted(sizes)))
            raise Unfit("blocks", f"the CPU kernel takes no blocks of {text}")
        told["block_size"] = size
    order = [
        *(moe.FC1, moe.SCALES[moe.FC1], moe.BIAS1),
        *(moe.FC2, moe.SCALES[moe.FC2], moe.BIAS2),
        *(moe.ZEROS[moe.FC1], moe.ZEROS[moe.FC2]),
    ]
    return [found[at] for at in order], told


def _block(weights: Mapping[int, Rows | None], at: int, bits: int) -> int:
    """How many codes share a scale."""
    codes = weights[at]
    assert codes is not None
    return codes.shape[2] * 8 // bits // _blocks(weights, at)


def _blocks(weights: Mapping[int, Rows | None], at: int) -> int:
    """How many scales a row has."""
    scales = weights[moe.SCALES[at]]
    assert scales is not None
    return scales.shape[2]
