"""What a pipeline asks for and is told: expectations, baselines, and GitHub's annotations."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxgen.errors import one_line
from onnxgen.report import github
from onnxgen.report.values import Outcome

if TYPE_CHECKING:
    from onnxgen.expectations import Expectations

expect_option = click.option(
    "--expect",
    multiple=True,
    metavar="KIND=N|all|unchanged",
    help="Fail with exit code 5, writing nothing, unless so many places of a kind are fused, such "
    "as attention=24,moe=0; or nothing is kept (all); or nothing is left to fuse (unchanged). "
    "Repeatable.",
)
baseline_option = click.option(
    "--baseline",
    type=click.Path(readable=False, path_type=Path),
    metavar="FILE.json",
    help="Fail with exit code 5, writing nothing, where an earlier JSON report says that more was "
    "fused, the difference was within its tolerance, or the files were smaller.",
)


def expectations_of(expect: tuple[str, ...], baseline: Path | None, command: str) -> Expectations:
    """What the two options say.

    Raises:
        UsageError, FileError: see `onnxgen.expectations`.
    """
    from onnxgen import expectations

    before = None if baseline is None else expectations.read_baseline(baseline, command)
    return expectations.parse_expectations(expect, before)


def on_github(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether GitHub Actions runs this, as it says itself."""
    return environment.get("GITHUB_ACTIONS") == "true"


def annotate_error(message: str) -> None:
    """Have GitHub show a failure beside the run's result; on stderr, which it reads too."""
    if on_github():
        click.echo(github.command("error", one_line(message), title="onnxgen"), err=True)


def announce(outcome: Outcome) -> None:
    """Tell GitHub what happened: annotations on stderr, and the run's summary page.

    The failure's own annotation is `annotate_error`'s.
    """
    if not on_github():
        return
    from onnxgen.report import markdown

    workspace = os.environ.get("GITHUB_WORKSPACE", "")
    value = outcome.report or outcome.compared
    if value is not None:
        for line in github.annotated(value, workspace):
            click.echo(line, err=True)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        text = markdown.render(outcome)
        try:
            with open(summary, "a", encoding="utf-8") as file:
                file.write(f"{text}\n")
        except OSError as failure:  # the command's own end counts
            said = f"{summary} cannot be written: {failure.strerror}"
            click.echo(github.command("warning", one_line(said), title="onnxgen"), err=True)
