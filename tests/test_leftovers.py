"""What is left over is counted without the rules: it sees what exporters write, and only that."""

from __future__ import annotations

from collections import Counter

import onnx.inliner
import pytest

from onnxgen.testing import corpus
from tests.graphs import parse
from tests.leftovers import leftovers

MODELS = sorted({entry.model for entry in corpus()})


@pytest.mark.parametrize("model", MODELS)
def test_every_exporter_wrote_the_same_sites(model: str) -> None:
    """Unfused exports of one model hold equally many in any spelling, at least one a layer."""
    counts = {}
    for entry in corpus(f"{model}/*"):
        fused = any(node.domain == "com.microsoft" for node in entry.stored.graph.node)
        if entry.info["opset"] < 23 and not fused:
            inlined = onnx.inliner.inline_local_functions(entry.stored)
            found = leftovers(inlined)
            counts[entry.form] = (found["attention"], found["norm"], found["rotary"])
            assert found["attention"] >= entry.info["dims"]["layers"]
    assert len(set(counts.values())) == 1, counts


ATTENTION = (
    "(float[b,h,s,d] q, float[b,h,t,d] k, float[b,h,t,d] v) => (float[b,h,s,d] y)"
    "{ kt = Transpose<perm = [0, 1, 3, 2]>(k)  s0 = MatMul(q, kt)  %s  y = MatMul(p, v) }"
)
RMS = (
    "(float[b,s,40] x) => (float[b,s,40] y) <float[40] w>"
    "{ %s  e = Add(m, 0.00001)  r = Sqrt(e)  n = Div(x, r)  y = Mul(n, w) }"
)
TURN = (
    "(float[b,h,s,8] x, float[s,4] c, float[s,4] s0) => (float[b,h,s,8] y)"
    "{ a, b = Split<axis = -1, num_outputs = 2>(x)  %s }"
)
CASES = {
    ATTENTION % "p = Softmax(s0)": {"attention": 1},
    ATTENTION % "c = Mul(s0, 0.5)  f = Cast<to = 11>(c)  g = Softmax(f)  p = Cast<to = 1>(g)": {
        "attention": 1
    },
    ATTENTION % "e = Exp(s0)  z = ReduceSum(e, [-1])  p = Div(e, z)": {"attention": 1},
    ATTENTION % "p = Sigmoid(s0)": {},
    RMS % "sq = Pow(x, 2.0)  m = ReduceMean(sq, [-1])": {"norm": 1},
    RMS % "sq = Mul(x, x)  m = ReduceMean(sq, [-1])": {"norm": 1},
    RMS % "sq = ReduceSumSquare(x, [-1])  m = Div(sq, 40.0)": {"norm": 1},
    RMS % "m = ReduceMean(x, [-1])": {},
    TURN % "n = Neg(b)  t = Concat<axis = -1>(n, a)  ss = Concat<axis = -1>(s0, s0)"
    "  cc = Concat<axis = -1>(c, c)  u = Mul(x, cc)  v = Mul(t, ss)  y = Add(u, v)": {"rotary": 1},
    TURN % "ac = Mul(a, c)  bs = Mul(b, s0)  bc = Mul(c, b)  as0 = Mul(a, s0)"
    "  l = Sub(ac, bs)  r = Add(as0, bc)  y = Concat<axis = -1>(l, r)": {"rotary": 1},
    TURN % "n = Neg(b)  y = Concat<axis = -1>(a, n)": {},
    # A router: its scores come from a weight matrix.
    "(float[s,40] x) => (float[s,40] y) <float[40,5] w, float[5,40] e>"
    "{ l = MatMul(x, w)  p = Softmax(l)  y = MatMul(p, e) }": {},
}


@pytest.mark.parametrize("text", CASES)
def test_a_site(text: str) -> None:
    assert leftovers(parse(text)) == Counter(CASES[text])


CACHED = (
    "(float[b,3,s,8] q, float[b,3,s,8] k, float[b,3,s,8] v, float[b,3,p,8] pk, float[b,3,p,8] pv)"
    "=> (float[b,3,s,8] y, float[b,3,t,8] k2, float[b,3,t,8] v2) { %s }"
)


def test_a_cache_is_in_an_operator_or_left_over() -> None:
    inside = parse(CACHED % "y, k2, v2 = Attention(q, k, v, , pk, pv)", opset=24)
    assert leftovers(inside, ["pk", "pv"]) == Counter()
    outside = "k2 = Concat<axis = 2>(pk, k)  v2 = Concat<axis = 2>(pv, v)  y = Attention(q, k2, v2)"
    assert leftovers(parse(CACHED % outside, opset=24), ["pk", "pv"]) == Counter(cache=2)
