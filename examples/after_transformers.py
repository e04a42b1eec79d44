"""Fuse what transformers' own exporter makes of a decoder with its cache.

python examples/after_transformers.py            # needs torch and transformers, no download
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

import onnxgen


def main() -> None:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()  # or from_pretrained(...)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(2, 2, 7, 12), torch.randn(2, 2, 7, 12), layer)
    inputs = {
        "input_ids": torch.randint(0, 96, (2, 5)),
        "attention_mask": torch.ones(2, 12, dtype=torch.int64),
        "past_key_values": cache,
    }

    exported = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True))
    result = onnxgen.fuse(exported.program, target="onnx")
    result.save("llama.onnx")
    print(result)

    paged = onnxgen.to_paged(exported.program, verify="quick")
    print(paged)


if __name__ == "__main__":
    main()
