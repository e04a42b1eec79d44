"""ORT003: an RMS norm takes the residual sum before it inside.

Replaces
    h = a + b;  RMSNormalization(h, w)  -> SkipSimplifiedLayerNormalization(a, b, w) -> y, h

    A LayerNormalization stays beside its Add: on CPU (ONNX Runtime 1.32, one thread, 128 rows of
    768) SkipLayerNormalization takes 588 us where Add and LayerNormalization take 71.

Looks for
    1. an RMSNormalization over the last axis of [B, S, H]
    2. a sum of two tensors of that shape in front of it

Declines
    Nothing: what does not fit stays as it is, and is no site.

Numerics
    The same operations; the sum is made inside.

Seen in
    every decoder with residuals; what onnxruntime-genai's builder writes.

Example
    opset 24
    (float[b,s,40] a, float[b,s,40] c)
    => (float[b,s,40] y, float[b,s,40] h)
    <float[40] w>
    {
      h = Add(a, c)
      y = RMSNormalization<axis = -1, epsilon = 0.00001>(h, w)
    }
    becomes
        y, , , h = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 1e-05>(a, c, w)
"""

from __future__ import annotations

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import CONTRIB, attribute, given, producer
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rule import Rewrite, Rule

_EPSILON = 1e-5


class SkipNorm(Rule):
    """Anchored at an RMS norm over the last axis of a sum."""

    code = "ORT003"
    kind = "norm"
    anchors = frozenset({"RMSNormalization"})

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        builder.passed(1)
        total = given(node)
        add = producer(total, "Add")
        shape = facts.shapes.of(total)
        if add is None or shape is None or len(shape) != 3 or not _over_last(node, shape):
            return None
        a, b = given(add, 0), given(add, 1)
        if not all(facts.shapes.same_shape(facts.shapes.of(each), shape) for each in (a, b)):
            return None
        weight = given(node, 1)
        if not a.dtype == b.dtype == weight.dtype:
            return None
        outputs = builder.ops(
            "SkipSimplifiedLayerNormalization",
            [a, b, weight],
            4,
            {"epsilon": attribute(node, "epsilon", _EPSILON)},
            domain=CONTRIB,
        )
        for statistics in outputs[1:3]:
            statistics.dtype = ir.DataType.FLOAT
        fused = outputs[0].producer()
        assert fused is not None
        return Rewrite(fused, ((node.outputs[0], outputs[0]), (total, outputs[3])))


def _over_last(node: ir.Node, shape: tuple[object, ...]) -> bool:
    outputs = [output for output in node.outputs[1:] if output.uses()]
    return attribute(node, "axis", -1) in (-1, len(shape) - 1) and not outputs
