"""RMS002: ONNX Runtime's own name for the norm becomes the standard's.

Replaces
    SimplifiedLayerNormalization(x, weight; axis, epsilon, stash_type), which ONNX Runtime
    registers in the default domain though no standard has it
    -> RMSNormalization-23(x, weight; axis, epsilon, stash_type)

Declines
    second-output: the inverse root is read as well; the standard's operator does not give it.

Numerics
    The same operation.

Seen in
    Models that ONNX Runtime's optimizers wrote; onnxruntime-genai's builder.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute, given, is_read
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rule import Declined, Rewrite, Rule


class SimplifiedLayerNorm(Rule):
    """Anchored at the operator."""

    code = "RMS002"
    kind = "rms_norm"
    anchors = frozenset({"SimplifiedLayerNormalization"})

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        if node.domain not in ("", "ai.onnx"):
            return None
        if any(map(is_read, node.outputs[1:])):
            reason = "the inverse root is read, which RMSNormalization does not give"
            raise Declined(self, "second-output", reason, node)
        axis, epsilon = attribute(node, "axis", -1), attribute(node, "epsilon", 1e-5)
        x, weight = given(node), given(node, 1)
        result = node.outputs[0]
        if weight.dtype != x.dtype and x.dtype is not None:
            weight = builder.op("Cast", [weight], {"to": int(x.dtype)})
        y = builder.op(
            "RMSNormalization",
            [x, weight],
            {"axis": axis, "epsilon": epsilon, "stash_type": attribute(node, "stash_type", 1)},
        )
        fused = y.producer()
        assert fused is not None
        if result.dtype is not None and result.dtype != x.dtype:
            y = builder.op("Cast", [y], {"to": int(result.dtype)})
        return Rewrite(fused, ((result, y),), {"epsilon": epsilon, "axis": axis})
