"""Patterns: one exporter idiom a file."""

from onnxgen.patterns.attention import SoftmaxAttention
from onnxgen.patterns.attention_op import ExportedAttention
from onnxgen.patterns.contrib_gqa import GroupQueryAttention
from onnxgen.patterns.contrib_mha import MultiHeadAttention
from onnxgen.patterns.contrib_others import OtherAttention
from onnxgen.patterns.contrib_packed import PackedAttention
from onnxgen.patterns.experts import Experts
from onnxgen.patterns.gelu import GeluActivation
from onnxgen.patterns.layer_norm import LayerNorm
from onnxgen.patterns.rms_norm import RMSNorm
from onnxgen.patterns.rotary import Rotary
from onnxgen.patterns.rotary_op import OneRowRotary
from onnxgen.patterns.rule import Rule
from onnxgen.patterns.static_cache import StaticCacheWrite
from onnxgen.patterns.unattended import UnattendedRows

# In the order in which they are applied.
RULES: tuple[Rule, ...] = (
    GroupQueryAttention(),
    MultiHeadAttention(),
    PackedAttention(),
    OtherAttention(),
    LayerNorm(),
    RMSNorm(),
    GeluActivation(),
    Experts(),
    Rotary(),
    StaticCacheWrite(),
    OneRowRotary(),
    SoftmaxAttention(),
    ExportedAttention(),
    UnattendedRows(),
)
