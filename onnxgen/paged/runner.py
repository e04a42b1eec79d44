"""A runner of paged models over an ONNX Runtime session, with one buffer a pool.

Shapes: K key heads, D head size, BS slots of a block, V scores.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxgen.errors import RefusedError
from onnxgen.paged.sequences import Array, Sequences

_FED = ("input_ids", "cumulative_sequence_lengths", "past_sequence_lengths", "block_table")
_POOL_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


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
