"""ATT002: an Attention that an exporter wrote takes its cache inside."""

from __future__ import annotations

import pytest
from onnx import helper

from tests.graphs import assert_kept, assert_raised, assert_untouched, parse, raised

SIGNATURE = (
    "(int64[b,s] ids, int64[b,t] attention_mask, float[b,3,p,20] past_k, float[b,3,p,20] past_v)"
    " => (float[b,6,s,20] y, float[b,3,t,20] present_k, float[b,3,t,20] present_v)"
    " <float[37,50] table, float[50,120] wq, float[50,60] wk, float[50,60] wv>"
)
PROJECTED = (
    "x = Gather(table, ids)  qp = MatMul(x, wq)  kp = MatMul(x, wk)  vp = MatMul(x, wv)"
    "  q3 = Reshape(qp, [0, 0, 6, 20])  k3 = Reshape(kp, [0, 0, 3, 20])"
    "  v3 = Reshape(vp, [0, 0, 3, 20])"
    "  q = Transpose<perm = [0, 2, 1, 3]>(q3)  k = Transpose<perm = [0, 2, 1, 3]>(k3)"
    "  v = Transpose<perm = [0, 2, 1, 3]>(v3)"
)
CACHED = "present_k = Concat<axis = 2>(past_k, k)  present_v = Concat<axis = 2>(past_v, v)"
REPEATED = (
    "ku = Unsqueeze(present_k, [2])  ke = Expand(ku, [1, 1, 2, 1, 1])"
    "  kr = Reshape(ke, [0, 6, -1, 20])"
    "  vu = Unsqueeze(present_v, [2])  ve = Expand(vu, [1, 1, 2, 1, 1])"
    "  vr = Reshape(ve, [0, 6, -1, 20])"
)
KEEP = (
    "tl = Shape<start = 1, end = 2>(attention_mask)  tt = Squeeze(tl, [0])"
    "  sl = Shape<start = 1, end = 2>(ids)  ss = Squeeze(sl, [0])  pp = Sub(tt, ss)"
    "  cols = Range(0, tt, 1)  rows = Range(pp, tt, 1)  ru = Unsqueeze(rows, [1])"
    "  causal = LessOrEqual(cols, ru)  am = Cast<to = 9>(attention_mask)"
    "  au = Unsqueeze(am, [1, 2])  keep = And(causal, au)"
)


def exported(attention: str, repeated: str = REPEATED, keep: str = KEEP) -> str:
    return f"{SIGNATURE} {{ {PROJECTED}  {CACHED}  {repeated}  {keep}  {attention} }}"


@pytest.mark.parametrize(
    "attributes",
    ["scale = 0.31", "scale = 0.31, softcap = 20.0", "scale = 0.2, softmax_precision = 1"],
)
def test_the_cache_and_the_groups_move_inside(attributes: str) -> None:
    result = assert_raised(
        exported(f"y = Attention<{attributes}>(q, kr, vr, keep)"), None, "ATT002", opset=23
    )
    node = result.node("Attention")
    assert list(node.input[3:]) == ["keep", "past_k", "past_v"]
    assert list(node.output) == ["y", "present_k", "present_v"]
    assert result.count("Expand") == result.count("Concat") == 0
    written = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    given = dict(each.split(" = ") for each in attributes.split(", "))
    assert written == {name: pytest.approx(float(number)) for name, number in given.items()}
    details = result.sites[0].details
    assert (details["heads"], details["kv_heads"]) == (6, 3)
    assert result.sites[0].details["cache"] == "concatenated"


def test_the_graph_before_and_after() -> None:
    signature = (
        "(int64[b,s] ids, float[b,3,p,20] past_k, float[b,3,p,20] past_v)"
        f" => {SIGNATURE.split(' => ')[1]}"
    )
    assert_raised(
        f"{signature} {{ {PROJECTED}  {CACHED}  {REPEATED}  y = Attention(q, kr, vr) }}",
        f"{signature} {{ {PROJECTED}"
        "  y, present_k, present_v = Attention(q, k, v, , past_k, past_v) }",
        "ATT002",
        opset=23,
    )


def test_groups_alone() -> None:
    """Without a cache the repeats still go: the operator shares heads itself."""
    signature = (
        "(int64[b,s] ids) => (float[b,6,s,20] y)"
        " <float[37,50] table, float[50,120] wq, float[50,60] wk, float[50,60] wv>"
    )
    repeated = REPEATED.replace("present_k", "k").replace("present_v", "v")
    assert_raised(
        f"{signature} {{ {PROJECTED}  {repeated}  y = Attention<is_causal = 1>(q, kr, vr) }}",
        f"{signature} {{ {PROJECTED}  y = Attention<is_causal = 1>(q, k, v) }}",
        "ATT002",
        opset=23,
    )


def test_nothing_to_gain() -> None:
    signature = (
        "(int64[b,s] ids) => (float[b,6,s,20] y)"
        " <float[37,50] table, float[50,120] wq, float[50,60] wk, float[50,60] wv>"
    )
    assert_untouched(f"{signature} {{ {PROJECTED}  y = Attention(q, k, v) }}", opset=23)


def test_a_cache_that_is_inside_already() -> None:
    assert_untouched(
        f"{SIGNATURE} {{ {PROJECTED}  {KEEP}"
        "  y, present_k, present_v = Attention(q, k, v, keep, past_k, past_v) }",
        opset=23,
    )


def test_causal_with_a_concatenated_cache() -> None:
    """is_causal counts from the first key here, and would count from the last inside."""
    assert_kept(
        exported("y = Attention<is_causal = 1>(q, kr, vr)", keep="m0 = Identity(attention_mask)"),
        "ATT002",
        "causal",
        opset=23,
    )


def test_heads_that_are_repeated_the_other_way() -> None:
    tiled = "kr = Tile(present_k, [1, 2, 1, 1])  vr = Tile(present_v, [1, 2, 1, 1])"
    assert_kept(
        exported("y = Attention(q, kr, vr, keep)", repeated=tiled), "ATT002", "layout", opset=23
    )


def test_the_module_path_stays() -> None:
    model = parse(exported("y = Attention(q, kr, vr, keep)"), opset=23)
    for index, node in enumerate(model.graph.node):
        node.name = f"node_{index}"
        scopes = ["", "model.layers.1", "model.layers.1.self_attn", f"n{index}"]
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(scopes))
    result = raised(model)
    props = {p.key: p.value for p in result.node("Attention").metadata_props}
    assert props["pkg.torch.onnx.name_scopes"] == "model.layers.1.self_attn"
    assert props["onnxgen.rule"] == "ATT002"
    assert len(props["onnxgen.replaced"].split(", ")) == result.sites[0].replaced == 9
