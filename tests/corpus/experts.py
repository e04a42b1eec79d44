"""Other ways to run experts, in the words of transformers' experts interface.

Transformers 5 writes experts batched or grouped. Older versions, and other code, wrote loops over
experts that are modules of their own, or ran every expert on every token. These are such forms:

- `looped`: for each expert, pick its tokens by `torch.where`, run it, `index_add_` its outputs;
  gate and up projections apart (Mixtral, Qwen-MoE and DeepSeek until transformers 4);
- `dense`: a sum over all experts of its output times the token's weight for it, zero where it was
  not chosen; gate and up in one;
- `bmm`: the same in one batched product over [E,T,H] (GPT-OSS in transformers 4, DBRX).

Shapes: T tokens, K chosen experts per token, E experts, H hidden, I inner.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.integrations import moe

from onnxgen.testing import Growth


class Expert(nn.Module):
    """One expert with weights of its own, copied out of the stacked ones.

    Args:
        stacked: a transformers experts module: `gate_up_proj` [E,2I,H], or [E,H,2I] if
            `is_transposed`, or without a gate `up_proj` [E,I,H]; `down_proj` likewise; biases
            [E,2I] and [E,H] if `has_bias`.
        which: which of its experts.
        apart: gate and up as two layers, unless the gate is a formula of the model's own.
    """

    def __init__(self, stacked: Any, which: int, apart: bool) -> None:
        super().__init__()
        self.parts: dict[str, tuple[str, str]] = {}  # own parameter: stacked one, its part
        self.act_fn: Any = getattr(stacked, "act_fn", None)
        self.apply_gate = stacked._apply_gate
        self.gated = stacked.has_gate
        plain = type(stacked)._apply_gate is moe._default_apply_gate
        self.apart = apart and self.gated and plain
        inner = stacked.down_proj.shape[1 if stacked.is_transposed else 2]
        if self.apart:
            self.add("gate_proj", stacked, "gate_up_proj", which, f":{inner}")
            self.add("up_proj", stacked, "gate_up_proj", which, f"{inner}:")
        else:
            name = "gate_up_proj" if self.gated else "up_proj"
            self.add(name, stacked, name, which, ":")
        self.add("down_proj", stacked, "down_proj", which, ":")

    def add(self, name: str, stacked: Any, source: str, which: int, rows: str) -> None:
        weight = f"{which},:,{rows}" if stacked.is_transposed else f"{which},{rows}"
        self.parts[f"{name}.weight"] = source, weight
        taken = getattr(stacked, source)[Growth.indices(weight)]
        taken = taken.T if stacked.is_transposed else taken
        linear = nn.Linear(taken.shape[1], taken.shape[0], bias=stacked.has_bias)
        with torch.no_grad():
            linear.weight.copy_(taken)
            if stacked.has_bias:
                bias = f"{which},{rows}"
                self.parts[f"{name}.bias"] = f"{source}_bias", bias
                linear.bias.copy_(getattr(stacked, f"{source}_bias")[Growth.indices(bias)])
        setattr(self, name, linear)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T,H] → [T,H]."""
        if self.apart:
            hidden = self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden)
        elif self.gated:
            hidden = self.apply_gate(self.gate_up_proj(hidden))
        else:
            hidden = self.act_fn(self.up_proj(hidden))
        return self.down_proj(hidden)


def looped(
    self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Run each expert on its tokens; hidden [T,H], index and weights [T,K] → [T,H]."""
    out = torch.zeros_like(hidden)
    mask = functional.one_hot(index, self.num_experts).permute(2, 1, 0)
    for which, expert in enumerate(self.each):
        slot, token = torch.where(mask[which])
        states = expert(hidden[token]) * weights[token, slot, None]
        out.index_add_(0, token, states.to(hidden.dtype))
    return out


def dense(
    self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Run each expert on every token; hidden [T,H], index and weights [T,K] → [T,H]."""
    out = torch.zeros_like(hidden)
    for which, expert in enumerate(self.each):
        out = out + expert(hidden) * (weights * (index == which)).sum(-1, keepdim=True)
    return out


def bmm(
    self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Run all experts on every token at once; hidden [T,H], index and weights [T,K] → [T,H]."""
    experts, tokens = self.num_experts, hidden.shape[0]
    spread = torch.zeros(tokens, experts, dtype=weights.dtype).scatter(1, index, weights)
    states = hidden.repeat(experts, 1).view(experts, tokens, -1)
    if self.has_gate:
        states = self._apply_gate(_product(self, states, "gate_up_proj"))
    else:
        states = self.act_fn(_product(self, states, "up_proj"))
    states = _product(self, states, "down_proj")
    return (states * spread.transpose(0, 1).unsqueeze(-1)).sum(dim=0).to(hidden.dtype)


def _product(self: Any, states: torch.Tensor, name: str) -> torch.Tensor:
    weight = getattr(self, name)
    out = torch.bmm(states, weight if self.is_transposed else weight.transpose(1, 2))
    return out + getattr(self, f"{name}_bias")[:, None] if self.has_bias else out


FORMS: Mapping[str, Callable[..., torch.Tensor]] = {"looped": looped, "dense": dense, "bmm": bmm}


def swap(module: Any, form: str, growths: dict[str, Growth]) -> None:
    """Let every stack of experts run as `form`, in place; add how its new parameters are grown."""
    moe.ALL_EXPERTS_FUNCTIONS.register(form, FORMS[form])
    module.set_experts_implementation(form)
    for path, stacked in list(module.named_modules()):
        if form == "bmm" or not hasattr(stacked, "is_concatenated"):
            continue
        each = [Expert(stacked, e, form == "looped") for e in range(stacked.num_experts)]
        stacked.each = nn.ModuleList(each)
        for which, expert in enumerate(each):
            for own, (source, part) in expert.parts.items():
                whole = growths[f"{path}.{source}"]
                growths[f"{path}.each.{which}.{own}"] = dataclasses.replace(whole, part=part)
