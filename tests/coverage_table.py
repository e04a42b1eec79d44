"""The coverage table of README.md: what is fused in every stored export, and how it was proven.

    python tests/coverage_table.py                        # the four models the README shows
    python tests/coverage_table.py --models all           # everything in tests/corpus/
    python tests/coverage_table.py --write README.md      # put the table between the markers
    python tests/coverage_table.py --check                # exit 1 where README.md is no longer true

Each stored export is fused with every check on, exactly as `onnxgen fuse` does it. `--check` says
which cells are worse than README.md: fewer fused, more kept, more nodes, no longer proven. It and
`--write` end with 1 too when one of the four models is not fused completely.
"""

from __future__ import annotations

import argparse
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

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- coverage table -->", "<!-- end -->"

# Models of which nothing may be left over.
COMPLETE = ("llama", "qwen2", "qwen3", "mistral")

# A column's kind of site, the standard operator it becomes, and the operators that are gone then.
COLUMNS = {
    "attention": ("attention", "Attention", ("Softmax",)),
    "RMS norm": ("rms_norm", "RMSNormalization", ("Pow", "ReduceMean")),
    "rotary": ("rotary", "RotaryEmbedding", ("Neg",)),
}
HEADER = ("model", "form", *COLUMNS, "nodes", "cases", "largest difference")

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
Every stored export of these models, fused and proven by
`python tests/coverage_table.py --write README.md`. A site reads found/fused; *(n already)*: the
exporter itself wrote n of the standard's ops, or of ONNX Runtime's that say the same. An `Attention` that the exporter wrote counts as
found where its cache was outside. Nodes are before → after; cases are comparisons of the whole
model with the original, without those that the original itself cannot run; the difference is in
standard deviations of the original's output, of which 1e-4 is allowed, 1e-2 in fp16."""


@dataclass(frozen=True)
class Row:
    """One export's line of the table, as the text of its cells."""

    model: str
    form: str
    sites: Mapping[str, str]
    nodes: str
    cases: str
    difference: str

    @property
    def name(self) -> str:
        """`model/form`, as `onnxgen.testing` has it."""
        return f"{self.model}/{self.form}"

    @property
    def cells(self) -> tuple[str, ...]:
        """The texts in the order of `HEADER`."""
        sites = (self.sites[column] for column in COLUMNS)
        return (self.model, self.form, *sites, self.nodes, self.cases, self.difference)

    @classmethod
    def of_cells(cls, cells: Sequence[str]) -> Row:
        """The row whose `cells` these are."""
        model, form, *sites, nodes, cases, difference = cells
        return cls(model, form, dict(zip(COLUMNS, sites, strict=True)), nodes, cases, difference)


@dataclass(frozen=True)
class Result:
    """A row as measured now, with what is wrong about it whatever README.md says."""

    row: Row
    problems: tuple[str, ...]


def measure(entry: testing.CorpusEntry) -> Result:
    """Fuse one stored export, with every check on."""
    with tempfile.TemporaryDirectory(prefix="onnxgen-") as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(entry.load(), path)
        try:
            report = fuse(path, FuseOptions(), lambda message: None)
        except OnnxgenError as error:
            reason = str(error).replace(f"{path}: ", "")
            left = getattr(error, "report", None)
            if left is None:
                left = Report(input="", output="", target="onnx")
            return Result(_row(entry, left), (reason,))
        problems: list[str] = []
        if entry.model in COMPLETE:
            problems += _left_over(report)
            problems += _caches_outside(entry, Path(report.output))
    return Result(_row(entry, report), tuple(problems))


def _row(entry: testing.CorpusEntry, report: Report) -> Row:
    counts = summary(report.sites)
    sites = {}
    for column, (kind, op, _) in COLUMNS.items():
        spellings = {op: 1, **SPELLINGS.get(op, {})}
        already = sum(report.ops_before.get(name, 0) * each for name, each in spellings.items())
        if kind in counts:
            sites[column] = f"{counts[kind]['found']}/{counts[kind]['fused']}"
        else:
            sites[column] = f"({already} already)" if already else "-"
    proof = report.proof
    ran = [case for case in proof.cases if not case.skipped] if proof else []
    proven = proof is not None and proof.worst is not None and proof.status == "proven"
    return Row(
        entry.model,
        entry.form,
        sites,
        f"{report.nodes_before:,} → {report.nodes_after:,}",
        str(len(ran)),
        f"{proof.worst.difference:.1e}" if proven else proof.status if proof else "failed",
    )


def _left_over(report: Report) -> Iterator[str]:
    """What keeps an export from being fused completely: sites that were kept, and ops that no
    rule looked at but that the fused operators stand for."""
    counts = summary(report.sites)
    for column, (kind, op, gone) in COLUMNS.items():
        count = counts.get(kind)
        if count and count["fused"] < count["found"]:
            yield f"{column}: {count['found']} found, {count['fused']} fused"
        if not report.ops_after.get(op):
            yield f"{column}: the result has no {op}"
        for name in gone:
            if report.ops_after.get(name):
                yield f"{column}: {report.ops_after[name]} {name} left"


def _caches_outside(entry: testing.CorpusEntry, fused: Path) -> Iterator[str]:
    """Attention that is not given its past or gives no present, in a form whose cache grows.

    A cache whose rows differ in length is written by TensorScatter, and outside for that reason.
    """
    roles = {each["role"] for each in entry.info["inputs"].values()}
    if "past_key" not in roles or "static" in entry.form:
        return
    outside, nodes = 0, onnx.load(fused).graph.node
    written = {name for node in nodes if node.op_type == "TensorScatter" for name in node.output}
    for node in nodes:
        if node.op_type == "Attention" and node.input[1] not in written:
            past, present = [*filter(None, node.input[4:6])], [*filter(None, node.output[1:3])]
            outside += len(past) < 2 or len(present) < 2
    if outside:
        yield f"attention: {outside} with the cache outside"


def table(rows: Iterable[Row]) -> str:
    """The rows as a markdown table."""
    lines = [_line(HEADER), _line("---" for _ in HEADER)]
    return "\n".join([*lines, *(_line(row.cells) for row in rows)]) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def read_table(text: str) -> dict[str, Row]:
    """The rows that a README holds between its markers, by name.

    Raises:
        ValueError: the markers are missing, or a row has another number of cells.
    """
    rows = {}
    for line in _between(text)[1].splitlines():
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != len(HEADER):
            raise ValueError(f"not a row of the coverage table: {line}")
        if cells[0] not in (HEADER[0], "---"):
            row = Row.of_cells(cells)
            rows[row.name] = row
    return rows


def with_table(text: str, rows: Iterable[Row]) -> str:
    """A README's text with the rows between its markers.

    Raises:
        ValueError: the markers are missing.
    """
    before, _, after = _between(text)
    return f"{before}{BEGIN}\n{LEGEND}\n\n{table(rows)}{END}{after}"


def _between(text: str) -> tuple[str, str, str]:
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no {BEGIN} … {END}")
    return before, inside, after


def worse(now: Row, then: Row) -> Iterator[str]:
    """In what a row is worse than it was, one sentence each."""
    for column in COLUMNS:
        (found, fused), (found_then, fused_then) = _counts(now, column), _counts(then, column)
        if fused < fused_then:
            yield f"{column}: {fused} fused, {fused_then} before"
        if found - fused > found_then - fused_then:
            yield f"{column}: {found - fused} not fused, {found_then - fused_then} before"
    if _nodes(now) > _nodes(then) + SLACK:
        yield f"nodes: {now.nodes}, before {then.nodes}"
    if _proven(then) and not _proven(now):
        yield f"{now.difference}, was proven before"
    if int(now.cases) < int(then.cases):
        yield f"cases: {now.cases} run, {then.cases} before"


def _counts(row: Row, column: str) -> tuple[int, int]:
    found, _, fused = row.sites[column].partition("/")
    return (int(found), int(fused)) if fused else (0, 0)


def _nodes(row: Row) -> int:
    return int(row.nodes.rpartition(" ")[2].replace(",", ""))


def _proven(row: Row) -> bool:
    return row.difference[:1].isdigit()


def check(results: Iterable[Result], readme: str) -> list[str]:
    """Everything that README.md's text says better than it is now, one line each."""
    known = read_table(readme)
    found = []
    for result in results:
        row = result.row
        said = [*result.problems]
        if row.name in known:
            said += worse(row, known[row.name])
        elif row.model in COMPLETE:
            said.append("not in the table: python tests/coverage_table.py --write README.md")
        found += [f"{row.name}: {line}" for line in said]
    return found


def chosen(models: str, only: Sequence[str] = ()) -> list[testing.CorpusEntry]:
    """The corpus's entries of these models, comma-separated or "all", and of these patterns."""
    names = models.split(",")
    return [
        entry
        for entry in testing.corpus()
        if (models == "all" or entry.model in names)
        and (not only or any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in only))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(COMPLETE), help="comma-separated, or all")
    parser.add_argument("--only", action="append", default=[], help="pattern over model/form")
    parser.add_argument("--write", type=Path, metavar="README.md", help="replace its table")
    parser.add_argument("--check", action="store_true", help="exit 1 where README.md says more")
    options = parser.parse_args()
    entries = chosen(options.models, options.only)
    if not entries:
        parser.error("no stored export is meant")
    if options.write and options.only:
        parser.error("--write takes whole models")

    results = []
    for entry in entries:
        results.append(measure(entry))
        print(_line(results[-1].row.cells), file=sys.stderr, flush=True)
    rows = [result.row for result in results]
    print(table(rows), end="")
    problems = [f"{each.row.name}: {line}" for each in results for line in each.problems]
    if options.check:
        problems = check(results, README.read_text("utf-8"))
    elif options.write:
        options.write.write_text(with_table(options.write.read_text("utf-8"), rows), "utf-8")
    for line in problems:
        print(f"Worse: {line}" if options.check else f"Problem: {line}", file=sys.stderr)
    sys.exit(1 if problems and (options.check or options.write) else 0)


if __name__ == "__main__":
    main()
