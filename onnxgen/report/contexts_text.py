"""What a model holds for backends, rendered."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnxgen.bounds import in_words
from onnxgen.report.contexts import Contexts, Held

_SHOWN = 8  # regions that are alike in all that is said of them are one line from here on


def render_contexts(said: Contexts) -> RenderableType:
    """What a command of `onnxgen context` has to say."""
    return Group(*_lines(said))


def _lines(said: Contexts) -> Iterator[RenderableType]:
    if said.output:
        sizes = f"{in_words(said.bytes_before)} → {in_words(said.bytes_after)}"
        yield Text.assemble((said.input, "bold"), " → ", (said.output, "bold"), f"  {sizes}")
    else:
        yield Text(said.input, "bold")
    if said.dropped:
        yield Text(f"  taken out: what {', '.join(said.dropped)} compiled")
    if not said.places:
        yield Text("  holds nothing for backends")
    else:
        yield Text(
            f"  {len(said.places)} regions, as {said.encoding}"
            if len(said.places) > 1
            else f"  1 region, as {said.encoding}"
        )
        yield _table(said)
    for backend, proof in said.proofs.items():
        worst = proof.worst
        if proof.status == "proven" and worst is not None:
            cases = sum(case.compared for case in proof.cases)
            what = f"✓ proven: {cases} cases, largest difference {worst.difference:.1e}"
            yield Text.assemble(f"  {backend} ", (what, "green"))
        else:
            yield Text.assemble(f"  {backend} ", (f"✗ {proof.status}: {proof.reason}", "red"))
    if said.output and said.held and not said.proofs and said.input != said.output:
        yield Text("  nothing was run", "dim")
    for warning in said.warnings:
        yield Text(f"  Warning: {warning}", "yellow")


def _table(said: Contexts) -> RenderableType:
    asked = any(each.picked is not None for each in said.held)
    table = Table(box=None, padding=(0, 2), show_edge=False)
    names = ["region", "backend", "compiled by", "for", "blob", "weights"]
    for name in [*names, *(["here"] if asked else [])]:
        table.add_column(name, overflow="fold", header_style="dim")
    nodes = {each.name: each.nodes for each in said.places}

    def alike(each: Held) -> tuple[object, ...]:
        kept = (each.backend, each.source, each.version, each.compatibility, each.given)
        return (*kept, each.inside_bytes, each.picked, each.reason, nodes[each.region])

    by_backend = sorted(said.held, key=lambda each: each.backend)
    for _, group in groupby(by_backend, key=alike):
        members = list(group)
        shown = [[each] for each in members] if len(members) < _SHOWN else [members]
        for part in shown:
            table.add_row(*_cells(part, nodes, asked=asked))
    return table


def _cells(part: list[Held], nodes: dict[str, int], *, asked: bool) -> list[str | Text]:
    first = part[0]
    blobs = {each.blob: each.bytes for each in part}
    names = first.region if len(part) == 1 else f"{first.region} … {part[-1].region} ({len(part)})"
    held = f"{in_words(sum(blobs.values()))} {first.blob[:12]}…"
    if len(part) > 1:
        held = f"{in_words(sum(blobs.values()))} in {len(blobs)}"
    weights = f"{first.given} given"
    if first.inside_bytes:
        weights += f", {in_words(first.inside_bytes)} inside"
    cells: list[str | Text] = [
        f"{names} ({nodes[first.region]} nodes)",
        first.backend,
        f"{first.source} {first.version}",
        first.compatibility or first.device,
        held,
        weights,
    ]
    if asked:
        cells.append(
            Text("✓ runs it", "green")
            if first.picked
            else Text(
                f"✗ {first.reason}" if first.reason else "after another",
                "red" if first.reason else "dim",
            )
        )
    return cells
