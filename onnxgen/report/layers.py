"""Which layer of a model a site is in, told from the module paths that the exporter left."""

from __future__ import annotations

from collections.abc import Sequence

from onnxgen.report.values import Site


def layers_of(sites: Sequence[Site]) -> list[str]:
    """The layer of each site: "model.layers.3", or "" where it is in none.

    A layer is a module that its parent counts: a part of a path that is a number. Where several
    are, such as an expert in a layer, the one that holds most kinds of sites is taken, and of
    those that hold equally many the innermost. Where no path has a number, what comes up to
    and with the n-th attention is "part n".
    """
    kinds: dict[str, set[str]] = {}
    for site in sites:
        for prefix in counted(site.scope):
            kinds.setdefault(prefix, set()).add(site.kind)
    most: dict[str, int] = {}  # by the module that counts: how many kinds one of its parts holds
    for prefix, held in kinds.items():
        parent = prefix.rpartition(".")[0]
        most[parent] = max(most.get(parent, 0), len(held))
    if not kinds:
        return _by_attention(sites)

    def rank(prefix: str) -> tuple[int, int]:
        return most[prefix.rpartition(".")[0]], len(prefix)

    return [max(counted(site.scope), key=rank, default="") for site in sites]


def counted(scope: str) -> list[str]:
    """The modules of a path that their parents count, outermost first."""
    parts = scope.split(".")
    return [".".join(parts[: at + 1]) for at, part in enumerate(parts) if at and is_number(part)]


def is_number(part: str) -> bool:
    return part.isascii() and part.isdigit()


def _by_attention(sites: Sequence[Site]) -> list[str]:
    total = sum(site.kind == "attention" for site in sites)
    if total < 2:
        return [""] * len(sites)
    found, layers = 0, []
    for site in sites:
        layers.append(f"part {found + 1}" if found < total else "")
        found += site.kind == "attention"
    return layers
