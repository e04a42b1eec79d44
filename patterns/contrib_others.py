"""MSA004: attentions of ONNX Runtime that are found and kept, each for its reason.

Replaces
    Nothing: they are named in the report, so that none is passed over in silence.

Looks for
    1. an attention of ONNX Runtime that no rule raises

Declines
    shared-buffer: the cache is written in place and read through beams.
        Expected: past and present as tensors of their own.
        Change: convert the model without beam search inside.
    packed: the batch is packed without padding: no CPU kernel to compare with.
        Expected: a batch [B, S, ..].
        Change: optimise the model without packing; a paged model is what `onnxgen to-paged` makes.
    quantized: it computes in integers.
        Expected: floating point, with weights quantised or not.
        Change: quantise weights only, or after fusing.
    other: it attends to chosen keys, or to a state.
        Expected: an attention to all keys, but for a mask.
        Change: none: the standard has no such attention.

Numerics
    None.

Seen in
    onnxruntime.transformers (whisper and gpt2 with beam search, quantized bert).
"""

from __future__ import annotations

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import CONTRIB
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rule import Declined, Rewrite, Rule

_SHARED = ("shared-buffer", "its cache is written in place and read through beams")
_PACKED = ("packed", "its batch is packed without padding")
_REASONS = {
    "DecoderMaskedMultiHeadAttention": _SHARED,
    "DecoderMaskedSelfAttention": _SHARED,
    "DecoderAttention": _SHARED,
    "PackedAttention": _PACKED,
    "PackedMultiHeadAttention": _PACKED,
    "PagedAttention": ("packed", "its cache is paged"),
    "QAttention": ("quantized", "it computes in integers"),
    "QOrderedAttention": ("quantized", "it computes in integers"),
    "LongformerAttention": ("other", "it attends to a window and to chosen tokens"),
    "SparseAttention": ("other", "it attends to chosen blocks"),
    "LinearAttention": ("other", "it attends to a state, not to keys"),
}


class OtherAttention(Rule):
    """Anchored at each of these operators."""

    code = "MSA004"
    kind = "attention"
    anchors = frozenset(_REASONS)

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        if node.domain != CONTRIB:
            return None
        builder.passed(1)
        code, reason = _REASONS[node.op_type]
        raise Declined(self, code, reason, node)
