"""GEL001: GELU, exact or by tanh, in any spelling of its factors.

Replaces
    y = 0.5 * x * (1 + erf(x / sqrt(2)))
    y = 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))    (Hendrycks and Gimpel, 2016)
    -> Gelu-20(x; approximate)

    Factors may stand anywhere, be divisions, and sums be multiplied out; the cube is Pow or Mul;
    the tanh may be written as a sigmoid of twice its argument.

    Swish, x * sigmoid(alpha * x), SiLU and "quick GELU" among it, stays Sigmoid and Mul in the
    canonical model: the standard's Swish-24 has no kernel in ONNX Runtime 1.32 on CPU. At opset 24
    it is expanded, at 25 and 26 refused, and the expansion is slower than what was there, which
    the runtime fuses by itself: 2.3 against 0.7 ms for [1, 256, 4864] on one thread, 2.2 against
    1.3 ms with an alpha. `onnxgen.analysis.activations.swish_of` recognises it for targets that
    have an operator. Gelu on the same tensor: 0.8 ms against 0.8 to 3.4 for erf, depending on the
    order of its factors, and 1.2 against 5.2 to 9.3 for tanh.

Looks for
    1. x times half of one plus an erf, a tanh or a sigmoid, in any order of factors
    2. a result of x's own shape

Declines
    Nothing: what does not fit stays as it is, and is no site.

Numerics
    The same function; the order of its products may differ (1 unit in the last place).

Seen in
    torch.onnx.export, TorchScript (erf, tanh) and dynamo at opset 18 (tanh), torch 2.13;
    transformers' NewGELU, FastGELU and GELUActivation.

Example
    opset 20
    (float[b,s,20] h)
    => (float[b,s,40] y)
    <float[20,40] w>
    {
      x = MatMul(h, w)
      a = Div(x, 1.41421354)
      t = Erf(a)
      g = Mul(t, x)
      f = Add(g, x)
      y = Mul(f, 0.5)
    }
    becomes
        ...
        y = Gelu<approximate = none>(x)
"""

from __future__ import annotations

from onnx_ir import Node

from onnxgen.analysis.activations import gelu_of
from onnxgen.analysis.facts import Facts
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rule import Rewrite, Rule


class GeluActivation(Rule):
    """Anchored at the one node that is no arithmetic: an Erf, a Tanh or a Sigmoid."""

    code = "GEL001"
    kind = "activation"
    anchors = frozenset({"Erf", "Tanh", "Sigmoid"})

    def rewrite(self, facts: Facts, builder: Builder, node: Node) -> Rewrite | None:
        found = gelu_of(node)
        if found is None or not facts.is_activation(found.x):
            return None
        builder.passed(1)
        if not facts.shapes.same_shape(facts.shapes.of(found.x), facts.shapes.of(found.y)):
            return None  # a constant with more axes than x gives the result more, too
        y = builder.op("Gelu", [found.x], {"approximate": found.approximate})
        fused = y.producer()
        assert fused is not None
        return Rewrite(fused, ((found.y, y),), {"approximate": found.approximate})
