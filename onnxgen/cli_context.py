"""`onnxgen context`: objects that backends compiled, in a model that keeps its nodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from onnxgen.cli_words import (
    PathType,
    is_quiet,
    is_verbose,
    json_option,
    loudness_options,
    no_verify_option,
    outcome_of,
    parse_roles,
    role_option,
    show_progress,
    verify_option,
)
from onnxgen.cli_words import check_verify as check_budget
from onnxgen.errors import ExpectationError, UsageError
from onnxgen.report.contexts import Contexts

_ENCODINGS = click.Choice(["function", "metadata"])
_output_option = click.option("-o", "--output", type=PathType(), help="Where to write.")
_trust_option = click.option(
    "--trust",
    type=PathType(),
    metavar="FILE",
    help="A list of sha256 of blobs that may be used, beside those that you added yourself.",
)
_force_option = click.option("--force", is_flag=True, help="Let the output replace MODEL.")


@click.group()
def context() -> None:
    """Give a model what backends compiled, beside the nodes that it was compiled from.

    Any runtime opens such a model and runs the nodes; onnxgen.load runs what a backend that is
    there compiled. docs/contexts.md states the format.

    \b
    Example:
      onnxgen context add model.onnx --backend openvino:CPU
    """


@context.command()
@click.argument("model", type=PathType())
@click.option(
    "--backend",
    "backends",
    multiple=True,
    required=True,
    metavar="NAME:DEVICE",
    help="Who compiles, such as openvino:CPU or ort:cpu. Repeatable.",
)
@click.option(
    "--region",
    default="all",
    show_default=True,
    metavar="all|attention|REGEX",
    help="What is compiled: everything in one; each attention; what has a module path that matches.",
)
@click.option(
    "--encoding",
    type=_ENCODINGS,
    help="How regions are held: by scopes in metadata, the default, or as functions.",
)
@click.option(
    "--blob",
    type=click.Choice(["inline", "file"]),
    default="inline",
    show_default=True,
    help="Where what was compiled goes: into the model, or into files beside it.",
)
@_output_option
@_force_option
@verify_option
@no_verify_option
@role_option
@json_option
@loudness_options
def add(
    model: Path,
    backends: tuple[str, ...],
    region: str,
    encoding: Any,
    blob: Any,
    output: Path | None,
    force: bool,
    budget: Any,
    no_verify: bool,
    roles: tuple[str, ...],
    json_output: bool,
) -> None:
    """Have backends compile MODEL, or regions of it, and write it with what they made, after running
    it by each and comparing. The output is MODEL with .context.onnx unless told otherwise.

    \b
    Example:
      onnxgen context add model.onnx --backend openvino:CPU --backend ort:cpu
    """
    from onnxgen import pipeline_contexts as pipeline

    check_budget(budget, no_verify)
    options = pipeline.AddOptions(
        backends=backends,
        output=output,
        region=region,
        encoding=encoding,
        blob=blob,
        verify=not no_verify,
        budget=budget,
        roles=parse_roles(roles),
        force=force,
    )
    _report("add", lambda progress: pipeline.add(model, options, progress), json_output)


@context.command("list")
@click.argument("model", type=PathType())
@json_option
def listed(model: Path, json_output: bool) -> None:
    """Say what MODEL holds: regions, backends, versions, sizes and hashes.

    \b
    Example:
      onnxgen context list model.context.onnx
    """
    from onnxgen import pipeline_contexts as pipeline

    _report("list", lambda progress: pipeline.listed(model), json_output)


@context.command()
@click.argument("model", type=PathType())
@click.option(
    "--prefer",
    multiple=True,
    metavar="NAME:DEVICE",
    help="Ask of this backend; the first that can is picked. Repeatable; all unless given.",
)
@_trust_option
@click.option(
    "--expect",
    "expected",
    metavar="NAME:DEVICE",
    help="End with 5 unless this backend would run every region.",
)
@json_option
def check(
    model: Path,
    prefer: tuple[str, ...],
    trust: Path | None,
    expected: str | None,
    json_output: bool,
) -> None:
    """Say what would run each region of MODEL on this machine, and why not another.

    \b
    Example:
      onnxgen context check model.context.onnx --trust trusted.txt
    """
    from onnxgen import pipeline_contexts as pipeline

    def missed(said: Contexts) -> str:
        there = dict.fromkeys(each.backend for each in said.held)
        if expected is not None and there and expected not in there:
            holds = ", ".join(there)
            raise UsageError(f"--expect {expected}: {model} holds what {holds} compiled")
        picked = {each.region for each in said.held if each.picked and each.backend == expected}
        left = [each.name for each in said.places if each.name not in picked]
        if expected is None or (said.places and not left):
            return ""
        where = f"region '{left[0]}' is not" if left else "there is nothing that would be"
        return f"--expect {expected}: {model}: {where} run by it"

    _report(
        "check", lambda progress: pipeline.check(model, prefer or None, trust), json_output, missed
    )


@context.command()
@click.argument("model", type=PathType())
@click.option("--backend", metavar="NAME:DEVICE", help="Take out what this one compiled alone.")
@_output_option
@_force_option
@json_option
@loudness_options
def strip(
    model: Path, backend: str | None, output: Path | None, force: bool, json_output: bool
) -> None:
    """Take out of MODEL what backends compiled: the original graph comes back. The output is MODEL
    with .original.onnx unless told otherwise.

    \b
    Example:
      onnxgen context strip model.context.onnx -o model.onnx
    """
    from onnxgen import pipeline_contexts as pipeline

    _report(
        "strip",
        lambda progress: pipeline.strip(model, backend, output, force=force, progress=progress),
        json_output,
    )


@context.command()
@click.argument("model", type=PathType())
@click.option("--to", "encoding", type=_ENCODINGS, required=True, help="The form to write.")
@_output_option
@_force_option
@json_option
@loudness_options
def convert(
    model: Path, encoding: Any, output: Path | None, force: bool, json_output: bool
) -> None:
    """Write MODEL with what it holds in the other form; nothing is lost. The output is MODEL with the
    form's name before .onnx unless told otherwise.

    \b
    Example:
      onnxgen context convert model.context.onnx --to metadata
    """
    from onnxgen import pipeline_contexts as pipeline

    _report(
        "convert",
        lambda progress: pipeline.convert(model, encoding, output, force=force, progress=progress),
        json_output,
    )


@context.command()
@click.argument("model", type=PathType())
@click.option(
    "--package",
    type=PathType(file_okay=False),
    metavar="DIR",
    help="Write a model package of ONNX Runtime: a variant for each backend, the weights once.",
)
@click.option(
    "--epcontext",
    is_flag=True,
    help="Write the model for one backend's execution provider, with EPContext nodes.",
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    metavar="NAME:DEVICE",
    help="Whose objects; all that can be in a package unless given, one for --epcontext.",
)
@_output_option
@_trust_option
@_force_option
@json_option
@loudness_options
def export(
    model: Path,
    package: Path | None,
    epcontext: bool,
    backends: tuple[str, ...],
    output: Path | None,
    trust: Path | None,
    force: bool,
    json_output: bool,
) -> None:
    """Write what MODEL holds in a form of ONNX Runtime's own, for runtimes without onnxgen.

    \b
    Example:
      onnxgen context export model.context.onnx --package model.package
    """
    from onnxgen import pipeline_export as pipeline

    if (package is None) != epcontext:
        raise UsageError("give --package DIR, or --epcontext and --backend")
    if package is not None:
        folder = package
        if output is not None:
            raise UsageError("-o is for --epcontext: a package is written to its DIR")
        _report(
            "export",
            lambda progress: pipeline.package(model, folder, backends, progress, trust),
            json_output,
        )
        return
    if len(backends) != 1:
        raise UsageError("--epcontext is for one --backend")
    _report(
        "export",
        lambda progress: pipeline.epcontext(
            model, backends[0], output, force=force, progress=progress, trust=trust
        ),
        json_output,
    )


def _report(
    command: str,
    work: Callable[[Callable[[str], None]], Contexts],
    json_output: bool,
    missed: Callable[[Contexts], str] = lambda said: "",
) -> None:
    """Run a command's work and print what it reports; `missed` says which expectation was not met."""

    def show(said: Contexts | None, code: int, error: str | None) -> None:
        from onnxgen.report import as_json, text
        from onnxgen.report.contexts_text import render_contexts

        if json_output:
            document = as_json.context_document(f"context {command}", said, code, error)
            click.echo(as_json.dumps(document), nl=False)
        elif said is not None and not is_quiet():
            text.say(render_contexts(said, cases=is_verbose()))

    with outcome_of(show) as outcome, show_progress() as progress:
        outcome.value = said = work(progress)
        outcome.failure = missed(said)
        outcome.exit_code = ExpectationError.exit_code if outcome.failure else 0
