"""Building blocks of a page: escaped text, tables, tiles, bars, and the page around them.

Every function returns HTML as `Html`; whatever else comes in is text, and is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib.resources import files

from onnxgen.errors import one_line
from onnxgen.report.render import STARTS

START = STARTS[".html"]


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(text: object) -> Html:
    """Text as HTML; characters that no reader can show, or that turn others around, are named."""
    return text if isinstance(text, Html) else Html(html.escape(one_line(str(text))))


def tag(name: str, *inside: object, **attributes: object) -> Html:
    """An element; `class_` is class, and what is None is left out."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{words}>{join(inside)}</{name}>")


def join(parts: Iterable[object]) -> Html:
    return Html("".join(map(escape, parts)))


def section(title: str, *inside: object, note: object = "") -> Html:
    """A part of the page under a heading; nothing where there is nothing inside."""
    body = join(inside)
    if not body:
        return body
    said = tag("p", note, class_="note") if note else ""
    return tag("section", tag("h2", title), said, body)


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], *, numbers: Sequence[int] = ()
) -> Html:
    """A table that scrolls inside itself; columns of `numbers` are aligned at the right."""

    def cells(name: str, row: Sequence[object]) -> Html:
        made = (
            tag(name, cell, class_="number" if at in numbers else None)
            for at, cell in enumerate(row)
        )
        return tag("tr", *made)

    body = join(cells("td", row) for row in rows)
    inside = tag("table", tag("thead", cells("th", head)), tag("tbody", body))
    return scroll(inside, "a table")


def scroll(inside: object, label: str, *, class_: str = "scroll") -> Html:
    """What may be larger than the page; keys scroll it too."""
    return tag("div", inside, class_=class_, tabindex=0, role="region", aria_label=label)


def tile(label: str, value: object, more: object = "", *, tone: str = "") -> Html:
    """A figure with its name."""
    said = tag("div", more, class_="more") if more else ""
    figure = tag("div", value, class_="value")
    return tag(
        "div", tag("div", label, class_="label"), figure, said, class_=f"tile {tone}".strip()
    )


def bar(share: float, *, tone: str = "", mark: float | None = None) -> Html:
    """A bar over a share of its place, from 0 to 1, with a mark where a limit is."""
    filled = tag("i", class_=tone or None, style=f"width:{100 * min(max(share, 0), 1):.2f}%")
    limit = "" if mark is None else tag("b", style=f"left:{100 * min(max(mark, 0), 1):.2f}%")
    return tag("span", filled, limit, class_="bar")


def pill(text: object, tone: str = "") -> Html:
    return tag("span", text, class_=f"pill {tone}".strip())


def code(text: object) -> Html:
    """A name from a model; long ones may break anywhere."""
    return tag("code", text)


def details(summary: object, *inside: object) -> Html:
    """What opens when it is asked for."""
    return tag("details", tag("summary", summary), *inside)


def page(title: str, *inside: object) -> str:
    """A whole document: one file, nothing loaded, no scripts."""
    style = files("onnxgen.report").joinpath("page.css").read_text(encoding="utf-8")
    head = join(
        [
            Html('<meta charset="utf-8">'),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html('<meta name="color-scheme" content="light dark">'),
            Html('<link rel="icon" href="data:,">'),
            tag("title", title),
            tag("style", Html(f"\n{style}")),
        ]
    )
    body = tag("body", tag("main", *inside))
    return f'{START}<html lang="en"><head>{head}</head>{body}</html>\n'
