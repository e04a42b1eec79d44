"""Lanes: the meaning of a rotation, whatever slices and concatenations say it with."""

from __future__ import annotations

import itertools

import pytest

from onnxgen.analysis.lane_forms import Lane
from onnxgen.analysis.lanes import candidates, lanes
from onnxgen.analysis.rotary_tables import Tables
from onnxgen.analysis.rotations import Rotation, recognise
from tests.graphs import facts_of

# h is an activation [B, S, 6]; c and n are tables.
SIGNATURE = "(float[b,s,8] x, int64[b,s] ids) => (float[b,s,6] y) <float[8,6] w, float[40,6] tc, float[40,6] tn>"
START = "h = MatMul(x, w)  c = Gather(tc, ids)  n = Gather(tn, ids)"
HALF = "(float[b,s,8] x, int64[b,s] ids) => (float[b,s,6] y) <float[8,6] w, float[40,3] tc, float[40,3] tn>"

Form = dict[tuple[str, ...], float]


def forms(
    body: str, signature: str = SIGNATURE, of: str = "y", over: str = "h"
) -> list[Form] | None:
    """Each lane of a value as {names and numbers of its factors: its number}."""
    facts, values = facts_of(f"{signature} {{ {START}  {body} }}")
    found = lanes(facts, values[of], values[over])
    if found is None:
        return None
    return [
        {
            tuple(sorted(f"{value.name}[{i}]" for value, i, _ in term)): number
            for term, number in form.items()
        }
        for form in found.flat
    ]


def rotation(body: str, signature: str = SIGNATURE) -> Rotation | None:
    facts, values = facts_of(f"{signature} {{ {START}  {body} }}")
    written = lanes(facts, values["y"], values["h"])
    return None if written is None else recognise(facts, written, values["h"])


SAME = {
    "slices": "a = Slice(h, [0], [3], [-1])  b = Slice(h, [3], [6], [-1])  y = Concat<axis = -1>(b, a)",
    "split": "a, b = Split<axis = -1, num_outputs = 2>(h)  y = Concat<axis = 2>(b, a)",
    "sizes": "a, b = Split<axis = -1>(h, [3, 3])  y = Concat<axis = 2>(b, a)",
    "gather": "y = Gather<axis = -1>(h, [3, 4, 5, 0, 1, 2])",
    "reshape": "r = Reshape(h, [0, 0, 2, 3])  a = Gather<axis = 2>(r, 0)  b = Gather<axis = 2>(r, 1)"
    "  y = Concat<axis = -1>(b, a)",
    "transposed twice": "r = Reshape(h, [0, 0, 2, 3])  t = Transpose<perm = [0, 1, 3, 2]>(r)"
    "  a = Gather<axis = 3>(t, [1, 0])  u = Transpose<perm = [0, 1, 3, 2]>(a)"
    "  y = Reshape(u, [0, 0, 6])",
    "signs that cancel": "a = Slice(h, [0], [3], [-1])  b = Slice(h, [3], [6], [-1])  d = Neg(b)"
    "  e = Mul(d, -1.0)  y = Concat<axis = -1>(e, a)",
    "halved and doubled": "a = Slice(h, [0], [3], [-1])  b = Slice(h, [-3], [100], [-1])"
    "  d = Div(b, 2.0)  e = Add(d, d)  y = Concat<axis = -1>(e, a)",
}


@pytest.mark.parametrize("name", SAME)
def test_swapped_halves_are_the_same_lanes(name: str) -> None:
    assert forms(SAME[name]) == [{(f"h[{(i + 3) % 6}]",): 1.0} for i in range(6)]


def test_products_and_sums_are_polynomials() -> None:
    found = forms("a = Mul(h, c)  b = Mul(n, h)  d = Sub(a, b)  y = Mul(d, 3.0)")
    assert found == [{(f"c[{i}]", f"h[{i}]"): 3.0, (f"h[{i}]", f"n[{i}]"): -3.0} for i in range(6)]


def test_what_cancels_is_gone() -> None:
    assert forms("a = Sub(h, h)  y = Add(a, h)") == [{(f"h[{i}]",): 1.0} for i in range(6)]


@pytest.mark.parametrize(
    "body",
    [
        "y = Relu(h)",  # no operator on lanes alone
        "y = Transpose<perm = [1, 0, 2]>(h)",  # other axes are moved
        "r = Reshape(h, [0, -1, 3])  y = Concat<axis = -1>(r, r)",
        "y = Mul(h, h)  z = Mul(y, h)",
        "a = Slice(h, [1], [100], [1])  y = Add(a, c)",
        "y = Div(h, c)",
    ],
)
def test_what_is_no_lane_is_none(body: str) -> None:
    found = forms(body)
    assert found is None or all(len(term) != 1 for form in found for term in form)


def test_candidates_are_what_every_path_meets() -> None:
    facts, values = facts_of(
        f"{SIGNATURE} {{ {START}  a = Slice(h, [0], [3], [-1])  b = Slice(h, [3], [6], [-1])"
        "  d = Neg(b)  t = Concat<axis = -1>(d, a)  hc = Mul(h, c)  tn2 = Mul(t, n)"
        "  y = Add(hc, tn2) }"
    )
    found = [each.name for each in candidates(facts, values["y"])]
    assert found[0] == "h"
    assert "c" not in found


# --- rotations ----------------------------------------------------------------------------------

TURNS = {
    "slices": "a = Slice(h, [0], [3], [-1])  b = Slice(h, [3], [6], [-1])  d = Neg(b)"
    "  t = Concat<axis = -1>(d, a)",
    "split": "a, b = Split<axis = -1, num_outputs = 2>(h)  d = Mul(b, -1.0)"
    "  t = Concat<axis = -1>(d, a)",
    "stack": "a, b = Split<axis = -1, num_outputs = 2>(h)  d = Neg(b)  d4 = Unsqueeze(d, [2])"
    "  a4 = Unsqueeze(a, [2])  s4 = Concat<axis = 2>(d4, a4)  t = Reshape(s4, [0, 0, 6])",
}
SUMS = {
    "sum": "hc = Mul(h, cc)  tn2 = Mul(t, nn)  y = Add(hc, tn2)",
    "other way": "hc = Mul(cc, h)  tn2 = Mul(nn, t)  y = Add(tn2, hc)",
    "minus minus": "hc = Mul(h, cc)  g = Neg(t)  tn2 = Mul(g, nn)  y = Sub(hc, tn2)",
}
DOUBLED = "cc = Concat<axis = -1>(c, c)  nn = Concat<axis = -1>(n, n)"


@pytest.mark.parametrize(("turn", "total"), list(itertools.product(TURNS, SUMS)))
def test_halves_are_recognised(turn: str, total: str) -> None:
    found = rotation(f"{DOUBLED}  {TURNS[turn]}  {SUMS[total]}", HALF)
    assert found is not None
    assert (found.size, found.interleaved, found.sign) == (6, False, 1.0)
    assert [index for _, index, _ in found.cos] == [0, 1, 2]
    assert [index for _, index, _ in found.sin] == [0, 1, 2]
    assert {value.name for value, _, _ in found.cos} == {"cc"}
    assert {value.name for value, _, _ in found.sin} == {"nn"}


def test_pairs_are_recognised() -> None:
    found = rotation(
        "ev = Slice(h, [0], [6], [-1], [2])  od = Slice(h, [1], [6], [-1], [2])"
        "  ec = Mul(ev, c)  on = Mul(od, n)  a = Sub(ec, on)"
        "  oc = Mul(od, c)  en = Mul(ev, n)  b = Add(oc, en)"
        "  a4 = Unsqueeze(a, [-1])  b4 = Unsqueeze(b, [-1])  s4 = Concat<axis = -1>(a4, b4)"
        "  y = Reshape(s4, [0, 0, 6])",
        HALF,
    )
    assert found is not None
    assert (found.size, found.interleaved, found.sign) == (6, True, 1.0)


def test_a_part_is_recognised() -> None:
    signature = HALF.replace("tc", "tc").replace("[40,3]", "[40,2]")
    found = rotation(
        "u = Slice(h, [0], [4], [-1])  v = Slice(h, [4], [6], [-1])"
        "  a = Slice(u, [0], [2], [-1])  b = Slice(u, [2], [4], [-1])"
        "  ac = Mul(a, c)  bn = Mul(b, n)  e = Sub(ac, bn)"
        "  bc = Mul(b, c)  an = Mul(a, n)  f = Add(bc, an)  y = Concat<axis = -1>(e, f, v)",
        signature,
    )
    assert found is not None
    assert (found.size, found.interleaved) == (4, False)


def test_the_other_direction_has_its_sign() -> None:
    found = rotation(
        f"{DOUBLED}  {TURNS['slices']}  hc = Mul(h, cc)  tn2 = Mul(t, nn)  y = Sub(hc, tn2)", HALF
    )
    assert found is not None
    assert found.sign == -1.0


@pytest.mark.parametrize(
    "body",
    [
        # tables whose halves differ: c[i] is not c[i + 3]
        f"cc = Identity(c6)  nn = Identity(n6)  {TURNS['slices']}  {SUMS['sum']}",
        # cos and sin exchanged for the second half
        f"cn = Concat<axis = -1>(c, n)  nc = Concat<axis = -1>(n, c)  {TURNS['slices']}"
        "  hc = Mul(h, cn)  tn2 = Mul(t, nc)  y = Add(hc, tn2)",
        # turned without a sign
        f"{DOUBLED}  t = Gather<axis = -1>(h, [3, 4, 5, 0, 1, 2])  {SUMS['sum']}",
        # turned by one lane instead of half
        f"{DOUBLED}  t = Gather<axis = -1>(h, [5, 0, 1, 2, 3, 4])  {SUMS['sum']}",
        # a factor on one of the two
        f"{DOUBLED}  {TURNS['slices']}  t2 = Mul(t, 2.0)  hc = Mul(h, cc)  tn2 = Mul(t2, nn)"
        "  y = Add(hc, tn2)",
        # a third term
        f"{DOUBLED}  {TURNS['slices']}  hc = Mul(h, cc)  tn2 = Mul(t, nn)  z = Add(hc, tn2)"
        "  y = Add(z, h)",
        # only the diagonal
        f"{DOUBLED}  {TURNS['slices']}  y = Mul(h, cc)",
        # nothing at all
        "y = Mul(h, 1.0)",
        # the lanes that should pass are scaled
        "u = Slice(h, [0], [2], [-1])  v = Slice(h, [2], [6], [-1])  y0 = Mul(v, 2.0)"
        "  y = Concat<axis = -1>(u, y0)",
    ],
)
def test_what_is_no_rotation(body: str) -> None:
    signature = HALF.replace("<float[8,6] w", "<float[40,6] t6, float[40,6] u6, float[8,6] w")
    extra = "c6 = Gather(t6, ids)  n6 = Gather(u6, ids)  "
    assert rotation(extra + body, signature) is None


# --- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "a", "b", "same"),
    [
        ("t = Concat<axis = -1>(c, c)", 1, 4, True),
        ("t = Concat<axis = -1>(c, c)", 1, 3, False),
        ("t = Concat<axis = -1>(c, n)", 1, 4, False),
        ("d = Concat<axis = -1>(c, c)  t = Cos(d)", 0, 3, True),
        ("d = Concat<axis = -1>(c, c)  e = Mul(d, 1.3)  t = Unsqueeze(e, [1])", 2, 5, True),
        (
            "d = Unsqueeze(c, [-1])  e = Expand(d, [1, 1, 1, 2])  t = Reshape(e, [0, 0, 6])",
            2,
            3,
            True,
        ),
        (
            "d = Unsqueeze(c, [-1])  e = Expand(d, [1, 1, 1, 2])  t = Reshape(e, [0, 0, 6])",
            1,
            2,
            False,
        ),
        ("d = Concat<axis = -1>(c, c, n)  t = Slice(d, [1], [9], [-1])", 0, 3, True),
        ("d = Concat<axis = -1>(c, c)  t = Slice(d, [1], [6], [-1], [3])", 0, 1, True),
        ("d = Concat<axis = -1>(c, c)  e, t = Split<axis = -1>(d, [2, 4])", 0, 1, False),
        ("d = Concat<axis = -1>(c, c)  e, t = Split<axis = -1>(d, [1, 5])", 0, 3, True),
    ],
)
def test_lanes_of_tables_with_one_origin_are_equal(body: str, a: int, b: int, same: bool) -> None:
    facts, values = facts_of(f"{HALF} {{ {START}  {body}  y = Add(h, h) }}")
    tables = Tables(facts)
    assert tables.same(Lane(values["t"], a), Lane(values["t"], b)) is same
    assert (tables.origin(Lane(values["t"], a)) == tables.origin(Lane(values["t"], b))) is same
