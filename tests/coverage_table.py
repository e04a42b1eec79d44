"""The coverage table: what is fused in every stored export, and how it was proven.

    python -m tests.coverage_table                         # measure everything, print the table
    python -m tests.coverage_table --only 'llama/*'        # some exports
    python -m tests.coverage_table --write                 # tests/corpus/COVERAGE.md and README.md
    python -m tests.coverage_table --check                 # exit 1 where a cell got worse

Each stored export is fused with every check on, exactly as `onnxgen fuse` does it. The whole table,
one row for each model, form and target, is tests/corpus/COVERAGE.md; README.md has a line a model.
`--check` says which cells are worse than the table: fewer fused, more kept, more left over, more
nodes, no longer proven; and what is not fused completely, whatever the table says. In CI the same
comes from the run of `tests/test_pipeline.py` over the whole corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from onnxgen import testing
from onnxgen.errors import OnnxgenError
from onnxgen.pipeline import FuseOptions, fuse
from onnxgen.report.as_json import summary
from onnxgen.report.values import Report
from tests.graphs import run
from tests.leftovers import leftovers

HERE = Path(__file__).resolve().parent
TABLE, README = HERE / "corpus" / "COVERAGE.md", HERE.parent / "README.md"
BEGIN, END = "<!-- coverage table -->", "<!-- end -->"
TARGETS = ("onnx",)

# A column's kind of site, and the standard operator it becomes.
COLUMNS = {
    "attention": ("attention", "Attention"),
    "RMS norm": ("rms_norm", "RMSNormalization"),
    "layer norm": ("layer_norm", "LayerNormalization"),
    "rotary": ("rotary", "RotaryEmbedding"),
    "experts": ("moe", "MoE"),
}
GROWING = ("past_key", "past_value", "static_key", "static_value")
KEYS = ("model", "form", "target")
HEADER = (*KEYS, *COLUMNS, "left", "nodes", "cases", "largest difference")
SUMMARY = ("model", "exports", *COLUMNS, "left", "nodes", "largest difference")

# Nodes that a form may gain without being called worse.
SLACK = 2

# Operators of ONNX Runtime that say what so many of the standard's say.
SPELLINGS: Mapping[str, Mapping[str, int]] = {
    "RMSNormalization": {
        "SimplifiedLayerNormalization": 1,
        "SkipSimplifiedLayerNormalization": 1,
    },
    "RotaryEmbedding": {"GroupQueryAttention": 2},  # it turns queries and keys itself
}

LEGEND = """\
A site reads found/fused; *(n already)*: the exporter itself wrote n of the standard's ops, or of
ONNX Runtime's that say the same. An `Attention` that the exporter wrote counts as found where its
cache was outside. *Left* is what
`onnxgen.analysis.resemblance` counts in the written model without asking any rule. Nodes are before → after;
cases are comparisons of the whole model with the original, without those that the original itself
cannot run; the difference is in standard deviations of the original's output, of which 1e-4 is
allowed, 1e-2 in fp16."""
TITLE = """\
# Coverage

Every stored export, fused and proven. Written by `python -m tests.coverage_table --write`; CI fails
when a cell gets worse."""
SHORT = """\
All stored exports of each model (TorchScript, dynamo at opsets 18 to 23, transformers' exporter;
with caches and without, for one token, static, cropped, in fp16), fused and proven;
[tests/corpus/COVERAGE.md](tests/corpus/COVERAGE.md) has a row for each export."""


@dataclass(frozen=True)
class Row:
    """One export's line of the table, as the text of its cells."""

    model: str
    form: str
    target: str
    sites: Mapping[str, str]
    left: str
    nodes: str
    cases: str
    difference: str

    @property
    def name(self) -> str:
        """`model/form target`: what a row is found by."""
        return f"{self.model}/{self.form} {self.target}"

    @property
    def cells(self) -> tuple[str, ...]:
        """The texts in the order of `HEADER`."""
        sites = (self.sites[column] for column in COLUMNS)
        keys = (self.model, self.form, self.target)
        return (*keys, *sites, self.left, self.nodes, self.cases, self.difference)

    @classmethod
    def of_cells(cls, cells: Sequence[str]) -> Row:
        """The row whose `cells` these are."""
        model, form, target, *sites, left, nodes, cases, difference = cells
        by_column = dict(zip(COLUMNS, sites, strict=True))
        return cls(model, form, target, by_column, left, nodes, cases, difference)

    def count(self, column: str) -> tuple[int, int]:
        """Sites found and fused."""
        found, _, fused = self.sites[column].partition("/")
        return (int(found), int(fused)) if fused else (0, 0)

    @property
    def nodes_before_after(self) -> tuple[int, int]:
        before, _, after = self.nodes.replace(",", "").partition(" → ")
        return int(before), int(after)

    @property
    def remaining(self) -> int:
        """How many sites are left over, whatever their kind."""
        return sum(int(part.split()[0]) for part in self.left.split(", ") if part != "-")

    @property
    def proven(self) -> bool:
        return self.difference[:1].isdigit()


def measure(entry: testing.CorpusEntry, target: str = "onnx") -> tuple[Row, list[str]]:
    """Fuse one stored export, with every check on: its row, and what is wrong whatever was before."""
    with tempfile.TemporaryDirectory(prefix="onnxgen-") as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(entry.load(), path)
        try:
            report = fuse(path, FuseOptions(target=target), lambda message: None)
        except OnnxgenError as error:
            reason = str(error).replace(f"{path}: ", "")
            left = getattr(error, "report", None) or Report(input="", output="", target=target)
            return row_of(entry, left, None), [reason]
        fused = onnx.load(report.output)
    row = row_of(entry, report, fused)
    return row, list(incomplete(row))


def row_of(entry: testing.CorpusEntry, report: Report, fused: onnx.ModelProto | None) -> Row:
    """The row of a report and of the model that was written; None where none was."""
    counts = summary(report.sites)
    sites = {}
    for column, (kind, op) in COLUMNS.items():
        spellings = {op: 1, **SPELLINGS.get(op, {})}
        already = sum(report.ops_before.get(name, 0) * each for name, each in spellings.items())
        if kind in counts:
            sites[column] = f"{counts[kind]['found']}/{counts[kind]['fused']}"
        else:
            sites[column] = f"({already} already)" if already else "-"
    proof = report.proof
    ran = [case for case in proof.cases if case.compared] if proof else []
    proven = proof is not None and proof.worst is not None and proof.status == "proven"
    return Row(
        entry.model,
        entry.form,
        report.target,
        sites,
        "-" if fused is None else left_over(entry, fused),
        f"{report.nodes_before:,} → {report.nodes_after:,}",
        str(len(ran)),
        f"{proof.worst.difference:.1e}" if proven else proof.status if proof else "failed",
    )


def left_over(entry: testing.CorpusEntry, fused: onnx.ModelProto) -> str:
    """What a written model still holds in parts, such as "2 attention, 4 cache", or "-".

    "1 batch": it runs for one sequence only.
    """
    inputs = entry.info["inputs"].items()
    found = leftovers(fused, [name for name, each in inputs if each["role"] in GROWING])
    found["batch"] += not runs_in_batches(entry, fused)
    found = +found
    return ", ".join(f"{found[kind]} {kind}" for kind in sorted(found)) or "-"


def runs_in_batches(entry: testing.CorpusEntry, fused: onnx.ModelProto) -> bool:
    """Whether a model runs for several sequences, at any lengths that its export was tried at."""
    tried = [*entry.info["runs"], *(map(int, key.split(",")) for key in entry.info["fails"])]
    for batch, new, past in tried:
        if batch > 1:
            with contextlib.suppress(Exception):
                run(fused, entry.feeds(batch, new, past))
                return True
    return False


def incomplete(row: Row) -> Iterator[str]:
    """What keeps an export from being fused completely, one sentence each."""
    for column in COLUMNS:
        found, fused = row.count(column)
        if fused < found:
            yield f"{column}: {found} found, {fused} fused"
    if row.left != "-":
        yield f"left over: {row.left}"
    if not row.proven:
        yield row.difference


def read_table(text: str) -> dict[str, Row]:
    """The rows of a COVERAGE.md, by name.

    Raises:
        ValueError: a row has another number of cells.
    """
    rows = {}
    for line in text.splitlines():
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != len(HEADER):
            raise ValueError(f"not a row of the coverage table: {line}")
        if cells[0] not in (HEADER[0], "---"):
            row = Row.of_cells(cells)
            rows[row.name] = row
    return rows


def table(rows: Iterable[Row]) -> str:
    """The rows as a markdown table."""
    return _markdown(HEADER, (row.cells for row in rows))


def written_table(rows: Iterable[Row]) -> str:
    """The text of COVERAGE.md."""
    return f"{TITLE}\n{LEGEND}\n\n{table(rows)}"


def short_table(rows: Sequence[Row]) -> str:
    """A line a model: the sums of its exports, and their largest difference."""
    lines = []
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model and row.target == TARGETS[0]]
        sums = []
        for column in COLUMNS:
            found, fused = (sum(row.count(column)[i] for row in own) for i in (0, 1))
            already = any("already" in row.sites[column] for row in own)
            sums.append(f"{found}/{fused}" if found else "(already)" if already else "-")
        left = sum(row.remaining for row in own)
        before, after = (sum(row.nodes_before_after[i] for row in own) for i in (0, 1))
        odd = [row.difference for row in own if not row.proven]
        worst = odd[0] if odd else max((row.difference for row in own), key=float)
        nodes = f"{before:,} → {after:,}"
        lines.append((model, str(len(own)), *sums, str(left) if left else "-", nodes, worst))
    return _markdown(SUMMARY, lines)


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    every = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in every)


def with_short_table(readme: str, rows: Sequence[Row]) -> str:
    """A README's text with the short table between its markers.

    Raises:
        ValueError: the markers are missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n{SHORT}\n{LEGEND}\n\n{short_table(rows)}{END}{after}"


def worse(now: Row, then: Row | None) -> Iterator[str]:
    """In what a row is worse than it was, one sentence each."""
    if then is None:
        yield "not in the table: python -m tests.coverage_table --write"
        return
    for column in COLUMNS:
        (found, fused), (found_then, fused_then) = now.count(column), then.count(column)
        if fused < fused_then:
            yield f"{column}: {fused} fused, {fused_then} before"
        if found - fused > found_then - fused_then:
            yield f"{column}: {found - fused} not fused, {found_then - fused_then} before"
    if now.remaining > then.remaining:
        yield f"left over: {now.left}, before {then.left}"
    if now.nodes_before_after[1] > then.nodes_before_after[1] + SLACK:
        yield f"nodes: {now.nodes}, before {then.nodes}"
    if then.proven and not now.proven:
        yield f"{now.difference}, was proven before"
    if int(now.cases) < int(then.cases):
        yield f"cases: {now.cases} run, {then.cases} before"


def chosen(only: Sequence[str] = ()) -> list[testing.CorpusEntry]:
    """The corpus's entries, or those whose `model/form` one of the patterns fits."""
    return [
        entry
        for entry in testing.corpus()
        if not only or any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in only)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", action="append", default=[], help="pattern over model/form")
    parser.add_argument("--write", action="store_true", help="COVERAGE.md and README.md's table")
    parser.add_argument("--check", action="store_true", help="exit 1 where a cell got worse")
    options = parser.parse_args()
    entries = chosen(options.only)
    if not entries:
        parser.error("no stored export is meant")

    known = read_table(TABLE.read_text("utf-8")) if TABLE.exists() else {}
    rows: list[Row] = []
    problems: list[str] = []
    for target in TARGETS:
        for entry in entries:
            row, wrong = measure(entry, target)
            rows.append(row)
            wrong += worse(row, known.get(row.name)) if options.check else []
            print(f"| {' | '.join(row.cells)} |", *wrong, sep="\n    ", file=sys.stderr, flush=True)
            problems += [f"{row.name}: {line}" for line in wrong]
    print(table(rows), end="")
    if options.write:
        names = {entry.name for entry in chosen()}
        kept = {name: row for name, row in known.items() if name.split(" ")[0] in names}
        merged = kept | {row.name: row for row in rows}
        every = [merged[name] for name in sorted(merged)]
        TABLE.write_text(written_table(every), "utf-8")
        README.write_text(with_short_table(README.read_text("utf-8"), every), "utf-8")
    for line in problems:
        print(f"Problem: {line}", file=sys.stderr)
    sys.exit(1 if problems and options.check else 0)


if __name__ == "__main__":
    main()
