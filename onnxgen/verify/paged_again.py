"""A paged model run by a backend, compared with itself as ONNX Runtime runs it.

Both go through the same program of ragged steps (`verify.paged_program`), each on pools of its own;
every output, the pools too, is compared after each step.

Shapes: B sequences, N tokens of a run, NB blocks of BS slots, K key heads, D head size, V scores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxgen.paged import Sequences
from onnxgen.report.values import Case, Proof
from onnxgen.runtime import Picking, Runtime, RuntimeFailure
from onnxgen.targets.paged import KEY
from onnxgen.verify.difference import NotANumberError, scaled_difference
from onnxgen.verify.opened import read
from onnxgen.verify.paged_program import program
from onnxgen.verify.side import Side
from onnxgen.verify.tolerances import tolerance

Array = npt.NDArray[Any]
_BLOCKS = 160
_POOL = "past_key_values"
_TOKENS = 64  # tokens are drawn below it: every vocabulary has as many


def is_paged(model: ir.Model) -> bool:
    """Whether `to-paged` wrote a model."""
    return KEY in model.metadata_props


def paged_feeds(model: ir.Model) -> Iterator[tuple[str, dict[str, Array]]]:
    """What the steps of a program feed, by the step's name, pools apart.

    Ends at once where the model takes an input that no such program has.
    """
    size = int(json.loads(model.metadata_props[KEY])["block_size"])
    names = {value.name for value in model.graph.inputs}
    rng = np.random.default_rng(5)
    sequences = Sequences(_BLOCKS, size)
    numbers: dict[str, int] = {}
    for event in program(size, (), sharing=False):
        for name in event.leaves:
            sequences.remove(numbers.pop(name))
        counts: dict[int, int] = {}
        for name, (prompt, past, _) in event.joins.items():
            tokens = rng.integers(1, _TOKENS, prompt + past)
            numbers[name] = sequences.add([int(each) for each in tokens])
        for name, count in event.counts.items():
            number = numbers[name]
            count += event.joins[name][1] if name in event.joins else 0  # a past runs here first
            missing = count - sequences.waiting(number)
            if missing > 0:
                sequences.extend(number, [int(each) for each in rng.integers(1, _TOKENS, missing)])
            counts[number] = count
        feeds = sequences.feeds(counts)
        pools = {name for name in names if (name or "").startswith(_POOL)}
        if set(feeds) | pools != names:
            return
        yield f"{sum(counts.values())} tokens of {len(counts)} sequences", feeds


def empty_pools(model: ir.Model) -> dict[str, Array]:
    """Pools of small numbers, [NB, BS, K, D] each: what was never written must not matter."""
    rng = np.random.default_rng(6)
    found: dict[str, Array] = {}
    for value in model.graph.inputs:
        name = value.name or ""
        if name.startswith(_POOL) and value.shape is not None and value.dtype is not None:
            sizes = [_BLOCKS, *(each for each in value.shape[1:] if isinstance(each, int))]
            found[name] = (rng.standard_normal(sizes) * 0.1).astype(value.dtype.numpy())
    return found


def prove_again(
    original: Path,
    written: Path,
    picking: Picking,
    runtime: Runtime,
    progress: Callable[[str], None] = lambda message: None,
) -> Proof:
    """Compare the two on every step.

    Returns:
        "proven", "differs", or "unverifiable" where nothing could be run.
    """
    model = read(original)
    runtime.twins = frozenset()
    proof = Proof("unverifiable", tolerance(model, runtime))
    sides = (
        Side(runtime, original, as_written=True),
        Side(runtime, written, as_written=False, picking=picking),
    )
    for side, who in zip(sides, ("the original", f"what {picking.backend} compiled"), strict=True):
        try:
            side.load()
        except RuntimeFailure as error:
            proof.status = "unverifiable" if side is sides[0] else "differs"
            proof.reason = f"{who} cannot be loaded: {error}"
            return proof
    pools = [empty_pools(model), empty_pools(model)]
    try:
        for name, feeds in paged_feeds(model):
            progress(f"comparing {name}")
            proof.cases.append(_step(name, feeds, sides, pools))
            if proof.cases[-1].difference > proof.tolerance:
                case = proof.cases[-1]
                proof.status = "differs"
                proof.reason = (
                    f"output {case.output!r} differs by {case.difference:.2g} standard deviations "
                    f"in the step {name!r}; at most {proof.tolerance:g} is allowed"
                )
                return proof
    except (RuntimeFailure, NotANumberError) as error:
        proof.status, proof.reason = "differs", f"a step cannot be run: {error}"
        return proof
    finally:
        for side in sides:
            side.unload()
    proof.status = "proven" if proof.cases else "unverifiable"
    proof.reason = "" if proof.cases else "it takes inputs that no program of ours feeds"
    return proof


def _step(
    name: str,
    feeds: dict[str, Array],
    sides: tuple[Side, Side],
    pools: list[dict[str, Array]],
) -> Case:
    """Run both; each one's pools are what it answered."""
    found = [side.run({**feeds, **own}) for side, own in zip(sides, pools, strict=True)]
    worst, where = 0.0, ""
    for output, value in found[0].items():
        difference = scaled_difference(value, found[1][output])
        if difference >= worst:
            worst, where = difference, output
    for own, outputs in zip(pools, found, strict=True):
        for each in own:
            own[each] = outputs[each.replace(_POOL, "present")]
    rows = len(feeds["past_sequence_lengths"])
    tokens, past = len(feeds["input_ids"]), int(feeds["past_sequence_lengths"].max())
    return Case(name, rows, tokens, past, "none", worst, where)
