"""The truth about a damaged model: a large random search for a run that tells it from the original.

It knows nothing of the cases that the verifier plans: lengths, batches, paddings, pasts, scales and
programs of paged sequences are drawn. The measure and the tolerance are the verifier's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from onnxgen.analysis.feeds import RunShape, forced_shape, make_feeds, nearest_shape
from onnxgen.analysis.roles import Roles
from onnxgen.errors import RefusedError
from onnxgen.model_io import read_model
from onnxgen.report.values import Proof
from onnxgen.runtime import RuntimeFailure
from onnxgen.verify.difference import NotANumberError, output_difference
from onnxgen.verify.paged_program import Event
from onnxgen.verify.paged_steps import compare_steps
from onnxgen.verify.paged_twin import staged_twins
from onnxgen.verify.precision import rounds_activations
from onnxgen.verify.side import Side
from tests.proof.subjects import Subject

Array = npt.NDArray[Any]
_FARTHEST = 400
_FIRST = 3


class NotRunError(Exception):
    """ONNX Runtime does not load a model, or none of its first runs succeed."""


class Search(Protocol):
    """What both kinds of search can do."""

    odd: list[str]
    """Runs on which the undamaged model itself differs, which must not be."""

    def differs(self, model: onnx.ModelProto) -> str:
        """The first run whose outputs are not the original's; "" where none is.

        Raises:
            NotRunError: it does not run at all.
        """


def search_of(subject: Subject, rng: np.random.Generator, runs: int) -> Search:
    """The search that suits a subject."""
    return (
        _Paged(subject, rng, max(runs // 16, 2)) if subject.results else _Fused(subject, rng, runs)
    )


@dataclass
class _Run:
    shape: RunShape
    feeds: dict[str, Array]
    wanted: dict[str, Array]
    name: str


class _Fused:
    """Single runs of random shapes and values."""

    def __init__(self, subject: Subject, rng: np.random.Generator, count: int) -> None:
        self.odd: list[str] = []
        self._subject = subject
        self._runtime = subject.runtime
        self._twins = subject.runtime.twins
        self._full = rounds_activations(read_model(subject.original))
        self._tolerance = subject.baseline.tolerance
        self._contract = subject.contract
        self._runs: list[_Run] = []
        self._fill(rng, count)

    def _fill(self, rng: np.random.Generator, count: int) -> None:
        roles, edges = self._subject.roles, _edges(self._subject)
        original = self._side(self._subject.original, as_written=True)
        whole = self._side(self._subject.model.SerializeToString(), as_written=False)
        for _ in range(4 * count):
            if len(self._runs) == count:
                break
            shape = _draw(roles, edges, rng)
            seed = int(rng.integers(1 << 30))
            if shape is None:
                continue
            feeds = make_feeds(roles, shape, np.random.default_rng(seed))
            plain = _vary(roles, feeds, rng)
            try:
                wanted = original.run(feeds)
            except RuntimeFailure:
                continue
            run = _Run(shape, feeds, wanted, f"{_said(shape)}, seed {seed}{plain}")
            try:
                found = self._difference(whole, run)
            except NotANumberError:
                continue
            if not found:
                self._runs.append(run)
            elif not plain:
                self.odd.append(f"{self._subject.name}: {found}")
        whole.unload()

    def _side(self, source: Any, *, as_written: bool) -> Side:
        self._runtime.twins = self._twins
        side = Side(self._runtime, source, as_written=as_written, full=self._full)
        side.load()
        return side

    def differs(self, model: onnx.ModelProto) -> str:
        try:
            side = self._side(model.SerializeToString(), as_written=False)
        except RuntimeFailure as error:
            raise NotRunError(str(error)) from error
        failed, last = 0, ""
        for run in self._runs:
            found = self._difference(side, run)
            if found.startswith("fails"):
                failed, last = failed + 1, found
                if failed == min(_FIRST, len(self._runs)):
                    raise NotRunError(found)
                continue
            if found or last:
                side.unload()
                return found or last
        side.unload()
        return last

    def _difference(self, side: Side, run: _Run) -> str:
        try:
            got = side.run(run.feeds)
        except RuntimeFailure as error:
            return "" if self._contract.refuses(run.shape) else f"fails: {run.name}: {error}"
        roles = self._subject.roles
        for name, output in roles.outputs.items():
            apart = output_difference(roles, output, run.shape, run.wanted[name], got[name])
            if apart > self._tolerance:
                return f"{name} by {apart:.2g}: {run.name}"
        return ""


def _edges(subject: Subject) -> list[int]:
    """Lengths at which something may change: what the model's makers chose, and small constants."""
    found = {subject.dims.get(key, 0) or 0 for key in ("window", "positions", "chunk")}
    for tensor in onnx.load(subject.original).graph.initializer:
        if tensor.data_type in (6, 7) and np.prod(tensor.dims) <= 2:
            found.update(abs(int(each)) for each in numpy_helper.to_array(tensor).flat)
    return sorted(each for each in found if 3 <= each <= _FARTHEST)


def _draw(roles: Roles, edges: Sequence[int], rng: np.random.Generator) -> RunShape | None:
    new = int(rng.choice([1, rng.integers(2, 10), rng.integers(10, 40)], p=[0.35, 0.45, 0.2]))
    past = int(rng.choice([0, rng.integers(1, 12), rng.integers(12, 60)], p=[0.3, 0.45, 0.25]))
    if edges and rng.random() < 0.35:
        total = int(rng.choice(edges)) + int(rng.integers(-4, 6))
        if roles.pairs:
            past = max(total - new, 0)
        else:
            new = max(total, 1)
    past = past if roles.pairs else 0
    batch = int(rng.choice([1, 2, 3, 4], p=[0.35, 0.3, 0.25, 0.1]))
    padding = rng.choice(["none", "left", "right"], p=[0.4, 0.3, 0.3])
    room = new - 1 if padding == "right" and new > 1 else past + new - 1
    pads: tuple[int, ...] = ()
    if padding != "none" and room > 0:
        pads = tuple(int(each) for each in rng.integers(0, min(room, 30) + 1, batch))
    spare = int(rng.integers(0, 6)) if roles.counted and rng.random() < 0.4 else 0
    encoder = int(rng.integers(3, 20))
    padding = padding if any(pads) else "none"
    with contextlib.suppress(ValueError):
        wanted = RunShape(batch, new, past, padding, pads if any(pads) else (), encoder, spare)
        return forced_shape(roles, wanted) or nearest_shape(roles, wanted)
    return None


def _vary(roles: Roles, feeds: dict[str, Array], rng: np.random.Generator) -> str:
    """Other scales and tokens than `make_feeds` gives, in place, for a part of the runs."""
    if rng.random() < 0.5:
        return ""
    said = ""
    for name, each in roles.inputs.items():
        if each.role in ("past", "embeds", "features", "pixels", "encoder_states", "cross_past"):
            if not np.issubdtype(feeds[name].dtype, np.floating):
                continue
            factor = float(rng.choice([0.2, 1.0, 3.0]))
            feeds[name] = (feeds[name] * factor).astype(feeds[name].dtype)
            said += f", {name} * {factor:g}" if factor != 1 else ""
        elif each.role == "ids" and each.bound and rng.random() < 0.5:
            few = rng.integers(0, each.bound, 2)
            feeds[name] = rng.choice([0, each.bound - 1, *few], feeds[name].shape).astype(
                feeds[name].dtype
            )
            said += f", few {name}"
    return said


def _said(shape: RunShape) -> str:
    said = f"{shape.new} over {shape.past}, batch {shape.batch}"
    return said + (f", {shape.padding} {shape.pads}" if shape.padding != "none" else "")


class _Paged:
    """Random programs of sequences that come, run and leave."""

    def __init__(self, subject: Subject, rng: np.random.Generator, count: int) -> None:
        self.odd: list[str] = []
        self._subject = subject
        self._runtime = subject.runtime
        self._twins = subject.runtime.twins
        self._result = subject.results[0]
        self._full = rounds_activations(read_model(subject.original))
        options = self._result.options
        sizes = [family.size for family in self._result.families if family.size]
        self._programs = [
            (draw_program(rng, options.block_size, sizes, not self._result.switches), seed)
            for seed in range(count)
        ]
        programs, self._programs = self._programs, []
        for program in programs:
            self._programs.append(program)
            found = self.differs(subject.model)
            if found:
                self._programs.pop()
            if found and not subject.operator:  # there rounding to float16 comes as far
                self.odd.append(f"{subject.name}: {found}")

    def differs(self, model: onnx.ModelProto) -> str:
        self._runtime.twins = self._twins
        path = self._subject.write(model)
        try:
            if not self._subject.operator:
                return self._found(path)
            with staged_twins([path]) as twins:
                return self._found(twins[0])
        except (RefusedError, RuntimeFailure) as error:
            raise NotRunError(str(error)) from error

    def _found(self, path: Any) -> str:
        own = self._subject
        first = Side(self._runtime, own.original, as_written=True, full=self._full)
        second = Side(self._runtime, path, as_written=False, full=self._full)
        first.load()
        second.load()
        try:
            for events, seed in self._programs:
                proof = Proof("unverifiable", own.baseline.tolerance)
                compare_steps(first, second, own.roles, self._result, events, proof, seed=seed)
                fails = proof.reason.startswith("the paged model fails")
                if fails and not any(
                    case.difference == 0 or case.compared for case in proof.cases[:-1]
                ):
                    raise NotRunError(proof.reason)
                if proof.reason and not proof.reason.startswith("the original fails"):
                    return f"{proof.reason}, program {seed}"
        finally:
            second.unload()
        return ""


def draw_program(
    rng: np.random.Generator, size: int, edges: Sequence[int], sharing: bool, steps: int = 14
) -> list[Event]:
    """A program of random sequences for blocks of a size."""
    events: list[Event] = []
    waiting: dict[str, int] = {}
    done: dict[str, int] = {}
    plain: set[str] = set()  # those without a past of random keys: their beginnings can be shared
    for step in range(steps):
        leaves = tuple(n for n in waiting if rng.random() < 0.08)
        for name in leaves:
            del waiting[name], done[name]
        shared = {n: length for n, length in done.items() if sharing and n in plain}
        joins = dict(_joining(rng, step, size, edges, shared, len(waiting)))
        for name, (new, past, _) in joins.items():
            waiting[name], done[name] = new, past
            plain |= {name} if not past else set()
        counts = {}
        for name in waiting:
            most = max(waiting[name], 1)
            some = int(rng.integers(1, most + 1))
            count = int(rng.choice([0, 1, some, most], p=[0.15, 0.35, 0.25, 0.25]))
            counts[name] = count
            waiting[name] -= min(count, waiting[name])
            done[name] += count
        events.append(Event(joins, counts, leaves))
    return events


def _joining(
    rng: np.random.Generator,
    step: int,
    size: int,
    edges: Sequence[int],
    done: dict[str, int],
    alive: int,
) -> Iterator[tuple[str, tuple[int, int, str]]]:
    for number in range(int(rng.integers(1, 3)) if alive < 5 else 0):
        if alive and rng.random() < 0.4:
            continue
        new = int(rng.choice([rng.integers(1, 6), rng.integers(2, 2 * size + 3)]))
        past, prefix = 0, ""
        if rng.random() < 0.4:
            past = int(rng.integers(1, 3 * size))
            if edges and rng.random() < 0.6:
                past = max(int(rng.choice(edges)) + int(rng.integers(-3, 4)), 0)
            past = min(past, 70)
        longer = [name for name, length in done.items() if length > size]
        if longer and not past and rng.random() < 0.4:
            prefix, new = str(rng.choice(longer)), new + size
        yield f"s{step}.{number}", (new, past, prefix)
