"""What a mask means, read by running the part of the graph that makes it.

A mask is a function of the attention mask, the positions and the lengths. It is cut out, run on a
grid of batches, lengths, pasts and paddings, and fitted to a family:

    full        every key is seen
    causal      key j is seen by the token at position i where j <= i
    window W    ... and j > i - W
    chunked C   ... and j // C == i // C
    band R      key j is seen where |i - j| <= R

    ALiBi       any of them, and every head h adds slope[h] * j to what it sees

each with or without key padding (keys of padded tokens are not seen). A family is named only if
it agrees on every probe, in every row of a real token, and if the probes show all that the mask
follows from: it reads nothing by what it holds but the attention mask and counts of tokens, and
the numbers that it compares lengths with lie within what is run. Anything else is "general": the
mask is right as it is written, and nothing is concluded from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.evaluate import CutError
from onnxgen.analysis.feeds import RunShape
from onnxgen.analysis.reads import reads_of
from onnxgen.analysis.sampling import Sampler
from onnxgen.analysis.scores import MASKED

# Long pasts show windows and chunks; the others hold out.
PROBES = (
    RunShape(batch=1, new=3, past=8190),
    RunShape(batch=2, new=9, past=0),
    RunShape(batch=2, new=4, past=5),
    RunShape(batch=1, new=1, past=11),
    RunShape(batch=1, new=2, past=4100),
    RunShape(batch=2, new=7, past=0, padding="left"),
    RunShape(batch=3, new=5, past=8, padding="left"),
    RunShape(batch=2, new=6, past=0, padding="right"),
    RunShape(batch=2, new=6, past=4, padding="holes"),
)

_COUNTS = frozenset({"positions", "cache_position", "cache_length"})


@dataclass(frozen=True)
class MaskFamily:
    """A mask's meaning.

    Attributes:
        kind: "full", "causal", "window", "chunked", "band" or "general".
        size: W of a window (the token itself counts), C of chunks, R of a band; else 0.
        padding: whether keys of padded tokens are hidden.
        reason: for "general": why no family fits.
        slopes: for ALiBi: what each head adds to a score for every key further on; else none.
        counted: inputs that the mask follows from by what they hold, the attention mask aside:
            it means this only where they count the tokens.
        faint: what hides a key is a number that a large score outweighs, such as -1e4.
    """

    kind: str
    size: int = 0
    padding: bool = False
    reason: str = ""
    slopes: tuple[float, ...] = ()
    counted: tuple[str, ...] = ()
    faint: bool = False

    def __str__(self) -> str:
        name = f"{self.kind} {self.size}" if self.size else self.kind
        name = f"{name}, key padding" if self.padding else name
        return f"{name}, alibi" if self.slopes else name

    def sees(self, queries: Any, keys: Any) -> Any:
        """bool [S, T]: which keys a token at each position sees, padding aside."""
        i, j = queries[:, None], keys[None, :]
        if self.kind == "full":
            return np.ones((i.size, j.size), bool)
        if self.kind == "band":
            return np.abs(i - j) <= self.size
        seen = j <= i
        if self.kind == "window":
            seen &= j > i - self.size
        if self.kind == "chunked":
            seen &= j // self.size == i // self.size
        return seen


# Operators whose fourth input is a mask on the scores.
ATTENTIONS = {("", "Attention"), ("ai.onnx", "Attention"), ("onnxgen", "SinkAttention")}


@dataclass(frozen=True)
class _Probe:
    shape: RunShape
    seen: Any  # bool [B, S, T]


def mask_families(graph: ir.Graph, sampler: Sampler) -> dict[str, MaskFamily]:
    """The family of the mask of each Attention node of a graph, by node name."""
    families: dict[ir.Value, MaskFamily] = {}
    result: dict[str, MaskFamily] = {}
    for node in graph:
        if (node.domain, node.op_type) not in ATTENTIONS:
            continue
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is None:
            causal = node.attributes.get("is_causal")
            kind = "causal" if causal is not None and causal.value else "full"
            result[node.name or ""] = MaskFamily(kind)
            continue
        if mask not in families:
            families[mask] = read_mask(mask, sampler)
        result[node.name or ""] = families[mask]
    return result


def read_mask(mask: ir.Value, sampler: Sampler) -> MaskFamily:
    """Run a mask's subgraph on the probes and fit it to a family."""
    counted: list[str] = []
    for value in reads_of(mask).inputs:
        name = value.name or ""
        given = sampler.roles.inputs.get(name)
        if given is not None and given.role in _COUNTS:
            counted.append(name)
        elif given is None or given.role != "mask" or given.axes != ("B", "T"):
            return MaskFamily(
                "general", reason=f"it follows from {name!r}, which may hold anything"
            )
    further = sampler.further(mask)
    if isinstance(further, str):
        return MaskFamily("general", reason=further)
    try:
        samples = [
            *sampler.samples(mask, PROBES),
            *sampler.samples(mask, further),
            *filter(_tells, sampler.samples(mask, sampler.far(mask))),
        ]
    except CutError as error:
        return MaskFamily("general", reason=f"it cannot be run alone: {error}")
    if all(shape.new == 1 for shape, _ in samples) and sampler.roles.fixed.get("S") != 1:
        return MaskFamily("general", reason="it was run for one new token only")
    family = _read(samples)
    return family if family.kind == "general" else replace(family, counted=tuple(counted))


def _tells(sample: tuple[RunShape, Any]) -> bool:
    """Whether a far run tells what is hidden: a slope may go as low as what hides."""
    found = sample[1]
    if found.dtype == bool:
        return True
    low = found[(found <= MASKED) & (found > np.finfo(found.dtype).min / 2)]
    return np.unique(low).size < 2


def _read(samples: Iterable[tuple[RunShape, Any]]) -> MaskFamily:
    """The family of what the probes gave."""
    probes: list[_Probe] = []
    slopes: tuple[float, ...] = ()
    faint = False
    for shape, found in samples:
        seen = found if found.dtype == bool else found > MASKED
        if found.dtype != bool:
            faint = faint or bool((found[~seen] > np.finfo(found.dtype).min / 2).any())
        # Holes say what is seen; Bloom's biases count tokens, and do not count those.
        tilts = found.dtype != bool and shape.padding != "holes"
        if tilts and (slopes or np.unique(found[seen]).size > 1):
            tilted = _slopes(found, seen)
            if tilted is None or (slopes and not _alike(slopes, tilted)):
                return MaskFamily("general", reason="it adds a bias that differs from key to key")
            slopes = slopes or tilted
        while seen.ndim > 3:
            if (seen != seen[:, :1]).any():
                return MaskFamily("general", reason="it differs from head to head")
            seen = seen[:, 0]
        rows = (1, shape.new)
        if not seen.size:
            return MaskFamily("general", reason="it holds nothing in a run")
        if seen.ndim < 2 or (not seen.all() and seen.shape[-2] not in rows):
            return MaskFamily("general", reason="its rows are not the new tokens")
        if seen.ndim == 3 and seen.shape[0] not in (1, shape.batch):
            return MaskFamily("general", reason="its first axis is not the batch")
        if seen.all():
            seen = seen[..., :1, :]
        probes.append(
            _Probe(shape, np.broadcast_to(seen, (shape.batch, shape.new, seen.shape[-1])))
        )
    if not probes:
        return MaskFamily("general", reason="no probe could be run")
    return replace(_fit(probes), slopes=slopes, faint=faint)


def _fit(probes: list[_Probe]) -> MaskFamily:
    """The first family that agrees with every probe."""
    if all(probe.seen.all() for probe in probes):
        return MaskFamily("full")
    longest = max(probes, key=lambda probe: (probe.shape.total, probe.shape.new))
    for family in _candidates(longest):
        for padding in (False, True):
            fitted = replace(family, padding=padding)
            if all(_agrees(fitted, probe) for probe in probes):
                return fitted
    return MaskFamily("general", reason="no family agrees with every probe")


def _slopes(bias: Any, seen: Any) -> tuple[float, ...] | None:
    """The slope along the keys that each head's bias has in every row; None where one has none.

    What a whole row has in common does not count: a Softmax does not notice it. Keys that are not
    seen do not count either: the positions of padded ones may stand still. NaN where a head has no
    row with two keys.
    """
    while bias.ndim < 4:
        bias, seen = bias[None], seen[None]
    precision = 8 * float(np.finfo(bias.dtype).eps)
    result: list[float] = []
    for head in range(bias.shape[1]):
        found: list[float] = []
        width = bias.shape[-1]
        for row, shown in zip(
            bias[:, head].reshape(-1, width), seen[:, head].reshape(-1, width), strict=True
        ):
            keys = np.flatnonzero(shown)
            if keys.size < 2:
                continue
            numbers = row[keys].astype(np.float64)
            slope = (numbers[-1] - numbers[0]) / (keys[-1] - keys[0])
            line = numbers[0] + slope * (keys - keys[0])
            if np.abs(numbers - line).max() > precision * np.abs(numbers).max():
                return None
            found.append(slope)
        if not _alike(found[1:], found[:1] * (len(found) - 1)):
            return None
        result.append(found[0] if found else np.nan)
    return tuple(result)


def _alike(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether slopes are equal up to rounding, where both are known."""
    x, y = np.array(a), np.array(b)
    known = ~(np.isnan(x) | np.isnan(y)) if x.shape == y.shape else np.array(False)
    return x.shape == y.shape and bool(np.allclose(x[known], y[known], rtol=1e-2))


def _positions(probe: _Probe) -> tuple[Any, Any]:
    """Positions of the queries and of the keys; a cropped cache shows the last keys only."""
    shape, width = probe.shape, probe.seen.shape[-1]
    first = max(0, shape.total - width)
    return np.arange(shape.past, shape.total), np.arange(first, first + width)


def _candidates(longest: _Probe) -> Iterable[MaskFamily]:
    """Families whose sizes the probe with the longest past shows."""
    yield MaskFamily("full")
    yield MaskFamily("causal")
    queries, keys = _positions(longest)
    counts = [int(row.sum()) for row in longest.seen[0]]
    if counts and 0 < min(counts) < len(keys):
        reach = int(longest.seen[0, 0].nonzero()[0].max() - queries[0] + keys[0])
        if reach > 0:
            yield MaskFamily("band", reach)
        yield MaskFamily("window", counts[-1])  # without a past the first rows see less
        # A chunk starts where a row's first seen key is: sizes that divide that place.
        starts = [int(keys[np.flatnonzero(row)[0]]) for row in longest.seen[0] if row.any()]
        for size in sorted({d for start in starts for d in _divisors(start)}, reverse=True):
            if all(int(q) // size * size == s for q, s in zip(queries, starts, strict=False)):
                yield MaskFamily("chunked", size)


def _divisors(number: int) -> list[int]:
    return [d for d in range(2, number + 1) if number % d == 0] if number else []


def _agrees(family: MaskFamily, probe: _Probe) -> bool:
    queries, keys = _positions(probe)
    wanted = np.broadcast_to(family.sees(queries, keys), probe.seen.shape)
    if family.padding:
        real = np.zeros((probe.shape.batch, int(keys.max(initial=-1)) + 1), bool)
        width = min(real.shape[1], probe.shape.total)
        real[:, :width] = probe.shape.real[:, :width]
        wanted = wanted & real[:, None, keys]
    rows = np.broadcast_to(probe.shape.real_new[:, :, None], probe.seen.shape)
    return bool((probe.seen == wanted)[rows].all())
