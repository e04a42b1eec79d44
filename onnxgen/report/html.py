"""A command's outcome as one page to look at and to send: no scripts, nothing loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import PurePath

from onnxgen import __version__
from onnxgen.bounds import in_words
from onnxgen.report.graph_svg import layer_figures
from onnxgen.report.html_masks import mask_figures
from onnxgen.report.html_proof import proof_section
from onnxgen.report.html_sites import kept_section, lowered_section, sites_section
from onnxgen.report.page import Html, bar, code, details, join, page, pill, section, tag, tile
from onnxgen.report.values import Outcome, Paging, Proof, Report
from onnxgen.report.words import EXITS, change, many, number, verdict
from onnxgen.words import time_in_words

OPS_SHOWN = 14


def render(outcome: Outcome) -> str:
    """The page as text."""
    parts: list[object] = [_header(outcome)]
    report = outcome.report
    if report is not None:
        parts += [
            sites_section(report),
            kept_section(report.sites),
            lowered_section(report.lowered),
            _ops(report),
            _layer(report),
            _masks(report),
        ]
    parts.append(proof_section(outcome.proof))
    if report is not None:
        parts += [_paging(report.paging), _assumed(report), _times(report)]
    said = f"Written by onnxgen {__version__}. One file: it loads nothing and runs no script."
    name = PurePath(outcome.model).name or "no model"
    return page(f"{verdict(outcome)[0]}: {name}", *parts, tag("footer", said))


def _header(outcome: Outcome) -> Html:
    word, tone = verdict(outcome)
    report = outcome.report
    to = f" for target {report.target}" if report is not None else ""
    proof = outcome.proof
    parts = [
        tag("div", f"onnxgen {outcome.command}{to}", class_="eyebrow"),
        tag("h1", PurePath(outcome.model).name or "No model was read"),
        tag("div", pill(word, f"big {tone}"), tag("span", _lead(outcome)), class_="verdict"),
    ]
    if outcome.error:
        parts.append(tag("div", tag("p", outcome.error), class_="says bad"))
    elif proof is not None and proof.reason:
        parts.append(tag("div", tag("p", f"Not proven: {proof.reason}."), class_="says odd"))
    parts.append(tag("div", *_tiles(outcome), class_="tiles"))
    return tag("header", *parts)


def _lead(outcome: Outcome) -> str:
    report = outcome.report
    exits = f"exit status {outcome.exit_code}, {EXITS.get(outcome.exit_code, 'failed')}"
    if report is None:
        compared = f"{outcome.rewritten} against the original; " if outcome.rewritten else ""
        return f"{compared}{exits}"
    where = f"written to {report.output}" if report.output else "nothing was written"
    beside = f", beside it {', '.join(report.beside)}" if report.beside else ""
    return f"{where}{beside}; {exits}"


def _tiles(outcome: Outcome) -> Iterator[Html]:
    report, proof = outcome.report, outcome.proof
    if report is not None:
        done = sum(site.status == "fused" for site in report.sites)
        found = len(report.sites)
        tone = "good" if found and done == found else "odd"
        left = f"{many(found - done, 'site')} not" if found > done else "all of them"
        yield tile("Sites fused", f"{done} of {found}", left if found else "none found", tone=tone)
        if report.nodes_after:
            nodes = f"{report.nodes_before:,} → {report.nodes_after:,}"
            yield tile("Nodes", nodes, change(report.nodes_before, report.nodes_after))
        if report.bytes_before:
            sizes = [each for each in (report.bytes_before, report.bytes_after) if each]
            more = change(*sizes) if len(sizes) > 1 else ""
            yield tile("Files", " → ".join(map(in_words, sizes)), more)
        if report.opset_after:
            yield tile("Opset", f"{report.opset_before} → {report.opset_after}", report.target)
    worst = proof.worst if proof is not None else None
    if proof is not None and worst is not None:
        tone = "good" if worst.difference <= proof.tolerance else "bad"
        more = f"standard deviations; {number(proof.tolerance)} allowed"
        yield tile("Largest difference", number(worst.difference), more, tone=tone)
    if proof is not None and proof.cases:
        ran = sum(case.compared for case in proof.cases)
        yield tile("Cases run", f"{ran} of {len(proof.cases)}", f"budget {proof.budget}")
    if report is not None and report.seconds:
        yield tile("Time", time_in_words(sum(report.seconds.values())), _memory(proof))
    elif proof is not None and proof.seconds:
        yield tile("Time in ONNX Runtime", time_in_words(proof.seconds), _memory(proof))


def _memory(proof: Proof | None) -> str:
    return f"ONNX Runtime took {in_words(proof.memory)}" if proof and proof.memory else ""


def _ops(report: Report) -> Html:
    if not report.ops_after:
        return Html("")
    before, after = report.ops_before, report.ops_after
    ops = sorted({*before, *after}, key=lambda op: (-max(before.get(op, 0), after.get(op, 0)), op))
    most = max(max(before.values(), default=0), max(after.values(), default=0)) or 1
    key = [tag("span", tag("i", class_=c), w) for c, w in (("before", "before"), ("", "after"))]
    shown, rest = ops[:OPS_SHOWN], ops[OPS_SHOWN:]
    new = [op for op in rest if op not in before]  # what came is what the report is about
    shown, rest = shown + new, [op for op in rest if op in before]
    more = details(f"{many(len(rest), 'op')} more", _bars(rest, report, most)) if rest else ""
    note = f"{many(report.nodes_before, 'node')} before, {report.nodes_after:,} after."
    return section(
        "Operators",
        tag("div", *key, class_="key"),
        _bars(shown, report, most),
        more,
        note=note,
    )


def _bars(ops: Iterable[str], report: Report, most: int) -> Html:
    cells: list[Html] = []
    for op in ops:
        before, after = report.ops_before.get(op, 0), report.ops_after.get(op, 0)
        bars = [bar(before / most, tone="before"), bar(after / most)]
        said = [f"{before:,} → {after:,}"]
        cells += [code(op), tag("div", *bars), tag("div", *said, class_="number")]
    return tag("div", *cells, class_="ops")


def _layer(report: Report) -> Html:
    if report.picture is None:
        return Html("")
    note = join(
        [
            code(report.picture.layer),
            " before and after: what went into one fused node has its colour. Point at a node for"
            " its name; the drawings scroll.",
        ]
    )
    figures = layer_figures(report.picture, (*report.sites, *report.lowered))
    return section("One layer", figures, note=note)


def _masks(report: Report) -> Html:
    note = (
        "Which keys (columns) each token (row) attends to, read by running the part of the model "
        "that makes the mask."
    )
    return section("Masks", mask_figures(report.masks), note=note)


def _paging(paging: Paging | None) -> Html:
    if paging is None:
        return Html("")
    rows: list[tuple[str, object]] = [("Blocks", f"{paging.block_size} tokens each")]
    if paging.layers:
        rows += [
            (
                "Pools",
                f"{len(paging.pools)} of {paging.kv_dtype} for {many(paging.layers, 'layer')}",
            ),
            ("A token takes", f"{in_words(paging.token_bytes)} in all pools"),
            ("Masks", "; ".join(paging.families)),
            ("Logits", paging.logits),
            ("Flavor", paging.flavor),
        ]
    if paging.max_length:
        rows.append(("Longest sequence", f"{paging.max_length:,} tokens"))
    if paging.kernel:
        rows.append(("The operator's kernel", paging.kernel))
    if paging.dropped:
        rows.append(("Dropped outputs", ", ".join(paging.dropped)))
    stand = [
        tag("li", pill(each.code, "bad"), " ", each.reason, *_at(each.node))
        for each in paging.obstacles
    ]
    parts: list[object] = [_facts(rows)]
    if stand:
        parts += [tag("h3", "What stands in the way"), tag("ul", *stand, class_="plain")]
    return section("Paging", *parts)


def _at(node: str) -> Iterator[object]:
    if node:
        yield " "
        yield code(node)


def _assumed(report: Report) -> Html:
    parts: list[object] = []
    if report.contract:
        parts += [tag("h3", "Contract"), tag("p", report.contract)]
    if report.warnings:
        items = [tag("li", warning) for warning in report.warnings]
        parts += [tag("h3", "Warnings"), tag("ul", *items, class_="plain odd")]
    return section("What to know", *parts)


def _times(report: Report) -> Html:
    total = sum(report.seconds.values())
    if not total:
        return Html("")
    pieces, words = [], []
    for at, (stage, seconds) in enumerate(report.seconds.items()):
        width = f"width:{100 * seconds / total:.2f}%"
        pieces.append(tag("i", class_=f"c{at % 10}", style=width))
        swatch = tag("i", class_=f"swatch c{at % 10}")
        words.append(tag("li", swatch, stage, tag("small", time_in_words(seconds))))
    return section(
        "Time",
        tag("div", *pieces, class_="times"),
        tag("ul", *words, class_="legend"),
        note=time_in_words(total),
    )


def _facts(rows: Iterable[tuple[str, object]]) -> Html:
    return tag("dl", *(join([tag("dt", name), tag("dd", value)]) for name, value in rows))
