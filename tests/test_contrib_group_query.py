"""MSA001: ONNX Runtime's GroupQueryAttention, raised: rows of different lengths, spare places."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from onnxgen.analysis.feeds import RunShape, forced_shape
from onnxgen.analysis.masks import mask_families
from onnxgen.analysis.roles import find_roles
from onnxgen.analysis.sampling import Sampler
from onnxgen.passes.raise_ import raise_model
from onnxgen.passes.tidy import tidy
from onnxgen.report.values import Proof, Site
from onnxgen.verify.compare import verify_models
from onnxgen.verify.rewrites import RewriteChecker
from tests.graphs import normalized, parse, run, runtime

HEADER = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g '
COUNTED = (
    "n = ReduceSum<keepdims = 0>(attention_mask, [1])  n1 = Sub(n, 1)  count = Cast<to = 6>(n1)"
    "  l = Shape(attention_mask)  t64 = Gather(l, 1)  total = Cast<to = 6>(t64)"
)
EVERYWHERE = (
    "ps = Shape<start = 2, end = 3>(past_k)  ss = Shape<start = 1, end = 2>(ids)"
    "  tt = Add(ps, ss)  total1 = Cast<to = 6>(tt)  total = Squeeze(total1)"
    "  n1 = Sub(tt, 1)  bs = Shape<start = 0, end = 1>(ids)  n = Expand(n1, bs)"
    "  count = Cast<to = 6>(n)"
)
SEPARATE = "x = Gather(table, ids)  q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)"
PACKED = "x = Gather(table, ids)  q = MatMul(x, w)"
CACHES = "float[b,3,p,d] past_k, float[b,3,p,d] past_v"
MASK = ", int64[b,t] attention_mask"


def model(
    *,
    attributes: str = "",
    more: str = "",
    inputs: str = MASK,
    weights: str = "",
    counted: str = COUNTED,
    packed: bool = False,
    presents: str = ", present_k, present_v",
    outputs: str = ", float[b,3,u,d] present_k, float[b,3,u,d] present_v",
) -> onnx.ModelProto:
    """A model of one GroupQueryAttention: 6 heads of 16 on 3."""
    widths = "float[50,192] w" if packed else "float[50,96] wq, float[50,48] wk, float[50,48] wv"
    operands = "q, , " if packed else "q, k, v"
    text = (
        f"{HEADER} (int64[b,s] ids, {CACHES}{inputs}) => (float[b,s,96] y{outputs})"
        f" <float[37,50] table, {widths}{weights}> {{ {PACKED if packed else SEPARATE}  {counted}"
        f"  y{presents} = com.microsoft.GroupQueryAttention<num_heads = 6, kv_num_heads = 3{attributes}>"
        f"({operands}, past_k, past_v, count, total{more}) }}"
    )
    rng = np.random.default_rng(0)
    angles = rng.standard_normal((400, 8))
    tables = {"cos": np.cos(angles), "sin": np.sin(angles)} if "cos" in weights else {}
    return parse(text, weights={name: each.astype(np.float32) for name, each in tables.items()})


ROTARY = {"weights": ", float[400,8] cos, float[400,8] sin", "more": ", cos, sin"}


def fused(
    before: onnx.ModelProto, least: int, rule: str = "MSA001"
) -> tuple[onnx.ModelProto, Site, Proof]:
    """The model raised at one site, and proven on at least so many cases."""
    normal, roles = normalized(before)
    sampler = Sampler(normal.graph, roles, runtime())
    checker = RewriteChecker(runtime(), roles)
    (site,) = raise_model(normal, roles, sampler=sampler, check=checker)
    assert site.status == "fused", site.decline
    assert site.rule == rule
    families = mask_families(normal.graph, sampler)
    site.details["mask"] = str(families[site.node])
    tidy(normal)
    after = ir.to_proto(normal)
    proof = verify_models(before.SerializeToString(), after.SerializeToString(), runtime=runtime())
    assert proof.status == "proven", proof.reason
    assert sum(not case.skipped for case in proof.cases) >= least, proof.cases
    return after, site, proof


def count(model: onnx.ModelProto, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph.node)


def only(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    (node,) = [node for node in model.graph.node if node.op_type == op_type]
    return node


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("interleaved", [0, 1])
def test_rows_of_different_lengths(packed: bool, interleaved: int) -> None:
    after, site, proof = fused(
        model(
            attributes=f", do_rotary = 1, rotary_interleaved = {interleaved}",
            packed=packed,
            **ROTARY,
        ),
        least=14,
    )
    assert (count(after, "TensorScatter"), count(after, "RotaryEmbedding")) == (2, 2)
    attention = only(after, "Attention")
    assert list(attention.input[1:3]) == ["present_k", "present_v"]
    assert len(attention.input) == 4
    assert site.details["cache"] == "written"
    assert site.details["mask"] == "causal"
    names = [case.name for case in proof.cases if not case.skipped]
    for word in ("right padding", "spare", "prefill", "decode", "3 tokens over past 7"):
        assert any(word in name for name in names), word


@pytest.mark.parametrize(
    "given",
    [
        {"attributes": ", smooth_softmax = 1"},
        {"weights": ", float[6] sink", "more": ", , , , , sink"},
    ],
)
def test_sinks_are_ours(given: dict[str, str]) -> None:
    after, site, _ = fused(model(**given), least=9)
    attention = only(after, "SinkAttention")
    assert attention.input[6]
    assert attention.input[3], "it knows no is_causal"
    assert site.details["mask"] == "causal"


def test_several_tokens_over_a_past_for_every_row() -> None:
    """The operator takes them for one sequence only; what it becomes gives each row's own."""
    before = model(attributes=", do_rotary = 1", **ROTARY)
    after, _, _ = fused(before, least=14)
    rng = np.random.default_rng(1)
    mask = np.ones((2, 9), np.int64)
    mask[1, 6:] = 0
    feeds = {
        "ids": rng.integers(0, 37, (2, 4)),
        "past_k": rng.standard_normal((2, 3, 5, 16)).astype(np.float32),
        "past_v": rng.standard_normal((2, 3, 5, 16)).astype(np.float32),
        "attention_mask": mask,
    }
    both = run(after, feeds)["y"]
    for row, total in ((0, 9), (1, 6)):
        alone = {name: value[row : row + 1] for name, value in feeds.items()}
        past = total - 4
        alone["past_k"], alone["past_v"] = (alone[n][:, :, :past] for n in ("past_k", "past_v"))
        alone["attention_mask"] = np.ones((1, total), np.int64)
        np.testing.assert_allclose(both[row], run(before, alone)["y"][0], atol=2e-5)


@pytest.mark.parametrize("window", [2, 3])
def test_window(window: int) -> None:
    _, site, _ = fused(model(attributes=f", local_window_size = {window}"), least=14)
    assert site.details["mask"] == f"window {window}"


def test_softcap_and_scale() -> None:
    after, _, _ = fused(model(attributes=", softcap = 2.0, scale = 0.7"), least=14)
    given = {a.name: helper.get_attribute_value(a) for a in only(after, "Attention").attribute}
    assert given == {"scale": pytest.approx(0.7), "softcap": 2.0}


def test_everything_is_seen() -> None:
    after, _, _ = fused(model(attributes=", causal = 0"), least=14)
    assert count(after, "Less") == 1


def test_position_ids_of_a_prompt_count_from_the_first() -> None:
    before = model(
        attributes=", do_rotary = 1",
        inputs=MASK + ", int64[b,s] position_ids",
        weights=ROTARY["weights"],
        more=", cos, sin, position_ids",
    )
    after, _, _ = fused(before, least=14)
    rng = np.random.default_rng(1)
    for new, past in ((5, 0), (1, 4)):  # positions as nobody feeds them, a prompt's and one's
        feeds = {
            "ids": rng.integers(0, 37, (2, new)),
            "past_k": rng.standard_normal((2, 3, past, 16)).astype(np.float32),
            "past_v": rng.standard_normal((2, 3, past, 16)).astype(np.float32),
            "attention_mask": np.ones((2, past + new), np.int64),
            "position_ids": rng.integers(0, 300, (2, new)),
        }
        np.testing.assert_allclose(run(after, feeds)["y"], run(before, feeds)["y"], atol=2e-5)


@pytest.mark.parametrize("axes", ["b,6", "1,1"])
def test_attention_bias(axes: str) -> None:
    inputs = f"{MASK}, float[{axes},s,t] added"
    after, _, _ = fused(model(inputs=inputs, more=", , , , added"), least=12)
    assert count(after, "Pad") == 1


def test_partial_rotary() -> None:
    before = model(attributes=", do_rotary = 1", **ROTARY)
    wide = onnx.ModelProto()
    wide.CopyFrom(before)
    for tensor in wide.graph.initializer:  # heads of 32, of which 16 turn
        if tensor.name in ("wq", "wk", "wv"):
            values = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.tile(values, 2), tensor.name))
    wide.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 192
    after, _, _ = fused(wide, least=14)
    turned = [node for node in after.graph.node if node.op_type == "RotaryEmbedding"]
    for node in turned:
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert given["rotary_embedding_dim"] == 16


def test_counts_that_follow_from_sizes_keep_the_cache_inside() -> None:
    after, site, _ = fused(model(inputs="", counted=EVERYWHERE), least=7)
    assert count(after, "TensorScatter") == count(after, "Concat") == 0
    attention = only(after, "Attention")
    assert list(attention.input[4:]) == ["past_k", "past_v"]
    assert {a.name: a.i for a in attention.attribute if a.name == "is_causal"} == {"is_causal": 1}
    assert site.details["cache"] == "concatenated"


def test_counts_that_follow_from_sizes_with_a_window() -> None:
    _, site, _ = fused(
        model(inputs="", counted=EVERYWHERE, attributes=", local_window_size = 3"), least=7
    )
    assert site.details["mask"] == "window 3"


def test_one_mask_for_all_layers() -> None:
    one = model(attributes=", do_rotary = 1", **ROTARY)
    two = onnx.ModelProto()
    two.CopyFrom(one)
    (node,) = [node for node in two.graph.node if node.op_type == "GroupQueryAttention"]
    second = two.graph.node.add()
    second.CopyFrom(node)
    second.output[:] = ["y2", "present_k2", "present_v2"]
    second.input[3:5] = ["past_k2", "past_v2"]
    for name in ("past_k", "past_v"):
        (value,) = [each for each in one.graph.input if each.name == name]
        two.graph.input.add().CopyFrom(value)
        two.graph.input[-1].name = f"{name}2"
    for value in one.graph.output:
        two.graph.output.add().CopyFrom(value)
        two.graph.output[-1].name = f"{value.name}2"
    normal, roles = normalized(two)
    raise_model(normal, roles)
    tidy(normal)
    after = ir.to_proto(normal)
    assert count(after, "Attention") == 2
    assert count(after, "LessOrEqual") == count(after, "ConstantOfShape") == 1
    assert len({node.input[3] for node in after.graph.node if node.op_type == "Attention"}) == 1


@pytest.mark.parametrize(
    ("code", "given"),
    [
        ("quantized-cache", {"attributes": ', k_quant_type = "PER_TENSOR"'}),
        ("window-cache", {"attributes": ", local_window_size = 4, sliding_window_cache = 1"}),
        ("unsupported", {"attributes": ", local_window_size = 0"}),
        ("unsupported", {"attributes": ", qk_output = 1"}),
        (
            "unsupported",
            {"weights": ", float[16] g", "more": ", , , , , , , , g, g"},
        ),
    ],
)
def test_declines(code: str, given: dict[str, str]) -> None:
    normal, roles = normalized(model(**given))
    (site,) = raise_model(normal, roles)
    assert site.decline is not None
    assert (site.rule, site.decline.code) == ("MSA001", code)
    assert "GroupQueryAttention" in {node.op_type for node in normal.graph}


def test_declines_heads_of_unknown_size() -> None:
    text = (
        f"{HEADER} (float[b,s,h] q, {CACHES}{MASK}) => (float[b,s,h] y)"
        f" {{ {COUNTED}  y = com.microsoft.GroupQueryAttention<num_heads = 6, kv_num_heads = 3>"
        "(q, , , past_k, past_v, count, total) }"
    )
    normal, roles = normalized(parse(text))
    (site,) = raise_model(normal, roles)
    assert site.decline is not None
    assert site.decline.code == "layout"


# --- what its inputs are fed --------------------------------------------------------------------


def test_a_counted_cache_is_padded_on_the_right_only_and_may_be_longer() -> None:
    roles = find_roles(ir.from_proto(model()))
    assert roles.counted
    assert all(pair.head_size == 16 for pair in roles.pairs)
    assert forced_shape(roles, RunShape(2, 5, padding="left")) is None
    assert forced_shape(roles, RunShape(2, 5, padding="right")) is not None
    assert forced_shape(roles, RunShape(2, 5, spare=4)) is not None


def test_counts_from_sizes_are_no_counted_cache() -> None:
    roles = find_roles(ir.from_proto(model(inputs="", counted=EVERYWHERE)))
    assert roles.pairs
    assert not roles.counted
    assert forced_shape(roles, RunShape(2, 5, spare=4)) is None


def test_what_was_raised_is_counted_still() -> None:
    after, _, _ = fused(model(), least=14)
    roles = find_roles(ir.from_proto(after))
    assert [role.role for role in roles.inputs.values()] == ["ids", "past", "past", "mask"]
    assert roles.counted
