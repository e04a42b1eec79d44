"""Running paged models: which blocks a sequence owns, and a runner over an ONNX Runtime session.

    runner = PagedRunner("model.paged/model.onnx", num_blocks=256)
    a = runner.add([1, 15, 7])
    b = runner.add([1, 15, 7, 9], prefix=a)      # shares a's full blocks that begin alike
    for _ in range(20):
        rows = runner.step()                     # {a: logits [n, V], b: ...} of the tokens that ran
        for sequence, logits in rows.items():
            runner.extend(sequence, [int(logits[-1].argmax())])
    runner.remove(a)

A reference for what `onnxgen to-paged` writes, and what proves it; a server is onnxruntime-genai's
Engine. Models of `--logits all` (or `last`) without a slot mapping.

Shapes: N new tokens of all sequences, B sequences, M blocks of the longest, V scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class OutOfBlocksError(Exception):
    """No free block is left. Nothing was changed; remove a sequence and try again."""


@dataclass
class _Sequence:
    blocks: list[int] = field(default_factory=list)
    length: int = 0  # tokens in the pools
    tokens: list[int] = field(default_factory=list)  # all of them, those that wait too


class BlockAllocator:
    """Which block of a pool belongs to whom. A block may belong to several that begin alike.

    Attributes:
        block_size: BS, slots of a block.
    """

    def __init__(
        self, num_blocks: int, block_size: int, order: Sequence[int] | None = None
    ) -> None:
        """Prepare the blocks.

        Args:
            order: in which they are taken, by default counting up.
        """
        self.block_size = block_size
        self._free = list(order if order is not None else range(num_blocks))[::-1]
        self._owners = [0] * num_blocks

    @property
    def free(self) -> int:
        """How many blocks are nobody's."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Blocks that were nobody's.

        Raises:
            OutOfBlocksError: there are not so many; none is taken then.
        """
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks are needed and {len(self._free)} are free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._owners[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more owner for each."""
        for block in blocks:
            self._owners[block] += 1

    def give_back(self, blocks: Iterable[int]) -> list[int]:
        """One owner less for each; those that are nobody's now."""
        gone = []
        for block in blocks:
            self._owners[block] -= 1
            if not self._owners[block]:
                self._free.append(block)
                gone.append(block)
        return gone


class Sequences:
    """The sequences of a pool: their tokens, their blocks, and what a paged model is fed of them."""

    def __init__(
        self, num_blocks: int, block_size: int, order: Sequence[int] | None = None
    ) -> None:
        self.allocator = BlockAllocator(num_blocks, block_size, order)
        self._all: dict[int, _Sequence] = {}
        self._next = 0

    def add(self, tokens: Sequence[int], prefix: int | None = None) -> int:
        """A new sequence that waits to run; its number.

        Args:
            prefix: a sequence whose full blocks are shared as far as both begin alike; at least
                one token is left to run.
        """
        new = _Sequence(tokens=[int(token) for token in tokens])
        if prefix is not None:
            other, size = self._all[prefix], self.allocator.block_size
            alike = 0
            for a, b in zip(new.tokens[:-1], other.tokens[: other.length], strict=False):
                if a != b:
                    break
                alike += 1
            new.blocks = other.blocks[: alike // size]
            new.length = len(new.blocks) * size
            self.allocator.share(new.blocks)
        self._next += 1
        self._all[self._next] = new
        return self._next

    def extend(self, sequence: int, tokens: Sequence[int]) -> None:
        """Tokens that wait to run behind those of a sequence."""
        self._all[sequence].tokens += [int(token) for token in tokens]

    def remove(self, sequence: int) -> list[int]:
        """Forget a sequence; the blocks that are nobody's now."""
        return self.allocator.give_back(self._all.pop(sequence).blocks)

    def length(self, sequence: int) -> int:
        """How many of a sequence's tokens are in the pools."""
        return self._all[sequence].length

    def blocks(self, sequence: int) -> list[int]:
        """The blocks of a sequence, in order."""
        return list(self._all[sequence].blocks)

    def waiting(self, sequence: int) -> int:
        """How many of a sequence's tokens have not run."""
        return len(self._all[sequence].tokens) - self._all[sequence].length

    def __iter__(self) -> Any:
        return iter(self._all)

    def slots(self, sequence: int) -> Array:
        """The slot of each token that is in the pools, int64 [T]."""
        found, size = self._all[sequence], self.allocator.block_size
        at = np.arange(found.length)
        return np.array(found.blocks, np.int64)[at // size] * size + at % size

    def feeds(self, counts: Mapping[int, int]) -> dict[str, Array]:
        """What a run of so many waiting tokens of each sequence is fed, pools apart.

        Blocks are taken for them and they count as run.

        Raises:
            OutOfBlocksError: nothing was changed.
        """
        size = self.allocator.block_size
        needed = {
            each: -(-(self._all[each].length + count) // size) - len(self._all[each].blocks)
            for each, count in counts.items()
        }
        fresh = self.allocator.take(sum(max(more, 0) for more in needed.values()))
        tokens: list[int] = []
        cumulative, past, tables = [0], [], []
        for each, count in counts.items():
            found = self._all[each]
            found.blocks += [fresh.pop() for _ in range(max(needed[each], 0))]
            tokens += found.tokens[found.length : found.length + count]
            past.append(found.length)
            cumulative.append(len(tokens))
            tables.append(found.blocks)
            found.length += count
        table = np.full((len(tables), max(map(len, tables), default=0)), -1, np.int32)
        for row, blocks in enumerate(tables):
            table[row, : len(blocks)] = blocks
        return {
            "input_ids": np.array(tokens, np.int64),
            "cumulative_sequence_lengths": np.array(cumulative, np.int32),
            "past_sequence_lengths": np.array(past, np.int32),
            "block_table": table,
        }


class PagedRunner:
    """Runs a paged model; past and present share one buffer a pool, so that nothing is copied.

    Args:
        model: a path, or an `onnxruntime.InferenceSession`.
        num_blocks: how many blocks each pool has.
    """

    def __init__(self, model: Any, num_blocks: int) -> None:
        import onnxruntime as ort

        self.session = ort.InferenceSession(str(model)) if isinstance(model, str | Path) else model
        pools = [each for each in self.session.get_inputs() if len(each.shape) == 4]
        self.sequences = Sequences(num_blocks, int(pools[0].shape[1]))
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self._binding = self.session.io_binding()
        self._pools = []
        outputs = [each.name for each in self.session.get_outputs()]
        for pool in pools:
            array = np.zeros((num_blocks, *pool.shape[1:]), kinds[pool.type])
            value = ort.OrtValue.ortvalue_from_numpy(array)
            self._pools.append(value)
            self._binding.bind_ortvalue_input(pool.name, value)
            present = pool.name.replace("past_key_values", "present")
            self._binding.bind_ortvalue_output(present, value)
            outputs.remove(present)
        self._outputs = outputs

    def add(self, tokens: Sequence[int], prefix: int | None = None) -> int:
        """A new sequence; it runs with the next step. See `Sequences.add`."""
        return self.sequences.add(tokens, prefix)

    def extend(self, sequence: int, tokens: Sequence[int]) -> None:
        """More tokens of a sequence, which run with the next step."""
        self.sequences.extend(sequence, tokens)

    def remove(self, sequence: int) -> None:
        """Forget a sequence; its blocks are free."""
        self.sequences.remove(sequence)

    def step(self, limit: int | None = None) -> dict[int, Array]:
        """Run the tokens that wait, oldest sequences first.

        Args:
            limit: at most so many tokens: long prompts run in pieces.

        Returns:
            Logits of the tokens that ran, [n, V] for each sequence that had any ([1, V] of a model
            that answers for last tokens).

        Raises:
            OutOfBlocksError: the pools are full; nothing ran.
        """
        left = limit if limit is not None else 1 << 62
        counts: dict[int, int] = {}
        for sequence in self.sequences:
            count = min(self.sequences.waiting(sequence), left)
            if count:
                counts[sequence] = count
                left -= count
        if not counts:
            return {}
        feeds = self.sequences.feeds(counts)
        for name, array in feeds.items():
            self._binding.bind_cpu_input(name, array)
        for name in self._outputs:
            self._binding.bind_output(name)
        self.session.run_with_iobinding(self._binding)
        names = [each.name for each in self.session.get_outputs()]
        logits = self._binding.get_outputs()[names.index("logits")].numpy()
        if len(logits) == len(counts) and len(logits) != len(feeds["input_ids"]):
            return {each: logits[row : row + 1] for row, each in enumerate(counts)}
        edges = feeds["cumulative_sequence_lengths"]
        return {each: logits[edges[row] : edges[row + 1]] for row, each in enumerate(counts)}
