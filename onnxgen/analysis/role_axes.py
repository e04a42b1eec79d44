"""What the axes of an input are, once it is known what the input is for.

    axes_of("mask", (2, "t"), None)      ("B", "T")
    lengths_of(inputs, ())               {"B": 2}, {"t": "T"}

The letters are those of `analysis.role_values`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import onnx_ir as ir

from onnxgen.analysis.role_joins import Join
from onnxgen.analysis.role_values import Dim, InputRole
from onnxgen.analysis.shapes import Shapes


def axes_of(role: str, shape: tuple[Dim, ...], join: Join | None) -> tuple[str, ...]:
    """A letter for each dim of an input of this role; "" for each where it has not that many."""
    letters = _letters(role, shape, join)
    return letters if len(letters) == len(shape) else ("",) * len(shape)


def _letters(role: str, shape: tuple[Dim, ...], join: Join | None) -> tuple[str, ...]:
    rank = len(shape)
    if join is not None:
        letters = {1: ["B"], 2: ["B", "D"], 3: ["B", "K", "D"]}.get(rank - 1)
        if rank == 3:
            letters = ["B", "D"]
        if letters is None:  # keys and values, or layers, packed in front
            letters = [""] * (rank - 4) + ["B", "K", "D"]
        letters.insert(join.axis, "L" if join.static else "P")
        return tuple(letters)
    long = {"mask": "T", "encoder_mask": "E"}.get(role)
    if long:
        if rank == 4:
            return ("B", "", "S", long)
        return ("B", "S", long)[-rank:] if rank == 3 else ("B", long)[-rank:] if rank else ()
    if role in ("ids", "type_ids", "positions"):
        return ("",) * (rank - 2) + ("B", "S")[-rank:] if rank else ()
    if role == "cache_length" and rank == 1:
        return ("B",)
    if role == "cache_position":
        return ("",) * (rank - 1) + ("S",)
    if role in ("embeds", "encoder_states"):
        letters = ["B", "S" if role == "embeds" else "E", *[""] * (rank - 3), "H"]
        return tuple(letters[:rank])
    if role == "cross_past":
        return ("B", "K", "E", "D") if rank == 4 else ("B", "E", "H", *[""] * (rank - 3))[:rank]
    if role in ("pixels", "features") and rank:
        return ("B",) + ("",) * (rank - 1)
    return ("",) * rank


def sizes_of_caches(graph: ir.Graph, grown: Collection[str]) -> dict[str, tuple[Dim, ...]]:
    """The shapes of caches whose heads' size a file leaves free, as their attention needs it."""
    caches = [value for value in graph.inputs if value.name in grown]
    free = [v for v in caches if v.shape and not isinstance(v.shape[-1], int)]
    if not free:
        return {}
    shapes = Shapes(graph)
    return {
        str(value.name): tuple(
            needed if isinstance(needed, int) else size
            for size, needed in zip(
                declared_shape(value) or (),
                map(shapes.resolve, shapes.of(value) or ()),
                strict=True,
            )
        )
        for value in free
    }


def without_repeated(inputs: Mapping[str, InputRole]) -> dict[str, InputRole]:
    """The inputs, with axes of size 1 that others leave free as no axes: those are broadcast."""
    each_axis = [pair for v in inputs.values() for pair in zip(v.shape, v.axes, strict=True)]
    free = {letter for dim, letter in each_axis if not isinstance(dim, int)}
    free |= {"T"} if free & {"S", "P"} else set()  # as many keys as tokens, past and new
    spread = free & {"S", "T"}
    named: dict[str, InputRole] = {}
    for name, role in inputs.items():
        pairs = zip(role.shape, role.axes, strict=True)
        axes = ("" if dim == 1 and letter in spread else letter for dim, letter in pairs)
        named[name] = replace(role, axes=tuple(axes))
    return named


def lengths_of(
    inputs: Iterable[InputRole], capped: Collection[str]
) -> tuple[dict[str, int], dict[str, str]]:
    """Lengths that the inputs fix, and the letter of each symbol.

    Args:
        capped: cropped caches; the length of such a one is not how much came before.
    """
    fixed: dict[str, int] = {}
    free: set[str] = set()
    symbols: dict[str, str] = {}
    for each in inputs:
        for dim, letter in zip(each.shape, each.axes, strict=True):
            if not letter:
                continue
            if isinstance(dim, str):
                symbols.setdefault(dim, letter)
                free.add(letter)
            elif isinstance(dim, int) and letter in "BSPTEL":
                if letter == "P" and each.name in capped:
                    continue
                # Layers may differ: the longest counts.
                fixed[letter] = max(fixed.get(letter, 0), dim)
    # A mask [1,T] beside ids [B,S] is broadcast and fixes nothing.
    if fixed.get("B") == 1 and "B" in free:
        del fixed["B"]
    if "L" in fixed:
        fixed.pop("T", None)  # the mask spans the cache, not the tokens so far
    elif "T" in fixed and "S" in fixed:
        fixed.setdefault("P", fixed["T"] - fixed["S"])
    elif "T" in fixed and "P" in fixed:
        fixed.setdefault("S", fixed["T"] - fixed["P"])
    return fixed, symbols


def declared_shape(value: ir.Value) -> tuple[Dim, ...] | None:
    """The shape that a file declares: ints where fixed, numbers as text too, None where nothing is said."""
    if value.shape is None:
        return None
    dims: list[Dim] = []
    for dim in value.shape:
        if isinstance(dim, int):
            dims.append(dim if dim >= 0 else None)  # -1 says that any size may come
        elif dim.value is None:
            dims.append(None)
        else:
            dims.append(int(dim.value) if str(dim.value).isdigit() else str(dim.value))
    return tuple(dims)
