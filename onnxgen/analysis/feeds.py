"""Inputs for a run of given lengths: what a user would feed, made from the roles.

    roles = find_roles(model)
    shape = RunShape(batch=2, new=3, past=5, padding="left")
    feeds = make_feeds(roles, shape, np.random.default_rng(0))
    rows = shape.real_new                     # bool [B,S]: rows that belong to real tokens

Shapes: B batch, S new tokens, P past, T = P + S, L length of a static cache, E encoder length.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxgen.analysis.roles import InputRole, Roles

Array = npt.NDArray[Any]
MOST_BYTES = 1 << 28  # that are fed to one run
MOST_AXES = 32  # of what is fed: NumPy's own limit before 2.0
MOST_TOKENS = 1 << 22  # of one run, past and padding included
Padding = Literal["none", "left", "right", "holes"]


@dataclass(frozen=True)
class RunShape:
    """The lengths and the padding of one run.

    Left padding stands before each row's first token, so with a past it lies in the past, and
    reaches into the new tokens where it is longer than that. Right padding stands after each
    row's last token, among the new ones; where there is one new token it is what a padded
    prompt left at the end of the past. Every row keeps a real new token.

    Attributes:
        batch, new, past, encoder: B, S, P and E. The encoder's first row is padded at its end
            wherever there are several rows.
        padding: where the padding stands.
        pads: padded places of each row; by default uneven, the second row of a batch with none.
        spare: places of the caches behind the tokens, past and new, where the graph counts them.

    Raises:
        ValueError: lengths below what a run needs, or padding that leaves a row no new token.
    """

    batch: int = 1
    new: int = 1
    past: int = 0
    padding: Padding = "none"
    pads: tuple[int, ...] = ()
    encoder: int = 7
    spare: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.new < 1 or self.past < 0 or self.encoder < 1:
            raise ValueError(f"no such run: {self}")
        if self.padding == "none":
            object.__setattr__(self, "pads", (0,) * self.batch)
            return
        if self.padding != "right":
            room = self.total - (1 if self.padding == "left" else 2)
        else:
            room = self.new - 1 if self.new > 1 else self.past
        if not self.pads:
            most = min(room, max(2, (self.past or self.new) // 2))
            object.__setattr__(self, "pads", _uneven(self.batch, most))
        if len(self.pads) != self.batch or not 1 <= max(self.pads) <= room or min(self.pads) < 0:
            raise ValueError(f"{self.padding} padding of {self.pads} does not fit {self}")

    @property
    def total(self) -> int:
        """T: past and new tokens."""
        return self.past + self.new

    @property
    def real(self) -> npt.NDArray[np.bool_]:
        """bool [B,T]: places that hold a real token."""
        at, pads = np.arange(self.total), np.array(self.pads)[:, None]
        if self.padding == "left":
            return at >= pads
        if self.padding == "holes":
            return np.asarray((at == 0) | (at > pads), dtype=np.bool_)
        end = self.total if self.new > 1 else self.past
        return (at < end - pads) | (at >= end)

    @property
    def real_new(self) -> npt.NDArray[np.bool_]:
        """bool [B,S]: new rows that hold a real token."""
        return self.real[:, self.past :]

    def real_kept(self, length: int, *, counted: bool = False) -> npt.NDArray[np.bool_]:
        """bool [B,length]: the places of a cache that is T long, cropped, or static.

        A cropped cache holds the last places. A static one holds the first, and what was
        there before behind them. A counted one holds each row's real tokens at its first places.
        """
        real, spare = self.real, length - self.total
        if counted:
            counts: npt.NDArray[np.int64] = real.sum(axis=1, keepdims=True)
            return np.less(np.arange(length), counts)
        if spare > 0:
            return np.pad(real, ((0, 0), (0, spare)), constant_values=True)
        return real[:, -spare:]

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """int64 [B,S]: counts real tokens, as `generate` does; 0 before the first."""
        counted = np.cumsum(self.real, axis=1, dtype=np.int64) - 1
        return np.maximum(counted, 0)[:, self.past :]


def make_feeds(
    roles: Roles,
    shape: RunShape,
    rng: np.random.Generator,
    names: Collection[str] | None = None,
) -> dict[str, Array]:
    """Inputs of the right dtypes for a run, by name.

    Token ids, caches, states and features are random (standard deviation 1); masks, positions
    and lengths say what `shape` says. The values of an input do not depend on which others are
    asked for. A dim that the graph fixes keeps its size; ask `misfit` whether that fits.

    Args:
        names: make only these inputs, by default all.

    Raises:
        ValueError: the graph fixes lengths that differ from the shape's.
    """
    reason = misfit(roles, shape)
    if reason:
        raise ValueError(reason)
    seed = int(rng.integers(2**32))
    chosen = [each for each in roles.inputs.values() if names is None or each.name in names]
    return {
        each.name: _values(
            each, roles, shape, np.random.default_rng([seed, zlib.crc32(each.name.encode())])
        )
        for each in chosen
    }


def input_sizes(roles: Roles, shape: RunShape) -> dict[str, int]:
    """The size of every axis of every input for a run, as `shapes` names them: "ids[1]"."""
    return {
        f"{each.name}[{axis}]": size
        for each in roles.inputs.values()
        for axis, size in enumerate(_dims(each, roles, shape))
    }


def misfit(roles: Roles, shape: RunShape) -> str:
    """Why the graph cannot take this shape, as one sentence; "" where it can."""
    wanted = {"B": shape.batch, "S": shape.new, "P": shape.past, "T": shape.total}
    words = {"B": "batch", "S": "new tokens", "P": "past", "T": "total length"}
    for letter, length in wanted.items():
        fixed = roles.fixed.get(letter)
        if fixed is not None and fixed != length:
            return f"the graph fixes {words[letter]} at {fixed}"
    for pair in roles.pairs:
        held = roles.inputs[pair.past].shape[pair.axis]
        if pair.cap is not None and isinstance(held, int) and shape.past < held:
            return f"the graph fixes its cropped caches at {held} tokens"
    if roles.static_room is not None and shape.total > roles.static_room:
        return f"the graph's caches hold {roles.static_room} tokens"
    if shape.past and not roles.pairs:
        return "the graph takes no past"
    if shape.padding != "none" and not roles.named("mask"):
        return "the graph takes no mask"
    if roles.counted and shape.padding in ("left", "holes"):
        return "the graph counts tokens from the left: padding can only stand behind them"
    if shape.spare and not (roles.counted and _grows_by_mask(roles)):
        return "the graph's caches are as long as their tokens"
    return too_much(roles, shape)


def too_much(roles: Roles, shape: RunShape) -> str:
    """Why no inputs of this shape are made, though a graph may take them; "" where they are."""
    for each in roles.inputs.values():
        if len(each.shape) > MOST_AXES:
            return f"its input {each.name!r} has {len(each.shape)} axes, more than {MOST_AXES}"
    # Narrow numbers are drawn as wide ones.
    fed = sum(
        math.prod(_dims(each, roles, shape)) * max(4, _item_size(each.dtype))
        for each in roles.inputs.values()
    )
    return f"its inputs would be {fed} bytes, more than {MOST_BYTES}" if fed > MOST_BYTES else ""


def _item_size(dtype: ir.DataType) -> int:
    plain = dtype not in (ir.DataType.UNDEFINED, ir.DataType.STRING)
    return math.ceil(dtype.itemsize) if plain else 8


def _grows_by_mask(roles: Roles) -> bool:
    """Whether an input of its own says how many tokens there are."""
    return any("T" in each.axes for each in roles.inputs.values())


def forced_shape(roles: Roles, shape: RunShape) -> RunShape | None:
    """The shape with the lengths that the graph fixes; None where it cannot be run so."""
    fixed = roles.fixed
    batch, new, past = (
        fixed.get("B", shape.batch),
        fixed.get("S", shape.new),
        fixed.get("P", shape.past),
    )
    if "T" in fixed and "P" not in fixed and "S" not in fixed:
        past = fixed["T"] - new if roles.pairs else 0
        new = new if roles.pairs else fixed["T"]
    if not roles.pairs and past and not fixed.get("P"):
        return None
    if past < 0 or batch * (past + new) > MOST_TOKENS:  # sizes that a file fixes can be any
        return None
    pads = shape.pads[:batch] if (new, past) == (shape.new, shape.past) else ()
    if len(pads) != batch or not any(pads):
        pads = ()
    try:
        found = RunShape(batch, new, past, shape.padding, pads, shape.encoder, shape.spare)
    except ValueError:  # no room for its padding
        return None
    return None if misfit(roles, found) else found


def nearest_shape(roles: Roles, shape: RunShape, spare: int = 0) -> RunShape | None:
    """The shape as far as the graph takes it: its lengths, or without a past, or no padding.

    Args:
        spare: places of a static cache that are to stay free.
    """
    past = shape.past if roles.pairs else 0
    new = shape.new if roles.pairs or not shape.past else min(shape.total, 300)
    if roles.static_room is not None and past + new > roles.static_room - spare:
        room = max(roles.static_room - spare, 1)
        new = min(roles.fixed.get("S", new), max(room - bool(past), 1))
        past = min(past, room - new)
    for padding in dict.fromkeys((shape.padding, "none")):
        try:
            wanted = RunShape(
                shape.batch, new, past, padding, encoder=shape.encoder, spare=shape.spare
            )
        except ValueError:
            continue
        found = forced_shape(roles, wanted)
        if found is not None:
            return found
    return None


def _values(each: InputRole, roles: Roles, shape: RunShape, rng: np.random.Generator) -> Array:
    dims = _dims(each, roles, shape)
    values: Array
    if each.dtype == ir.DataType.STRING:
        return np.full(dims, "1", object)
    match each.role:
        case "ids" if 0 < math.prod(dims) <= each.bound:  # no token twice: more rows are read
            values = rng.permutation(each.bound)[: math.prod(dims)].reshape(dims)
        case "ids" | "type_ids":
            values = rng.integers(0, each.bound or 2, dims)
        case "positions":
            rows = shape.positions if "B" in each.axes else shape.past + np.arange(shape.new)
            rows = rows[..., : dims[-1]] if dims else rows[..., 0]  # one is where the first stands
            values = np.broadcast_to(rows[: dims[-2]] if len(dims) > 1 else rows, dims)
        case "cache_position":
            values = np.broadcast_to(shape.past + np.arange(shape.new), dims)
        case "cache_length":
            # Sequences of one batch may have come less far.
            late = np.arange(shape.batch) % 3 if "B" in each.axes and dims != (1,) else 0
            values = np.broadcast_to(np.maximum(shape.past - late, 0), dims)
        case "mask" if dims:
            values = _mask(each, dims, bool(roles.pairs), shape)
        case "encoder_mask" if dims:
            values = np.ones(dims)
            if shape.batch > 1 or shape.padding != "none":
                values[0, -max(1, dims[-1] // 3) :] = 0
            if each.additive:
                values = np.where(values > 0, 0, float(each.dtype.min))
        case "use_cache_branch":
            values = np.full(dims, shape.past > 0)
        case _ if each.dtype.is_floating_point():
            values = rng.standard_normal(dims, dtype=np.float32)
        case "past" | "static_past" | "cross_past" if each.dtype.is_integer():  # quantized
            info = ml_dtypes.iinfo(each.dtype.numpy())  # type: ignore[no-untyped-call]
            values = rng.integers(info.min, info.max, dims, endpoint=True)
        case _:
            values = np.ones(dims, np.int8)
    return np.ascontiguousarray(values.astype(each.dtype.numpy(), copy=False)).reshape(dims)


def _mask(each: InputRole, dims: tuple[int, ...], causal: bool, shape: RunShape) -> Array:
    """A key mask [B,T], or [B,1,S,T] with what each row may see; 1, or 0 where it is added."""
    seen = shape.real_kept(dims[-1]) if dims[-1] >= shape.total else shape.real[:, : dims[-1]]
    seen = seen & (np.arange(dims[-1]) < shape.total)  # a static cache's free places
    if "S" in each.axes:
        at = np.arange(dims[-1]) - shape.past
        rows = at <= np.arange(shape.new)[:, None] if causal else np.True_
        seen = seen[:, None, :] & rows
        if len(dims) == 4:
            seen = seen[:, None]
    elif len(dims) > 2:  # one row for all new tokens
        seen = seen.reshape(seen.shape[0], *[1] * (len(dims) - 2), dims[-1])
    if len(dims) > 1 and dims[0] == 1:  # for all sequences: what one of them needs
        seen = np.logical_or.reduce(seen, axis=0, keepdims=True)
    seen = np.broadcast_to(seen, dims) if len(dims) > 1 else seen[0]
    if each.additive:
        return np.where(seen, 0, float(each.dtype.min))
    return seen


def _dims(each: InputRole, roles: Roles, shape: RunShape) -> tuple[int, ...]:
    """The size of every dim: fixed ones as they are, symbols by what they stand for."""
    past, total = shape.past, shape.total
    pair = roles.pair_of(each.name)
    if pair is not None and pair.cap is not None:
        past = min(past, pair.cap)
    if pair is not None and pair.counted and (shape.spare or pair.window):
        past = max(total + shape.spare, pair.window)
    if roles.static_length is not None:
        total = roles.static_length
    sizes = {"B": shape.batch, "S": shape.new, "P": past, "T": total, "E": shape.encoder}
    dims = []
    for dim, letter in zip(each.shape, each.axes, strict=True):
        if isinstance(dim, int):
            # A cropped cache fixed at its full length is fed that much.
            dims.append(dim)
            continue
        letter = letter or roles.symbols.get(dim or "", "")
        dims.append(sizes.get(letter, shape.encoder))
    return tuple(dims)


def _uneven(batch: int, most: int) -> tuple[int, ...]:
    return tuple((most, 0, (most + 1) // 2)[row % 3] for row in range(batch))
