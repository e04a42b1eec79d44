"""What a random attention model may vary in, and which of it fits together.

    spec = Spec(kv_heads=2, groups=3, mask="window", cache="BPKD")

`specs()` draws specs; `not_claimed` says which need not be fused yet, and why. What each word
stands for is written in `tests.random_models`.

Letters: B batch, S new tokens, P past, T total, K key heads, G query heads a key head, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from hypothesis import strategies as st

CHOICES: dict[str, tuple[Any, ...]] = {
    "kv_heads": (2, 1, 3, 5),
    "groups": (1, 2, 3),
    "size": (4, 8, 10, 14),
    "value_size": (0, 0, 0, 6),  # 0: as wide as keys
    "dtype": ("float32", "float32", "float32", "float16", "bfloat16"),
    "norm": ("none", "rms-mul", "rms-pow", "rms-div", "layer-mul", "layer-pow"),
    "head_norm": (False, True),
    "projection": ("matmul", "gemm", "linear", "nbits", "dequantized"),
    "packed": ("apart", "apart", "qkv", "kv", "by-head"),
    "bias": (False, True),
    "layout": ("heads", "heads", "merged"),
    "key": ("late", "early", "einsum"),
    "repeat": ("expand", "tile", "gather", "concat", "five-axes", "other-way"),
    "rotary": ("none", "halves", "split", "parts", "pairs", "complex"),
    "part": ("whole", "whole", "half"),
    "turned_at": ("heads", "rows"),
    "tables": ("computed", "gathered", "counted"),
    "scale": ("mul", "div", "on-q", "on-k", "roots", "measured", "none"),
    "softcap": (0.0, 0.0, 0.0, 15.0),
    "mask": ("none", "causal", "causal", "window", "chunked", "band", "fed", "relative", "alibi"),
    "padding": (False, True),
    "masking": ("where-inf", "where-min", "fill-min", "add-inf", "add-min", "add-1e4"),
    "guard": ("none", "isnan", "unattended", "open"),
    "softmax": ("plain", "float"),
    "cache": ("none", "none", "BKPD", "BPKD", "BKDP", "cropped"),
    "second": ("none", "none", "none", "shared", "cross"),
    "declared": (True, False),
}
WINDOW = 4
"""W of windows, C of chunks, R of bands; a cropped cache keeps W - 1."""


@dataclass(frozen=True)
class Spec:
    """One model. Defaults are the plainest choice, so that a failure shrinks towards them.

    Attributes:
        kv_heads, groups, size: K, G and D; H = K * G.
        value_size: size of a value, 0 for D.
        norm, head_norm: before the block; over the heads of queries and keys.
        projection, packed, bias: how queries, keys and values are made.
        layout: whether scores are [B, H, S, T] or [B * H, S, T].
        key: where the keys are transposed.
        repeat: how a key head is shared by G query heads.
        rotary, part, turned_at, tables: how heads are turned, how much of them, in which layout.
        scale, softcap: of the scores.
        mask, padding, masking: which scores stay, whether padded keys go, how they are hidden.
        guard: what is done about rows that see nothing.
        softmax: "float" in float32 whatever the type.
        cache: the layout of past and present, "cropped" to a window.
        second: what a second layer attends: the first one's keys and values, or an encoder's.
        declared: whether the model says the shapes of its values.
    """

    kv_heads: int = 2
    groups: int = 1
    size: int = 4
    value_size: int = 0
    dtype: str = "float32"
    norm: str = "none"
    head_norm: bool = False
    projection: str = "matmul"
    packed: str = "apart"
    bias: bool = False
    layout: str = "heads"
    key: str = "late"
    repeat: str = "expand"
    rotary: str = "none"
    part: str = "whole"
    turned_at: str = "heads"
    tables: str = "computed"
    scale: str = "mul"
    softcap: float = 0.0
    mask: str = "none"
    padding: bool = False
    masking: str = "where-inf"
    guard: str = "none"
    softmax: str = "plain"
    cache: str = "none"
    second: str = "none"
    declared: bool = True

    @property
    def heads(self) -> int:
        """H."""
        return self.kv_heads * self.groups

    @property
    def width(self) -> int:
        """V, the size of a value."""
        return self.value_size or self.size

    @property
    def turned(self) -> int:
        """R, how many of the D lanes are turned."""
        return self.size if self.part == "whole" else self.size // 2 // 2 * 2

    @property
    def turns(self) -> bool:
        """Whether query heads take turns on the key heads; the operator's are neighbours."""
        return self.repeat == "other-way" and min(self.groups, self.kv_heads) > 1

    @property
    def masked(self) -> bool:
        """Whether anything is hidden from anyone."""
        return self.padding or self.mask != "none"

    def __repr__(self) -> str:
        """What differs from the defaults only."""
        plain = Spec.__dataclass_fields__
        given = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != plain[field.name].default
        )
        return f"Spec({', '.join(given)})"


def specs() -> st.SearchStrategy[Spec]:
    """Specs whose choices fit together."""
    return st.builds(Spec, **{k: st.sampled_from(v) for k, v in CHOICES.items()}).map(fitted)


def fitted(spec: Spec) -> Spec:
    """The nearest spec that is a model: what contradicts another choice gives way."""
    changes: dict[str, Any] = {}
    if spec.mask == "band":  # an encoder's
        changes["cache"] = "none"
    elif spec.cache == "cropped":  # to what its window sees, and its positions are fed
        changes["mask"] = "window"
        changes["tables"] = "computed" if spec.tables == "counted" else spec.tables
    elif spec.mask == "fed":  # it hides what it hides, by adding
        changes |= {"padding": False, "masking": "where-inf", "guard": "none"}
    elif spec.mask == "none" and not spec.padding:
        changes |= {"masking": "where-inf", "guard": "none"}
    if spec.groups == 1:
        changes["repeat"] = "expand"
    elif spec.repeat == "five-axes":
        changes["layout"] = "heads"
    if spec.packed == "by-head":
        changes["value_size"] = 0
    if spec.key == "einsum" and spec.dtype == "bfloat16":  # no Einsum takes it
        changes["key"] = "late"
    if spec.projection == "nbits" and spec.dtype != "float32":
        changes["projection"] = "matmul"
    if spec.rotary == "none":
        changes |= {"part": "whole", "turned_at": "heads", "tables": "computed"}
    return replace(spec, **changes)


def not_claimed(spec: Spec) -> str:
    """Why the attention of a spec need not be fused, "" where it must be.

    What no single operator can say stays here; the rest of it is work not done yet.
    """
    if spec.turns and (spec.key == "early" or spec.cache == "BKDP"):
        return "heads that take turns, on keys that are transposed"
    if spec.key == "einsum" and spec.cache == "cropped":
        return "products written as Einsum over a cropped cache"
    if spec.scale == "measured" and spec.dtype == "bfloat16" and spec.size != 4:
        return "the root of a size, rounded to bfloat16, is not folded"
    return ""
