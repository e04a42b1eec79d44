"""The `onnxgen` command: reads words, calls the pipeline, prints what it reports.

Nothing is decided here but how things are said. Heavy modules are imported by the commands
that need them, so that `onnxgen --help` answers at once.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import click

from onnxgen import __version__
from onnxgen.cli_ci import annotate_error
from onnxgen.cli_context import context
from onnxgen.cli_explain import explain, inspect, rules
from onnxgen.cli_fuse import fuse
from onnxgen.cli_new_pattern import new_pattern
from onnxgen.cli_paged import to_paged
from onnxgen.cli_streams import STREAM, check_streams, received
from onnxgen.cli_words import (
    PathType,
    check_report_file,
    json_option,
    loudness_options,
    outcome_of,
    parse_roles,
    prepare_streams,
    proof_exit_code,
    report_option,
    role_option,
    say_error,
    show_outcome,
    show_progress,
    unexpected,
    verify_option,
)
from onnxgen.errors import OnnxgenError, RefusedError, UsageError
from onnxgen.mapped import cut_off_in_words
from onnxgen.places import default_output
from onnxgen.report import files
from onnxgen.report.values import Outcome, Proof, Report

INTERRUPTED = 130  # what a shell says of a program that Ctrl-C ended


class _Program(click.Group):
    """Turns every failure into one sentence and its documented exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        prepare_streams()
        try:
            with cut_off_in_words():
                return super().invoke(ctx)
        except OnnxgenError as error:
            say_error(error)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except click.ClickException as error:
            annotate_error(error.format_message())
            raise
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            say_error(unexpected(error))
            ctx.exit(RefusedError.exit_code)


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="onnxgen")
def main() -> None:
    """Rewrite exported ONNX models to the newest standard ops, and prove each rewrite.

    Exit codes: 0 done, and proven unless told not to; 1 the result differs; 2 usage;
    3 refused or unverifiable; 4 a file cannot be read or written; 5 an expectation was
    not met.

    \b
    Example:
      onnxgen fuse model.onnx
    """


@main.command()
@click.argument("original", type=PathType())
@click.argument("rewritten", type=PathType())
@verify_option
@role_option
@report_option
@json_option
@loudness_options
def verify(
    original: Path,
    rewritten: Path,
    budget: Any,
    roles: tuple[str, ...],
    report_file: Path | None,
    json_output: bool,
) -> None:
    """Compare two models that have the same inputs and outputs, by running both.

    One of the two can be -, which is stdin.

    \b
    Example:
      onnxgen verify model.onnx model.fused.onnx
    """
    from onnxgen import pipeline

    if original == rewritten == STREAM:
        raise UsageError("- is one model: give the other as a file")
    for path in (original, rewritten):
        check_streams(path, None)
    check_report_file(report_file, *(each for each in (original, rewritten) if each != STREAM))
    parsed = parse_roles(roles)

    def show(proof: Proof | None, code: int, error: str | None) -> None:
        outcome = Outcome("verify", code, error, None, str(original), str(rewritten), proof)
        show_outcome(outcome, report_file, json_output)

    with (
        outcome_of(show) as outcome,
        show_progress() as progress,
        received(original) as one,
        received(rewritten) as other,
    ):
        outcome.value = proof = pipeline.verify(
            one, other, roles=parsed, budget=budget, progress=progress
        )
        outcome.exit_code = proof_exit_code(proof, unproven=RefusedError.exit_code)
        to_blame = rewritten if proof.status == "differs" else original
        outcome.failure = proof.reason and f"{to_blame}: {proof.reason}"


@main.command()
@click.option(
    "--keep",
    type=PathType(file_okay=False),
    metavar="DIR",
    help="Keep the model and the fused model in this folder.",
)
def demo(keep: Path | None) -> None:
    """Grow a small exported decoder that ships with onnxgen, fuse it and prove it.

    \b
    Example:
      onnxgen demo --keep demo
    """
    from onnxgen import pipeline, testing

    def show(report: Report | None, code: int, error: str | None) -> None:
        show_outcome(Outcome("demo", code, error, report), None, False)
        if keep is None:
            click.echo(
                "Both models are in a temporary folder and removed now: --keep DIR keeps them"
            )

    with contextlib.ExitStack() as stack:
        if keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxgen-")))
        else:
            folder = keep
            files.make_folder(folder)
        with outcome_of(show) as outcome, show_progress() as progress:
            progress("growing the demo model")
            model = testing.write_demo_model(folder)
            options = pipeline.FuseOptions(output=default_output(model))
            outcome.value = report = pipeline.fuse(model, options, progress)
            outcome.exit_code = proof_exit_code(report.proof, unproven=RefusedError.exit_code)


main.add_command(fuse)
main.add_command(to_paged)
main.add_command(explain)
main.add_command(inspect)
main.add_command(context)
main.add_command(rules)
main.add_command(new_pattern)
