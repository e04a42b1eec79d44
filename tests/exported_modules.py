"""Attention as people write it in torch: about twenty styles, none of them a model of the corpus.

    module, inputs = MODULES["einsum"]()

Each takes ids [B,S] or states [B,S,M] first, so that what is an activation can be seen.
Letters: B batch, S tokens, P past, M width, H query heads, K key heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

M, H, K, D = 30, 6, 3, 10


@dataclass
class Case:
    """A module, its example inputs, and what may vary.

    Attributes:
        free: for each input its free axes, by name.
        outputs: names of the outputs.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    free: dict[str, dict[int, str]]
    outputs: tuple[str, ...] = ("y",)


class Block(nn.Module):
    """Embeds ids, attends around a residual, and projects."""

    def __init__(self, kv_heads: int = H) -> None:
        super().__init__()
        self.table = nn.Embedding(41, M)
        self.q, self.o = nn.Linear(M, H * D), nn.Linear(H * D, M)
        self.k, self.v = nn.Linear(M, kv_heads * D), nn.Linear(M, kv_heads * D)
        self.kv_heads = kv_heads

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B,H,S,D]; k and v [B,K,S,D]."""
        b, s, _ = x.shape
        q = self.q(x).view(b, s, H, D).transpose(1, 2)
        k, v = (p(x).view(b, s, self.kv_heads, D).transpose(1, 2) for p in (self.k, self.v))
        return q, k, v

    def out(self, x: Tensor, y: Tensor) -> Tensor:
        """The heads' answers [B,H,S,D] mixed and added to x [B,S,M]."""
        b, _, s, _ = y.shape
        return x + self.o(y.transpose(1, 2).reshape(b, s, H * D))

    def forward(self, ids: Tensor, *rest: Tensor) -> Any:
        x = self.table(ids)
        q, k, v = self.heads(x)
        return self.out(x, self.attend(q, k, v, *rest))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        raise NotImplementedError


class Causal(Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Masked(Block):
    """A key mask [B,T] of ones and zeros, beside the causal one."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
        s = q.shape[2]
        causal = torch.ones(s, s, dtype=torch.bool, device=q.device).tril()
        keep = causal & attention_mask.bool()[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


class Grouped(Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Interleaved(Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(H // self.kv_heads, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)


class Einsum(Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhsd,bhtd->bhst", q, k) * D**-0.5
        return torch.einsum("bhst,bhtd->bhsd", scores.softmax(-1), v)


class EinsumGrouped(Block):
    """Queries keep their groups as an axis of their own."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, _, s, _ = q.shape
        q = q.reshape(b, self.kv_heads, -1, s, D)
        scores = torch.einsum("bkgsd,bktd->bkgst", q, k) / math.sqrt(D)
        scores = scores + torch.full((s, s), float("-inf")).triu(1)
        return torch.einsum("bkgst,bktd->bkgsd", scores.softmax(-1), v).flatten(1, 2)


class Manual(Block):
    """Float32 inside, masked_fill with the lowest number, dropout that does nothing."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(D)
        s = q.shape[2]
        hidden = torch.ones(s, s, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        p = F.softmax(scores.float(), dim=-1).to(q.dtype)
        return F.dropout(p, 0.1, self.training) @ v


class Flat(Block):
    """Batch and heads on one axis, baddbmm."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, s, d = q.shape
        q, k, v = (x.reshape(b * h, s, d) for x in (q, k, v))
        scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=d**-0.5)
        return torch.bmm(scores.softmax(-1), v).view(b, h, s, d)


class Alibi(Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        away = (at[None, :] - at[:, None]).clamp(max=0)
        slopes = torch.tensor([2.0 ** -(i + 1) for i in range(H)])
        scores = (q * D**-0.5) @ k.transpose(-1, -2) + slopes[:, None, None] * away
        return scores.masked_fill(at[None, :] > at[:, None], float("-inf")).softmax(-1) @ v


class Window(Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        away = at[:, None] - at[None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(away >= 0) & (away < 4))


class Sinks(Block):
    """A score that each head spends on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(H))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(2, 3) * D**-0.5
        b, _, s, _ = scores.shape
        sink = self.sinks.view(1, H, 1, 1).expand(b, H, s, 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


class Capped(Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = 20 * torch.tanh(q @ k.transpose(2, 3) * (D**-0.5 / 20))
        return scores.softmax(-1) @ v


class Normed(Block):
    """Heads divided by their length, and one learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_q, self.norm_k = nn.RMSNorm(D, 1e-6), nn.RMSNorm(D, 1e-6)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v, is_causal=True)


class HalfTurned(Block):
    """Rotary as Llama's: halves change places; positions are an input."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor) -> Tensor:
        frequencies = 100.0 ** (-torch.arange(0, D, 2) / D)
        angles = position_ids[:, None, :, None].float() * frequencies
        cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))

        def turn(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat([-b, a], -1) * sin

        return F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)


class ComplexTurned(Block):
    """Rotary as complex numbers, as Llama was published."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])[:, None] * 100.0 ** (-torch.arange(0, D, 2) / D)
        turns = torch.polar(torch.ones_like(at), at)

        def turn(x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)

        return F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)


class PairsTurned(Block):
    """Rotary over pairs of neighbours, stacked, in the first six lanes."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])[:, None] * torch.tensor([1.0, 0.3, 0.1])
        cos, sin = at.cos(), at.sin()

        def turn(x: Tensor) -> Tensor:
            x, rest = x[..., :6], x[..., 6:]
            a, b = x[..., ::2], x[..., 1::2]
            both = torch.stack([a * cos - b * sin, b * cos + a * sin], -1)
            return torch.cat([both.flatten(-2), rest], -1)

        return F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)


class Cached(Block):
    """A cache that grows, [B,K,P,D]."""

    def forward(self, ids: Tensor, past_key: Tensor, past_value: Tensor) -> Any:
        x = self.table(ids)
        q, k, v = self.heads(x)
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
        rows = past_key.shape[2] + torch.arange(q.shape[2])
        keep = torch.arange(k.shape[2])[None, :] <= rows[:, None]
        repeat = H // self.kv_heads
        wide_k, wide_v = (
            t[:, :, None].expand(-1, -1, repeat, -1, -1).flatten(1, 2) for t in (k, v)
        )
        y = F.scaled_dot_product_attention(q, wide_k, wide_v, attn_mask=keep)
        return self.out(x, y), k, v


class Static(Block):
    """A cache of fixed length that is written in place by index."""

    def forward(
        self, ids: Tensor, cache_position: Tensor, past_key: Tensor, past_value: Tensor
    ) -> Any:
        x = self.table(ids)
        q, k, v = self.heads(x)
        k = past_key.index_copy(2, cache_position, k)
        v = past_value.index_copy(2, cache_position, v)
        keep = torch.arange(k.shape[2])[None, :] <= cache_position[:, None]
        return self.out(x, F.scaled_dot_product_attention(q, k, v, attn_mask=keep)), k, v


class Latent(Block):
    """Keys and values from one narrow state; values narrower than keys (DeepSeek's MLA)."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(M, 7), nn.Linear(7, H * (D + 8))
        self.mix = nn.Linear(H * 8, M)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        b, s, _ = x.shape
        q = self.q(x).view(b, s, H, D).transpose(1, 2)
        k, v = self.up(self.down(x)).view(b, s, H, D + 8).transpose(1, 2).split([D, 8], -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.mix(y.transpose(1, 2).reshape(b, s, H * 8))


class Cross(Block):
    """Queries of a decoder, keys and values of an encoder."""

    def forward(self, ids: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = self.table(ids)
        b, s, _ = x.shape
        e = encoder_hidden_states.shape[1]
        q = self.q(x).view(b, s, H, D).transpose(1, 2)
        k, v = (p(encoder_hidden_states).view(b, e, H, D).transpose(1, 2) for p in (self.k, self.v))
        return self.out(x, F.scaled_dot_product_attention(q, k, v))


class Multihead(nn.Module):
    """torch's own module, with a residual and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(41, M), nn.LayerNorm(M)
        self.attention = nn.MultiheadAttention(M, 5, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids))
        y, _ = self.attention(x, x, x, need_weights=False)
        return x + y


def _made(
    make: Callable[[], nn.Module],
    more: Sequence[str] = (),
    outputs: tuple[str, ...] = ("y",),
    kv_heads: int = K,
) -> Callable[[], Case]:
    def case() -> Case:
        torch.manual_seed(0)
        b, s, p, e = 2, 5, 7, 8
        known: dict[str, tuple[Tensor, dict[int, str]]] = {
            "ids": (torch.randint(0, 41, (b, s)), {0: "b", 1: "s"}),
            "attention_mask": (torch.ones(b, s, dtype=torch.int64), {0: "b", 1: "s"}),
            "position_ids": (torch.arange(s).expand(b, s).contiguous(), {0: "b", 1: "s"}),
            "cache_position": (torch.arange(p, p + s), {0: "s"}),
            "past_key": (torch.randn(b, kv_heads, p, D), {0: "b", 2: "p"}),
            "past_value": (torch.randn(b, kv_heads, p, D), {0: "b", 2: "p"}),
            "encoder_hidden_states": (torch.randn(b, e, M), {0: "b", 1: "e"}),
        }
        if "cache_position" in more:  # its length is fixed
            for name in ("past_key", "past_value"):
                known[name] = (torch.randn(b, H, 20, D), {0: "b"})
        names = ("ids", *more)
        inputs = {name: known[name][0] for name in names}
        return Case(make().eval(), inputs, {name: known[name][1] for name in names}, outputs)

    return case


PRESENTS = ("y", "present_key", "present_value")
MODULES: dict[str, Callable[[], Case]] = {
    "causal": _made(Causal),
    "masked": _made(Masked, ["attention_mask"]),
    "grouped": _made(lambda: Grouped(K)),
    "interleaved": _made(lambda: Interleaved(K)),
    "einsum": _made(Einsum),
    "einsum-grouped": _made(lambda: EinsumGrouped(K)),
    "manual": _made(Manual),
    "flat": _made(Flat),
    "alibi": _made(Alibi),
    "window": _made(Window),
    "sinks": _made(Sinks),
    "capped": _made(Capped),
    "normed": _made(Normed),
    "half-turned": _made(HalfTurned, ["position_ids"]),
    "complex-turned": _made(ComplexTurned),
    "pairs-turned": _made(PairsTurned),
    "cached": _made(lambda: Cached(K), ["past_key", "past_value"], PRESENTS),
    "static": _made(Static, ["cache_position", "past_key", "past_value"], PRESENTS),
    "latent": _made(Latent),
    "cross": _made(Cross, ["encoder_hidden_states"]),
    "multihead": _made(Multihead),
}
