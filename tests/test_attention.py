"""ATT001: attention around a Softmax, graph before and graph after.

Six query heads, three key/value heads, head size 20: B 2, S 5, P 7, T 12 when it is run.
"""

from __future__ import annotations

import math
from typing import Any

import onnx
import pytest
from onnx import helper

from tests.graphs import Raised, assert_kept, assert_raised, assert_untouched, parse, raised

SCALE = 1 / math.sqrt(20)
INPUTS = (
    "(int64[b,s] ids, int64[b,t] attention_mask, float[b,3,p,20] past_k, float[b,3,p,20] past_v)"
)
OUTPUTS = "(float[b,s,50] y, float[b,3,t,20] present_k, float[b,3,t,20] present_v)"
WEIGHTS = (
    "<float[37,50] table, float[50,120] wq, float[50,60] wk, float[50,60] wv, float[120,50] wo>"
)
SIGNATURE = f"{INPUTS} => {OUTPUTS} {WEIGHTS}"

PROJECTED = (
    "x = Gather(table, ids)  qp = MatMul(x, wq)  kp = MatMul(x, wk)  vp = MatMul(x, wv)"
    "  q3 = Reshape(qp, [0, 0, 6, 20])  k3 = Reshape(kp, [0, 0, 3, 20])"
    "  v3 = Reshape(vp, [0, 0, 3, 20])"
    "  q = Transpose<perm = [0, 2, 1, 3]>(q3)  k = Transpose<perm = [0, 2, 1, 3]>(k3)"
    "  v = Transpose<perm = [0, 2, 1, 3]>(v3)"
)
CACHED = (
    "present_k = Concat<axis = 2>(past_k, k)  present_v = Concat<axis = 2>(past_v, v)"
    "  kc = Identity(present_k)  vc = Identity(present_v)"
)
REPEATED = (
    "ku = Unsqueeze(kc, [2])  ke = Expand(ku, [1, 1, 2, 1, 1])  kr = Reshape(ke, [0, 6, -1, 20])"
    "  vu = Unsqueeze(vc, [2])  ve = Expand(vu, [1, 1, 2, 1, 1])  vr = Reshape(ve, [0, 6, -1, 20])"
)
# keep: bool [B, 1, S, T], what is neither later nor padding.
KEEP = (
    "tl = Shape<start = 1, end = 2>(attention_mask)  tt = Squeeze(tl, [0])"
    "  sl = Shape<start = 1, end = 2>(x)  ss = Squeeze(sl, [0])  pp = Sub(tt, ss)"
    "  cols = Range(0, tt, 1)  rows = Range(pp, tt, 1)  ru = Unsqueeze(rows, [1])"
    "  causal = LessOrEqual(cols, ru)  am = Cast<to = 9>(attention_mask)"
    "  au = Unsqueeze(am, [1, 2])  keep = And(causal, au)"
)
SCALED = "kt = Transpose<perm = [0, 1, 3, 2]>(kr)  s0 = MatMul(q, kt)  s1 = Mul(s0, 0.2236068)"
MASKED = "s2 = Where(keep, s1, -inf)"
SOFTMAX = "p = Softmax<axis = -1>(s2)"
VALUES = (
    "o = MatMul(p, vr)  ot = Transpose<perm = [0, 2, 1, 3]>(o)  om = Reshape(ot, [0, 0, 120])"
    "  y = MatMul(om, wo)"
)


def block(
    *,
    signature: str = SIGNATURE,
    projected: str = PROJECTED,
    cached: str = CACHED,
    repeated: str = REPEATED,
    keep: str = KEEP,
    scaled: str = SCALED,
    masked: str = MASKED,
    softmax: str = SOFTMAX,
    values: str = VALUES,
) -> str:
    """A whole block; what is not given is written as most exporters do."""
    parts = (projected, cached, repeated, keep, scaled, masked, softmax, values)
    return f"{signature} {{ {'  '.join(parts)} }}"


AFTER = (
    f"{SIGNATURE} {{ {PROJECTED}  {KEEP}"
    f"  o, present_k, present_v = Attention<scale = 0.2236068>(q, k, v, keep, past_k, past_v)"
    "  ot = Transpose<perm = [0, 2, 1, 3]>(o)  om = Reshape(ot, [0, 0, 120])"
    "  y = MatMul(om, wo) }"
)


def attributes(result: Raised) -> dict[str, object]:
    node = result.node("Attention")
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def assert_fused(
    text: str | onnx.ModelProto, *, cache: bool = True, scale: float = SCALE
) -> Raised:
    """One Attention, with its cache inside, over as many key heads as there are."""
    result = assert_raised(text, None, "ATT001")
    assert result.count("Softmax") == 0
    node = result.node("Attention")
    given = [*node.input, *[""] * (6 - len(node.input))]
    if cache:
        assert given[4:6] == ["past_k", "past_v"]
        assert node.output[1:] == ["present_k", "present_v"]
        assert result.count("Expand") <= 1  # of the mask
    else:
        assert given[4:6] == ["", ""]
    assert attributes(result)["scale"] == pytest.approx(scale, rel=2e-4)
    inside = result.sites[0].details["cache"] == "concatenated"
    assert inside == cache
    return result


def shape_of(result: Raised, index: int) -> list[Any]:
    """The shape of an input of the Attention, as ONNX infers it."""
    name = result.node("Attention").input[index]
    known = onnx.shape_inference.infer_shapes(result.after).graph
    (info,) = [each for each in (*known.value_info, *known.input) if each.name == name]
    return [dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim]


def test_the_graph_before_and_after() -> None:
    result = assert_raised(block(), None, "ATT001")
    details = result.sites[0].details
    assert details == {
        "heads": 6,
        "kv_heads": 3,
        "head_size": 20,
        "scale": pytest.approx(SCALE),
        "cache": "concatenated",
        "mask": "explicit",
    }
    node = result.node("Attention")
    assert list(node.input[4:]) == ["past_k", "past_v"]
    assert list(node.output[1:]) == ["present_k", "present_v"]
    assert [a.name for a in node.attribute] == ["scale"]
    made = {name: each for each in result.after.graph.node for name in each.output}
    q, k, v, mask = (made[name] for name in node.input[:4])
    assert [each.op_type for each in (q, k, v)] == ["Transpose"] * 3
    assert mask.op_type == "And"
    assert made[v.input[0]].op_type == "Reshape"
    assert made[made[v.input[0]].input[0]].input[1] == "wv"
    assert made[made[k.input[0]].input[0]].input[1] == "wk"


def test_without_mask_and_cache_the_graph_is_exactly_this() -> None:
    signature = f"(int64[b,s] ids) => (float[b,s,50] y) {WEIGHTS}"
    plain = block(
        signature=signature,
        cached="kc = Identity(k)  vc = Identity(v)",
        keep="",
        masked="s2 = Identity(s1)",
    )
    assert_raised(
        plain,
        f"{signature} {{ {PROJECTED}  o = Attention<scale = 0.2236068>(q, k, v)"
        "  ot = Transpose<perm = [0, 2, 1, 3]>(o)  om = Reshape(ot, [0, 0, 120])"
        "  y = MatMul(om, wo) }",
        "ATT001",
    )


# --- heads --------------------------------------------------------------------------------------

GROUPS = {
    "expand": REPEATED,
    "expand-to-full-size": (
        "b0 = Shape<start = 0, end = 1>(x)  t0 = Shape<start = 2, end = 3>(kc)"
        "  to = Concat<axis = 0>(b0, [3], [2], t0, [20])"
        "  ku = Unsqueeze(kc, [2])  ke = Expand(ku, to)  kr = Reshape(ke, [0, 6, -1, 20])"
        "  vu = Unsqueeze(vc, [2])  ve = Expand(vu, to)  vr = Reshape(ve, [0, 6, -1, 20])"
    ),
    "tile": (
        "ku = Unsqueeze(kc, [2])  ke = Tile(ku, [1, 1, 2, 1, 1])  kr = Reshape(ke, [0, 6, -1, 20])"
        "  vu = Unsqueeze(vc, [2])  ve = Tile(vu, [1, 1, 2, 1, 1])  vr = Reshape(ve, [0, 6, -1, 20])"
    ),
    "gather": (
        "kr = Gather<axis = 1>(kc, [0, 0, 1, 1, 2, 2])"
        "  vr = Gather<axis = 1>(vc, [0, 0, 1, 1, 2, 2])"
    ),
    "concat-of-itself": (
        "ku = Unsqueeze(kc, [2])  ke = Concat<axis = 2>(ku, ku)  kr = Reshape(ke, [0, 6, -1, 20])"
        "  vu = Unsqueeze(vc, [2])  ve = Concat<axis = 2>(vu, vu)  vr = Reshape(ve, [0, 6, -1, 20])"
    ),
}


@pytest.mark.parametrize("name", [name for name in GROUPS if name != "concat-of-itself"])
def test_repeated_heads(name: str) -> None:
    result = assert_fused(block(repeated=GROUPS[name]))
    assert result.sites[0].details["kv_heads"] == 3
    assert result.count("Tile") == 0


def test_one_key_head_for_all() -> None:
    """Falcon, StarCoder: the single head is broadcast by MatMul."""
    signature = SIGNATURE.replace("[b,3,", "[b,1,").replace("50,60]", "50,20]")
    projected = PROJECTED.replace("[0, 0, 3, 20]", "[0, 0, 1, 20]")
    result = assert_fused(
        block(
            signature=signature,
            projected=projected,
            repeated="kr = Identity(kc)  vr = Identity(vc)",
        )
    )
    assert (result.sites[0].details["heads"], result.sites[0].details["kv_heads"]) == (6, 1)


def test_a_head_for_each() -> None:
    signature = SIGNATURE.replace("[b,3,", "[b,6,").replace("50,60]", "50,120]")
    result = assert_fused(
        block(
            signature=signature,
            projected=PROJECTED.replace("[0, 0, 3, 20]", "[0, 0, 6, 20]"),
            repeated="kr = Identity(kc)  vr = Identity(vc)",
        )
    )
    assert (result.sites[0].details["heads"], result.sites[0].details["kv_heads"]) == (6, 6)


def test_queries_that_are_repeated() -> None:
    """Three query heads, each on two key heads: they are what they are repeated to."""
    signature = SIGNATURE.replace("[b,3,", "[b,6,").replace("50,60]", "50,120]")
    signature = signature.replace("float[50,120] wq", "float[50,60] wq")
    projected = PROJECTED.replace("[0, 0, 3, 20]", "[0, 0, 6, 20]")
    projected = projected.replace("qp, [0, 0, 6, 20]", "qp, [0, 0, 3, 20]")
    projected = projected.replace("  q = T", "  q0 = T") + (
        "  qu = Unsqueeze(q0, [2])  qe = Expand(qu, [1, 1, 2, 1, 1])"
        "  sq = Shape<start = 1, end = 2>(x)  bq = Shape<start = 0, end = 1>(x)"
        "  fq = Concat<axis = 0>(bq, [6], sq, [20])  q = Reshape(qe, fq)"
    )
    repeated = "kr = Identity(kc)  vr = Identity(vc)"
    result = assert_fused(block(signature=signature, projected=projected, repeated=repeated))
    assert (result.sites[0].details["heads"], result.sites[0].details["kv_heads"]) == (6, 6)


def test_packed_projections() -> None:
    """Phi-3: one matrix makes queries, keys and values."""
    signature = SIGNATURE.replace(
        WEIGHTS, "<float[37,50] table, float[50,240] w, float[120,50] wo>"
    )
    projected = (
        "x = Gather(table, ids)  pk = MatMul(x, w)  qp, kp, vp = Split<axis = -1>(pk, [120, 60, 60])"
        + PROJECTED[PROJECTED.index("  q3") :]
    )
    result = assert_fused(block(signature=signature, projected=projected))
    assert result.count("Split") == 1


def test_packed_heads_that_are_gathered() -> None:
    """GPT-NeoX, ViT: [B, S, 3, H, D] transposed, and one of three taken."""
    signature = "(int64[b,s] ids) => (float[b,s,50] y) <float[37,50] table, float[50,360] w, float[120,50] wo>"
    projected = (
        "x = Gather(table, ids)  pk = MatMul(x, w)  p5 = Reshape(pk, [0, 0, 3, 6, 20])"
        "  p6 = Transpose<perm = [2, 0, 3, 1, 4]>(p5)  q = Gather<axis = 0>(p6, 0)"
        "  kc = Gather<axis = 0>(p6, 1)  vc = Gather<axis = 0>(p6, 2)"
    )
    result = assert_fused(
        block(
            signature=signature,
            projected=projected,
            cached="",
            repeated="kr = Identity(kc)  vr = Identity(vc)",
            keep="",
            masked="s2 = Identity(s1)",
        ),
        cache=False,
    )
    assert result.sites[0].details["mask"] == "none"


# --- scale --------------------------------------------------------------------------------------

SCALES = {
    "mul": "s0 = MatMul(q, kt)  s1 = Mul(s0, 0.2236068)",
    "mul-first": "s0 = MatMul(q, kt)  s1 = Mul(0.2236068, s0)",
    "div": "s0 = MatMul(q, kt)  s1 = Div(s0, 4.4721360)",
    "on-q": "qs = Mul(q, 0.2236068)  s1 = MatMul(qs, kt)",
    "on-q-divided": "qs = Div(q, 4.4721360)  s1 = MatMul(qs, kt)",
    "on-k": "ks = Mul(kt, 0.2236068)  s1 = MatMul(q, ks)",
    "square-roots": "qs = Mul(q, 0.4728708)  ks = Mul(kt, 0.4728708)  s1 = MatMul(qs, ks)",
    "in-three-places": (
        "qs = Mul(q, 0.4472136)  ks = Div(kt, 4.0)  s0 = MatMul(qs, ks)  s1 = Mul(s0, 2.0)"
    ),
    "of-one-element": "s0 = MatMul(q, kt)  s1 = Mul(s0, [0.2236068])",
}


@pytest.mark.parametrize("name", SCALES)
def test_scales(name: str) -> None:
    scaled = f"kt = Transpose<perm = [0, 1, 3, 2]>(kr)  {SCALES[name]}"
    result = assert_fused(block(scaled=scaled))
    assert result.count("Mul") + result.count("Div") == 0


def test_without_a_scale() -> None:
    """T5."""
    scaled = "kt = Transpose<perm = [0, 1, 3, 2]>(kr)  s1 = MatMul(q, kt)"
    assert_fused(block(scaled=scaled), scale=1.0)


def test_a_scale_that_is_no_power_of_the_head_size() -> None:
    assert_fused(block(scaled=SCALED.replace("0.2236068", "0.31")), scale=0.31)


def test_key_transposed_in_a_detour() -> None:
    """torch dynamo: [B, H, T, D] -> [B*H, T, D] -> [B*H, D, T] -> [B, H, D, T]."""
    scaled = (
        "b0 = Shape<start = 0, end = 1>(x)  t0 = Shape<start = 2, end = 3>(kr)"
        "  f1 = Concat<axis = 0>([-1], t0, [20])  k1 = Reshape(kr, f1)"
        "  k2 = Transpose<perm = [0, 2, 1]>(k1)  f2 = Concat<axis = 0>(b0, [6, 20], t0)"
        "  kt = Reshape(k2, f2)  s0 = MatMul(q, kt)  s1 = Mul(s0, 0.2236068)"
    )
    assert_fused(block(scaled=scaled))


def test_softcap() -> None:
    """Gemma 2: 30 * tanh(scores / 30)."""
    masked = f"c1 = Div(s1, 30.0)  c2 = Tanh(c1)  s1c = Mul(c2, 30.0)  {MASKED}"
    result = assert_fused(block(masked=masked.replace("s1, -inf", "s1c, -inf")))
    assert attributes(result)["softcap"] == pytest.approx(30.0)
    assert result.count("Tanh") == 0


# --- masks --------------------------------------------------------------------------------------

MASKS = {
    "where": MASKED,
    "where-the-other-way": "drop = Not(keep)  s2 = Where(drop, -inf, s1)",
    "where-finite": "s2 = Where(keep, s1, -3.4028235e38)",
    "where-low": "s2 = Where(keep, s1, -100000.0)",
    "added": "z = Where(keep, 0.0, -inf)  s2 = Add(s1, z)",
    "added-first": "z = Where(keep, 0.0, -inf)  s2 = Add(z, s1)",
    "added-finite": "z = Where(keep, 0.0, -3.4028235e38)  s2 = Add(s1, z)",
    "added-inverted": "drop = Not(keep)  z = Where(drop, -inf, 0.0)  s2 = Add(s1, z)",
    "one-minus": (
        "kf = Cast<to = 1>(keep)  if = Sub(1.0, kf)  z = Mul(if, -3.4028235e38)  s2 = Add(s1, z)"
    ),
    "sliced": (
        "z = Where(keep, 0.0, -3.4028235e38)  zt = Shape<start = 2, end = 3>(kr)"
        "  zs = Slice(z, [0], zt, [3], [1])  s2 = Add(s1, zs)"
    ),
    "two-of-them": "s1a = Where(causal, s1, -inf)  s2 = Where(au, s1a, -inf)",
    "one-of-each": "s1a = Where(causal, s1, -inf)  z = Where(au, 0.0, -10000.0)  s2 = Add(s1a, z)",
    "padding-alone": "s2 = Where(au, s1, -inf)",
    "a-bias-for-each-head": (
        "di = Sub(cols, ru)  df = Cast<to = 1>(di)  d4 = Unsqueeze(df, [0, 1])"
        "  sp = Reshape([0.5, 0.35, 0.25, 0.18, 0.125, 0.09], [1, 6, 1, 1])  al = Mul(d4, sp)"
        "  s1a = Add(s1, al)  s2 = Where(keep, s1a, -inf)"
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    result = assert_fused(block(masked=MASKS[name]))
    assert result.sites[0].details["mask"] == "explicit"


def test_a_mask_of_lengths_alone() -> None:
    """No attention_mask: what is later is told by the lengths of the ids and of the past."""
    keep = (
        "pl = Shape<start = 2, end = 3>(past_k)  pp = Squeeze(pl, [0])"
        "  sl = Shape<start = 1, end = 2>(ids)  ss = Squeeze(sl, [0])  tt = Add(pp, ss)"
        "  cols = Range(0, tt, 1)  rows = Range(pp, tt, 1)  ru = Unsqueeze(rows, [1])"
        "  keep = LessOrEqual(cols, ru)"
    )
    signature = SIGNATURE.replace("int64[b,t] attention_mask, ", "")
    assert_fused(block(signature=signature, keep=keep))


def test_a_bool_mask_stays_bool() -> None:
    for name in ("where", "where-the-other-way", "added", "two-of-them"):
        result = assert_fused(block(masked=MASKS[name]))
        infos = {each.name: each for each in result.after.graph.value_info}
        mask = infos[result.node("Attention").input[3]]
        assert mask.type.tensor_type.elem_type == onnx.TensorProto.BOOL, name


def test_an_additive_mask_that_is_fed() -> None:
    signature = SIGNATURE.replace("int64[b,t] attention_mask", "float[b,1,s,t] bias")
    assert_fused(block(signature=signature, keep="", masked="s2 = Add(s1, bias)"))


def test_a_mask_that_is_read_for_its_length() -> None:
    assert_fused(block(masked="s2 = Where(causal, s1, -inf)"))


def test_a_mask_before_the_scale_is_scaled() -> None:
    signature = SIGNATURE.replace("int64[b,t] attention_mask", "float[b,1,s,t] bias")
    scaled = (
        "kt = Transpose<perm = [0, 1, 3, 2]>(kr)  s0 = MatMul(q, kt)  sm = Add(s0, bias)"
        "  s2 = Mul(sm, 0.2236068)"
    )
    assert_fused(block(signature=signature, keep="", scaled=scaled, masked=""))


def test_the_guard_against_nan() -> None:
    """torch dynamo: rows that are masked everywhere are zeros, as the operator makes them."""
    softmax = "p0 = Softmax<axis = -1>(s2)  na = IsNaN(p0)  p = Where(na, 0.0, p0)"
    result = assert_fused(block(softmax=softmax))
    assert result.count("IsNaN") == 0


def test_a_mask_for_batch_and_heads_together() -> None:
    weights = WEIGHTS.replace("<", "<float[12,5,5] bias, ")
    signature = f"(int64[2,5] ids) => (float[2,5,50] y) {weights}"
    scaled = (
        "s0 = Shape<start = 1, end = 2>(x)  f1 = Concat<axis = 0>([-1], s0, [20])"
        "  qm = Reshape(q, f1)  km = Reshape(kr, f1)  vm = Reshape(vr, f1)"
        "  kt = Transpose<perm = [0, 2, 1]>(km)  s3 = MatMul(qm, kt)  s1 = Mul(s3, 0.2236068)"
    )
    values = (
        "o3 = MatMul(p, vm)  b0 = Shape<start = 0, end = 1>(x)"
        "  f2 = Concat<axis = 0>(b0, [6], s0, [20])  o = Reshape(o3, f2)"
        "  ot = Transpose<perm = [0, 2, 1, 3]>(o)  om = Reshape(ot, [0, 0, 120])"
        "  y = MatMul(om, wo)"
    )
    text = block(
        signature=signature,
        cached="kc = Identity(k)  vc = Identity(v)",
        keep="",
        scaled=scaled,
        masked="s2 = Add(s1, bias)",
        values=values,
    )
    result = assert_fused(text, cache=False)
    assert shape_of(result, 3) == [2, 6, 5, 5]


def test_a_mask_that_differs_in_a_group() -> None:
    scaled = (
        "s0 = Shape<start = 1, end = 2>(x)  b0 = Shape<start = 0, end = 1>(x)"
        "  f1 = Concat<axis = 0>(b0, [3, 2], s0, [20])  q5 = Reshape(q, f1)"
        "  k5 = Unsqueeze(kc, [2])  v5 = Unsqueeze(vc, [2])"
        "  kt = Transpose<perm = [0, 1, 2, 4, 3]>(k5)  s3 = MatMul(q5, kt)"
        "  s1 = Mul(s3, 0.2236068)"
    )
    values = (
        "o5 = MatMul(p, v5)  f2 = Concat<axis = 0>(b0, [6], s0, [20])  o = Reshape(o5, f2)"
        "  ot = Transpose<perm = [0, 2, 1, 3]>(o)  om = Reshape(ot, [0, 0, 120])"
        "  y = MatMul(om, wo)"
    )
    masked = "k6 = Unsqueeze(keep, [1])  s1a = Add(s1, sp)  s2 = Where(k6, s1a, -inf)"
    signature = SIGNATURE.replace("<float[37,50]", "<float[2,1,1] sp, float[37,50]")
    text = block(signature=signature, repeated="", scaled=scaled, masked=masked, values=values)
    result = assert_fused(text)
    assert shape_of(result, 3)[1] == 6


# --- caches and layouts -------------------------------------------------------------------------


def test_no_cache() -> None:
    signature = f"(int64[b,t] ids, int64[b,t] attention_mask) => (float[b,t,50] y) {WEIGHTS}"
    cached = "kc = Identity(k)  vc = Identity(v)"
    assert_fused(block(signature=signature, cached=cached), cache=False)


def test_a_cache_with_heads_behind_the_sequence() -> None:
    """[B, P, K, D]: joined before it is transposed, and the presents are transposed back."""
    signature = SIGNATURE.replace("[b,3,p,20]", "[b,p,3,20]").replace("[b,3,t,20]", "[b,t,3,20]")
    cached = (
        "present_k = Concat<axis = 1>(past_k, k3)  present_v = Concat<axis = 1>(past_v, v3)"
        "  kc = Transpose<perm = [0, 2, 1, 3]>(present_k)"
        "  vc = Transpose<perm = [0, 2, 1, 3]>(present_v)"
    )
    result = assert_raised(block(signature=signature, cached=cached), None, "ATT001")
    node = result.node("Attention")
    made = {name: each for each in result.after.graph.node for name in each.output}
    assert [made[name].input[0] for name in node.input[4:6]] == ["past_k", "past_v"]
    assert [made[name].op_type for name in ("present_k", "present_v")] == ["Transpose"] * 2
    assert made["present_k"].input[0] == node.output[1]
    assert made["present_v"].input[0] == node.output[2]
    assert result.count("Concat") == 0


def test_merged_batch_and_heads() -> None:
    """bmm over [B*H, S, D]: three axes."""
    signature = f"(int64[b,s] ids) => (float[b,s,50] y) {WEIGHTS}"
    scaled = (
        "s0 = Shape<start = 1, end = 2>(x)  f1 = Concat<axis = 0>([-1], s0, [20])"
        "  qm = Reshape(q, f1)  km = Reshape(kr, f1)  vm = Reshape(vr, f1)"
        "  kt = Transpose<perm = [0, 2, 1]>(km)  s3 = MatMul(qm, kt)  s1 = Mul(s3, 0.2236068)"
    )
    values = (
        "o3 = MatMul(p, vm)  b0 = Shape<start = 0, end = 1>(x)"
        "  f2 = Concat<axis = 0>(b0, [6], s0, [20])  o = Reshape(o3, f2)"
        "  ot = Transpose<perm = [0, 2, 1, 3]>(o)  om = Reshape(ot, [0, 0, 120])"
        "  y = MatMul(om, wo)"
    )
    assert_fused(
        block(
            signature=signature,
            cached="kc = Identity(k)  vc = Identity(v)",
            keep="",
            scaled=scaled,
            masked="s2 = Identity(s1)",
            values=values,
        ),
        cache=False,
    )


def test_groups_with_an_axis_of_their_own() -> None:
    """[B, K, G, S, D] queries on [B, K, 1, T, D] keys: five axes."""
    scaled = (
        "s0 = Shape<start = 1, end = 2>(x)  b0 = Shape<start = 0, end = 1>(x)"
        "  f1 = Concat<axis = 0>(b0, [3, 2], s0, [20])  q5 = Reshape(q, f1)"
        "  k5 = Unsqueeze(kc, [2])  v5 = Unsqueeze(vc, [2])"
        "  kt = Transpose<perm = [0, 1, 2, 4, 3]>(k5)  s3 = MatMul(q5, kt)"
        "  s1 = Mul(s3, 0.2236068)"
    )
    values = (
        "o5 = MatMul(p, v5)  f2 = Concat<axis = 0>(b0, [6], s0, [20])  o = Reshape(o5, f2)"
        "  ot = Transpose<perm = [0, 2, 1, 3]>(o)  om = Reshape(ot, [0, 0, 120])"
        "  y = MatMul(om, wo)"
    )
    masked = "k6 = Unsqueeze(keep, [1])  s2 = Where(k6, s1, -inf)"
    result = assert_fused(block(repeated="", scaled=scaled, masked=masked, values=values))
    assert result.sites[0].details["kv_heads"] == 3


def test_cross_attention_keys_of_another_length() -> None:
    signature = (
        "(int64[b,s] ids, float[b,e,50] z) => (float[b,s,50] y)"
        " <float[37,50] table, float[50,120] wq, float[50,60] wk, float[50,60] wv, float[120,50] wo>"
    )
    projected = PROJECTED.replace("MatMul(x, wk)", "MatMul(z, wk)")
    projected = projected.replace("MatMul(x, wv)", "MatMul(z, wv)")
    assert_fused(
        block(
            signature=signature,
            projected=projected,
            cached="kc = Identity(k)  vc = Identity(v)",
            keep="",
            masked="s2 = Identity(s1)",
        ),
        cache=False,
    )


def test_half_precision_with_a_float_softmax() -> None:
    signature = SIGNATURE.replace("float[", "float16[")
    text = block(
        signature=signature,
        scaled=SCALED.replace("0.2236068", "0.2236068h"),
        masked=MASKED.replace("-inf", "-infh"),
        softmax="sw = Cast<to = 1>(s2)  pw = Softmax<axis = -1>(sw)  p = Cast<to = 10>(pw)",
    )
    result = assert_fused(text)
    assert attributes(result)["softmax_precision"] == onnx.TensorProto.FLOAT
    assert result.count("Cast") == 1  # of the mask


def test_half_precision() -> None:
    signature = SIGNATURE.replace("float[", "float16[")
    scaled, masked = SCALED.replace("68", "68h"), MASKED.replace("-inf", "-65504.0h")
    result = assert_fused(block(signature=signature, scaled=scaled, masked=masked))
    assert "softmax_precision" not in attributes(result)


# --- what is no attention -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        # a router
        "z = MatMul(x, wr)  p = Softmax<axis = -1>(z)  w, i = TopK<axis = -1>(p, [2])  y = Neg(w)",
        # a classifier
        "z = MatMul(x, wr)  y = Softmax<axis = -1>(z)",
        # a plain MLP
        "z = MatMul(x, wr)  g = Sigmoid(z)  h = Mul(z, g)  y = MatMul(h, wd)",
        # two matrices without a softmax between them
        "xt = Transpose<perm = [0, 2, 1]>(x)  z = MatMul(x, xt)  y = MatMul(z, x)",
    ],
)
def test_misses(body: str) -> None:
    assert_untouched(
        f"(float[b,s,50] x) => (float[b,s,u] y) <float[50,7] wr, float[7,50] wd> {{ {body} }}"
    )


# --- declines -----------------------------------------------------------------------------------

SCORES = {
    "something between": {"masked": f"s1b = Relu(s1)  {MASKED}".replace("s1, -inf", "s1b, -inf")},
    "something before the values": {"softmax": "p0 = Softmax<axis = -1>(s2)  p = Sqrt(p0)"},
    "activations added": {
        "masked": "w0 = MatMul(q, kt)  s1a = Add(s1, w0)  s2 = Where(keep, s1a, -inf)"
    },
    "a fill that masks nothing": {"masked": "s2 = Where(keep, s1, -3.0)"},
    "capped twice": {
        "masked": "c1 = Tanh(s1)  c2 = Mul(c1, 30.0)  c3 = Tanh(c2)  s1c = Mul(c3, 20.0)"
        "  s2 = Where(keep, s1c, -inf)"
    },
    "scaled behind the cap": {
        "masked": "c1 = Tanh(s1)  c2 = Mul(c1, 30.0)  c3 = Relu(c2)  s2 = Where(keep, c3, -inf)"
    },
    "another axis": {"softmax": "p = Softmax<axis = 2>(s2)"},
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_that_are_not_understood(name: str) -> None:
    decline = assert_kept(block(**SCORES[name]), "ATT001", "scores")
    assert decline.nodes


def test_probabilities_that_are_read_again() -> None:
    signature = SIGNATURE.replace("=> (float[b,s,50] y", "=> (float[b,6,s,t] p, float[b,s,50] y")
    assert_kept(block(signature=signature), "ATT001", "scores")


def test_heads_that_are_repeated_the_other_way() -> None:
    """Head 0 1 2 0 1 2: no head is shared by neighbours, so they stay repeated."""
    tiled = "kr = Tile(kc, [1, 2, 1, 1])  vr = Tile(vc, [1, 2, 1, 1])"
    result = assert_fused(block(repeated=tiled), cache=False)
    assert result.sites[0].details["kv_heads"] == 6


def test_values_that_are_scaled() -> None:
    decline = assert_kept(
        block(values=f"vr2 = Mul(vr, 0.5)  {VALUES}".replace("p, vr)", "p, vr2)")),
        "ATT001",
        "layout",
    )
    assert "scaled" in decline.reason


def test_keys_and_values_of_different_heads() -> None:
    signature = SIGNATURE.replace("[b,3,p,20] past_v", "[b,2,p,20] past_v")
    signature = signature.replace("[b,3,t,20] present_v", "[b,2,t,20] present_v")
    signature = signature.replace("float[50,60] wv", "float[50,40] wv")
    result = assert_fused(
        block(
            signature=signature,
            projected=PROJECTED.replace("vp, [0, 0, 3, 20]", "vp, [0, 0, 2, 20]"),
            repeated=REPEATED.replace("Expand(vu, [1, 1, 2, 1, 1])", "Expand(vu, [1, 1, 3, 1, 1])"),
        ),
        cache=False,
    )
    assert result.sites[0].details["kv_heads"] == 6


def test_one_key_head_and_a_value_head_for_each() -> None:
    signature = SIGNATURE.replace("[b,3,p,20] past_k", "[b,1,p,20] past_k")
    signature = signature.replace("[b,3,t,20] present_k", "[b,1,t,20] present_k")
    signature = signature.replace("float[50,60] wk", "float[50,20] wk")
    text = block(
        signature=signature,
        projected=PROJECTED.replace("kp, [0, 0, 3, 20]", "kp, [0, 0, 1, 20]"),
        repeated="kr = Identity(kc)" + REPEATED[REPEATED.index("  vu") :],
    )
    assert_kept(text, "ATT001", "groups")


def test_a_mask_before_the_cap() -> None:
    masked = "m0 = Where(keep, 0.0, -20.0)  s1a = Add(s1, m0)  c1 = Tanh(s1a)  s2 = Mul(c1, 30.0)"
    assert_kept(block(masked=masked), "ATT001", "cap-order")


def test_a_mask_of_unknown_rank() -> None:
    """Squeezed along an axis that is fed."""
    signature = SIGNATURE.replace(
        "int64[b,t] attention_mask", "int64[b,t] attention_mask, int64[1] which"
    )
    masked = (
        "w1 = Sub(which, which)  m0 = Where(keep, 0.0, -inf)  mu = Unsqueeze(m0, [0])"
        "  mz = Squeeze(mu, w1)  s2 = Add(s1, mz)"
    )
    assert_kept(block(signature=signature, masked=masked), "ATT001", "layout")


def test_a_mask_whose_rows_cannot_be_counted() -> None:
    """How many rows there are is fed; the padding mask has to be repeated for each."""
    signature = SIGNATURE.replace("int64[b,t] att", "int64[1] count, int64[b,t] att")
    projected = PROJECTED.replace(
        "x = Gather(table, ids)",
        "x = Gather(table, ids)  k2 = Sub(count, count)  k3 = Add(k2, 1)  xq = Slice(x, [0], k3, [1])",
    ).replace("MatMul(x, wq)", "MatMul(xq, wq)")
    projected = projected.replace("k3 = Add(k2, 1)", "kn = Add(k2, 1)").replace(
        "k3, [1])", "kn, [1])"
    )
    signature = signature.replace("float[b,s,50] y", "float[b,u,50] y")
    decline = assert_kept(
        block(signature=signature, projected=projected, masked="s2 = Where(au, s1, -inf)"),
        "ATT001",
        "mask",
    )
    assert "size" in decline.reason


# --- names --------------------------------------------------------------------------------------


def test_the_module_path_stays_and_what_was_replaced_is_recorded() -> None:
    model = parse(block())
    for node in model.graph.node:
        node.name = f"/model/layers.1/self_attn/{node.op_type}_{node.output[0]}"
    result = raised(model)
    node = result.node("Attention")
    props = {p.key: p.value for p in node.metadata_props}
    assert props["pkg.torch.onnx.name_scopes"] == "model.layers.1.self_attn"
    assert props["onnxgen.rule"] == "ATT001"
    replaced = props["onnxgen.replaced"].split(", ")
    assert "/model/layers.1/self_attn/Softmax_p" in replaced
    assert "/model/layers.1/self_attn/MatMul_s0" in replaced
    assert "/model/layers.1/self_attn/Concat_present_k" in replaced
    assert not [name for name in replaced if "MatMul_qp" in name]
    assert result.sites[0].replaced == len(replaced)
    assert node.name.startswith("model.layers.1.self_attn/Attention")
