"""A layer before and after, as two drawings beside one another, sites in one colour each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxgen.report.graph_layout import lay_out
from onnxgen.report.page import Html, join, scroll, tag
from onnxgen.report.pictures import Drawing, Picture, PictureNode
from onnxgen.report.values import Site
from onnxgen.report.words import capital, kind_name, many

COLOURS = 10  # of page.css
HEIGHT = 24.0
LETTER = 6.5  # widest mean width of a letter at 11 px
LONGEST = 22


def layer_figures(picture: Picture, sites: Sequence[Site]) -> Html:
    """The two drawings, and which colour is which site."""
    known = {site.node: site for site in sites if site.status == "fused"}
    shown = (*picture.after.nodes, *picture.before.nodes)
    colours = {name: at for at, name in enumerate(dict.fromkeys(n.site for n in shown if n.site))}
    replaced: dict[str, int] = {}
    for node in picture.before.nodes:
        if node.site:
            replaced[node.site] = replaced.get(node.site, 0) + 1
    legend = [
        tag(
            "li",
            tag("i", class_=f"swatch c{at % COLOURS}"),
            capital(kind_name(known[name].kind)) if name in known else "Fused",
            tag("small", _from(replaced.get(name, 0), known.get(name))),
            title=name,
        )
        for name, at in colours.items()
    ]
    legend += [
        tag("li", tag("i", class_=f"swatch {kind}"), said)
        for kind, said in (("plain", "left as it was"), ("gone", "cleaned away"))
        if kind == "plain" or any(node.gone for node in shown)
    ]
    pair = [
        tag("figure", tag("figcaption", _caption(word, drawing)), _scrolled(word, drawing, colours))
        for word, drawing in (("Before", picture.before), ("After", picture.after))
    ]
    return join([tag("ul", *legend, class_="legend"), tag("div", *pair, class_="pair")])


def _from(count: int, site: Site | None) -> str:
    rule = site.rule if site is not None else ""
    return " · ".join(filter(None, [rule, f"{count} → 1" if count else ""]))


def _caption(word: str, drawing: Drawing) -> Html:
    count = sum(bool(node.op) for node in drawing.nodes)
    more = [many(drawing.constants, "constant") if drawing.constants else ""]
    more += [f"{many(drawing.hidden, 'node')} more" if drawing.hidden else ""]
    left = " and ".join(filter(None, more))
    said = f", and {left} not drawn" if left else ""
    return join([tag("strong", word), f" {many(count, 'node')}{said}"])


def _scrolled(word: str, drawing: Drawing, colours: Mapping[str, int]) -> Html:
    return scroll(draw(drawing, colours, f"The layer {word.lower()}"), word, class_="scroll graph")


def draw(drawing: Drawing, colours: Mapping[str, int], title: str) -> Html:
    """The drawing as SVG."""
    words = [_label(node) for node in drawing.nodes]
    widths = [max(34.0, LETTER * len(word) + 16) for word in words]
    layout = lay_out(widths, [node.reads for node in drawing.nodes])
    margin = 10.0
    edges = []
    for source, target, between in layout.edges:
        (x1, y1), (x2, y2) = layout.centres[source], layout.centres[target]
        points = [(x1, y1 + HEIGHT / 2), *between, (x2, y2 - HEIGHT / 2)]
        site = drawing.nodes[source].site
        inner = bool(site) and site == drawing.nodes[target].site
        edges.append(_edge(points, f"e c{colours[site] % COLOURS}" if inner else "e"))
    nodes = [
        _node(node, word, width, centre, colours)
        for node, word, width, centre in zip(
            drawing.nodes, words, widths, layout.centres, strict=True
        )
    ]
    wide, high = layout.width + 2 * margin, layout.height
    return tag(
        "svg",
        tag("title", title),
        *dict.fromkeys(edges),
        *nodes,
        xmlns=None,
        role="img",
        width=f"{wide:.0f}",
        height=f"{high:.0f}",
        viewBox=f"{-margin:.0f} 0 {wide:.0f} {high:.0f}",
    )


def _label(node: PictureNode) -> str:
    word = (node.op or node.name).rpartition("::")[2] or "?"
    if len(word) <= LONGEST:
        return word
    # Of a value's name the end tells most: present.3.key.
    return f"{word[: LONGEST - 1]}…" if node.op else f"…{word[1 - LONGEST :]}"


def _node(
    node: PictureNode,
    word: str,
    width: float,
    centre: tuple[float, float],
    colours: Mapping[str, int],
) -> Html:
    x, y = centre
    kind = "n"
    if not node.op:
        kind = "n value"
    elif node.site:
        kind = f"n c{colours[node.site] % COLOURS}"
    elif node.gone:
        kind = "n gone"
    box = tag(
        "rect",
        x=f"{x - width / 2:.1f}",
        y=f"{y - HEIGHT / 2:.1f}",
        width=f"{width:.1f}",
        height=f"{HEIGHT:.0f}",
        rx=12 if not node.op else 5,
    )
    said = " · ".join(filter(None, [node.op, node.name, node.site and f"→ {node.site}"]))
    text = tag("text", word, x=f"{x:.1f}", y=f"{y + 3.8:.1f}")
    return tag("g", tag("title", said), box, text, class_=kind)


def _edge(points: Sequence[tuple[float, float]], kind: str) -> Html:
    """A curve that leaves and arrives upright, and stays upright where it passes a rank."""
    (x, y), rest = points[0], points[1:]
    path = [f"M{x:.1f} {y:.1f}"]
    for at, (x2, y2) in enumerate(rest):
        last = at == len(rest) - 1
        top = y2 if last else y2 - HEIGHT / 2
        if abs(x2 - x) < 0.05:
            path.append(f"V{top:.1f}")
        else:
            middle = (y + top) / 2
            path.append(f"C{x:.1f} {middle:.1f} {x2:.1f} {middle:.1f} {x2:.1f} {top:.1f}")
        if not last:
            path.append(f"V{y2 + HEIGHT / 2:.1f}")
            top = y2 + HEIGHT / 2
        x, y = x2, top
    return tag("path", d=Html("".join(path)), class_=kind)  # however long, it is kept whole
