"""Rotations among the lanes of a head: which lanes turn in pairs, by which lanes of which tables.

    y[i] = x[a] * cos - x[b] * sin
    y[j] = x[b] * cos + x[a] * sin

Any a and b may be a pair, and any i and j hold the result: halves, neighbours, or neighbours in and
halves out. Lanes that do not turn pass, wherever they lie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.lane_forms import Form, Lane, Lanes
from onnxgen.analysis.rotary_tables import Tables


@dataclass(frozen=True)
class Rotation:
    """What the lanes showed, in the order in which RotaryEmbedding takes and gives them.

    Attributes:
        interleaved: pairs are neighbours in that order, not half the lanes apart.
        cos, sin: a lane of a table for each pair.
        sign: -1.0 where the pairs turn the other way, by -sin.
        taken: for each turning lane the lane of x.
        given: for each turning lane the lane of y.
        passing: lane of y -> lane of x, for those that pass.
    """

    interleaved: bool
    cos: tuple[Lane, ...]
    sin: tuple[Lane, ...]
    sign: float
    taken: tuple[int, ...]
    given: tuple[int, ...]
    passing: Mapping[int, int]

    @property
    def size(self) -> int:
        """How many lanes turn."""
        return len(self.taken)

    @property
    def leads(self) -> bool:
        """Whether the first lanes turn where they are, and the others stay where they are."""
        order = tuple(range(self.size))
        return self.taken == self.given == order and all(i == j for i, j in self.passing.items())


@dataclass(frozen=True)
class _Pair:
    """Lanes a and b of x become i and j of y; sign -1 turns the other way."""

    a: int
    b: int
    i: int
    j: int
    cos: Lane
    sin: Lane
    sign: float


_Terms = Mapping[int, tuple[Lane, float]]


def recognise(facts: Facts, written: Lanes, x: ir.Value) -> Rotation | None:
    """The rotation that the lanes of y describe; None where they are no rotation."""
    terms, passing = _sorted(written, x)
    if not terms or len(terms) % 2:
        return None
    pairs = _pairs(Tables(facts), terms)
    if pairs is None or len({pair.sign for pair in pairs}) != 1:
        return None
    used = [pair.a for pair in pairs] + [pair.b for pair in pairs]
    if len(set(used)) != len(used):
        return None
    if len(pairs) > 1 and len({(pair.cos, pair.sin) for pair in pairs}) * 2 <= len(pairs):
        return None  # several heads side by side: they are found before they are joined
    found = [_ordered(pairs, passing, interleaved) for interleaved in (False, True)]
    return min(found, key=_moves)


def resembles(written: Lanes, x: ir.Value) -> bool:
    """Whether the lanes mix two of x each, times tables, and every lane of x is mixed in twice."""
    terms, _ = _sorted(written, x)
    used = Counter(lane for found in terms.values() for lane in found)
    return len(terms) > 1 and len(used) == len(terms) and set(used.values()) == {2}


def _sorted(written: Lanes, x: ir.Value) -> tuple[dict[int, _Terms], dict[int, int]]:
    """The lanes that mix two of x, and those that are one of x; nothing if there are others."""
    terms: dict[int, _Terms] = {}
    passing: dict[int, int] = {}
    for lane, form in enumerate(written.flat):
        found = _terms(form, x)
        alone = _alone(form, x)
        if len(found) == 2:
            terms[lane] = found
        elif alone is not None:
            passing[lane] = alone
        else:
            return {}, {}
    return terms, passing


def _alone(form: Form, x: ir.Value) -> int | None:
    """The lane of x that a form is."""
    if len(form) != 1:
        return None
    ((term, factor),) = form.items()
    return term[0].at if factor == 1.0 and len(term) == 1 and term[0].value is x else None


def _terms(form: Form, x: ir.Value) -> dict[int, tuple[Lane, float]]:
    """For a sum of x[i] * table: lane of x -> (lane of the table, factor); {} for any other."""
    result: dict[int, tuple[Lane, float]] = {}
    for term, factor in form.items():
        of_x = [lane.at for lane in term if lane.value is x]
        rest = [lane for lane in term if lane.value is not x]
        if len(of_x) != 1 or len(rest) != 1 or of_x[0] in result:
            return {}
        result[of_x[0]] = (rest[0], factor)
    return result


def _pairs(tables: Tables, terms: Mapping[int, _Terms]) -> list[_Pair] | None:
    """The lanes of y two by two: those made of the same two lanes of x."""
    partners: dict[frozenset[int], list[int]] = {}
    for lane, found in terms.items():
        partners.setdefault(frozenset(found), []).append(lane)
    pairs: list[_Pair] = []
    for lanes in partners.values():
        if len(lanes) != 2:
            return None
        i, j = lanes
        first, second = terms[i], terms[j]
        a, b = sorted(first)
        pair = _pair(tables, first, second, (i, j), a, b) or _pair(
            tables, first, second, (i, j), b, a
        )
        if pair is None:
            return None
        pairs.append(pair)
    return pairs


def _pair(
    tables: Tables, first: _Terms, second: _Terms, lanes: tuple[int, int], a: int, b: int
) -> _Pair | None:
    (cos, cos_sign), (sin, sin_sign) = first[a], first[b]
    (other_cos, other_cos_sign), (other_sin, other_sin_sign) = second[b], second[a]
    if cos_sign != 1.0 or other_cos_sign != 1.0 or not tables.same(cos, other_cos):
        return None
    if abs(sin_sign) != 1.0 or abs(other_sin_sign) != 1.0:
        return None
    if not tables.same(sin, other_sin, opposite=sin_sign == other_sin_sign):
        return None
    return _Pair(a, b, *lanes, cos, sin, -sin_sign)


def _ordered(pairs: list[_Pair], passing: Mapping[int, int], interleaved: bool) -> Rotation:
    if interleaved:
        taken = [lane for pair in pairs for lane in (pair.a, pair.b)]
        given = [lane for pair in pairs for lane in (pair.i, pair.j)]
    else:
        taken = [pair.a for pair in pairs] + [pair.b for pair in pairs]
        given = [pair.i for pair in pairs] + [pair.j for pair in pairs]
    cos, sin = tuple(pair.cos for pair in pairs), tuple(pair.sin for pair in pairs)
    sign = pairs[0].sign
    return Rotation(interleaved, cos, sin, sign, tuple(taken), tuple(given), passing)


def _moves(rotation: Rotation) -> int:
    """How much has to be rearranged around the operator."""
    return sum(
        list(lanes) != list(range(lanes[0], lanes[0] + len(lanes)))
        for lanes in (rotation.taken, rotation.given)
    )
