"""Which blocks of a pool a sequence owns, and what a paged model is fed of several sequences.

Shapes: N new tokens of all sequences, B sequences, M blocks of the longest, BS slots of a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
        num_blocks: how many blocks there are.
        block_size: BS, slots of a block.
    """

    def __init__(
        self, num_blocks: int, block_size: int, order: Sequence[int] | None = None
    ) -> None:
        """Prepare the blocks.

        Args:
            num_blocks: how many there are, numbered from 0.
            block_size: BS, slots of a block.
            order: in which they are taken, a permutation of their numbers; counting up by default.
        """
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(order if order is not None else range(num_blocks))[::-1]
        self._owners = [0] * num_blocks

    @property
    def free(self) -> int:
        """How many blocks are nobody's."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Numbers of `count` blocks that were nobody's, each with one owner now.

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
        """One more owner for each.

        Raises:
            ValueError: one of them is nobody's; nothing was changed.
        """
        blocks = list(blocks)
        self._check_owned(blocks)
        for block in blocks:
            self._owners[block] += 1

    def give_back(self, blocks: Iterable[int]) -> list[int]:
        """One owner less for each; those that are nobody's now.

        Raises:
            ValueError: one of them is nobody's already; nothing was changed.
        """
        blocks = list(blocks)
        self._check_owned(blocks)
        gone = []
        for block in blocks:
            self._owners[block] -= 1
            if not self._owners[block]:
                self._free.append(block)
                gone.append(block)
        return gone

    def _check_owned(self, blocks: Sequence[int]) -> None:
        for block, times in Counter(blocks).items():
            if not 0 <= block < len(self._owners) or self._owners[block] < times:
                raise ValueError(f"block {block} is nobody's")


class Sequences:
    """The sequences of a pool: their tokens, their blocks, and what a paged model is fed of them.

    A sequence's tokens are in the pools or wait to run. Iterating gives the sequences' numbers,
    oldest first. Every method that takes a number raises KeyError where there is no such sequence.

    Attributes:
        allocator: of the blocks.
    """

    def __init__(
        self, num_blocks: int, block_size: int, order: Sequence[int] | None = None
    ) -> None:
        """No sequences yet; the blocks are as of `BlockAllocator`."""
        self.allocator = BlockAllocator(num_blocks, block_size, order)
        self._all: dict[int, _Sequence] = {}
        self._next = 0

    def add(self, tokens: Sequence[int], prefix: int | None = None) -> int:
        """A new sequence that waits to run; its number.

        Args:
            tokens: of a prompt.
            prefix: a sequence whose full blocks are shared as far as both begin alike; of it only
                what is in the pools already. At least one token is left to run.
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

    def tokens(self, sequence: int) -> list[int]:
        """All tokens of a sequence, those that wait too."""
        return list(self._all[sequence].tokens)

    def length(self, sequence: int) -> int:
        """How many of a sequence's tokens are in the pools."""
        return self._all[sequence].length

    def blocks(self, sequence: int) -> list[int]:
        """The blocks of a sequence, in order."""
        return list(self._all[sequence].blocks)

    def waiting(self, sequence: int) -> int:
        """How many of a sequence's tokens have not run."""
        return len(self._all[sequence].tokens) - self._all[sequence].length

    def __iter__(self) -> Iterator[int]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def slots(self, sequence: int) -> Array:
        """The slot, block * BS + offset, of each token that is in the pools, int64 [T]."""
        found, size = self._all[sequence], self.allocator.block_size
        at = np.arange(found.length)
        return np.array(found.blocks, np.int64)[at // size] * size + at % size

    def feeds(self, counts: Mapping[int, int]) -> dict[str, Array]:
        """What a run of so many waiting tokens of each sequence is fed, pools apart.

        Blocks are taken for them and they count as run.

        Args:
            counts: by sequence, in the order of the run; 0 is allowed.

        Returns:
            input_ids int64 [N], cumulative_sequence_lengths int32 [B + 1], past_sequence_lengths
            int32 [B], block_table int32 [B, M], which is -1 behind the blocks of a sequence.

        Raises:
            OutOfBlocksError: nothing was changed.
            ValueError: fewer tokens wait; nothing was changed.
        """
        size = self.allocator.block_size
        for each, count in counts.items():
            if not 0 <= count <= self.waiting(each):
                raise ValueError(f"{self.waiting(each)} tokens of {each} wait, not {count}")
        needed = {
            each: max(-(-(self._all[each].length + n) // size) - len(self._all[each].blocks), 0)
            for each, n in counts.items()
        }
        fresh = self.allocator.take(sum(needed.values()))[::-1]
        tokens: list[int] = []
        cumulative, past, tables = [0], [], []
        for each, count in counts.items():
            found = self._all[each]
            found.blocks += [fresh.pop() for _ in range(needed[each])]
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

    def undo(self, counts: Mapping[int, int]) -> None:
        """The tokens of the last `feeds` wait again; blocks that were taken for them stay."""
        for each, count in counts.items():
            self._all[each].length -= count
