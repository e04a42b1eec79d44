"""The roles that inputs and outputs can have, as plain values; `analysis.roles` finds them.

Axes are letters: B batch, S new tokens, P past, T past and new, L length of a static cache,
K key/value heads, D head size, E encoder length, H hidden size, "" none of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

Dim = int | str | None

ROLES: Mapping[str, str] = {
    "ids": "int [B,S]: rows of the embedding table",
    "type_ids": "int [B,S]: rows of the token type table",
    "positions": "int [B,S], [S] or [3,B,S]: angles of a rotary, or rows of a position table",
    "mask": "int, bool or float [B,T], or [B,1,S,T]: which keys may be seen",
    "past": "float [B,K,P,D]: a cache that a present output continues by growing",
    "static_past": "float [B,K,L,D]: a cache of fixed length that is written in place",
    "cache_position": "int [S]: where a static cache is written",
    "cache_length": "int [], [1] or [B]: how many tokens a static cache holds",
    "embeds": "float [B,S,H]: what the embedding table would have given",
    "pixels": "float: an image or video that meets a convolution",
    "features": "float: audio or other features of an encoder",
    "encoder_states": "float [B,E,H]: what cross-attention reads",
    "encoder_mask": "int, bool or float [B,E]: which encoder states may be seen",
    "cross_past": "float [B,K,E,D]: keys or values of the encoder states",
    "use_cache_branch": "bool [1]: chooses a merged decoder's branch",
    "constant_like": "passes straight through to an output, or is not used",
    "unknown": "none of these",
}


@dataclass(frozen=True)
class InputRole:
    """What one graph input is for.

    Attributes:
        name: the input's name.
        role: a key of ROLES.
        dtype: its element type.
        shape: its dims: int where fixed (a symbol that is a number is fixed too), else the
            symbol, None where nothing is said.
        axes: a letter for each dim, "" where it is none of the module's.
        bound: rows of the table it indexes; 0 where there is none.
        additive: a float mask that is added to the scores as it is (0 where seen).
    """

    name: str
    role: str
    dtype: ir.DataType
    shape: tuple[Dim, ...]
    axes: tuple[str, ...] = ()
    bound: int = 0
    additive: bool = False


@dataclass(frozen=True)
class CachePair:
    """A past input and the present output that continues it.

    Attributes:
        past, present: their names.
        axis: the axis that grows (P), or that is written to (L, static).
        static: the cache has a fixed length and is written in place.
        cap: the longest present of a cropped sliding cache (window - 1), None where it is free.
        counted: each row's tokens stand at its first places, as many as a count says that the
            mask, or another input, holds; what is behind them is nobody's. Such a cache may be
            longer than its tokens: then new ones are written in place.
        window: for a counted cache that may be shorter than its tokens: the places it needs.
        heads, head_size: K and D where they are fixed and the cache has rank 4, else 0.
    """

    past: str
    present: str
    axis: int
    static: bool = False
    cap: int | None = None
    heads: int = 0
    head_size: int = 0
    counted: bool = False
    window: int = 0


@dataclass(frozen=True)
class OutputRole:
    """What one graph output is.

    Attributes:
        name: the output's name.
        role: "present" (see Roles.pairs), "copy" (an input passed through), "rows" (one row for
            each new token, such as logits [B,S,V]) or "other".
        dtype, shape, axes: as for InputRole.
    """

    name: str
    role: str
    dtype: ir.DataType | None
    shape: tuple[Dim, ...] | None
    axes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Roles:
    """What the inputs and outputs of a graph are for.

    Attributes:
        inputs, outputs: by name, in graph order; initializers that are listed as inputs
            are left out.
        pairs: caches, in input order.
        fixed: lengths that the graph fixes, by axis letter.
        symbols: the axis letter of each symbolic dim.
    """

    inputs: Mapping[str, InputRole]
    outputs: Mapping[str, OutputRole]
    pairs: tuple[CachePair, ...] = ()
    fixed: Mapping[str, int] = field(default_factory=dict)
    symbols: Mapping[str, str] = field(default_factory=dict)

    def named(self, role: str) -> list[InputRole]:
        """The inputs of one role, in graph order."""
        return [each for each in self.inputs.values() if each.role == role]

    def pair_of(self, name: str) -> CachePair | None:
        """The cache pair whose past or present bears this name."""
        return next((pair for pair in self.pairs if name in (pair.past, pair.present)), None)

    @property
    def counted(self) -> bool:
        """Whether tokens are counted, not masked: padding can only stand behind them."""
        return any(pair.counted for pair in self.pairs)

    @property
    def static_length(self) -> int | None:
        """L: the length of the longest static cache, None where caches grow."""
        return self.fixed.get("L")

    @property
    def static_room(self) -> int | None:
        """How many tokens every static cache can hold, None where caches grow.

        Layers with a window may have shorter caches than the others.
        """
        held = [self.inputs[p.past].shape[p.axis] for p in self.pairs if p.static]
        return min((length for length in held if isinstance(length, int)), default=None)
