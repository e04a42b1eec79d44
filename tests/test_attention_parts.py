"""The nodes of each attention layer, in whatever operators it is written."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir
import pytest

from onnxgen import api
from onnxgen.analysis.graph import read_by
from onnxgen.analysis.regions import find_regions
from onnxgen.testing import CorpusEntry, corpus
from tests.regions import assert_in_one_piece, model_of, places_of

ENTRIES = corpus()
# How the corpus' models count their layers; dynamo writes what a list was cut by.
LAYER = r"\b(layers?|h|block)\.(slice\(.*?\)\.)?\d+"


# --- graphs -------------------------------------------------------------------------------------

WEIGHTS = "<float[40] n, float[40,40] wq, float[40,40] wk, float[40,40] wv, float[40,40] wo, float[40] bo>"


def decoder(attention: str, rest: str = "") -> ir.Model:
    """A layer of a residual stream: a norm, an attention from qp, kp and vp to o, a sum."""
    return model_of(
        "(float[b,s,40] x, float[b,1,s,t] bias, float[b,2,p,20] pk, float[b,2,p,20] pv,"
        " int64[b,s] ids) => (float[b,s,40] y, float[b,2,t,20] k1, float[b,2,t,20] v1)"
        f"{WEIGHTS}"
        "{ xn = RMSNormalization(x, n)"
        "  qp = MatMul(xn, wq)  q3 = Reshape(qp, [0,0,2,20])  q = Transpose<perm = [0,2,1,3]>(q3)"
        "  kp = MatMul(xn, wk)  k3 = Reshape(kp, [0,0,2,20])  k = Transpose<perm = [0,2,1,3]>(k3)"
        "  vp = MatMul(xn, wv)  v3 = Reshape(vp, [0,0,2,20])  v = Transpose<perm = [0,2,1,3]>(v3)"
        f"{attention} y = Add(x, ob) {rest} }}"
    )


PROJECTED = "qp q3 q kp k3 k vp v3 v"
OUT = "at = Transpose<perm = [0,2,1,3]>(a)  ar = Reshape(at, [0,0,40])  o = MatMul(ar, wo)  ob = Add(o, bo)"


def test_a_softmax_between_two_products() -> None:
    model = decoder(
        "k1 = Concat<axis = 2>(pk, k)  v1 = Concat<axis = 2>(pv, v)"
        "  kt = Transpose<perm = [0,1,3,2]>(k1)  qk = MatMul(q, kt)  sc = Mul(qk, 0.2)"
        f"  sm = Add(sc, bias)  pr = Softmax(sm)  a = MatMul(pr, v1) {OUT}"
    )
    assert places_of(model, "attention") == {
        "attention.0": f"{PROJECTED} k1 v1 kt qk sc sm pr a at ar o ob"
    }


def test_one_operator_with_its_cache() -> None:
    model = decoder(f"a, k1, v1 = Attention(q, k, v, bias, pk, pv) {OUT}")
    assert places_of(model, "attention") == {"attention.0": f"{PROJECTED} a at ar o ob"}


def test_what_a_caller_alone_reads_of_a_cache() -> None:
    model = decoder(
        "k2 = Concat<axis = 2>(pk, k)  v2 = Concat<axis = 2>(pv, v)  k1 = Slice(k2, [1], [99], [2])"
        f"  v1 = Slice(v2, [1], [99], [2])  a = Attention(q, k2, v2, bias) {OUT}"
    )
    held = places_of(model, "attention")["attention.0"].split()
    assert set(held) == {*f"{PROJECTED} k2 v2 k1 v1 a at ar o ob".split()}


def test_sizes_are_read_of_what_stays_outside() -> None:
    """The norm is read by projections, and for its size: it is no part of the layer for that."""
    model = decoder(
        "u = Exp(x)  uh = Shape(u)  un = Slice(uh, [2], [3], [0])  sh = Shape(xn)  sb = Slice(sh, [0], [2], [0])  to = Concat<axis = 0>(sb, un)"
        "  a, k1, v1 = Attention(q, k, v, bias, pk, pv)  at = Transpose<perm = [0,2,1,3]>(a)"
        "  ar = Reshape(at, to)  o = MatMul(ar, wo)  ob = Add(o, bo)"
    )
    held = places_of(model, "attention")["attention.0"].split()
    assert set(held) == {*f"{PROJECTED} uh un sh sb to a at ar o ob".split()}


def test_a_gate_before_the_output_projection() -> None:
    model = decoder(
        "gp = MatMul(xn, wo)  gs = Sigmoid(gp)  a, k1, v1 = Attention(q, k, v, bias, pk, pv)"
        "  at = Transpose<perm = [0,2,1,3]>(a)  af = Reshape(at, [0,0,40])  ar = Mul(af, gs)"
        "  o = MatMul(ar, wo)  ob = Add(o, bo)"
    )
    held = places_of(model, "attention")["attention.0"].split()
    assert set(held) == {*f"{PROJECTED} gp gs a at af ar o ob".split()}


def test_without_an_output_projection_it_ends_at_the_attention() -> None:
    model = decoder(
        "a, k1, v1 = Attention(q, k, v, bias, pk, pv)  at = Transpose<perm = [0,2,1,3]>(a)"
        "  ob = Reshape(at, [0,0,40])"
    )
    assert places_of(model, "attention") == {"attention.0": f"{PROJECTED} a"}


def test_what_is_read_elsewhere_stays_outside() -> None:
    model = decoder(
        f"a, k1, v1 = Attention(q, k, v, bias, pk, pv) {OUT}", "z = Exp(kp)  zz = Neg(z)"
    )
    held = "qp q3 q k3 k vp v3 v a at ar o ob"
    assert places_of(model, "attention") == {"attention.0": held}


def test_its_heart_is_whole_whoever_reads_of_it() -> None:
    """Probabilities and a bias that is projected are read elsewhere: only one of them is its own."""
    model = decoder(
        "kt = Transpose<perm = [0,1,3,2]>(k)  qk = MatMul(q, kt)  bp = MatMul(xn, wq)"
        "  bu = Unsqueeze(bp, [1])  sm = Add(qk, bu)  pr = Softmax(sm)  a = MatMul(pr, v)"
        f"  k1 = Exp(pr)  v1 = Neg(bu)  {OUT}"
    )
    held = f"{PROJECTED} kt qk sm pr a at ar o ob"
    assert places_of(model, "attention") == {"attention.0": held}


def test_scores_that_another_layer_reads_for_their_size() -> None:
    one = (
        "q{i} = MatMul(x{i}, w)  k{i} = MatMul(x{i}, w)  v{i} = MatMul(x{i}, w)"
        "  kt{i} = Transpose<perm = [0,2,1]>(k{i})  qk{i} = MatMul(q{i}, kt{i})"
        "  sm{i} = Add(qk{i}, mask)  p{i} = Softmax(sm{i})  a{i} = MatMul(p{i}, v{i})"
        "  o{i} = MatMul(a{i}, w)  x{j} = Add(x{i}, o{i})"
    )
    first = one.format(i=0, j=1).replace("Add(qk0, mask)", "Neg(qk0)")
    model = model_of(
        "(float[b,s,40] x0) => (float[b,s,40] x2) <float[40,40] w>"
        f"{{ {first}  ms = Shape(qk0)  mask = ConstantOfShape(ms) {one.format(i=1, j=2)} }}"
    )
    assert places_of(model, "attention") == {
        "attention.0": "q0 k0 v0 kt0 qk0 sm0 p0 a0 o0",
        "attention.1": "ms mask q1 k1 v1 kt1 qk1 sm1 p1 a1 o1",
    }


def test_a_bias_alone_is_no_projection() -> None:
    model = decoder(
        "qs = Squeeze(q)  qr = Gemm(qs, x, bo)  a, k1, v1 = Attention(qr, k, v, bias, pk, pv)"
        f"  {OUT}"
    )
    assert places_of(model, "attention") == {"attention.0": f"{PROJECTED} qs qr a at ar o ob"}


def test_layers_share_masks_and_tables() -> None:
    one = (
        "q{i} = MatMul(x{i}, w)  r{i} = Mul(q{i}, cos)  k{i} = MatMul(x{i}, w)"
        "  v{i} = MatMul(x{i}, w)  a{i} = Attention<q_num_heads = 2, kv_num_heads = 2>"
        "(r{i}, k{i}, v{i}, mask)  o{i} = MatMul(a{i}, w)  x{j} = Add(x{i}, o{i})"
    )
    model = model_of(
        "(float[b,s,40] x0, float[b,s] pos, float[b,s,s] m) => (float[b,s,40] x2)"
        "<float[40,40] w, float[1,40] f>"
        "{ pu = Unsqueeze(pos, [2])  angle = MatMul(pu, f)  cos = Cos(angle)"
        f"  mask = Unsqueeze(m, [1]) {one.format(i=0, j=1)} {one.format(i=1, j=2)} }}"
    )
    assert places_of(model, "attention") == {
        "attention.0": "q0 r0 k0 v0 a0 o0",
        "attention.1": "q1 r1 k1 v1 a1 o1",
    }


def test_a_mask_that_is_a_product_joins_no_layers() -> None:
    """An encoder's mask as rows times columns, which leads into every Softmax."""
    one = (
        "q{i} = MatMul(x{i}, w)  k{i} = MatMul(x{i}, w)  v{i} = MatMul(x{i}, w)"
        "  kt{i} = Transpose<perm = [0,2,1]>(k{i})  qk{i} = MatMul(q{i}, kt{i})"
        "  sm{i} = Add(qk{i}, mask)  p{i} = Softmax(sm{i})  a{i} = MatMul(p{i}, v{i})"
        "  o{i} = MatMul(a{i}, w)  x{j} = Add(x{i}, o{i})"
    )
    model = model_of(
        "(float[b,s,40] x0, float[b,s] m) => (float[b,s,40] x2) <float[40,40] w>"
        "{ mr = Unsqueeze(m, [1])  mc = Unsqueeze(m, [2])  mask = MatMul(mc, mr)"
        f" {one.format(i=0, j=1)} {one.format(i=1, j=2)} }}"
    )
    assert places_of(model, "attention") == {
        f"attention.{i}": f"q{i} k{i} v{i} kt{i} qk{i} sm{i} p{i} a{i} o{i}" for i in range(2)
    }


def test_two_softmaxes_over_one_sum_are_one_layer() -> None:
    """Differential attention: probabilities are subtracted before they meet the values."""
    scores = "  ".join(
        f"q{i} = MatMul(x, w)  k{i} = MatMul(x, w)  kt{i} = Transpose<perm = [0,2,1]>(k{i})"
        f"  qk{i} = MatMul(q{i}, kt{i})  p{i} = Softmax(qk{i})"
        for i in range(2)
    )
    model = model_of(
        "(float[b,s,40] x) => (float[b,s,40] o) <float[40,40] w>"
        f"{{ {scores}  d = Sub(p0, p1)  v = MatMul(x, w)  a = MatMul(d, v)  o = MatMul(a, w) }}"
    )
    assert places_of(model, "attention") == {
        "attention.0": "q0 k0 kt0 qk0 p0 q1 k1 kt1 qk1 p1 d v a o"
    }


def test_what_a_router_chooses_is_no_attention() -> None:
    model = model_of(
        "(float[b,40] x) => (float[b,40] y) <float[40,8] w, float[8,40] u>"
        "{ r = MatMul(x, w)  p = Softmax(r)  y = MatMul(p, u) }"
    )
    assert places_of(model, "attention") == {}


def contrib(attention: str, inputs: str = "") -> ir.Model:
    """Operators of ONNX Runtime between a norm and a sum."""
    return model_of(
        f'<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]> g'
        f"(float[b,s,40] x{inputs}) => (float[b,s,40] y)"
        "<float[40] n, float[40,120] w3, float[120] b3, float[40,40] wo, float[40,40] wq,"
        " uint8[40,2,8] codes, float[80] scales, int8[40,40] wi, float ws>"
        f"{{ xn = RMSNormalization(x, n) {attention} y = Add(x, o) }}"
    )


def test_an_operator_that_projects_itself() -> None:
    model = contrib(
        "a = com.microsoft.Attention<num_heads = 2>(xn, w3, b3)"
        "  o = com.microsoft.MatMulNBits<K = 40, N = 40, bits = 4, block_size = 32>(a, codes, scales)"
    )
    assert places_of(model, "attention") == {"attention.0": "a o"}


def test_projections_of_codes_and_of_integers() -> None:
    quantised = "K = 40, N = 40, bits = 4, block_size = 32"
    model = contrib(
        f"q = com.microsoft.MatMulNBits<{quantised}>(xn, codes, scales)"
        f"  k = com.microsoft.MatMulNBits<{quantised}>(xn, codes, scales)"
        "  xq, xs, xz = DynamicQuantizeLinear(xn)  vi = MatMulInteger(xq, wi, xz)"
        "  vf = Cast<to = 1>(vi)  vs = Mul(xs, ws)  v = Mul(vf, vs)"
        "  a = com.microsoft.MultiHeadAttention<num_heads = 2>(q, k, v)"
        "  aq, as, az = DynamicQuantizeLinear(a)  oi = MatMulInteger(aq, wi, az)"
        "  of = Cast<to = 1>(oi)  os = Mul(as, ws)  o = Mul(of, os)"
    )
    assert places_of(model, "attention") == {"attention.0": "q k vi vf vs v a aq oi of os o"}


def test_weights_that_are_numbers_again() -> None:
    model = contrib(
        "wd = DequantizeLinear(wi, ws)  q = MatMul(xn, wd)  k = MatMul(xn, wq)  v = MatMul(xn, wq)"
        "  a = com.microsoft.MultiHeadAttention<num_heads = 2>(q, k, v)  o = MatMul(a, wo)"
    )
    assert places_of(model, "attention") == {"attention.0": "wd q k v a o"}


# --- what exporters write -----------------------------------------------------------------------


def attentions(entry: CorpusEntry) -> int:
    """How many attentions an export has: each layer of a decoder that listens has two."""
    layers: int = entry.info["dims"]["layers"]
    return 2 * layers if entry.info["kind"] == "cross" else layers


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_export(entry: CorpusEntry) -> None:
    model = ir.from_proto(entry.stored)
    (whole,) = find_regions(model, "all")
    assert whole.nodes == tuple(range(len(model.graph)))
    layers = find_regions(model, "attention")
    assert len(layers) == attentions(entry)
    assert_in_one_piece(model, layers)
    nodes = list(model.graph)
    for place in layers:
        assert sum(projects(nodes[at], model) for at in place.nodes) >= 2
    numbered = find_regions(model, LAYER)
    assert_in_one_piece(model, numbered)
    counted = sorted(place.name.rpartition(".")[2] for place in numbered)
    # The builder counts the norm at the end as a layer, and one of Nemotron's two has experts only.
    assert counted == ["0", "1", *(["2"] if entry.form == "builder" else [])]


def projects(node: ir.Node, model: ir.Model) -> bool:
    """Whether a node multiplies by a weight."""
    weighing = ("MatMul", "Gemm", "MatMulNBits")
    return node.op_type in weighing and any(fixed(value, model) for value in node.inputs[:2])


def fixed(value: ir.Value | None, model: ir.Model) -> bool:
    maker = None if value is None else value.producer()
    if maker is not None:
        return all(fixed(each, model) for each in read_by(maker))
    return value is not None and str(value.name) in model.graph.initializers


SPREAD = {  # what of the corpus, and how many weights a layer multiplies by, once it is fused
    "bert/torchscript": 4,
    "deepseek_v3/dynamo20-batched": 3,  # what its latents are made by is read by two ways
    "gemma2/dynamo20-cropped": 4,
    "gpt2/dynamo20": 2,
    "gpt_oss/dynamo20-batched": 4,
    "llama/dynamo20-fp16": 4,
    "nemotron_h/transformers": 4,
    "phi3/torchscript": 2,
    "qwen3/dynamo20-static": 4,
    "whisper_decoder/dynamo20-prefill": 4,
}


@pytest.mark.parametrize("name", SPREAD)
def test_fused(name: str) -> None:
    assert_layers(name, lambda model: api.fuse(model, no_verify=True), SPREAD[name])


@pytest.mark.parametrize("name", ["llama/dynamo20", "qwen3/torchscript"])
def test_lowered_and_paged(name: str) -> None:
    lowered = {"target": "ort", "padding": "right", "max_length": 64, "no_verify": True}
    assert_layers(name, lambda model: api.fuse(model, **lowered), None)
    assert_layers(name, lambda model: api.to_paged(model, no_verify=True), 4)


def assert_layers(
    name: str, rewrite: Callable[[onnx.ModelProto], api.Result], projections: int | None
) -> None:
    (entry,) = corpus(name)
    proto = rewrite(entry.load()).model
    assert proto is not None
    model = ir.from_proto(proto)
    layers = find_regions(model, "attention")
    assert_in_one_piece(model, layers)
    assert len(layers) == attentions(entry)
    nodes = list(model.graph)
    found = {sum(projects(nodes[at], model) for at in place.nodes) for place in layers}
    assert projections is None or found == {projections}
    (whole,) = find_regions(model, "all")
    assert whole.nodes == tuple(range(len(nodes)))
