"""What a model is, rendered."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnxgen.bounds import in_words
from onnxgen.report.inspection import Attending, Inspection, Port
from onnxgen.report.words import kind_name

_PORTS = 8  # lines of inputs and of outputs; caches of one kind are one


def render_inspection(found: Inspection) -> RenderableType:
    """What `onnxgen inspect` has to say."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim")
    rows.add_column(overflow="fold")
    for name, said in _lines(found):
        rows.add_row(name, said)
    title = Text.assemble((found.input, "bold"), f": {found.kind}")
    warnings = [Text(f"Warning: {each}", "yellow") for each in found.warnings]
    return Group(title, rows, *warnings)


def _lines(found: Inspection) -> Iterator[tuple[str, str | Text]]:
    yield "written by", found.written_by or "nobody says"
    domains = "".join(f", {name} {version}" for name, version in found.domains.items())
    yield "opset", f"{found.opset}{domains}"
    yield "size", f"{in_words(found.bytes)}, {found.nodes:,} nodes"
    weights = ", ".join(f"{in_words(size)} of {kind}" for kind, size in found.weights.items())
    yield "parameters", f"{found.parameters:,}{f' ({weights})' if weights else ''}"
    if found.quantised:
        yield "quantised", ", ".join(f"{count} {op}" for op, count in found.quantised.items())
    for index, each in enumerate(found.attentions):
        yield "" if index else "attention", _attention(each)
    if found.hidden_size:
        vocabulary = f", vocabulary {found.vocabulary:,}" if found.vocabulary else ""
        yield "hidden size", f"{found.hidden_size:,}{vocabulary}"
    if found.experts:
        yield "experts", f"{found.experts}, {found.experts_per_token or 'all'} for each token"
    if found.cache:
        per_token = in_words(found.kv_bytes_per_token) if found.kv_bytes_per_token else "unknown"
        yield "cache", f"{found.cache}, {found.cache_dtype}, {per_token} a token"
    for name, ports in (("inputs", found.inputs), ("outputs", found.outputs)):
        for index, line in enumerate(_ports(ports)):
            yield "" if index else name, line
    if found.contract:
        yield "contract", found.contract
    if found.backends:
        yield "compiled by", f"{', '.join(found.backends)} (onnxgen context list says more)"
    for index, target in enumerate(found.targets):
        style = "green" if target.possible else "red"
        mark = (f"{'✓' if target.possible else '✗'} {target.target}", style)
        yield "" if index else "targets", Text.assemble(mark, f": {target.said}")
    if found.kept:
        kept = ", ".join(f"{count} {kind_name(kind)}" for kind, count in found.kept.items())
        yield "not fused", f"{kept} (onnxgen explain says why)"


def _attention(each: Attending) -> str:
    heads = f"{each.heads or '?'} heads"
    if each.kv_heads != each.heads:
        heads += f" on {each.kv_heads or '?'} of keys and values"
    extra = f", softcap {each.softcap:g}" if each.softcap else ""
    extra += ", sinks" if each.sinks else ""
    return (
        f"{each.layers} of {heads}, size {each.head_size or '?'}"
        f"{f'; mask: {each.mask}' if each.mask else ''}"
        f"{f'; rotary: {each.rotary}' if each.rotary else ''}{extra}"
    )


def _ports(ports: list[Port]) -> Iterator[str]:
    """One line a port; those alike but for their names, as caches are, on one line."""
    groups: dict[tuple[object, ...], list[Port]] = {}
    for port in ports:
        sizes = tuple(size if isinstance(size, int) else "" for size in port.shape)
        groups.setdefault((port.role, port.dtype, sizes), []).append(port)
    shown = list(groups.values())
    for group in shown[:_PORTS]:
        first = group[0]
        shape = ", ".join(map(str, first.shape))
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        yield f"{first.name}{more}: {first.dtype}[{shape}]{f' ({first.role})' if first.role else ''}"
    if len(shown) > _PORTS:
        yield f"and {sum(map(len, shown[_PORTS:]))} more"
