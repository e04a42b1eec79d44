"""Sizes as polynomials: what the arithmetic says holds for every value of the symbols."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxgen.analysis.symbols import (
    Dim,
    Poly,
    atom,
    broadcast,
    divide,
    evaluate,
    floor_divide,
    maximum,
    minimum,
    modulo,
    never_negative,
    product,
    symbols_of,
)

B, S, P = atom("b"), atom("s"), atom("p")
NAMES = ("b", "s", "p")

bindings = st.fixed_dictionaries({name: st.integers(0, 17) for name in NAMES})
leaves = st.one_of(st.integers(-6, 9), st.sampled_from([B, S, P]))


def polynomials(leaf: st.SearchStrategy[Dim] = leaves) -> st.SearchStrategy[Dim]:
    joined: list[Callable[[Dim, Dim], Dim]] = [operator.add, operator.sub, operator.mul]
    return st.recursive(
        leaf,
        lambda inner: st.builds(lambda f, a, b: f(a, b), st.sampled_from(joined), inner, inner),
        max_leaves=5,
    )


def value(dim: Dim, binding: dict[str, int]) -> int:
    found = evaluate(dim, binding)
    assert found is not None
    return found


property_test = settings(max_examples=150, deadline=None, derandomize=True)


@property_test
@given(polynomials(), polynomials(), bindings)
def test_arithmetic_is_that_of_numbers(a: Dim, b: Dim, binding: dict[str, int]) -> None:
    x, y = value(a, binding), value(b, binding)
    assert value(a + b, binding) == x + y
    assert value(a - b, binding) == x - y
    assert value(a * b, binding) == x * y
    assert value(0 - a, binding) == -x
    assert value(3 + a, binding) == 3 + x
    assert value(3 - a, binding) == 3 - x
    assert value(3 * a, binding) == 3 * x


@property_test
@given(polynomials(), polynomials(), polynomials())
def test_equal_polynomials_are_equal_however_they_were_made(a: Dim, b: Dim, c: Dim) -> None:
    assert a + b == b + a
    assert a * b == b * a
    assert a * (b + c) == a * b + a * c
    assert (a + b) + c == a + (b + c)
    assert a - a == 0
    assert hash(a + b) == hash(b + a)
    assert str(a * b) == str(b * a)
    assert isinstance(a - a, int)


@property_test
@given(polynomials(), polynomials(), bindings)
def test_a_division_is_exact_when_it_says_so(a: Dim, b: Dim, binding: dict[str, int]) -> None:
    quotient = divide(a, b)
    if quotient is not None:
        assert value(quotient * b, binding) == value(a, binding)
        assert quotient * b == a
    if b != 0:
        again = divide(a * b, b)
        assert again is None or again == a


@property_test
@given(polynomials(), bindings)
def test_a_monomial_divides_its_products(a: Dim, binding: dict[str, int]) -> None:
    for divisor in (3, B, 6 * B * S):
        assert divide(a * divisor, divisor) == a


@property_test
@given(polynomials(), st.sampled_from([2, 3, 7]), bindings)
def test_floor_and_remainder(a: Dim, b: int, binding: dict[str, int]) -> None:
    x = value(a, binding)
    if x >= 0:
        assert value(floor_divide(a, b), binding) == x // b
        assert value(modulo(a, b), binding) == x % b


@property_test
@given(polynomials(), polynomials(), bindings)
def test_minimum_and_maximum(a: Dim, b: Dim, binding: dict[str, int]) -> None:
    x, y = value(a, binding), value(b, binding)
    assert value(minimum(a, b), binding) == min(x, y)
    assert value(maximum(a, b), binding) == max(x, y)
    assert minimum(a, b) == minimum(b, a)
    assert maximum(a, b) == maximum(b, a)


@property_test
@given(polynomials(), bindings)
def test_what_is_never_negative_is_not(a: Dim, binding: dict[str, int]) -> None:
    if never_negative(a):
        assert value(a, binding) >= 0
    if never_negative(maximum(a, P - S)):
        assert max(value(a, binding), binding["p"] - binding["s"]) >= 0


@property_test
@given(st.sampled_from([1, 5, B, S, P, B + S]), st.sampled_from([1, 5, B, S, P, B + S]), bindings)
def test_broadcasting_is_numpys(a: Dim, b: Dim, binding: dict[str, int]) -> None:
    x, y = value(a, binding), value(b, binding)
    if 1 in (x, y) or x == y:
        assert value(broadcast(a, b), binding) == (y if x == 1 else x)
    assert broadcast(a, b) == broadcast(b, a)


def test_what_is_at_least_one_is_broadcast_away() -> None:
    """`max(n, 1)`, as exporters broadcast sizes, serves n or is 1 where n is 0."""
    for n in (0, 1, 5):
        wanted = n if max(n, 1) == 1 else max(n, 1)
        assert value(broadcast(maximum(S, 1), S), {"s": n}) == wanted
    assert broadcast(maximum(S, 1), S) == S
    assert broadcast(maximum(S, 2), S) != S
    assert broadcast(maximum(S, 1), P) != P


def test_broadcasting_once_more_changes_nothing() -> None:
    both = broadcast(B, S)
    assert broadcast(both, B) == both
    assert broadcast(S, both) == both
    assert broadcast(broadcast(B, S), P) == broadcast(B, broadcast(P, S))
    assert broadcast(B, B) == B
    assert broadcast(1, B) == B
    assert broadcast(B, 7) == 7


def test_a_table_that_is_cut_serves_the_length_it_is_cut_to() -> None:
    assert broadcast(minimum(S, 2048), S) == S
    assert broadcast(S, minimum(2048, S)) == S
    assert broadcast(minimum(S, 1), S) != 1  # a cut to one row is broadcast


@pytest.mark.parametrize(
    ("dim", "divisor", "quotient"),
    [
        (6 * B, 3, 2 * B),
        (6 * B, 4, None),
        (B * S, S, B),
        (B * S, P, None),
        (B * S + B * P, B, S + P),
        (B * S + B * P, S + P, B),
        (6 * B * S + 6 * B * P, 2 * S + 2 * P, 3 * B),
        (B + S, B + S, 1),
        (B + S, S, None),
        (0, B, 0),
        (B, 0, None),
        (12, 5, None),
        (12, 4, 3),
    ],
)
def test_divisions(dim: Dim, divisor: Dim, quotient: Dim | None) -> None:
    assert divide(dim, divisor) == quotient


def test_numbers_stay_numbers() -> None:
    assert B - B == 0
    assert type(B - B + 3) is int
    assert type(floor_divide(7, 2)) is int
    assert product([2, 3]) == 6
    assert product([]) == 1
    assert isinstance(product([2, B]), Poly)


def test_an_unbound_symbol_gives_no_number() -> None:
    assert evaluate(B + S, {"b": 2}) is None
    assert evaluate(minimum(B, S), {"b": 2}) is None
    assert evaluate(B + 1, {"b": 2}) == 3


def test_symbols_inside_operations_are_named() -> None:
    assert symbols_of(minimum(B, S) * P + 3) == {"b", "s", "p"}
    assert symbols_of(7) == set()


def test_an_order_an_exporter_chose_does_not_matter() -> None:
    assert P + S == S + P
    assert str(P + S) == str(S + P) == "p + s"
    assert len({P + S, S + P, S + P + 0}) == 1
    assert maximum(P, S) == maximum(S, P)
    assert maximum(P + S, S) == P + S
    assert minimum(P + S, S) == S
