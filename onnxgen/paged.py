"""Running paged models: which blocks a sequence owns, and a runner over an ONNX Runtime session.

    runner = PagedRunner("model.paged/model.onnx", num_blocks=256)
    a = runner.add(prompt)
    runner.step()                                # {a: logits [n, V]} of the tokens that ran
    b = runner.add([*prompt, 9], prefix=a)       # shares a's full blocks as far as both are alike
    for _ in range(20):
        for sequence, logits in runner.step().items():
            runner.extend(sequence, [int(logits[-1].argmax())])
    runner.remove(a)                             # b keeps the blocks that it shares

A reference for what `onnxgen to-paged` writes, and what proves it; a server is onnxruntime-genai's
Engine. It runs models of tokens (`input_ids`) written with `--logits all` or `last` and without
`--slot-mapping`, on CPU. Nothing here is made for several threads.

Shapes: N new tokens of all sequences, B sequences, M blocks of the longest, V scores.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxgen.errors import RefusedError

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


class PagedRunner:
    """Runs a paged model; past and present share one buffer a pool, so that nothing is copied.

    Attributes:
        session: the `onnxruntime.InferenceSession`.
        sequences: whose tokens and blocks are in the pools.
        pools: the pools by input name, [num_blocks, BS, K, D], float32 or float16: the memory
            that the model writes, not a copy of it. They are zeros to begin with.
    """

    def __init__(self, model: Any, num_blocks: int) -> None:
        """Make the pools.

        Args:
            model: a path, which is run on CPU, or an `onnxruntime.InferenceSession` of one.
            num_blocks: how many blocks each pool has, at least 1.

        Raises:
            RefusedError: the model is not paged, cannot be run, takes inputs that a runner does
                not know, or has pools of another type than float32 and float16.
            ValueError: there are no blocks.
        """
        import onnxruntime as ort

        if num_blocks < 1:
            raise ValueError(f"{num_blocks} blocks hold nothing")
        if isinstance(model, str | Path):
            model = _opened(Path(model))
        self.session = model
        pools = _pool_inputs(model)
        self.sequences = Sequences(num_blocks, int(pools[0].shape[1]))
        self.pools: dict[str, Array] = {}
        self._presents: dict[str, Any] = {}
        self._outputs = [each.name for each in model.get_outputs()]
        self._binding = model.io_binding()
        for pool in pools:
            array = np.zeros((num_blocks, *pool.shape[1:]), _POOL_TYPES[pool.type])
            value = ort.OrtValue.ortvalue_from_numpy(array)  # the same memory on CPU
            self.pools[pool.name] = array
            self._presents[pool.name.replace("past_key_values", "present")] = value
            self._binding.bind_ortvalue_input(pool.name, value)

    def add(self, tokens: Sequence[int], prefix: int | None = None) -> int:
        """A new sequence, which runs with the next step; see `Sequences.add`."""
        return self.sequences.add(tokens, prefix)

    def extend(self, sequence: int, tokens: Sequence[int]) -> None:
        """More tokens of a sequence, which run with the next step; see `Sequences.extend`."""
        self.sequences.extend(sequence, tokens)

    def remove(self, sequence: int) -> None:
        """Forget a sequence: its blocks are free, but for those that others share.

        Raises:
            KeyError: there is no such sequence.
        """
        self.sequences.remove(sequence)

    def step(self, limit: int | None = None) -> dict[int, Array]:
        """Run the tokens that wait, those of the oldest sequences first.

        Args:
            limit: at most so many tokens: long prompts run in pieces. A piece that ends within
                its prompt has logits too; `sequences.waiting` says how many tokens are left.

        Returns:
            What `run` does; {} where nothing waits.

        Raises:
            OutOfBlocksError: the pools are full; nothing ran.
        """
        left = limit if limit is not None else sys.maxsize
        counts: dict[int, int] = {}
        for sequence in self.sequences:
            count = min(self.sequences.waiting(sequence), left)
            if count > 0:
                counts[sequence] = count
                left -= count
        return self.run(counts) if counts else {}

    def run(self, counts: Mapping[int, int]) -> dict[int, Array]:
        """Run so many of the waiting tokens of each of these sequences, all in one run.

        Returns:
            By sequence the logits of its tokens that ran, [n, V] of the model's type; [1, V] of a
            model that answers for last tokens. Where the run failed its tokens wait again.

        Raises:
            OutOfBlocksError: the pools are full; nothing ran.
            KeyError, ValueError: there is no such sequence, or not so many tokens of it.
        """
        feeds = self.sequences.feeds(counts)
        binding = self._binding
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        # Outputs come back in the order in which they were bound.
        binding.clear_binding_outputs()
        for name in self._outputs:
            if name in self._presents:
                binding.bind_ortvalue_output(name, self._presents[name])
            else:
                binding.bind_output(name)
        try:
            self.session.run_with_iobinding(binding)
        except Exception:
            self.sequences.undo(counts)
            raise
        logits = binding.get_outputs()[self._outputs.index("logits")].numpy()
        if len(logits) != len(feeds["input_ids"]):  # one row a sequence
            return {each: logits[row : row + 1] for row, each in enumerate(counts)}
        edges = feeds["cumulative_sequence_lengths"]
        return {each: logits[edges[row] : edges[row + 1]] for row, each in enumerate(counts)}


_FED = ("input_ids", "cumulative_sequence_lengths", "past_sequence_lengths", "block_table")
_POOL_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def _opened(path: Path) -> Any:
    """A session of a model on CPU.

    Raises:
        RefusedError: ONNX Runtime cannot run it.
    """
    import onnxruntime as ort

    try:
        return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        words = " ".join(str(error).split())
        raise RefusedError(f"{path} cannot be run on ONNX Runtime's CPU: {words}") from error


def _pool_inputs(session: Any) -> list[Any]:
    """The inputs that are pools, in the session's order.

    Raises:
        RefusedError: as the runner's.
    """
    inputs = session.get_inputs()
    missing = [name for name in _FED[1:] if name not in {each.name for each in inputs}]
    if missing:
        raise RefusedError(f"the model is not paged: it has no input {missing[0]!r}")
    pools = [each for each in inputs if each.name.startswith("past_key_values.")]
    for each in inputs:
        if each not in pools and each.name not in _FED:
            raise RefusedError(f"a PagedRunner does not feed the input {each.name!r}")
    if not pools:
        raise RefusedError("the model is not paged: it has no pools past_key_values.N")
    for each in pools:
        if each.type not in _POOL_TYPES:
            kind = each.type.removeprefix("tensor(").removesuffix(")")
            raise RefusedError(
                f"the pool {each.name!r} is {kind}, and a PagedRunner has float and float16 only: "
                "NumPy and ONNX Runtime's CPU know no other"
            )
    return pools
