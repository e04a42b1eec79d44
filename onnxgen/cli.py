"""The `onnxgen` command: reads words, calls the pipeline, prints what it reports.

Nothing is decided here but how things are said. Heavy modules are imported by the commands
that need them, so that `onnxgen --help` answers at once.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from onnxgen import __version__
from onnxgen.cli_words import PathType, prepare_streams, say_error, show_progress, unexpected
from onnxgen.errors import OnnxgenError, RefusedError, UsageError
from onnxgen.places import default_folder, default_output, same_place
from onnxgen.report import as_json, files
from onnxgen.report.values import Proof, Report

INTERRUPTED = 130  # what a shell says of a program that Ctrl-C ended


class _Program(click.Group):
    """Turns every failure into one sentence and its documented exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        prepare_streams()
        try:
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


_role = click.option(
    "--role",
    "roles",
    multiple=True,
    metavar="NAME=ROLE",
    help="Say what an input is for, such as tokens=ids, where its use leaves that open. Repeatable.",
)
_report = click.option(
    "--report",
    "report_file",
    type=PathType(),
    metavar="FILE.json",
    help="Write the report as JSON, whatever the outcome; only a report is replaced.",
)
_json = click.option(
    "--json", "json_output", is_flag=True, help="Print the report as JSON and nothing else."
)


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
@click.option(
    "--no-verify", is_flag=True, help="Run nothing, per-rewrite checks included: unproven."
)
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
@_role
@_report
@_json
def fuse(
    model: Path,
    output: Path | None,
    target: str,
    padding: Any,
    max_length: int | None,
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
    _check_report_file(report_file, model, output, *beside)
    options = pipeline.FuseOptions(
        output=output,
        target=target,
        padding=padding,
        max_length=max_length,
        verify=not no_verify,
        disable=disable,
        opset=opset,
        inline=inline,
        roles=parse_roles(roles),
        force=force,
        genai_config=genai_config,
    )

    def show(report: Report | None, code: int, error: str | None) -> None:
        document = as_json.dumps(as_json.fuse_document(report, code, error))
        _show(document, report, report_file, json_output)

    with _outcome(show) as outcome, show_progress() as progress:
        outcome.value = report = pipeline.fuse(model, options, progress)
        outcome.exit_code = proof_exit_code(report.proof, unproven=0)


@main.command("to-paged")
@click.argument("model", type=PathType())
@click.option(
    "-o",
    "--output",
    type=PathType(file_okay=False),
    metavar="DIR",
    help="Folder to write model.onnx to; MODEL with .paged unless given.",
)
@click.option(
    "--block-size",
    type=click.INT,
    default=16,
    show_default=True,
    metavar="N",
    help="Slots of a block, a power of two.",
)
@click.option(
    "--logits",
    type=click.Choice(["all", "last", "indices"]),
    default="all",
    show_default=True,
    help="Which rows of logits are answered: each token's, each sequence's last (zeros where it "
    "has no new token), or those that an input logits_indices asks for.",
)
@click.option(
    "--flavor",
    type=click.Choice(["portable", "ort"]),
    default="portable",
    show_default=True,
    help="What attends: a function of standard ops, which runs wherever these do, or "
    "com.microsoft's PagedAttention, which ONNX Runtime has for CUDA and WebGPU.",
)
@click.option(
    "--kv-dtype",
    type=click.Choice(["fp16", "fp32"]),
    help="Type of the pools; the caches' own unless given, with --flavor ort fp16 (or bf16).",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    metavar="N",
    help="With --flavor ort: most tokens of a sequence, past and new, that rotary tables are "
    "written for; by default what config.json beside MODEL, or the model's own tables say.",
)
@click.option(
    "--slot-mapping",
    is_flag=True,
    help="Add an input that says which slot each token is written to, -1 for none.",
)
@click.option(
    "--check", is_flag=True, help="Convert nothing; say whether it could be, and why not."
)
@click.option(
    "--no-verify", is_flag=True, help="Run nothing, per-rewrite checks included: unproven."
)
@click.option("--inline", is_flag=True, help="Expand functions of our own to standard ops.")
@click.option(
    "--genai-config",
    is_flag=True,
    help="Write what onnxruntime-genai's Engine needs into DIR: genai_config.json, the "
    "tokenizer's files.",
)
@click.option(
    "--force", is_flag=True, help="Allow files of another model in DIR, or MODEL, to be replaced."
)
@_role
@_report
@_json
def to_paged(
    model: Path,
    output: Path | None,
    block_size: int,
    logits: Any,
    flavor: Any,
    kv_dtype: str | None,
    max_length: int | None,
    slot_mapping: bool,
    check: bool,
    no_verify: bool,
    inline: bool,
    genai_config: bool,
    force: bool,
    roles: tuple[str, ...],
    report_file: Path | None,
    json_output: bool,
) -> None:
    """Turn MODEL, a decoder with caches, into one whose keys and values lie in pools of blocks.

    Tokens of all sequences come in one row without padding; a block table says where each one's
    past is. The result is compared with the original on runs that mix prompts and single tokens,
    on shuffled, shared and reused blocks. Where it differs nothing is written.

    \b
    Example:
      onnxgen to-paged model.onnx -o paged --block-size 16
    """
    import onnx_ir as ir

    from onnxgen import pipeline
    from onnxgen.targets.genai_files import CONFIG, READ
    from onnxgen.targets.paged import PagedOptions

    output = output or default_folder(model)
    written = [output / name for name in ("model.onnx", CONFIG, *READ)]
    _check_report_file(report_file, model, *map(model.with_name, (CONFIG, *READ)), *written)
    kinds = {None: None, "fp16": ir.DataType.FLOAT16, "fp32": ir.DataType.FLOAT}
    options = pipeline.PageOptions(
        output=output,
        paged=PagedOptions(block_size, logits, kinds[kv_dtype], slot_mapping, flavor),
        max_length=max_length,
        check=check,
        verify=not no_verify,
        inline=inline,
        roles=parse_roles(roles),
        genai_config=genai_config,
        force=force,
    )

    def show(report: Report | None, code: int, error: str | None) -> None:
        document = as_json.dumps(as_json.to_paged_document(report, code, error))
        _show(document, report, report_file, json_output)

    with _outcome(show) as outcome, show_progress() as progress:
        outcome.value = report = pipeline.to_paged(model, options, progress)
        outcome.exit_code = proof_exit_code(report.proof, unproven=0)


@main.command()
@click.argument("original", type=PathType())
@click.argument("rewritten", type=PathType())
@_role
@_report
@_json
def verify(
    original: Path,
    rewritten: Path,
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

    _check_report_file(report_file, original, rewritten)
    parsed = parse_roles(roles)

    def show(proof: Proof | None, code: int, error: str | None) -> None:
        document = as_json.verify_document(str(original), str(rewritten), proof, code, error)
        _show(as_json.dumps(document), proof, report_file, json_output)

    with _outcome(show) as outcome, show_progress() as progress:
        outcome.value = proof = pipeline.verify(
            original, rewritten, roles=parsed, progress=progress
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
        _show("", report, None, False)
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
        with _outcome(show) as outcome, show_progress() as progress:
            progress("growing the demo model")
            model = testing.write_demo_model(folder)
            options = pipeline.FuseOptions(output=default_output(model))
            outcome.value = report = pipeline.fuse(model, options, progress)
            outcome.exit_code = proof_exit_code(report.proof, unproven=RefusedError.exit_code)


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
def _outcome(show: Callable[[Any, int, str | None], None]) -> Iterator[_Outcome]:
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
            show(getattr(failure, "report", None), failure.exit_code, str(failure))
        except OnnxgenError as error:  # the report cannot be written: the first failure counts
            say_error(error)
        raise failure
    sentence = outcome.failure if outcome.exit_code else ""
    show(outcome.value, outcome.exit_code, sentence or None)
    if outcome.exit_code:
        if sentence:
            say_error(sentence)
        sys.exit(outcome.exit_code)


def _show(
    document: str, value: Report | Proof | None, report_file: Path | None, json_output: bool
) -> None:
    if report_file is not None:
        files.write_text(report_file, document)
    if json_output:
        click.echo(document, nl=False)
    elif value is not None:
        from onnxgen.report import text

        text.console().print(text.render(value))


def _check_report_file(report_file: Path | None, *others: Path) -> None:
    if report_file is None:
        return
    for other in others:
        if same_place(report_file, other):
            raise UsageError(f"--report {report_file} is another file of this command")
    files.check_writable(report_file)
