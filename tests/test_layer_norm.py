"""LAY001: layer normalization, graph before and graph after."""

from __future__ import annotations

import itertools

import pytest

from tests.graphs import assert_kept, assert_raised, assert_untouched, parse, raised

SIGNATURE = "(float[b,s,40] x) => (float[b,s,40] y) <float[40] w, float[40] c>"
NODE = "LayerNormalization<axis = -1, epsilon = 0.003, stash_type = 1>"
AFTER = f"{SIGNATURE} {{ y = {NODE}(x, w, c) }}"

SQUARES = {"pow": "p = Pow(d, 2.0)", "mul": "p = Mul(d, d)"}
ROOTS = {
    "divided": "r = Sqrt(e)  n = Div(d, r)",
    "reciprocal": "r = Sqrt(e)  i = Reciprocal(r)  n = Mul(d, i)",
    "power": "i = Pow(e, -0.5)  n = Mul(i, d)",
    "half-power": "r = Pow(e, 0.5)  n = Div(d, r)",
    "one-over": "r = Sqrt(e)  i = Div([1.0], r)  n = Mul(d, i)",
}
AFFINES = {"behind": "k = Mul(n, w)  y = Add(k, c)", "before": "k = Mul(w, n)  y = Add(c, k)"}
START = "m = ReduceMean(x, [-1])  d = Sub(x, m)"
VARIANCE = "v = ReduceMean(p, [-1])  e = Add(v, 0.003)"


@pytest.mark.parametrize(
    ("square", "root", "affine"), list(itertools.product(SQUARES, ROOTS, AFFINES))
)
def test_every_spelling(square: str, root: str, affine: str) -> None:
    body = f"{START}  {SQUARES[square]}  {VARIANCE}  {ROOTS[root]}  {AFFINES[affine]}"
    assert_raised(f"{SIGNATURE} {{ {body} }}", AFTER, "LAY001")


@pytest.mark.parametrize("opset", [13, 17])
def test_axes_as_attributes(opset: int) -> None:
    """As TorchScript wrote it before there was an operator."""
    assert_raised(
        f"{SIGNATURE} {{ m = ReduceMean<axes = [-1]>(x)  d = Sub(x, m)  p = Pow(d, 2.0)"
        "  v = ReduceMean<axes = [-1]>(p)  e = Add(v, 0.003)  r = Sqrt(e)  n = Div(d, r)"
        "  k = Mul(n, w)  y = Add(k, c) }",
        AFTER,
        "LAY001",
        opset=opset,
    )


def test_a_mean_that_is_computed_twice() -> None:
    """tf2onnx: one deviation is squared, another is scaled."""
    assert_raised(
        f"{SIGNATURE} {{ {START}  p = Mul(d, d)  {VARIANCE}  r = Sqrt(e)"
        "  d2 = Sub(x, m)  n = Div(d2, r)  k = Mul(n, w)  y = Add(k, c) }",
        AFTER,
        "LAY001",
    )


def test_without_weight_and_bias() -> None:
    signature = "(float[b,s,3] x) => (float[b,s,3] y)"
    assert_raised(
        f"{signature} {{ {START}  p = Mul(d, d)  {VARIANCE}  r = Sqrt(e)  y = Div(d, r) }}",
        f"{signature} {{ y = {NODE}(x, [1.0, 1.0, 1.0]) }}",
        "LAY001",
    )


def test_without_bias() -> None:
    signature = "(float[b,s,40] x) => (float[b,s,40] y) <float[40] w>"
    assert_raised(
        f"{signature} {{ {START}  p = Mul(d, d)  {VARIANCE}  r = Sqrt(e)  n = Div(d, r)"
        "  y = Mul(n, w) }",
        f"{signature} {{ y = {NODE}(x, w) }}",
        "LAY001",
    )


def test_without_weight() -> None:
    signature = "(float[b,s,3] x) => (float[b,s,3] y) <float[3] c>"
    assert_raised(
        f"{signature} {{ {START}  p = Mul(d, d)  {VARIANCE}  r = Sqrt(e)  n = Div(d, r)"
        "  y = Add(n, c) }",
        f"{signature} {{ y = {NODE}(x, [1.0, 1.0, 1.0], c) }}",
        "LAY001",
    )


def test_over_two_axes() -> None:
    signature = "(float[b,6,20] x) => (float[b,6,20] y) <float[6,20] w, float[6,20] c>"
    assert_raised(
        f"{signature} {{ m = ReduceMean(x, [-1, -2])  d = Sub(x, m)  p = Mul(d, d)"
        "  v = ReduceMean(p, [1, 2])  e = Add(v, 0.003)  r = Sqrt(e)  n = Div(d, r)"
        "  k = Mul(n, w)  y = Add(k, c) }",
        f"{signature} {{ y = LayerNormalization<axis = -2, epsilon = 0.003, stash_type = 1>"
        "  (x, w, c) }",
        "LAY001",
    )


def test_casts_become_the_stash_type() -> None:
    signature = "(float16[b,s,40] x) => (float16[b,s,40] y) <float16[40] w, float16[40] c>"
    assert_raised(
        f"{signature} {{ f = Cast<to = 1>(x)  m = ReduceMean(f, [-1])  d = Sub(f, m)"
        f"  p = Pow(d, 2.0)  {VARIANCE}  r = Sqrt(e)  n = Div(d, r)  h = Cast<to = 10>(n)"
        "  k = Mul(h, w)  y = Add(k, c) }",
        f"{signature} {{ y = {NODE}(x, w, c) }}",
        "LAY001",
    )


# --- what is no norm of this kind ---------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        # the mean of another tensor is taken off
        "m = ReduceMean(u, [-1])  d = Sub(x, m)  p = Mul(d, d)  v = ReduceMean(p, [-1])"
        "  r = Abs(v)  y = Div(d, r)",
        # a standard deviation that scales something else
        f"{START}  p = Mul(d, d)  {VARIANCE}  r = Sqrt(e)  y = Div(u, r)",
        # no root
        f"{START}  p = Mul(d, d)  {VARIANCE}  y = Div(d, e)",
        # mean absolute deviation
        f"{START}  p = Abs(d)  {VARIANCE}  r = Sqrt(e)  y = Div(d, r)",
    ],
)
def test_misses(body: str) -> None:
    assert_untouched(f"(float[b,s,40] x, float[b,s,40] u) => (float[b,s,40] y) {{ {body} }}")


def test_a_residual_is_no_bias() -> None:
    result = assert_raised(
        "(float[b,s,40] x, float[b,s,40] u) => (float[b,s,40] y) <float[40] w>"
        f"{{ {START}  p = Mul(d, d)  {VARIANCE}  r = Sqrt(e)  n = Div(d, r)  k = Mul(n, w)"
        "  y = Add(k, u) }",
        "(float[b,s,40] x, float[b,s,40] u) => (float[b,s,40] y) <float[40] w>"
        f"{{ k = {NODE}(x, w)  y = Add(k, u) }}",
        "LAY001",
    )
    assert result.count("Add") == 1


# --- declines -----------------------------------------------------------------------------------


def test_epsilon_that_is_computed() -> None:
    assert_kept(
        "(float[b,s,40] x, float[1] eps) => (float[b,s,40] y)"
        f"{{ {START}  p = Mul(d, d)  v = ReduceMean(p, [-1])  a = Abs(eps)  e = Add(v, a)"
        "  r = Sqrt(e)  y = Div(d, r) }",
        "LAY001",
        "epsilon-not-constant",
    )


@pytest.mark.parametrize(("first", "second"), [("[1]", "[1]"), ("[1]", "[-1]"), ("[-1]", "[1]")])
def test_other_axes(first: str, second: str) -> None:
    result = raised(
        "(float[b,s,40] x) => (float[b,s,40] y)"
        f"{{ m = ReduceMean(x, {first})  d = Sub(x, m)  p = Mul(d, d)"
        f"  v = ReduceMean(p, {second})  e = Add(v, 0.003)  r = Sqrt(e)  y = Div(d, r) }}"
    )
    (site,) = result.sites
    if (first, second) == ("[1]", "[-1]"):  # no layer norm, but an RMS norm of the deviation
        assert (site.rule, site.status) == ("RMS001", "fused")
        return
    assert site.decline is not None
    assert (site.rule, site.decline.code) == ("LAY001", "axes")
    assert len(site.decline.nodes) == 2


def test_a_second_mean_over_another_axis_is_another_mean() -> None:
    """Found by hand: the mean that is subtracted again is not the one of the variance."""
    assert_untouched(
        "(float[b,5,8] x) => (float[b,5,8] y)"
        "{ m = ReduceMean(x, [-1])  d = Sub(x, m)  q = Mul(d, d)  v = ReduceMean(q, [-1])"
        "  e = Add(v, 0.00001)  r = Sqrt(e)  m2 = ReduceMean(x, [1])  d2 = Sub(x, m2)"
        "  y = Div(d2, r) }"
    )


def test_axes_of_unknown_size() -> None:
    assert_kept(
        "(float[b,s,d] x) => (float[b,s,d] y)"
        f"{{ {START}  p = Mul(d, d)  {VARIANCE}  r = Sqrt(e)  y = Div(d, r) }}",
        "LAY001",
        "axes",
    )


def test_names() -> None:
    body = f"{START}  p = Pow(d, 2.0)  {VARIANCE}  r = Sqrt(e)  n = Div(d, r)"
    model = parse(f"{SIGNATURE} {{ {body}  k = Mul(n, w)  y = Add(k, c) }}")
    for node in model.graph.node:
        node.name = f"/encoder/layer.2/LayerNorm/{node.op_type}_{node.output[0]}"
    result = raised(model)
    props = {p.key: p.value for p in result.node("LayerNormalization").metadata_props}
    assert props["pkg.torch.onnx.name_scopes"] == "encoder.layer.2.LayerNorm"
    assert props["onnxgen.rule"] == "LAY001"
    assert len(props["onnxgen.replaced"].split(", ")) == 9
    assert result.sites[0].replaced == 9
