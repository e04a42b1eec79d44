"""How far apart two outputs are, on the places that belong to real tokens.

Shapes: B batch, S new tokens, T past and new, L length of a static cache, N places compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxgen.analysis.feeds import RunShape
from onnxgen.analysis.roles import OutputRole, Roles

Array = npt.NDArray[Any]
_BLOCK = 1 << 20  # numbers that are compared at once


class NotANumberError(Exception):
    """The original itself computes NaN for a real token: there is nothing to compare with."""


def is_close_call(difference: float, tolerance: float) -> bool:
    """Whether a difference is so near the tolerance that other values may be beyond it.

    Of float32 alone: float16's rounding comes as near.
    """
    return tolerance / 5 < difference <= tolerance and tolerance <= 1e-4


def output_difference(
    roles: Roles, output: OutputRole, shape: RunShape, original: Any, rewritten: Any
) -> float:
    """The largest |original - rewritten| over the original's standard deviation; 0 where equal.

    Rows are compared where they belong to real tokens: what a graph computes for padding (NaN,
    zeros, the mean of the values) depends on its spelling. The new places of a present
    output are measured apart from the copied ones, whose scale may be another.

    Args:
        original, rewritten: the output's values; any shape and dtype. Sequences and mappings of
            tensors, and what may be absent, are lists, dicts and None.

    Returns:
        inf where shapes or dtypes differ, where integers differ, and where one is finite (or
        +inf, or -inf) and the other is not.

    Raises:
        NotANumberError: a compared place of the original is NaN.
    """
    if not (isinstance(original, np.ndarray) and isinstance(rewritten, np.ndarray)):
        return _nested_difference(original, rewritten)
    if original.shape != rewritten.shape or original.dtype != rewritten.dtype:
        return float("inf")
    pairs = _compared(roles, output, shape, original, rewritten)
    return max((scaled_difference(a, b) for a, b in pairs), default=0.0)


def _nested_difference(original: Any, rewritten: Any) -> float:
    """The worst of the tensors in it; inf where it is made otherwise."""
    if isinstance(original, np.ndarray) and isinstance(rewritten, np.ndarray):
        alike = original.shape == rewritten.shape and original.dtype == rewritten.dtype
        return scaled_difference(original, rewritten) if alike else math.inf
    if type(original) is not type(rewritten):
        return math.inf
    if original is None:
        return 0.0
    if isinstance(original, dict):
        if list(original) != list(rewritten):
            return math.inf
        original, rewritten = list(original.values()), list(rewritten.values())
    if len(original) != len(rewritten):
        return math.inf
    return max(map(_nested_difference, original, rewritten), default=0.0)


def _compared(
    roles: Roles, output: OutputRole, shape: RunShape, original: Array, rewritten: Array
) -> list[tuple[Array, Array]]:
    """The places to compare, [N,...] each, in groups of one scale."""
    both = [(original, rewritten)]
    if len(output.axes) not in (0, original.ndim):
        return both
    pair = roles.pair_of(output.name)
    if output.role == "present" and pair is not None and "B" in output.axes:
        at = (output.axes.index("B"), pair.axis)
        length = original.shape[pair.axis]
        if original.shape[at[0]] != shape.batch:
            return both
        kept = shape.real_kept(length, counted=pair.counted)
        first = shape.past if pair.static else max(length - shape.new, 0)
        new = np.zeros(length, np.bool_)
        new[first : first + shape.new] = True
        places = [kept & new, kept & ~new]
    elif (found := _row_axes(output, shape, original)) is not None:
        at, places = found, [shape.real_new]
    else:
        return both
    a, b = (np.moveaxis(values, at, (0, 1)) for values in (original, rewritten))
    return [(a[place], b[place]) for place in places]


def _row_axes(output: OutputRole, shape: RunShape, values: Array) -> tuple[int, int] | None:
    """The axes of B and S, None where the output has no row for each new token."""
    if "S" in output.axes and "B" in output.axes:
        at = (output.axes.index("B"), output.axes.index("S"))
    elif output.role == "other" and output.shape is not None and output.shape:
        # Symbols that only this output has: the first free axis that is S long.
        free = [i for i, dim in enumerate(output.shape) if i and not isinstance(dim, int)]
        at = (0, next((i for i in free if values.shape[i] == shape.new), 0))
    else:
        return None
    sizes = (values.shape[at[0]], values.shape[at[1]])
    return at if at[0] != at[1] and sizes == (shape.batch, shape.new) else None


def scaled_difference(original: Array, rewritten: Array) -> float:
    """The largest |original - rewritten| over the original's standard deviation; 0 where equal.

    Integers are equal or inf apart, and so are places of which one is finite.

    Raises:
        NotANumberError: the original holds NaN.
    """
    if original.size == 0:
        return 0.0
    if not np.issubdtype(original.dtype, np.floating):
        return 0.0 if np.array_equal(original, rewritten) else float("inf")
    if np.isnan(original).any():
        raise NotANumberError
    finite = np.isfinite(original)
    if not np.array_equal(finite, np.isfinite(rewritten)):
        return float("inf")
    if not np.array_equal(original[~finite], rewritten[~finite]):
        return float("inf")
    gap, size, spread = gap_of(original, rewritten, finite)
    # Of an output that hardly varies, its size is the measure; of one that is zero, 1.
    return gap / (max(spread, 1e-3 * size) or 1.0)


def gap_of(original: Array, rewritten: Array, where: Array) -> tuple[float, float, float]:
    """The largest difference, the largest size of the original, and its standard deviation.

    In float64, as many numbers at a time as take no memory that counts; 0 of none.

    Args:
        where: bool, of the same shape: the places that count; finite ones.
    """
    count, total, gap, size, squares = 0, 0.0, 0.0, 0.0, 0.0
    for a, b in _blocks(original, rewritten, where):
        count, total = count + a.size, total + float(a.sum())
        gap = max(gap, float(np.abs(a - b).max(initial=0)))
        size = max(size, float(np.abs(a).max(initial=0)))
    if not count:
        return 0.0, 0.0, 0.0
    for a, _ in _blocks(original, rewritten, where):
        squares += float(np.square(a - total / count).sum())
    return gap, size, math.sqrt(squares / count)


def _blocks(a: Array, b: Array, where: Array) -> Iterator[tuple[Array, Array]]:
    a, b, where = a.reshape(-1), b.reshape(-1), where.reshape(-1)
    for start in range(0, a.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        chosen = where[part]
        yield a[part][chosen].astype(np.float64), b[part][chosen].astype(np.float64)
