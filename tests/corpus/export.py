"""Export the corpus: small random models from transformers configurations, through real exporters.

    python tests/corpus/export.py --list
    python tests/corpus/export.py --only 'llama/*'
    python tests/corpus/export.py --model qwen3 --form dynamo20 --layers 32 --full -o /tmp/big.onnx
    python tests/corpus/export.py --model qwen3 --layers 32 --checkpoint /tmp/qwen3

A new model is one line in `MODELS`. What cannot be exported is recorded in `failures.json`, and
`README.md` is written from it and from the stored files (`--readme` does only that).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import io
import itertools
import json
import logging
import lzma
import math
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import experts
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch
import transformers
from onnx import numpy_helper
from torch import nn

from onnxgen import testing
from onnxgen.testing import CORPUS, GROW, Growth
from onnxgen.twin import BFLOAT16, unrunnable_types, widen, widened

HERE = Path(__file__).resolve().parent
FAILURES = HERE / "failures.json"
README = HERE / "README.md"
KEPT_METADATA = ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy")
PROBES = ((2, 4, 7), (1, 5, 0), (2, 11, 0), (1, 1, 9), (2, 1, 3), (2, 2, 2))
MORE_PAST = ((2, 3, 5), (1, 6, 12), (2, 1, 17))
TRACED = (2, 4, 7)  # B, S, P: pairwise distinct, and none of them 0 or 1
STATIC_LENGTH = 20


@dataclass(frozen=True)
class Dims:
    """Sizes of a corpus model. They differ pairwise, so that a swapped axis cannot pass."""

    layers: int = 2
    heads: int = 6
    kv_heads: int = 3
    head_size: int = 48  # its root is no power of two
    hidden: int = 84
    inner: int = 112
    vocab: int = 131
    window: int = 6
    positions: int = 96
    experts: int = 5

    @property
    def width(self) -> int:
        """Hidden size of models whose hidden size must be heads times head size."""
        return self.heads * self.head_size


@dataclass(frozen=True)
class Model:
    """A model of the corpus: its transformers class, its configuration and its forms."""

    name: str
    architecture: str
    config: Callable[[Dims], dict[str, Any]]
    forms: tuple[str, ...]
    kind: str = "decoder"
    attention: str = "sdpa"
    dims: Dims = field(default_factory=Dims)


OPTIMIZED = "torchscript-optimized"
BASIC = ("torchscript", "dynamo20", "dynamo23", "transformers")
MORE = (
    *BASIC,
    "dynamo18",
    "torchscript-eager",
    "dynamo20-eager",
    "torchscript-decode",
    "dynamo20-decode",
    "transformers-decode",
    "transformers-static",
    "torchscript-static",
    "dynamo20-static",
    "torchscript-prefill",
    "dynamo20-prefill",
    "torchscript-fp16",
    "dynamo20-fp16",
)
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
NARROW = {"fp16": "float16", "bf16": "bfloat16"}
CROPPED = (
    *BASIC,
    "torchscript-cropped",
    "dynamo20-cropped",
    "transformers-sliding",
    "transformers-static",
)
EXPERTS = (
    "torchscript-batched",
    "dynamo20-batched",
    "dynamo23-batched",
    "transformers",
    "transformers-batched",
    "torchscript",
    "dynamo20",
)
SOME_EXPERTS = (
    "torchscript-batched",
    "dynamo20-batched",
    "transformers",
    "transformers-batched",
)
OWN_EXPERTS = tuple(
    f"{exporter}-{form}" for form in experts.FORMS for exporter in ("torchscript", "dynamo20")
)
NARROW_EXPERTS = ("torchscript-batched-fp16", "dynamo20-batched-fp16")
CROSS = (*BASIC, *(f"{form}-prefill" for form in BASIC[:2]))
T5 = (*BASIC, "dynamo20-eager", "dynamo23-eager")  # dynamo takes no other attention of T5


def common(d: Dims) -> dict[str, Any]:
    """Configuration keys that most decoders share."""
    return {
        "num_hidden_layers": d.layers,
        "hidden_size": d.hidden,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "head_dim": d.head_size,
        "intermediate_size": d.inner,
        "vocab_size": d.vocab,
        "max_position_embeddings": d.positions,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def wide(d: Dims) -> dict[str, Any]:
    """The same for models whose heads are as many and as large as the hidden size says."""
    keys = {**common(d), "hidden_size": d.width}
    return {k: v for k, v in keys.items() if k not in ("num_key_value_heads", "head_dim")}


def gpt(d: Dims) -> dict[str, Any]:
    """The same in the words of gpt2."""
    return {
        "n_layer": d.layers,
        "n_head": d.heads,
        "n_embd": d.width,
        "n_inner": d.inner,
        "n_positions": d.positions,
        "vocab_size": d.vocab,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def t5(d: Dims) -> dict[str, Any]:
    """The same in the words of T5."""
    return {
        "num_layers": d.layers,
        "num_decoder_layers": d.layers,
        "num_heads": d.heads,
        "d_kv": d.head_size,
        "d_model": d.hidden,
        "d_ff": d.inner,
        "vocab_size": d.vocab,
        "relative_attention_num_buckets": 10,
        "relative_attention_max_distance": 14,
        "decoder_start_token_id": 0,
    }


def whisper(d: Dims) -> dict[str, Any]:
    """The same in the words of Whisper."""
    return {
        "encoder_layers": d.layers,
        "decoder_layers": d.layers,
        "encoder_attention_heads": d.heads,
        "decoder_attention_heads": d.heads,
        "d_model": d.width,
        "encoder_ffn_dim": d.inner,
        "decoder_ffn_dim": d.inner,
        "vocab_size": d.vocab,
        "num_mel_bins": 16,
        "max_source_positions": 14,
        "max_target_positions": d.positions,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }


MIXED = ["sliding_attention", "full_attention"]


def layer_types(d: Dims) -> list[str]:
    """Alternating sliding and full layers."""
    return [MIXED[i % 2] for i in range(d.layers)]


# fmt: off
MODELS = (
    Model("llama", "LlamaForCausalLM", common, (*MORE, "torchscript-bf16", "dynamo20-bf16", "builder", OPTIMIZED)),
    Model("qwen3", "Qwen3ForCausalLM", common, (*MORE, "builder")),
    Model("qwen2", "Qwen2ForCausalLM", common, BASIC),
    Model("mistral", "MistralForCausalLM", lambda d: {**common(d), "sliding_window": d.window}, CROPPED),
    Model("phi3", "Phi3ForCausalLM", lambda d: {**common(d), "original_max_position_embeddings": d.positions}, BASIC),
    Model("gemma2", "Gemma2ForCausalLM", lambda d: {**common(d), "sliding_window": d.window, "layer_types": layer_types(d), "query_pre_attn_scalar": 40, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 7.0, "tie_word_embeddings": True}, CROPPED, attention="eager"),
    Model("gemma3_text", "Gemma3ForCausalLM", lambda d: {**common(d), "sliding_window": d.window, "layer_types": layer_types(d), "query_pre_attn_scalar": 40, "tie_word_embeddings": True}, BASIC),
    Model("gpt2", "GPT2LMHeadModel", gpt, (*BASIC, OPTIMIZED)),
    Model("opt", "OPTForCausalLM", lambda d: {**wide(d), "ffn_dim": d.inner, "word_embed_proj_dim": d.width}, BASIC),
    Model("gpt_neox", "GPTNeoXForCausalLM", lambda d: {**wide(d), "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1 / 3}}, BASIC),
    Model("falcon", "FalconForCausalLM", lambda d: {**wide(d), "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "alibi": False, "bias": False}, (*BASIC, "dynamo23-eager")),
    Model("bloom", "BloomForCausalLM", lambda d: {**wide(d), "n_head": d.heads, "n_layer": d.layers, "num_hidden_layers": d.layers}, BASIC, attention="eager"),
    Model("gptj", "GPTJForCausalLM", lambda d: {**gpt(d), "rotary_dim": 16}, BASIC, attention="eager"),
    Model("mixtral", "MixtralForCausalLM", lambda d: {**common(d), "num_local_experts": d.experts, "num_experts_per_tok": 2, "sliding_window": None}, (*EXPERTS, *OWN_EXPERTS, *NARROW_EXPERTS)),
    Model("qwen3_moe", "Qwen3MoeForCausalLM", lambda d: {**common(d), "num_experts": d.experts, "num_experts_per_tok": 2, "moe_intermediate_size": 72, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}, EXPERTS),
    Model("gpt_oss", "GptOssForCausalLM", lambda d: {**common(d), "num_local_experts": d.experts, "num_experts_per_tok": 2, "sliding_window": d.window, "layer_types": layer_types(d)}, (*EXPERTS, "torchscript-looped", "torchscript-dense", "dynamo20-dense", "torchscript-bmm", "dynamo20-bmm"), attention="eager"),
    Model("deepseek_v3", "DeepseekV3ForCausalLM", lambda d: {**common(d), "num_key_value_heads": d.heads, "head_dim": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 40, "q_lora_rank": 56, "kv_lora_rank": 64, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3, "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 72}, EXPERTS),
    Model("deepseek_v2", "DeepseekV2ForCausalLM", lambda d: {**common(d), "num_key_value_heads": d.heads, "head_dim": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 40, "q_lora_rank": 56, "kv_lora_rank": 64, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.6, "num_experts_per_tok": 3, "n_shared_experts": 3, "first_k_dense_replace": 1, "moe_intermediate_size": 76}, ("transformers", "transformers-batched")),
    Model("qwen2_moe", "Qwen2MoeForCausalLM", lambda d: {**common(d), "num_experts": d.experts, "num_experts_per_tok": 2, "moe_intermediate_size": 76, "shared_expert_intermediate_size": 104, "norm_topk_prob": False}, (*SOME_EXPERTS, "torchscript-looped", "torchscript-dense", "dynamo20-looped", "dynamo20-dense")),
    Model("olmoe", "OlmoeForCausalLM", lambda d: {**wide(d), "num_key_value_heads": d.kv_heads, "num_experts": d.experts, "num_experts_per_tok": 3, "norm_topk_prob": False}, SOME_EXPERTS),
    Model("granitemoe", "GraniteMoeForCausalLM", lambda d: {**common(d), "num_local_experts": d.experts, "num_experts_per_tok": 3, "embedding_multiplier": 1.5, "logits_scaling": 0.7, "residual_multiplier": 0.8, "attention_multiplier": 0.15}, (*SOME_EXPERTS, *NARROW_EXPERTS)),
    Model("phimoe", "PhimoeForCausalLM", lambda d: {**common(d), "num_local_experts": d.experts, "num_experts_per_tok": 2, "router_jitter_noise": 0.2, "attention_bias": True, "lm_head_bias": True, "sliding_window": None}, SOME_EXPERTS),
    Model("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", lambda d: {**common(d), "moe_num_experts": d.experts, "moe_k": 2, "moe_intermediate_size": 76, "moe_num_shared_experts": 3, "moe_layer_start_index": 1}, SOME_EXPERTS),
    Model("glm4_moe", "Glm4MoeForCausalLM", lambda d: {**common(d), "n_routed_experts": d.experts, "num_experts_per_tok": 3, "moe_intermediate_size": 76, "n_shared_experts": 3, "first_k_dense_replace": 1, "routed_scaling_factor": 1.6, "use_qk_norm": True, "attention_bias": True}, SOME_EXPERTS),
    Model("minimax_m2", "MiniMaxM2ForCausalLM", lambda d: {**common(d), "num_local_experts": d.experts, "num_experts_per_tok": 3}, SOME_EXPERTS),
    Model("jetmoe", "JetMoeForCausalLM", lambda d: {k: v for k, v in common(d).items() if k not in ("head_dim", "num_attention_heads")} | {"kv_channels": d.head_size, "num_local_experts": d.experts, "num_experts_per_tok": 2}, ("torchscript", "dynamo20", "transformers")),
    Model("llama4_text", "Llama4ForCausalLM", lambda d: {**common(d), "intermediate_size_mlp": 104, "num_local_experts": d.experts, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "no_rope_layer_interval": 2, "attention_chunk_size": d.positions, "floor_scale": 4}, ("torchscript", "dynamo20", "dynamo23", "transformers", "transformers-unsqueezed")),
    Model("llama4_nope", "Llama4ForCausalLM", lambda d: {**common(d), "intermediate_size_mlp": 104, "num_local_experts": d.experts, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "no_rope_layers": [0] * d.layers, "attention_chunk_size": d.positions, "floor_scale": 4}, ("torchscript", "dynamo20", "dynamo23", "transformers")),
    Model("nemotron_h", "NemotronHForCausalLM", lambda d: {k: v for k, v in common(d).items() if k != "num_hidden_layers"} | {"layers_block_type": ["full_attention", "moe"] * d.layers, "moe_latent_size": 60, "moe_intermediate_size": 76, "moe_shared_expert_intermediate_size": 104, "n_routed_experts": d.experts, "num_experts_per_tok": 3, "routed_scaling_factor": 1.6}, (*SOME_EXPERTS, "torchscript-looped", "torchscript-dense", "torchscript-bmm"), dims=Dims(layers=1)),
    Model("mixtral_gelu", "MixtralForCausalLM", lambda d: {**common(d), "hidden_act": "gelu", "num_local_experts": d.experts, "num_experts_per_tok": 2, "sliding_window": None}, ("torchscript-batched", "dynamo20-batched")),
    Model("mixtral_gelu_tanh", "MixtralForCausalLM", lambda d: {**common(d), "hidden_act": "gelu_pytorch_tanh", "num_local_experts": d.experts, "num_experts_per_tok": 2, "sliding_window": None}, ("torchscript-batched", "dynamo20-batched")),
    Model("gpt_oss_clamped", "GptOssForCausalLM", lambda d: {**common(d), "swiglu_limit": 1.5, "num_local_experts": d.experts, "num_experts_per_tok": 2, "sliding_window": d.window, "layer_types": layer_types(d)}, ("torchscript-batched", "dynamo20-batched", "transformers", "torchscript-looped"), attention="eager"),
    Model("aria_text", "AriaTextForCausalLM", lambda d: {**common(d), "moe_num_experts": d.experts, "moe_topk": 2, "moe_num_shared_experts": 3}, (*SOME_EXPERTS, "torchscript-looped", "torchscript-bmm")),
    Model("privacy_filter", "OpenAIPrivacyFilterModel", lambda d: {**common(d), "num_local_experts": d.experts, "num_experts_per_tok": 3, "sliding_window": d.window, "swiglu_alpha": 1.3, "swiglu_limit": 1.5}, (*SOME_EXPERTS, "torchscript-bmm"), "encoder", attention="eager"),
    Model("phi3_longrope", "Phi3ForCausalLM", lambda d: {**common(d), "hidden_size": d.width, "original_max_position_embeddings": 12, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "longrope", "short_factor": [1 + i / 100 for i in range(24)], "long_factor": [1.5 + i / 10 for i in range(24)], "original_max_position_embeddings": 12}}, ("dynamo20",)),
    Model("bert", "BertModel", wide, (*BASIC, OPTIMIZED), "encoder"),
    Model("distilbert", "DistilBertModel", lambda d: {"n_layers": d.layers, "n_heads": d.heads, "dim": d.width, "hidden_dim": d.inner, "vocab_size": d.vocab, "max_position_embeddings": d.positions}, BASIC, "encoder"),
    Model("modernbert", "ModernBertModel", lambda d: {**wide(d), "cls_token_id": 3, "sep_token_id": 4, "local_attention": d.window, "global_attn_every_n_layers": 2}, BASIC, "encoder"),
    Model("vit", "ViTModel", lambda d: {**wide(d), "image_size": 36, "patch_size": 12}, BASIC, "vision"),
    Model("clip_vision", "CLIPVisionModel", lambda d: {**wide(d), "image_size": 36, "patch_size": 12}, (*BASIC, OPTIMIZED), "vision"),
    Model("dinov3_vit", "DINOv3ViTModel", lambda d: {**wide(d), "image_size": 36, "patch_size": 12, "num_register_tokens": 2}, ("torchscript",), "vision"),
    Model("t5_encoder", "T5EncoderModel", t5, T5, "encoder"),
    Model("whisper_encoder", "WhisperForConditionalGeneration", whisper, BASIC, "audio"),
    Model("t5_decoder", "T5ForConditionalGeneration", t5, (*T5, "torchscript-prefill", "dynamo20-eager-prefill"), "cross"),
    Model("whisper_decoder", "WhisperForConditionalGeneration", whisper, CROSS, "cross"),
)
# fmt: on


# --- models with lively weights ------------------------------------------------------------------


def build(model: Model, dims: Dims, mods: Sequence[str]) -> tuple[nn.Module, dict[str, Growth]]:
    """Return the torch model and how each of its random parameters was grown."""
    torch.manual_seed(0)
    architecture = getattr(transformers, model.architecture)
    config = architecture.config_class(**model.config(dims))
    config._attn_implementation = "eager" if "eager" in mods else model.attention
    module = architecture(config)
    if "batched" in mods:
        module.set_experts_implementation("batched_mm")
    module.eval().requires_grad_(True)
    growths = liven(module)
    for mod in experts_of(mods):
        experts.swap(module, mod, growths)
    module.to(getattr(torch, narrow(mods)))
    return module, growths


def experts_of(mods: Sequence[str]) -> list[str]:
    """How a form runs its experts, if in a way of our own."""
    return [mod for mod in mods if mod in experts.FORMS]


def narrow(mods: Sequence[str]) -> str:
    """The type that a form computes in."""
    return next((NARROW[mod] for mod in mods if mod in NARROW), "float32")


def liven(module: nn.Module) -> dict[str, Growth]:
    """Give every parameter random values that matter: a dropped or swapped one shows.

    Norm weights keep the mean that the architecture gives them: 1, or 0 where it adds the 1.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    conv1d = {id(m.weight) for m in module.modules() if type(m).__name__ == "Conv1D"}
    frozen = {
        id(m.weight) for n, m in module.named_modules() if n.endswith("encoder.embed_positions")
    }
    growths = {}
    named = list(module.named_parameters())
    named += [(n, b) for n, b in module.named_buffers() if n.endswith("e_score_correction_bias")]
    for name, parameter in named:
        if id(parameter) in frozen:  # Whisper's sinusoids: a table, not a weight
            continue
        mean = 0.0
        if id(parameter) in embeddings:
            std = 1.0
        elif name.endswith("e_score_correction_bias"):  # of scores between 0 and 1
            std = 0.2
        elif parameter.ndim >= 2:
            inputs_first = id(parameter) in conv1d or "GptOss" in type(module).__name__
            if parameter.ndim == 2 and "GptOss" in type(module).__name__:
                inputs_first = False
            fan_in = parameter.shape[-2] if inputs_first else math.prod(parameter.shape[1:])
            if parameter.ndim == 3 and not inputs_first:
                fan_in = parameter.shape[-1]
            std = round(1.2 / math.sqrt(fan_in), 4)
        else:
            std = 0.2
            mean = float(bool((parameter == 1).all()))
        growth = Growth(name, mean, std, tuple(parameter.shape))
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(growth.values().copy()))
        growths[name] = growth
    return growths


# --- what is exported: a wrapper with flat inputs, and its inputs ------------------------------------


@dataclass
class Input:
    """An input of the exported model: an example, its role, and a symbol for each free axis."""

    name: str
    role: str
    shape: tuple[str | int, ...]
    dtype: str = "int64"
    value: Any = None


AXES = {
    "B": "batch_size",
    "S": "sequence_length",
    "P": "past_sequence_length",
    "P+S": "past_sequence_length + sequence_length",
    "C": "kept_sequence_length",
    "E": "encoder_sequence_length",
}


CACHES = ("past_key", "past_value", "static_key", "static_value", "cross_key", "cross_value")


class Wrapper(nn.Module):
    """Calls a transformers model with flat, positional inputs, as exports are commonly made.

    forward takes the inputs in order; those from the first past on come as one tuple.
    """

    def __init__(
        self, module: nn.Module, kind: str, mods: Sequence[str], inputs: list[Input]
    ) -> None:
        super().__init__()
        self.m = module
        self.kind = kind
        self.mods = mods
        self.names = [i.role for i in inputs if i.role not in CACHES]
        self.has_past = any(i.role == "past_key" for i in inputs)

    def forward(self, *tensors: torch.Tensor) -> Any:
        given = dict(zip(self.names, tensors, strict=False))
        past = tensors[len(self.names) :]
        pairs = list(zip(past[0::2], past[1::2], strict=True))
        return getattr(self, self.kind)(given, pairs)

    def decoder(self, given: Mapping[str, Any], pairs: list[Any]) -> Any:
        ids, mask = given["ids"], given["mask"]
        cropped = "cropped" in self.mods
        if "static" in self.mods:
            return self.static(given, pairs)
        cache = transformers.DynamicCache(**({"config": self.m.config} if cropped else {}))
        for layer, (key, value) in enumerate(pairs):
            cache.update(key, value, layer)
            if cropped and hasattr(cache.layers[layer], "cumulative_length"):
                cache.layers[layer].cumulative_length = mask.shape[1] - ids.shape[1]
        extra = {} if "positions" not in given else {"position_ids": given["positions"]}
        out = self.m(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra
        )
        if "prefill" in self.mods:
            return (out.logits,)
        return (out.logits, *(t for layer in cache.layers for t in (layer.keys, layer.values)))

    def static(self, given: Mapping[str, Any], pairs: list[Any]) -> Any:
        cache = transformers.StaticCache(config=self.m.config, max_cache_len=STATIC_LENGTH)
        for layer, (key, value) in zip(cache.layers, pairs, strict=True):
            layer.keys, layer.values = key.clone(), value.clone()
            layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
            layer.cumulative_length = given["past_length"].clone()
        out = self.m(
            input_ids=given["ids"],
            attention_mask=given["mask"],
            position_ids=given["positions"],
            past_key_values=cache,
            use_cache=True,
        )
        return (out.logits, *(t for layer in cache.layers for t in (layer.keys, layer.values)))

    def encoder(self, given: Mapping[str, Any], pairs: list[Any]) -> Any:
        types = {"token_type_ids": given["types"]} if "types" in given else {}
        out = self.m(input_ids=given["ids"], attention_mask=given["mask"], **types)
        return (out.last_hidden_state,)

    def vision(self, given: Mapping[str, Any], pairs: list[Any]) -> Any:
        out = self.m(pixel_values=given["features"])
        return (out.last_hidden_state, out.pooler_output)

    def audio(self, given: Mapping[str, Any], pairs: list[Any]) -> Any:
        return (self.m.model.encoder(given["features"]).last_hidden_state,)

    def cross(self, given: Mapping[str, Any], pairs: list[Any]) -> Any:
        cache = transformers.EncoderDecoderCache(
            transformers.DynamicCache(), transformers.DynamicCache()
        )
        layers = len(pairs) // 2
        for layer in range(layers):
            cache.self_attention_cache.update(*pairs[2 * layer], layer)
            cache.cross_attention_cache.update(*pairs[2 * layer + 1], layer)
            cache.is_updated[layer] = True
        keys = {}
        if "encoder_mask" in given and "T5" in type(self.m).__name__:
            keys["attention_mask"] = given["encoder_mask"]
        # With its cache filled, cross-attention asks nothing but the length of hidden states.
        hidden = given["features"] if "features" in given else pairs[1][0][:, 0]
        out = self.m(
            encoder_outputs=(hidden,), decoder_input_ids=given["ids"],
            past_key_values=cache, use_cache=True, **keys,
        )  # fmt: skip
        present = []
        crosses = cache.cross_attention_cache.layers
        for own, other in zip(cache.self_attention_cache.layers, crosses, strict=True):
            present += [own.keys, own.values]
            if "prefill" in self.mods:
                present += [other.keys, other.values]
        return (out.logits, *present)


def inputs_of(model: Model, dims: Dims, mods: Sequence[str], module: nn.Module) -> list[Input]:
    """List the inputs of a wrapped model, in order."""
    real = narrow(mods)
    new: str | int = 1 if "decode" in mods else "S"
    if model.kind == "vision":
        return [Input("pixel_values", "features", ("B", 3, 36, 36), real)]
    if model.kind == "audio":
        return [Input("input_features", "features", ("B", 16, 28), real)]
    if model.kind == "encoder":
        inputs = [
            Input("input_ids", "ids", ("B", "S")),
            Input("attention_mask", "mask", ("B", "S")),
        ]
        if model.name == "bert":
            inputs.append(Input("token_type_ids", "types", ("B", "S")))
        return inputs
    if model.kind == "cross":
        t5_like = model.name.startswith("t5")
        length: str | int = "E" if t5_like else 14
        inputs = [Input("input_ids", "ids", ("B", new))]
        if "prefill" in mods:
            width = dims.hidden if t5_like else dims.width
            inputs.append(Input("encoder_hidden_states", "features", ("B", length, width), real))
        if t5_like:
            inputs.append(Input("encoder_attention_mask", "encoder_mask", ("B", "E")))
        if "prefill" not in mods:
            for i in range(dims.layers):
                for which, side, over in (("decoder", "past", "P"), ("encoder", "cross", length)):
                    shape = ("B", dims.heads, over, dims.head_size)
                    for part in ("key", "value"):
                        name = f"past_key_values.{i}.{which}.{part}"
                        inputs.append(Input(name, f"{side}_{part}", shape, real))
        return inputs
    total = "S" if "prefill" in mods else "P+S"
    inputs = [Input("input_ids", "ids", ("B", new)), Input("attention_mask", "mask", ("B", total))]
    if model.name != "bloom":  # ALiBi: it takes no positions
        inputs.append(Input("position_ids", "positions", ("B", new)))
    if "prefill" in mods:
        return inputs
    if "static" in mods:
        inputs.append(Input("past_length", "past_length", ()))
        for i, (key, value) in enumerate(past_shapes(module, False)):
            for part, shape in (("key", key), ("value", value)):
                shape = (*shape[:2], STATIC_LENGTH, shape[3])
                inputs.append(Input(f"past_key_values.{i}.{part}", f"static_{part}", shape, real))
        return inputs
    for i, (key, value) in enumerate(past_shapes(module, "cropped" in mods)):
        inputs.append(Input(f"past_key_values.{i}.key", "past_key", key, real))
        inputs.append(Input(f"past_key_values.{i}.value", "past_value", value, real))
    return inputs


def past_shapes(module: nn.Module, cropped: bool) -> list[tuple[tuple[str | int, ...], ...]]:
    """Return the shapes of each layer's past key and value, as the model itself makes them."""
    cache = transformers.DynamicCache(**({"config": module.config} if cropped else {}))
    with torch.no_grad():
        module(torch.ones(1, 10, dtype=torch.int64), past_key_values=cache, use_cache=True)
    shapes = []
    for layer in cache.layers:
        length = "C" if cropped and getattr(layer, "is_sliding", False) else "P"
        shapes.append(
            tuple(("B", t.shape[1], length, t.shape[3]) for t in (layer.keys, layer.values))
        )
    return shapes


# --- exporters --------------------------------------------------------------------------------------


@dataclass
class Exported:
    """What an exporter gave, with what is known about inputs and outputs."""

    model: onnx.ModelProto
    inputs: list[Input]
    outputs: list[str]  # roles, in order
    exporter: str


def output_roles(model: Model, dims: Dims, mods: Sequence[str]) -> list[str]:
    """Name the roles of a wrapper's outputs, in order."""
    if model.kind in ("encoder", "audio"):
        return ["hidden"]
    if model.kind == "vision":
        return ["hidden", "pooled"]
    pair = ["present_key", "present_value"]
    if model.kind == "decoder":
        return ["logits", *([] if "prefill" in mods else pair * dims.layers)]
    if "prefill" in mods:
        pair = [*pair, "cross_present_key", "cross_present_value"]
    return ["logits", *pair * dims.layers]


def output_names(model: Model, roles: Sequence[str]) -> list[str]:
    """Name the outputs as is commonly done: `present.0.key`, `present.0.encoder.value`."""
    names, counts = [], {}
    plain = {"hidden": "last_hidden_state", "pooled": "pooler_output", "logits": "logits"}
    for role in roles:
        if role in plain:
            names.append(plain[role])
            continue
        layer = counts[role] = counts.get(role, -1) + 1
        part = role.rsplit("_", 1)[1]
        side = "" if model.kind == "decoder" else "encoder." if "cross" in role else "decoder."
        names.append(f"present.{layer}.{side}{part}")
    return names


def example(inputs: list[Input], dims: Dims, sizes: tuple[int, int, int]) -> list[torch.Tensor]:
    """Make example tensors by the same code that feeds the stored model."""
    feeds = testing.make_feeds({"dims": feed_dims(dims), "inputs": described(inputs)}, *sizes)
    return [tensor_of(feeds[i.name]) for i in inputs]


def tensor_of(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """The array for torch, which knows no bfloat16 of NumPy's."""
    narrow = array.dtype.name == "bfloat16"
    tensor = torch.from_numpy(np.ascontiguousarray(array.astype(np.float32) if narrow else array))
    return tensor.bfloat16() if narrow else tensor


def feed_dims(dims: Dims) -> dict[str, int]:
    return dataclasses.asdict(dims)


def described(inputs: list[Input]) -> dict[str, Any]:
    """Describe inputs as they are stored in a model's metadata."""
    entries = {}
    for i in inputs:
        entries[i.name] = {"role": i.role, "shape": list(i.shape), "dtype": i.dtype}
        if i.value is not None:
            entries[i.name]["value"] = i.value
    return entries


def by_torch(
    model: Model, dims: Dims, mods: Sequence[str], module: nn.Module, exporter: str
) -> Exported:
    """Export a wrapped model with torch.onnx.export, by TorchScript or by torch.export."""
    inputs = inputs_of(model, dims, mods, module)
    wrapper = Wrapper(module, model.kind, mods, inputs).eval()
    tensors = tuple(example(inputs, dims, TRACED))
    roles = output_roles(model, dims, mods)
    names = {"input_names": [i.name for i in inputs], "output_names": output_names(model, roles)}
    buffer = io.BytesIO()
    if exporter == "torchscript":
        axes = {
            i.name: {a: AXES[s] for a, s in enumerate(i.shape) if isinstance(s, str)}
            for i in inputs
        }
        cropped = any("C" in i.shape for i in inputs)
        for name, role in zip(names["output_names"], roles, strict=True):
            axes[name] = {0: "batch_size"}
            if role == "logits" or (role == "hidden" and model.kind == "encoder"):
                axes[name][1] = AXES["S"]
            elif "present" in role:
                length = "E" if "cross" in role else "S" if "prefill" in mods else "P+S"
                if "static" not in mods:
                    axes[name][2] = f"{name}_length" if cropped else AXES[length]
        torch.onnx.export(
            wrapper, tensors, buffer, dynamo=False, opset_version=17, dynamic_axes=axes, **names
        )
        proto = onnx.load_from_string(buffer.getvalue())
        taken = {value.name for value in proto.graph.input}  # it drops what it does not read
        return Exported(proto, [i for i in inputs if i.name in taken], roles, "torchscript")
    free = torch.export.Dim.DYNAMIC
    # A cropped layer's length is compared with the window while tracing, which fixes it.
    shapes = tuple(
        {a: free for a, s in enumerate(i.shape) if isinstance(s, str) and s != "C"} for i in inputs
    )
    if any("C" in i.shape for i in inputs):
        inputs = [
            dataclasses.replace(i, shape=tuple(dims.window - 1 if s == "C" else s for s in i.shape))
            for i in inputs
        ]
    opset = {} if exporter == "dynamo20" else {"opset_version": int(exporter[-2:])}
    program = torch.onnx.export(
        wrapper, tensors, dynamo=True, dynamic_shapes=(shapes,), verbose=False, **opset, **names
    )
    return Exported(program.model_proto, inputs, roles, "torch.onnx.export(dynamo=True)")


def sliding_static(model: Model, mods: Sequence[str]) -> bool:
    """Whether layers keep a static cache that is as long as their window."""
    return "static" in mods and model.forms is CROPPED


def by_transformers(
    model: Model, dims: Dims, mods: Sequence[str], module: nn.Module, exporter: str
) -> Exported:
    """Export a model with transformers' OnnxExporter, every axis free."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    batch, new, past = TRACED
    new = 1 if "decode" in mods else new
    past = 3 if "sliding" in mods else past  # a longer one is cropped to the window at once
    if sliding_static(model, mods):  # more than the window would be cropped to it at once
        new, past = 2, 3
    flat = inputs_of(model, dims, [mod for mod in mods if mod != "static"], module)
    values = dict(zip([i.name for i in flat], example(flat, dims, (batch, new, past)), strict=True))
    if model.kind == "decoder":
        sample: dict[str, Any] = {k: values[k] for k in ("input_ids", "attention_mask")}
        if "static" in mods:
            cache: Any = transformers.StaticCache(config=module.config, max_cache_len=STATIC_LENGTH)
            shape = (batch, dims.kv_heads, past, dims.head_size)
            key = next(v for n, v in values.items() if n.endswith("0.key"))
            cache.early_initialization(batch, shape[1], shape[3], key.dtype, torch.device("cpu"))
        else:
            config = {"config": module.config} if "sliding" in mods else {}
            cache = transformers.DynamicCache(**config)
        for i in range(dims.layers):
            pair = [values[f"past_key_values.{i}.{part}"] for part in ("key", "value")]
            cache.update(*pair, i)
        sample["past_key_values"] = cache
    elif model.kind == "cross":
        caches = [transformers.DynamicCache(), transformers.DynamicCache()]
        pairs = [v for n, v in values.items() if n.startswith("past_key_values")]
        for i in range(dims.layers):
            for which, cache in enumerate(caches):
                cache.update(*pairs[4 * i + 2 * which : 4 * i + 2 * which + 2], i)
        both = transformers.EncoderDecoderCache(*caches)
        both.is_updated = dict.fromkeys(range(dims.layers), True)
        hidden = torch.zeros(batch, pairs[2].shape[2], module.config.d_model)
        sample = {
            "decoder_input_ids": values["input_ids"],
            "encoder_outputs": transformers.modeling_outputs.BaseModelOutput(hidden),
            "past_key_values": both,
        }
        if "encoder_attention_mask" in values:
            sample["attention_mask"] = values["encoder_attention_mask"]
    else:
        sample = values
    target: Any = module.model.encoder if model.kind == "audio" else module
    fusions = "cpu" if "ortfused" in mods else None
    config = OnnxConfig(dynamic=True, ort_fusions=fusions)
    exported = OnnxExporter().export(target, sample, config=config)
    proto = onnx_ir.to_proto(exported.program)
    real = narrow(mods)
    past_at = {i.name: i for i in flat}
    inputs = []
    for value in proto.graph.input:
        name = value.name
        fixed = [  # some fixed sizes are symbols whose name is a number
            d.dim_value or int(d.dim_param if d.dim_param.isdigit() else 0)
            for d in value.type.tensor_type.shape.dim
        ]
        number = re.search(r"\.(\d+)\.", name)
        layer = int(number[1]) if number else 0
        part = {"keys": "key", "values": "value"}.get(name.rsplit(".", 1)[-1])
        if model.kind == "cross" and not part:
            shape = past_at["input_ids"].shape
            if name.endswith("last_hidden_state"):  # read for its length
                length = past_at["past_key_values.0.encoder.key"].shape[2]
                inputs.append(Input(name, "features", ("B", length, fixed[2]), real))
            else:
                old = "input_ids" if "ids" in name else "encoder_attention_mask"
                inputs.append(dataclasses.replace(past_at[old], name=name))
        elif model.kind == "cross":
            side = "encoder" if "cross_attention" in name else "decoder"
            like = past_at[f"past_key_values.{layer}.{side}.{part}"]
            inputs.append(dataclasses.replace(like, name=name))
        elif name.split(".")[-1] in past_at:
            inputs.append(dataclasses.replace(past_at[name.split(".")[-1]], name=name))
        elif part and "static" in mods:
            shape: tuple[str | int, ...] = ("B", dims.kv_heads, fixed[2], dims.head_size)
            inputs.append(Input(name, f"static_{part}", shape, real))
        elif part:
            like = past_at[f"past_key_values.{layer}.{part}"]
            inputs.append(dataclasses.replace(like, name=name))
        elif name.endswith("cumulative_length"):
            inputs.append(Input(name, "past_length", tuple(fixed)))
        elif name.endswith("_sliding_window_tensor"):
            inputs.append(Input(name, "constant", tuple(fixed), value=dims.window))
        else:
            raise RuntimeError(f"input {name!r} {fixed} of the transformers exporter is unknown")
    roles = []
    for value in proto.graph.output:
        end = value.name.rsplit(".", 1)[-1]
        if "cross_attention" in value.name:
            roles.append(f"cross_present_{end.removesuffix('s')}")
            continue
        roles.append(
            {"keys": "present_key", "values": "present_value", "logits": "logits",
             "last_hidden_state": "hidden", "pooler_output": "pooled"}.get(end, "other")
        )  # fmt: skip
    return Exported(proto, inputs, roles, "transformers OnnxExporter(dynamic=True)")


def by_builder(
    model: Model, dims: Dims, mods: Sequence[str], module: nn.Module, exporter: str
) -> Exported:
    """Build a decoder with onnxruntime-genai's model builder, fp32 for CPU."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "source", Path(folder) / "built"
        module.save_pretrained(source)
        words = WordLevel({f"t{i}": i for i in range(dims.vocab)}, unk_token="t0")
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(words), unk_token="t0", bos_token="t1", eos_token="t2"
        ).save_pretrained(source)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32"]
        command += ["-e", "cpu", "-i", str(source), "-o", str(built), "-c", str(Path(folder) / "c")]
        subprocess.run(command, check=True, capture_output=True)
        proto = onnx.load(built / "model.onnx")
    known = {i.name: i for i in inputs_of(model, dims, mods, module)}
    inputs = [known[value.name] for value in proto.graph.input]
    roles = ["logits"]
    roles += [f"present_{value.name.rsplit('.', 1)[-1]}" for value in proto.graph.output[1:]]
    return Exported(proto, inputs, roles, "onnxruntime-genai's model builder")


def optimized(exported: Exported, model: Model) -> Exported:
    """What ONNX Runtime's transformers optimizer makes of an export."""
    from onnxruntime.transformers.optimizer import optimize_model

    kinds = {"encoder": "bert", "decoder": "gpt2", "vision": "clip"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(exported.model, path)
        fused = optimize_model(str(path), model_type=kinds[model.kind])
    return dataclasses.replace(
        exported, model=fused.model, exporter=f"{exported.exporter}, onnxruntime.transformers"
    )


# --- storing ----------------------------------------------------------------------------------------


class Weights:
    """Recognises random weights by their values, whatever the exporter did to their shape."""

    def __init__(self, growths: Mapping[str, Growth], dtype: str) -> None:
        self.dtype = dtype
        self.alike: list[str] = []  # grown like the original, but not equal to it
        self.by_values: dict[bytes, list[tuple[Growth, np.ndarray[Any, Any]]]] = {}
        everything = []
        for growth in growths.values():
            values = growth.values().astype(np.dtype(dtype)).astype(np.float32)
            self.by_values.setdefault(self._key(values), []).append((growth, values))
            everything.append(values.ravel())
            if values.ndim == 1 and not growth.mean:  # Gemma's norms, with the 1 folded in
                folded = values + np.float32(1)
                plus_one = dataclasses.replace(growth, mean=1.0)
                self.by_values.setdefault(self._key(folded), []).append((plus_one, folded))
        self.everything = np.unique(np.concatenate(everything))

    @staticmethod
    def _key(values: np.ndarray[Any, Any]) -> bytes:
        return np.sort(values, axis=None).tobytes()

    def growth_of(self, values: np.ndarray[Any, Any], name: str) -> Growth | None:
        """Return how to grow a constant, or None where it is no random weight."""
        if values.dtype.name not in ("float32", *NARROW.values()) or not values.size:
            return None
        stored_in, values = values.dtype.name, values.astype(np.float32)
        for growth, drawn in self.by_values.get(self._key(values), ()):
            for axes in itertools.permutations(range(drawn.ndim)):
                seen = drawn.transpose(axes)
                if np.array_equal(seen.ravel(), values.ravel()):
                    if stored_in != self.dtype:  # a cast folded in: it grows without rounding
                        self.alike.append(name)
                    identity = axes == tuple(range(drawn.ndim))
                    return dataclasses.replace(growth, axes=() if identity else axes)
        # A slice or a concatenation: as many numbers, drawn alike.
        known = np.isin(values, self.everything).mean()
        if values.size >= 8 and known > 0.999:
            mean, std = (float(f"{v:.2g}") for v in (values.mean(), values.std()))
            self.alike.append(name)
            return Growth(name, mean if abs(mean) > 0.5 else 0.0, std, values.shape)
        return None


def strip(model: onnx.ModelProto, weights: Weights) -> list[str]:
    """Leave random weights out of a model, in place; return the large constants that were kept."""
    kept = []
    for name, tensor in named_tensors(model):
        if tensor.data_type not in FLOATS:
            continue
        values = numpy_helper.to_array(tensor)
        growth = weights.growth_of(values, name)
        if growth is None:
            if values.nbytes > 1024:
                kept.append(f"{name} {list(values.shape)} std {values.std():.3g}")
            continue
        for data in ("raw_data", "float_data", "int32_data"):
            tensor.ClearField(data)
        tensor.metadata_props.add(key=GROW, value=str(growth))
    return kept


def named_tensors(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Yield every tensor with a name that is its own."""
    names = {id(t): t.name for t in model.graph.initializer}
    stack = [*model.graph.node]
    for node in stack:
        for attribute in node.attribute:
            names[id(attribute.t)] = node.output[0] if node.output else node.name
    for tensor in testing.tensors(model):
        yield names.get(id(tensor)) or tensor.name, tensor


def tidy_metadata(model: onnx.ModelProto) -> None:
    """Drop what is bulky and says nothing about the graph: stack traces, FX dumps, file names."""

    def keep(props: Any) -> None:
        kept = [(p.key, p.value) for p in props if p.key in KEPT_METADATA]
        del props[:]
        for key, value in kept:
            props.add(key=key, value=value)

    def visit(graph: onnx.GraphProto) -> None:
        del graph.metadata_props[:]
        for value in (*graph.value_info, *graph.input, *graph.output):
            del value.metadata_props[:]
            value.doc_string = ""
        for tensor in graph.initializer:
            del tensor.metadata_props[:]
        for node in graph.node:
            node.doc_string = ""
            keep(node.metadata_props)
            for attribute in node.attribute:
                attribute.doc_string = ""
                if attribute.type == onnx.AttributeProto.GRAPH:
                    visit(attribute.g)

    visit(model.graph)
    for function in model.functions:
        for node in function.node:
            keep(node.metadata_props)
    del model.metadata_props[:]


def compress(model: onnx.ModelProto) -> bytes:
    """Serialise canonically and compress."""
    data = model.SerializeToString(deterministic=True)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    return lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters)


# --- checking what was exported ----------------------------------------------------------------------


def session_of(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A session; of a model that holds bfloat16, its float32 twin's."""
    as_ir = onnx_ir.from_proto(model)
    if unrunnable_types(as_ir):
        widen(as_ir, BFLOAT16)
        model = onnx_ir.to_proto(as_ir)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def probe(
    model: Model, dims: Dims, mods: Sequence[str], module: nn.Module,
    exported: Exported, proto: onnx.ModelProto, info: dict[str, Any],
) -> None:  # fmt: skip
    """Run the exported model at several sizes, compare with torch, and record where it holds."""
    session = session_of(proto)
    mods = [mod for mod in mods if mod != "static"]  # torch runs with a cache that grows
    static = any("static" in i.role for i in exported.inputs)
    allowed = 2e-4 if narrow(mods) == "float32" else 2e-2
    if "bf16" in mods:  # the twin computes in float32; weights and constants are rounded
        module, mods = module.float(), [mod for mod in mods if mod != "bf16"]
    if experts_of(mods):  # it must say what the model's own code says
        module.set_experts_implementation("eager")
    flat = inputs_of(model, dims, mods, module)
    wrapper = Wrapper(module, model.kind, mods, flat).eval()
    info["runs"], info["fails"] = [], {}
    for batch, new, past in dict.fromkeys(sizes_of(model, mods)):
        feeds = testing.make_feeds(info, batch, new, past)
        key = f"{batch},{new},{past}"
        try:
            feeds = {name: widened(array) for name, array in feeds.items()}
            got = session.run(None, feeds)
        except Exception as error:
            info["fails"][key] = short(error)
            continue
        want = reference(wrapper, flat, info, feeds, past)
        worst = 0.0
        for role, values in grouped(output_roles(model, dims, mods), want).items():
            for a, b in zip(grouped(exported.outputs, got)[role], values, strict=True):
                if static and role != "logits":  # the rest was not written
                    a = a[:, :, : past + new]
                scale = max(1.0, float(np.abs(b).max()))
                same = a.shape == b.shape
                worst = max(worst, float(np.abs(a - b).max()) / scale if same else math.inf)
        if worst <= allowed:
            info["runs"].append([batch, new, past])
        else:
            info["fails"][key] = f"differs from torch by {worst:.2g}, relative to the largest value"
    if not info["runs"]:
        raise RuntimeError(f"exported, but runs nowhere: {info['fails']}")


def sizes_of(model: Model, mods: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    for batch, new, past in (*PROBES, *(MORE_PAST if "cropped" in mods else ())):
        no_past = model.kind not in ("decoder", "cross") or "prefill" in mods
        fixed = model.kind in ("vision", "audio")
        yield batch, (1 if "decode" in mods or fixed else new), (0 if no_past else past)


def grouped(roles: Sequence[str], values: Sequence[Any]) -> dict[str, list[Any]]:
    """Group outputs by role, in order of layers; float32."""
    groups: dict[str, list[Any]] = {}
    for role, value in zip(roles, values, strict=True):
        groups.setdefault(role, []).append(np.asarray(value, np.float32))
    return groups


def reference(
    wrapper: nn.Module, flat: list[Input],
    info: Mapping[str, Any], feeds: Mapping[str, Any], past: int,
) -> list[np.ndarray[Any, Any]]:  # fmt: skip
    """Run torch on the feeds of an exported model; the outputs in the wrapper's order."""
    # Feeds come in the wrapper's order but for the transformers exporter, which has no positions.
    by_role: dict[str, list[Any]] = {}
    for name, entry in info["inputs"].items():
        role = entry["role"].replace("static_", "past_")
        value = feeds[name][:, :, :past] if "static" in entry["role"] else feeds[name]
        by_role.setdefault(role, []).append(value)
    tensors = []
    for i in flat:
        if i.role == "positions" and i.role not in by_role:
            ids = by_role["ids"][0]
            tensors.append(np.broadcast_to(np.arange(past, past + ids.shape[1]), ids.shape).copy())
        else:
            tensors.append(by_role[i.role].pop(0) if "_" in i.role else by_role[i.role][0])
    with torch.no_grad():
        out = wrapper(*map(tensor_of, tensors))
    return [t.float().numpy() for t in out]


def short(error: BaseException) -> str:
    """An error's message on one line of at most 200 characters, without paths."""
    text = re.sub(r"/\S+/", "", str(error) or type(error).__name__)
    text = re.sub(r"\x1b\[\d+m", "", re.sub(r"\s+", " ", text)).strip()
    text = re.sub(r"^(Failed to .*?\[ONNXRuntimeError\]|\[ONNXRuntimeError\] : \d+ : )", "", text)
    text = re.sub(r"Non-zero status code returned while running (\w+) node\.", r"\1", text)
    text = re.sub(r"Status Message: (\S+:\d+ \S+ \S+\(.*?\) )?", "", text)
    return text if len(text) <= 200 else text[:197] + "..."


def save_checkpoint(model: Model, dims: Dims, folder: Path) -> None:
    """Save a model as tools that start from weights read it: config, weights, some tokenizer."""
    import tokenizers

    words = {f"w{i}": i for i in range(dims.vocab)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    with quiet():
        build(model, dims, ())[0].save_pretrained(folder)
        transformers.PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(folder)


# --- one cell ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def export(model: Model, form: str, dims: Dims) -> tuple[onnx.ModelProto, list[str]]:
    """Export one form of a model, without its random weights; and the large constants kept."""
    proto, module, growths, exported = export_full(model, form, dims)
    mods = form.split("-")[1:]
    tidy_metadata(proto)
    original = onnx.ModelProto()
    original.CopyFrom(proto)
    weights = Weights(growths, narrow(mods))
    kept = strip(proto, weights)
    info = {
        "model": model.name,
        "form": form,
        "kind": model.kind,
        "exporter": exported.exporter,
        "attention": module.config._attn_implementation,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "opset": next(o.version for o in proto.opset_import if o.domain == ""),
        "dims": feed_dims(dims),
        "inputs": described(exported.inputs),
        "outputs": {
            v.name: {"role": r} for v, r in zip(proto.graph.output, exported.outputs, strict=True)
        },
    }
    grown = onnx.ModelProto()
    grown.CopyFrom(proto)
    with quiet():
        probe(model, dims, mods, module, exported, original, info)
    feeds = testing.make_feeds(info, *info["runs"][0])
    feeds = {name: widened(array) for name, array in feeds.items()}
    want, got = (session_of(m).run(None, feeds)[0] for m in (original, testing.grow(grown)))
    if not np.isfinite(got).all() or not (weights.alike or np.allclose(want, got, atol=1e-3)):
        raise RuntimeError("the grown model differs from the exported one")
    kept += [f"alike: {name}" for name in weights.alike]
    proto.metadata_props.add(key=CORPUS, value=json.dumps(info, separators=(",", ":")))
    return proto, kept


def recheck(model: Model, form: str, path: Path) -> onnx.ModelProto:
    """Run a stored export against torch again, and return it with what was found."""
    entry = testing.CorpusEntry(model.name, form, path)
    mods = form.split("-")[1:]
    dims = Dims(**entry.info["dims"])
    proto, info = testing.read_stored(path), dict(entry.info)
    inputs = [
        Input(name, i["role"], tuple(i["shape"]), i["dtype"], i.get("value"))
        for name, i in info["inputs"].items()
    ]
    roles = [o["role"] for o in info["outputs"].values()]
    with quiet():
        module, _ = build(model, dims, mods)
        exported = Exported(proto, inputs, roles, info["exporter"])
        probe(model, dims, mods, module, exported, entry.load(), info)
    del proto.metadata_props[:]
    proto.metadata_props.add(key=CORPUS, value=json.dumps(info, separators=(",", ":")))
    return proto


def export_full(
    model: Model, form: str, dims: Dims
) -> tuple[onnx.ModelProto, nn.Module, dict[str, Growth], Exported]:
    """Export one form of a model with its weights."""
    exporter, *mods = form.split("-")
    with quiet():
        module, growths = build(model, dims, mods)
        export_with = {"transformers": by_transformers, "builder": by_builder}.get(
            exporter, by_torch
        )
        with unsqueezed() if "unsqueezed" in mods else contextlib.nullcontext():
            exported = export_with(model, dims, mods, module, exporter)
        if "optimized" in mods:
            exported = optimized(exported, model)
    return exported.model, module, growths, exported


@contextlib.contextmanager
def unsqueezed() -> Iterator[None]:
    """Let Llama 4 unsqueeze its complex rotary table, where `[:, :, None]` is in no exporter."""
    from transformers.models.llama4 import modeling_llama4

    def apply(
        query: torch.Tensor, key: torch.Tensor, table: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        pairs = [torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) for x in (query, key)]
        return tuple(torch.view_as_real(x * table.unsqueeze(2)).flatten(3) for x in pairs)

    with mock.patch.object(modeling_llama4, "apply_rotary_emb", apply):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", default="*", help="shell pattern over model/form")
    parser.add_argument("--missing", action="store_true", help="skip what is stored already")
    parser.add_argument("--recheck", action="store_true", help="only run stored ones again")
    parser.add_argument("--list", action="store_true", help="list the cells and end")
    parser.add_argument("--readme", action="store_true", help="write README.md and end")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    parser.add_argument("--model", help="one model, with --form and -o")
    parser.add_argument("--form", default="dynamo20")
    parser.add_argument("-o", dest="file", type=Path, help="the file to write for --model")
    parser.add_argument("--full", action="store_true", help="a plain .onnx, weights kept in")
    parser.add_argument(
        "--checkpoint", type=Path, help="folder for --model as transformers saves it"
    )
    for dim in dataclasses.fields(Dims):
        flag = "--" + dim.name.replace("_", "-")
        parser.add_argument(flag, type=int, default=None, dest=f"dim_{dim.name}")
    options = parser.parse_args()
    changed = {k[4:]: v for k, v in vars(options).items() if k.startswith("dim_") and v is not None}

    if options.readme:
        write_readme(options.out)
        return
    if options.model:
        model = next(m for m in MODELS if m.name == options.model)
        dims = dataclasses.replace(model.dims, **changed)
        if options.checkpoint:
            save_checkpoint(model, dims, options.checkpoint)
            return
        if options.full:
            proto, _, _, exported = export_full(model, options.form, dims)
            info = {
                "kind": model.kind,
                "dims": feed_dims(dims),
                "inputs": described(exported.inputs),
            }
            proto.metadata_props.add(key=CORPUS, value=json.dumps(info))
            onnx.save(proto, options.file)
        else:
            options.file.write_bytes(compress(export(model, options.form, dims)[0]))
        print(f"{options.file}: {options.file.stat().st_size:,} bytes")
        return

    cells = {f"{model.name}/{form}" for model in MODELS for form in model.forms}
    failures = json.loads(FAILURES.read_text()) if FAILURES.exists() else {}
    failures = {cell: why for cell, why in failures.items() if cell in cells}
    for model in MODELS:
        for form in model.forms:
            cell = f"{model.name}/{form}"
            path = options.out / f"{cell}.onnx.xz"
            if not fnmatch.fnmatchcase(cell, options.only):
                continue
            if options.missing and (path.exists() or cell in failures):
                continue
            if options.recheck and not path.exists():
                continue
            if options.list:
                print(cell)
                continue
            start = time.time()
            try:
                dims = dataclasses.replace(model.dims, **changed)
                if options.recheck:
                    proto, kept = recheck(model, form, path), []
                else:
                    proto, kept = export(model, form, dims)
            except Exception as error:
                cause: BaseException = error  # exporters wrap the cause in advice
                while cause.__cause__ is not None:
                    cause = cause.__cause__
                failures[cell] = f"{type(cause).__name__}: {short(cause)}"
                print(f"{cell}: FAILED {failures[cell]}", flush=True)
                traceback.print_exc(limit=-4, file=sys.stderr)
            else:
                failures.pop(cell, None)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(compress(proto))
                info = testing._info(proto)
                print(
                    f"{cell}: {path.stat().st_size:,} bytes, {len(proto.graph.node)} nodes, "
                    f"{time.time() - start:.0f} s, runs {len(info['runs'])}, "
                    f"fails {info['fails']}, kept {kept}",
                    flush=True,
                )
            if options.out == HERE:
                FAILURES.write_text(json.dumps(dict(sorted(failures.items())), indent=1) + "\n")


ABOUT = """# Exported models

Graphs that real exporters wrote, from transformers *configurations* with random weights. Written by
`export.py`, which also wrote this page (`python tests/corpus/export.py --readme`).

    from onnxgen.testing import corpus
    for entry in corpus("llama/*"):
        model, feeds = entry.load(), entry.feeds(batch=2, new=4, past=3)

- Random weights are left out of the files and grown from a seed when loaded; all forms of a model
  grow the same weights. Everything else is as the exporter wrote it, but stack traces.
- Dims differ pairwise: {dims}.
  GPT-like models, whose hidden size must be heads times head size, take {width}.
- A form is an exporter and what is special: `torchscript` is `torch.onnx.export(dynamo=False)` at
  opset 17; `dynamo18`, `dynamo20` (its default) and `dynamo23` are `dynamo=True`; `transformers` is
  `OnnxExporter(dynamic=True)`; `builder` is onnxruntime-genai's, in fp32 for CPU. `-eager`
  attention, `-decode` one new token, `-static` a StaticCache of {static}, and of the window for
  layers that have one, `-prefill` no past, `-fp16`, `-bf16`, `-cropped` a cache whose sliding
  layers keep W-1 tokens,
  `-sliding` such a cache as transformers' exporter takes it: not cropped, the window an input,
  `-optimized` by onnxruntime.transformers' optimizer.
- Experts: `-batched` by `batched_mm`, their weights gathered for each token; without it the
  transformers exporter writes one branch for each expert, and the others fail. `-looped`, `-dense`
  and `-bmm` are how older and other code runs them, written anew in `experts.py` and compared with
  the model's own code.
- `-unsqueezed`: Llama 4's rotary table indexed in a way that the exporter takes.
- Decoders of encoder-decoders take both caches; their `-prefill` makes both.
- Each export was run by ONNX Runtime at several sizes and compared with torch, on the same weights.
  Where it agrees stands in its metadata (`onnxgen.corpus`: `runs`, `fails`).
- A new model is one line in `MODELS`, then `python tests/corpus/export.py --only 'name/*'`, which
  needs the extra `corpus`.
- A large one, for benchmarks: `python tests/corpus/export.py --model qwen3 --form dynamo20
  --layers 32 --full -o big.onnx`.
"""


def write_readme(folder: Path) -> None:
    """Write README.md: what is stored, how large, where it runs, and what could not be exported."""
    entries = testing.corpus(folder=folder)
    dims = ", ".join(f"{k} {v}" for k, v in feed_dims(Dims()).items())
    lines = [ABOUT.format(dims=dims, width=Dims().width, static=STATIC_LENGTH)]
    total = sum(e.path.stat().st_size for e in entries)
    versions = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    lines += [f"## Stored\n\n{len(entries)} exports, {total:,} bytes. {versions}.\n"]
    lines += ["| export | opset | nodes | bytes |", "|---|---|---|---|"]
    for e in entries:
        size, nodes = e.path.stat().st_size, len(e.stored.graph.node)
        lines.append(f"| {e.name} | {e.info['opset']} | {nodes} | {size:,} |")
    lines += ["\n## Stored, but not general\n"]
    lines += ["Sizes are batch,new,past.\n", "| export | runs | fails |", "|---|---|---|"]
    for e in entries:
        if e.info["fails"]:
            runs = " ".join(",".join(map(str, r)) for r in e.info["runs"])
            fails = "; ".join(f"{k}: {escape(v)}" for k, v in e.info["fails"].items())
            lines.append(f"| {e.name} | {runs} | {fails} |")
    lines += ["\n## Not exported\n", "| export | error |", "|---|---|"]
    lines += [f"| {k} | {escape(v)} |" for k, v in json.loads(FAILURES.read_text()).items()]
    README.write_text("\n".join(lines) + "\n")


def escape(text: str) -> str:
    """Make a message safe inside a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
