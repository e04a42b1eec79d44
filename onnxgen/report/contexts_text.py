"""What a model holds for backends, rendered."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import groupby

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from onnxgen.bounds import in_words
from onnxgen.report.contexts import Contexts, Held, Place
from onnxgen.report.values import Proof

_LONGEST = 72  # characters of a compatibility string; `--json` has all of it


def render_contexts(said: Contexts, *, cases: bool = False) -> RenderableType:
    """What a command of `onnxgen context` has to say; every case of its proofs, too, if asked for."""
    lines = [*_lines(said)]
    if cases:
        for backend, proof in said.proofs.items():
            for case in proof.cases:
                what = case.skipped or case.outside or f"{case.difference:.1e}"
                lines.append(Text(f"    {backend}: {case.name}: {what}", "dim"))
    return Group(*lines)


def _lines(said: Contexts) -> Iterator[RenderableType]:
    if said.output:
        sizes = f"{in_words(said.bytes_before)} → {in_words(said.bytes_after)}"
        yield Text.assemble((said.input, "bold"), " → ", (said.output, "bold"), f"  {sizes}")
    else:
        yield Text(said.input, "bold")
    if said.dropped:
        yield Text(f"  taken out: what {', '.join(said.dropped)} compiled")
    if not said.held:
        yield Text("  holds nothing for backends")
    by_place: dict[str, list[Held]] = {}
    for each in said.held:
        by_place.setdefault(each.region, []).append(each)
    places = [place for place in said.places if place.name in by_place]
    for _, group in groupby(places, key=lambda place: _alike(place, by_place[place.name])):
        members = list(group)
        yield _title(members, said.encoding, by_place[members[0].name])
        yield Padding(_table([by_place[each.name] for each in members]), (0, 0, 0, 4))
    for backend, proof in said.proofs.items():
        yield _proof(backend, proof)
    for warning in said.warnings:
        yield Text(f"  Warning: {warning}", "yellow")


def _alike(place: Place, held: list[Held]) -> Hashable:
    """What is said of a region but its name and its weights: neighbours that share it are one entry."""
    said = tuple((each.backend, each.given, each.inside_bytes, each.reason) for each in held)
    picked = tuple(each.picked for each in held)
    return place.nodes, place.subgraph, said, picked


def _title(places: list[Place], encoding: str, held: list[Held]) -> Text:
    first, last = places[0], places[-1]
    name = first.name if first is last else f"{first.name} … {last.name}"
    count = "" if first is last else f" ({len(places)} regions)"
    nodes = f"{first.nodes} nodes" + ("" if first is last else " each")
    here = ""
    if any(each.picked is not None for each in held):
        here = next((each.backend for each in held if each.picked), "its own nodes")
    by = (f"; run here by {here}", "bold") if here else ""
    return Text.assemble("  ", (name, "bold"), f"{count}: {nodes}, in the {encoding} form", by)


def _table(regions: list[list[Held]]) -> Table:
    """A row for each backend; of several regions that are alike, for all of them."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for several in zip(*regions, strict=True):
        first = several[0]
        blobs = {each.blob: each.bytes for each in several}
        size = in_words(sum(blobs.values()))
        blob = f"blob {first.blob[:12]}… of {size}"
        if len(several) > 1:
            blob = f"{len(blobs)} blobs of {size} for {len(several)} regions"
            blob = f"one blob {first.blob[:12]}… of {size} for all" if len(blobs) == 1 else blob
        inside = f", {in_words(first.inside_bytes)} inside" if first.inside_bytes else ""
        lines = [
            Text(f"{blob}; weights given to it: {first.given}{inside}"),
            Text(f"{first.source} {first.version}", "dim"),
            Text(f"for {_short(first.compatibility or first.device)}", "dim"),
        ]
        if first.picked is not None:
            lines.insert(0, _here(first))
        table.add_row(Text(first.backend, "bold"), Group(*lines))
    return table


def _here(held: Held) -> Text:
    if held.picked:
        return Text("✓ runs it here", "green")
    if held.reason.startswith("it could"):
        return Text(f"- {held.reason}", "dim")
    return Text(f"✗ {held.reason}", "red")


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _proof(backend: str, proof: Proof) -> Text:
    worst = proof.worst
    if proof.status != "proven" or worst is None:
        return Text.assemble(f"  {backend} ", (f"✗ {proof.status}: {proof.reason}", "red"))
    cases = sum(case.compared for case in proof.cases)
    what = f"✓ proven: {cases} cases, largest difference {worst.difference:.1e}"
    return Text.assemble(f"  {backend} ", (what, "green"))
