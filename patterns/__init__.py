"""Patterns: one exporter idiom a file."""

from onnxgen.patterns.attention import SoftmaxAttention
from onnxgen.patterns.attention_op import ExportedAttention
from onnxgen.patterns.gelu import GeluActivation
from onnxgen.patterns.layer_norm import LayerNorm
from onnxgen.patterns.rms_norm import RMSNorm
from onnxgen.patterns.rms_norm_op import SimplifiedLayerNorm
from onnxgen.patterns.rotary import Rotary
from onnxgen.patterns.rotary_op import OneRowRotary
from onnxgen.patterns.rule import Rule

# In the order in which they are applied.
RULES: tuple[Rule, ...] = (
    LayerNorm(),
    RMSNorm(),
    SimplifiedLayerNorm(),
    GeluActivation(),
    Rotary(),
    OneRowRotary(),
    SoftmaxAttention(),
    ExportedAttention(),
)
