"""Where a write into a cache begins, if its rows are neighbours.

From structure where it tells (`analysis.ramps`); positions that follow from sizes and from how
long the cache is alone can be run instead, to the cache's end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.cache_writes import Write
from onnxgen.analysis.evaluate import CutError
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.feeds import RunShape
from onnxgen.analysis.graph import attribute, given, producer, scalar
from onnxgen.analysis.ramps import Ramp, aligned
from onnxgen.analysis.reads import reads_of


@dataclass(frozen=True)
class Place:
    """Where the first new row of each sequence goes.

    Attributes:
        ramp: start and terms, of which at most one axis varies.
        axis: that axis of the ramp.
        batch: the buffer's axis that it runs over; both None where it is the same for all.
        circular: rows behind the last one start over.
    """

    ramp: Ramp
    axis: int | None
    batch: int | None
    circular: bool = False

    @property
    def at_zero(self) -> bool:
        return not self.ramp.start and not self.ramp.terms


def place_of(facts: Facts, write: Write, ramp: Ramp) -> Place | None:
    """Where the first row goes, if the others follow and the sequences alone differ."""
    along = write.along
    counted = replace(ramp, slopes=tuple(0 if a == along else s for a, s in enumerate(ramp.slopes)))
    row_sizes = facts.shapes.of(write.new)
    single = row_sizes is not None and row_sizes[write.order[write.axis]] == 1
    if along in ramp.varying or (ramp.slopes[along] != 1 and not single) or any(counted.slopes):
        return None
    if ramp.indexes and (ramp.start or len(ramp.terms) != 1 or ramp.terms[0].factor != 1):
        return None  # a negative index might hide behind what is added to it
    varying = ramp.varying
    if len(varying) > 1 or any(axis not in write.runs for axis in varying):
        return None
    axis = next(iter(varying), None)
    return Place(counted, axis, None if axis is None else write.runs[axis])


def unwrapped(facts: Facts, write: Write) -> Ramp | None:
    """x of positions that are x modulo the buffer's length, else None."""
    ramp, shape = write.ramp, facts.shapes.of(write.past)
    if len(ramp.terms) != 1 or any(ramp.slopes) or ramp.start or ramp.indexes or shape is None:
        return None
    (term,) = ramp.terms
    node = producer(term.source, "Mod")
    if term.factor != 1 or node is None or attribute(node, "fmod", 0):
        return None
    length = scalar(node.inputs[1])
    if length is None:
        content = facts.shapes.content(node.inputs[1])
        length = content.flat[0] if content is not None and content.size == 1 else None
    inner = aligned(facts, given(node), term.source)
    if length is None or inner is None or length != shape[write.axis]:
        return None
    went = {own: axis for own, axis in enumerate(term.axes) if axis is not None}
    return inner.moved(went, len(ramp.slopes))


def follow_when_run(facts: Facts, write: Write) -> bool:
    """Whether the positions count, each one more than the one before, wherever they are run.

    Asked only of positions that follow from sizes and from how long the cache is: those are all
    the numbers that there are, where an input of positions or a mask can hold any.
    """
    positions, sampler = write.positions, facts.sampler
    if positions is None or sampler is None or free_inputs(facts, positions):
        return False
    try:
        samples = sampler.samples(positions, _probes(sampler.roles.static_room or 16))
    except CutError:
        return False
    several = 0
    for _, found in samples:
        rows = np.moveaxis(found, write.along, 0)
        if rows.size and (np.diff(rows, axis=0) != 1).any():
            return False
        several += len(rows) > 1
    return several >= 3


def _probes(room: int) -> tuple[RunShape, ...]:
    """Runs that reach every place of a cache, at once and from several pasts."""
    pasts = sorted({0, 1, 2, 3, 7, room // 3, room // 2, 2 * room // 3, max(room - 2, 0)})
    return (
        *(RunShape(1, room - past, past) for past in pasts if past < room),
        *(RunShape(2, 3, past) for past in pasts if past + 3 <= room),
        RunShape(2, min(6, room), padding="left" if room > 1 else "none"),
    )


def free_inputs(facts: Facts, value: ir.Value | None) -> list[str]:
    """Inputs that a value is computed from, sizes and how long the cache is left out."""
    found = [] if value is None else list(reads_of(value).inputs)
    return [
        each.name or ""
        for each in found
        if facts.role(each) != "cache_length" or facts.shapes.of(each) not in ((), (1,))
    ]
