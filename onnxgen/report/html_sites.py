"""The sites on the page: by layer and kind, and why some were kept or undone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onnxgen.report.as_json import summary
from onnxgen.report.layers import layers_of
from onnxgen.report.page import Html, bar, code, details, join, pill, section, table, tag
from onnxgen.report.values import Report, Site
from onnxgen.report.words import TIMES, capital, kind_name, many

NAMES_SHOWN = 200
TONES = {"fused": "good", "kept": "odd", "undone": "bad"}


def sites_section(report: Report) -> Html:
    """What was found by kind, and where."""
    if not report.sites:
        return section("Sites", tag("p", "Nothing was found to fuse."))
    rows = []
    for kind, count in summary(report.sites).items():
        tone = "good" if count["fused"] == count["found"] else "odd"
        share = bar(count["fused"] / count["found"], tone=tone)
        left = [
            pill(f"{count[status]} {status}", TONES[status])
            for status in ("kept", "undone")
            if count[status]
        ]
        forms = _forms(site for site in report.sites if site.kind == kind)
        fused = f"{count['fused']} of {count['found']}"
        rows.append((tag("strong", capital(kind_name(kind))), fused, share, join(left), forms))
    head = ("", "Fused", "", "", "What it is")
    parts = [table(head, rows, numbers=(1,))]
    layers = layers_of(report.sites)
    if len(set(layers) - {""}) > 1:
        parts.append(tag("h3", "By layer"))
        parts.append(_by_layer(report.sites, layers))
    return section("Sites", *parts)


def _forms(sites: Iterable[Site]) -> Html:
    """The distinct details of fused sites, the most frequent ones."""
    counts: dict[str, int] = {}
    for site in sites:
        if site.status == "fused" and site.details:
            said = ", ".join(
                f"{key.replace('_', ' ')} {_plain(value)}" for key, value in site.details.items()
            )
            counts[said] = counts.get(said, 0) + 1
    shown = [
        tag("div", f"{count} {TIMES} " if len(counts) > 1 else "", said)
        for said, count in sorted(counts.items(), key=lambda each: -each[1])[:3]
    ]
    more = [tag("div", f"and {many(len(counts) - 3, 'other form')}")] if len(counts) > 3 else []
    return tag("small", *shown, *more)


def _plain(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _by_layer(sites: Sequence[Site], layers: Sequence[str]) -> Html:
    kinds = list(dict.fromkeys(site.kind for site in sites))
    cells: dict[str, dict[str, list[Site]]] = {}
    for site, layer in zip(sites, layers, strict=True):
        cells.setdefault(layer, {}).setdefault(site.kind, []).append(site)
    outside = cells.pop("", None)
    if outside is not None:
        cells[""] = outside
    rows = []
    for layer, held in cells.items():
        replaced = sum(site.replaced for found in held.values() for site in found)
        name = code(layer) if layer else tag("em", "outside")
        rows.append((name, *(_dots(held.get(kind, ())) for kind in kinds), f"{replaced:,}"))
    head = ("Layer", *(capital(kind_name(kind)) for kind in kinds), "Nodes replaced")
    return table(head, rows, numbers=(len(head) - 1,))


def _dots(sites: Sequence[Site]) -> Html:
    """A square a site, in the colour of what became of it."""
    if not sites:
        return Html("")
    counts = {s: sum(site.status == s for site in sites) for s in TONES}
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    if len(sites) > 6:
        made = (pill(f"{count} {s}", TONES[s]) for s, count in counts.items() if count)
        return join(made)
    return tag(
        "span",
        *(tag("i", class_=TONES[site.status]) for site in sites),
        class_="dots",
        role="img",
        title=said,
        aria_label=said,
    )


def kept_section(sites: Sequence[Site], title: str = "Not fused") -> Html:
    """What was kept or undone, by reason, with what would change it."""
    groups: dict[tuple[str, str, str, str], list[Site]] = {}
    for site in sites:
        if site.status != "fused":
            code_ = site.decline.code if site.decline else ""
            rule = site.decline.rule if site.decline else site.rule
            groups.setdefault((site.status, site.kind, rule, code_), []).append(site)
    rows = [_reason(key, group) for key, group in groups.items()]
    if not rows:
        return Html("")
    return section(title, table(("", "Site", "Rule", "Why"), rows))


def _reason(key: tuple[str, str, str, str], group: Sequence[Site]) -> Sequence[object]:
    status, kind, rule, slug = key
    said = dict.fromkeys(site.decline.reason for site in group if site.decline)
    reasons = [tag("div", capital(reason), ".") for reason in list(said)[:3]]
    if len(said) > 3:
        reasons.append(tag("div", tag("small", f"and {many(len(said) - 3, 'like reason')}")))
    declines = [site.decline for site in group if site.decline]
    for label, words in (
        ("Expected", {each.expected for each in declines}),
        ("Found", {each.found for each in declines}),
        ("What helps", {each.change for each in declines}),
    ):
        told = sorted(filter(None, words))
        if told:
            more = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
            reasons.append(tag("div", tag("small", f"{label}: {told[0]}{more}")))
    places = [tag("li", code(site.scope or site.node)) for site in group[:NAMES_SHOWN]]
    if len(group) > NAMES_SHOWN:
        places.append(tag("li", f"and {len(group) - NAMES_SHOWN:,} more"))
    where = details(many(len(group), "place"), tag("ul", *places, class_="plain"))
    name = join([capital(kind_name(kind)), tag("div", tag("small", f"{TIMES} {len(group)}"))])
    rule_ = join([code(rule), tag("div", tag("small", slug))])
    return pill(status, TONES[status]), name, rule_, join([*reasons, where])


def lowered_section(sites: Sequence[Site]) -> Html:
    """What became the target's own operators, and what did not."""
    if not sites:
        return Html("")
    rows = []
    for kind, count in summary(list(sites)).items():
        share = bar(count["fused"] / count["found"], tone="good")
        forms = _forms(site for site in sites if site.kind == kind)
        fused = f"{count['fused']} of {count['found']}"
        rows.append((tag("strong", capital(kind_name(kind))), fused, share, forms))
    done = section(
        "The target's own operators", table(("", "Lowered", "", "What it is"), rows, numbers=(1,))
    )
    return join([done, kept_section(sites, "Not lowered")])
