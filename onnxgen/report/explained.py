"""Why places are not fused, rendered: how far the nearest rule got, what stopped it, what helps.

Equal places, as the layers of a model are, are told once.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from onnxgen.patterns.pages import Page, Reason
from onnxgen.report.text import found_nothing, some
from onnxgen.report.values import Decline, Report, Site
from onnxgen.report.words import kind_name, many

_MARKS = {True: ("✓", "green"), False: ("✗", "red"), None: ("·", "dim")}


def render_explanation(
    report: Report, places: Sequence[Site], titles: Mapping[str, str]
) -> RenderableType:
    """What `onnxgen explain` has to say.

    Args:
        report: of everything.
        places: those to be told of.
        titles: of rules, by code.
    """
    fused = sum(site.status == "fused" for site in report.sites)
    kept = [site for site in places if site.status != "fused"]
    said = many(len(kept), "place is", "places are")
    parts: list[RenderableType] = [
        Text.assemble(
            (report.input, "bold"),
            f": target {report.target}, {many(fused, 'site')} fused, {said} not",
        )
    ]
    for group in _alike(places):
        parts += [Text(""), *_place(group, titles)]
    parts += found_nothing(report)
    if not places:
        parts.append(Text("Nothing that looks like a site is left.", "green"))
    parts += [Text(f"Warning: {warning}", "yellow") for warning in report.warnings]
    return Group(*parts)


def render_page(page: Page, code: str) -> RenderableType:
    """A rule's page; of a code that is one of its reasons, that reason alone."""
    parts: list[RenderableType] = [Text.assemble((page.code, "bold"), f": {page.title}")]
    if code in page.reasons:
        return Group(*parts, _reason(page.reasons[code]))
    for heading, text in page.sections.items():
        parts += [Text(""), Text(heading, "bold")]
        if heading == "Looks for":
            rows = Table.grid(padding=(0, 1))
            rows.add_column()
            rows.add_column(overflow="fold")
            for number, step in enumerate(page.steps, 1):
                rows.add_row(f"    {number}.", step)
            parts.append(rows)
        elif heading == "Declines" and page.reasons:
            parts += [_reason(reason) for reason in page.reasons.values()]
        else:
            parts.append(Text(textwrap.indent(text, "    ")))
    return Group(*parts)


def _reason(reason: Reason) -> RenderableType:
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim")
    rows.add_column(overflow="fold")
    rows.add_row(Text(reason.code, "yellow"), reason.when)
    rows.add_row("  expected", reason.expected)
    rows.add_row("  change", reason.change)
    return Padding(rows, (0, 0, 0, 4), expand=False)


def _alike(places: Sequence[Site]) -> list[list[Site]]:
    """Places of which the same is said."""
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in places:
        why = site.decline
        key = (
            (site.status, site.kind, site.rule, why.code, why.reason, why.reached)
            if why is not None
            else (site.status, site.kind, site.rule, tuple(site.details.items()))
        )
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def _place(group: Sequence[Site], titles: Mapping[str, str]) -> Iterator[RenderableType]:
    site = group[0]
    where = some(each.scope or each.node for each in group)
    count = f" ({len(group)})" if len(group) > 1 else ""
    style = "bold green" if site.status == "fused" else "bold yellow"
    yield Text.assemble(
        (f"{site.status.capitalize()} {kind_name(site.kind)}{count}", style), f": {where}"
    )
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim")
    rows.add_column(overflow="fold")
    rows.add_row("rule", f"{site.rule}: {titles.get(site.rule, '')}")
    if site.decline is None:
        rows.add_row("node", f"{site.node}, in place of {many(site.replaced, 'node')}")
        rows.add_row("found", ", ".join(f"{key} {value}" for key, value in site.details.items()))
    else:
        _why(rows, site, site.decline)
    yield Padding(rows, (0, 0, 0, 2), expand=False)


def _why(rows: Table, site: Site, why: Decline) -> None:
    steps = Text("\n").join(
        [
            *(_step(step, True) for step in why.reached),
            *(_step(step, None if number else False) for number, step in enumerate(why.ahead)),
        ]
    )
    if steps:
        rows.add_row("steps", steps)
    rows.add_row("stopped", Text.assemble((f"{why.code}: ", "bold"), why.reason))
    stopped = (why.nodes[0] if why.nodes else "") or site.node
    rows.add_row("at node", f"{stopped}{f': {why.found}' if why.found else ''}")
    if why.expected:
        rows.add_row("expected", why.expected)
    if why.change:
        rows.add_row("change", why.change)


def _step(step: str, holds: bool | None) -> Text:
    mark, style = _MARKS[holds]
    return Text.assemble((f"{mark} ", style), (step, "" if holds is not None else "dim"))
