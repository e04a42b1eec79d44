"""Lanes as polynomials: x[0] * cos[0] - x[24] * sin[0], and their sums and products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnx_ir as ir


class Lane(NamedTuple):
    """One factor of a term.

    Attributes:
        value: a tensor.
        at: which of its lanes, counted through its last `axes` axes.
        axes: how many axes the lanes lie over.
    """

    value: ir.Value
    at: int
    axes: int = 1


# A polynomial: product of lanes -> its number.
Form: TypeAlias = Mapping[tuple[Lane, ...], float]
Lanes: TypeAlias = "np.ndarray[Any, Any]"  # of forms


class NotLanes(Exception):
    """A step moves or mixes more than the last axis."""


def combine(function: Callable[[Form, Form], Form], a: Lanes, b: Lanes) -> Lanes:
    try:
        a, b = np.broadcast_arrays(a, b)
    except ValueError as error:
        raise NotLanes from error
    result = np.empty(a.size, dtype=object)
    for index, (one, other) in enumerate(zip(a.flat, b.flat, strict=True)):
        result[index] = function(one, other)
    return result.reshape(a.shape)


def sum_of(a: Form, b: Form, sign: float) -> Form:
    result = dict(a)
    for term, factor in b.items():
        total = result.get(term, 0.0) + sign * factor
        if total:
            result[term] = total
        else:
            result.pop(term, None)
    return result


def product_of(a: Form, b: Form) -> Form:
    if len(a) * len(b) > 4:
        raise NotLanes
    result: dict[tuple[Lane, ...], float] = {}
    for left, one in a.items():
        for right, other in b.items():
            term = left + right
            result[term] = result.get(term, 0.0) + one * other
    return result
