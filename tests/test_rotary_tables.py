"""ROT001: tables from elsewhere, other types, and positions that are no rotation."""

from __future__ import annotations

import numpy as np
import pytest

from tests.graphs import assert_kept, assert_untouched, parse, raised
from tests.test_rotary_layouts import ANGLES, COS_SIN, HEADS, SIGNATURE, TURN, fused


def test_two_dimensions() -> None:
    """A vision tower: half the angles count rows, half columns."""
    signature = "(float[n,60] q, int64[n,2] position_ids) => (float[n,3,20] y)"
    fused(
        f"{signature} {{ x = Reshape(q, [0, 3, 20])  pf = Cast<to = 1>(position_ids)"
        "  pu = Unsqueeze(pf, [-1])  a3 = Mul(pu, [1.0, 0.5, 0.25, 0.125, 0.06])"
        "  a2 = Reshape(a3, [0, 10])  aa = Concat<axis = -1>(a2, a2)  c2 = Cos(aa)  s2 = Sin(aa)"
        "  c = Unsqueeze(c2, [1])  n = Unsqueeze(s2, [1])"
        "  lo, hi = Split<axis = -1, num_outputs = 2>(x)  g = Neg(hi)"
        "  t = Concat<axis = -1>(g, lo)  xc = Mul(x, c)  ts = Mul(t, n)  y = Add(xc, ts) }",
        num_heads=3,
    )


def test_three_sections() -> None:
    """mrope: positions [3, B, S], each section of the lanes taken from one of the three."""
    signature = "(float[b,s,120] q, int64[3,b,s] position_ids) => (float[b,s,6,20] y)"
    table = (
        "{k}0, {k}1, {k}2, {k}3, {k}4, {k}5 = Split<axis = -1>({k}, [2, 3, 5, 2, 3, 5])"
        "  {k}a = Gather<axis = 0>({k}0, 0)  {k}b = Gather<axis = 0>({k}1, 1)"
        "  {k}c = Gather<axis = 0>({k}2, 2)  {k}d = Gather<axis = 0>({k}3, 0)"
        "  {k}e = Gather<axis = 0>({k}4, 1)  {k}f = Gather<axis = 0>({k}5, 2)"
        "  {k}g = Concat<axis = -1>({k}a, {k}b, {k}c, {k}d, {k}e, {k}f)"
    )
    fused(
        f"{signature} {{ {HEADS}  {ANGLES}  aa = Concat<axis = -1>(a, a)  co = Cos(aa)"
        f"  si = Sin(aa)  {table.format(k='co')}  {table.format(k='si')}"
        "  c = Unsqueeze(cog, [2])  n = Unsqueeze(sig, [2])"
        "  lo, hi = Split<axis = -1, num_outputs = 2>(x)  g = Neg(hi)"
        "  t = Concat<axis = -1>(g, lo)  xc = Mul(x, c)  ts = Mul(t, n)  y = Add(xc, ts) }"
    )


def test_a_switch_on_length() -> None:
    """longrope: other frequencies beyond a length; the choice stays in the graph."""
    switch = (
        "pm = ReduceMax<keepdims = 0>(position_ids)  lg = Greater(pm, 8)  f = Where(lg,"
        " [0.5, 0.3, 0.2, 0.12, 0.08, 0.05, 0.03, 0.02, 0.012, 0.008],"
        " [1.0, 0.63, 0.4, 0.25, 0.158, 0.1, 0.063, 0.04, 0.025, 0.0158])"
        "  pf = Cast<to = 1>(position_ids)  pu = Unsqueeze(pf, [-1])  a = Mul(pu, f)"
        "  aa = Concat<axis = -1>(a, a)  c2 = Cos(aa)  s2 = Sin(aa)"
        "  c = Unsqueeze(c2, [2])  n = Unsqueeze(s2, [2])"
    )
    result = fused(
        f"{SIGNATURE} {{ {HEADS}  {switch}  lo, hi = Split<axis = -1, num_outputs = 2>(x)"
        "  g = Neg(hi)  t = Concat<axis = -1>(g, lo)  xc = Mul(x, c)  ts = Mul(t, n)"
        "  y = Add(xc, ts) }"
    )
    assert result.count("Where") == 1


FAR = "far = Greater(position_ids, 20000)  dp = Mul(position_ids, 2)  pw = Where(far, dp, position_ids)"
TURNED = (
    "c = Unsqueeze(c2, [2])  n = Unsqueeze(s2, [2])  lo, hi = Split<axis = -1, num_outputs = 2>(x)"
    "  g = Neg(hi)  t = Concat<axis = -1>(g, lo)  xc = Mul(x, c)  ts = Mul(t, n)  y = Add(xc, ts)"
)


def test_halves_that_differ_far_on_only() -> None:
    """Computed ones are run where they may switch; rows of a constant are compared in whole."""
    again = ANGLES.replace("pf", "pg").replace("pu", "pv").replace("  a =", "  aw =")
    computed = f"{ANGLES}  {FAR}  {again.replace('position_ids', 'pw').replace('Mul(pu', 'Mul(pv')}"
    computed_twice = (
        f"{SIGNATURE} {{ {HEADS}  {computed}  aa = Concat<axis = -1>(a, aw)  c2 = Cos(aa)"
        f"  s2 = Sin(aa)  {TURNED} }}"
    )
    rng = np.random.default_rng(0)
    half = rng.standard_normal((9000, 10)).astype(np.float32)
    whole = np.concatenate([half, half], axis=-1)
    whole[8000, 3] += 1
    looked_up = parse(
        f"{SIGNATURE} <float[9000,20] cosines, float[9000,20] sines> {{ {HEADS}"
        f"  c2 = Gather(cosines, position_ids)  s2 = Gather(sines, position_ids)  {TURNED} }}",
        weights={"cosines": whole, "sines": whole},
    )
    for before in (computed_twice, looked_up):
        assert [site.status for site in raised(before).sites] == ["kept"]


def test_signs_in_the_table() -> None:
    """sin holds its signs: the second half is turned by -sin of the first."""
    fused(
        f"{SIGNATURE} {{ {HEADS}  {ANGLES}  c1 = Cos(a)  s1 = Sin(a)  sn = Neg(s1)"
        "  c2 = Concat<axis = -1>(c1, c1)  s2 = Concat<axis = -1>(sn, s1)"
        "  c = Unsqueeze(c2, [2])  n = Unsqueeze(s2, [2])"
        "  lo, hi = Split<axis = -1, num_outputs = 2>(x)  t = Concat<axis = -1>(hi, lo)"
        "  xc = Mul(x, c)  ts = Mul(t, n)  y = Add(xc, ts) }"
    )


def test_float_inside_half() -> None:
    """Each half is widened on its own, turned in float, and the result narrowed."""
    signature = SIGNATURE.replace("float[", "float16[")
    result = fused(
        f"{signature} {{ {HEADS}  {COS_SIN}  r1, i1 = Split<axis = -1, num_outputs = 2>(x)"
        f"  re = Cast<to = 1>(r1)  im = Cast<to = 1>(i1)  {TURN}  w = Concat<axis = -1>(u, v)"
        "  y = Cast<to = 10>(w) }"
    )
    (node,) = [n for n in result.after.graph.node if n.op_type == "RotaryEmbedding"]
    assert "Cast" in str(node.input[0]) or result.count("Cast") == 3


def test_rounding_on_the_way_is_not_lost() -> None:
    """Each half is narrowed and widened again: what that rounds is no part of the operator."""
    assert_untouched(
        f"{SIGNATURE} {{ {HEADS}  {COS_SIN}  r1, i1 = Split<axis = -1, num_outputs = 2>(x)"
        "  r2 = Cast<to = 10>(r1)  i2 = Cast<to = 10>(i1)  re = Cast<to = 1>(r2)"
        f"  im = Cast<to = 1>(i2)  {TURN}  y = Concat<axis = -1>(u, v) }}"
    )


FED = (
    "(int64[b,s] input_ids, float[b,s,{width}] cos, float[b,s,{width}] sin)"
    " => (float[b,s,6,20] y) <float[31,84] words, float[84,120] w>"
    " {{ h = Gather(words, input_ids)  q = MatMul(h, w)  x = Reshape(q, [0, 0, 6, 20])"
    "  c = Unsqueeze(cos, [2])  n = Unsqueeze(sin, [2])"
    "  re, im = Split<axis = -1, num_outputs = 2>(x)"
)


def test_tables_that_are_fed() -> None:
    fused(f"{FED.format(width=10)}  {TURN}  y = Concat<axis = -1>(u, v) }}")


def test_fed_tables_that_hold_each_angle_twice() -> None:
    """Nothing says that the halves of what is fed are equal."""
    assert_kept(
        f"{FED.format(width=20)}  g = Neg(im)  t = Concat<axis = -1>(g, re)  xc = Mul(x, c)"
        "  ts = Mul(t, n)  y = Add(xc, ts) }",
        "ROT001",
        "lanes",
    )


# --- what is left alone -------------------------------------------------------------------------


def test_double_precision_is_kept() -> None:
    signature = SIGNATURE.replace("float[", "double[")
    angles = COS_SIN.replace("c2 = Cos(a)", "ad = Cast<to = 11>(a)  c2 = Cos(ad)")
    assert_kept(
        f"{signature} {{ {HEADS}  {angles.replace('Sin(a)', 'Sin(ad)')}"
        f"  re, im = Split<axis = -1, num_outputs = 2>(x)  {TURN}  y = Concat<axis = -1>(u, v) }}",
        "ROT001",
        "element-type",
    )


@pytest.mark.parametrize(
    "positions",
    [
        "p = Gather(table, position_ids)",  # learned
        "pf = Cast<to = 1>(position_ids)  pu = Unsqueeze(pf, [-1])  a = Mul(pu, 0.3)"
        "  ca = Cos(a)  sa = Sin(a)  k = Concat<axis = -1>(sa, ca)  p = MatMul(k, mix)",
        "pf = Cast<to = 1>(position_ids)  pu = Unsqueeze(pf, [-1])  a = Mul(pu, 0.3)"
        "  ca = Cos(a)  sa = Sin(a)  p = Concat<axis = -1>(sa, ca, sa, ca)",
    ],
)
def test_absolute_positions_are_left_alone(positions: str) -> None:
    assert_untouched(
        "(int64[b,s] input_ids, int64[b,s] position_ids) => (float[b,s,4] y)"
        " <float[64,4] words, float[64,4] table, float[2,4] mix, float[4,4] w>"
        f"{{ e = Gather(words, input_ids)  {positions}  h = Add(e, p)  y = MatMul(h, w) }}"
    )
