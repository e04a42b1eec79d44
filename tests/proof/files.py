"""Faults of files: what the commands do when reading fails, writing fails, or they are killed.

Every row is the real command, run in a process of its own. What must hold in each: the output is
the old one or the new one, whole, with its data; the input is as it was; the command ends with a
sentence and its documented exit code, unless it was killed; and what a killed run leaves behind is
gone after the next.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.proof import file_models as models
from tests.proof.file_server import Job, Outcome, Server, contents
from tests.proof.tables import Table

HEADER = ("fault", "command", "exit", "what it said", "old output", "input", "left behind")
OLD = "out/model.fused.onnx"
FUSE = ["fuse", "in/model.onnx", "--no-verify", "-o", OLD, "--report", "report.json"]
FORCE = ["fuse", "in/model.onnx", "--no-verify", "-o", "in/model.onnx", "--force"]
BESIDE = [*FUSE, "--genai-config"]
PAGED = ["to-paged", "in/model.onnx", "--no-verify", "-o", "out", "--force"]


@dataclass
class Row:
    """What came of all runs of one fault."""

    fault: str
    command: str
    codes: set[str] = field(default_factory=set)
    said: dict[str, None] = field(default_factory=dict)
    output: set[str] = field(default_factory=set)
    input: set[str] = field(default_factory=set)
    left: str = ""
    runs: int = 0
    wrong: list[str] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        said = next(iter(self.said), "")
        more = f" (and {len(self.said) - 1} like it)" if len(self.said) > 1 else ""
        times = f", {self.runs} moments" if self.runs > 1 else ""
        kept, same = (", ".join(sorted(each)) for each in (self.output, self.input))
        codes = ", ".join(sorted(self.codes))
        return (
            self.fault + times,
            self.command,
            codes,
            said + more,
            kept,
            same,
            self.left or "nothing",
        )


class Judge:
    """Runs a job and says what is wrong with what came of it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.rows: list[Row] = []

    def run(
        self,
        title: str,
        build: Callable[[Path], object],
        words: list[str],
        codes: tuple[int, ...],
        says: str = "",
        *,
        replaces: tuple[str, ...] = (),
        news: bool = True,
        spoils: str = "",
        **changes: object,
    ) -> list[Outcome]:
        """Judge one fault.

        Args:
            build: makes the folder's content.
            codes: how the command may end.
            says: a part of what it must say where it does not end with 0.
            replaces: inputs that the command is told to replace.
            spoils: an input that the fault itself changes.
            news: the command succeeds without the fault, which is run too for comparison.
        """
        row = Row(title, _shown(words))
        with _folder() as folder:
            build(folder)
            before = contents(folder)
            new = before
            job = Job(words, str(folder), **changes)
            if news:
                plain = self._server.run(Job(words, str(folder)))[0]
                new = plain.after
                if plain.code:
                    row.wrong.append(f"fails without the fault: {plain.said}")
                models.clear(folder)
                build(folder)
            outcomes = self._server.run(job)
        for each in outcomes:
            self._judge(row, each, before, new, codes, says, {*replaces, spoils}, spoils, news)
        row.runs = len(outcomes)
        if not outcomes:
            row.wrong.append("the fault never came")
        self.rows.append(row)
        return outcomes

    def _judge(
        self,
        row: Row,
        outcome: Outcome,
        before: dict[str, str],
        new: dict[str, str],
        codes: tuple[int, ...],
        says: str,
        replaces: set[str],
        spoils: str,
        news: bool,
    ) -> None:
        where = f"at {outcome.event}: " if outcome.event else ""
        row.codes.add("killed" if outcome.code == -9 else str(outcome.code))
        said = outcome.said.strip().splitlines()
        sentence = said[-1] if said and outcome.code else ""
        if sentence:
            row.said[_short(sentence)] = None
        if outcome.code not in codes or "Traceback" in outcome.said:
            row.wrong.append(f"{where}ended with {outcome.code}: {outcome.said[-400:]}")
        if outcome.code > 0 and says not in outcome.said:
            row.wrong.append(f"{where}says nothing of {says!r}: {outcome.said}")
        after = outcome.after
        inputs = {name for name in before if name.startswith("in/")} - replaces
        changed = [name for name in inputs if after.get(name) != before[name]]
        row.input.add("changed" if changed else "intact")
        places = [name for name in before if name not in {*inputs, spoils}]
        kept = _whole(after, before, new, places)
        row.output.add(kept)
        if outcome.code == 0 and news and not kept.startswith("new"):
            row.wrong.append(f"{where}ends with 0 and the output is {kept}")
        left = after.keys() - before.keys() - new.keys()
        if changed or kept == "broken":
            row.wrong.append(f"{where}input {changed}, output {kept}")
        if left and outcome.code != -9:
            row.wrong.append(f"{where}leaves {sorted(left)}")
        elif left:
            row.left = "files under temporary names, which the next run removes"
        if outcome.again is not None:
            code, later = outcome.again
            extra = later.keys() - before.keys() - new.keys()
            if code or _whole(later, before, new, places) != "new" or extra:
                row.wrong.append(f"{where}the next run ends with {code} and leaves {sorted(extra)}")


def _whole(
    after: dict[str, str], before: dict[str, str], new: dict[str, str], places: list[str]
) -> str:
    """Whether all that was there is there, old or new, and what is new has its data."""
    olds = [name for name in places if after.get(name) == before[name] != new.get(name)]
    news = [name for name in new if after.get(name) == new[name] != before.get(name)]
    if any(after.get(name) not in (before[name], new.get(name)) for name in places):
        return "broken"
    models = [name for name in news if name.endswith(".onnx")]
    if models and any(after.get(name) != new[name] for name in new if name.endswith(".data")):
        return "broken"
    if news and olds:
        return "new, files beside it old" if models else "old"
    return "new" if models else "old"


def _short(sentence: str) -> str:
    sentence = re.sub(r"/\S*/onnxgen-proof-\w+", "…", sentence)
    return sentence if len(sentence) < 110 else sentence[:107] + "..."


def _shown(words: list[str]) -> str:
    kept = [word for word in words if word not in ("--no-verify", "in/model.onnx")]
    return re.sub(r"/\S*/onnxgen-proof-\w+", "…", " ".join(kept))


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="onnxgen-proof-") as name:
        os.chmod(name, 0o777)
        yield Path(name)


def measure(*, long: bool, jobs: int, seed: int) -> Table:
    """Every fault; the long run has a model of 20 GB verified layers beside it too."""
    from tests.proof import file_faults, file_sparse

    with Server() as server:
        judge = Judge(server)
        file_faults.all_of(judge, long=long)
    rows = judge.rows
    notes = ["a killed run cannot clean up; files of one command are renamed one after another"]
    failures = [f"{row.fault}, {row.command}: {line}" for row in rows for line in row.wrong]
    cells = [row.cells() for row in rows]
    sparse, said, wrong = file_sparse.measure(long=long)
    return Table(
        "files",
        "Each row is the real command in a process of its own; at every moment means: stopped at "
        "each creation, write (half of it done), sync and rename.",
        HEADER,
        [*cells, *sparse],
        [*notes, *said],
        [*failures, *wrong],
    )
