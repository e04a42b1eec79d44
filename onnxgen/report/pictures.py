"""Pictures of a model as plain values: a layer before and after, and what masks show."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PictureNode:
    """A node of a picture, or a value that comes into what is shown.

    Attributes:
        name: the node's, or the value's.
        op: the op type, "domain::" before it where it is not the standard's; "" for a value.
        reads: which nodes of the picture it reads, by their place in it, each once.
        site: name of the fused node that it is or went into, as in `Site.node`; "" for none.
        gone: whether it is not in the written model though no site replaced it: cleaned away.
    """

    name: str
    op: str
    reads: tuple[int, ...] = ()
    site: str = ""
    gone: bool = False


@dataclass
class Drawing:
    """A part of a graph, ready to be laid out.

    Attributes:
        nodes: each after those that it reads.
        constants: how many nodes only hold constants; they are not among `nodes`.
        hidden: how many more would be too many to show.
    """

    nodes: list[PictureNode] = field(default_factory=list)
    constants: int = 0
    hidden: int = 0


@dataclass
class Picture:
    """One layer as it was exported and as it was written: one with most kinds of sites.

    Attributes:
        layer: its module path, or in words what is shown where the exporter left no paths.
        before, after: the same part of the model.
    """

    layer: str
    before: Drawing
    after: Drawing


@dataclass(frozen=True)
class MaskPicture:
    """What a mask shows, read by running what makes it.

    Attributes:
        family: what it means, as in the sites' details.
        nodes: names of the attentions that use it.
        run: in words what was run: batch, lengths, padding.
        queries, keys: positions of the rows (S) and of the columns (T).
        rows: one text a query: "1" for a key that is seen, "0" for one that is not.
        reason: for the family "general": why no other fits.
    """

    family: str
    nodes: tuple[str, ...]
    run: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    rows: tuple[str, ...]
    reason: str = ""
