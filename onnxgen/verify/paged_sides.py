"""The two models that are compared: the original on one sequence at a time, the paged on all.

Shapes: S new tokens, P past, T both, K key heads, D head size, V scores, NB blocks of BS slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxgen.analysis.feeds import RunShape, forced_shape, make_feeds
from onnxgen.analysis.roles import Roles
from onnxgen.paged import Sequences
from onnxgen.runtime import RuntimeFailure
from onnxgen.targets.paged import PagedModel
from onnxgen.verify.side import Side

Array = npt.NDArray[Any]
_FREE = 1 << 40
VOCABULARY = 256
"""Of a model that takes embeddings: so many random ones stand for tokens."""


class Contiguous:
    """The original: one sequence at a time, each on caches of its own."""

    def __init__(self, side: Side, roles: Roles, outputs: Sequence[tuple[str, str]]) -> None:
        """Prepare the original.

        Args:
            outputs: those with a row for each token, (name, name in the paged model).
        """
        self._side = side
        self._outputs = tuple(outputs)
        self.roles = roles
        tokens = [*roles.named("ids"), *roles.named("embeds")][0]
        self._tokens = tokens
        self.embeddings: Array | None = None
        rng = np.random.default_rng(1)
        if tokens.role == "embeds":
            width = tokens.shape[-1] if isinstance(tokens.shape[-1], int) else 1
            found = rng.standard_normal((VOCABULARY, width))
            self.embeddings = found.astype(tokens.dtype.numpy())
        self.vocabulary = tokens.bound or VOCABULARY
        self.special: Sequence[int] = ()
        self.single = roles.fixed.get("S") == 1
        self._caches: dict[str, dict[str, Array]] = {}
        self.least = self._least()
        self.room = roles.static_room or self._room()

    def start(self, name: str, past: int) -> None:
        """Caches for a sequence that has a past already: random ones."""
        if past:
            feeds = self._feeds(1, past)
            self._caches[name] = {pair.past: feeds[pair.past] for pair in self.roles.pairs}

    def run(self, name: str, tokens: Sequence[int], past: int) -> dict[str, Array]:
        """Rows [S, ..] of new tokens of a sequence, by the paged model's names.

        Raises:
            RuntimeFailure: the model does not take them.
        """
        pieces = [[token] for token in tokens] if self.single else [list(tokens)]
        rows: dict[str, list[Array]] = {name: [] for _, name in self._outputs}
        for piece in pieces:
            feeds = self._feeds(len(piece), past)
            given = np.array(piece)
            values = given if self.embeddings is None else self.embeddings[given]
            shape = feeds[self._tokens.name].shape
            wide = values.reshape(1, *values.shape)
            feeds[self._tokens.name] = np.ascontiguousarray(
                np.broadcast_to(wide, shape).astype(feeds[self._tokens.name].dtype)
            )
            feeds.update(self._caches.get(name, {}))
            outputs = self._side.run(feeds)
            self._caches[name] = {pair.past: outputs[pair.present] for pair in self.roles.pairs}
            for own, paged in self._outputs:
                rows[paged].append(outputs[own][0])
            past += len(piece)
        return {paged: np.concatenate(found) for paged, found in rows.items()}

    def cache(self, name: str, past: str, total: int) -> tuple[int, Array]:
        """(place of the first row, rows [n, K, D]) of what a sequence's cache holds."""
        return self._rows(past, self._caches[name][past], total)

    def _rows(self, past: str, array: Array, total: int) -> tuple[int, Array]:
        each = self.roles.inputs[past]
        pair = self.roles.pair_of(past)
        assert pair is not None
        letters = list(each.axes)
        growing = pair.axis
        array = np.moveaxis(array, growing, 0)
        letters.insert(0, letters.pop(growing))
        batch = letters.index("B")
        array = np.take(array, 0, axis=batch)
        letters.pop(batch)
        if "K" in letters:
            array = np.moveaxis(array, letters.index("K"), 1)
        array = array.reshape(len(array), pair.heads or 1, -1)
        if len(array) >= total:
            return 0, array[:total]
        return total - len(array), array

    def _least(self) -> int:
        """The shortest past that the original takes one and more tokens over."""
        caps = {pair.cap for pair in self.roles.pairs if pair.cap is not None}
        held = {self.roles.inputs[p.past].shape[p.axis] for p in self.roles.pairs if not p.static}
        tried = {0, 1, *caps, *(size for size in held if isinstance(size, int))}
        return next((past for past in sorted(tried) if self._takes(past, 2, 1)), 0)

    def _room(self) -> int:
        """How many tokens a sequence may have, as far as a program goes: some tables end early."""
        few, many = 64, 1024
        if self._takes(many, 1) or not self._takes(few, 1):
            return _FREE
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (middle, many) if self._takes(middle, 1) else (few, middle)
        return few + 1

    def _takes(self, past: int, *counts: int) -> bool:
        """Whether so many new tokens over a past are taken, each count."""
        try:
            for count in counts:
                self.forget("")  # each count on a cache of its own
                self.start("", past)
                self.run("", [0] * count, past)
        except RuntimeFailure:
            return False
        finally:
            self.forget("")
        return True

    def _shape(self, new: int, past: int) -> RunShape | None:
        found = forced_shape(self.roles, RunShape(1, new, past))
        return found if found and (found.new, found.past) == (new, past) else None

    def forget(self, name: str) -> None:
        self._caches.pop(name, None)

    def _feeds(self, new: int, past: int) -> dict[str, Array]:
        shape = self._shape(new, past)
        if shape is None:
            raise RuntimeFailure(f"it takes no {new} new tokens over {past}")
        return make_feeds(self.roles, shape, np.random.default_rng(past))


class PagedSide:
    """The paged model: all sequences together, on pools whose free slots hold NaN, or what is said."""

    def __init__(self, side: Side, result: PagedModel, free: float) -> None:
        self._side = side
        self.result = result
        self.options = result.options
        self.sequences = Sequences(0, result.options.block_size)
        self.pools: dict[str, Array] = {}
        self._free = free

    def prepare(self, blocks: int) -> None:
        """Empty pools, and blocks in no order."""
        order = np.random.default_rng(2).permutation(blocks).tolist()
        self.sequences = Sequences(blocks, self.options.block_size, order)
        for pool in self.result.pools:
            shape = (blocks, self.options.block_size, pool.heads, pool.size)
            half = pool.dtype == ir.DataType.FLOAT16 and pool.dtype not in self._side.runtime.twins
            kind = np.float16 if half else np.float32  # a twin's are float32
            self.pools[pool.name] = np.full(shape, self._free, kind)

    def flat(self, name: str) -> Array:
        """A pool as slots [NB * BS, K, D]."""
        pool = self.pools[name]
        return pool.reshape(-1, *pool.shape[2:])

    def run(
        self, counts: Mapping[int, int], embeddings: Array | None
    ) -> tuple[dict[str, Array], list[str]]:
        """Outputs of a run, and the pools in which something else than its tokens was written."""
        befores = {each: self.sequences.length(each) for each in counts}
        feeds = self.sequences.feeds(counts)
        if embeddings is not None:
            feeds["inputs_embeds"] = embeddings[feeds.pop("input_ids")]
        written = [self.sequences.slots(each)[befores[each] :] for each in counts]
        slots = np.concatenate(written)
        if self.options.slot_mapping:
            feeds["slot_mapping"] = slots.astype(np.int32)
        if self.options.logits == "indices":
            feeds["logits_indices"] = self.asked(feeds["cumulative_sequence_lengths"])
        outputs = self._side.run({**feeds, **self.pools})
        spoiled = []
        for pool in self.result.pools:
            old = self.flat(pool.name)
            self.pools[pool.name] = outputs[pool.output]
            kept = np.ones(len(old), bool)
            kept[slots] = False
            if old[kept].tobytes() != self.flat(pool.name)[kept].tobytes():
                spoiled.append(pool.output)
        return outputs, spoiled

    @staticmethod
    def asked(edges: Array) -> Array:
        """Which rows are asked for: each sequence's last and first, in no order."""
        found = [row for a, b in itertools.pairwise(edges) if b > a for row in (b - 1, a)]
        return np.array(found, np.int32)

    def empty(self, blocks: Sequence[int]) -> None:
        """Blocks that are nobody's again."""
        for pool in self.pools.values():
            pool[list(blocks)] = self._free
