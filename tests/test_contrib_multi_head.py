"""MSA002, MSA003, MSA004: ONNX Runtime's MultiHeadAttention and packed Attention, raised or kept."""

from __future__ import annotations

import pytest
from onnx import helper

from tests.graphs import Raised, assert_raised

HEADER = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g '
QKV = "x = Gather(table, ids)  q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)"
WEIGHTS = "<float[37,50] table, float[50,120] wq, float[50,120] wk, float[50,96] wv"


def multi_head(
    arguments: str,
    *,
    attributes: str = "",
    inputs: str = "",
    weights: str = "",
    outputs: str = "",
    presents: str = "",
    nodes: str = "",
) -> str:
    """A model of one MultiHeadAttention: 6 heads of 20, values of 16 where it takes no past."""
    text = (
        f"{HEADER} (int64[b,s] ids{inputs}) => (float[b,s,96] y{outputs}) {WEIGHTS}{weights}>"
        f" {{ {QKV}  {nodes}"
        f"  y{presents} = com.microsoft.MultiHeadAttention<num_heads = 6{attributes}>({arguments}) }}"
    )
    if presents or "v2" in inputs:
        text = text.replace("float[50,96] wv", "float[50,120] wv").replace("b,s,96", "b,s,120")
    return text


def written(result: Raised) -> dict[str, object]:
    node = result.node("Attention")
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


PAST = {
    "inputs": ", float[b,6,p,20] past_key, float[b,6,p,20] past_value",
    "outputs": ", float[b,6,t,20] present_key, float[b,6,t,20] present_value",
    "presents": ", present_key, present_value",
}


def test_plain() -> None:
    result = assert_raised(
        multi_head("q, k, v"),
        f"(int64[b,s] ids) => (float[b,s,96] y) {WEIGHTS}>"
        f" {{ {QKV}  q4 = Reshape(q, [0, 0, 6, 20])  qh = Transpose<perm = [0, 2, 1, 3]>(q4)"
        "  k4 = Reshape(k, [0, 0, 6, 20])  kh = Transpose<perm = [0, 2, 1, 3]>(k4)"
        "  v4 = Reshape(v, [0, 0, 6, 16])  vh = Transpose<perm = [0, 2, 1, 3]>(v4)"
        "  a = Attention<scale = 0.2236068>(qh, kh, vh)"
        "  t = Transpose<perm = [0, 2, 1, 3]>(a)  y = Reshape(t, [0, 0, 96]) }",
        "MSA002",
    )
    details = result.sites[0].details
    assert [details[key] for key in ("heads", "kv_heads", "head_size")] == [6, 6, 20]


def test_scale_and_causal() -> None:
    result = assert_raised(
        multi_head("q, k, v", attributes=", unidirectional = 1, scale = 0.31"), None, "MSA002"
    )
    assert written(result) == {"scale": pytest.approx(0.31), "is_causal": 1}


def test_bias_of_all_three() -> None:
    result = assert_raised(multi_head("q, k, v, bias", weights=", float[336] bias"), None, "MSA002")
    assert result.count("Add") == 3


@pytest.mark.parametrize("causal", [0, 1])
def test_past(causal: int) -> None:
    result = assert_raised(
        multi_head(
            "q, k, v, , , , past_key, past_value", attributes=f", unidirectional = {causal}", **PAST
        ),
        None,
        "MSA002",
    )
    assert list(result.node("Attention").input[4:]) == ["past_key", "past_value"]
    assert result.count("Concat") == 0


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("lowered", ["", ", mask_filter_value = -1.5"])
def test_key_mask_is_lowered_by_a_finite_number(causal: int, lowered: str) -> None:
    past = {**PAST, "inputs": PAST["inputs"] + ", int32[b,t] mask"}
    assert_raised(
        multi_head(
            "q, k, v, , mask, , past_key, past_value",
            attributes=f", unidirectional = {causal}{lowered}",
            **past,
        ),
        None,
        "MSA002",
    )


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("bias", ["b,6,s,s", "1,1,s,s"])
def test_key_mask_of_each_query_and_bias(causal: int, bias: str) -> None:
    assert_raised(
        multi_head(
            "q, k, v, , mask, added",
            attributes=f", unidirectional = {causal}, mask_filter_value = -2.0",
            inputs=f", int32[b,s,s] mask, float[{bias}] added",
        ),
        None,
        "MSA002",
    )


@pytest.mark.parametrize(
    "made",
    [
        "counts = ReduceSum<keepdims = 0>(mask, [1])",
        "ends = ReduceSum<keepdims = 0>(mask, [1])  starts = Sub(ends, ends)"
        "  counts = Concat<axis = 0>(ends, starts)",
    ],
)
def test_key_mask_of_counts(made: str) -> None:
    model = multi_head(
        "q, k, v, , lengths",
        attributes=", mask_filter_value = -1.5",
        inputs=", int64[b,s] mask",
        nodes=f"{made}  lengths = Cast<to = 6>(counts)",
    )
    if "starts" in made:  # MultiHeadAttention knows [B] and [3B+2] only
        model = packed(
            "x, w, wb, lengths",
            inputs=", int64[b,s] mask",
            nodes=f"{made}  lengths = Cast<to = 6>(counts)",
        )
    assert_raised(model, None, "MSA003" if "starts" in made else "MSA002")


def test_keys_of_another_sequence() -> None:
    assert_raised(
        multi_head(
            "q, k2, v2",
            inputs=", float[b,6,e,20] k2, float[b,6,e,20] v2",
            nodes="",
        )
        .replace("  k = MatMul(x, wk)  v = MatMul(x, wv)", "")
        .replace(", float[50,120] wk, float[50,120] wv", ""),
        None,
        "MSA002",
    )


@pytest.mark.parametrize(
    ("code", "model"),
    [
        (
            "unsupported",
            multi_head(
                "q, k, v",
                presents=", , , scores",
                outputs=", float[b,6,s,s] scores",
            ),
        ),
        (
            "unsupported",
            multi_head(
                "q, k, v2, bias",
                inputs=", float[b,6,s,20] v2",
                weights=", float[336] bias",
            )
            .replace("  v = MatMul(x, wv)", "")
            .replace(", float[50,120] wv", ""),
        ),
        (
            "layout",
            multi_head(
                "q, k, v, , mask",
                inputs=", int32[n] mask",
            ),
        ),
    ],
)
def test_multi_head_declines(code: str, model: str) -> None:
    found = kept(model, "MSA002")
    assert found == code


def kept(model: str, rule: str) -> str:
    """The code that the rule keeps its site with; the model need not run."""
    import onnx_ir as ir

    from onnxgen.passes.raise_ import raise_model
    from tests.graphs import normalized, parse

    normal, roles = normalized(parse(model))
    (site,) = raise_model(normal, roles)
    assert site.decline is not None
    assert site.rule == rule
    assert isinstance(normal, ir.Model)
    return site.decline.code


@pytest.mark.parametrize(
    ("code", "arguments", "inputs"),
    [
        ("packed", "qkv", ", float[b,s,6,3,20] qkv"),
        ("packed", "q, kv", ", float[b,s,6,2,20] kv"),
        (
            "shared-buffer",
            "q, k, v, , , , pk, pv, n",
            ", float[b,6,p,20] pk, float[b,6,p,16] pv, int32[1] n",
        ),
    ],
)
def test_multi_head_declines_what_no_cpu_kernel_runs(
    code: str, arguments: str, inputs: str
) -> None:
    assert kept(multi_head(arguments, inputs=inputs), "MSA002") == code


# --- packed Attention ---------------------------------------------------------------------------


def packed(
    arguments: str,
    *,
    attributes: str = "",
    inputs: str = "",
    outputs: str = "",
    present: str = "",
    nodes: str = "",
) -> str:
    """A model of one com.microsoft Attention: 6 heads of 20."""
    return (
        f"{HEADER} (int64[b,s] ids{inputs}) => (float[b,s,120] y{outputs})"
        " <float[37,50] table, float[50,360] w, float[360] wb>"
        f" {{ x = Gather(table, ids)  {nodes}"
        f"  y{present} = com.microsoft.Attention<num_heads = 6{attributes}>({arguments}) }}"
    )


STACKED = {
    "inputs": ", float[2,b,6,p,20] past",
    "outputs": ", float[2,b,6,t,20] present",
    "present": ", present",
}


def test_packed_plain() -> None:
    assert_raised(
        packed("x, w, wb"),
        "(int64[b,s] ids) => (float[b,s,120] y)"
        " <float[37,50] table, float[50,360] w, float[360] wb>"
        " { x = Gather(table, ids)  p = MatMul(x, w)  pb = Add(p, wb)"
        "  q, k, v = Split<axis = -1>(pb, [120, 120, 120])"
        "  q4 = Reshape(q, [0, 0, 6, 20])  qh = Transpose<perm = [0, 2, 1, 3]>(q4)"
        "  k4 = Reshape(k, [0, 0, 6, 20])  kh = Transpose<perm = [0, 2, 1, 3]>(k4)"
        "  v4 = Reshape(v, [0, 0, 6, 20])  vh = Transpose<perm = [0, 2, 1, 3]>(v4)"
        "  a = Attention<scale = 0.2236068>(qh, kh, vh)"
        "  t = Transpose<perm = [0, 2, 1, 3]>(a)  y = Reshape(t, [0, 0, 120]) }",
        "MSA003",
    )


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("mask", ["", "mask"])
def test_packed_past(causal: int, mask: str) -> None:
    stacked = dict(STACKED)
    if mask:
        stacked["inputs"] += ", int32[b,t] mask"
    result = assert_raised(
        packed(f"x, w, wb, {mask}, past", attributes=f", unidirectional = {causal}", **stacked),
        None,
        "MSA003",
    )
    assert ("is_causal" in written(result)) == (bool(causal) and not mask)


def test_packed_sizes_differ() -> None:
    model = packed("x, w, wb", attributes=", qkv_hidden_sizes = [132, 132, 96], scale = 0.4")
    assert_raised(model.replace("float[b,s,120]", "float[b,s,96]"), None, "MSA003")


@pytest.mark.parametrize(
    ("code", "model"),
    [
        (
            "shared-buffer",
            packed(
                "x, w, wb, , past, , n", **{**STACKED, "inputs": STACKED["inputs"] + ", int32[1] n"}
            ),
        ),
        ("rotary", packed("x, w, wb", attributes=", do_rotary = 1")),
        ("layout", packed("x, w, wb, mask", inputs=", int32[b,1,m,m] mask")),
        ("layout", packed("x, w, wb", attributes=", qkv_hidden_sizes = [131, 133, 96]")),
    ],
)
def test_packed_declines(code: str, model: str) -> None:
    assert kept(model, "MSA003") == code


@pytest.mark.parametrize(
    ("op", "code"),
    [
        ("DecoderMaskedMultiHeadAttention", "shared-buffer"),
        ("PackedMultiHeadAttention", "packed"),
        ("QAttention", "quantized"),
        ("SparseAttention", "other"),
    ],
)
def test_others_are_named(op: str, code: str) -> None:
    model = multi_head("q, k, v").replace("MultiHeadAttention", op)
    assert kept(model, "MSA004") == code
