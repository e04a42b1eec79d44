"""RMS001 and LAY001: means by other reductions, products in other groupings, and what is refused."""

from __future__ import annotations

import itertools

import pytest

from tests.graphs import assert_kept, assert_raised, assert_untouched

SIGNATURE = "(float[b,s,40] x) => (float[b,s,40] y) <float[40] w, float[40] c>"
RMS = "RMSNormalization<axis = -1, epsilon = 0.003, stash_type = 1>"
LAYER = "LayerNormalization<axis = -1, epsilon = 0.003, stash_type = 1>"

# The mean of x^2 as `m`, its axis kept.
MEANS = {
    "sum over n": "q = Mul(x, x)  a = ReduceSum(q, [-1])  m = Div(a, 40.0)",
    "sum times 1/n": "q = Pow(x, 2.0)  a = ReduceSum(q, [-1])  m = Mul(0.025, a)",
    "sum of squares": "a = ReduceSumSquare(x, [-1])  m = Div(a, 40.0)",
    "put back at once": "q = Mul(x, x)  a = ReduceMean<keepdims = 0>(q, [-1])  m = Unsqueeze(a, [-1])",
    "put back before it is divided": "a = ReduceSumSquare<keepdims = 0>(x, [2])"
    "  u = Unsqueeze(a, [2])  m = Div(u, 40.0)",
    "put back after it is divided": "a = ReduceSumSquare<keepdims = 0>(x, [2])"
    "  u = Div(a, 40.0)  m = Unsqueeze(u, [2])",
}
ROOT = "e = Add(m, 0.003)  r = Sqrt(e)"


@pytest.mark.parametrize("mean", MEANS)
def test_rms_by_other_reductions(mean: str) -> None:
    assert_raised(
        f"{SIGNATURE} {{ {MEANS[mean]}  {ROOT}  n = Div(x, r)  y = Mul(n, w) }}",
        f"{SIGNATURE} {{ y = {RMS}(x, w) }}",
        "RMS001",
    )


@pytest.mark.parametrize("scale", ["m = Div(a, 6.3245554)", "m = Mul(a, 0.15811388)"])
def test_rms_by_a_length(scale: str) -> None:
    """x / (|x| / sqrt(n)), as Gemma and MPT's low precision norms are written by hand."""
    assert_raised(
        f"{SIGNATURE} {{ a = ReduceL2(x, [-1])  {scale}  n = Div(x, m)  y = Mul(n, w) }}",
        f"{SIGNATURE} {{ y = RMSNormalization<axis = -1, epsilon = 0.0, stash_type = 1>(x, w) }}",
        "RMS001",
    )


@pytest.mark.parametrize(
    "product",
    [
        "i = Reciprocal(r)  g = Mul(i, w)  y = Mul(x, g)",
        "i = Reciprocal(r)  g = Mul(w, i)  y = Mul(g, x)",
        "g = Div(w, r)  y = Mul(x, g)",
    ],
)
def test_rms_with_its_weight_first(product: str) -> None:
    assert_raised(
        f"{SIGNATURE} {{ {MEANS['sum over n']}  {ROOT}  {product} }}",
        f"{SIGNATURE} {{ y = {RMS}(x, w) }}",
        "RMS001",
    )


def test_rms_with_a_gate_behind() -> None:
    """Qwen3-Next: norm * weight * silu(gate): the norm is raised, the gate stays."""
    result = assert_raised(
        "(float[b,s,40] x, float[b,s,40] g) => (float[b,s,40] y) <float[40] w>"
        f"{{ {MEANS['sum over n']}  {ROOT}  n = Div(x, r)  k = Mul(n, w)  t = Sigmoid(g)"
        "  z = Mul(g, t)  y = Mul(k, z) }",
        None,
        "RMS001",
    )
    assert sorted(node.op_type for node in result.after.graph.node) == [
        "Mul",
        "Mul",
        "RMSNormalization",
        "Sigmoid",
    ]


def test_rms_over_groups_of_heads() -> None:
    """Five groups of eight are normed on their own; the weight spans them and stays outside."""
    result = assert_raised(
        f"{SIGNATURE} {{ h = Reshape(x, [0, 0, 5, 8])  q = Mul(h, h)  m = ReduceMean(q, [-1])"
        f"  {ROOT}  n = Div(h, r)  f = Reshape(n, [0, 0, 40])  y = Mul(f, w) }}",
        None,
        "RMS001",
    )
    assert result.count("Mul") == 1


@pytest.mark.parametrize(
    "root",
    [
        "r0 = Sqrt(m)  r = Add(r0, 0.003)",
        "e = Max(m, 0.003)  r = Sqrt(e)",
        "e = Clip(m, 0.003)  r = Sqrt(e)",
        "r0 = Sqrt(m)  r = Max(r0, 0.003)",
    ],
)
@pytest.mark.parametrize("spelling", ["y = Div(x, r)", "i = Reciprocal(r)  y = Mul(x, i)"])
def test_an_epsilon_elsewhere_is_kept(root: str, spelling: str) -> None:
    """Near 0 it is another function."""
    assert_kept(
        f"{SIGNATURE} {{ {MEANS['sum of squares']}  {root}  {spelling} }}",
        "RMS001",
        "epsilon-place",
    )


@pytest.mark.parametrize(
    "body",
    [
        f"q = Mul(x, x)  m = ReduceSum(q, [-1])  {ROOT}  y = Div(x, r)",  # no mean
        f"q = Mul(x, x)  a = ReduceSum(q, [-1])  m = Div(a, 39.0)  {ROOT}  y = Div(x, r)",
        f"a = ReduceL2(x, [-1])  m = Div(a, 40.0)  {ROOT}  y = Div(x, r)",
        "a = ReduceL2(x, [-1])  r = Clip(a, 0.0001)  y = Div(x, r)",  # unit length
        "y = LpNormalization<axis = -1, p = 2>(x)",
    ],
)
def test_what_is_no_rms_norm(body: str) -> None:
    assert_untouched(f"{SIGNATURE} {{ {body} }}")


# --- layer norm ---------------------------------------------------------------------------------

ABOUT = {
    "mean": "a = ReduceMean(x, [-1])",
    "sum": "a0 = ReduceSum(x, [-1])  a = Div(a0, 40.0)",
    "put back": "a0 = ReduceMean<keepdims = 0>(x, [-1])  a = Unsqueeze(a0, [-1])",
}
VARIANCES = {
    "of deviations": "d = Sub(x, a)  q = Mul(d, d)  m = ReduceMean(q, [-1])",
    "sum of deviations": "d = Sub(x, a)  q0 = ReduceSumSquare(d, [-1])  m = Mul(q0, 0.025)",
    "difference": "q = Mul(x, x)  s = ReduceMean(q, [-1])  a2 = Mul(a, a)  m = Sub(s, a2)"
    "  d = Sub(x, a)",
    "difference, clamped": "q = Mul(x, x)  s = ReduceMean(q, [-1])  a2 = Pow(a, 2.0)"
    "  m0 = Sub(s, a2)  m = Max(m0, 0.0)  d = Sub(x, a)",
}
PRODUCTS = {
    "plain": "n = Div(d, r)  k = Mul(n, w)  y = Add(k, c)",
    "multiplied out": "i = Reciprocal(r)  g = Mul(i, w)  p = Mul(x, g)  t = Mul(a, g)"
    "  o = Sub(c, t)  y = Add(p, o)",
}


@pytest.mark.parametrize(
    ("about", "variance", "product"), list(itertools.product(ABOUT, VARIANCES, PRODUCTS))
)
def test_layer_norm_by_other_means(about: str, variance: str, product: str) -> None:
    assert_raised(
        f"{SIGNATURE} {{ {ABOUT[about]}  {VARIANCES[variance]}  {ROOT}  {PRODUCTS[product]} }}",
        f"{SIGNATURE} {{ y = {LAYER}(x, w, c) }}",
        "LAY001",
    )


def test_multiplied_out_without_weight_and_bias() -> None:
    result = assert_raised(
        f"{SIGNATURE} {{ {ABOUT['mean']}  {VARIANCES['difference']}  {ROOT}  i = Reciprocal(r)"
        "  p = Mul(x, i)  t = Mul(a, i)  y = Sub(p, t) }",
        None,
        "LAY001",
    )
    assert [node.op_type for node in result.after.graph.node] == ["LayerNormalization"]


@pytest.mark.parametrize(
    "root", ["r0 = Sqrt(m)  r = Add(r0, 0.003)", "e = Max(m, 0.003)  r = Sqrt(e)"]
)
def test_a_layer_norms_epsilon_elsewhere_is_kept(root: str) -> None:
    assert_kept(
        f"{SIGNATURE} {{ {ABOUT['mean']}  {VARIANCES['of deviations']}  {root}  y = Div(d, r) }}",
        "LAY001",
        "epsilon-place",
    )


@pytest.mark.parametrize(
    "body",
    [
        # the square of another mean is taken off
        "a = ReduceMean(x, [-1])  q = Mul(x, x)  s = ReduceMean(q, [-1])  b1 = Relu(a)"
        f"  a2 = Mul(b1, b1)  m = Sub(s, a2)  d = Sub(x, a)  {ROOT}  y = Div(d, r)",
        # the other way round
        "a = ReduceMean(x, [-1])  q = Mul(x, x)  s = ReduceMean(q, [-1])  a2 = Mul(a, a)"
        f"  m0 = Sub(a2, s)  m = Abs(m0)  d = Sub(x, a)  {ROOT}  y = Div(d, r)",
        # multiplied out with another mean
        "a = ReduceMean(x, [-1])  d = Sub(x, a)  q = Mul(d, d)  m = ReduceMean(q, [-1])"
        f"  {ROOT}  i = Reciprocal(r)  p = Mul(x, i)  k = Relu(a)  t = Mul(k, i)  y = Sub(p, t)",
    ],
)
def test_what_is_no_layer_norm(body: str) -> None:
    assert_untouched(f"{SIGNATURE} {{ {body} }}")


@pytest.mark.parametrize(
    "body",
    [
        "y = InstanceNormalization<epsilon = 0.003>(x, w, c)",
        "y = GroupNormalization<epsilon = 0.003, num_groups = 5>(x, w, c)",
    ],
)
def test_other_norms_are_left_alone(body: str) -> None:
    assert_untouched(
        f"(float[b,40,s] x) => (float[b,40,s] y) <float[40] w, float[40] c> {{ {body} }}", opset=21
    )
