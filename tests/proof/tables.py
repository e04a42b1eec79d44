"""A measurement's table, and the file that holds all of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

FILE = Path(__file__).resolve().parent / "PROOF.md"


@dataclass(frozen=True)
class Table:
    """What a measurement found, as texts.

    Attributes:
        name: the measurement's, which its section of PROOF.md is called by.
        said: what was counted and how, for a reader of the table alone.
        rows: of as many cells as `header`.
        notes: one line each behind the table: what survived, and why.
        failures: what must not be, one line each: the command exits with 1 where there is any.
    """

    name: str
    said: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    failures: Sequence[str] = field(default=())

    def __str__(self) -> str:
        lines = [f"## {self.name}", "", self.said, ""]
        lines += [_line(self.header), _line(["---"] * len(self.header))]
        lines += [_line(row) for row in self.rows]
        lines += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def sections(text: str) -> dict[str, str]:
    """PROOF.md's sections by name; what stands before the first has the name ""."""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    return {re.sub(r"^## (.*)\n[\s\S]*|[\s\S]*", r"\1", part): part for part in parts}


def write(tables: Sequence[Table]) -> None:
    """Put the tables into PROOF.md; the sections of other measurements stay."""
    found = sections(FILE.read_text("utf-8")) if FILE.exists() else {}
    found.setdefault("", "# Proof\n\nWritten by `python -m tests.proof --write`.\n")
    for table in tables:
        found[table.name] = str(table)
    texts = [part.rstrip("\n") + "\n" for part in found.values()]
    FILE.write_text("\n".join(texts), "utf-8")
