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
from dataclasses import dataclass, field
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
from tests.proof.tables import FILE, Table, sections
from tests.proof.view import Damage, Kind, View

FLOOR, LEAST = 0.995, 1000
"""The score, and the live mutants of the long run, below which the measurement fails."""

REFUSED = 0.03
"""The share of undamaged models above which it fails that the verifier rejects."""

README = Path(__file__).resolve().parent.parent.parent / "README.md"
BEGIN, END = "<!-- mutants -->", "<!-- end -->"

PAIRS = (
    ("onnx", "paged"),
    ("ort", "paged-ort"),
    ("ort-right", "paged-last"),
    ("onnx", "paged-indices"),
)
"""What is made of a model's exports, one after the other."""

SHORT = (
    ("llama/dynamo20", ("onnx", "paged")),
    ("gemma2/torchscript", ("ort-right",)),
    ("gpt_oss/torchscript-batched", ("paged-last",)),
    ("qwen3/dynamo20", ("paged-ort",)),
    ("mixtral/transformers-batched", ("onnx",)),
    ("bert/dynamo23", ("onnx",)),
)
ALL = "**all**"
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


@dataclass
class Found:
    """What came of one export.

    Attributes:
        subjects: how many models were made of it.
        refused: which of them the verifier rejects undamaged, and why.
        wrong: runs of the search on which an undamaged one differs, though it is proven.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    subjects: int = 0
    refused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def examine(job: Job) -> Found:
    """Damage what an export becomes."""
    found = Found()
    with (
        tempfile.TemporaryDirectory(prefix="onnxgen-") as folder,
        subjects(job.entry, job.forms, Path(folder) / "made", job.seed) as made,
    ):
        for subject in made:
            found.subjects += 1
            if subject.baseline.status != "proven":
                found.refused.append(f"{subject.name}: {subject.baseline.reason}")
                continue
            digest = zlib.crc32(subject.name.encode())
            rng, other = (np.random.default_rng([job.seed, digest, number]) for number in (0, 1))
            view = View(subject.model, kinds_of(subject))
            search = search_of(subject, other, job.runs)
            found.wrong += [f"undamaged, {line}" for line in search.odd]
            for damage in drawn(damages(view), rng, job.mutants):
                found.outcomes.append(judged(subject, search, damage))
    return found


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
    work = [Job(testing.corpus(name)[0], forms, 10, 24, seed) for name, forms in SHORT]
    if long:
        work += [Job(entry, forms, 16, 64, seed) for entry, forms in chosen(seed, 1)]
    every = []
    for job, found in zip(work, _each(work, jobs), strict=True):
        every.append(found)
        if long:
            passed = f"{time.monotonic() - start:.0f} s"
            print(f"{passed}: {job.entry.name} {' '.join(job.forms)}", file=sys.stderr, flush=True)
        for each in found.outcomes:
            if each.state == "survivor":
                print(f"survivor: {each.name}\n    {each.why}", file=sys.stderr, flush=True)
    return table(every, long=long)


def _each(work: Sequence[Job], jobs: int) -> Iterable[Found]:
    if jobs == 1:
        yield from map(examine, work)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(examine, work)


def table(every: Sequence[Found], *, long: bool) -> Table:
    """The outcomes by kind, and what they amount to."""
    outcomes = [outcome for found in every for outcome in found.outcomes]
    refused = [line for found in every for line in found.refused]
    subjects = sum(found.subjects for found in every)
    by_kind: dict[str, Counter[str]] = {}
    for each in outcomes:
        by_kind.setdefault(each.kind, Counter())[each.state] += 1
    rows = [_row(kind, by_kind[kind]) for kind in sorted(by_kind)]
    total: Counter[str] = sum(by_kind.values(), Counter())
    rows.append(_row(ALL, total))
    live = total["rejected"] + total["shown"] + total["survivor"]
    share = (live - total["survivor"]) / max(live, 1)
    survivors = [each for each in outcomes if each.state == "survivor"]
    failures = [line for found in every for line in found.wrong]
    failures += [f"survived: {e.name} ({e.why})" for e in survivors if e.name not in EXPLAINED]
    if share < FLOOR:
        failures.append(f"{share:.2%} of the live mutants are rejected, less than {FLOOR:.1%}")
    if long and live < LEAST:
        failures.append(f"{live} live mutants, less than {LEAST}")
    if len(refused) > REFUSED * subjects:
        failures += [f"rejected though undamaged: {line}" for line in refused]
    notes = [
        f"Score: {share:.2%} of {live:,} live mutants are rejected, of {subjects} models.",
        f"{total['shown']} of them the verifier rejected though the search found nothing.",
    ]
    notes += [f"Survivor: {e.name}: {EXPLAINED.get(e.name, 'not explained')}" for e in survivors]
    notes += [f"Not damaged, since it is not proven as it is: {line}" for line in refused]
    said = (
        "Fused and paged models of every family of the corpus, damaged one attribute, constant or "
        "edge at a time. *Not run*: ONNX Runtime refuses the mutant. *Equivalent*: neither the "
        "search nor the verifier finds a difference at these weights. *Live*: an output is further "
        "from the original's than the tolerance; of these the verifier has to reject 99.5 %."
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


def short_line(proof: str) -> str:
    """What README.md says of the table in a text of PROOF.md.

    Raises:
        ValueError: there is none.
    """
    for line in sections(proof).get("mutants", "").splitlines():
        kind, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if kind == ALL:
            live, rejected = (int(cell.replace(",", "")) for cell in cells[3:5])
            return (
                f"Of {live:,} damaged models that differ from their originals the verifier rejects "
                f"{rejected:,}, {rejected / live:.2%}: `python -m tests.proof mutants --long`, "
                "[tests/proof/PROOF.md](tests/proof/PROOF.md).\n"
            )
    raise ValueError("no table of mutants")


def with_short_line(readme: str, proof: str) -> str:
    """A README's text with that line between its markers.

    Raises:
        ValueError: the markers are missing, or the table is.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n{short_line(proof)}{END}{after}"


if __name__ == "__main__":  # README.md's line, from PROOF.md
    README.write_text(with_short_line(README.read_text("utf-8"), FILE.read_text("utf-8")), "utf-8")
