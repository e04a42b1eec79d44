"""ATT001: scores viewed on their way, biases at any rank, and other spellings of one attention.

The blocks are those of test_attention: six query heads, three key/value heads, head size 20.
"""

from __future__ import annotations

import pytest

from onnxgen.analysis.masks import MaskFamily, read_mask
from onnxgen.analysis.sampling import Sampler
from tests.graphs import assert_kept, assert_raised, normalized, parse, runtime
from tests.test_attention import (
    SIGNATURE,
    VALUES,
    WEIGHTS,
    assert_fused,
    block,
)

SIZES = (
    "nb = Shape<start = 0, end = 1>(x)  ns = Shape<start = 1, end = 2>(x)"
    "  nt = Shape<start = 2, end = 3>(kr)"
)
# [B*H, S, T] from q and k with batch and heads merged.
MERGED = (
    f"{SIZES}  f1 = Concat<axis = 0>([-1], ns, [20])  f2 = Concat<axis = 0>([-1], nt, [20])"
    "  qm = Reshape(q, f1)  km = Reshape(kr, f2)  vm = Reshape(vr, f2)"
    "  kt = Transpose<perm = [0, 2, 1]>(km)  s3 = MatMul(qm, kt)  s3s = Mul(s3, 0.2236068)"
    "  to4 = Concat<axis = 0>(nb, [6], ns, nt)  to3 = Concat<axis = 0>([-1], ns, nt)"
)
MERGED_VALUES = (
    "p3 = Reshape(p, to3)  o3 = MatMul(p3, vm)  fo = Concat<axis = 0>(nb, [6], ns, [20])"
    "  o = Reshape(o3, fo)  ot = Transpose<perm = [0, 2, 1, 3]>(o)  om = Reshape(ot, [0, 0, 120])"
    "  y = MatMul(om, wo)"
)
SLOPES = "[0.5, 0.35, 0.25, 0.18, 0.125, 0.09]"
# ALiBi as bloom writes it: [B*H, 1, T], the positions of the keys times a slope for each head.
ALIBI = (
    "cs = CumSum(attention_mask, 1)  c1 = Sub(cs, 1)  c2 = Mul(c1, attention_mask)"
    "  cf = Cast<to = 1>(c2)  cu = Unsqueeze(cf, [1])"
    f"  sp = Reshape({SLOPES}, [6, 1])  ab = Mul(sp, cu)"
    "  tm = Shape<start = 1, end = 2>(attention_mask)  fa = Concat<axis = 0>([-1, 1], tm)"
    "  al = Reshape(ab, fa)"
)

VIEWED = {
    # bloom: baddbmm in three axes, the causal mask and the Softmax in four
    "alibi-in-three-axes": (
        f"{ALIBI}  s3a = Add(s3s, al)  s4 = Reshape(s3a, to4)  s2 = Where(keep, s4, -inf)",
        True,
    ),
    "mask-in-three-axes": (
        "kx = Expand(keep, to4)  kz = Reshape(kx, to3)  s3w = Where(kz, s3s, -inf)"
        "  s2 = Reshape(s3w, to4)",
        True,
    ),
    # fairseq: viewed to four axes for the mask, and back for the Softmax
    "there-and-back": (
        "s4 = Reshape(s3s, to4)  s4w = Where(keep, s4, -inf)  s2 = Reshape(s4w, to3)",
        False,
    ),
    # everything in a matrix of rows
    "in-two-axes": (
        "f5 = Concat<axis = 0>([-1], nt)  s4 = Reshape(s3s, to4)  s4w = Where(keep, s4, -inf)"
        "  s2 = Reshape(s4w, f5)",
        True,
    ),
}


@pytest.mark.parametrize("name", VIEWED)
def test_scores_that_are_viewed(name: str) -> None:
    masked, viewed_back = VIEWED[name]
    values = (
        MERGED_VALUES
        if viewed_back
        else MERGED_VALUES.replace("Reshape(p, to3)", "Cast<to = 1>(p)")
    )
    assert_fused(block(scaled=MERGED, masked=masked, values=values))


def test_grouped_scores_viewed_as_all_heads() -> None:
    """q [B, K, G, S, D] on k [B, K, 1, T, D], masked and summed up as [B, H, S, T]."""
    scaled = (
        f"{SIZES.replace('(kr)', '(kc)')}  f1 = Concat<axis = 0>(nb, [3, 2], ns, [20])"
        "  q5 = Reshape(q, f1)  k5 = Unsqueeze(kc, [2])  v5 = Unsqueeze(vc, [2])"
        "  kt = Transpose<perm = [0, 1, 2, 4, 3]>(k5)  s5 = MatMul(q5, kt)"
        "  s5s = Mul(s5, 0.2236068)  to4 = Concat<axis = 0>(nb, [6], ns, nt)"
        "  to5 = Concat<axis = 0>(nb, [3, 2], ns, nt)  s1 = Reshape(s5s, to4)"
    )
    values = (
        "p5 = Reshape(p, to5)  o5 = MatMul(p5, v5)  f2 = Concat<axis = 0>(nb, [6], ns, [20])"
        "  o = Reshape(o5, f2)  ot = Transpose<perm = [0, 2, 1, 3]>(o)"
        "  om = Reshape(ot, [0, 0, 120])  y = MatMul(om, wo)"
    )
    result = assert_fused(block(repeated="", scaled=scaled, values=values))
    assert result.sites[0].details["kv_heads"] == 3


def test_scores_grouped_above_and_repeated_below() -> None:
    """The keys are shared by an axis of groups, the values are repeated."""
    scaled = (
        f"{SIZES}  f1 = Concat<axis = 0>(nb, [3, 2], ns, [20])  q5 = Reshape(q, f1)"
        "  k5 = Unsqueeze(kc, [2])  kt = Transpose<perm = [0, 1, 2, 4, 3]>(k5)"
        "  s5 = MatMul(q5, kt)  s5s = Mul(s5, 0.2236068)"
        "  to4 = Concat<axis = 0>(nb, [6], ns, nt)  s1 = Reshape(s5s, to4)"
    )
    assert_fused(block(scaled=scaled))


def test_heads_that_change_places_on_the_way() -> None:
    """Scores of [B, K, G, S, T] read as if G were outside: other values for each query."""
    scaled = (
        f"{SIZES}  f1 = Concat<axis = 0>(nb, [3, 2], ns, [20])  q5 = Reshape(q, f1)"
        "  k5 = Unsqueeze(kc, [2])  kt = Transpose<perm = [0, 1, 2, 4, 3]>(k5)"
        "  s5 = MatMul(q5, kt)  s5s = Mul(s5, 0.2236068)"
        "  s5t = Transpose<perm = [0, 2, 1, 3, 4]>(s5s)"
        "  to4 = Concat<axis = 0>(nb, [6], ns, nt)  s1 = Reshape(s5t, to4)"
    )
    assert_kept(block(scaled=scaled), "ATT001", "layout")


def test_scores_that_a_mask_repeats_for_a_batch() -> None:
    signature = SIGNATURE.replace("int64[b,s] ids", "int64[1,s] ids").replace("b,3,p", "1,3,p")
    signature = signature.replace("b,3,t", "1,3,t")
    decline = assert_kept(block(signature=signature), "ATT001", "layout")
    assert "batches" in decline.reason


# --- shifts and biases --------------------------------------------------------------------------

BIASES = {
    "subtracted": "z = Where(keep, 0.0, 10000.0)  s2 = Sub(s1, z)",
    "shifted-by-the-largest": (
        "s1m = Where(keep, s1, -1e30)  mx = ReduceMax<keepdims = 1>(s1m, [-1])  s2 = Sub(s1m, mx)"
    ),
    "shifted-by-each-query": "qb = MatMul(q, wb)  s1a = Add(s1, qb)  s2 = Where(keep, s1a, -inf)",
    "computed-from-the-queries": (
        "qb = MatMul(q, wt)  s1a = Add(s1, qb)  s2 = Where(keep, s1a, -inf)"
    ),
    "computed-and-scaled": (
        "qb = MatMul(q, wt)  s0a = Add(qb, s0)  s1a = Mul(s0a, 0.2236068)"
        "  s2 = Where(keep, s1a, -inf)"
    ),
    "a-spread-fill": "tk = Shape(s1)  fl = Expand(-inf, tk)  s2 = Where(keep, s1, fl)",
    "a-filled-tensor": (
        "tk = Shape(keep)  zf = ConstantOfShape(tk)  fl = Expand(-inf, tk)"
        "  z = Where(keep, zf, fl)  s2 = Add(s1, z)"
    ),
}


@pytest.mark.parametrize("name", BIASES)
def test_biases(name: str) -> None:
    weights = {"qb = MatMul(q, wb)": "float[20,1] wb, ", "qb = MatMul(q, wt)": "float[20,1] wt, "}
    extra = next((text for start, text in weights.items() if start in BIASES[name]), "")
    body = BIASES[name]
    if "wt)" in body:  # a bias for each key: from the keys' own projection
        body = body.replace(
            "qb = MatMul(q, wt)", "kb = MatMul(kr, wt)  qb = Transpose<perm = [0, 1, 3, 2]>(kb)"
        )
    signature = SIGNATURE.replace("<float[37,50]", f"<{extra}float[37,50]")
    assert_fused(block(signature=signature, masked=body), cache="wt)" not in body)


# --- ALiBi --------------------------------------------------------------------------------------


def family(mask: str, *, opset: int = 20) -> MaskFamily:
    """What the value `m` of a graph over ids, attention_mask and a cache means."""
    text = f"{SIGNATURE} {{ {block_of(mask)} }}"
    model, roles = normalized(parse(text, opset=opset))
    sampler = Sampler(model.graph, roles, runtime())
    (value,) = [out for node in model.graph for out in node.outputs if out.name == "m"]
    return read_mask(value, sampler)


def block_of(mask: str) -> str:
    whole = block(masked=f"{mask}  s2 = Add(s1, m)")
    return whole[whole.index("{") + 1 : whole.rindex("}")]


SLOPED = f"sp = Reshape({SLOPES}, [1, 6, 1, 1])  cf = Cast<to = 1>(cols)"


def test_alibi_is_named() -> None:
    found = family(
        f"{SLOPED}  al = Mul(sp, cf)  z = Where(keep, 0.0, -3.4028235e38)  m = Add(al, z)"
    )
    assert str(found) == "causal, key padding, alibi"
    assert found.slopes == pytest.approx((0.5, 0.35, 0.25, 0.18, 0.125, 0.09), rel=1e-4)


def test_alibi_from_distances() -> None:
    found = family(
        f"{SLOPED}  di = Sub(cols, ru)  df = Cast<to = 1>(di)  al = Mul(sp, df)"
        "  m = Where(keep, al, -inf)"
    )
    assert str(found) == "causal, key padding, alibi"


@pytest.mark.parametrize(
    "bias",
    [
        "di = Sub(cols, ru)  df = Cast<to = 1>(di)  sq = Mul(df, df)  al = Mul(sp, sq)",
        "ra = Cast<to = 1>(ru)  rc = Mul(ra, cf)  al = Mul(sp, rc)",
        "bu = Equal(cols, 5000)  bf = Cast<to = 1>(bu)  bs = Add(bf, cf)  al = Mul(sp, bs)",
    ],
)
def test_biases_that_are_no_alibi(bias: str) -> None:
    """No line, another slope for each row, a line with one bump."""
    assert family(f"{SLOPED}  {bias}  m = Where(keep, al, -inf)").kind == "general"


def test_a_mask_that_differs_from_head_to_head() -> None:
    found = family(
        f"{SLOPED}  lo = Greater(cf, 3.0)  li = And(lo, keep)  s6 = Greater(sp, 0.2)"
        "  ok = Or(li, s6)  m = Where(ok, 0.0, -inf)"
    )
    assert (found.kind, found.slopes) == ("general", ())


# --- shared caches ------------------------------------------------------------------------------


def test_two_layers_on_one_cache() -> None:
    """Gemma 3n: a later layer attends to the keys and values of an earlier one."""
    again = VALUES.replace("y = ", "h = ") + (
        "  q2p = MatMul(h, wq)  q23 = Reshape(q2p, [0, 0, 6, 20])"
        "  q2 = Transpose<perm = [0, 2, 1, 3]>(q23)  a0 = MatMul(q2, kt)  a1 = Mul(a0, 0.2236068)"
        "  a2 = Where(keep, a1, -inf)  a3 = Softmax<axis = -1>(a2)  a4 = MatMul(a3, vr)"
        "  a5 = Transpose<perm = [0, 2, 1, 3]>(a4)  a6 = Reshape(a5, [0, 0, 120])"
        "  y = MatMul(a6, wo)"
    )
    result = assert_raised(block(values=again), None, "ATT001", "ATT001")
    first, second = [node for node in result.after.graph.node if node.op_type == "Attention"]
    assert list(first.input[4:]) == ["past_k", "past_v"]
    assert list(second.input[1:3]) == list(first.output[1:3])
    assert len(second.output) == 1
    assert [site.details["cache"] for site in result.sites] == ["concatenated", "shared"]


# --- Einsum -------------------------------------------------------------------------------------

GROUPED = (
    f"{SIZES.replace('(kr)', '(kc)')}  f1 = Concat<axis = 0>(nb, ns, [3, 2, 20])"
    "  q5 = Reshape(qp, f1)"
)
EINSUMS = {
    "heads": (
        'ez = Einsum<equation = "bhsd,bhtd->bhst">(q, kr)  s1 = Mul(ez, 0.2236068)',
        'o = Einsum<equation = "bhst,bhtd->bhsd">(p, vr)  ot = Transpose<perm = [0, 2, 1, 3]>(o)',
    ),
    "heads-behind": (
        "kb = Transpose<perm = [0, 2, 1, 3]>(kr)"
        '  ez = Einsum<equation = "bshd,bthd->bhst">(q3, kb)  s1 = Mul(ez, 0.2236068)',
        'vb = Transpose<perm = [0, 2, 1, 3]>(vr)  ot = Einsum<equation = "bhst,bthd->bshd">(p, vb)',
    ),
    "keys-first": (
        'ez = Einsum<equation = "bhtd,bhsd->bhst">(kr, q)  s1 = Mul(ez, 0.2236068)',
        'ot = Einsum<equation = "bhtd,bhst->bshd">(vr, p)',
    ),
    "ellipsis": (
        'ez = Einsum<equation = "...sd,...td->...st">(q, kr)  s1 = Mul(ez, 0.2236068)',
        'o = Einsum<equation = "...st,...td->...sd">(p, vr)  ot = Transpose<perm = [0, 2, 1, 3]>(o)',
    ),
    "groups": (
        f'{GROUPED}  ez = Einsum<equation = "bskgd,bktd->bkgst">(q5, kc)'
        "  sm = Mul(ez, 0.2236068)  to4 = Concat<axis = 0>(nb, [6], ns, nt)  s1 = Reshape(sm, to4)",
        "to5 = Concat<axis = 0>(nb, [3, 2], ns, nt)  p5 = Reshape(p, to5)"
        '  ot = Einsum<equation = "bkgst,bktd->bskgd">(p5, vc)',
    ),
}


@pytest.mark.parametrize("name", EINSUMS)
def test_einsums(name: str) -> None:
    scaled, product = EINSUMS[name]
    values = f"{product}  om = Reshape(ot, [0, 0, 120])  y = MatMul(om, wo)"
    result = assert_fused(block(scaled=scaled, values=values))
    assert result.sites[0].details["kv_heads"] == 3


# --- repeats, caches, projections ---------------------------------------------------------------

REPEATS = {
    "concat-of-itself": (
        "ku = Unsqueeze(kc, [2])  ke = Concat<axis = 2>(ku, ku)  kr = Reshape(ke, [0, 6, -1, 20])"
        "  vu = Unsqueeze(vc, [2])  ve = Concat<axis = 2>(vu, vu)  vr = Reshape(ve, [0, 6, -1, 20])"
    ),
    "tile-of-a-merged-axis": (
        "kz = Reshape(kc, [0, 3, -1])  ku = Unsqueeze(kz, [2])  ke = Tile(ku, [1, 1, 2, 1])"
        "  kr = Reshape(ke, [0, 6, -1, 20])  vz = Reshape(vc, [0, 3, -1])  vu = Unsqueeze(vz, [2])"
        "  ve = Tile(vu, [1, 1, 2, 1])  vr = Reshape(ve, [0, 6, -1, 20])"
    ),
    "gather-of-a-new-axis": (
        "ku = Unsqueeze(kc, [2])  ke = Gather<axis = 2>(ku, [0, 0])  kr = Reshape(ke, [0, 6, -1, 20])"
        "  vu = Unsqueeze(vc, [2])  ve = Gather<axis = 2>(vu, [0, 0])  vr = Reshape(ve, [0, 6, -1, 20])"
    ),
}


@pytest.mark.parametrize("name", REPEATS)
def test_repeats(name: str) -> None:
    result = assert_fused(block(repeated=REPEATS[name]))
    assert result.sites[0].details["kv_heads"] == 3


def test_keys_stored_transposed() -> None:
    """[B, K, D, P]: older GPT-2 and Bloom exports."""
    signature = SIGNATURE.replace("float[b,3,p,20] past_k", "float[b,3,20,p] past_k")
    signature = signature.replace("float[b,3,t,20] present_k", "float[b,3,20,t] present_k")
    cached = (
        "kx = Transpose<perm = [0, 1, 3, 2]>(k)  present_k = Concat<axis = 3>(past_k, kx)"
        "  present_v = Concat<axis = 2>(past_v, v)  vc = Identity(present_v)"
    )
    repeated = (
        "ku = Unsqueeze(present_k, [2])  ke = Expand(ku, [1, 1, 2, 1, 1])"
        "  kt = Reshape(ke, [0, 6, 20, -1])  vu = Unsqueeze(vc, [2])"
        "  ve = Expand(vu, [1, 1, 2, 1, 1])  vr = Reshape(ve, [0, 6, -1, 20])"
    )
    scaled = "s0 = MatMul(q, kt)  s1 = Mul(s0, 0.2236068)"
    result = assert_raised(
        block(signature=signature, cached=cached, repeated=repeated, scaled=scaled), None, "ATT001"
    )
    assert result.sites[0].details["cache"] == "concatenated"


def test_cached_keys_of_an_encoder() -> None:
    signature = (
        "(int64[b,s] ids, float[b,3,e,20] cross_k, float[b,3,e,20] cross_v) => (float[b,s,50] y)"
        f" {WEIGHTS}"
    )
    text = block(
        signature=signature,
        projected=(
            "x = Gather(table, ids)  qp = MatMul(x, wq)  q3 = Reshape(qp, [0, 0, 6, 20])"
            "  q = Transpose<perm = [0, 2, 1, 3]>(q3)"
        ),
        cached="kc = Identity(cross_k)  vc = Identity(cross_v)",
        keep="",
        masked="s2 = Identity(s1)",
    ).replace(", float[50,60] wk, float[50,60] wv", "")
    result = assert_fused(text, cache=False)
    assert list(result.node("Attention").input[1:3]) == ["cross_k", "cross_v"]


PACKED = (
    "(int64[b,s] ids) => (float[b,s,50] y) <float[37,50] table, float[50,360] w, float[120,50] wo>"
)
PROJECTIONS = {
    # gpt_neox, bloom: [H, 3, D] or [H, 3*D] in each head
    "interleaved": (
        "p5 = Reshape(pk, [0, 0, 6, 60])  p6 = Transpose<perm = [0, 2, 1, 3]>(p5)"
        "  q = Slice(p6, [0], [20], [3])  kc = Slice(p6, [20], [40], [3])  vc = Slice(p6, [40], [60], [3])"
    ),
    "interleaved-gathered": (
        "p5 = Reshape(pk, [0, 0, 6, 3, 20])  qg = Gather<axis = 3>(p5, 0)  kg = Gather<axis = 3>(p5, 1)"
        "  vg = Gather<axis = 3>(p5, 2)  q = Transpose<perm = [0, 2, 1, 3]>(qg)"
        "  kc = Transpose<perm = [0, 2, 1, 3]>(kg)  vc = Transpose<perm = [0, 2, 1, 3]>(vg)"
    ),
    "split-by-heads": (
        "p5 = Reshape(pk, [0, 0, 18, 20])  p6 = Transpose<perm = [0, 2, 1, 3]>(p5)"
        "  q, kc, vc = Split<axis = 1>(p6, [6, 6, 6])"
    ),
    "split-and-squeezed": (
        "p5 = Reshape(pk, [0, 0, 3, 6, 20])  p6 = Transpose<perm = [2, 0, 3, 1, 4]>(p5)"
        "  qg, kg, vg = Split<axis = 0, num_outputs = 3>(p6)  q = Squeeze(qg, [0])"
        "  kc = Squeeze(kg, [0])  vc = Squeeze(vg, [0])"
    ),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_packed_projections(name: str) -> None:
    text = block(
        signature=PACKED,
        projected=f"x = Gather(table, ids)  pk = MatMul(x, w)  {PROJECTIONS[name]}",
        cached="",
        repeated="kr = Identity(kc)  vr = Identity(vc)",
        keep="",
        masked="s2 = Identity(s1)",
    )
    assert assert_fused(text, cache=False).sites[0].details["kv_heads"] == 6


def test_gemm_and_conv1d_projections() -> None:
    """GPT-2: a Gemm over [B*S, E], split."""
    projected = (
        "x = Gather(table, ids)  xf = Reshape(x, [-1, 50])  gf = Gemm(xf, w, bias)"
        "  xs = Shape<start = 0, end = 2>(x)  gs = Concat<axis = 0>(xs, [360])  pk = Reshape(gf, gs)"
        "  qp, kp, vp = Split<axis = 2>(pk, [120, 120, 120])  q3 = Reshape(qp, [0, 0, 6, 20])"
        "  k3 = Reshape(kp, [0, 0, 6, 20])  v3 = Reshape(vp, [0, 0, 6, 20])"
        "  q = Transpose<perm = [0, 2, 1, 3]>(q3)  kc = Transpose<perm = [0, 2, 1, 3]>(k3)"
        "  vc = Transpose<perm = [0, 2, 1, 3]>(v3)"
    )
    text = block(
        signature=PACKED.replace("float[50,360] w", "float[50,360] w, float[360] bias"),
        projected=projected,
        cached="",
        repeated="kr = Identity(kc)  vr = Identity(vc)",
        keep="",
        masked="s2 = Identity(s1)",
    )
    assert_fused(text, cache=False)


QUANTIZED = (
    "<float[37,50] table, uint8[50,120] wq, uint8[50,60] wk, uint8[50,60] wv, uint8[120,50] wo>"
)


def test_weights_that_are_dequantized() -> None:
    words = []
    for name in ("wq", "wk", "wv", "wo"):
        words.append(f"{name}d = DequantizeLinear({name}, 0.01, zero)")
    signature = SIGNATURE.replace(WEIGHTS, QUANTIZED.replace("<", "<uint8 zero, ", 1))
    text = block(signature=signature)
    for name in ("wq", "wk", "wv", "wo"):
        text = text.replace(f", {name})", f", {name}d)")
    text = text.replace("x = Gather", "  ".join(words) + "  x = Gather", 1)
    assert_fused(text)


# --- scale and precision ------------------------------------------------------------------------

SCALES = {
    "root-of-a-constant": "s0 = MatMul(q, kt)  rt = Sqrt(20.0)  s1 = Div(s0, rt)",
    "root-of-the-size": (
        "s0 = MatMul(q, kt)  sz = Shape<start = 3, end = 4>(q)  sf = Cast<to = 1>(sz)"
        "  rt = Sqrt(sf)  s1 = Div(s0, rt)"
    ),
    "power-of-the-size": (
        "s0 = MatMul(q, kt)  sz = Shape<start = 3, end = 4>(q)  sf = Cast<to = 1>(sz)"
        "  rt = Pow(sf, -0.5)  s1 = Mul(s0, rt)"
    ),
    "root-of-the-root": (
        "rt = Sqrt(20.0)  iv = Div(1.0, rt)  rr = Sqrt(iv)  qs = Mul(q, rr)  ks = Mul(kt, rr)"
        "  s1 = MatMul(qs, ks)"
    ),
}


@pytest.mark.parametrize("name", SCALES)
def test_scales(name: str) -> None:
    assert_fused(block(scaled=f"kt = Transpose<perm = [0, 1, 3, 2]>(kr)  {SCALES[name]}"))


def test_half_precision_with_scores_in_float() -> None:
    """Queries and keys are widened before they are multiplied."""
    signature = SIGNATURE.replace("float[", "float16[")
    scaled = (
        "qw = Cast<to = 1>(q)  kw = Cast<to = 1>(kr)  kt = Transpose<perm = [0, 1, 3, 2]>(kw)"
        "  s0 = MatMul(qw, kt)  s1 = Mul(s0, 0.2236068)"
    )
    softmax = "pw = Softmax<axis = -1>(s2)  p = Cast<to = 10>(pw)"
    assert_fused(block(signature=signature, scaled=scaled, softmax=softmax), cache=False)


# --- the Softmax and what follows ---------------------------------------------------------------

SOFTMAXES = {
    "guarded-the-other-way": (
        "p0 = Softmax<axis = -1>(s2)  na = IsNaN(p0)  nn = Not(na)  p = Where(nn, p0, 0.0)"
    ),
    "guarded-with-a-spread-zero": (
        "p0 = Softmax<axis = -1>(s2)  na = IsNaN(p0)  sh = Shape(p0)  zz = Expand(0.0, sh)"
        "  p = Where(na, zz, p0)"
    ),
    "masked-again": "p0 = Softmax<axis = -1>(s2)  p = Where(keep, p0, 0.0)",
    "masked-again-inverted": (
        "p0 = Softmax<axis = -1>(s2)  go = Not(keep)  p = Where(go, 0.0, p0)"
    ),
    "written-out": (
        "mx = ReduceMax<keepdims = 1>(s2, [-1])  sh = Sub(s2, mx)  ex = Exp(sh)"
        "  su = ReduceSum<keepdims = 1>(ex, [-1])  p = Div(ex, su)"
    ),
    "written-out-by-the-inverse": (
        "mx = ReduceMax<keepdims = 1>(s2, [3])  sh = Sub(s2, mx)  ex = Exp(sh)"
        "  su = ReduceSum<keepdims = 1>(ex, [3])  iv = Reciprocal(su)  p = Mul(ex, iv)"
    ),
    "by-its-logarithm": "lp = LogSoftmax<axis = -1>(s2)  p = Exp(lp)",
    "dropout": "p0 = Softmax<axis = -1>(s2)  p, gone = Dropout(p0, 0.1)",
    "a-positive-axis": "p = Softmax<axis = 3>(s2)",
}


@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmaxes(name: str) -> None:
    assert_fused(block(softmax=SOFTMAXES[name]))


def test_masked_again_by_another_mask() -> None:
    """Probabilities of keys that were seen are dropped: what is left does not add up to one."""
    softmax = (
        "p0 = Softmax<axis = -1>(s2)  od = Mod(cols, 2)  oz = Equal(od, 0)  p = Where(oz, p0, 0.0)"
    )
    assert_kept(block(softmax=softmax), "ATT001", "scores")


def test_probabilities_times_a_mask() -> None:
    softmax = "p0 = Softmax<axis = -1>(s2)  kf = Cast<to = 1>(causal)  p = Mul(p0, kf)"
    assert_kept(block(softmax=softmax), "ATT001", "scores")


MASKINGS = {
    # GPT-2 of old: the scores are multiplied by the mask, and what it hides lowered
    "multiplied": (
        "kf = Cast<to = 1>(keep)  sm = Mul(s1, kf)  iv = Sub(1.0, kf)  lo = Mul(iv, -10000.0)"
        "  s2 = Add(sm, lo)"
    ),
    "multiplied-and-subtracted": (
        "kf = Cast<to = 1>(keep)  sm = Mul(s1, kf)  iv = Sub(1.0, kf)  lo = Mul(iv, 10000.0)"
        "  s2 = Sub(sm, lo)"
    ),
    # XGLM, OPT: never lower than the lowest number
    "clamped": (
        "z = Where(keep, 0.0, -3.4028235e38)  sa = Add(s1, z)  s2 = Max(sa, -3.4028235e38)"
    ),
}


@pytest.mark.parametrize("name", MASKINGS)
def test_maskings(name: str) -> None:
    assert_fused(block(masked=MASKINGS[name]))


@pytest.mark.parametrize(
    "masked",
    [
        # lowered by another mask than the one they are multiplied by
        "kf = Cast<to = 1>(keep)  cz = Cast<to = 1>(causal)  sm = Mul(s1, kf)  iv = Sub(1.0, cz)"
        "  lo = Mul(iv, -10000.0)  s2 = Add(sm, lo)",
        # not low enough to hide what is seen at 0
        "kf = Cast<to = 1>(keep)  sm = Mul(s1, kf)  iv = Sub(1.0, kf)  lo = Mul(iv, -5.0)"
        "  s2 = Add(sm, lo)",
        # numbers, not flags
        "kf = Cast<to = 1>(attention_mask)  kz = Unsqueeze(kf, [1, 2])  sm = Mul(s1, kz)"
        "  iv = Sub(1.0, kz)  lo = Mul(iv, -10000.0)  s2 = Add(sm, lo)",
        # a floor that is reached
        "z = Where(keep, 0.0, -3.4028235e38)  sa = Add(s1, z)  s2 = Max(sa, -2.0)",
    ],
)
def test_maskings_that_are_kept(masked: str) -> None:
    assert_kept(block(masked=masked), "ATT001", "scores")


def test_weights_of_four_bits() -> None:
    """MatMulNBits makes activations, and its output has a known size."""
    signature = SIGNATURE.replace("float[50,120] wq", "uint8[120,2,16] wq, float[240] scales")
    text = block(signature=signature).replace(
        "qp = MatMul(x, wq)",
        "qp = com.microsoft.MatMulNBits<K = 50, N = 120, bits = 4, block_size = 32>(x, wq, scales)",
    )
    imports = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g '
    assert_fused(imports + text)
