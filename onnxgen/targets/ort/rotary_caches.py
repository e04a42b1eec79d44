"""Rotary tables as a function of the position: the caches that GroupQueryAttention looks up.

A model computes its tables anew in every run, by whatever scaling it was trained with. They are
run for positions 0 to N-1; where every other run gives exactly the rows of its positions, the
rows are the tables. A switch on the length shows as a difference, and the rotary stays outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.evaluate import CutError
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.feeds import RunShape, make_feeds
from onnxgen.analysis.graph import constant, producer
from onnxgen.analysis.reads import reads_of
from onnxgen.analysis.sampling import Sampler

Array = np.ndarray[Any, Any]

# Held out: other batches, a padded one, long and short pasts.
HELD_OUT = (
    RunShape(batch=2, new=5, past=7, padding="left"),
    RunShape(batch=1, new=2, past=300),
    RunShape(batch=1, new=2, past=4100),
    RunShape(batch=2, new=4),
    RunShape(batch=1, new=1, past=11),
)
CLOSE = 1e-6
FEWEST = 12
"""Of fewer positions too few runs are held out to tell."""


@dataclass(frozen=True)
class RotaryCaches:
    """Tables by position.

    Attributes:
        cos, sin: [N, R/2].
        positions: the graph's value that indexes them, [B,S], [1,S] or [S]; None for the place of
            a token in its sequence.
    """

    cos: Array
    sin: Array
    positions: ir.Value | None


def rotary_caches(facts: Facts, node: ir.Node, length: int) -> RotaryCaches | str:
    """The caches of a RotaryEmbedding node for up to `length` positions; the reason where none."""
    cos, sin = node.inputs[1], node.inputs[2]
    if cos is None or sin is None:
        return "it has no tables"
    if length < FEWEST:
        return f"{length} positions are too few to read its tables, at least {FEWEST} are needed"
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        tables = [constant(value, limit=1 << 28) for value in (cos, sin)]
        if tables[0] is None or tables[1] is None:
            return "its tables are computed and looked up"
        return RotaryCaches(tables[0][:length], tables[1][:length], node.inputs[3])
    if facts.sampler is None:
        return "nothing may be run"
    try:
        return _read(facts, facts.sampler, _unexpanded(cos), _unexpanded(sin), length)
    except CutError as error:
        return f"its tables cannot be run alone: {error}"


def _unexpanded(table: ir.Value) -> ir.Value:
    """A table before it was repeated for the batch."""
    node = producer(table, "Expand")
    return table if node is None or node.inputs[0] is None else node.inputs[0]


def _read(
    facts: Facts, sampler: Sampler, cos: ir.Value, sin: ir.Value, length: int
) -> RotaryCaches | str:
    inputs = {value.name: value for value in facts.graph.inputs}
    named = [each for each in sampler.roles.named("positions") if "S" in each.axes]
    # Nothing but lengths: a count may begin elsewhere, and an offset may be any.
    unread = not reads_of(cos).inputs and not reads_of(sin).inputs
    for role in (*named, *((None,) if unread else ())):
        if role is not None and len(role.axes) > 2:
            continue  # several kinds of position
        if role is not None and role.bound:
            length = min(length, role.bound)
        name = None if role is None else role.name
        cosines, sines = (_rows(sampler, table, name, length) for table in (cos, sin))
        if cosines is None or sines is None:
            continue
        if _holds(sampler, cos, cosines, name) and _holds(sampler, sin, sines, name):
            return RotaryCaches(cosines, sines, None if name is None else inputs[name])
    return "its tables do not follow from the position alone"


def _rows(sampler: Sampler, table: ir.Value, positions: str | None, length: int) -> Array | None:
    """The table for positions 0 to length-1: [length, R/2], or fewer rows where it holds fewer."""
    if positions is None:
        wanted = RunShape(batch=1, new=length)
        found = [a for shape, a in sampler.samples(table, (wanted,)) if shape == wanted]
    else:
        found = sampler.along(table, positions, length)
    if not found or found[0].ndim < 2:
        return None
    rows = found[0].reshape(-1, found[0].shape[-1])
    return rows if 2 <= len(rows) <= length else None


def _holds(sampler: Sampler, table: ir.Value, rows: Array, positions: str | None) -> bool:
    """Whether every run that is held out shows the rows of its positions."""
    compared = 0
    further = sampler.further(table)
    if isinstance(further, str):
        return False
    for shape, found in sampler.samples(table, (*HELD_OUT, *further)):
        at = shape.past + np.arange(shape.new)[None]
        if positions is not None:
            feeds = make_feeds(sampler.roles, shape, np.random.default_rng(0), names=[positions])
            at = np.atleast_2d(feeds[positions])
        if at.max() >= len(rows):
            continue
        wanted = rows[at]
        if found.ndim < 2 or found.shape[-2] != wanted.shape[-2]:
            return False
        found = found.reshape(-1, *found.shape[-2:])
        if found.shape[0] not in (1, wanted.shape[0], shape.batch):
            return False
        if not np.allclose(found, wanted, rtol=0, atol=CLOSE):
            return False
        compared += 1
    return compared > 1
