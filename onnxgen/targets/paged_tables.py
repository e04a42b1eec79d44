"""Rotary tables of a paged model as rows by position, which com.microsoft::PagedAttention looks up.

A paged model makes its tables from the positions of packed tokens. They are run for positions 0 to
T-1; where runs of other positions, in other orders and numbers, give the rows of these, the rows
are all there is to know. A switch on the longest position shows as a difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.evaluate import CutError, cut
from onnxgen.analysis.graph import constant
from onnxgen.runtime import Runtime, RuntimeFailure

Array = np.ndarray[Any, Any]
CLOSE = 1e-6


@dataclass(frozen=True)
class RotaryRows:
    """Tables by position.

    Attributes:
        cos, sin: float [T, R/2].
    """

    cos: Array
    sin: Array


def rotary_rows(
    graph: ir.Graph,
    node: ir.Node,
    positions: ir.Value,
    tokens: ir.Value,
    runtime: Runtime,
    length: int,
) -> RotaryRows | str:
    """The rows that a RotaryEmbedding of packed tokens takes by position; the reason where none.

    Args:
        positions: of the tokens, int64 [N].
        tokens: the graph's input of them, [N, ..], whose size tables may be expanded to.
        length: T, at most; fewer where the model's own tables hold fewer.
    """
    cos, sin, *rest = node.inputs[1:]
    places = rest[0] if rest else None
    values = [value for value in (cos, sin, places) if value is not None]
    wanted = [value for value in values if value.const_value is None]
    if not wanted:
        return "its tables do not depend on the position"
    try:
        part = cut([positions, tokens], wanted, graph.opset_imports)
        session = runtime.load(part.SerializeToString())
    except (CutError, RuntimeFailure) as error:
        return f"its tables cannot be run alone: {error}"
    names = {each.name for each in part.graph.input}

    def rows(at: Array) -> tuple[Array, ...]:
        """[n, R/2] each, for positions [n]."""
        dims = [d if isinstance(d, int) else 1 for d in (tokens.shape or [1])[1:]]
        kind = np.int64 if tokens.dtype is None else tokens.dtype.numpy()
        given = ((positions, at), (tokens, np.zeros((len(at), *dims), kind)))
        feeds = {name: array for value, array in given if (name := value.name or "") in names}
        made = runtime.run(session, feeds)
        found = [
            constant(each, limit=1 << 28) if each.const_value is not None else made[each.name or ""]
            for each in values
        ]
        arrays = [each for each in found if each is not None]
        index = arrays.pop().reshape(-1) if places is not None else None
        tables = [each.reshape(-1, each.shape[-1]) for each in arrays]
        return tuple(each if index is None else each[index] for each in tables)

    try:
        length = _longest(rows, length)
        everywhere = rows(np.arange(length))
        if any(len(each) != length for each in everywhere):
            return "its tables have no row for each token"
        for at in _held_out(length):
            for found, whole in zip(rows(at), everywhere, strict=True):
                if found.shape != whole[at].shape or not np.allclose(
                    found, whole[at], rtol=0, atol=CLOSE
                ):
                    return "its tables do not follow from the position alone"
    except (RuntimeFailure, IndexError) as error:
        return f"its tables cannot be run: {error}"
    finally:
        runtime.unload(session)
    return RotaryRows(*everywhere)


def _longest(rows: Callable[[Array], object], length: int) -> int:
    """The most positions, up to `length`, that the tables are known for: a lookup fails beyond."""
    works, fails = 1, length + 1
    wanted = length
    while fails - works > 1:
        try:
            rows(np.array([wanted - 1]))
            works = wanted
        except (RuntimeFailure, IndexError):
            fails = wanted
        wanted = (works + fails) // 2
    return works


def _held_out(length: int) -> list[Array]:
    """Positions to compare at: alone, short and long ones together, in no order, repeated."""
    last = length - 1
    drawn = np.random.default_rng(0).integers(0, length, 23)
    return [np.array(each) for each in ([0], [last], [min(3, last), last, 0, 0])] + [drawn]
