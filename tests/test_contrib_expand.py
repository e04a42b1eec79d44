"""ONNX Runtime's other spellings of standard operators, expanded; and carried over opsets."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from onnxgen.passes.normalize import normalize
from tests.graphs import assert_same_graph, assert_same_numbers, parse, runtime


def header(opset: int = 20) -> str:
    return f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]> g '


def expanded(text: str, *, opset: int = 20) -> tuple[onnx.ModelProto, onnx.ModelProto, list[str]]:
    """The model before, normalized, and the warnings."""
    before = parse(header(opset) + text)
    model = ir.from_proto(before)
    warnings = normalize(model, 24, runtime())
    after = ir.to_proto(model)
    return before, after, warnings


X = "(float[b,s,40] x) => (float[b,s,40] y)"
XX = "(float[b,s,40] x, float[b,s,40] r) => (float[b,s,40] y)"
CASES = {
    "simplified norm": (
        f"{X} <float[40] w> {{ y = SimplifiedLayerNormalization<epsilon = 0.001>(x, w) }}",
        f"{X} <float[40] w> {{ y = RMSNormalization<axis = -1, epsilon = 0.001, stash_type = 1>(x, w) }}",
    ),
    "skip simplified norm": (
        f"{XX} <float[40] w> {{ y = com.microsoft.SkipSimplifiedLayerNormalization(x, r, w) }}",
        f"{XX} <float[40] w> {{ s = Add(x, r)"
        "  y = RMSNormalization<axis = -1, epsilon = 1e-12>(s, w) }",
    ),
    "skip simplified norm with bias and sum": (
        "(float[b,s,40] x, float[b,s,40] r) => (float[b,s,40] y, float[b,s,40] t)"
        " <float[40] w, float[40] c> { y, , , t = com.microsoft.SkipSimplifiedLayerNormalization"
        "<epsilon = 0.01>(x, r, w, c) }",
        "(float[b,s,40] x, float[b,s,40] r) => (float[b,s,40] y, float[b,s,40] t)"
        " <float[40] w, float[40] c> { s = Add(x, r)  t = Add(s, c)"
        "  y = RMSNormalization<axis = -1, epsilon = 0.01>(t, w) }",
    ),
    "skip norm of one row of residuals": (
        "(float[b,s,40] x, float[s,40] r) => (float[b,s,40] y)"
        " <float[40] w, float[40] d, float[40] c>"
        " { y = com.microsoft.SkipLayerNormalization<epsilon = 0.001>(x, r, w, d, c) }",
        "(float[b,s,40] x, float[s,40] r) => (float[b,s,40] y)"
        " <float[40] w, float[40] d, float[40] c> { s = Add(x, r)  t = Add(s, c)"
        "  y = LayerNormalization<axis = -1, epsilon = 0.001>(t, w, d) }",
    ),
    "bias gelu": (
        f"{X} <float[40] c> {{ y = com.microsoft.BiasGelu(x, c) }}",
        f'{X} <float[40] c> {{ t = Add(x, c)  y = Gelu<approximate = "none">(t) }}',
    ),
    "gelu": (
        f"{X} {{ y = com.microsoft.Gelu(x) }}",
        f'{X} {{ y = Gelu<approximate = "none">(x) }}',
    ),
    "fast gelu": (
        f"{X} <float[40] c> {{ y = com.microsoft.FastGelu(x, c) }}",
        f'{X} <float[40] c> {{ t = Add(x, c)  y = Gelu<approximate = "tanh">(t) }}',
    ),
    "fast gelu without bias": (
        f"{X} {{ y = com.microsoft.FastGelu(x) }}",
        f'{X} {{ y = Gelu<approximate = "tanh">(x) }}',
    ),
    "quick gelu": (
        f"{X} {{ y = com.microsoft.QuickGelu(x) }}",
        f"{X} {{ a = Mul(x, 1.702)  s = Sigmoid(a)  y = Mul(x, s) }}",
    ),
    "silu as quick gelu": (
        f"{X} {{ y = com.microsoft.QuickGelu<alpha = 1.0>(x) }}",
        f"{X} {{ s = Sigmoid(x)  y = Mul(x, s) }}",
    ),
    "matmul": (
        "(float[b,6,s,20] x, float[b,6,e,20] z) => (float[b,6,s,e] y)"
        " { y = com.microsoft.FusedMatMul<alpha = 0.5, transB = 1>(x, z) }",
        "(float[b,6,s,20] x, float[b,6,e,20] z) => (float[b,6,s,e] y)"
        " { t = Transpose<perm = [0, 1, 3, 2]>(z)  m = MatMul(x, t)  y = Mul(m, 0.5) }",
    ),
    "matmul of both transposed": (
        "(float[b,40,s] x) => (float[b,s,30] y) <float[30,40] w>"
        " { y = com.microsoft.FusedMatMul<transA = 1, transB = 1>(x, w) }",
        None,
    ),
    "gemm": (
        "(float[s,40] x) => (float[s,30] y) <float[30,40] w, float[30] c>"
        ' { y = com.microsoft.FusedGemm<transB = 1, activation = "LeakyRelu",'
        " activation_alpha = 0.25>(x, w, c) }",
        "(float[s,40] x) => (float[s,30] y) <float[30,40] w, float[30] c>"
        " { g = Gemm<transB = 1>(x, w, c)  y = LeakyRelu<alpha = 0.25>(g) }",
    ),
    "conv": (
        "(float[b,3,12,12] x) => (float[b,5,10,10] y) <float[5,3,3,3] w, float[5] c>"
        ' { y = com.microsoft.FusedConv<kernel_shape = [3, 3], activation = "Relu">(x, w, c) }',
        "(float[b,3,12,12] x) => (float[b,5,10,10] y) <float[5,3,3,3] w, float[5] c>"
        " { g = Conv<kernel_shape = [3, 3]>(x, w, c)  y = Relu(g) }",
    ),
    "rotary of heads": (
        "(float[b,6,s,16] x, int64[b,s] position_ids) => (float[b,6,s,16] y)"
        " <float[60,8] cos, float[60,8] sin>"
        " { y = com.microsoft.RotaryEmbedding(x, position_ids, cos, sin) }",
        "(float[b,6,s,16] x, int64[b,s] position_ids) => (float[b,6,s,16] y)"
        " <float[60,8] cos, float[60,8] sin>"
        " { y = RotaryEmbedding<interleaved = 0>(x, cos, sin, position_ids) }",
    ),
    "rotary of rows": (
        "(float[b,s,96] x, int64[b,s] position_ids) => (float[b,s,96] y)"
        " <float[60,8] cos, float[60,8] sin>"
        " { y = com.microsoft.RotaryEmbedding<interleaved = 1>(x, position_ids, cos, sin) }",
        "(float[b,s,96] x, int64[b,s] position_ids) => (float[b,s,96] y)"
        " <float[60,8] cos, float[60,8] sin>"
        " { y = RotaryEmbedding<interleaved = 1, num_heads = 6>(x, cos, sin, position_ids) }",
    ),
    "partial rotary": (
        "(float[b,s,120] x, int64[b,s] position_ids) => (float[b,s,120] y)"
        " <float[60,8] cos, float[60,8] sin> { y = com.microsoft.RotaryEmbedding"
        "<num_heads = 6, rotary_embedding_dim = 16>(x, position_ids, cos, sin) }",
        "(float[b,s,120] x, int64[b,s] position_ids) => (float[b,s,120] y)"
        " <float[60,8] cos, float[60,8] sin> { y = RotaryEmbedding"
        "<interleaved = 0, num_heads = 6, rotary_embedding_dim = 16>(x, cos, sin, position_ids) }",
    ),
    "rotary from a first position": (
        "(float[b,s,96] x, int64[1] position_ids) => (float[b,s,96] y)"
        " <float[60,8] cos, float[60,8] sin>"
        " { y = com.microsoft.RotaryEmbedding(x, position_ids, cos, sin) }",
        None,
    ),
    "embedding": (
        "(int32[b,s] ids, int32[b,s] types, int32[b,s] mask) =>"
        " (float[b,s,40] y, int32[b] n, float[b,s,40] t)"
        " <float[37,40] words, float[60,40] places, float[20,40] kinds, float[40] w, float[40] d>"
        " { y, n, t = com.microsoft.EmbedLayerNormalization<epsilon = 0.001>"
        "(ids, types, words, places, kinds, w, d, mask) }",
        None,
    ),
    "embedding with positions and nothing else": (
        "(int32[b,s] ids, int32[b,s] position_ids) => (float[b,s,40] y, int32[b] n)"
        " <float[37,40] words, float[60,40] places, float[40] w, float[40] d>"
        " { y, n = com.microsoft.EmbedLayerNormalization"
        "(ids, , words, places, , w, d, , position_ids) }",
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_expanded(name: str) -> None:
    text, wanted = CASES[name]
    before, after, warnings = expanded(text)
    assert not warnings
    assert {node.domain for node in after.graph.node} <= {""}
    assert "SimplifiedLayerNormalization" not in {node.op_type for node in after.graph.node}
    if wanted is not None:
        assert_same_graph(after, parse(wanted, opset=24))
    lengths = [{"b": 2, "s": 5, "p": 0, "e": 9}, {"b": 3, "s": 1, "p": 0, "e": 8}]
    assert_same_numbers(before, after, lengths)


def test_names_and_metadata_stay() -> None:
    before = parse(header() + f"{X} <float[40] c> {{ y = com.microsoft.BiasGelu(x, c) }}")
    before.graph.node[0].name = "/mlp/act"
    before.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['mlp']")
    model = ir.from_proto(before)
    normalize(model, 24, runtime())
    gelu = model.graph.outputs[0].producer()
    assert gelu is not None
    assert gelu.name == "/mlp/act"
    for node in model.graph:
        assert node.metadata_props["pkg.torch.onnx.name_scopes"] == "['mlp']"


BATCHES = "(float[b,6,s,20] x, float[b,6,20,s] z) => (float[b,6,s,s] y)"
KEPT = {
    "batch axes": (
        f"{BATCHES} {{ y = com.microsoft.FusedMatMul<transBatchA = 1>(x, z) }}",
        "its batch axes are transposed",
    ),
    "rank": (
        "(float[b,s] x, int64[n] shape) => (float[b,s] y) { z = Reshape(x, shape)"
        "  m = com.microsoft.FusedMatMul<transA = 1>(z, x)  y = Add(m, x) }",
        "the rank of what it transposes is not known",
    ),
    "activation": (
        "(float[s,40] x) => (float[s,30] y) <float[40,30] w>"
        ' { y = com.microsoft.FusedGemm<activation = "Unheard">(x, w) }',
        "the activation Unheard is not known",
    ),
    "mean": (
        "(float[b,s,40] x, float[b,s,40] r) => (float[b,s,40] y, float[b,s,1] m)"
        " <float[40] w, float[40] d>"
        " { y, m = com.microsoft.SkipLayerNormalization(x, r, w, d) }",
        "output 1 has no standard form",
    ),
    "element types": (
        "(float16[b,s,40] x) => (float[b,s,40] y) <float[40] w>"
        " { y = SimplifiedLayerNormalization(x, w) }",
        "its weight has another element type than its input",
    ),
    "packed batch": (
        "(float[b,s,96] x, int64[b,s] position_ids) => (float[b,s,96] y)"
        " <float[60,8] cos, float[60,8] sin> { y = com.microsoft.RotaryEmbedding"
        "<is_packed_batching = 1>(x, position_ids, cos, sin) }",
        "its batch is packed",
    ),
    "scaled positions": (
        "(float[b,s,96] x, int64[b,s] position_ids) => (float[b,s,96] y)"
        " <float[60,8] cos, float[60,8] sin> { y = com.microsoft.RotaryEmbedding"
        "<scale = 0.5>(x, position_ids, cos, sin) }",
        "it scales the positions",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_with_the_reason(name: str) -> None:
    text, reason = KEPT[name]
    before, after, warnings = expanded(text)
    (warning,) = warnings
    assert warning.endswith(f"stays as it is: {reason}")
    assert [n.op_type for n in before.graph.node] == [n.op_type for n in after.graph.node]


# --- opsets below 18 ----------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_contrib_nodes_stand_aside_while_the_opset_is_converted(opset: int) -> None:
    text = (
        "(float[b,s,40] x, float[b,s,40] r) => (float[b,s,40] y, float[b,s,40] t)"
        " <float[40] w, float[40] d, float[40] c>"
        " { a = Relu(x)  n, , , t = com.microsoft.SkipLayerNormalization<epsilon = 0.001>"
        "(a, r, w, d)  m = ReduceMean<axes = [2], keepdims = 1>(n)  k = Sub(n, m)"
        "  g = com.microsoft.BiasGelu(k, c)  l = LayerNormalization<epsilon = 0.001>(g, w, d)"
        "  y = SimplifiedLayerNormalization(l, w) }"
    )
    before, after, warnings = expanded(text, opset=opset)
    assert not warnings
    kinds = [node.op_type for node in after.graph.node]
    wanted = "Add Add Gelu LayerNormalization LayerNormalization RMSNormalization ReduceMean"
    assert sorted(kinds) == [*wanted.split(), "Relu", "Sub"]
    (mean,) = [node for node in after.graph.node if node.op_type == "ReduceMean"]
    assert len(mean.input) == 2  # converted: its axes are an input
    assert_same_numbers(before, after)


def test_a_graph_of_contrib_nodes_alone() -> None:
    before, after, _ = expanded(f"{X} {{ y = com.microsoft.Gelu(x) }}", opset=12)
    assert [node.op_type for node in after.graph.node] == ["Gelu"]
    assert_same_numbers(before, after)
