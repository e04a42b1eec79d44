"""What is never negative, and what only looks so."""

from __future__ import annotations

import numpy as np
import pytest

from onnxgen.analysis.signs import nonnegative
from tests.graphs import facts_of, parse, run

TEXT = "(float[t,6] x, bool[t,6] m) => (float[t,n] y) {{ {} }}"
NEVER = {
    "renormalised": "p = Softmax(x) v, i = TopK(p, [2]) s = ReduceSum(v, [-1]) y = Div(v, s)",
    "gathered": "p = Sigmoid(x) v, i = TopK(x, [2]) y = GatherElements<axis=1>(p, i)",
    "guarded": "p = Sigmoid(x) s = ReduceSum(p, [-1]) t = Add(s, 1e-20) d = Div(p, t) y = Mul(d, 2.5)",
    "clipped": "y = Clip(x, 0.0)",
    "clipped, both ends": "y = Clip(x, 0.5, 2.0)",
    "at least": "y = Max(x, 0.0)",
    "masked": "e = Exp(x) y = Where(m, e, 0.0)",
    "cast from bool": "y = Cast<to=1>(m)",
    "squared": "y = Mul(x, x)",
    "even power": "y = Pow(x, 2.0)",
    "split": "e = Abs(x) y, z = Split<axis=1, num_outputs=2>(e)",
    "scattered": "e = Abs(x) v, i = TopK(e, [2]) z = Mul(e, 0.0)"
    " y = ScatterElements<axis=1>(z, i, v)",
}
MAYBE = {
    "as it comes": "y = Identity(x)",
    "scaled by less than nothing": "p = Sigmoid(x) y = Mul(p, -1.0)",
    "biased": "p = Sigmoid(x) y = Add(p, [-0.1, 0.0, 0.1, 0.2, 0.3, 0.4])",
    "differences": "p = Sigmoid(x) y = Sub(p, 0.1)",
    "odd power": "y = Pow(x, 3.0)",
    "clipped below zero": "y = Clip(x, -1.0)",
    "clipped to less than zero": "e = Exp(x) y = Clip(e, -2.0, -1.0)",
    "masked with less": "e = Exp(x) y = Where(m, e, -1.0)",
    "logarithms": "p = Softmax(x) y = Log(p)",
    "tanh": "y = Tanh(x)",
    "at most": "y = Min(x, 1.0)",
    "sum of either": "e = Exp(x) s = ReduceSum(x, [-1]) y = Div(e, s)",
}


def sign(nodes: str) -> tuple[bool, float]:
    """What is told, and the least that a run gives."""
    model = parse(TEXT.format(nodes))
    _, values = facts_of(model)
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((40, 6)).astype(np.float32), "m": rng.random((40, 6)) < 0.5}
    used = {name for node in model.graph.node for name in node.input}
    for each in [each for each in model.graph.input if each.name not in used]:
        model.graph.input.remove(each)
    found = run(model, {name: each for name, each in feeds.items() if name in used})
    return nonnegative(values["y"]), float(found["y"].min())


@pytest.mark.parametrize("name", NEVER)
def test_never_below_zero(name: str) -> None:
    told, least = sign(NEVER[name])
    assert told
    assert least >= 0


@pytest.mark.parametrize("name", MAYBE)
def test_below_zero(name: str) -> None:
    told, least = sign(MAYBE[name])
    assert not told
    assert least < 0


def test_weights_and_inputs() -> None:
    _, values = facts_of("(float[t,6] x) => (float[t,6] y) { y = Mul(x, [1.0, 0.0, 2.0]) }")
    (constant,) = [value for value in values.values() if value.const_value is not None]
    assert nonnegative(constant)
    assert not nonnegative(values["x"])
    assert not nonnegative(None)
