"""What paging costs a step and what it saves a server, beside the contiguous model.

    python tests/bench/bench_paged.py --cache /tmp/onnxgen-bench

Needs the extra `corpus` for the export (kept in the folder of --cache). The model of
`bench_targets.py`: six layers of the shape of a 0.5B model, random weights, fp32, on CPU.

Decode: eight sequences of 512 tokens and one new token each, run in turns by the export, by what
`fuse` makes of it and by what `to-paged` makes of it, on pools that are bound once. A figure is the
fastest of many, for one thread its processor time. Ratios are to the export of the same turns; in
brackets, to the fused model. The last column is the largest difference of the logits, in standard
deviations of the export's.

Serving: requests whose lengths are drawn from log-normal distributions, all there at the start and
answered greedily in the same memory for keys and values: padded batches over the fused model,
which reserve for each row the longest prompt of the batch and the most tokens that a request may
ask for, against continuous batching over the paged model, which answers for the last tokens or for
all as the fused one does: prompts run one at a time when blocks are free, all sequences decode
together, and where blocks run out the youngest waits and is run again. Tokens are those that were asked for. Wasted is the share of what is
reserved that holds no token, averaged over the steps; of pools that is the rest of each sequence's
last block, since nothing is reserved behind it. Nothing is asserted here: machines differ.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from bench_targets import DECODER
from common import exported, fused, paged, print_table

from onnxgen.paged import OutOfBlocksError, PagedRunner

BATCH, PAST = 8, 512
PROMPT, NEW = (32, 1024), (16, 256)

Array = np.ndarray[Any, Any]


def opened(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# --- decode --------------------------------------------------------------------------------------


def contiguous_step(session: Any, tokens: Array, pasts: Sequence[Array]) -> Callable[[], Array]:
    """A call that runs one new token of each sequence over its past and returns logits [B, V]."""
    feeds = dict(zip(cache_names(session), pasts, strict=True))
    feeds |= lengths_of(session, tokens, np.ones((len(tokens), PAST + 1), np.int64))
    return lambda: session.run(None, feeds)[0][:, -1]


def paged_step(
    session: Any, tokens: Array, pasts: Sequence[Array], block_size: int
) -> Callable[[], Array]:
    """The same on pools that hold the same pasts, in blocks that lie in no order."""
    blocks = BATCH * -(-(PAST + 1) // block_size)
    runner = PagedRunner(session, blocks)
    taken = runner.sequences.allocator.take(blocks)
    runner.sequences.allocator.give_back(np.random.default_rng(0).permutation(taken).tolist())
    numbers = [runner.add([*[0] * PAST, int(token)]) for token in tokens[:, 0]]
    runner.sequences.feeds(dict.fromkeys(numbers, PAST))
    for pool, past in zip(runner.pools.values(), pasts, strict=True):
        flat = pool.reshape(-1, *pool.shape[2:])
        for row, number in enumerate(numbers):
            flat[runner.sequences.slots(number)] = past[row].swapaxes(0, 1)
    counts = dict.fromkeys(numbers, 1)

    def run() -> Array:
        rows = runner.run(counts)
        runner.sequences.undo(counts)
        return np.concatenate(list(rows.values()))

    return run


def cache_names(session: Any) -> list[str]:
    return [value.name for value in session.get_inputs() if len(value.shape) == 4]


def lengths_of(session: Any, tokens: Array, mask: Array) -> dict[str, Array]:
    """The inputs of a contiguous model beside its caches; positions count what is not padding."""
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -tokens.shape[1] :]
    given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    names = [value.name for value in session.get_inputs() if len(value.shape) == 2]
    return {name: given[name] for name in names}


def bench_decode(paths: dict[str, Path], options: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, DECODER["vocab"], (BATCH, 1))
    shape = (BATCH, DECODER["kv_heads"], PAST, DECODER["head_size"])
    pasts = [rng.standard_normal(shape).astype(np.float32) for _ in range(2 * DECODER["layers"])]
    rows = []
    for threads in (1, 2):
        clock = time.thread_time if threads == 1 else time.perf_counter
        times: dict[str, list[float]] = {name: [] for name in paths}
        differences = dict.fromkeys(paths, 0.0)
        for _ in range(options.repeats):
            runs: dict[str, Callable[[], Array]] = {}
            for name, path in paths.items():
                session = opened(path, threads)
                runs[name] = (
                    paged_step(session, tokens, pasts, options.block_size)
                    if name.startswith("paged")
                    else contiguous_step(session, tokens, pasts)
                )
            wanted = next(iter(runs.values()))()
            for name, run in runs.items():
                gap = float(np.abs(run() - wanted).max() / wanted.std())
                differences[name] = max(gap, differences[name])
            end = time.perf_counter() + options.seconds / options.repeats
            order = list(runs)
            while time.perf_counter() < end:
                order = order[1:] + order[:1]
                for name in order:
                    start = clock()
                    runs[name]()
                    times[name].append(clock() - start)
            del runs, run, session
            gc.collect()
        best = {name: min(found) for name, found in times.items()}
        base, *_ = best.values()
        for name, seconds in best.items():
            ratio = f"{seconds * 1e3:.2f} ms" if seconds is base else f"{seconds / base:.2f}"
            if name.startswith("paged"):
                ratio += f" ({seconds / best['fused']:.2f})"
            rows.append([str(threads), name, ratio, f"{differences[name]:.1e}"])
    print(f"Decode, {BATCH} sequences over {PAST} tokens, blocks of {options.block_size}\n")
    print_table(["threads", "model", "step", "difference"], rows)


# --- serving -------------------------------------------------------------------------------------


@dataclass
class Request:
    """A prompt, and how many tokens it asks for."""

    prompt: list[int]
    new: int
    answer: list[int] = field(default_factory=list)


@dataclass
class Served:
    """What serving took.

    Attributes:
        seconds: on the wall.
        processor: seconds of all threads.
        wasted: for each step the share of what was reserved that held no token.
        answers: of each request.
    """

    seconds: float = 0.0
    processor: float = 0.0
    wasted: list[float] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    steps: int = 0
    again: int = 0


def drawn(count: int, seed: int) -> list[Request]:
    """Requests of log-normal lengths."""
    rng = np.random.default_rng(seed)
    prompts = np.clip(rng.lognormal(np.log(160), 0.9, count), *PROMPT).astype(int)
    news = np.clip(rng.lognormal(np.log(64), 0.8, count), *NEW).astype(int)
    return [
        Request(rng.integers(0, DECODER["vocab"], length).tolist(), int(new))
        for length, new in zip(prompts, news, strict=True)
    ]


def serve_padded(session: Any, requests: Sequence[Request], memory: int) -> Served:
    """Batches as they come, as many rows as the memory has room for, until the last row is done."""
    served = Served()
    waiting = list(requests)
    while waiting:
        batch = [waiting.pop(0)]
        while waiting:
            longest = max(len(each.prompt) for each in [*batch, waiting[0]]) + NEW[1]
            if (len(batch) + 1) * longest > memory:
                break
            batch.append(waiting.pop(0))
        _padded_batch(session, batch, served)
    return served


def _padded_batch(session: Any, batch: Sequence[Request], served: Served) -> None:
    width = max(len(each.prompt) for each in batch)
    reserved = len(batch) * (width + NEW[1])
    tokens = np.array([[0] * (width - len(e.prompt)) + e.prompt for e in batch])
    mask = np.array([[0] * (width - len(e.prompt)) + [1] * len(e.prompt) for e in batch])
    binding = session.io_binding()
    names = cache_names(session)
    outputs = [value.name for value in session.get_outputs()]
    empty = np.zeros((len(batch), DECODER["kv_heads"], 0, DECODER["head_size"]), np.float32)
    caches = [onnxruntime.OrtValue.ortvalue_from_numpy(empty) for _ in names]
    for step in range(max(each.new for each in batch)):
        for name, array in lengths_of(session, tokens, mask).items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, cache in zip(names, caches, strict=True):
            binding.bind_ortvalue_input(name, cache)
        binding.clear_binding_outputs()
        for name in outputs:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        logits, *caches = binding.get_outputs()
        tokens = logits.numpy()[:, -1].argmax(-1)[:, None]
        for each, token in zip(batch, tokens[:, 0].tolist(), strict=True):
            if len(each.answer) < each.new:
                each.answer.append(token)
        held = sum(len(each.prompt) + min(step, each.new) for each in batch)
        served.wasted.append(1 - held / reserved)
        served.steps += 1
        mask = np.concatenate([mask, np.ones((len(batch), 1), np.int64)], axis=1)


def serve_paged(session: Any, requests: Sequence[Request], memory: int, size: int) -> Served:
    """A prompt as soon as its blocks are free, one at a time; all sequences decode together."""
    served = Served()
    runner = PagedRunner(session, memory // size)
    sequences = runner.sequences
    waiting = list(requests)
    running: dict[int, Request] = {}
    while waiting or running:
        counts = dict.fromkeys(running, 1)
        if waiting:
            first = waiting[0]
            tokens = [*first.prompt, *first.answer]
            # One block more for each that runs already, so that it does not have to go at once.
            if -(-len(tokens) // size) + len(running) <= sequences.allocator.free:
                number = runner.add(tokens)
                running[number] = waiting.pop(0)
                counts = {number: len(tokens)}
        try:
            rows = runner.run(counts)
        except OutOfBlocksError:
            last = max(running)
            runner.remove(last)
            waiting.insert(0, running.pop(last))
            served.again += 1
            continue
        served.steps += 1
        blocks = sequences.allocator
        taken = (blocks.num_blocks - blocks.free) * size
        served.wasted.append(1 - sum(map(sequences.length, sequences)) / taken)
        for number, logits in rows.items():
            token = int(logits[-1].argmax())
            running[number].answer.append(token)
            runner.extend(number, [token])
            if len(running[number].answer) == running[number].new:
                runner.remove(number)
                del running[number]
    return served


def bench_serving(paths: dict[str, Path], options: argparse.Namespace) -> None:
    memory = options.rows * (PROMPT[1] + NEW[1])
    asked = drawn(options.requests, options.seed)
    total = sum(each.new for each in asked)
    found: dict[str, Served] = {}
    for name, path in paths.items():
        requests = [Request(each.prompt, each.new) for each in asked]
        session = opened(path, options.threads)
        start, used = time.perf_counter(), time.process_time()
        if name.startswith("paged"):
            served = serve_paged(session, requests, memory, options.block_size)
        else:
            served = serve_padded(session, requests, memory)
        served.seconds = time.perf_counter() - start
        served.processor = time.process_time() - used
        served.answers = [each.answer for each in requests]
        found[name] = served
        del session
        gc.collect()
    base, *_ = found.values()
    rows = []
    for name, served in found.items():
        same = sum(a == b for a, b in zip(served.answers, base.answers, strict=True))
        rows.append(
            [
                name,
                f"{total / served.seconds:.1f}",
                f"{base.seconds / served.seconds:.2f}",
                f"{base.processor / served.processor:.2f}",
                f"{100 * float(np.mean(served.wasted)):.1f} %",
                str(served.steps),
                str(served.again),
                f"{same} of {len(asked)}",
            ]
        )
    lengths = [len(each.prompt) for each in asked], [each.new for each in asked]
    print(
        f"Serving {len(asked)} requests, prompts of {min(lengths[0])} to {max(lengths[0])} "
        f"(mean {np.mean(lengths[0]):.0f}), {min(lengths[1])} to {max(lengths[1])} new "
        f"(mean {np.mean(lengths[1]):.0f}), memory for {memory} tokens, "
        f"{options.threads} threads\n"
    )
    header = ["server", "tokens/s", "ratio", "ratio of processor time", "wasted", "steps"]
    print_table([*header, "run again", "same answers"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, help="folder that keeps the models")
    parser.add_argument("--form", default="dynamo20")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32, help="0 for none")
    parser.add_argument(
        "--rows", type=int, default=8, help="memory: of so many longest prompts and answers"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="for serving")
    parser.add_argument("--seconds", type=float, default=20, help="for decode; 0 for none")
    parser.add_argument("--repeats", type=int, default=3, help="loads of each model")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {platform.machine()}; ", end="")
    print(", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "onnx")) + "\n")
    with tempfile.TemporaryDirectory(prefix="onnxgen-") as temporary:
        folder = options.cache or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        export = exported(folder, "qwen2", options.form, DECODER)
        size = f"--block-size {options.block_size}"
        models = {"export": export, "fused": fused(export, "onnx"), "paged": paged(export, size)}
        if options.seconds:
            bench_decode(models, options)
        if options.requests:
            last = paged(export, f"{size} --logits last")
            servers = {"fused, padded": models["fused"], "paged, last logits": last}
            bench_serving({**servers, "paged, all logits": models["paged"]}, options)


if __name__ == "__main__":
    main()
