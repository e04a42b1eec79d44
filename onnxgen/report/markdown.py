"""A command's outcome as Markdown, for a pull request or a step's summary: short, tables first."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePath

from onnxgen.bounds import in_words
from onnxgen.errors import one_line
from onnxgen.report.as_json import summary
from onnxgen.report.render import STARTS
from onnxgen.report.values import Outcome, Paging, Proof, Report, Site
from onnxgen.report.words import (
    EXITS,
    TIMES,
    capital,
    change,
    kind_name,
    many,
    number,
    verdict,
)
from onnxgen.words import time_in_words

START = STARTS[".md"]
MARKS = {"good": "✅", "odd": "⚠️", "bad": "❌"}
GROUPS_SHOWN = 30
CASES_SHOWN = 60
_MARKUP = re.compile(r"([\\`*_\[\]|~#@$!<>&])")


def render(outcome: Outcome) -> str:
    """The document as text."""
    lines = [*_head(outcome)]
    report, proof = outcome.report, outcome.proof
    if report is not None:
        lines += _figures(report)
        lines += _sites(report.sites, "Site", "fused")
        lines += _sites(report.lowered, "Target's own", "lowered")
        lines += _not_fused([*report.sites, *report.lowered])
        lines += _paging(report.paging)
    lines += _proof(proof)
    if report is not None:
        lines += [f"- **Contract:** {text(report.contract)}"] * bool(report.contract)
        lines += [f"- **Warning:** {text(warning)}" for warning in report.warnings]
        lines += ["", *_details("Operators before and after", _ops(report))]
    lines += _details("Cases", _cases(proof))
    return START + re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def text(value: object) -> str:
    """Anything as text that Markdown and HTML leave as it is: on one line, no links, no mentions."""
    line = one_line(str(value))
    # Character references stay text where a backslash would be shown, as in a table's code.
    return _MARKUP.sub(lambda found: f"&#{ord(found[1])};", line).replace("://", ":&#47;&#47;")


def code(value: object) -> str:
    """A name from a model, set as code; <code> takes references, backticks would not."""
    return f"<code>{text(value)}</code>"


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()
) -> list[str]:
    """A table of cells that are Markdown already; nothing where there are no rows."""
    rows = list(rows)
    if not rows:
        return []
    ruler = ["---:" if at in numbers else "---" for at in range(len(head))]
    return ["", *(f"| {' | '.join(row)} |" for row in (head, ruler, *rows)), ""]


def _details(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    return [
        "",
        f"<details><summary>{html.escape(title)}</summary>",
        "",
        *lines,
        "",
        "</details>",
        "",
    ]


def _head(outcome: Outcome) -> Iterator[str]:
    word, tone = verdict(outcome)
    name = PurePath(outcome.model).name
    yield f"### {MARKS[tone]} onnxgen {outcome.command}: {text(name or 'no model')} — {word.lower()}"
    yield ""
    if outcome.error:
        yield f"**{text(capital(outcome.error))}**"
        yield ""
    if outcome.exit_code:
        said = EXITS.get(outcome.exit_code, "failed")
        yield f"Exit status {outcome.exit_code}: {said}."
        yield ""
    if outcome.rewritten:
        yield f"{code(outcome.rewritten)} against {code(outcome.original)}"
        yield ""


def _figures(report: Report) -> list[str]:
    facts = [f"target {text(report.target)}"]
    if report.opset_after:
        facts.append(f"opset {report.opset_before} → {report.opset_after}")
    if report.nodes_after:
        nodes = f"nodes {report.nodes_before:,} → {report.nodes_after:,}"
        facts.append(f"{nodes} ({change(report.nodes_before, report.nodes_after)})")
    if report.bytes_before and report.bytes_after:
        facts.append(f"{in_words(report.bytes_before)} → {in_words(report.bytes_after)}")
    if report.seconds:
        facts.append(time_in_words(sum(report.seconds.values())))
    where = f"written to {code(report.output)}" if report.output else "nothing was written"
    return [f"{', '.join(facts)}; {where}.", ""]


def _sites(sites: Sequence[Site], title: str, word: str) -> list[str]:
    rows = []
    for kind, count in summary(list(sites)).items():
        mark = MARKS["good" if count["fused"] == count["found"] else "odd"]
        cells = [str(count[key]) for key in ("found", "fused", "kept", "undone")]
        rows.append([f"{mark} {text(capital(kind_name(kind)))}", *cells])
    return table([title, "found", word, "kept", "undone"], rows, numbers=(1, 2, 3, 4))


def _not_fused(sites: Sequence[Site]) -> list[str]:
    groups: dict[tuple[str, str, str, str], list[Site]] = {}
    for site in sites:
        if site.status != "fused":
            said = (site.decline.rule, site.decline.code) if site.decline else (site.rule, "")
            groups.setdefault((site.status, site.kind, *said), []).append(site)
    rows = []
    for (status, kind, rule, slug), group in list(groups.items())[:GROUPS_SHOWN]:
        reason = min((site.decline.reason for site in group if site.decline), default="")
        first = group[0].scope or group[0].node
        where = code(first) + (f" and {len(group) - 1:,} more" if len(group) > 1 else "")
        name = f"{len(group)} {TIMES} {text(kind_name(kind))}"
        rows.append([f"{status} {name}", f"{code(rule)} {text(slug)}", text(reason), where])
    lines = table(["Not fused", "Rule", "Why", "Where"], rows)
    if len(groups) > GROUPS_SHOWN:
        lines += [f"… and {many(len(groups) - GROUPS_SHOWN, 'other reason')}.", ""]
    return lines


def _paging(paging: Paging | None) -> list[str]:
    if paging is None:
        return []
    lines = []
    if paging.layers:
        pools = f"{many(len(paging.pools), 'pool')} of {text(paging.kv_dtype)}"
        lines.append(
            f"- **Paging:** {pools}, {many(paging.layers, 'layer')}, blocks of {paging.block_size} "
            f"tokens, {in_words(paging.token_bytes)} a token"
        )
    if paging.kernel:
        lines.append(f"- **The operator's kernel:** {text(paging.kernel)}")
    lines += [
        f"- **In the way:** {code(each.code)} {text(each.reason)} {code(each.node) if each.node else ''}"
        for each in paging.obstacles[:GROUPS_SHOWN]
    ]
    if len(paging.obstacles) > GROUPS_SHOWN:
        lines.append(f"- … and {len(paging.obstacles) - GROUPS_SHOWN:,} more")
    return [*lines, ""]


def _proof(proof: Proof | None) -> list[str]:
    if proof is None:
        return []
    ran = [case for case in proof.cases if case.compared]
    said = f"{many(len(ran), 'case')} run"
    worst = proof.worst
    if worst is not None:
        said += (
            f", largest difference {number(worst.difference)} standard deviations of "
            f"{number(proof.tolerance)} allowed (output {code(worst.output)}, {text(worst.name)})"
        )
    lines = [f"- **{capital(proof.status)}:** {said}"]
    if proof.reason:
        lines.append(f"- **Reason:** {text(proof.reason)}")
    if proof.rewrites:
        lines.append(f"- {many(proof.rewrites, 'rewrite')} checked in place")
    if proof.inner:
        lines.append(f"- {many(proof.inner, 'value')} inside both models compared")
    skipped = sum(bool(case.skipped) for case in proof.cases)
    if skipped:
        lines.append(f"- {many(skipped, 'case')} skipped")
    return lines


def _ops(report: Report) -> list[str]:
    if not report.ops_after:
        return []
    before, after = report.ops_before, report.ops_after
    ops = sorted({*before, *after}, key=lambda op: (-max(before.get(op, 0), after.get(op, 0)), op))
    rows = ([code(op), f"{before.get(op, 0):,}", f"{after.get(op, 0):,}"] for op in ops)
    return table(["Operator", "before", "after"], rows, numbers=(1, 2))


def _cases(proof: Proof | None) -> list[str]:
    if proof is None:
        return []
    rows = []
    for case in proof.cases[:CASES_SHOWN]:
        mark = MARKS["good" if case.difference <= proof.tolerance else "bad"]
        what = f"{mark} {number(case.difference)}"
        if not case.compared:
            what = text(f"skipped: {case.skipped}" if case.skipped else f"outside: {case.outside}")
        rows.append([text(case.name), what, code(case.output) if case.output else ""])
    lines = table(["Case", "Difference", "Output"], rows)
    if len(proof.cases) > CASES_SHOWN:
        lines.append(f"… and {len(proof.cases) - CASES_SHOWN:,} more.")
    return lines
