"""Taking the original and a paged model through a program, step by step, and comparing.

After each step the scores, the likeliest tokens and every cache are compared, and whatever was not
to be written must be the same bytes.

Shapes: B sequences, S new tokens, P past, K key heads, D head size, V scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxgen.analysis.roles import Roles
from onnxgen.report.values import Case, Proof
from onnxgen.runtime import RuntimeFailure, SpentError
from onnxgen.targets.paged import PagedModel
from onnxgen.verify.difference import NotANumberError, scaled_difference
from onnxgen.verify.paged_program import Event
from onnxgen.verify.paged_sides import Contiguous, PagedSide
from onnxgen.verify.side import Side

Array = npt.NDArray[Any]
_SPARE = 6
"""Places of a static cache that a prompt leaves to what comes after it."""


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
        self._deck: list[int] = []

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
        fresh = [0] * past + self._dealt(new)  # a past is random keys: its tokens are not run
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

    def _dealt(self, count: int) -> list[int]:
        """Random tokens; none comes again before all have come."""
        while len(self._deck) < count:
            self._deck += self._rng.permutation(self._original.vocabulary).tolist()
        dealt, self._deck = self._deck[:count], self._deck[count:]
        return dealt

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
                    rows = outputs[output]
                    if rows.ndim > wanted[name][output].ndim:
                        # Inside a model its tokens are one row, or each a row of its own.
                        rows = rows.reshape(-1, rows.shape[-1])
                    found = rows[edges[index] : edges[index + 1]]
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
