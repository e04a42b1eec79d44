"""From a Softmax up to q @ k, and down to p @ v: what is collected, and what stops the walk."""

from __future__ import annotations

import numpy as np
import pytest

from onnxgen.analysis.probabilities import attends, softmax_of, walk_down
from onnxgen.analysis.scores import Scores, Stopped, constant_choice, walk_up
from tests.graphs import facts_of

SIGNATURE = (
    "(float[b,s,30] x, bool[b,1,s,s] keep, float[b,1,s,s] unused, int64[b,s] ids)"
    " => (float[b,s,20] y) <float[30,20] wq, float[30,20] wk, float[30,20] wv>"
)
START = (
    "q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)"
    "  kt = Transpose<perm = [0, 2, 1]>(k)  qk = MatMul(q, kt)"
    "  f = Cast<to = 1>(ids)  fr = Unsqueeze(f, [1])"
)


def up(body: str) -> Scores | Stopped:
    facts, values = facts_of(f"{SIGNATURE} {{ {START}  {body}  p = Softmax(s)  y = MatMul(p, v) }}")
    return walk_up(facts, values["s"])


def found(body: str) -> Scores:
    scores = up(body)
    assert isinstance(scores, Scores), scores
    assert scores.contraction.outputs[0].name == "qk"
    return scores


@pytest.mark.parametrize(
    ("body", "scale"),
    [
        ("s = Identity(qk)", 1.0),
        ("s = Mul(qk, 0.25)", 0.25),
        ("s = Div(qk, 8.0)", 0.125),
        ("a = Mul(0.5, qk)  s = Mul(a, [0.5])", 0.25),
        ("a = Cast<to = 11>(qk)  c = Cast<to = 1>(a)  s = Mul(c, 3.0)", 3.0),
    ],
)
def test_scales(body: str, scale: float) -> None:
    scores = found(body)
    assert scores.scale == pytest.approx(scale)
    assert (scores.masks, scores.softcap) == ([], 0.0)


def test_masks_are_collected_nearest_first() -> None:
    scores = found(
        "a = Mul(qk, 0.5)  m = Where(keep, 0.0, -inf)  z = Squeeze(m, [1])  c = Add(a, fr)"
        "  k3 = Squeeze(keep, [1])  d = Where(k3, c, -inf)  s = Add(z, d)"
    )
    assert [mask.value.name for mask in scores.masks] == ["z", "k3", "fr"]
    assert [mask.fill for mask in scores.masks] == [None, -np.inf, None]
    assert scores.scale == 0.5
    assert not scores.masks_before_cap


def test_a_mask_that_is_scaled_further_down_has_a_factor() -> None:
    scores = found("a = Mul(qk, 0.5)  c = Add(a, fr)  s = Mul(c, 0.25)")
    assert scores.scale == 0.125
    assert [mask.factor for mask in scores.masks] == [0.25]


def test_inverted_masks() -> None:
    scores = found("k3 = Squeeze(keep, [1])  n3 = Not(k3)  s = Where(n3, -30000.0, qk)")
    (mask,) = scores.masks
    assert mask.inverted
    assert mask.fill == -30000.0


def test_caps() -> None:
    scores = found(
        "a = Mul(qk, 0.5)  c = Div(a, 30.0)  d = Tanh(c)  e = Mul(d, 30.0)  s = Add(e, fr)"
    )
    assert scores.softcap == pytest.approx(30.0)
    assert scores.scale == pytest.approx(0.5)
    assert len(scores.masks) == 1
    assert not scores.masks_before_cap


def test_a_cap_without_its_division() -> None:
    """c * tanh(x): the scores are scaled by c, so that the cap undoes it."""
    scores = found("d = Tanh(qk)  s = Mul(d, 20.0)")
    assert scores.softcap == pytest.approx(20.0)
    assert scores.scale == pytest.approx(20.0)


def test_a_mask_before_the_cap_is_noted() -> None:
    scores = found("c = Add(qk, fr)  a = Div(c, 30.0)  d = Tanh(a)  s = Mul(d, 30.0)")
    assert scores.masks_before_cap


@pytest.mark.parametrize(
    ("body", "stopper"),
    [
        ("s = Relu(qk)", "Relu"),
        ("a = Add(qk, qk)  s = Mul(a, 0.5)", "Add"),
        ("k3 = Squeeze(keep, [1])  s = Where(k3, qk, -2.0)", "Where"),
        ("k3 = Squeeze(keep, [1])  s = Where(k3, qk, qk)", "Where"),
        ("d = Tanh(qk)  e = Mul(d, 20.0)  s = Mul(e, 0.5)", "Mul"),
        ("d = Tanh(qk)  e = Mul(d, 20.0)  g = Tanh(e)  s = Mul(g, 30.0)", "Tanh"),
        ("s = MatMul(x, wq)", "MatMul"),
        ("s = Sub(fr, qk)", "Sub"),
    ],
)
def test_what_stops_the_walk_up(body: str, stopper: str) -> None:
    stopped = up(body)
    assert isinstance(stopped, Stopped)
    assert stopped.reason
    assert stopped.node is not None
    assert stopped.node.op_type == stopper


DOWN = {
    "y = MatMul(p, v)": True,
    "a = Cast<to = 11>(p)  c = Cast<to = 1>(a)  y = MatMul(c, v)": True,
    "n = IsNaN(p)  g = Where(n, 0.0, p)  y = MatMul(g, v)": True,
    "d = Dropout(p)  y = MatMul(d, v)": True,
    "n = IsNaN(p)  g = Where(n, 1.0, p)  y = MatMul(g, v)": False,
    "n = IsNaN(p)  g = Where(n, p, 0.0)  y = MatMul(g, v)": False,
    "r = Relu(p)  y = MatMul(r, v)": False,
    "vt = Transpose<perm = [0, 2, 1]>(v)  y = MatMul(vt, p)": False,
    "a = MatMul(p, v)  c = MatMul(p, k)  y = Add(a, c)": False,
    "r, i = TopK(p, [2])  y = MatMul(r, r)": False,
}


@pytest.mark.parametrize("body", DOWN)
def test_down_to_the_values(body: str) -> None:
    facts, values = facts_of(f"{SIGNATURE} {{ {START}  p = Softmax(qk)  {body} }}")
    softmax = values["p"].producer()
    assert softmax is not None
    end = walk_down(facts, values["p"])
    if not DOWN[body]:
        assert isinstance(end, Stopped)
        assert end.reason
    else:
        assert not isinstance(end, Stopped)
        assert end.product.outputs[0].name == "y"


@pytest.mark.parametrize(
    ("attribute", "last"),
    [("", True), ("<axis = -1>", True), ("<axis = 2>", True), ("<axis = 1>", False)],
)
def test_last_axis(attribute: str, last: bool) -> None:
    facts, values = facts_of(
        f"{SIGNATURE} {{ {START}  p = Softmax{attribute}(qk)  y = MatMul(p, v) }}"
    )
    softmax = values["p"].producer()
    assert softmax is not None
    found = softmax_of(facts, softmax)
    assert found is not None
    assert found.last is last


@pytest.mark.parametrize(
    ("body", "fill"),
    [
        ("m = Where(keep, 0.0, -inf)", -np.inf),
        ("m = Where(keep, -65504.0, 0.0)", -65504.0),
        ("m = Where(keep, 1.0, -inf)", None),
        ("m = Where(keep, 0.0, -5.0)", None),
        ("m = Cast<to = 1>(keep)", None),
    ],
)
def test_an_additive_mask_that_is_a_choice(body: str, fill: float | None) -> None:
    _, values = facts_of(f"{SIGNATURE} {{ {START}  {body}  y = Add(x, x) }}")
    choice = constant_choice(values["m"])
    assert (None if choice is None else choice.fill) == fill
    if choice is not None:
        assert choice.value.name == "keep"
        assert choice.inverted is (fill != -np.inf)


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ("p = Softmax(qk)  y = MatMul(p, v)", True),
        ("r = Relu(qk)  p = Softmax(r)  y = MatMul(p, v)", True),
        ("e = MatMul(x, wq)  p = Softmax(e)  y = MatMul(p, wt)", False),
        ("p = Softmax(qk)  y = MatMul(p, ws)", False),
        (
            "e = MatMul(x, wq)  p = Softmax(e)  pt = Transpose<perm = [0, 2, 1]>(p)  y = MatMul(pt, v)",
            False,
        ),
    ],
)
def test_what_attends(body: str, answer: bool) -> None:
    signature = SIGNATURE.replace("[b,s,30]", "[b,7,30]").replace(
        "<float", "<float[20,20] wt, float[7,20] ws, float", 1
    )
    facts, values = facts_of(f"{signature} {{ {START}  {body} }}")
    softmax = values["p"].producer()
    assert softmax is not None
    assert attends(facts, softmax) is answer
