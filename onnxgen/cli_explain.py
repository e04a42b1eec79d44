"""The commands that tell and change nothing: `explain`, `inspect` and `rules`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from onnxgen.cli_words import (
    PathType,
    json_option,
    no_verify_option,
    outcome_of,
    parse_roles,
    role_option,
    rules_option,
    show_progress,
)
from onnxgen.errors import UsageError
from onnxgen.report import as_json
from onnxgen.report.inspection import Inspection
from onnxgen.report.values import Report
from onnxgen.words import near


@click.command()
@click.argument("model", type=PathType())
@click.option(
    "--site",
    metavar="NAME",
    help="Tell of this place alone, fused or not: a node's name, or a module path or its beginning.",
)
@click.option("--rule", metavar="CODE", help="Tell of places that this rule was nearest to alone.")
@click.option(
    "--target",
    type=click.Choice(["onnx", "ort"]),
    default="onnx",
    show_default=True,
    help="What it would be fused for.",
)
@no_verify_option
@role_option
@rules_option
@json_option
def explain(
    model: Path,
    site: str | None,
    rule: str | None,
    target: str,
    no_verify: bool,
    roles: tuple[str, ...],
    rules: tuple[Path, ...],
    json_output: bool,
) -> None:
    """Say why places of MODEL that look like attention, norms, rotary embeddings, experts or
    caches are not fused: the nearest rule, how far it got, the node that stopped it, what was
    expected there, and what would change it. Nothing is written.

    \b
    Example:
      onnxgen explain model.onnx --site model.layers.0
    """
    from onnxgen import pipeline
    from onnxgen.explaining import checked_rule, chosen
    from onnxgen.rules import all_pages

    titles = {page.code: page.title for page in all_pages()}
    rule = checked_rule(rule, own=bool(rules))
    options = pipeline.FuseOptions(
        target=target,
        verify=not no_verify,
        roles=parse_roles(roles),
        rules=rules,
        check=True,
    )

    def show(report: Report | None, code: int, error: str | None) -> None:
        places = [] if report is None else chosen(report, site, rule)
        if json_output:
            document = as_json.explain_document(report, places, code, error)
            click.echo(as_json.dumps(document), nl=False)
        elif report is not None:
            from onnxgen.report import text
            from onnxgen.report.explained import render_explanation

            text.say(render_explanation(report, places, titles | report.own_rules))

    with outcome_of(show) as outcome, show_progress() as progress:
        outcome.value = pipeline.fuse(model, options, progress)


@click.command()
@click.argument("model", type=PathType())
@role_option
@json_option
def inspect(model: Path, roles: tuple[str, ...], json_output: bool) -> None:
    """Say what MODEL is: its attentions, caches, bytes a token, parameters, precision, what wrote
    it, and which targets it could take.

    \b
    Example:
      onnxgen inspect model.onnx
    """
    from onnxgen import inspection

    def show(found: Inspection | None, code: int, error: str | None) -> None:
        if json_output:
            click.echo(as_json.dumps(as_json.inspect_document(found, code, error)), nl=False)
        elif found is not None:
            from onnxgen.report import text
            from onnxgen.report.inspected import render_inspection

            text.say(render_inspection(found))

    with outcome_of(show) as outcome, show_progress() as progress:
        outcome.value = inspection.inspect(model, parse_roles(roles), progress)


@click.command()
@click.argument("code", required=False)
@click.option("--json", "json_output", is_flag=True, help="Print pages as JSON and nothing else.")
def rules(code: str | None, json_output: bool) -> None:
    """List every rule with its code; with CODE, print its page: what it replaces, what it looks
    for, when it declines and what would change that, numerics, where it was seen.

    \b
    Example:
      onnxgen rules ATT001
    """
    from onnxgen.rules import PAGING, all_pages, page_for

    pages = all_pages()
    if code is not None:
        found = page_for(code.upper())
        if found is None:
            known = [each for page in pages for each in (page.code, *page.reasons)]
            raise UsageError(f"{code}: no such rule{near(code.upper(), known)}")
        pages = [found]
    if json_output:
        click.echo(as_json.dumps({"rules": [dataclasses.asdict(page) for page in pages]}), nl=False)
    elif code is None:
        for page in pages:
            click.echo(f"{page.code:7} {page.title}")
        click.echo(f"onnxgen rules CODE prints a page; codes such as {PAGING}004 are found, too")
    else:
        from onnxgen.report import text
        from onnxgen.report.explained import render_page

        text.say(render_page(pages[0], code.upper()))
