"""RMS001: root mean square normalization, graph before and graph after."""

from __future__ import annotations

import itertools

import pytest

from tests.graphs import assert_kept, assert_raised, assert_untouched, parse, raised

SIGNATURE = "(float[b,s,40] x) => (float[b,s,40] y) <float[40] w>"
AFTER = f"{SIGNATURE} {{ y = RMSNormalization<axis = -1, epsilon = 0.003, stash_type = 1>(x, w) }}"

SQUARES = {"pow": "q = Pow(x, 2.0)", "mul": "q = Mul(x, x)"}
ROOTS = {
    "reciprocal": "r = Sqrt(e)  i = Reciprocal(r)  n = Mul(x, i)",
    "reciprocal-first": "r = Sqrt(e)  i = Reciprocal(r)  n = Mul(i, x)",
    "one-over": "r = Sqrt(e)  i = Div(1.0, r)  n = Mul(x, i)",
    "divided": "r = Sqrt(e)  n = Div(x, r)",
    "power": "i = Pow(e, -0.5)  n = Mul(x, i)",
    "half-power": "r = Pow(e, 0.5)  n = Div(x, r)",
    "half-power-inverted": "r = Pow(e, 0.5)  i = Reciprocal(r)  n = Mul(x, i)",
    "root-to-minus-one": "r = Sqrt(e)  i = Pow(r, -1.0)  n = Mul(x, i)",
}
WEIGHTS = {"behind": "y = Mul(n, w)", "before": "y = Mul(w, n)"}


def norm(square: str, root: str, weight: str) -> str:
    add = "m = ReduceMean<keepdims = 1>(q, [-1])  e = Add(m, 0.003)"
    return f"{SIGNATURE} {{ {square}  {add}  {root}  {weight} }}"


@pytest.mark.parametrize(
    ("square", "root", "weight"), list(itertools.product(SQUARES, ROOTS, WEIGHTS))
)
def test_every_spelling(square: str, root: str, weight: str) -> None:
    assert_raised(norm(SQUARES[square], ROOTS[root], WEIGHTS[weight]), AFTER, "RMS001")


def test_epsilon_on_the_left() -> None:
    text = norm(SQUARES["pow"], ROOTS["divided"], WEIGHTS["behind"])
    assert_raised(text.replace("Add(m, 0.003)", "Add([0.003], m)"), AFTER, "RMS001")


@pytest.mark.parametrize("opset", [13, 17])
def test_axes_as_an_attribute(opset: int) -> None:
    text = norm(SQUARES["pow"], ROOTS["reciprocal"], WEIGHTS["behind"])
    text = text.replace("<keepdims = 1>(q, [-1])", "<axes = [2]>(q)")
    assert_raised(text, AFTER, "RMS001", opset=opset)


def test_without_a_weight() -> None:
    assert_raised(
        "(float[b,s,6] x) => (float[b,s,6] y)"
        "{ q = Mul(x, x)  m = ReduceMean(q, [-1])  e = Add(m, 0.003)  r = Sqrt(e)"
        "  y = Div(x, r) }",
        "(float[b,s,6] x) => (float[b,s,6] y)"
        "{ y = RMSNormalization<axis = -1, epsilon = 0.003, stash_type = 1>"
        "      (x, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]) }",
        "RMS001",
    )


def test_without_an_epsilon() -> None:
    assert_raised(
        f"{SIGNATURE} {{ q = Mul(x, x)  m = ReduceMean(q, [-1])  r = Sqrt(m)  n = Div(x, r)"
        "  y = Mul(n, w) }",
        f"{SIGNATURE} {{ y = RMSNormalization<axis = -1, epsilon = 0.0, stash_type = 1>(x, w) }}",
        "RMS001",
    )


def test_a_weight_that_one_is_added_to() -> None:
    """Gemma: what multiplies the norm is 1 + w, and that is a constant."""
    before = (
        "(float[b,s,6] x) => (float[b,s,6] y) <float[6] w>"
        "{ q = Pow(x, 2.0)  m = ReduceMean(q, [-1])  e = Add(m, 0.003)  i = Pow(e, -0.5)"
        "  n = Mul(x, i)  g = Add(w, 1.0)  y = Mul(n, g) }"
    )
    result = assert_raised(before, None, "RMS001")
    assert [node.op_type for node in result.after.graph.node] == ["RMSNormalization"]


def test_over_two_axes() -> None:
    signature = "(float[b,6,20] x) => (float[b,6,20] y) <float[6,20] w>"
    assert_raised(
        f"{signature} {{ q = Mul(x, x)  m = ReduceMean(q, [1, 2])  e = Add(m, 0.003)"
        "  r = Sqrt(e)  n = Div(x, r)  y = Mul(n, w) }",
        f"{signature} {{ y = RMSNormalization<axis = -2, epsilon = 0.003, stash_type = 1>(x, w) }}",
        "RMS001",
    )


def test_on_heads() -> None:
    """Qwen3 normalizes the queries of each head."""
    signature = "(float[b,s,120] x) => (float[b,6,s,20] y) <float[20] w>"
    assert_raised(
        f"{signature} {{ h = Reshape(x, [0, 0, 6, 20])  q = Mul(h, h)  m = ReduceMean(q, [-1])"
        "  e = Add(m, 0.003)  r = Sqrt(e)  n = Div(h, r)  z = Mul(w, n)"
        "  y = Transpose<perm = [0, 2, 1, 3]>(z) }",
        f"{signature} {{ h = Reshape(x, [0, 0, 6, 20])"
        "  z = RMSNormalization<axis = -1, epsilon = 0.003, stash_type = 1>(h, w)"
        "  y = Transpose<perm = [0, 2, 1, 3]>(z) }",
        "RMS001",
    )


def test_an_input_of_four_axes() -> None:
    signature = "(float[b,s,6,20] x) => (float[b,6,s,20] y) <float[20] w>"
    assert_raised(
        f"{signature} {{ q = Mul(x, x)  m = ReduceMean(q, [-1])  e = Add(m, 0.003)  r = Sqrt(e)"
        "  n = Div(x, r)  z = Mul(w, n)  y = Transpose<perm = [0, 2, 1, 3]>(z) }",
        f"{signature} {{ z = RMSNormalization<axis = -1, epsilon = 0.003, stash_type = 1>(x, w)"
        "  y = Transpose<perm = [0, 2, 1, 3]>(z) }",
        "RMS001",
    )


def test_two_norms_of_one_input() -> None:
    assert_raised(
        "(float[b,s,40] x) => (float[b,s,40] y, float[b,s,40] z) <float[40] w, float[40] v>"
        "{ q = Mul(x, x)  m = ReduceMean(q, [-1])  e = Add(m, 0.003)  r = Sqrt(e)  n = Div(x, r)"
        "  y = Mul(n, w)  q2 = Pow(x, 2.0)  m2 = ReduceMean(q2, [-1])  e2 = Add(m2, 0.5)"
        "  r2 = Sqrt(e2)  n2 = Div(x, r2)  z = Mul(n2, v) }",
        "(float[b,s,40] x) => (float[b,s,40] y, float[b,s,40] z) <float[40] w, float[40] v>"
        "{ y = RMSNormalization<axis = -1, epsilon = 0.003, stash_type = 1>(x, w)"
        "  z = RMSNormalization<axis = -1, epsilon = 0.5, stash_type = 1>(x, v) }",
        "RMS001",
        "RMS001",
    )


# --- casts --------------------------------------------------------------------------------------

HALF = "(float16[b,s,40] x) => (float16[b,s,40] y) <float16[40] w, float[40] v>"
INSIDE = (
    "c = Cast<to = 1>(x)  q = Mul(c, c)  m = ReduceMean(q, [-1])  e = Add(m, 0.003)"
    "  r = Sqrt(e)  n = Div(c, r)"
)


def test_casts_become_the_stash_type() -> None:
    assert_raised(
        f"{HALF} {{ {INSIDE}  d = Cast<to = 10>(n)  y = Mul(w, d) }}",
        f"{HALF} {{ y = RMSNormalization<axis = -1, epsilon = 0.003, stash_type = 1>(x, w) }}",
        "RMS001",
    )


def test_a_float_weight_inside_the_casts() -> None:
    assert_raised(
        f"{HALF} {{ {INSIDE}  z = Mul(n, v)  y = Cast<to = 10>(z) }}",
        f"{HALF} {{ h = Cast<to = 10>(v)"
        "  y = RMSNormalization<axis = -1, epsilon = 0.003, stash_type = 1>(x, h) }",
        "RMS001",
    )


def test_half_without_casts() -> None:
    assert_raised(
        f"{HALF} {{ q = Mul(x, x)  m = ReduceMean(q, [-1])  e = Add(m, 0.003h)  r = Sqrt(e)"
        "  n = Div(x, r)  y = Mul(n, w) }",
        f"{HALF} {{ y = RMSNormalization<axis = -1, epsilon = 0.0030003, stash_type = 10>(x, w) }}",
        "RMS001",
    )


def test_the_wide_result_is_read_as_well() -> None:
    """The cast back has company: the norm is fused at the wide type, and nothing is lost."""
    result = assert_raised(
        "(float16[b,s,40] x) => (float16[b,s,40] y, float[b,s,40] z)"
        f"{{ {INSIDE}  y = Cast<to = 10>(n)  z = Relu(n) }}",
        None,
        "RMS001",
    )
    assert {"RMSNormalization", "Relu"} <= {node.op_type for node in result.after.graph.node}


# --- what is no norm of this kind ---------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        # the square of something else
        "q = Mul(x, u)  m = ReduceMean(q, [-1])  e = Add(m, 0.003)  r = Sqrt(e)  y = Div(x, r)",
        # a cube
        "q = Pow(x, 3.0)  m = ReduceMean(q, [-1])  e = Add(m, 3.0)  r = Sqrt(e)  y = Div(u, r)",
        # the root scales another tensor
        "q = Mul(x, x)  m = ReduceMean(q, [-1])  e = Add(m, 0.003)  r = Sqrt(e)  y = Div(u, r)",
        # x is what divides
        "q = Mul(x, x)  m = ReduceMean(q, [-1])  e = Add(m, 0.003)  r = Sqrt(e)  y = Div(r, x)",
        # a sum, not a mean
        "q = Mul(x, x)  m = ReduceSum(q, [-1])  e = Add(m, 0.003)  r = Sqrt(e)  y = Div(x, r)",
        # multiplied by the root instead of divided
        "q = Mul(x, x)  m = ReduceMean(q, [-1])  e = Add(m, 0.003)  r = Sqrt(e)  y = Mul(x, r)",
        # another power
        "q = Mul(x, x)  m = ReduceMean(q, [-1])  e = Add(m, 0.003)  r = Pow(e, -0.4)"
        "  y = Mul(x, r)",
        # no root
        "q = Mul(x, x)  m = ReduceMean(q, [-1])  e = Add(m, 0.003)  y = Div(x, e)",
        # the mean itself
        "m = ReduceMean(x, [-1])  z = Sub(x, m)  y = Add(z, u)",
    ],
)
def test_misses(body: str) -> None:
    assert_untouched(f"(float[b,s,40] x, float[b,s,40] u) => (float[b,s,40] y) {{ {body} }}")


def test_a_product_of_another_shape_stays_outside() -> None:
    signature = "(float[b,5,40] x) => (float[b,5,40] y) <float[5,40] w>"
    result = assert_raised(
        f"{signature} {{ q = Mul(x, x)  m = ReduceMean(q, [-1])  e = Add(m, 0.003)  r = Sqrt(e)"
        "  n = Div(x, r)  y = Mul(n, w) }",
        None,
        "RMS001",
    )
    assert [node.op_type for node in result.after.graph.node] == ["RMSNormalization", "Mul"]


def test_a_computed_weight_stays_outside() -> None:
    result = assert_raised(
        "(float[b,s,40] x, float[40] g) => (float[b,s,40] y)"
        "{ q = Mul(x, x)  m = ReduceMean(q, [-1])  e = Add(m, 0.003)  r = Sqrt(e)  n = Div(x, r)"
        "  y = Mul(n, g) }",
        None,
        "RMS001",
    )
    assert [node.op_type for node in result.after.graph.node] == ["RMSNormalization", "Mul"]


# --- declines -----------------------------------------------------------------------------------


def test_epsilon_that_is_computed() -> None:
    decline = assert_kept(
        "(float[b,s,40] x, float[1] eps) => (float[b,s,40] y)"
        "{ q = Mul(x, x)  m = ReduceMean(q, [-1])  p = Abs(eps)  e = Add(m, p)  r = Sqrt(e)"
        "  y = Div(x, r) }",
        "RMS001",
        "epsilon-not-constant",
    )
    assert len(decline.nodes) == 1


@pytest.mark.parametrize("axes", ["[1]", "[0, 2]"])
def test_other_axes(axes: str) -> None:
    assert_kept(
        "(float[b,s,40] x) => (float[b,s,40] y)"
        f"{{ q = Mul(x, x)  m = ReduceMean(q, {axes})  e = Add(m, 0.003)  r = Sqrt(e)"
        "  y = Div(x, r) }",
        "RMS001",
        "axes",
    )


def test_a_mean_that_keeps_no_axis() -> None:
    assert_kept(
        "(float[b,40,40] x) => (float[b,40,40] y)"
        "{ q = Mul(x, x)  m = ReduceMean<keepdims = 0>(q, [0, 2])  e = Add(m, 0.003)"
        "  r = Sqrt(e)  y = Div(x, r) }",
        "RMS001",
        "axes",
    )


def test_axes_of_unknown_size() -> None:
    assert_kept(
        "(float[b,s,d] x) => (float[b,s,d] y)"
        "{ q = Mul(x, x)  m = ReduceMean(q, [-1])  e = Add(m, 0.003)  r = Sqrt(e)"
        "  y = Div(x, r) }",
        "RMS001",
        "axes",
    )


# --- names --------------------------------------------------------------------------------------


def test_the_module_path_stays_and_what_was_replaced_is_recorded() -> None:
    model = parse(norm(SQUARES["pow"], ROOTS["divided"], WEIGHTS["behind"]))
    for node in model.graph.node:
        node.name = f"/model/layers.1/input_layernorm/{node.op_type}"
    result = raised(model)
    fused = result.node("RMSNormalization")
    props = {prop.key: prop.value for prop in fused.metadata_props}
    assert props["pkg.torch.onnx.name_scopes"] == "model.layers.1.input_layernorm"
    assert props["onnxgen.rule"] == "RMS001"
    assert len(props["onnxgen.replaced"].split(", ")) == 6
    assert "/model/layers.1/input_layernorm/Sqrt" in props["onnxgen.replaced"]
    (site,) = result.sites
    assert site.scope == "model.layers.1.input_layernorm"
    assert site.replaced == 6
    assert site.node == fused.name
    assert "input_layernorm" in fused.name
    assert site.details["epsilon"] == pytest.approx(0.003)


def test_the_scope_that_dynamo_leaves_stays() -> None:
    model = parse(norm(SQUARES["pow"], ROOTS["divided"], WEIGHTS["behind"]))
    for index, node in enumerate(model.graph.node):
        node.name = f"node_{index}"
        scopes = ["", "model.layers.0", "model.layers.0.norm", f"mul_{index}"]
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(scopes))
    result = raised(model)
    props = {p.key: p.value for p in result.node("RMSNormalization").metadata_props}
    assert props["pkg.torch.onnx.name_scopes"] == "model.layers.0.norm"
    assert props["onnxgen.replaced"] == "node_0, node_1, node_2, node_3, node_4, node_5"


def test_an_output_of_the_graph_keeps_its_name() -> None:
    text = norm(SQUARES["mul"], ROOTS["divided"], WEIGHTS["behind"])
    result = assert_raised(text, AFTER, "RMS001")
    assert [output.name for output in result.after.graph.output] == ["y"]
    assert result.node("RMSNormalization").output[:] == ["y"]


def test_an_epsilon_with_more_axes_is_left_alone() -> None:
    """Found by hand: the result has four axes, the operator's would have three."""
    assert_untouched(
        "(float[b,5,8] x) => (float[1,b,5,8] y) <float[1,1,1,1] eps>"
        "{ q = Mul(x, x)  m = ReduceMean(q, [-1])  a = Abs(eps)  e = Add(m, a)  r = Sqrt(e)"
        "  y = Div(x, r) }"
    )
