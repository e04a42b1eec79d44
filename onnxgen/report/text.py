"""A report as text for a person: counts by kind, and sites grouped by reason.

A model of a hundred layers gives as many lines as one of two: equal things are said once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnxgen.bounds import in_words
from onnxgen.errors import one_line
from onnxgen.report.as_json import summary
from onnxgen.report.values import Case, Paging, Proof, Report, Site
from onnxgen.report.words import kind_name, many
from onnxgen.words import time_in_words

NAMES_SHOWN = 3
WIDE = 100
"""Columns in a pipe, where nothing says how wide a line may be."""
GROUPS_SHOWN = 4
REASONS_SHOWN = 8

_STYLES = {"proven": "green", "differs": "red", "unproven": "yellow", "unverifiable": "red"}


def console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is; NO_COLOR and pipes get no colours."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)


def say(*parts: RenderableType, stderr: bool = False) -> None:
    """Print parts of a report: in a pipe without blanks at the ends of lines, a little wider."""
    shown = console(stderr=stderr)
    if shown.is_terminal:
        shown.print(*parts, sep="\n")
        return
    if "COLUMNS" not in os.environ:
        shown.width = WIDE
    with shown.capture() as captured:
        shown.print(*parts, sep="\n")
    for line in captured.get().splitlines():
        print(line.rstrip(), file=shown.file)


def render(value: Report | Proof) -> RenderableType:
    """A report, or a proof alone."""
    return render_report(value) if isinstance(value, Report) else render_proof(value)


def render_report(report: Report) -> RenderableType:
    """Everything `onnxgen fuse` has to say."""
    parts: list[RenderableType] = [_header(report)]
    if report.sites:
        parts.append(_counts(report))
    else:
        parts.append(Text("Nothing was found to fuse.", "yellow"))
    parts += _fused(report.sites)
    parts += _not_fused(report.sites)
    parts += found_nothing(report)
    parts += _lowered(report.lowered)
    if report.paging is not None:
        parts += _paging(report.paging)
    if report.contract:
        parts.append(_labelled("Contract", report.contract, "bold"))
    if report.proof is not None or report.paging is None:
        parts.append(render_proof(report.proof))
    shown = report.warnings[:REASONS_SHOWN]
    parts += [_labelled("Warning", warning, "yellow") for warning in shown]
    if len(report.warnings) > len(shown):
        more = many(len(report.warnings) - len(shown), "other warning")
        parts.append(Text(f"Warning: and {more} (--json lists all)", "yellow"))
    parts.append(_footer(report))
    if report.beside:
        parts.append(Text(one_line(f"Beside it: {', '.join(report.beside)}")))
    return Group(*parts)


def render_proof(proof: Proof | None) -> RenderableType:
    """What was run, and the largest difference."""
    if proof is None or proof.status == "unproven":
        reason = proof.reason if proof is not None and proof.reason else "nothing was run"
        return _labelled("Unproven", reason, _STYLES["unproven"])
    lines: list[RenderableType] = []
    ran = [case for case in proof.cases if case.compared]
    status = proof.status.capitalize()
    # Why it is not proven is the sentence that the command ends with.
    said = f"{many(len(ran), 'case')} run, {_largest(proof)}" if ran else "no case was run"
    lines.append(_labelled(status, said, _STYLES[proof.status]))
    if proof.twins:
        why = "ONNX Runtime's CPU cannot run bfloat16"
        if "float16" in proof.twins:
            why = "which experts are chosen would hang on how float16 is rounded"
        lines.append(Text(f"  compared as float32 twins: {why}"))
    if proof.rewrites:
        lines.append(
            Text(
                f"  {many(proof.rewrites, 'rewrite')} checked in place "
                f"({many(proof.structures, 'distinct structure')}), "
                f"largest difference {proof.rewrite_difference:.1e}"
            )
        )
    lines += _inside(proof)
    skipped: dict[str, list[Case]] = {}
    if proof.note:
        lines.append(Text(one_line(f"  {proof.note}")))
    for case in proof.cases:
        if case.skipped:
            skipped.setdefault(case.skipped, []).append(case)
    for reason, cases in skipped.items():
        names = some(case.name for case in cases)
        said = f"  {many(len(cases), 'case')} skipped ({names}): {reason}"
        lines.append(Text(one_line(said), "yellow"))
    outside = [case for case in proof.cases if case.outside]
    if outside:
        names = some(case.name for case in outside)
        lines.append(
            Text(f"  {many(len(outside), 'case')} outside the contract fail as they must ({names})")
        )
    if proof.seconds:
        memory = f" in at most {in_words(proof.memory)} of memory" if proof.memory else ""
        lines.append(Text(f"  ONNX Runtime ran {time_in_words(proof.seconds)}{memory}"))
    return Group(*lines)


def _inside(proof: Proof) -> Iterator[Text]:
    """What was run of it, what the outputs do not show, and what was compared instead."""
    if proof.layers:
        alike = proof.layers - proof.layers_run
        said = (
            f"; {alike} are like these, in structure and in where their weights stand"
            if alike
            else ""
        )
        yield Text(
            f"  {proof.layers_run} of {many(proof.layers, 'part')} run, one of each kind{said}"
        )
    if proof.inner:
        yield Text(
            f"  {many(proof.inner, 'value')} inside compared, "
            f"largest difference {proof.inner_difference:.1e}"
        )
    if proof.faint:
        said = " and ".join(f"{each.what} ({each.effect:.1e})" for each in proof.faint)
        local = " and each rewrite on random inputs of its own" if proof.rewrites else ""
        yield Text(
            f"  the outputs hardly depend on the {said}: they show little of it; "
            f"the values inside were compared too{local}",
            "yellow",
        )
    yield from (Text(one_line(f"  not run: {each}"), "yellow") for each in proof.not_run)


def _largest(proof: Proof) -> str:
    worst = proof.worst
    assert worst is not None
    where = ", ".join(filter(None, [worst.output and f"output {worst.output}", worst.name]))
    return (
        f"largest difference {worst.difference:.1e} standard deviations "
        f"of {proof.tolerance:.0e} allowed ({where})"
    )


def _header(report: Report) -> Text:
    changes = [f"target {report.target}"]
    if report.opset_after:
        changes.append(f"opset {report.opset_before} → {report.opset_after}")
    if report.nodes_before:
        changes.append(f"nodes {report.nodes_before} → {report.nodes_after}")
    return Text.assemble((one_line(report.input), "bold"), ": ", ", ".join(changes))


def _counts(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("site")
    columns = ["found", "fused", "kept", "undone"]
    counts = summary(report.sites)
    if not any(count["undone"] for count in counts.values()):
        columns.remove("undone")
    for column in columns:
        table.add_column(column, justify="right")
    for kind, count in counts.items():
        style = "green" if count["fused"] == count["found"] else "yellow"
        cells = [str(count[column]) for column in columns]
        table.add_row(kind_name(kind), *cells, style=style)
    return table


def _fused(sites: Sequence[Site]) -> Iterator[Text]:
    """What was fused, equal sites on one line."""
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        if site.status == "fused":
            details = ", ".join(f"{key} {value}" for key, value in site.details.items())
            groups.setdefault((site.kind, details), []).append(site)
    by_kind: dict[str, int] = {}
    for (kind, details), group in groups.items():
        by_kind[kind] = by_kind.get(kind, 0) + 1
        if details and by_kind[kind] <= GROUPS_SHOWN:
            yield Text(one_line(f"Fused {kind_name(kind)} ({len(group)}): {details}"))
    for kind, count in by_kind.items():
        if count > GROUPS_SHOWN:
            more = many(count - GROUPS_SHOWN, "other form")
            yield Text(f"Fused {kind_name(kind)}: and {more} (--json lists all)")


def found_nothing(report: Report) -> Iterator[Text]:
    """The user's rules that fit nowhere, those first that came nearest to it."""
    misses: dict[str, list[Site]] = {code: [] for code in report.own_rules}
    for site in report.near_misses:
        misses[site.rule].append(site)
    found = {site.rule for site in report.sites}
    codes = [code for code in misses if code not in found]
    codes.sort(key=lambda code: -int(misses[code][0].details["matched"]) if misses[code] else 0)
    for code in codes[:GROUPS_SHOWN]:
        said = "no node is like the one that its pattern ends in"
        if misses[code]:
            nearest = misses[code][0]
            matched = many(int(nearest.details["matched"]), "node")
            reason = nearest.decline.reason if nearest.decline is not None else ""
            where = some(dict.fromkeys(site.scope or site.node for site in misses[code]))
            said = f"nearest ({len(misses[code])}): {matched} fit, then: {reason} [{where}]"
        yield _labelled(f"{code} of {report.own_rules[code]} fits nowhere", said, "yellow")
    if len(codes) > GROUPS_SHOWN:
        more = many(len(codes) - GROUPS_SHOWN, "other rule")
        yield Text(f"And {more} of yours fit nowhere (--json lists what came near)", "yellow")


def _lowered(sites: Sequence[Site]) -> Iterator[Text]:
    """What became the target's own operators, one line a kind, and what did not and why."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.kind, []).append(site)
    for kind, group in groups.items():
        done = [site for site in group if site.status == "fused"]
        details = {", ".join(f"{k} {v}" for k, v in site.details.items()) for site in done}
        said = f": {'; '.join(sorted(details))}" if any(details) else ""
        told = f"Lowered {kind_name(kind)} ({len(done)} of {len(group)}){said}"
        yield Text(one_line(told))
    yield from _not_fused(sites)


def _paging(paging: Paging) -> Iterator[Text]:
    """What reads pools, or what stands in the way."""
    groups: dict[tuple[str, str], list[str]] = {}
    for each in paging.obstacles:
        groups.setdefault((each.code, each.reason), []).append(each.node)
    for (code, reason), places in list(groups.items())[:REASONS_SHOWN]:
        where = some(filter(None, places))
        said = f"{reason} [{where}]" if where else reason
        yield _labelled(f"Cannot be paged ({len(places)}): {code}", said, "red")
    if len(groups) > REASONS_SHOWN:
        more = many(len(groups) - REASONS_SHOWN, "other reason")
        yield Text(f"Cannot be paged: and {more} (--json lists all)", "red")
    if paging.obstacles or not paging.layers:
        return
    families = "; ".join(paging.families)
    yield Text(
        f"{many(len(paging.pools), 'pool')} of {paging.kv_dtype} for "
        f"{many(paging.layers, 'layer')}: blocks of {paging.block_size} tokens, {in_words(paging.token_bytes)} a token; "
        f"masks: {families}; logits: {paging.logits}"
    )
    if paging.kernel:
        run = not paging.kernel.startswith("not run")
        yield _labelled("The operator's kernel", paging.kernel, "green" if run else "yellow")
    if paging.dropped:
        yield Text(f"Dropped outputs: {some(paging.dropped)}, which say what a paged model is told")


def _not_fused(sites: Sequence[Site]) -> Iterator[Text]:
    """What was kept or undone, and why, one line a reason."""
    groups: dict[tuple[str, str, str, str], list[Site]] = {}
    for site in sites:
        if site.status != "fused":
            rule = site.decline.rule if site.decline else site.rule
            code = site.decline.code if site.decline else ""
            groups.setdefault((site.status, site.kind, rule, code), []).append(site)
    for (status, kind, rule, code), group in groups.items():
        reasons = {site.decline.reason for site in group if site.decline}
        reason = min(reasons, default="no reason was given")
        if len(reasons) > 1:
            reason += f" (and {many(len(reasons) - 1, 'like reason')})"
        where = some(site.scope or site.node for site in group)
        label = f"{status} {kind_name(kind)} ({len(group)})"
        yield _labelled(
            label, f"{' '.join(filter(None, [rule, code]))}: {reason} [{where}]", "yellow"
        )


def _footer(report: Report) -> Text:
    total = sum(report.seconds.values())
    stages = ", ".join(f"{name} {time_in_words(each)}" for name, each in report.seconds.items())
    took = f" in {time_in_words(total)} ({stages})" if stages else ""
    if report.output:
        after, before = in_words(report.bytes_after), in_words(report.bytes_before)
        size = f", {after} (before: {before})," if report.bytes_after else ""
        return Text.assemble("Written to ", (report.output, "bold"), size, took)
    return Text.assemble(("Nothing was written", "bold"), took)


def _labelled(label: str, text: str, style: str) -> Text:
    label = label[:1].upper() + label[1:]
    return Text.assemble((f"{label}: " if text else label, style), one_line(text))


def some(names: Iterable[str]) -> str:
    """The first few of many names."""
    names = list(names)
    shown = one_line(", ".join(names[:NAMES_SHOWN]))
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
