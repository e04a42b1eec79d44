"""MOE003: a mixture of experts whose weights a quantiser packed.

Replaces
    sum over j of w[t, j] * expert(i[t, j], x[t]), found as MOE001 finds it, where the experts'
    products are
        MatMulNBits(x, codes [N, K/block, block*bits/8], scales, zero points?)
        MatMul(x, DequantizeLinear(codes [K, N] or [N, K], scales, zero points?)), or Gemm, the
            codes of one expert each or of all of them stacked
    -> onnxgen::MoE(x, w, i, codes, scales, zero points?), its overload "q4" or "q8"

    Codes are brought into one layout when the model is written, one expert at a time: [E, N, K],
    without a sign, packed from the lowest bits on; what MatMulNBits reads only changes its shape.
    Only targets with a kernel for it apply this rule, and only where the kernel takes the experts:
    in standard operators, unpacking each expert takes longer than what the quantiser wrote.

Looks for
    1. a TopK or ArgMax whose choice comes together again in one sum
    2. between the two products of each expert with its weights
    3. which experts a token goes to, and what they weigh
    4. one function of a product between them, the same for all experts
    5. weights of one layout, and sizes that are known
    6. codes of 4 or 8 bits that the kernel takes

Declines
    packing: g_idx, padded K, zero points that are numbers or left out beside unsigned codes, one
        scale for everything (`expert_codes`).
        Expected: codes with their scales, and zero points that are codes.
        Change: quantise without act-order (g_idx) and with zero points stored as codes.
    bits: a code has neither 4 bits nor 8, or not the same for all weights, or rows end within a
        byte.
        Expected: 4 or 8 bits, alike for all weights.
        Change: quantise all experts to 4 or to 8 bits.
    blocks: scales are for something else than whole rows, or blocks of a row, which the kernel
        takes from 16 on and alike for both weights; or the sizes of codes, scales and zero points
        do not fit.
        Expected: a scale for each row, or for each block of a row: of one size, at least 16, a
        power of 2.
        Change: quantise with one block_size of 16, 32, 64, 128 or 256.
    layout: experts packed in different ways, some of them not at all, a size that is not known, or
        zero points of 4 bits one a row: two rows would share a byte.
        Expected: all experts quantised alike.
        Change: quantise all experts with the same settings.
    accuracy: 8 bits in blocks: the CPU kernel rounds what it multiplies to 8 bits, told to or not.
        Expected: 4 bits in blocks, or 8 bits with a scale a row.
        Change: quantise to 4 bits, or to 8 with a scale a row.
    activation: the kernel has no such activation.
        Expected: what ORT004 takes.
        Change: see `onnxgen rules ORT004`.
    form: the kernel has no such form: no indices, or weights of several experts on its input.
        Expected: what ORT004 takes.
        Change: see `onnxgen rules ORT004`.
    router: the kernel's weights are probabilities, and these may be below zero.
        Expected: what ORT004 takes.
        Change: see `onnxgen rules ORT004`.
    weights: they are computed, or of a type that the kernel does not take.
        Expected: what ORT004 takes.
        Change: see `onnxgen rules ORT004`.

Numerics
    The same numbers (codes - zero points) * scales, the same products.

Seen in
    MatMulNBitsQuantizer of ONNX Runtime on unrolled experts, in both of its formats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxgen import derived
from onnxgen.analysis.expert_codes import Quantised
from onnxgen.analysis.expert_weights import Source
from onnxgen.analysis.facts import Facts
from onnxgen.derived import Rows
from onnxgen.functions import moe
from onnxgen.patterns.building import Builder
from onnxgen.patterns.expert_stacks import First, Linear, Weights, stack_of
from onnxgen.patterns.experts import Experts
from onnxgen.patterns.rule import Declined, Rewrite, Rule


class _Numbers(Exception):
    """Nothing is quantised."""


_WORDS = {bits: word for word, bits in moe.BITS.items()}


@dataclass(frozen=True)
class _Packed:
    """One weight of all experts: codes [E, N, K*bits/8], scales [E, N, blocks], zero points."""

    codes: Rows
    scales: Rows
    zeros: Rows | None


class QuantisedExperts(Experts):
    """Anchored as `Experts` is; passes over experts whose weights are numbers.

    Args:
        kernel: lowers what this rule makes. It is asked first, as nothing else should read codes
            by the base operator's body.
    """

    code = "MOE003"

    def __init__(self, kernel: Rule) -> None:
        self._kernel = kernel

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        try:
            rewrite = super().rewrite(facts, builder, node)
            if rewrite is not None:
                builder.passed(5)
                self._kernel.rewrite(facts, builder, rewrite.node)  # the engine drops its nodes
        except _Numbers:
            return None
        except Declined as declined:
            decline = declined.decline
            raise Declined(self, decline.code, decline.reason, node) from None
        return rewrite

    def weights(
        self, builder: Builder, first: First, second: Linear, node: ir.Node | None
    ) -> Weights:
        linears = first.linears(second)
        found = [each for linear in linears.values() for each in linear.weights]
        packed = [each.codes for each in found if each.codes is not None]
        if not packed:
            raise _Numbers
        if len(packed) < len(found):
            raise Declined(self, "layout", "some of the experts' weights are not quantised", node)
        refused = next((each.refused for each in packed if each.refused), "")
        if refused:
            raise Declined(self, "packing", refused, node)
        bits = {each.bits for each in packed}
        word = _WORDS.get(min(bits)) if len(bits) == 1 else None
        if word is None:
            reason = f"its codes have {', '.join(map(str, sorted(bits)))} bits"
            raise Declined(self, "bits", reason, node)
        if len({each.scales.dtype for each in packed}) > 1:
            raise Declined(self, "layout", "its scales have different types", node)
        zeros = {each.zeros is not None for each in packed}
        if len(zeros) > 1:
            raise Declined(self, "layout", "some weights have zero points and some have none", node)
        stacks = {at: self._stack(linear.weights, node) for at, linear in linears.items()}
        values = {}
        for at, each in stacks.items():
            values[at] = builder.derived(each.codes, "onnxgen/experts")
            values[moe.SCALES[at]] = builder.derived(each.scales, "onnxgen/scales")
            if each.zeros is not None:
                values[moe.ZEROS[at]] = builder.derived(each.zeros, "onnxgen/zeros")
        parts = {word, *(["zeros"] if zeros == {True} else [])}
        coarse = all(each.coarse for each in packed)
        return Weights(values, frozenset({*parts, "coarse"} if coarse else parts))

    def _stack(self, sources: Sequence[Source], node: ir.Node | None) -> _Packed:
        """One weight of all experts.

        Raises:
            Declined: its parts do not fit each other.
        """
        made = [each.codes for each in sources if each.codes is not None]
        alike = {
            (each.turned, c.bits, c.block, c.axis) for each, c in zip(sources, made, strict=True)
        }
        codes = _all(sources, [each.value for each in sources])
        scales = _all(sources, [each.scales for each in made])
        points = [each.zeros for each in made if each.zeros is not None]
        zeros = _all(sources, points) if points else None
        if codes is None or len(alike) > 1:
            raise Declined(
                self, "layout", "the experts' weights are packed in different ways", node
            )
        inner = codes.shape[1 if sources[0].turned else -1]
        if inner * made[0].bits % 8 and made[0].axis is not None:
            raise Declined(self, "bits", f"a row of {inner} codes ends within a byte", node)
        how = _rows_of_bytes if made[0].axis is None else _codes
        fit = scales is not None and (zeros is not None or not points)
        found = how(made[0], sources[0].turned, codes, scales, zeros) if scales and fit else None
        if found is None:
            reason = "its scales are not for rows of an expert, or blocks of a row"
            raise Declined(self, "blocks", reason, node)
        return found


def _all(sources: Sequence[Source], values: Sequence[ir.Value]) -> Rows | None:
    """A part of the weights of all experts, [E, ...]."""
    tensors = [each.const_value for each in values if each.const_value is not None]
    if sources[0].whole or sources[0].expert is not None:
        one = stack_of(sources) is not None and len(set(values)) == 1
        experts = sources[0].value.shape
        fits = experts is not None and tensors[0].shape.rank() and tensors[0].shape[0] == experts[0]
        return derived.whole(tensors[0]) if one and fits else None
    if any(each.whole or each.expert is not None for each in sources):
        return None
    if len({(tuple(each.shape.numpy()), each.dtype) for each in tensors}) != 1:
        return None
    return derived.stacked(tensors)


def _rows_of_bytes(
    made: Quantised, turned: bool, codes: Rows, scales: Rows, zeros: Rows | None
) -> _Packed | None:
    """Of MatMulNBits, whose bytes stay as they are."""
    if len(codes.shape) != 4:
        return None
    _, rows, blocks, size = codes.shape
    points = -(-blocks * made.bits // 8)
    fits = size * 8 == made.block * made.bits and _size(scales) == rows * blocks
    if not fits or (zeros is not None and _size(zeros) != rows * points):
        return None
    return _Packed(
        codes.reshaped(rows, blocks * size),
        scales.reshaped(rows, blocks),
        None if zeros is None else zeros.reshaped(rows, points),
    )


def _codes(
    made: Quantised, turned: bool, codes: Rows, scales: Rows, zeros: Rows | None
) -> _Packed | None:
    """Of DequantizeLinear, whose codes are packed anew."""
    assert made.axis is not None
    rows, inner = codes.shape[:0:-1] if turned else codes.shape[1:]
    given = [scales] if zeros is None else [scales, zeros]
    if made.block:
        shape = list(codes.shape)
        shape[1 if turned else 2] = inner // made.block
        along = made.contracts(turned) and inner % made.block == 0
        if not along or any(list(each.shape) != shape for each in given):
            return None
        given = [each.transposed() if turned else each for each in given]
    else:
        if made.contracts(turned) or any(each.shape[1:] != (rows,) for each in given):
            return None
        given = [each.reshaped(rows, 1) for each in given]
    codes = codes.transposed() if turned else codes
    points = None if zeros is None else given[1].packed(made.bits)
    return _Packed(codes.packed(made.bits), given[0], points)


def _size(rows: Rows) -> int:
    """Elements of one expert."""
    return math.prod(rows.shape[1:])
