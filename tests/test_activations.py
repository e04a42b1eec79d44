"""GEL001 and the recognisers of activations: graph before and graph after."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxgen.analysis.activations import gelu_of, swish_of
from tests.graphs import assert_raised, assert_untouched, facts_of, parse, raised

SIGNATURE = "(float[b,s,20] h) => (float[b,s,40] y) <float[20,40] w>"
START = "x = MatMul(h, w)"
EXACT = f'{SIGNATURE} {{ {START}  y = Gelu<approximate = "none">(x) }}'
TANH = f'{SIGNATURE} {{ {START}  y = Gelu<approximate = "tanh">(x) }}'

ARGUMENTS = {
    "div": "a = Div(x, 1.41421354)",
    "mul": "a = Mul(x, 0.70710678)",
    "mul-first": "a = Mul(0.70710678, x)",
    "two-steps": "a0 = Mul(x, 0.35355339)  a = Mul(a0, 2.0)",
}
RESULTS = {
    "half-last": "f = Add(t, 1.0)  g = Mul(x, f)  y = Mul(g, 0.5)",
    "half-of-sum": "f = Add(1.0, t)  g = Mul(f, 0.5)  y = Mul(x, g)",
    "half-of-x": "f = Add(t, 1.0)  g = Mul(x, 0.5)  y = Mul(g, f)",
    "divided": "f = Add(t, 1.0)  g = Div(x, 2.0)  y = Mul(f, g)",
    "half-inside": "g = Mul(t, 0.5)  f = Add(g, 0.5)  y = Mul(f, x)",
    "multiplied-out": "g = Mul(t, x)  f = Add(g, x)  y = Mul(f, 0.5)",
    "minus-minus": "g = Neg(t)  f = Sub(1.0, g)  i = Mul(f, x)  y = Div(i, 2.0)",
}
CUBES = {
    "pow": "p = Pow(x, 3.0)  q = Mul(p, 0.044715)  r = Add(x, q)  a = Mul(r, 0.79788458)",
    "mul": "s = Mul(x, x)  p = Mul(x, s)  q = Mul(0.044715, p)  r = Add(q, x)"
    "  a = Mul(0.79788458, r)",
    "square": "s = Pow(x, 2.0)  q = Mul(s, 0.044715)  o = Add(q, 1.0)  r = Mul(o, x)"
    "  a = Mul(r, 0.79788458)",
    "fast": "u = Mul(x, 0.79788458)  s = Mul(x, 0.044715)  v = Mul(s, x)  o = Add(1.0, v)"
    "  a = Mul(u, o)",
}


@pytest.mark.parametrize(("argument", "result"), list(itertools.product(ARGUMENTS, RESULTS)))
def test_exact(argument: str, result: str) -> None:
    body = f"{START}  {ARGUMENTS[argument]}  t = Erf(a)  {RESULTS[result]}"
    assert_raised(f"{SIGNATURE} {{ {body} }}", EXACT, "GEL001")


@pytest.mark.parametrize(("cube", "result"), list(itertools.product(CUBES, RESULTS)))
def test_tanh(cube: str, result: str) -> None:
    body = f"{START}  {CUBES[cube]}  t = Tanh(a)  {RESULTS[result]}"
    assert_raised(f"{SIGNATURE} {{ {body} }}", TANH, "GEL001")


@pytest.mark.parametrize("cube", CUBES)
def test_tanh_as_a_sigmoid(cube: str) -> None:
    body = f"{START}  {CUBES[cube]}  d = Mul(a, 2.0)  t = Sigmoid(d)  y = Mul(x, t)"
    assert_raised(f"{SIGNATURE} {{ {body} }}", TANH, "GEL001")


def test_a_factor_before_is_no_part() -> None:
    """x is twice what the weights give: gelu of that, not twice gelu."""
    result = assert_raised(
        f"{SIGNATURE} {{ z = MatMul(h, w)  x = Mul(z, 2.0)  {ARGUMENTS['div']}  t = Erf(a)"
        f"  {RESULTS['half-last']} }}",
        None,
        "GEL001",
    )
    assert result.count("Mul") == 1


def test_half_precision() -> None:
    """Factors are as exact as their type."""
    signature = SIGNATURE.replace("float[", "float16[")
    signature = signature.replace("w>", "w, float16[1] r, float16[1] i, float16[1] k>")
    weights = {"r": 1.41421354, "i": 1.0, "k": 0.5}
    proto = parse(
        f"{signature} {{ {START}  a = Div(x, r)  t = Erf(a)  f = Add(t, i)  g = Mul(x, f)"
        "  y = Mul(g, k) }",
        weights={name: np.array([number], np.float16) for name, number in weights.items()},
    )
    result = raised(proto)
    assert [(site.rule, site.status) for site in result.sites] == [("GEL001", "fused")]


def test_one_that_the_exporter_wrote_is_left() -> None:
    assert_untouched(EXACT)


@pytest.mark.parametrize(
    "body",
    [
        "a = Mul(x, 0.7)  t = Erf(a)  f = Add(t, 1.0)  g = Mul(x, f)  y = Mul(g, 0.5)",
        "a = Div(x, 1.41421354)  t = Erf(a)  f = Add(t, 1.0)  g = Mul(x, f)  y = Mul(g, 0.4)",
        "a = Div(x, 1.41421354)  t = Erf(a)  f = Add(t, 2.0)  g = Mul(x, f)  y = Mul(g, 0.5)",
        "a = Div(x, 1.41421354)  t = Erf(a)  f = Sub(1.0, t)  g = Mul(x, f)  y = Mul(g, 0.5)",
        "a = Div(x, 1.41421354)  t = Erf(a)  y = Add(t, 1.0)",
        "a = Div(x, 1.41421354)  t = Erf(a)  f = Add(t, 1.0)  k = Relu(x)  g = Mul(k, f)"
        "  y = Mul(g, 0.5)",
        f"{CUBES['pow'].replace('0.044715', '0.05')}  t = Tanh(a)  {RESULTS['half-last']}",
        f"{CUBES['pow']}  t = Erf(a)  {RESULTS['half-last']}",
        f"{ARGUMENTS['div']}  t = Tanh(a)  {RESULTS['half-last']}",
        "t = Sigmoid(x)  y = Mul(x, t)",
        "c = Mul(x, 1.702)  t = Sigmoid(c)  y = Mul(x, t)",
    ],
)
def test_what_is_none_is_left(body: str) -> None:
    assert_untouched(f"{SIGNATURE} {{ {START}  {body} }}")


def test_more_axes_are_no_gelu() -> None:
    signature = SIGNATURE.replace("float[b,s,40] y", "float[1,b,s,40] y")
    signature = signature.replace("w>", "w, float[1,1,1,1] k = {0.5}>")
    body = f"{ARGUMENTS['div']}  t = Erf(a)  f = Add(t, 1.0)  g = Mul(x, f)  y = Mul(g, k)"
    assert_untouched(f"{signature} {{ {START}  {body} }}")


# --- the recognisers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "alpha"),
    [
        ("t = Sigmoid(x)  y = Mul(x, t)", 1.0),
        ("t = Sigmoid(x)  y = Mul(t, x)", 1.0),
        ("c = Mul(x, 1.702)  t = Sigmoid(c)  y = Mul(x, t)", 1.702),
        ("c = Div(x, 0.5)  t = Sigmoid(c)  y = Mul(x, t)", 2.0),
        ("c = Neg(x)  t = Sigmoid(c)  y = Mul(x, t)", -1.0),
        ("c = Add(x, 1.0)  t = Sigmoid(c)  y = Mul(x, t)", None),
        ("t = Sigmoid(x)  y = Mul(t, t)", None),
        ("t = Sigmoid(h)  k = MatMul(t, w)  y = Mul(x, k)", None),
        (f"{CUBES['pow']}  d = Mul(a, 2.0)  t = Sigmoid(d)  y = Mul(x, t)", None),
    ],
)
def test_swish(body: str, alpha: float | None) -> None:
    _, values = facts_of(f"{SIGNATURE} {{ {START}  {body} }}")
    found = swish_of(values["t"].producer())
    if alpha is None:
        assert found is None
        return
    assert found is not None
    assert found.x is values["x"]
    assert found.y is values["y"]
    assert found.alpha == pytest.approx(alpha)


def test_gated_swish_is_the_swish_alone() -> None:
    _, values = facts_of(
        f"{SIGNATURE} {{ {START}  t = Sigmoid(x)  k = Mul(x, t)  g = MatMul(h, w)  y = Mul(k, g) }}"
    )
    found = swish_of(values["t"].producer())
    assert found is not None
    assert found.y is values["k"]


def test_gelu_of_other_nodes_is_none() -> None:
    _, values = facts_of(f"{SIGNATURE} {{ {START}  y = Relu(x) }}")
    assert gelu_of(values["y"].producer()) is None
