"""ROT002: a RotaryEmbedding that runs for one sequence only is made to run for a batch.

Replaces
    RotaryEmbedding(x [B, H, S, D], cos [1, S, R/2], sin [1, S, R/2])
    RotaryEmbedding(x [B, H, S, D], cos [M, R/2], sin [M, R/2], position_ids [1, S])
    -> the same, with the tables or the positions expanded to B

    The operator does not broadcast, and runtimes reject the first two for B > 1. Exporters write
    them where positions are counted, not fed.

Looks for
    1. a RotaryEmbedding whose tables or positions are of one sequence, for a batch
    2. a batch whose size can be computed

Declines
    batch-unknown: the size of the batch cannot be computed.
        Expected: sizes that follow from the inputs'.
        Change: make only batch and lengths dynamic when exporting.

Numerics
    The same for one sequence; the others are turned as that one is.

Seen in
    torch.onnx.export with dynamo at opset 23, of models without position_ids (ModernBERT), torch 2.13.

Example
    opset 23
    (float[b,s,120] h, int64[1,s] position_ids)
    => (float[b,6,s,20] y)
    <float[120] weight, float[64,10] c, float[64,10] n>
    {
      g = RMSNormalization(h, weight)
      r4 = Reshape(g, [0, 0, 6, 20])
      x = Transpose<perm = [0, 2, 1, 3]>(r4)
      y = RotaryEmbedding(x, c, n, position_ids)
    }
    becomes
        ...
        y = RotaryEmbedding(x, c, n, expand)
"""

from __future__ import annotations

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rule import Declined, Rewrite, Rule


class OneRowRotary(Rule):
    """Anchored at the operator."""

    code = "ROT002"
    kind = "rotary"
    anchors = frozenset({"RotaryEmbedding"})

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        shape = facts.shapes.of(node.inputs[0])
        if node.domain not in ("", "ai.onnx") or shape is None or len(shape) not in (3, 4):
            return None
        batch, new = shape[0], shape[-2]
        positions = node.inputs[3] if len(node.inputs) > 3 else None
        rows = [positions] if positions is not None else list(node.inputs[1:3])
        sizes = [facts.shapes.of(value) for value in rows]
        if batch == 1 or not any(size and size[0] == 1 for size in sizes):
            return None
        builder.passed(1)
        expanded: list[ir.Value | None] = []
        for value, size in zip(rows, sizes, strict=True):
            assert value is not None
            target = None if size is None else builder.sizes((batch, new, *size[2:]))
            if target is None:
                reason = "the size of the batch cannot be computed"
                raise Declined(self, "batch-unknown", reason, node)
            expanded.append(builder.op("Expand", [value, target]))
        inputs = [node.inputs[0], *expanded]
        if positions is not None:
            inputs = [*node.inputs[:3], *expanded]
        attributes = {name: found.value for name, found in node.attributes.items()}
        y = builder.op("RotaryEmbedding", inputs, attributes)
        fused = y.producer()
        assert fused is not None
        details = {"repaired": "tables of batch 1 are expanded"}
        return Rewrite(fused, ((node.outputs[0], y),), details, repairs=True)
