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
from onnxgen.cli_paged import to_paged
from onnxgen.cli_words import (
    PathType,
    Progress,
    check_report_file,
    check_verify,
    json_option,
    no_verify_option,
    outcome_of,
    parse_roles,
    prepare_streams,
    proof_exit_code,
    report_of,
    report_option,
    role_option,
    say_error,
    show_outcome,
    show_progress,
    unexpected,
    verify_option,
)
from onnxgen.errors import OnnxgenError, RefusedError
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
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
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
@click.argument("model", type=PathType())
@click.option(
    "-o",
    "--output",
    type=PathType(),
    metavar="OUT",
    help="Where to write; MODEL with .fused.onnx unless given.",
)
@click.option(
    "--target",
    type=click.Choice(["onnx", "ort"]),
    default="onnx",
    show_default=True,
    help="What to write for: the ONNX standard, or ONNX Runtime's own operators.",
)
@click.option(
    "--padding",
    type=click.Choice(["any", "right", "none"]),
    default="any",
    show_default=True,
    help="With ort: the padding that the result must take; with any other it fails.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=1),
    metavar="N",
    help="With ort: the most tokens, past and new. Default: config.json's, else the model's own.",
)
@verify_option
@no_verify_option
@click.option(
    "--disable",
    multiple=True,
    metavar="CODE",
    help="Leave out the rule with this code. Repeatable.",
)
@click.option("--opset", type=click.IntRange(min=1), metavar="N", help="Write this opset.")
@click.option("--inline", is_flag=True, help="Expand functions of our own to standard ops.")
@click.option(
    "--genai-config",
    is_flag=True,
    help="Write what onnxruntime-genai needs beside OUT: genai_config.json, the tokenizer's files.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Allow OUT to replace MODEL, and with --genai-config the config and tokenizer of another model.",
)
@role_option
@report_option
@json_option
def fuse(
    model: Path,
    output: Path | None,
    target: str,
    padding: Any,
    max_length: int | None,
    budget: Any,
    no_verify: bool,
    disable: tuple[str, ...],
    opset: int | None,
    inline: bool,
    genai_config: bool,
    force: bool,
    roles: tuple[str, ...],
    report_file: Path | None,
    json_output: bool,
) -> None:
    """Fuse MODEL's attention, norms and rotary embeddings, prove the result, and write it.

    Every rewrite is checked where it happens, then the whole model is compared with the
    original on ONNX Runtime. Where it differs nothing is written.

    \b
    Example:
      onnxgen fuse model.onnx -o fused.onnx --report report.json
    """
    from onnxgen import pipeline
    from onnxgen.targets.genai_files import CONFIG, READ

    output = output or default_output(model)
    beside = (file.with_name(name) for file in (model, output) for name in (CONFIG, *READ))
    check_report_file(report_file, model, output, *beside)
    check_verify(budget, no_verify)
    options = pipeline.FuseOptions(
        output=output,
        target=target,
        padding=padding,
        max_length=max_length,
        verify=not no_verify,
        budget=budget,
        disable=disable,
        opset=opset,
        inline=inline,
        roles=parse_roles(roles),
        force=force,
        genai_config=genai_config,
    )

    def work(progress: Progress) -> Report:
        return pipeline.fuse(model, options, progress)

    report_of("fuse", work, report_file, json_output)


@main.command()
@click.argument("original", type=PathType())
@click.argument("rewritten", type=PathType())
@verify_option
@role_option
@report_option
@json_option
def verify(
    original: Path,
    rewritten: Path,
    budget: Any,
    roles: tuple[str, ...],
    report_file: Path | None,
    json_output: bool,
) -> None:
    """Compare two models that have the same inputs and outputs, by running both.

    \b
    Example:
      onnxgen verify model.onnx model.fused.onnx
    """
    from onnxgen import pipeline

    check_report_file(report_file, original, rewritten)
    parsed = parse_roles(roles)

    def show(proof: Proof | None, code: int, error: str | None) -> None:
        outcome = Outcome("verify", code, error, None, str(original), str(rewritten), proof)
        show_outcome(outcome, report_file, json_output)

    with outcome_of(show) as outcome, show_progress() as progress:
        outcome.value = proof = pipeline.verify(
            original, rewritten, roles=parsed, budget=budget, progress=progress
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


main.add_command(to_paged)
