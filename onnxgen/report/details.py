"""What `-v` adds to a report's text: every site and every case, a line each."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group
from rich.text import Text

from onnxgen.errors import one_line
from onnxgen.report.values import Case, Proof, Report, Site


def render_details(value: Report | Proof) -> Group:
    """All sites in graph order, then all cases in the order in which they were run."""
    lines: list[Text] = []
    if isinstance(value, Report):
        for title, sites in (("Sites", value.sites), ("Lowered", value.lowered)):
            if sites:
                lines += [Text(f"{title} ({len(sites)}):", "bold"), *map(_site, sites)]
    proof = value.proof if isinstance(value, Report) else value
    if proof is not None and proof.cases:
        lines += [Text(f"Cases ({len(proof.cases)}):", "bold"), *map(_case, proof.cases)]
    return Group(*lines)


def _site(site: Site) -> Text:
    said = f"  {site.status} {site.kind} {site.rule} {site.scope or site.node}"
    return Text(one_line(said + "".join(_after(site))), "" if site.status == "fused" else "yellow")


def _after(site: Site) -> Iterator[str]:
    if site.decline is not None:
        yield f": {site.decline.code}: {site.decline.reason}"
        if site.decline.nodes:
            yield f" [{', '.join(site.decline.nodes)}]"
    if site.details:
        yield ": " + ", ".join(f"{key} {value}" for key, value in site.details.items())
    if site.replaced:
        yield f" ({site.replaced} nodes)"


def _case(case: Case) -> Text:
    sizes = f"batch {case.batch}, new {case.new}, past {case.past}, padding {case.padding}"
    said = f"  {case.name} ({sizes})"
    if case.skipped:
        return Text(one_line(f"{said}: skipped: {case.skipped}"), "yellow")
    if case.outside:
        return Text(one_line(f"{said}: fails, as it must: {case.outside}"))
    return Text(one_line(f"{said}: {case.difference:.1e}, output {case.output or '-'}"))
