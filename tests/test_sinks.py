"""ATT001 with sinks: a column joined to the scores and dropped from the probabilities.

The blocks are those of test_attention: six query heads, three key/value heads, head size 20.
"""

from __future__ import annotations

import onnx
import pytest
from onnx import helper

from onnxgen.analysis.masks import mask_families
from onnxgen.analysis.sampling import Sampler
from tests.graphs import Raised, assert_kept, assert_raised, normalized, raised, runtime
from tests.test_attention import MASKED, SCALE, SCALED, SIGNATURE, SOFTMAX, block
from tests.test_attention_spellings import MERGED, MERGED_VALUES

SINKS = "[0.9, -0.4, 0.3, 1.7, -1.1, 0.2]"
SIZES = "nb = Shape<start = 0, end = 1>(x)  ns = Shape<start = 1, end = 2>(x)"
COLUMN = (
    f"{SIZES}  si = Reshape({SINKS}, [1, 6, 1, 1])  to = Concat<axis = 0>(nb, [6], ns, [1])"
    "  co = Expand(si, to)"
)
JOINED = "jo = Concat<axis = -1>(s2, co)"
SHIFTED = "mx = ReduceMax<keepdims = 1>(jo, [-1])  sh = Sub(jo, mx)"
DROPPED = "p = Slice(pc, [0], [-1], [3])"
# How gpt-oss is written: shifted by the largest, the last column dropped.
GPT_OSS = f"{COLUMN}  {JOINED}  {SHIFTED}  pc = Softmax<axis = -1>(sh)  {DROPPED}"

SPELLINGS = {
    "gpt-oss": GPT_OSS,
    "not-shifted": f"{COLUMN}  {JOINED}  pc = Softmax<axis = -1>(jo)  {DROPPED}",
    "sinks-first": (
        f"{COLUMN}  jo = Concat<axis = 3>(co, s2)  {SHIFTED}  pc = Softmax<axis = -1>(sh)"
        "  te = Shape<start = 3, end = 4>(jo)  p = Slice(pc, [1], te, [-1])"
    ),
    "to-the-end": (
        f"{COLUMN}  jo = Concat<axis = -1>(co, s2)  pc = Softmax<axis = -1>(jo)"
        "  p = Slice(pc, [1], [9223372036854775807], [3])"
    ),
    "by-length": (
        f"{COLUMN}  {JOINED}  pc = Softmax<axis = -1>(jo)  te = Shape<start = 3, end = 4>(s2)"
        "  p = Slice(pc, [0], te, [3])"
    ),
    "split": (
        f"{COLUMN}  {JOINED}  pc = Softmax<axis = -1>(jo)  te = Shape<start = 3, end = 4>(s2)"
        "  le = Concat<axis = 0>(te, [1])  p, gone = Split<axis = 3>(pc, le)"
    ),
    "split-first": (
        f"{COLUMN}  jo = Concat<axis = -1>(co, s2)  pc = Softmax<axis = -1>(jo)"
        "  te = Shape<start = 3, end = 4>(s2)  le = Concat<axis = 0>([1], te)"
        "  gone, p = Split<axis = 3>(pc, le)"
    ),
    "guarded": (
        f"{COLUMN}  {JOINED}  p0 = Softmax<axis = -1>(jo)  na = IsNaN(p0)"
        f"  pc = Where(na, 0.0, p0)  {DROPPED}"
    ),
    "of-a-weight": GPT_OSS.replace(SINKS, "sinks"),
    "computed": GPT_OSS.replace(
        f"si = Reshape({SINKS}, [1, 6, 1, 1])",
        "sx = Mul(sinks, sinks)  si = Reshape(sx, [6, 1, 1])",
    ),
    "one-for-all-heads": GPT_OSS.replace(f"Reshape({SINKS}, [1, 6, 1, 1])", "Identity([0.7])"),
    # softmax1: exp(x) / (1 + sum(exp(x)))
    "zeros": (
        f"{SIZES}  to = Concat<axis = 0>(nb, [6], ns, [1])  co = Expand(0.0, to)"
        f"  {JOINED}  pc = Softmax<axis = -1>(jo)  {DROPPED}"
    ),
}


def assert_fused(text: str | onnx.ModelProto, overload: str = "bool_cache") -> Raised:
    result = assert_raised(text, None, "ATT001")
    assert (result.count("Softmax"), result.count("Attention")) == (0, 0)
    node = result.node("SinkAttention")
    assert (node.domain, node.overload) == ("onnxgen", overload)
    assert helper.get_node_attr_value(node, "scale") == pytest.approx(SCALE, rel=2e-4)
    details = result.sites[0].details
    assert (result.sites[0].kind, details["sinks"]) == ("attention", "one a head")
    if "cache" in overload:
        assert list(node.input[4:6]) == ["past_k", "past_v"]
        assert list(node.output[1:]) == ["present_k", "present_v"]
    assert [(each.name, each.overload) for each in result.after.functions] == [
        ("SinkAttention", overload)
    ]
    return result


def with_weight(text: str) -> str:
    named = "sinks," in text or "Mul(sinks" in text
    return (
        SIGNATURE.replace("<float[37,50]", "<float[6] sinks, float[37,50]") if named else SIGNATURE
    )


@pytest.mark.parametrize("name", SPELLINGS)
def test_sinks(name: str) -> None:
    softmax = SPELLINGS[name]
    result = assert_fused(block(softmax=softmax, signature=with_weight(softmax)))
    sinks = result.node("SinkAttention").input[6]
    constants = {
        each.name: onnx.numpy_helper.to_array(each) for each in result.after.graph.initializer
    }
    if SINKS in softmax:
        assert constants[sinks].tolist() == pytest.approx([0.9, -0.4, 0.3, 1.7, -1.1, 0.2])
    if name in ("zeros", "one-for-all-heads"):
        assert constants[sinks].tolist() == [pytest.approx(0.0 if name == "zeros" else 0.7)] * 6


def test_without_a_mask_and_a_cache() -> None:
    signature = (
        "(int64[b,s] ids) => (float[b,s,50] y) <float[37,50] table, float[50,120] wq,"
        " float[50,60] wk, float[50,60] wv, float[120,50] wo>"
    )
    text = block(
        signature=signature,
        cached="kc = Identity(k)  vc = Identity(v)",
        keep="",
        masked="s2 = Identity(s1)",
        softmax=GPT_OSS,
    )
    result = assert_fused(text, overload="")
    assert len(result.node("SinkAttention").output) == 1


def test_with_an_additive_mask_and_a_cap() -> None:
    masked = (
        "c1 = Div(s1, 30.0)  c2 = Tanh(c1)  s1c = Mul(c2, 30.0)"
        "  z = Where(keep, 0.0, -3.4028235e38)  s2 = Add(s1c, z)"
    )
    assert_fused(block(masked=masked, softmax=GPT_OSS), overload="bias_cache_cap")


def test_half_precision_with_a_float_softmax() -> None:
    softmax = GPT_OSS.replace("[0.9, -0.4", "[0.9h, -0.4h").replace(
        "pc = Softmax<axis = -1>(sh)",
        "sw = Cast<to = 1>(sh)  pw = Softmax<axis = -1>(sw)  pc = Cast<to = 10>(pw)",
    )
    text = block(
        signature=SIGNATURE.replace("float[", "float16["),
        scaled=SCALED.replace("0.2236068", "0.2236068h"),
        masked=MASKED.replace("-inf", "-infh"),
        softmax=softmax,
    )
    assert_fused(text, overload="bool_cache_float")


def test_scores_in_three_axes() -> None:
    """Sinks for each row of [B*H, S, T]."""
    softmax = (
        f"{COLUMN}  s3v = Reshape(s2, to3)  to3s = Concat<axis = 0>([-1], ns, [1])"
        "  c3 = Reshape(co, to3s)  jo = Concat<axis = -1>(s3v, c3)  pc = Softmax<axis = -1>(jo)"
        "  p = Slice(pc, [0], [-1], [2])"
    ).replace(SIZES, "")
    text = block(
        scaled=MERGED,
        masked="s4 = Reshape(s3s, to4)  s2 = Where(keep, s4, -inf)",
        softmax=softmax,
        values=MERGED_VALUES.replace("p3 = Reshape(p, to3)", "p3 = Identity(p)"),
    )
    decline = assert_kept(text, "ATT001", "sinks")
    assert "row to row" in decline.reason


def test_the_mask_is_named() -> None:
    model, roles = normalized(raised(block(softmax=GPT_OSS)).after)
    families = mask_families(model.graph, Sampler(model.graph, roles, runtime()))
    assert [str(each) for each in families.values()] == ["causal, key padding"]


# --- declines -----------------------------------------------------------------------------------

KEPT = {
    "the first key is dropped": (
        "scores",
        GPT_OSS.replace("(pc, [0], [-1], [3])", "(pc, [1], [9999], [3])"),
    ),
    "a query's own sink": (
        "sinks",
        f"sk = MatMul(q, sw)  jo = Concat<axis = -1>(s2, sk)  pc = Softmax<axis = -1>(jo)  {DROPPED}",
    ),
    "the scores alone are shifted": (
        "scores",
        f"{COLUMN}  m1 = ReduceMax<keepdims = 1>(s2, [-1])  s2s = Sub(s2, m1)"
        f"  jo = Concat<axis = -1>(s2s, co)  pc = Softmax<axis = -1>(jo)  {DROPPED}",
    ),
    "scaled with the sinks": (
        "scores",
        f"{COLUMN}  {JOINED}  sc = Mul(jo, 0.5)  pc = Softmax<axis = -1>(sc)  {DROPPED}",
    ),
    "two columns": (
        "scores",
        f"{COLUMN}  jo = Concat<axis = -1>(s2, co, co)  pc = Softmax<axis = -1>(jo)"
        "  p = Slice(pc, [0], [-2], [3])",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept(name: str) -> None:
    code, softmax = KEPT[name]
    weight = "float[20,1] sw, " if "sw)" in softmax else ""
    signature = SIGNATURE.replace("<float[37,50]", f"<{weight}float[37,50]")
    assert_kept(block(softmax=softmax, signature=signature), "ATT001", code)


def test_sinks_with_values_of_their_own() -> None:
    """A key and a value that every query sees: no column is dropped."""
    softmax = f"{COLUMN}  {JOINED}  p = Softmax<axis = -1>(jo)"
    values = (
        "vx = Concat<axis = 2>(vr, vs)  o = MatMul(p, vx)  ot = Transpose<perm = [0, 2, 1, 3]>(o)"
        "  om = Reshape(ot, [0, 0, 120])  y = MatMul(om, wo)"
    )
    signature = SIGNATURE.replace("<float[37,50]", "<float[1,6,1,20] vs0, float[37,50]")
    values = values.replace(
        "vx = ", "bv = Concat<axis = 0>(nb, [6, 1, 20])  vs = Expand(vs0, bv)  vx = "
    )
    decline = assert_kept(
        block(softmax=softmax, signature=signature, values=values), "ATT001", "scores"
    )
    assert "values" in decline.reason


def test_the_plain_softmax_is_no_sink() -> None:
    result = raised(block(softmax=SOFTMAX))
    assert result.count("SinkAttention") == 0
    assert not result.after.functions
