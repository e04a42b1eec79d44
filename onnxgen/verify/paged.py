"""Whether a paged model computes what the contiguous original does, on what paging is about.

    the original: each sequence alone, as far as it takes them   prefill, chunks, single tokens
    the paged model: the sequences together                      one ragged run a step

Prompts and single tokens run side by side; a sequence may have no new token; blocks are shuffled
and shared by a common beginning; sequences leave and others take their blocks; lengths cross every
edge of a block and of a window. Every slot that is nobody's holds NaN. After each step the scores,
the likeliest tokens and every cache are compared, and whatever was not to be written must be the
same bytes.

Shapes: B sequences, S new tokens, P past, T both, K key heads, D head size, N tokens of a run,
V scores, NB blocks of BS slots.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxgen.analysis.edges import integer
from onnxgen.analysis.roles import Roles
from onnxgen.report.values import Budget, Case, Proof
from onnxgen.runtime import Runtime, RuntimeFailure, SpentError
from onnxgen.targets.paged import PagedModel
from onnxgen.twin import FLOAT16, Types, has_choices, holds, twin_types
from onnxgen.verify.cases import find_edges, too_large
from onnxgen.verify.compare import TOLERANCES, compute_type, names_of
from onnxgen.verify.difference import NotANumberError, is_close_call, scaled_difference
from onnxgen.verify.opened import Source, read
from onnxgen.verify.paged_pairs import PagedPairs
from onnxgen.verify.paged_program import Event, program
from onnxgen.verify.paged_sides import Contiguous, PagedSide
from onnxgen.verify.precision import NOTE, rounds_activations
from onnxgen.verify.side import Side

Array = npt.NDArray[Any]
_MOST_SPECIAL = 4
_SEEDS = (3, 4, 5)
"""Of a program's tokens; all but the first where a difference came near the tolerance."""

_SPARE = 6
"""Places of a static cache that a prompt leaves to what comes after it."""


def prove_paged(
    original: Source,
    written: Sequence[Source],
    results: Sequence[PagedModel],
    roles: Roles,
    runtime: Runtime,
    progress: Callable[[str], None] = lambda message: None,
    budget: Budget = "full",
) -> Proof:
    """Compare the original with what it was paged to, for each size of blocks.

    The tolerance is that of the original's weights, or of the pools where these are narrower. Then
    a model that chooses experts is compared as float32 twins: rounding may choose others. As it is,
    it has to run.

    Args:
        original: as `read_model` takes it.
        written: where each of `results` lies.
        roles: of the original, as it was paged.
        budget: "quick", only for the size of blocks that was asked for, without edges; "full";
            "layers", all, of the models cut down to one layer of each kind.

    Returns:
        "proven", "differs" (with step, sequence and tensor) or "unverifiable".
    """
    sides = PagedPairs([original] * len(written), written, results, roles)
    if budget == "quick":
        sides = sides.first()
    elif budget == "layers":
        progress("cutting the models down to one layer of each kind")
        sides = sides.shortened()
    roles = sides.roles
    model = read(sides.originals[0])
    kinds = {compute_type(model), *(pool.dtype for pool in results[0].pools)}
    twins = twin_types(model)
    # Pools narrower than all that the original computes would let rounding choose experts.
    wide = _narrow_pools(model, results[0]) if has_choices(model) else frozenset()
    tolerance = max(TOLERANCES.get(ir.DataType.FLOAT if k in twins else k, 0.0) for k in kinds)
    proof = Proof("unverifiable", tolerance, twins=names_of(twins | wide), budget=budget)
    proof.layers, proof.layers_run = sides.layers, sides.layers_run
    near, _ = find_edges(model, roles)
    lengths = [family.size for family in results[0].families if family.size]
    edges = dict.fromkeys([*lengths, *near])
    plan = _Plan(
        [] if budget == "quick" else [e for e in edges if not too_large(roles, e)],
        _special_tokens(model, roles),
        rounds_activations(model),
    )
    if plan.full:
        proof.note = NOTE
    if budget == "quick":
        left = "other sizes of blocks, and lengths at which behaviour may switch"
        proof.not_run.append(f"{left} (--verify quick)")
    runtime.twins = twins | wide
    _compare(sides, runtime, plan, proof, progress)
    if wide and proof.status == "proven":
        runtime.twins = twins
        own = Proof("unverifiable", sys.float_info.max)  # only that it runs, and is finite
        _compare(sides, runtime, plan, own, progress)
        if own.status != "proven":
            proof.status, proof.reason = "differs", f"with its pools as they are, {own.reason}"
    return proof


@dataclass(frozen=True)
class _Plan:
    """What a program is made of: edges, special tokens, and whether rounding is left out."""

    edges: Sequence[int]
    special: Sequence[int]
    full: bool


def _narrow_pools(model: ir.Model, result: PagedModel) -> Types:
    """float16, where pools are of it and nothing in the original is."""
    narrow = any(pool.dtype == ir.DataType.FLOAT16 for pool in result.pools)
    return FLOAT16 if narrow and not holds(model, FLOAT16) else frozenset()


def _compare(
    sides: PagedPairs,
    runtime: Runtime,
    plan: _Plan,
    proof: Proof,
    progress: Callable[[str], None],
) -> None:
    """Load both, for each size of blocks, and go through its program; the proof takes what comes."""
    packed = proof.budget != "layers"
    first: Side | None = None
    for original, path, result in zip(sides.originals, sides.written, sides.results, strict=True):
        if first is None or first.source is not original:
            first = Side(runtime, original, as_written=True, full=plan.full, packed=packed)
            try:
                first.load()
            except RuntimeFailure as error:
                proof.reason = f"ONNX Runtime cannot load the original: {error}"
                return
        second = Side(runtime, path, as_written=False, full=plan.full, packed=packed)
        try:
            second.load()
        except SpentError as error:
            proof.reason = str(error)
            return
        except RuntimeFailure as error:
            proof.status = "differs"
            proof.reason = f"ONNX Runtime cannot load the paged model: {error}"
            return
        events = program(result.options.block_size, plan.edges, sharing=not result.switches)
        seen = len(proof.cases)
        for seed in _SEEDS:
            compare_steps(
                *(first, second, sides.roles, result, events, proof),
                special=plan.special,
                seed=seed,
                progress=progress,
            )
            near = (is_close_call(each.difference, proof.tolerance) for each in proof.cases[seen:])
            if proof.reason or not any(near):
                break
        second.unload()
        if proof.reason:
            return
    if first is not None:
        first.unload()
    if any(case.compared for case in proof.cases):
        proof.status = "proven"
    else:
        proof.reason = f"no step could be run: {proof.cases[0].skipped}"


def _special_tokens(model: ir.Model, roles: Roles) -> list[int]:
    """Tokens that something is equal to somewhere: a few random ones would hardly be among them."""
    bounds = [each.bound for each in roles.named("ids")]
    numbers = (
        integer(value, floats=False)
        for node in model.graph.all_nodes()
        if node.op_type == "Equal"
        for value in node.inputs
    )
    found = {n for n in numbers if n is not None and bounds and 0 < n < bounds[0]}
    return sorted(found)[-_MOST_SPECIAL:]


def compare_steps(
    original: Side,
    paged: Side,
    roles: Roles,
    result: PagedModel,
    events: Sequence[Event],
    proof: Proof,
    *,
    free: float = math.nan,
    special: Sequence[int] = (),
    seed: int = 3,
    progress: Callable[[str], None] = lambda message: None,
) -> None:
    """Take both models through a program; the proof takes its cases, and what differs.

    Args:
        original, paged: loaded.
        free: what slots hold that are nobody's.
        special: tokens that the original compares its own with: prompts hold them.
        seed: of the prompts' tokens.
    """
    first = Contiguous(original, roles, result.rows)
    first.special = special
    first.room = min(first.room, result.max_length or first.room)
    _Run(first, PagedSide(paged, result, free), proof, progress, seed).program(events)


class _Run:
    """Goes through the program."""

    def __init__(
        self,
        original: Contiguous,
        paged: PagedSide,
        proof: Proof,
        progress: Callable[[str], None],
        seed: int,
    ) -> None:
        self._original = original
        self._paged = paged
        self._proof = proof
        self._progress = progress
        self._numbers: dict[str, int] = {}
        self._tokens: dict[str, list[int]] = {}
        self._next: dict[str, int] = {}
        self._rng = np.random.default_rng(seed)

    def program(self, events: Sequence[Event]) -> None:
        """Go through all steps; the first that differs is the last, and the proof says why."""
        size, proof = self._paged.options.block_size, self._proof
        longest = sum(sum(j[:2]) + 40 for event in events for j in event.joins.values())
        self._paged.prepare(longest // size + 2 * len(events) + 4)
        for number, event in enumerate(events, 1):
            self._progress(f"comparing step {number}/{len(events)}, blocks of {size}")
            case = self._step(number, event)
            proof.cases.append(case)
            if proof.reason and not case.compared:
                return
            if case.compared and case.difference > proof.tolerance:
                proof.status = "differs"
                proof.reason = proof.reason or (
                    f"{case.output} differs by {case.difference:.2g} standard deviations in "
                    f"{case.name}; at most {proof.tolerance:g} is allowed"
                )
                return

    def _step(self, number: int, event: Event) -> Case:
        paged, original = self._paged, self._original
        for name in event.leaves:
            if name in self._numbers:
                paged.empty(paged.sequences.remove(self._numbers.pop(name)))
                original.forget(name)
        try:
            for name, joining in event.joins.items():
                self._join(name, *joining)
            counts = self._fitting(event.counts)
            name = _name(number, paged, self._numbers, counts)
            case = Case(name, len(counts), sum(counts.values()), 0, "none")
            if not any(counts.values()):
                return replace(case, skipped="the original takes no more tokens")
            wanted = {each: self._original_rows(each, n) for each, n in counts.items() if n}
        except RuntimeFailure as error:
            self._proof.reason = f"the original fails: {error}"
            return Case(f"step {number}", 0, 0, 0, "none", skipped=str(error))
        edges = np.cumsum([0, *counts.values()])
        run = {self._numbers[each]: count for each, count in counts.items()}
        try:
            outputs, spoiled = paged.run(run, original.embeddings)
        except SpentError as error:
            self._proof.reason = str(error)
            return replace(case, skipped=str(error))
        except RuntimeFailure as error:
            self._proof.reason = f"the paged model fails in {case.name}: {error}"
            return replace(case, difference=math.inf)
        if spoiled:
            self._proof.reason = f"{spoiled[0]} is written where no token belongs in {case.name}"
            return replace(case, difference=math.inf, output=spoiled[0])
        worst, where = 0.0, ""
        try:
            for output, difference in self._differences(counts, edges, wanted, outputs):
                if difference > worst or not where:
                    worst, where = difference, output
        except NotANumberError:
            return replace(case, skipped="the original computes NaN")
        return replace(case, difference=worst, output=where)

    def _fitting(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Of the sequences that are still there, as many tokens as the original has room for."""
        fitting = {}
        for name, count in counts.items():
            if name in self._numbers:
                number = self._numbers[name]
                past = self._paged.sequences.length(number)
                count = min(count, self._paged.sequences.waiting(number) or count)
                fitting[name] = count if past + count <= self._original.room else 0
        return fitting

    def _original_rows(self, name: str, count: int) -> dict[str, Array]:
        """The original's rows of a sequence's next tokens: those that wait, or the likeliest."""
        paged, original = self._paged, self._original
        sequence = self._numbers[name]
        past = paged.sequences.length(sequence)
        if paged.sequences.waiting(sequence) < count:
            self._extend(name, [self._next[name]] * count)
        rows = original.run(name, self._tokens[name][past : past + count], past)
        self._next[name] = int(rows["logits"][-1].astype(np.float64).argmax()) % original.vocabulary
        return rows

    def _join(self, name: str, new: int, past: int, prefix: str) -> None:
        """A sequence comes: a prompt, and a past of random keys where there is one."""
        paged, original = self._paged, self._original
        past = max(past, original.least)
        prefix = "" if past else prefix
        new = min(new, max(original.room - past - _SPARE, 1))
        if past + new > original.room:
            return
        fresh = self._rng.integers(0, original.vocabulary, past + new).tolist()
        for place, token in enumerate(original.special):
            if past + 2 * place + 1 < len(fresh):
                fresh[past + 2 * place + 1] = token
        alike = self._tokens[prefix][: paged.options.block_size] if prefix else []
        tokens = [*alike, *fresh[len(alike) :]]
        shares = self._numbers[prefix] if prefix else None
        number = self._numbers[name] = paged.sequences.add(tokens, shares)
        self._tokens[name] = tokens
        shared = paged.sequences.length(number)
        if shared:  # the original computes what is shared as well
            original.run(name, tokens[:shared], 0)
        if past:
            original.start(name, past)
            paged.sequences.feeds({number: past})
            slots = paged.sequences.slots(number)
            for pool in paged.result.pools:
                first, rows = original.cache(name, pool.past, past)
                paged.flat(pool.name)[slots[first:]] = rows

    def _extend(self, name: str, tokens: list[int]) -> None:
        self._tokens[name] += tokens
        self._paged.sequences.extend(self._numbers[name], tokens)

    def _differences(
        self,
        counts: Mapping[str, int],
        edges: Array,
        wanted: Mapping[str, Mapping[str, Array]],
        outputs: Mapping[str, Array],
    ) -> Iterator[tuple[str, float]]:
        """(what, how far apart) for the rows and the caches of every sequence."""
        paged = self._paged
        yield from self._logits(counts, edges, wanted, outputs["logits"])
        for _, output in paged.result.rows[1:]:
            for index, name in enumerate(counts):
                if counts[name]:
                    found = outputs[output][edges[index] : edges[index + 1]]
                    yield f"{output} of {name}", scaled_difference(wanted[name][output], found)
        for name in counts:
            number = self._numbers[name]
            slots = paged.sequences.slots(number)
            for pool in paged.result.pools if len(slots) else ():
                first, rows = self._original.cache(name, pool.past, len(slots))
                found = paged.flat(pool.name)[slots[first:]]
                yield f"{pool.output} of {name}", scaled_difference(rows.astype(found.dtype), found)

    def _logits(
        self,
        counts: Mapping[str, int],
        edges: Array,
        wanted: Mapping[str, Mapping[str, Array]],
        logits: Array,
    ) -> Iterator[tuple[str, float]]:
        """The same for the scores, of whichever rows are answered."""
        asked = self._paged.asked(edges)
        kind = self._paged.options.logits
        rows = {"all": edges[-1], "last": len(counts), "indices": len(asked)}[kind]
        if logits.ndim != 2 or len(logits) != rows:
            yield f"logits of shape {list(logits.shape)}", math.inf
            return
        for index, (name, count) in enumerate(counts.items()):
            if not count:
                if kind == "last" and logits[index].any():
                    yield f"logits of {name}, which has no new token,", math.inf
                continue
            right = wanted[name]["logits"]
            if kind == "last":
                found, right = logits[index : index + 1], right[-1:]
            elif kind == "indices":
                at = [i for i, row in enumerate(asked) if edges[index] <= row < edges[index + 1]]
                found, right = logits[at], right[asked[at] - edges[index]]
            else:
                found = logits[edges[index] : edges[index + 1]]
            yield f"logits of {name}", scaled_difference(right.astype(found.dtype), found)


def _name(
    number: int, paged: PagedSide, numbers: Mapping[str, int], counts: Mapping[str, int]
) -> str:
    parts = [
        f"{count} of {name} over {paged.sequences.length(numbers[name])}"
        for name, count in counts.items()
    ]
    return f"step {number}, blocks of {paged.options.block_size}: {', '.join(parts)}"
