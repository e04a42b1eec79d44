"""ROT001: rotary position embedding, graph before and graph after."""

from __future__ import annotations

import numpy as np
import pytest

from tests.graphs import assert_kept, assert_raised, assert_untouched, parse, raised

# x is [B, S, 6 * 20], rotated head by head; positions are [B, S].
SIGNATURE = "(float[b,s,120] x, int64[b,s] position_ids) => (float[b,6,s,20] y)"
HEADS = "r = Reshape(x, [0, 0, 6, 20])  h = Transpose<perm = [0, 2, 1, 3]>(r)"
# [B, S, 10] angles, and the tables [B, 1, S, 20] that transformers makes of them.
ANGLES = (
    "pf = Cast<to = 1>(position_ids)  pu = Unsqueeze(pf, [-1])"
    "  a = Mul(pu, [1.0, 0.63, 0.4, 0.25, 0.158, 0.1, 0.063, 0.04, 0.025, 0.0158])"
)
TABLES = (
    f"{ANGLES}  aa = Concat<axis = -1>(a, a)  c2 = Cos(aa)  s2 = Sin(aa)"
    "  c = Unsqueeze(c2, [1])  n = Unsqueeze(s2, [1])"
)
TURN = "lo = Slice(h, [0], [10], [-1])  hi = Slice(h, [10], [100], [-1])  ng = Neg(hi)"
HALVES = f"{TURN}  t = Concat<axis = -1>(ng, lo)"
SUM = "hc = Mul(h, c)  ts = Mul(t, n)  y = Add(hc, ts)"


def rotated(tables: str, rotation: str) -> str:
    return f"{SIGNATURE} {{ {HEADS}  {tables}  {rotation} }}"


# In halves: everything that says x[i] * cos - x[i + 10] * sin and x[i + 10] * cos + x[i] * sin.
SPELLINGS = {
    "slices": f"{HALVES}  {SUM}",
    "split": "lo, hi = Split<axis = -1, num_outputs = 2>(h)  ng = Neg(hi)"
    f"  t = Concat<axis = -1>(ng, lo)  {SUM}",
    "split-sizes": "lo, hi = Split<axis = 3>(h, [10, 10])  ng = Neg(hi)"
    f"  t = Concat<axis = 3>(ng, lo)  {SUM}",
    "sum-the-other-way": f"{HALVES}  hc = Mul(c, h)  ts = Mul(n, t)  y = Add(ts, hc)",
    "minus-one": "lo = Slice(h, [0], [10], [3], [1])  hi = Slice(h, [-10], [100], [3], [1])"
    f"  ng = Mul(hi, -1.0)  t = Concat<axis = -1>(ng, lo)  {SUM}",
    "gathered": f"lo = Gather<axis = -1>(h, {[*range(10)]})"
    f"  hi = Gather<axis = -1>(h, {[*range(10, 20)]})"
    f"  ng = Neg(hi)  t = Concat<axis = -1>(ng, lo)  {SUM}",
    "pairs-by-reshape": "p = Reshape(h, [0, 0, 0, 2, 10])"
    "  lo = Gather<axis = 3>(p, 0)  hi = Gather<axis = 3>(p, 1)"
    f"  ng = Neg(hi)  t = Concat<axis = -1>(ng, lo)  {SUM}",
    "signs": f"sw = Gather<axis = -1>(h, {[*range(10, 20), *range(10)]})"
    f"  t = Mul(sw, {[-1.0] * 10 + [1.0] * 10})  {SUM}",
    "stacked": f"{TURN}  n1 = Unsqueeze(ng, [3])  l1 = Unsqueeze(lo, [3])"
    f"  st = Concat<axis = 3>(n1, l1)  t = Reshape(st, [0, 0, 0, 20])  {SUM}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_halves_in_every_spelling(spelling: str) -> None:
    result = raised(rotated(TABLES, SPELLINGS[spelling]))
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]
    node = result.node("RotaryEmbedding")
    assert {a.name: a.i for a in node.attribute} == {"interleaved": 0}
    left = {each.op_type for each in result.after.graph.node}
    assert not left & {"Neg", "Split", "Add"}
    assert result.sites[0].details == {"rotary_dim": 20, "interleaved": False}


def test_the_graph_before_and_after() -> None:
    """The batches of x and of the positions may differ, so the tables are repeated for x's."""
    signature = (
        "(float[b,s,120] x, int64[b,s] position_ids) => (float[b,6,s,20] y)"
        " <float[64,10] cos_table, float[64,10] sin_table>"
    )
    gathered = "g = Gather(cos_table, position_ids)  f = Gather(sin_table, position_ids)"
    assert_raised(
        f"{signature} {{ {HEADS}  {gathered}"
        "  gg = Unsqueeze(g, [1])  ff = Unsqueeze(f, [1])"
        "  lo, hi = Split<axis = -1, num_outputs = 2>(h)"
        "  lc = Mul(lo, gg)  hs = Mul(hi, ff)  a = Sub(lc, hs)"
        "  hc = Mul(hi, gg)  ls = Mul(lo, ff)  b = Add(hc, ls)"
        "  y = Concat<axis = -1>(a, b) }",
        f"{signature} {{ {HEADS}  {gathered}"
        "  n = Shape<start = 0, end = 1>(x)  m = Shape<start = 1, end = 2>(x)"
        "  to = Concat<axis = 0>(n, m, [10])  g2 = Expand(g, to)  f2 = Expand(f, to)"
        "  y = RotaryEmbedding<interleaved = 0>(h, g2, f2) }",
        "ROT001",
    )


def test_interleaved_pairs() -> None:
    """GPT-J: even lanes with odd ones."""
    repeat = (
        f"{ANGLES}  a1 = Unsqueeze(a, [-1])  a3 = Concat<axis = -1>(a1, a1)"
        "  aa = Reshape(a3, [0, 0, 20])  c2 = Cos(aa)  s2 = Sin(aa)"
        "  c = Unsqueeze(c2, [1])  n = Unsqueeze(s2, [1])"
    )
    result = raised(
        rotated(
            repeat,
            "ev = Slice(h, [0], [100], [-1], [2])  od = Slice(h, [1], [100], [-1], [2])"
            "  ng = Neg(od)  n1 = Unsqueeze(ng, [-1])  e1 = Unsqueeze(ev, [-1])"
            f"  st = Concat<axis = -1>(n1, e1)  t = Reshape(st, [0, 0, 0, 20])  {SUM}",
        )
    )
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]
    assert {a.name: a.i for a in result.node("RotaryEmbedding").attribute} == {"interleaved": 1}


def test_interleaved_pairs_with_half_tables() -> None:
    signature = (
        "(float[b,s,120] x, int64[b,s] position_ids) => (float[b,6,s,20] y)"
        " <float[64,10] cos_table, float[64,10] sin_table>"
    )
    result = raised(
        f"{signature} {{ {HEADS}  g = Gather(cos_table, position_ids)"
        "  f = Gather(sin_table, position_ids)"
        "  c = Unsqueeze(g, [1])  n = Unsqueeze(f, [1])"
        "  ev = Slice(h, [0], [100], [-1], [2])  od = Slice(h, [1], [100], [-1], [2])"
        "  ec = Mul(ev, c)  os = Mul(od, n)  a = Sub(ec, os)"
        "  oc = Mul(od, c)  es = Mul(ev, n)  b = Add(oc, es)"
        "  a1 = Unsqueeze(a, [-1])  b1 = Unsqueeze(b, [-1])  st = Concat<axis = -1>(a1, b1)"
        "  y = Reshape(st, [0, 0, 0, 20]) }"
    )
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]
    assert {a.name: a.i for a in result.node("RotaryEmbedding").attribute} == {"interleaved": 1}


def test_part_of_a_head() -> None:
    """GPT-NeoX: the first 12 lanes turn, the last 8 pass."""
    tables = (
        "pf = Cast<to = 1>(position_ids)  pu = Unsqueeze(pf, [-1])"
        "  a = Mul(pu, [1.0, 0.63, 0.4, 0.25, 0.158, 0.1])  aa = Concat<axis = -1>(a, a)"
        "  c2 = Cos(aa)  s2 = Sin(aa)  c = Unsqueeze(c2, [1])  n = Unsqueeze(s2, [1])"
    )
    result = raised(
        rotated(
            tables,
            "tu = Slice(h, [0], [12], [-1])  pa = Slice(h, [12], [100], [-1])"
            "  lo = Slice(tu, [0], [6], [-1])  hi = Slice(tu, [6], [100], [-1])  ng = Neg(hi)"
            "  t = Concat<axis = -1>(ng, lo)  hc = Mul(tu, c)  ts = Mul(t, n)"
            "  ro = Add(hc, ts)  y = Concat<axis = -1>(ro, pa)",
        )
    )
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]
    attributes = {a.name: a.i for a in result.node("RotaryEmbedding").attribute}
    assert attributes == {"interleaved": 0, "rotary_embedding_dim": 12, "num_heads": 6}
    assert result.sites[0].details["rotary_dim"] == 12
    assert result.count("Concat") == 2  # of the angles and of the tables' size: not of the heads


def test_heads_behind_the_sequence() -> None:
    """[B, S, H, D] is transposed around the operator."""
    signature = SIGNATURE.replace("float[b,6,s,20] y", "float[b,s,6,20] y")
    tables = TABLES.replace("[1])", "[2])")
    result = raised(f"{signature} {{ h = Reshape(x, [0, 0, 6, 20])  {tables}  {HALVES}  {SUM} }}")
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]
    perms = [list(n.attribute[0].ints) for n in result.after.graph.node if n.op_type == "Transpose"]
    assert perms == [[0, 2, 1, 3]] * 2


def test_no_heads() -> None:
    """Three axes: the operator is told that there is one head."""
    signature = "(float[b,s,20] h, int64[b,s] position_ids) => (float[b,s,20] y)"
    tables = TABLES.replace("Unsqueeze(c2, [1])", "Identity(c2)")
    tables = tables.replace("Unsqueeze(s2, [1])", "Identity(s2)")
    result = raised(f"{signature} {{ {tables}  {HALVES}  {SUM} }}")
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]
    attributes = {a.name: a.i for a in result.node("RotaryEmbedding").attribute}
    assert attributes == {"interleaved": 0, "num_heads": 1}


def test_positions_of_batch_one_serve_every_batch() -> None:
    signature = SIGNATURE.replace("int64[b,s] position_ids", "int64[1,s] position_ids")
    result = raised(f"{signature} {{ {HEADS}  {TABLES}  {HALVES}  {SUM} }}")
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]
    assert result.count("Expand") == 2


def test_positions_that_are_counted() -> None:
    signature = "(float[b,s,120] x) => (float[b,6,s,20] y)"
    count = "sh = Shape<start = 1, end = 2>(x)  sq = Squeeze(sh, [0])  ra = Range(0, sq, 1)"
    angles = ANGLES.replace("position_ids", "ra")
    result = raised(
        f"{signature} {{ {HEADS}  {count}  {angles}  aa = Concat<axis = -1>(a, a)"
        f"  c = Cos(aa)  n = Sin(aa)  {HALVES}  {SUM} }}"
    )
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]


def test_constant_tables() -> None:
    """A fixed length: tables of [5, 20], both halves the same."""
    angles = np.outer(np.arange(5), 0.8 ** np.arange(10))
    scaled = 1.1 * np.concatenate([angles, angles], -1)
    proto = parse(
        "(float[b,5,120] x) => (float[b,6,5,20] y) <float[5,20] c, float[5,20] n>"
        f"{{ {HEADS}  {HALVES}  {SUM} }}",
        weights={"c": np.cos(scaled).astype("f"), "n": np.sin(scaled).astype("f")},
    )
    result = raised(proto)
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]


def test_halves_that_only_running_shows_equal() -> None:
    """cos(-a) is cos(a), and no structure says so: the tables are run."""
    tables = TABLES.replace(
        "c2 = Cos(aa)", "na = Neg(a)  an = Concat<axis = -1>(a, na)  c2 = Cos(an)"
    )
    result = raised(rotated(tables, SPELLINGS["slices"]))
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]


def test_halves_that_running_shows_different() -> None:
    tables = TABLES.replace(
        "s2 = Sin(aa)", "na = Neg(a)  an = Concat<axis = -1>(a, na)  s2 = Sin(an)"
    )
    assert_kept(rotated(tables, SPELLINGS["slices"]), "ROT001", "lanes")


def test_scaled_tables_stay_scaled() -> None:
    """YaRN multiplies cos and sin by a factor: the tables are taken as they are."""
    tables = TABLES.replace("c2 = Cos(aa)  s2 = Sin(aa)", "c0 = Cos(aa)  s0 = Sin(aa)")
    tables = tables.replace("c = Uns", "c2 = Mul(c0, 1.35)  s2 = Mul(s0, 1.35)  c = Uns")
    result = raised(rotated(tables, SPELLINGS["slices"]))
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]
    assert result.count("Mul") == 3


def test_turned_the_other_way() -> None:
    """y = x cos - turn(x) sin: the operator gets -sin."""
    result = raised(rotated(TABLES, f"{HALVES}  hc = Mul(h, c)  ts = Mul(t, n)  y = Sub(hc, ts)"))
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]
    assert result.count("Neg") == 1


def test_half_precision() -> None:
    signature = SIGNATURE.replace("float[", "float16[")
    tables = TABLES.replace("c2 = Cos(aa)  s2 = Sin(aa)", "c0 = Cos(aa)  s0 = Sin(aa)")
    tables = tables.replace("c = Uns", "c2 = Cast<to = 10>(c0)  s2 = Cast<to = 10>(s0)  c = Uns")
    result = raised(f"{signature} {{ {HEADS}  {tables}  {HALVES}  {SUM} }}")
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]


def test_queries_and_keys_share_their_tables() -> None:
    signature = (
        "(float[b,s,120] x, float[b,s,60] u, int64[b,s] position_ids)"
        " => (float[b,6,s,20] y, float[b,3,s,20] z)"
    )
    other = (
        "r2 = Reshape(u, [0, 0, 3, 20])  h2 = Transpose<perm = [0, 2, 1, 3]>(r2)"
        "  l2, i2 = Split<axis = -1, num_outputs = 2>(h2)  n2 = Neg(i2)"
        "  t2 = Concat<axis = -1>(n2, l2)  hc2 = Mul(h2, c)  ts2 = Mul(t2, n)  z = Add(hc2, ts2)"
    )
    result = raised(f"{signature} {{ {HEADS}  {TABLES}  {HALVES}  {SUM}  {other} }}")
    assert [site.status for site in result.sites] == ["fused", "fused"]
    first, second = [n for n in result.after.graph.node if n.op_type == "RotaryEmbedding"]
    assert first.input[1:] == second.input[1:]


def test_tables_of_several_tensors() -> None:
    """Each half of the angles has a tensor of its own, and they are joined lane by lane."""
    result = raised(
        "(float[b,s,24] x, int64[b,s] position_ids) => (float[b,6,s,4] y)"
        "{ r = Reshape(x, [0, 0, 6, 4])  h = Transpose<perm = [0, 2, 1, 3]>(r)"
        "  pf = Cast<to = 1>(position_ids)  pu = Unsqueeze(pf, [1, 3])  pv = Mul(pu, 0.3)"
        "  c0 = Cos(pu)  c1 = Cos(pv)  s0 = Sin(pu)  s1 = Sin(pv)"
        "  x0, x1, x2, x3 = Split<axis = -1, num_outputs = 4>(h)"
        "  a0 = Mul(x0, c0)  b0 = Mul(x2, s0)  y0 = Sub(a0, b0)"
        "  a1 = Mul(x1, c1)  b1 = Mul(x3, s1)  y1 = Sub(a1, b1)"
        "  a2 = Mul(x2, c0)  b2 = Mul(x0, s0)  y2 = Add(a2, b2)"
        "  a3 = Mul(x3, c1)  b3 = Mul(x1, s1)  y3 = Add(a3, b3)"
        "  y = Concat<axis = -1>(y0, y1, y2, y3) }"
    )
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]


# --- what is no rotation ------------------------------------------------------------------------

# What looks like one is kept, and the report says so.
OTHER_ANGLES = "a2 = Mul(a, 2.0)  ac = Concat<axis = -1>(a, a2)"
ALMOST = {
    "differing halves of the table": (
        f"{ANGLES}  {OTHER_ANGLES}  c2 = Cos(ac)  s2 = Sin(ac)  c = Unsqueeze(c2, [1])"
        "  n = Unsqueeze(s2, [1])",
        SPELLINGS["slices"],
    ),
    "differing halves of cos alone": (
        TABLES.replace(
            "c2 = Cos(aa)", "a2 = Mul(a, 2.0)  ac = Concat<axis = -1>(a, a2)  c2 = Cos(ac)"
        ),
        SPELLINGS["slices"],
    ),
    "no sign": (TABLES, f"{TURN}  t = Concat<axis = -1>(hi, lo)  {SUM}"),
    "both signs": (TABLES, f"{TURN}  nl = Neg(lo)  t = Concat<axis = -1>(ng, nl)  {SUM}"),
    "halves of other sizes": (
        TABLES,
        "lo = Slice(h, [0], [8], [-1])  hi = Slice(h, [8], [100], [-1])  ng = Neg(hi)"
        f"  t = Concat<axis = -1>(ng, lo)  {SUM}",
    ),
    "doubled": (
        TABLES,
        f"{HALVES}  h2 = Mul(h, 2.0)  hc = Mul(h2, c)  ts = Mul(t, n)  y = Add(hc, ts)",
    ),
}


@pytest.mark.parametrize("name", ALMOST)
def test_almost_a_rotation(name: str) -> None:
    assert_kept(rotated(*ALMOST[name]), "ROT001", "lanes")


MISSES = {
    "not turned": (TABLES, f"{TURN}  t = Concat<axis = -1>(lo, ng)  {SUM}"),
    "only scaled": (TABLES, "hc = Mul(h, c)  ts = Mul(h, n)  y = Add(hc, ts)"),
    "cos on the turned half": (TABLES, f"{HALVES}  hc = Mul(h, n)  y = Add(hc, t)"),
    "one lane twice": (
        TABLES,
        "g = Gather<axis = -1>(h, "
        f"[{', '.join(map(str, [*range(10, 19), 18, *range(10)]))}])"
        f"  t = Mul(g, [{', '.join(['-1.0'] * 10 + ['1.0'] * 10)}])  {SUM}",
    ),
}


@pytest.mark.parametrize("name", MISSES)
def test_misses(name: str) -> None:
    assert_untouched(rotated(*MISSES[name]))


def test_a_bias_behind_stays_outside() -> None:
    proto = parse(
        rotated(
            TABLES, SPELLINGS["slices"].replace("y = Add(hc, ts)", "z = Add(hc, ts)  y = Relu(z)")
        )
    )
    result = raised(proto)
    assert [(site.rule, site.status) for site in result.sites] == [("ROT001", "fused")]
    assert result.count("Relu") == 1


# --- declines -----------------------------------------------------------------------------------


def test_tables_that_differ_from_head_to_head() -> None:
    """[6, 5, 20]: one table for each head."""
    angles = np.arange(30).reshape(6, 5, 1) * 0.8 ** np.arange(10)
    whole = np.concatenate([angles, angles], -1)
    assert_kept(
        parse(
            "(float[b,5,120] x) => (float[b,6,5,20] y) <float[6,5,20] c, float[6,5,20] n>"
            f"{{ {HEADS}  {HALVES}  {SUM} }}",
            weights={"c": np.cos(whole).astype("f"), "n": np.sin(whole).astype("f")},
        ),
        "ROT001",
        "table-layout",
    )


def test_a_batch_that_cannot_be_computed() -> None:
    """The batch is a number that is fed: no size of an input tells it."""
    assert_kept(
        "(float[b,s,120] z, int64[1] rows, int64[1,s] position_ids) => (float[u,6,s,20] y)"
        "{ k = Add(rows, 1)  x = Slice(z, [0], k, [0])"
        f"  {HEADS}  {TABLES}  {HALVES}  {SUM} }}",
        "ROT001",
        "batch-unknown",
    )


def test_names() -> None:
    model = parse(rotated(TABLES, SPELLINGS["slices"]))
    for node in model.graph.node:
        module = "self_attn" if node.output[0] in "lo hi ng t hc ts y" else "rotary_emb"
        node.name = f"/model/layers.1/{module}/{node.op_type}_{node.output[0]}"
    result = raised(model)
    props = {p.key: p.value for p in result.node("RotaryEmbedding").metadata_props}
    assert props["pkg.torch.onnx.name_scopes"] == "model.layers.1.self_attn"
    assert props["onnxgen.rule"] == "ROT001"
    assert "/model/layers.1/self_attn/Neg_ng" in props["onnxgen.replaced"].split(", ")
    assert "rotary_emb/Cos" not in props["onnxgen.replaced"]
