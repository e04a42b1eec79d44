"""What every command shares with its user: paths in, sentences and progress out."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from onnxgen.cli_ci import annotate_error, announce
from onnxgen.errors import OnnxgenError, RefusedError, UsageError, one_line
from onnxgen.places import same_place
from onnxgen.report import files
from onnxgen.report.render import check_ending
from onnxgen.report.values import Outcome, Proof, Report

Progress = Callable[[str], None]


class PathType(click.Path):
    """A path; whether it can be read or written is said later, with exit code 4."""

    def __init__(self, **kinds: bool) -> None:
        super().__init__(readable=False, path_type=Path, **kinds)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if not os.fspath(value):
            self.fail("a path is empty", param, ctx)
        return Path(os.fsdecode(super().convert(value, param, ctx)))


def prepare_streams() -> None:
    """Only what onnxgen says is said, and saying it cannot fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # "→" where the encoding has none
    if not debugging():
        logging.getLogger().addHandler(logging.NullHandler())
        warnings.simplefilter("ignore")


def debugging() -> bool:
    """Whether tracebacks were asked for."""
    return os.environ.get("ONNXGEN_DEBUG") == "1"


def say_error(error: Exception | str) -> None:
    click.echo(f"Error: {one_line(str(error))}", err=True)
    annotate_error(str(error))


def unexpected(error: Exception) -> OnnxgenError:
    """A failure of onnxgen itself, as a sentence."""
    if debugging():
        traceback.print_exception(error)
    if isinstance(error, MemoryError):
        return RefusedError("there is not enough memory for this model and what is asked of it")
    detail = " ".join(str(error).split())[:300]
    return RefusedError(
        f"onnxgen failed unexpectedly ({type(error).__name__}: {detail}); this is a bug, please "
        "report it with what ONNXGEN_DEBUG=1 prints"
    )


@contextmanager
def show_progress() -> Iterator[Progress]:
    """What is being done, on one line of stderr while it is a terminal; nothing in a pipe."""
    if is_quiet() or not sys.stderr.isatty():
        yield lambda message: None
        return
    from rich.text import Text

    from onnxgen.report import text

    with text.console(stderr=True).status(Text("starting")) as status:
        yield lambda message: status.update(Text(message))


role_option = click.option(
    "--role",
    "roles",
    multiple=True,
    metavar="NAME=ROLE",
    help="Say what an input is for, such as tokens=ids, where its use leaves that open. Repeatable.",
)
verify_option = click.option(
    "--verify",
    "budget",
    type=click.Choice(["quick", "full", "layers"]),
    default="full",
    show_default=True,
    help="How much to compare: a few cases; all; all, of the model cut down to one layer of each kind.",
)
no_verify_option = click.option(
    "--no-verify", is_flag=True, help="Run nothing, per-rewrite checks included: unproven."
)
rules_option = click.option(
    "--rules",
    multiple=True,
    type=PathType(dir_okay=False),
    metavar="FILE.py",
    help="Apply rules of your own, checked like ours; the file is run. Repeatable.",
)
report_option = click.option(
    "--report",
    "report_file",
    type=PathType(),
    metavar="FILE",
    help="Write a report, whatever the outcome: .json, .html (a page), .xml (JUnit) or .md. "
    "Only a report is replaced.",
)
json_option = click.option(
    "--json", "json_output", is_flag=True, help="Print the report as JSON and nothing else."
)


_LOUDNESS = "onnxgen.loudness"
STDOUT_TAKEN = "onnxgen.stdout"
"""Key of a command's context that is set where stdout is not for words."""


def _meta() -> dict[str, Any]:
    context = click.get_current_context(silent=True)
    return context.meta if context is not None else {}


def _set_loudness(context: click.Context, param: click.Parameter, value: bool) -> None:
    if value and context.meta.setdefault(_LOUDNESS, param.name) != param.name:
        raise click.UsageError("-v and -q exclude one another")


def is_quiet() -> bool:
    """Whether -q was given: only errors are printed."""
    return _meta().get(_LOUDNESS) == "quiet"


def is_verbose() -> bool:
    """Whether -v was given: every site and every case is printed."""
    return _meta().get(_LOUDNESS) == "verbose"


def take_stdout() -> None:
    """Words go to stderr from here on."""
    _meta()[STDOUT_TAKEN] = True


def loudness_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """-v and -q."""
    for letter, name, said in (
        ("-q", "--quiet", "Print errors only."),
        ("-v", "--verbose", "Print every site and every case, too."),
    ):
        option = click.option(
            letter, name, is_flag=True, expose_value=False, callback=_set_loudness, help=said
        )
        command = option(command)
    return command


def parse_roles(words: Sequence[str]) -> Mapping[str, str]:
    """`NAME=ROLE` words as a mapping; a name may hold "=", a role does not.

    Raises:
        UsageError: a word is not of that form, or a name has two roles.
    """
    roles: dict[str, str] = {}
    for word in words:
        name, equals, role = word.rpartition("=")
        if not (name and equals and role):
            raise UsageError(f"--role {word} is not of the form NAME=ROLE")
        if roles.setdefault(name, role) != role:
            raise UsageError(f"--role gives {name} two roles, {roles[name]} and {role}")
    return roles


def check_verify(budget: str, no_verify: bool) -> None:
    """Whether the two options fit.

    Raises:
        UsageError: both are given.
    """
    if no_verify and budget != "full":
        raise UsageError(f"--no-verify and --verify {budget} exclude one another")


def proof_exit_code(proof: Proof | None, *, unproven: int) -> int:
    """The exit code of a command that ended with this proof.

    Args:
        proof: None counts as unproven.
        unproven: the code where nothing was run; 0 where the user asked for that.
    """
    if proof is None:
        return unproven
    codes = {"proven": 0, "differs": 1, "unproven": unproven, "unverifiable": 3}
    return codes[proof.status]


class _Outcome:
    value: Any = None
    exit_code: int = 0
    failure: str = ""


@contextmanager
def outcome_of(show: Callable[[Any, int, str | None], None]) -> Iterator[_Outcome]:
    """Run a command's work; whatever the end, show what there is, then exit with its code."""
    outcome = _Outcome()
    failure: OnnxgenError | None = None
    try:
        yield outcome
    except OnnxgenError as error:
        failure = error
    except Exception as error:
        failure = unexpected(error)
    if failure is not None:
        try:
            show(failure.report, failure.exit_code, str(failure))
        except OnnxgenError as error:  # the report cannot be written: the first failure counts
            say_error(error)
        raise failure
    sentence = outcome.failure if outcome.exit_code else ""
    show(outcome.value, outcome.exit_code, sentence or None)
    if outcome.exit_code:
        if sentence:
            say_error(sentence)
        sys.exit(outcome.exit_code)


def report_of(
    command: str,
    work: Callable[[Progress], Report],
    report_file: Path | None,
    json_output: bool,
) -> None:
    """Run a command whose work ends with a report; show that, and exit with the proof's code."""

    def show(report: Report | None, code: int, error: str | None) -> None:
        show_outcome(Outcome(command, code, error, report), report_file, json_output)

    with outcome_of(show) as outcome, show_progress() as progress:
        outcome.value = report = work(progress)
        outcome.exit_code = proof_exit_code(report.proof, unproven=0)


def show_outcome(
    outcome: Outcome, report_file: Path | None, json_output: bool, *, printed: bool = True
) -> None:
    """Write the report that was asked for, and print the outcome: as JSON, or as text unless told
    to be quiet, or not to. GitHub is told where it runs this.
    """
    announce(outcome)
    value = outcome.report or outcome.compared
    if report_file is not None or json_output:
        from onnxgen.report import as_json, render

        if report_file is not None:
            files.write_text(report_file, render.render(outcome, report_file))
        if json_output:
            click.echo(as_json.render(outcome), nl=False)
            return
    if value is not None and printed and not is_quiet():
        from onnxgen.report import details, text

        more = [details.render_details(value)] if is_verbose() else []
        text.say(text.render(value), *more, stderr=STDOUT_TAKEN in _meta())


def check_report_file(report_file: Path | None, *others: Path) -> None:
    if report_file is None:
        return
    for other in others:
        if same_place(report_file, other):
            raise UsageError(f"--report {report_file} is another file of this command")
    files.check_writable(report_file)
    check_ending(report_file)
