"""What ONNX Runtime's operators demand, which onnx has no schemas of (onnxruntime 1.32's schemas).

TYPES["num_heads"], NEEDS["MultiHeadAttention"]     # INT, ("0", "num_heads")
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

TYPES: Mapping[str, int] = {
    name: kind
    for kind, names in (
        (
            ir.AttributeType.INT,
            "K N accuracy_level axis bits block_size causal do_rotary expert_weight_bits "
            "fc1_expert_weight_bits fc2_expert_weight_bits fc3_expert_weight_bits gather_axis "
            "interleaved is_causal is_packed_batching k kv_cache_bit_width kv_num_heads "
            "local_window_size mask_index_type normalize_routing_weights num_heads output_qk "
            "past_present_share_buffer qk_output quantize_axis rotary_embedding_dim "
            "rotary_interleaved smooth_softmax swiglu_fusion transA transB transBatchA "
            "transBatchB unidirectional upper use_sparse_mixer v_head_size",
        ),
        (
            ir.AttributeType.FLOAT,
            "activation_alpha activation_beta alpha beta epsilon mask_filter_value "
            "qk_norm_epsilon scale softcap swiglu_limit",
        ),
        (ir.AttributeType.STRING, "activation_type quant_type k_quant_type v_quant_type"),
        (ir.AttributeType.INTS, "qkv_hidden_sizes"),
    )
    for name in names.split()
}
# Inputs by number, and attributes; these are counts, and so positive.
NEEDS: Mapping[str, tuple[str, str]] = {
    "Attention": ("0 1", "num_heads"),
    "BiasAdd": ("0 1 2", ""),
    "BiasGelu": ("0 1", ""),
    "DecoderMaskedMultiHeadAttention": ("0", "num_heads"),
    "EmbedLayerNormalization": ("0 2 3 5 6", ""),
    "FastGelu": ("0", ""),
    "FusedConv": ("0 1", ""),
    "FusedGemm": ("0 1", ""),
    "FusedMatMul": ("0 1", ""),
    "GatherBlockQuantized": ("0 1 2", ""),
    "Gelu": ("0", ""),
    "GroupQueryAttention": ("0 5 6", "num_heads kv_num_heads"),
    "MatMulNBits": ("0 1 2", "K N block_size"),
    "MoE": ("0 1 2 4", ""),
    "MultiHeadAttention": ("0", "num_heads"),
    "PackedAttention": ("0 1 2 3 4", "num_heads"),
    "PackedMultiHeadAttention": ("0 4 5", "num_heads"),
    "PagedAttention": ("0 3 5 6 7", "num_heads kv_num_heads"),
    "QAttention": ("0 1 2 3 4", "num_heads"),
    "QMoE": ("0 1 2 5", ""),
    "QuickGelu": ("0", ""),
    "RotaryEmbedding": ("0 1 2 3", ""),
    "SimplifiedLayerNormalization": ("0 1", ""),
    "SkipLayerNormalization": ("0 1 2", ""),
    "SkipSimplifiedLayerNormalization": ("0 1 2", ""),
    "TransposeMatMul": ("0 1", ""),
}
