"""Several models: a bar each while they are worked on, a table at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Group, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from onnxgen.bounds import in_words
from onnxgen.errors import one_line
from onnxgen.report import text
from onnxgen.report.values import Report
from onnxgen.words import time_in_words

# How each stage's message begins, in order: a bar is as long as what is behind it.
STAGES = ("reading", "normalizing", "raising", "lowering", "writing", "verifying")

WIDE = 400
"""Columns where no terminal says how many there are: names of files are not cut."""

_ENDS = {0: "done", 1: "differs", 2: "usage", 3: "refused", 4: "file", 5: "not as expected"}


@contextmanager
def bars(names: Sequence[str]) -> Iterator[Callable[[int, str], None]]:
    """Show a bar for each name; yields what is told of a number and what is done for it now."""
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(20, table_column=Column(min_width=20)),
        TimeElapsedColumn(table_column=Column(min_width=7)),
        TextColumn(
            "{task.fields[doing]}",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
    )
    console = text.console(stderr=True)
    few = len(names) < console.height  # of more only those that are worked on
    with Progress(*columns, console=console, transient=True, expand=True) as progress:
        tasks = [
            progress.add_task(
                one_line(name), start=False, visible=few, total=len(STAGES), doing="waiting"
            )
            for name in names
        ]

        def show(number: int, message: str) -> None:
            _show(progress, tasks[number], message, few=few)

        yield show


def _show(progress: Progress, task: TaskID, message: str, *, few: bool) -> None:
    progress.start_task(task)
    progress.update(task, visible=few or bool(message))
    if not message:
        progress.update(task, completed=len(STAGES), doing="ended")
        progress.stop_task(task)
        return
    stage = message.partition(" ")[0]
    if stage in STAGES:
        progress.update(task, completed=STAGES.index(stage))
    progress.update(task, doing=one_line(message))


def render(rows: Sequence[tuple[str, Report | None, int, float]]) -> RenderableType:
    """A row a model: its name, report, exit code and seconds; then how many are done."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("model", "fused", "not fused", "nodes", "size", "difference", "time", "end"):
        named = column in ("model", "end")
        table.add_column(
            column, justify="left" if named else "right", overflow="fold", no_wrap=not named
        )
    for name, report, code, seconds in rows:
        table.add_row(
            Text(one_line(name)),
            *_figures(report),
            time_in_words(seconds),
            Text(_end(report, code), "green" if code == 0 else "red"),
        )
    done = sum(code == 0 for _, _, code, _ in rows)
    return Group(table, Text(f"{done} of {len(rows)} models done"))


def _figures(report: Report | None) -> tuple[str, str, str, str, str]:
    if report is None:
        return ("-",) * 5
    fused = sum(site.status == "fused" for site in report.sites)
    worst = report.proof.worst if report.proof is not None else None
    return (
        str(fused),
        str(len(report.sites) - fused),
        f"{report.nodes_before} → {report.nodes_after}",
        in_words(report.bytes_after or report.bytes_before),
        "-" if worst is None else f"{worst.difference:.1e}",
    )


def _end(report: Report | None, code: int) -> str:
    if code == 0 and report is not None and report.proof is not None:
        return report.proof.status
    return _ENDS.get(code, str(code))
