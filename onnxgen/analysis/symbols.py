"""Sizes as integer polynomials: `ids[0]`, `past[2] + ids[1]`, `6*head`.

A size (`Dim`) is a plain int where it is known and a `Poly` otherwise, so ordinary arithmetic
works on both. Two sizes are equal when they are the same polynomial: `past + new` and
`new + past` are, whatever order an exporter wrote them in. What a polynomial cannot say
(a maximum, a division with a remainder) becomes an atom of its own, equal to itself.

Symbols are named after the graph input and axis they are read from. The names that a file gives
to sizes are not used: exporters and people give one name to sizes that differ at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias


class Atom:
    """An unknown integer >= 0 (a size), or >= any bound (contents of an index tensor).

    Attributes:
        name: a symbol's name, or the operation that made it ("max", "div", "mod", "bcast").
        arguments: the sizes an operation was applied to; empty for a symbol.
        key: what atoms are ordered by, and equal by.
    """

    __slots__ = ("_hash", "arguments", "key", "name")

    def __init__(self, name: str, arguments: tuple[Dim, ...] = ()) -> None:
        self.name = name
        self.arguments = arguments
        self.key = (name, ", ".join(map(str, arguments)))
        self._hash = hash(self.key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Atom) and self.key == other.key)

    def __str__(self) -> str:
        return f"{self.name}({self.key[1]})" if self.arguments else self.name


Monomial: TypeAlias = tuple[Atom, ...]


class Poly:
    """An integer polynomial over atoms that is not a constant; immutable."""

    __slots__ = ("_hash", "terms")

    def __init__(self, terms: Mapping[Monomial, int]) -> None:
        self.terms: tuple[tuple[Monomial, int], ...] = tuple(
            sorted(terms.items(), key=_order) if len(terms) > 1 else terms.items()
        )
        self._hash = hash(self.terms)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Poly) and self._hash == other._hash and self.terms == other.terms

    def __add__(self, other: Dim) -> Dim:
        terms = dict(self.terms)
        for monomial, factor in terms_of(other):
            terms[monomial] = terms.get(monomial, 0) + factor
        return polynomial(terms)

    def __mul__(self, other: Dim) -> Dim:
        if not isinstance(other, Poly):
            return Poly({m: factor * other for m, factor in self.terms}) if other else 0
        terms: dict[Monomial, int] = {}
        for left, a in self.terms:
            for right, b in terms_of(other):
                monomial = tuple(sorted(left + right, key=lambda atom: atom.key))
                terms[monomial] = terms.get(monomial, 0) + a * b
        return polynomial(terms)

    def __neg__(self) -> Dim:
        return self * -1

    def __sub__(self, other: Dim) -> Dim:
        return self + other * -1

    def __rsub__(self, other: Dim) -> Dim:
        return -self + other

    __radd__ = __add__
    __rmul__ = __mul__

    def __repr__(self) -> str:
        parts = []
        for monomial, factor in self.terms:
            name = "*".join(map(str, monomial))
            parts.append(str(factor) if not name else name if factor == 1 else f"{factor}*{name}")
        return " + ".join(parts)


def _order(term: tuple[Monomial, int]) -> list[tuple[str, str]]:
    return [atom.key for atom in term[0]]


Dim: TypeAlias = int | Poly


def atom(name: str, *arguments: Dim) -> Dim:
    """A new unknown: equal to every other made with the same name and arguments."""
    return Poly({(Atom(name, arguments),): 1})


def polynomial(terms: Mapping[Monomial, int]) -> Dim:
    """The size with these terms, a plain int when nothing unknown is left."""
    kept = {monomial: factor for monomial, factor in terms.items() if factor}
    if not kept:
        return 0
    if len(kept) == 1 and () in kept:
        return kept[()]
    return Poly(kept)


def terms_of(dim: Dim) -> tuple[tuple[Monomial, int], ...]:
    return dim.terms if isinstance(dim, Poly) else (((), int(dim)),) if dim else ()


def product(dims: Any) -> Dim:
    result: Dim = 1
    for dim in dims:
        result = result * dim
    return result


def divide(dim: Dim, divisor: Dim) -> Dim | None:
    """`dim / divisor` where it is exact for every value of the symbols, else None."""
    if divisor == 0:
        return None
    if dim == divisor:
        return 1
    parts = terms_of(divisor)
    if len(parts) != 1:  # (a + b) divides (a + b) * c: try c from the first term
        lead, lead_factor = parts[0]
        for monomial, factor in terms_of(dim):
            rest = without(monomial, lead)
            if rest is not None and factor % lead_factor == 0:
                quotient = polynomial({rest: factor // lead_factor})
                if quotient * divisor == dim:
                    return quotient
        return None
    (monomial, factor) = parts[0]
    result: dict[Monomial, int] = {}
    for term, coefficient in terms_of(dim):
        rest = without(term, monomial)
        if rest is None or coefficient % factor:
            return None
        result[rest] = result.get(rest, 0) + coefficient // factor
    return polynomial(result)


def floor_divide(dim: Dim, divisor: Dim) -> Dim:
    exact = divide(dim, divisor)
    if exact is not None:
        return exact
    if isinstance(dim, int) and isinstance(divisor, int) and divisor:
        return dim // divisor
    return atom("div", dim, divisor)


def modulo(dim: Dim, divisor: Dim) -> Dim:
    if isinstance(dim, int) and isinstance(divisor, int) and divisor:
        return dim % divisor
    return 0 if divide(dim, divisor) is not None else atom("mod", dim, divisor)


def never_negative(dim: Dim) -> bool:
    """Whether a size is >= 0 whatever its symbols are (each symbol is >= 0)."""
    return all(
        factor >= 0 and all(map(_atom_never_negative, monomial))
        for monomial, factor in terms_of(dim)
    )


def _atom_never_negative(part: Atom) -> bool:
    if part.name == "max":
        return any(map(never_negative, part.arguments))
    return all(map(never_negative, part.arguments))


def minimum(a: Dim, b: Dim) -> Dim:
    if never_negative(b - a):
        return a
    if never_negative(a - b):
        return b
    return atom("min", *sorted((a, b), key=str))


def maximum(a: Dim, b: Dim) -> Dim:
    if never_negative(b - a):
        return b
    if never_negative(a - b):
        return a
    return atom("max", *sorted((a, b), key=str))


def broadcast(a: Dim, b: Dim) -> Dim:
    """The size of an axis of two broadcast operands."""
    if a == b or b == 1:
        return a
    if a == 1 or isinstance(b, int):
        return b
    if isinstance(a, int):
        return a
    # Whatever was broadcast once more does not change: a set of operands. A table cut to a length
    # (`table[:, :S]` is min(S, rows) long) serves that length or fails.
    operands = {*_broadcast_operands(a), *_broadcast_operands(b)}
    operands -= {each for each in operands if (_cut_to(each) | _at_least_one(each)) & operands}
    return atom("bcast", *sorted(operands, key=str)) if len(operands) > 1 else operands.pop()


def _cut_to(dim: Dim) -> set[Dim]:
    """The free sizes of which `dim` is the minimum with a number above 1."""
    terms = terms_of(dim)
    if len(terms) == 1 and terms[0][1] == 1 and len(terms[0][0]) == 1:
        only = terms[0][0][0]
        numbers = [each for each in only.arguments if isinstance(each, int)]
        if only.name == "min" and numbers and min(numbers) > 1:
            return {each for each in only.arguments if not isinstance(each, int)}
    return set()


def _at_least_one(dim: Dim) -> set[Dim]:
    """The free sizes n of which `dim` is max(n, 1): broadcast with n both are n, if 0 too."""
    terms = terms_of(dim)
    if len(terms) == 1 and terms[0][1] == 1 and len(terms[0][0]) == 1:
        only = terms[0][0][0]
        if only.name == "max" and len(only.arguments) == 2 and 1 in only.arguments:
            return {each for each in only.arguments if each != 1}
    return set()


def _broadcast_operands(dim: Dim) -> tuple[Dim, ...]:
    terms = terms_of(dim)
    if len(terms) == 1 and terms[0][1] == 1 and len(terms[0][0]) == 1:
        only = terms[0][0][0]
        if only.name == "bcast":
            return only.arguments
    return (dim,)


_EVALUATE: dict[str, Callable[..., int]] = {
    "div": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "min": min,
    "max": max,
    "bcast": lambda *sizes: next((size for size in sizes if size != 1), 1),
}


def evaluate(dim: Dim, binding: Mapping[str, int]) -> int | None:
    """The size under concrete symbols; None where one of them is not bound."""
    total = 0
    for monomial, factor in terms_of(dim):
        for part in monomial:
            number: int | None
            if part.arguments and part.name in _EVALUATE:
                values = [evaluate(argument, binding) for argument in part.arguments]
                if None in values:
                    return None
                number = _EVALUATE[part.name](*values)
            else:
                number = binding.get(part.name)
            if number is None:
                return None
            factor *= number
        total += factor
    return total


def symbols_of(dim: Dim) -> set[str]:
    """Names of the symbols in a size, those inside operations included."""
    names: set[str] = set()
    for monomial, _ in terms_of(dim):
        for part in monomial:
            if part.arguments:
                names.update(*(symbols_of(argument) for argument in part.arguments))
            else:
                names.add(part.name)
    return names


def without(monomial: Monomial, part: Monomial) -> Monomial | None:
    """A product without some of its factors; None where it does not have them."""
    rest = list(monomial)
    for factor in part:
        if factor not in rest:
            return None
        rest.remove(factor)
    return tuple(rest)
