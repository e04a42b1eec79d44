"""How many damaged models the verifier lets pass.

    python -m tests.proof mutants --long --write

Every family of the corpus is fused for each target and paged, then damaged one attribute, constant
or edge at a time (`damage`, `damage_any`). A mutant is live where a large random search (`search`)
finds a run on which an output is further from the original's than the tolerance, or where the
verifier itself shows one; the score is the share of live mutants that the verifier rejects.
"""

from __future__ import annotations

import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from onnxgen import testing
from onnxgen.model_io import read_model
from onnxgen.runtime import RuntimeFailure
from onnxgen.verify.paged_twin import expand_attention
from tests.proof.damage import damages
from tests.proof.search import NotRunError, Search, search_of
from tests.proof.subjects import Subject, subjects
from tests.proof.tables import Table
from tests.proof.view import Damage, Kind, View

FLOOR, LEAST = 0.995, 1000
"""The score, and the live mutants of the long run, below which the measurement fails."""

PAIRS = (
    ("onnx", "paged"),
    ("ort", "paged-ort"),
    ("ort-right", "paged-last"),
    ("onnx", "paged-indices"),
)
"""What is made of a model's exports, one after the other."""

SHORT = ("llama/dynamo20", "gemma2/torchscript", "gpt_oss/torchscript-batched", "bert/dynamo23")
EXPLAINED: Mapping[str, str] = {}
"""Why a survivor survives, by its name."""

HEADER = ("kind", "mutants", "not run", "equivalent", "live", "rejected", "survivors")


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant.

    Attributes:
        name: `model/form target: kind: where`.
        state: "not run", "equivalent", "rejected", "shown" (rejected, though the search found
            nothing) or "survivor".
        why: the run that tells it from the original, or the refusal.
    """

    kind: str
    name: str
    state: str
    why: str


@dataclass(frozen=True)
class Job:
    """One export, and how much is done with it."""

    entry: testing.CorpusEntry
    forms: tuple[str, ...]
    mutants: int
    runs: int
    seed: int


def chosen(seed: int, per_model: int) -> list[tuple[testing.CorpusEntry, tuple[str, ...]]]:
    """Some exports of every model, and what each is made into."""
    rng = np.random.default_rng(seed)
    by_model: dict[str, list[testing.CorpusEntry]] = {}
    for entry in testing.corpus():
        by_model.setdefault(entry.model, []).append(entry)
    found = []
    for number, entries in enumerate(by_model.values()):
        for index, at in enumerate(rng.permutation(len(entries))[:per_model]):
            found.append((entries[at], PAIRS[(number + index) % len(PAIRS)]))
    return found


def examine(job: Job) -> tuple[list[Outcome], list[str]]:
    """Damage what an export becomes; the outcomes, and what must not be."""
    outcomes: list[Outcome] = []
    wrong: list[str] = []
    with (
        tempfile.TemporaryDirectory(prefix="onnxgen-") as folder,
        subjects(job.entry, job.forms, Path(folder) / "made", job.seed) as made,
    ):
        for subject in made:
            if subject.baseline.status != "proven":
                wrong.append(f"{subject.name} is not proven: {subject.baseline.reason}")
                continue
            digest = zlib.crc32(subject.name.encode())
            rng, other = (np.random.default_rng([job.seed, digest, number]) for number in (0, 1))
            view = View(subject.model, kinds_of(subject))
            search = search_of(subject, other, job.runs)
            wrong += [f"undamaged, {line}" for line in search.odd]
            for damage in drawn(damages(view), rng, job.mutants):
                outcomes.append(judged(subject, search, damage))
    return outcomes, wrong


def drawn(
    found: Mapping[str, Sequence[Damage]], rng: np.random.Generator, count: int
) -> list[Damage]:
    """One damage of each of so many kinds, those that a model has few of first and foremost."""
    keys = {kind: rng.random() ** (len(each) ** 0.25) for kind, each in sorted(found.items())}
    kinds = sorted(keys, key=lambda kind: -keys[kind])
    return [found[kind][int(rng.integers(len(found[kind])))] for kind in kinds[:count]]


def judged(subject: Subject, search: Search, damage: Damage) -> Outcome:
    """Ask the search, then the verifier."""
    name = f"{subject.name}: {damage.kind}: {damage.where}"
    try:
        model = damage.made(subject.model)
        live = search.differs(model)
    except NotRunError as error:
        return Outcome(damage.kind, name, "not run", str(error))
    proof = subject.verify(model)
    if proof.status != "proven":
        state = "rejected" if live else "shown"
        return Outcome(damage.kind, name, state, live or proof.reason)
    return Outcome(damage.kind, name, "survivor" if live else "equivalent", live)


def kinds_of(subject: Subject) -> dict[str, Kind]:
    """dtype and shape of what one run of the undamaged model gives, by name."""
    model = subject.model
    if subject.operator:
        twin = read_model(subject.write(model))
        expand_attention(twin)
        model = ir.serde.serialize_model(twin)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    outputs = {each.name for each in copy.graph.output}
    names = [name for node in copy.graph.node for name in node.output if name]
    copy.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in names if name not in outputs
    )
    runtime = subject.runtime
    feeds = dict(runtime.seen)
    try:
        session = runtime.load(copy.SerializeToString())
        found = {**feeds, **runtime.run(session, feeds)}
        runtime.unload(session)
    except RuntimeFailure:
        return {}
    return {name: (array.dtype, array.shape) for name, array in found.items()}


def measure(*, long: bool, jobs: int, seed: int) -> Table:
    """Damage models of every family, in the long run; of a few, in the short one."""
    start = time.monotonic()
    if long:
        work = [Job(entry, forms, 12, 96, seed) for entry, forms in chosen(seed, 2)]
    else:
        entries = [testing.corpus(name)[0] for name in SHORT]
        work = [
            Job(entry, PAIRS[number % len(PAIRS)], 10, 24, seed)
            for number, entry in enumerate(entries)
        ]
    outcomes, wrong = [], []
    for found, odd in _each(work, jobs):
        outcomes += found
        wrong += odd
        for each in found:
            if each.state == "survivor":
                print(f"survivor: {each.name}\n    {each.why}", file=sys.stderr, flush=True)
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    return table(outcomes, wrong, long=long)


def _each(work: Sequence[Job], jobs: int) -> Iterable[tuple[list[Outcome], list[str]]]:
    if jobs == 1:
        yield from map(examine, work)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(examine, work)


def table(outcomes: Sequence[Outcome], wrong: Sequence[str], *, long: bool) -> Table:
    """The outcomes by kind, and what they amount to."""
    by_kind: dict[str, Counter[str]] = {}
    for each in outcomes:
        by_kind.setdefault(each.kind, Counter())[each.state] += 1
    rows = [_row(kind, by_kind[kind]) for kind in sorted(by_kind)]
    total: Counter[str] = sum(by_kind.values(), Counter())
    rows.append(_row("**all**", total))
    live = total["rejected"] + total["shown"] + total["survivor"]
    share = (live - total["survivor"]) / max(live, 1)
    survivors = [each for each in outcomes if each.state == "survivor"]
    failures = list(wrong)
    failures += [f"survived: {e.name} ({e.why})" for e in survivors if e.name not in EXPLAINED]
    if share < FLOOR:
        failures.append(
            f"{share:.2%} of the live mutants are rejected, at least {FLOOR:.1%} are to be"
        )
    if long and live < LEAST:
        failures.append(f"{live} live mutants, at least {LEAST} are wanted")
    notes = [
        f"Score: {share:.2%} of {live:,} live mutants are rejected.",
        f"{total['shown']} of them the verifier rejected though the search found nothing.",
    ]
    notes += [f"Survivor: {e.name}: {EXPLAINED.get(e.name, 'not explained')}" for e in survivors]
    said = (
        "Mutants of fused and paged models by kind of damage. *Not run*: ONNX Runtime refuses them. "
        "*Equivalent*: neither the search nor the verifier finds a difference at these weights."
    )
    return Table("mutants", said, HEADER, rows, notes, failures)


def _row(kind: str, states: Mapping[str, int]) -> tuple[str, ...]:
    rejected = states.get("rejected", 0) + states.get("shown", 0)
    survivors = states.get("survivor", 0)
    numbers = (
        sum(states.values()),
        states.get("not run", 0),
        states.get("equivalent", 0),
        rejected + survivors,
        rejected,
        survivors,
    )
    return (kind, *(f"{number:,}" for number in numbers))
