"""The command `onnxgen to-paged`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxgen.cli_ci import baseline_option, expect_option, expectations_of
from onnxgen.cli_streams import STREAM, check_streams, received
from onnxgen.cli_words import (
    PathType,
    Progress,
    check_report_file,
    check_verify,
    json_option,
    loudness_options,
    no_verify_option,
    parse_roles,
    report_of,
    report_option,
    role_option,
    rules_option,
    verify_option,
)
from onnxgen.errors import UsageError
from onnxgen.places import default_folder
from onnxgen.report.values import Report


@click.command("to-paged")
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
@verify_option
@no_verify_option
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
@expect_option
@baseline_option
@role_option
@rules_option
@report_option
@json_option
@loudness_options
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
    budget: Any,
    no_verify: bool,
    inline: bool,
    genai_config: bool,
    force: bool,
    expect: tuple[str, ...],
    baseline: Path | None,
    roles: tuple[str, ...],
    rules: tuple[Path, ...],
    report_file: Path | None,
    json_output: bool,
) -> None:
    """Turn MODEL, a decoder with caches, into one whose keys and values lie in pools of blocks.

    Tokens of all sequences come in one row without padding; a block table says where each one's
    past is. The result is compared with the original on runs that mix prompts and single tokens,
    on shuffled, shared and reused blocks. Where it differs nothing is written. MODEL - is stdin.

    \b
    Example:
      onnxgen to-paged model.onnx -o paged --block-size 16
    """
    from onnxgen import pipeline_paged
    from onnxgen.targets.genai_files import CONFIG, READ
    from onnxgen.targets.paged import KV_DTYPES, PagedOptions

    check_streams(model, None)
    if output == STREAM:
        raise UsageError("-o -: a paged model is a folder, and cannot go to stdout")
    output = output or default_folder(Path("stdin") if model == STREAM else model)
    written = [output / name for name in ("model.onnx", CONFIG, *READ)]
    before = [baseline] if baseline is not None else []
    check_report_file(report_file, model, *before, *map(model.with_name, (CONFIG, *READ)), *written)
    check_verify(budget, no_verify)
    kind = None if kv_dtype is None else KV_DTYPES[kv_dtype]
    options = pipeline_paged.PageOptions(
        output=output,
        paged=PagedOptions(block_size, logits, kind, slot_mapping, flavor),
        max_length=max_length,
        check=check,
        verify=not no_verify,
        budget=budget,
        inline=inline,
        roles=parse_roles(roles),
        rules=rules,
        genai_config=genai_config,
        force=force,
        expect=expectations_of(expect, baseline, "to-paged"),
    )

    def work(progress: Progress) -> Report:
        with received(model) as source:
            report = pipeline_paged.to_paged(source, options, progress)
        report.input = str(model)
        return report

    report_of("to-paged", work, report_file, json_output)
