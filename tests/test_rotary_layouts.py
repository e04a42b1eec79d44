"""ROT001: other orders of lanes, complex numbers, other axes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.graphs import Raised, assert_raised, parse, raised

# q is [B, S, 6 heads * 20]; positions are [B, S]; angles are [B, S, 10].
SIGNATURE = "(float[b,s,120] q, int64[b,s] position_ids) => (float[b,s,6,20] y)"
HEADS = "x = Reshape(q, [0, 0, 6, 20])"
ANGLES = (
    "pf = Cast<to = 1>(position_ids)  pu = Unsqueeze(pf, [-1])"
    "  a = Mul(pu, [1.0, 0.63, 0.4, 0.25, 0.158, 0.1, 0.063, 0.04, 0.025, 0.0158])"
)
COS_SIN = f"{ANGLES}  c2 = Cos(a)  s2 = Sin(a)  c = Unsqueeze(c2, [2])  n = Unsqueeze(s2, [2])"
TURN = (
    "ac = Mul(re, c)  bn = Mul(im, n)  u = Sub(ac, bn)"
    "  bc = Mul(im, c)  an = Mul(re, n)  v = Add(bc, an)"
)
EVEN = "re = Slice(x, [0], [100], [-1], [2])  im = Slice(x, [1], [100], [-1], [2])"


def fused(text: str, **attributes: int) -> Raised:
    """The graph becomes one RotaryEmbedding with these attributes, and the same numbers."""
    result = raised(text)
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")], (
        result.sites
    )
    found = {each.name: each.i for each in result.node("RotaryEmbedding").attribute}
    assert found == {"interleaved": 0, **attributes}
    return result


# --- lanes in another order ---------------------------------------------------------------------


def test_neighbours_in_and_halves_out() -> None:
    """DeepSeek: x is taken apart into halves before the operator, and stays so behind it."""
    assert_raised(
        "(float[b,6,s,20] x, int64[b,s] position_ids) => (float[b,6,s,20] y)"
        f"{{ {ANGLES}  c2 = Cos(a)  s2 = Sin(a)  c = Unsqueeze(c2, [1])  n = Unsqueeze(s2, [1])"
        f"  {EVEN}  {TURN}  y = Concat<axis = -1>(u, v) }}",
        "(float[b,6,s,20] x, int64[b,s] position_ids) => (float[b,6,s,20] y)"
        f"{{ {ANGLES}  c2 = Cos(a)  s2 = Sin(a)"
        "  p = Reshape(x, [0, 0, 0, 10, 2])  t = Transpose<perm = [0, 1, 2, 4, 3]>(p)"
        "  h = Reshape(t, [0, 0, 0, 20])"
        "  b1 = Shape<start = 0, end = 1>(x)  m1 = Shape<start = 2, end = 3>(x)"
        "  to = Concat<axis = 0>(b1, m1, [10])  g = Expand(c2, to)  f = Expand(s2, to)"
        "  y = RotaryEmbedding<interleaved = 0>(h, g, f) }",
        "ROT001",
    )


def test_halves_in_and_neighbours_out() -> None:
    fused(
        f"{SIGNATURE} {{ {HEADS}  {COS_SIN}  re, im = Split<axis = -1, num_outputs = 2>(x)  {TURN}"
        "  u1 = Unsqueeze(u, [-1])  v1 = Unsqueeze(v, [-1])  w = Concat<axis = -1>(u1, v1)"
        "  y = Reshape(w, [0, 0, 6, 20]) }"
    )


def test_deepseek_as_transformers_writes_it() -> None:
    """Viewed as pairs, transposed, flattened, then turned as halves."""
    fused(
        "(float[b,6,s,20] q, int64[b,s] position_ids) => (float[b,6,s,20] y)"
        f"{{ {ANGLES}  aa = Concat<axis = -1>(a, a)  c2 = Cos(aa)  s2 = Sin(aa)"
        "  c = Unsqueeze(c2, [1])  n = Unsqueeze(s2, [1])"
        "  p = Reshape(q, [0, 0, 0, 10, 2])  t = Transpose<perm = [0, 1, 2, 4, 3]>(p)"
        "  h = Reshape(t, [0, 0, 0, 20])  lo, hi = Split<axis = -1, num_outputs = 2>(h)"
        "  g = Neg(hi)  r = Concat<axis = -1>(g, lo)  hc = Mul(h, c)  rs = Mul(r, n)"
        "  y = Add(hc, rs) }"
    )


def test_lanes_that_pass_in_front() -> None:
    result = fused(
        f"{SIGNATURE} {{ {HEADS}  {ANGLES}  a4 = Slice(a, [0], [4], [-1])  c2 = Cos(a4)"
        "  s2 = Sin(a4)  c = Unsqueeze(c2, [2])  n = Unsqueeze(s2, [2])"
        f"  k, re, im = Split<axis = -1>(x, [12, 4, 4])  {TURN}  y = Concat<axis = -1>(k, u, v) }}"
    )
    assert result.sites[0].details["rotary_dim"] == 8


def test_lanes_that_pass_on_both_sides() -> None:
    fused(
        f"{SIGNATURE} {{ {HEADS}  {ANGLES}  a4 = Slice(a, [0], [4], [-1])  c2 = Cos(a4)"
        "  s2 = Sin(a4)  c = Unsqueeze(c2, [2])  n = Unsqueeze(s2, [2])"
        f"  k, re, l, im = Split<axis = -1>(x, [7, 4, 5, 4])  {TURN}"
        "  y = Concat<axis = -1>(k, u, l, v) }"
    )


def test_a_part_of_neighbours() -> None:
    """GLM: neighbours among the first lanes, the others pass."""
    fused(
        f"{SIGNATURE} {{ {HEADS}  {ANGLES}  a4 = Slice(a, [0], [4], [-1])  c2 = Cos(a4)"
        "  s2 = Sin(a4)  c = Unsqueeze(c2, [2])  n = Unsqueeze(s2, [2])"
        "  h, k = Split<axis = -1>(x, [8, 12])"
        "  re = Slice(h, [0], [8], [-1], [2])  im = Slice(h, [1], [8], [-1], [2])"
        f"  {TURN}  u1 = Unsqueeze(u, [-1])  v1 = Unsqueeze(v, [-1])"
        "  w = Concat<axis = -1>(u1, v1)  r = Reshape(w, [0, 0, 6, 8])"
        "  y = Concat<axis = -1>(r, k) }",
        interleaved=1,
        rotary_embedding_dim=8,
        num_heads=6,
    )


def test_a_part_inside_is_found_on_its_own() -> None:
    """The turned part is whole by itself: what it is joined with is left alone."""
    result = fused(
        f"{SIGNATURE} {{ {HEADS}  {ANGLES}  a4 = Slice(a, [0], [4], [-1])  c2 = Cos(a4)"
        "  s2 = Sin(a4)  c = Unsqueeze(c2, [2])  n = Unsqueeze(s2, [2])"
        f"  k, re, im = Split<axis = -1>(x, [12, 4, 4])  {TURN}  r = Concat<axis = -1>(u, v)"
        "  y = Concat<axis = -1>(k, r) }"
    )
    assert result.count("Split") + result.count("Slice") <= 3


def test_a_matrix_that_turns() -> None:
    matrix = np.zeros((20, 20), np.float32)
    for i in range(10):
        matrix[i + 10, i], matrix[i, i + 10] = -1, 1
    result = fused_proto(
        f"{SIGNATURE.replace('(float[b,s,6,20] y)', '(float[b,s,6,20] y) <float[20,20] m>')}"
        f"{{ {HEADS}  {ANGLES}  aa = Concat<axis = -1>(a, a)  c2 = Cos(aa)  s2 = Sin(aa)"
        "  c = Unsqueeze(c2, [2])  n = Unsqueeze(s2, [2])"
        "  t = MatMul(x, m)  xc = Mul(x, c)  ts = Mul(t, n)  y = Add(xc, ts) }",
        {"m": matrix},
    )
    assert result.count("MatMul") == 0


def fused_proto(text: str, weights: dict[str, np.ndarray]) -> Raised:
    result = raised(parse(text, weights=weights))
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]
    return result


# --- complex numbers ----------------------------------------------------------------------------

PAIRS = "z = Reshape(x, [0, 0, 6, 10, 2])"
STACKS = {
    "stacked": "u1 = Unsqueeze(u, [-1])  v1 = Unsqueeze(v, [-1])  w = Concat<axis = -1>(u1, v1)",
    "kept": "w = Concat<axis = -1>(u, v)",
}
READ = {
    "gathered": ("re = Gather<axis = -1>(z, 0)  im = Gather<axis = 4>(z, 1)", "stacked", "[2]"),
    "split": ("re, im = Split<axis = -1, num_outputs = 2>(z)", "kept", "[2, 4]"),
    "sliced": (
        "re = Slice(z, [0], [1], [-1])  im = Slice(z, [1], [2], [4])",
        "kept",
        "[2, 4]",
    ),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("flat", [False, True])
def test_complex_numbers(name: str, flat: bool) -> None:
    """view_as_complex, times a polar, view_as_real; by way of heads of their own or not."""
    read, stack, axes = READ[name]
    heads = "x = Identity(q)" if flat else HEADS
    tables = (
        f"{ANGLES}  c2 = Cos(a)  s2 = Sin(a)  c = Unsqueeze(c2, {axes})  n = Unsqueeze(s2, {axes})"
    )
    fused(
        f"{SIGNATURE} {{ {heads}  {PAIRS}  {tables}  {read}  {TURN}  {STACKS[stack]}"
        "  y = Reshape(w, [0, 0, 6, 20]) }",
        interleaved=1,
    )


def test_polar_numbers_in_one_table() -> None:
    """freqs_cis: [S, 10, 2], constant, its rows taken by position."""
    angles = np.outer(np.arange(64), 0.8 ** np.arange(10))
    polar = np.stack([np.cos(angles), np.sin(angles)], -1).astype("f")
    signature = SIGNATURE.replace("(float[b,s,6,20] y)", "(float[b,s,6,20] y) <float[64,10,2] p>")
    result = raised(
        parse(
            f"{signature} {{ {HEADS}  {PAIRS}  g = Gather(p, position_ids)"
            "  c2 = Gather<axis = -1>(g, 0)  s2 = Gather<axis = -1>(g, 1)"
            "  c = Unsqueeze(c2, [2])  n = Unsqueeze(s2, [2])"
            "  re = Gather<axis = -1>(z, 0)  im = Gather<axis = -1>(z, 1)"
            f"  {TURN}  {STACKS['stacked']}  y = Reshape(w, [0, 0, 6, 20]) }}",
            weights={"p": polar},
        )
    )
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]


# --- other axes ---------------------------------------------------------------------------------

LAYOUTS = {
    "sequence, heads": ("float[s,60]", "[0, 3, 20]", "float[s,3,20]", "[s]", "[1]"),
    "queries with keys": (
        "float[b,s,120]",
        "[0, 0, 2, 3, 20]",
        "float[b,s,2,3,20]",
        "[b,s]",
        "[2, 3]",
    ),
    "no heads": ("float[b,s,20]", "[0, 0, 20]", "float[b,s,20]", "[b,s]", "[]"),
    "no batch, no heads": ("float[s,20]", "[0, 20]", "float[s,20]", "[s]", "[]"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_axes(name: str) -> None:
    x, target, y, positions, axes = LAYOUTS[name]
    views = [f"Unsqueeze({t}, {axes})" if axes != "[]" else f"Identity({t})" for t in ("c2", "s2")]
    tables = f"{ANGLES}  c2 = Cos(a)  s2 = Sin(a)  c = {views[0]}  n = {views[1]}"
    result = raised(
        f"({x} q, int64{positions} position_ids) => ({y} y)"
        f"{{ x = Reshape(q, {target})  {tables}  re, im = Split<axis = -1, num_outputs = 2>(x)"
        f"  {TURN}  y = Concat<axis = -1>(u, v) }}"
    )
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]
    assert result.count("Split") == 0


def test_sequence_first() -> None:
    """[S, B, H, D], its positions counted: shown as [S, B * H, 1, D]."""
    count = "sh = Shape<end = 1>(q)  sq = Squeeze(sh)  position_ids = Range(0, sq, 1)"
    result = raised(
        f"(float[s,b,60] q) => (float[s,b,3,20] y) {{ {count}  x = Reshape(q, [0, 0, 3, 20])"
        f"  {ANGLES}  c2 = Cos(a)  s2 = Sin(a)  c = Unsqueeze(c2, [1, 2])"
        "  n = Unsqueeze(s2, [1, 2])  re, im = Split<axis = -1, num_outputs = 2>(x)"
        f"  {TURN}  y = Concat<axis = -1>(u, v) }}"
    )
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]
    assert result.count("Transpose") == 0


def test_queries_and_keys_joined_over_heads() -> None:
    """Concat(q, k) is turned at once, and taken apart behind it."""
    result = raised(
        "(float[b,6,s,20] q, float[b,3,s,20] k, int64[b,s] position_ids)"
        " => (float[b,6,s,20] y, float[b,3,s,20] w)"
        f"{{ {ANGLES}  c2 = Cos(a)  s2 = Sin(a)  c = Unsqueeze(c2, [1])  n = Unsqueeze(s2, [1])"
        "  x = Concat<axis = 1>(q, k)  re, im = Split<axis = -1, num_outputs = 2>(x)"
        f"  {TURN}  r = Concat<axis = -1>(u, v)  y, w = Split<axis = 1>(r, [6, 3]) }}"
    )
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]


# --- any lanes at all ---------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    lanes=st.permutations(range(12)),
    places=st.permutations(range(12)),
    pairs=st.integers(2, 6),
    sign=st.sampled_from(["Sub Add", "Add Sub"]),
)
def test_any_pairs_anywhere(lanes: list[int], places: list[int], pairs: int, sign: str) -> None:
    """Pairs from anywhere turn, the other lanes pass, and all land anywhere."""
    first, second = sign.split()
    re, im, rest = lanes[:pairs], lanes[pairs : 2 * pairs], lanes[2 * pairs :]
    passing = f"k = Gather<axis = -1>(x, {rest})  w = Concat<axis = -1>(u, v, k)"
    result = raised(
        "(float[b,3,s,12] x, int64[b,s] position_ids) => (float[b,3,s,12] y)"
        f"{{ pf = Cast<to = 1>(position_ids)  pu = Unsqueeze(pf, [1, 3])"
        f"  a = Mul(pu, {[0.9**i for i in range(pairs)]})  c = Cos(a)  n = Sin(a)"
        f"  re = Gather<axis = -1>(x, {re})  im = Gather<axis = -1>(x, {im})"
        f"  ac = Mul(re, c)  bn = Mul(im, n)  u = {first}(ac, bn)"
        f"  bc = Mul(im, c)  an = Mul(re, n)  v = {second}(bc, an)"
        f"  {passing if rest else 'w = Concat<axis = -1>(u, v)'}"
        f"  y = Gather<axis = -1>(w, {places}) }}"
    )
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]
    assert result.sites[0].details["rotary_dim"] == 2 * pairs
