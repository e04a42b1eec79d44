"""Positions and lengths among a graph's values, told by running it: not by how they are spelled.

    told = Lengths(sampler).meaning(value)      e.g. Meaning("position", axis=1, offset=2)

A value says where the new tokens stand if that is what it says in every run that is tried, plus a
constant, whatever it was made of: an input, a sum over a mask, a range behind a cache's length. The
runs lie on both sides of every length that it may switch at: positions that are limited are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.evaluate import CutError
from onnxgen.analysis.feeds import RunShape
from onnxgen.analysis.graph import constant, names
from onnxgen.analysis.reads import reads_of
from onnxgen.analysis.sampling import Sampler

# No two lengths are alike in all of them.
PROBES = (
    RunShape(batch=2, new=3, past=5),
    RunShape(batch=1, new=4, past=0),
    RunShape(batch=3, new=2, past=9),
    RunShape(batch=2, new=1, past=7),
)
_EXACT = frozenset(
    [getattr(ir.DataType, name) for name in ("INT64", "INT32", "FLOAT", "DOUBLE", "BOOL")]
)
# Where and Equal: places of padding get a number of their own.
_COUNTERS = names(
    """
    Add Concat ConstantOfShape CumSum Equal Expand GatherND Identity Mul Neg Not Range ReduceMax
    ReduceSum Reshape Shape Size Squeeze Sub Transpose Unsqueeze Where
    """
)
_UNVARIED = ("unknown", "constant_like", "use_cache_branch")
_FAR = (RunShape(batch=1, new=3, past=8190), RunShape(batch=1, new=2, past=4100))
# Prompts: a number may be one of new tokens.
_LONG = (RunShape(batch=1, new=300), RunShape(batch=1, new=3000))
_MOST_ELEMENTS = 4096


@dataclass(frozen=True)
class Meaning:
    """What a value says, in runs without padding.

    Attributes:
        kind: "position": of each new token, along `axis`; "total", "new" or "batch": T, S or B;
            "always": yes for every token, in every run that is tried.
        axis: where the tokens are; None for a length.
        offset: what is added to it.
        dims: the sizes of the other axes, None where it is the batch's.
    """

    kind: str
    axis: int | None = None
    offset: float = 0
    dims: tuple[int | None, ...] = ()


class Lengths:
    """Asks a sampler; remembers what it said."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._known: dict[ir.Value, Meaning | None] = {}

    def meaning(self, value: ir.Value) -> Meaning | None:
        """What a value says; None where it is no position and no length, or cannot be run."""
        if value not in self._known:
            told = _counts(value) and not self._reads_unvaried(value)
            samples = self._near_and_far(value) if told else ()
            found = _position(samples) or _length(samples) if samples else None
            self._known[value] = found or self._always(value)
        return self._known[value]

    def _near_and_far(self, value: ir.Value) -> Sequence[tuple[RunShape, Any]]:
        """The value in all runs that can tell what it is; none where one of them cannot be made."""
        samples = self.samples(value)
        if not samples or max(array.size for _, array in samples) > _MOST_ELEMENTS:
            return samples
        if value.is_graph_input():
            return samples
        further = self._sampler.further(value)
        if isinstance(further, str):
            return ()
        try:
            return [*samples, *self._sampler.samples(value, (*further, *_FAR, *_LONG))]
        except CutError:
            return ()

    def _reads_unvaried(self, value: ir.Value) -> bool:
        """Whether a value reads an input that every run is fed the same for."""
        roles = self._sampler.roles.inputs
        read = (roles.get(each.name or "") for each in reads_of(value).inputs)
        return any(each is not None and each.role in _UNVARIED for each in read)

    def _always(self, value: ir.Value) -> Meaning | None:
        """Whether a condition on each token holds for all: it sees something, where none is hidden.

        The runs that are tried lie on both sides of every length that it may switch at.
        """
        reads = reads_of(value) if value.dtype == ir.DataType.BOOL else None
        if reads is None or self.token_axis(value) is None:
            return None
        roles = self._sampler.roles.inputs
        known = {"mask", "positions", "cache_position", "cache_length"}
        if any(roles[v.name or ""].role not in known for v in reads.inputs if v.name in roles):
            return None
        further = self._sampler.further(value)
        far = self._sampler.far(value)
        shapes = () if isinstance(further, str) else (*PROBES, *_FAR, *further, *far, *_LONG)
        try:
            samples = self._sampler.samples(value, shapes)
        except CutError:
            return None
        if not samples or not all(array.all() for _, array in samples):
            return None
        return Meaning("always", None, 0, (1,) * samples[0][1].ndim)

    def token_axis(self, value: ir.Value) -> int | None:
        """The axis along which the new tokens are, None where there is none."""
        samples = self.samples(value)
        return next(iter(_axes(samples)), None) if samples else None

    def samples(self, value: ir.Value) -> Sequence[tuple[RunShape, Any]]:
        """The value in every run that the model takes; none where it cannot be run."""
        try:
            return self._sampler.samples(value, PROBES)
        except CutError:
            return ()


def _counts(value: ir.Value) -> bool:
    """Whether a value is made by what only counts: sums, ranges, and views of them.

    Limits, remainders, roundings and tables may say positions as far as anything is run, and
    something else beyond.
    """
    return all(map(_only_counts, reads_of(value).nodes))


def _only_counts(node: ir.Node) -> bool:
    match node.op_type:
        case "Cast":
            return ir.DataType(node.attributes["to"].as_int()) in _EXACT
        case "Max":  # nothing is below 0
            numbers = [constant(each) for each in node.inputs]
            return any(n is not None and n.size == 1 and n.item() <= 0 for n in numbers)
        case "Slice" | "Gather":
            table = constant(node.inputs[0])
            if table is None or node.inputs[0] is None or node.inputs[0].is_graph_input():
                return True
            line = table.reshape(-1).astype(np.int64)
            counted = np.array_equal(line, np.arange(line.size) + (line[0] if line.size else 0))
            return bool(counted and np.array_equal(line, table.reshape(-1)))
    return node.op_type in _COUNTERS


def _axes(samples: Sequence[tuple[RunShape, Any]]) -> list[int]:
    """The axes that are as long as there are new tokens in every run."""
    ranks = {array.ndim for _, array in samples}
    if len(ranks) != 1:
        return []
    return [
        axis
        for axis in range(ranks.pop())
        if all(array.shape[axis] == shape.new for shape, array in samples)
    ]


def _position(samples: Sequence[tuple[RunShape, Any]]) -> Meaning | None:
    if any(array.size > _MOST_ELEMENTS or array.dtype.kind not in "iuf" for _, array in samples):
        return None
    if len({shape.total for shape, _ in samples}) < 2:
        return None  # nothing varies: a constant would do as well
    for axis in _axes(samples):
        dims: list[int | None] = []
        for other in range(samples[0][1].ndim):
            sizes = [array.shape[other] for _, array in samples]
            batches = [shape.batch for shape, _ in samples]
            if other == axis or (sizes == batches and sizes != [1] * len(sizes)):
                dims.append(None)
            elif len(set(sizes)) == 1:
                dims.append(sizes[0])
            else:
                break
        else:
            offsets = set()
            for shape, array in samples:
                line = np.moveaxis(array, axis, -1).astype(np.float64)
                apart = line - (shape.past + np.arange(shape.new))
                offsets |= set(np.unique(apart).tolist())
            if len(offsets) == 1:
                return Meaning("position", axis, offsets.pop(), tuple(dims))
    return None


def _length(samples: Sequence[tuple[RunShape, Any]]) -> Meaning | None:
    if any(array.size != 1 or array.dtype.kind not in "iuf" for _, array in samples):
        return None
    dims = (1,) * samples[0][1].ndim
    told = {
        "new": [shape.new for shape, _ in samples],
        "batch": [shape.batch for shape, _ in samples],
        "total": [shape.total for shape, _ in samples],
    }
    for kind, lengths in told.items():
        if len(set(lengths)) == 1:
            continue
        apart = {
            float(array.item()) - each for (_, array), each in zip(samples, lengths, strict=True)
        }
        if len(apart) == 1:
            return Meaning(kind, None, apart.pop(), dims)
    return None
