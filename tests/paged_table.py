"""The table of paged exports: which stored exports page, and how that was proven.

    python -m tests.paged_table                         # page everything, print the table
    python -m tests.paged_table --only 'llama/*'        # some exports
    python -m tests.paged_table --write                 # tests/corpus/PAGED.md

Each stored export goes through `onnxgen to-paged` as a user would run it, both sizes of blocks and
all. In CI `tests/test_to_paged.py` does the same and fails where a row says more than comes out.
"""

from __future__ import annotations

import argparse
import fnmatch
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

from onnxgen import testing
from onnxgen.errors import OnnxgenError
from onnxgen.pipeline_paged import PageOptions, to_paged
from onnxgen.report.values import Report

TABLE = Path(__file__).resolve().parent / "corpus" / "PAGED.md"
HEADER = ("model", "form", "result", "masks", "pools", "bytes a token", "steps", "difference")
TITLE = """\
# Paged exports

Every stored export, paged. Written by `python -m tests.paged_table --write`; CI fails where less is
proven than here. A code says why an export cannot be paged: PAG002 it continues no cache, PAG004 its
mask is of no family that can be paged, PAG005 it mixes tokens outside attention, PAG006 it reads an
encoder's states. Steps are ragged runs of all sequences, compared with each sequence run alone by
the original, for blocks of 16 and of 4; the difference is in standard deviations of the original's
output, of which 1e-4 is allowed, 1e-2 in fp16."""


@dataclass(frozen=True)
class Row:
    """One export's line, as the texts of its cells, in the order of `HEADER`."""

    model: str
    form: str
    result: str
    masks: str = "-"
    pools: str = "-"
    bytes_a_token: str = "-"
    steps: str = "-"
    difference: str = "-"

    @property
    def name(self) -> str:
        return f"{self.model}/{self.form}"


def measure(entry: testing.CorpusEntry) -> Row:
    """Page one stored export."""
    report, error = paged(entry)
    if report is None or report.paging is None:
        return Row(entry.model, entry.form, f"failed: {error}")
    if report.paging.obstacles:
        codes = Counter(each.code for each in report.paging.obstacles)
        return Row(entry.model, entry.form, ", ".join(sorted(codes)))
    proof, paging = report.proof, report.paging
    assert proof is not None
    ran = [case for case in proof.cases if case.compared]
    return Row(
        entry.model,
        entry.form,
        proof.status,
        "; ".join(paging.families),
        f"{len(paging.pools)} {paging.kv_dtype}",
        f"{paging.token_bytes:,}",
        str(len(ran)),
        f"{proof.worst.difference:.1e}" if proof.worst else "-",
    )


def paged(entry: testing.CorpusEntry) -> tuple[Report | None, str]:
    """The report of one export's paging, and why it failed."""
    with tempfile.TemporaryDirectory(prefix="onnxgen-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(entry.load().SerializeToString())
        try:
            return to_paged(path, PageOptions(output=Path(folder) / "out"), lambda _: None), ""
        except OnnxgenError as failure:
            return failure.report, str(failure)


def worse(row: Row, before: Row | None) -> list[str]:
    """How a row says less than before, a sentence each."""
    if before is None:
        return [f"{row.name} has no row in {TABLE.name}: write it"]
    said = []
    if row.result != before.result and row.result != "proven":
        said.append(f"{row.result}, was {before.result}")
    if row.masks != before.masks and before.result == "proven":
        said.append(f"masks: {row.masks}, were {before.masks}")
    if row.steps.isdigit() and before.steps.isdigit() and int(row.steps) < int(before.steps):
        said.append(f"{row.steps} steps run, {before.steps} before")
    return said


def as_text(rows: Iterable[Row]) -> str:
    rows = sorted(rows, key=lambda row: row.name)
    lines = [" | ".join(HEADER), " | ".join("---" for _ in HEADER)]
    lines += [" | ".join(astuple(row)) for row in rows]
    table = "\n".join(f"| {line} |" for line in lines)
    proven = sum(row.result == "proven" for row in rows)
    return f"{TITLE}\n\n{proven} of {len(rows)} page.\n\n{table}\n"


def read(text: str) -> Mapping[str, Row]:
    """The rows of a table, by name."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [Row(*(cell.strip() for cell in line.strip("|").split(" | "))) for line in lines[2:]]
    return {row.name: row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--only", default="*", metavar="GLOB")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows = dict(read(TABLE.read_text("utf-8"))) if TABLE.exists() else {}
    stored = {entry.name for entry in testing.corpus()}
    rows = {name: row for name, row in rows.items() if name in stored}
    for entry in testing.corpus():
        if fnmatch.fnmatch(entry.name, options.only):
            rows[entry.name] = row = measure(entry)
            print(" | ".join(astuple(row)), flush=True)
    if options.write:
        TABLE.write_text(as_text(rows.values()), "utf-8")


if __name__ == "__main__":
    main()
