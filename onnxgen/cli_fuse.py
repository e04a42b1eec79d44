"""The command `onnxgen fuse`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxgen import cli_many
from onnxgen.cli_ci import baseline_option, expect_option, expectations_of
from onnxgen.cli_streams import STREAM, check_streams, received, sent
from onnxgen.cli_tasks import Task, made_folder, tasks_of
from onnxgen.cli_words import (
    PathType,
    Progress,
    check_verify,
    json_option,
    loudness_options,
    no_verify_option,
    parse_roles,
    report_of,
    report_option,
    role_option,
    rules_option,
    take_stdout,
    verify_option,
)
from onnxgen.report.values import Report

if TYPE_CHECKING:
    from onnxgen import pipeline


@click.command()
@click.argument("models", type=PathType(), nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "-o",
    "--output",
    type=PathType(),
    metavar="OUT",
    help="Where to write, - for stdout; MODEL with .fused.onnx unless given.",
)
@click.option(
    "--out-dir",
    type=PathType(file_okay=False),
    metavar="DIR",
    help="Folder to write to, of one model or several.",
)
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Of several models, work on so many at once.",
)
@click.option("--check", is_flag=True, help="Write nothing; say what would be fused.")
@expect_option
@baseline_option
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
@rules_option
@report_option
@json_option
@loudness_options
def fuse(
    models: tuple[Path, ...],
    output: Path | None,
    out_dir: Path | None,
    jobs: int,
    baseline: Path | None,
    report_file: Path | None,
    json_output: bool,
    **asked: Any,
) -> None:
    """Fuse MODEL's attention, norms and rotary embeddings, prove the result, and write it.

    Every rewrite is checked where it happens, then the whole model is compared with the
    original on ONNX Runtime. Where it differs nothing is written. MODEL - is stdin. Of several
    models each is a process of its own, and one's failure does not stop the others; {} in the
    names of reports and baselines stands for each model's name.

    \b
    Example:
      onnxgen fuse model.onnx -o fused.onnx --report report.json
      onnxgen fuse a.onnx b.onnx --out-dir fused -j 2 --expect all
    """
    check_verify(asked["budget"], asked["no_verify"])
    with made_folder(out_dir):
        tasks = tasks_of(models, output, out_dir, report_file, baseline, asked)
        for task in tasks:
            options_of(task, task.output)  # what does not fit is said before any work
        if len(tasks) > 1:
            cli_many.run_all("fuse", tasks, fuse_one, jobs, json_output)
            return
        (task,) = tasks
        check_streams(task.model, task.output, json_output=json_output)
        if task.output == STREAM:
            take_stdout()
        report_of("fuse", partial(fuse_one, task), task.report_file, json_output)


def fuse_one(task: Task, progress: Progress) -> Report:
    """All that is done for one model."""
    from onnxgen import pipeline

    with received(task.model) as source, sent(source, task.output) as (place, send):
        report = pipeline.fuse(source, options_of(task, place), progress)
        if report.output:
            send()
            report.output = str(task.output)
        report.input = str(task.model)
        return report


def options_of(task: Task, output: Path) -> pipeline.FuseOptions:
    """What the command's words ask the pipeline for.

    Raises:
        UsageError: they do not fit together.
        FileError: the baseline cannot be read.
    """
    from onnxgen import pipeline

    asked = task.asked
    return pipeline.FuseOptions(
        output=output,
        target=asked["target"],
        padding=asked["padding"],
        max_length=asked["max_length"],
        verify=not asked["no_verify"],
        budget=asked["budget"],
        disable=asked["disable"],
        opset=asked["opset"],
        inline=asked["inline"],
        roles=parse_roles(asked["roles"]),
        rules=asked["rules"],
        force=asked["force"],
        genai_config=asked["genai_config"],
        expect=expectations_of(asked["expect"], task.baseline, "fuse"),
        check=asked["check"],
    )
