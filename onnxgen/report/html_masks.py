"""What masks show, as squares."""

from __future__ import annotations

from collections.abc import Sequence

from onnxgen.report.page import Html, join, tag
from onnxgen.report.pictures import MaskPicture
from onnxgen.report.words import capital, many


def mask_figures(masks: Sequence[MaskPicture]) -> Html:
    """A figure a mask."""
    if not masks:
        return Html("")
    return tag("div", *map(_figure, masks), class_="masks")


def _figure(mask: MaskPicture) -> Html:
    lines = [
        tag("strong", capital(mask.family)),
        tag("div", capital(mask.run)),
        tag("div", f"{_span('tokens', mask.queries)}, {_span('keys', mask.keys)}"),
        tag("div", many(len(mask.nodes), "attention")),
    ]
    if mask.reason:
        lines.append(tag("div", capital(mask.reason)))
    return tag("figure", draw(mask), tag("figcaption", *lines), class_="mask")


def _span(what: str, places: Sequence[int]) -> str:
    return f"{what} {places[0]:,} to {places[-1]:,}" if places else f"no {what}"


def draw(mask: MaskPicture) -> Html:
    """A square a key of a token, runs of seen ones in one path."""
    wide, high = len(mask.keys), len(mask.rows)
    path = []
    for y, row in enumerate(mask.rows):
        start = None
        for x, cell in enumerate(f"{row}0"):
            if cell == "1" and start is None:
                start = x
            elif cell != "1" and start is not None:
                path.append(f"M{start} {y}h{x - start}v1h-{x - start}z")
                start = None
    net = [f"M{x} 0v{high}" for x in range(1, wide)] + [f"M0 {y}h{wide}" for y in range(1, high)]
    drawn = [
        tag("title", f"{mask.family}: {mask.run}"),
        tag("path", d=Html("".join(path)), class_="seen"),
    ]
    if wide <= 16:
        drawn.append(tag("path", d=Html("".join(net)), class_="net"))
    return tag("svg", join(drawn), role="img", viewBox=f"0 0 {wide} {high}")
