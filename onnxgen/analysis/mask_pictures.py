"""What masks show, as pictures: which key each token sees, read by running what makes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.evaluate import CutError
from onnxgen.analysis.feeds import RunShape
from onnxgen.analysis.masks import ATTENTIONS, MaskFamily
from onnxgen.analysis.sampling import Sampler
from onnxgen.analysis.scores import MASKED
from onnxgen.report.pictures import MaskPicture

CELLS = 40
"""Rows and columns at most."""
SMALL = RunShape(batch=1, new=12)
CONTINUED = RunShape(batch=1, new=6, past=6)
PADDED = (
    RunShape(batch=2, new=10, padding="left"),
    RunShape(batch=2, new=5, past=5, padding="left"),
)
MOST = 1024  # new tokens of one run
GENERAL = 4  # masks of no family that are shown


def mask_pictures(
    graph: ir.Graph, families: Mapping[str, MaskFamily], sampler: Sampler
) -> list[MaskPicture]:
    """A picture of each distinct mask of a graph's attentions, and one with padding where it hides it.

    Args:
        families: what each attention's mask means, by node name; see `mask_families`.
    """
    groups: dict[tuple[str, str, ir.Value | None], list[str]] = {}
    values: dict[tuple[str, str, ir.Value | None], ir.Value | None] = {}
    for node in graph:
        family = families.get(node.name or "")
        if family is None or (node.domain, node.op_type) not in ATTENTIONS:
            continue
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        # Masks of a family show the same; those of none are each their own.
        key = (str(family), family.reason, mask if family.kind == "general" else None)
        groups.setdefault(key, []).append(node.name or "")
        values.setdefault(key, mask)
    general = 0
    pictures: list[MaskPicture] = []
    for key, nodes in groups.items():
        family = families[nodes[0]]
        general += family.kind == "general"
        if general > GENERAL and family.kind == "general":
            continue
        shown = _shown(values[key], family, sampler)
        for run, queries, keys, seen in shown:
            pictures.append(_picture(family, nodes, run, queries, keys, seen))
    return pictures


def _picture(
    family: MaskFamily, nodes: Sequence[str], run: str, queries: Any, keys: Any, seen: Any
) -> MaskPicture:
    rows = tuple("".join("1" if each else "0" for each in row) for row in seen)
    numbers = (tuple(map(int, queries)), tuple(map(int, keys)))
    return MaskPicture(str(family), tuple(nodes), run, *numbers, rows, family.reason)


def _shown(
    mask: ir.Value | None, family: MaskFamily, sampler: Sampler
) -> Iterator[tuple[str, Any, Any, Any]]:
    """What was run, the positions of queries and keys, and bool [S, T]."""
    if mask is None:
        at = np.arange(SMALL.new)
        yield "by the operator itself", at, at, family.sees(at, at)
        return
    reach = family.size * 5 // 2
    if reach > CELLS and sampler.roles.pairs:
        yield from _far(mask, reach, sampler)
    else:
        new = min(max(reach, SMALL.new), MOST)
        # Not every export takes a prompt; one of one new token shows a row.
        wanted = (RunShape(1, new), CONTINUED, RunShape(1, 1, 11))
        yield from _one(mask, wanted, sampler)
    if family.padding:
        yield from _one(mask, PADDED, sampler)


def _one(
    mask: ir.Value, wanted: Sequence[RunShape], sampler: Sampler
) -> Iterator[tuple[str, Any, Any, Any]]:
    """The first of several runs that the model takes."""
    for shape, seen in _seen(mask, wanted, sampler):
        row = int(np.argmax(shape.pads))
        seen = seen[min(row, len(seen) - 1)]
        queries, keys = np.arange(seen.shape[0]), np.arange(seen.shape[1])
        if len(queries) == shape.new:
            queries = queries + shape.past
        rows, columns = _spread(len(queries)), _spread(len(keys))
        yield _in_words(shape), queries[rows], keys[columns], seen[np.ix_(rows, columns)]
        return


def _far(mask: ir.Value, reach: int, sampler: Sampler) -> Iterator[tuple[str, Any, Any, Any]]:
    """One new token over pasts of many lengths, a row each: a large mask in a small picture."""
    wanted = [RunShape(1, 1, past) for past in np.linspace(1, reach, CELLS).astype(int).tolist()]
    found = [(shape, seen) for shape, seen in _seen(mask, wanted, sampler) if shape in wanted]
    if len(found) < 2:
        yield from _one(mask, (RunShape(1, CELLS), CONTINUED, RunShape(1, 1, 11)), sampler)
        return
    columns = np.linspace(0, reach, CELLS).astype(int)
    queries = np.array([shape.past for shape, _ in found])
    grid = np.zeros((len(found), CELLS), bool)
    for row, (shape, seen) in enumerate(found):
        last = seen[0, -1]
        at = columns - max(0, shape.total - last.size)  # a cropped cache holds the last keys
        real = (at >= 0) & (at < last.size) & (columns < shape.total)
        grid[row, real] = last[at[real]]
    yield (
        f"one new token over pasts of up to {queries[-1]:,}, every so many",
        queries,
        columns,
        grid,
    )


def _seen(
    mask: ir.Value, wanted: Sequence[RunShape], sampler: Sampler
) -> list[tuple[RunShape, Any]]:
    """bool [B, S, T] of each run that the model takes; none where it cannot be run alone."""
    try:
        samples = sampler.samples(mask, wanted)
    except CutError:
        return []
    result = []
    for shape, found in samples:
        if not found.size:
            continue  # of a batch of nothing there is nothing to show
        seen = found if found.dtype == bool else found > MASKED
        while seen.ndim > 3:
            seen = seen[:, 0]
        if seen.ndim >= 2:
            result.append((shape, seen if seen.ndim == 3 else seen[None]))
    return result


def _spread(count: int) -> Any:
    """All of so many places, or as many as are shown."""
    return np.arange(count) if count <= CELLS else np.linspace(0, count - 1, CELLS).astype(int)


def _in_words(shape: RunShape) -> str:
    tokens = f"{shape.new} new token{'s' if shape.new > 1 else ''}"
    past = f" over {shape.past} past" if shape.past else ""
    padded = f", {max(shape.pads)} of {shape.total} are {shape.padding} padding"
    return f"{tokens}{past}{padded if any(shape.pads) else ''}"
