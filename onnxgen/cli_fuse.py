"""The command `onnxgen fuse`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxgen.cli_words import (
    PathType,
    Progress,
    check_report_file,
    check_verify,
    json_option,
    no_verify_option,
    parse_roles,
    report_of,
    report_option,
    role_option,
    verify_option,
)
from onnxgen.places import default_output
from onnxgen.report.values import Report


@click.command()
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
