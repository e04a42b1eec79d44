"""ORT004: experts as com.microsoft MoE, and what the CPU kernel of today takes, refuses, computes.

The kernel's limits are probed and not assumed: a test that fails with a new version of ONNX Runtime
shows what the rule may now say otherwise.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from onnxgen import functions
from onnxgen.analysis.sampling import Sampler
from onnxgen.functions import moe
from onnxgen.functions.activation import Activation
from onnxgen.passes.lower import lower_model
from onnxgen.passes.tidy import tidy
from onnxgen.pipeline import FuseOptions, fuse
from onnxgen.report.values import Site
from onnxgen.targets.ort.experts import Experts
from onnxgen.verify.rewrites import RewriteChecker
from tests.graphs import normalized, parse, run, runtime

Array = np.ndarray[Any, Any]
T, H, INNER, E, K = 7, 8, 6, 5, 2
CLAMPED = "mul(add(max(min(b,7),-7),1),mul(min(a,7),sigmoid(mul(1.702,min(a,7)))))"


# --- the kernel ---------------------------------------------------------------------------------


def kernel(
    activation: str,
    *,
    width: int = INNER,
    bias: tuple[bool, bool] = (False, False),
    fc3: bool = False,
    slots: int = K,
    experts: int = E,
    kind: type = np.float32,
    **attributes: Any,
) -> tuple[onnxruntime.InferenceSession, dict[str, Array]]:
    """A session of one com.microsoft MoE, and its weights in float64."""
    rng = np.random.default_rng(0)
    arrays = {
        "fc1": rng.standard_normal((experts, width, H)) / 3,
        "bias1": rng.standard_normal((experts, width)) if bias[0] else None,
        "fc2": rng.standard_normal((experts, H, INNER)) / 3,
        "bias2": rng.standard_normal((experts, H)) if bias[1] else None,
        "fc3": rng.standard_normal((experts, INNER, H)) if fc3 else None,
    }
    held = {name: each.astype(kind) for name, each in arrays.items() if each is not None}
    node = helper.make_node(
        "MoE",
        ["x", "logits", *(name if name in held else "" for name in arrays)],
        ["y"],
        domain="com.microsoft",
        k=slots,
        activation_type=activation,
        **attributes,
    )
    of = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info("x", of, ["t", H]),
            helper.make_tensor_value_info("logits", of, ["t", experts]),
        ],
        [helper.make_tensor_value_info("y", of, ["t", H])],
        [numpy_helper.from_array(each, name) for name, each in held.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return session(model), {name: each.astype(np.float64) for name, each in held.items()}


def session(model: onnx.ModelProto, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def mixture(
    x: Array, logits: Array, weights: dict[str, Array], function: Any, slots: int, normalize: bool
) -> Array:
    """What the kernel's documentation says, in float64; equal probabilities: the last one first."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    y, zeros = np.zeros((len(x), H)), np.zeros((len(weights["fc1"]), 1))
    for t, row in enumerate(p):
        chosen = sorted(range(len(row)), key=lambda e: (row[e], e), reverse=True)[:slots]
        total = row[chosen].sum() if normalize else 1.0
        for e in chosen:
            h = (
                weights["fc1"][e] @ x[t]
                + weights.get("bias1", np.zeros(1))[e % 1 if "bias1" not in weights else e]
            )
            out = weights["fc2"][e] @ function(h) + weights.get("bias2", zeros)[e]
            y[t] += row[e] / total * out
    return y


def gated(alpha: float, beta: float, limit: float) -> Any:
    def function(h: Array) -> Array:
        a, b = np.minimum(h[0::2], limit), np.clip(h[1::2], -limit, limit)
        return a / (1 + np.exp(-alpha * a)) * (b + beta)

    return function


FUNCTIONS: dict[str, tuple[dict[str, Any], Any]] = {
    "silu": ({}, Activation("silu")),
    "relu": ({}, Activation("relu")),
    "identity": ({}, Activation("identity")),
    "gelu": ({}, Activation("gelutanh")),
    "swiglu": ({"activation_alpha": 1.0, "activation_beta": 0.0}, gated(1, 0, np.inf)),
    "swiglu clamped": (
        {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 0.7},
        gated(1.702, 1, 0.7),
    ),
}
SETTINGS = list(
    itertools.product(
        FUNCTIONS,
        ((False, False), (True, True), (True, False), (False, True)),
        (1, 2, E),
        (False, True),
    )
)


@pytest.mark.parametrize(("name", "bias", "slots", "normalize"), SETTINGS)
def test_the_kernel_computes_its_definition(
    name: str, bias: tuple[bool, bool], slots: int, normalize: bool
) -> None:
    given, function = FUNCTIONS[name]
    width = INNER
    if name.startswith("swiglu"):
        width, given = 2 * INNER, {"swiglu_fusion": 1, **given}
    normal = int(normalize)
    one, weights = kernel(
        name.split()[0],
        width=width,
        bias=bias,
        slots=slots,
        normalize_routing_weights=normal,
        **given,
    )
    rng = np.random.default_rng(1)
    for tokens in (0, 1, T):
        x, logits = rng.standard_normal((tokens, H)), rng.integers(0, 3, (tokens, E)) / 3
        feeds = {"x": x.astype(np.float32), "logits": logits.astype(np.float32)}
        wanted = mixture(x, logits, weights, function, slots, normalize)
        assert np.allclose(one.run(None, feeds)[0], wanted, atol=2e-6)


def test_the_kernels_gelu_is_the_one_with_tanh() -> None:
    one, weights = kernel("gelu", normalize_routing_weights=1)
    rng = np.random.default_rng(1)
    x, logits = 3 * rng.standard_normal((T, H)), rng.standard_normal((T, E))
    y = one.run(None, {"x": x.astype(np.float32), "logits": logits.astype(np.float32)})[0]
    exact = mixture(x, logits, weights, Activation("gelu"), K, normalize=True)
    assert np.abs(y - exact).max() > 1e-4
    assert np.allclose(y, mixture(x, logits, weights, Activation("gelutanh"), K, True), atol=2e-6)


@pytest.mark.parametrize("fusion", [0, 2])
def test_the_kernel_takes_the_features_of_a_gate_in_turns_only(fusion: int) -> None:
    with pytest.raises(Exception, match="moe_cpu"):
        kernel("swiglu", width=2 * INNER, swiglu_fusion=fusion)


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "identity"])
def test_the_kernel_takes_no_third_weight(activation: str) -> None:
    one, _ = kernel(activation, fc3=True)
    feeds = {"x": np.ones((T, H), np.float32), "logits": np.ones((T, E), np.float32)}
    with pytest.raises(Exception, match="FC3"):
        one.run(None, feeds)


def test_the_kernel_takes_no_more_slots_than_experts() -> None:
    one, _ = kernel("silu", slots=E + 1)
    with pytest.raises(Exception, match="moe_cpu"):
        one.run(None, {"x": np.ones((T, H), np.float32), "logits": np.ones((T, E), np.float32)})


def test_the_sparse_mixer_is_ignored() -> None:
    """Why it is never emitted: phimoe's router is another function."""
    rng = np.random.default_rng(1)
    feeds = {
        name: rng.standard_normal((T, size)).astype(np.float32)
        for name, size in (("x", H), ("logits", E))
    }
    plain, mixer = (kernel("silu", use_sparse_mixer=each)[0].run(None, feeds)[0] for each in (0, 1))
    assert (plain == mixer).all()


def test_float16_is_computed_in_float32() -> None:
    one, weights = kernel("silu", kind=np.float16, normalize_routing_weights=1)
    rng = np.random.default_rng(1)
    x, logits = rng.standard_normal((T, H)), rng.standard_normal((T, E))
    x, logits = (each.astype(np.float16).astype(np.float64) for each in (x, logits))
    y = one.run(None, {"x": x.astype(np.float16), "logits": logits.astype(np.float16)})[0]
    wanted = mixture(x, logits, weights, Activation("silu"), K, normalize=True)
    assert np.abs(y - wanted).max() < 2**-11 * np.abs(wanted).max()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 3, 17, 129])
@pytest.mark.parametrize("activation", ["silu", "swiglu"])
def test_the_kernel_between_other_nodes(activation: str, tokens: int, threads: int) -> None:
    """onnxruntime #33866: wrong values where the input comes from a node and the output feeds one."""
    pair = activation == "swiglu"
    attributes = "swiglu_fusion = 1, activation_alpha = 1.0, activation_beta = 0.0" if pair else ""
    model = parse(
        '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g '
        f"(float[t,64] x) => (float[t,64] y) <float[64,5] R, float[5,{96 if pair else 48},64] W1,"
        " float[5,64,48] W2> { a = Mul(x, 2.0) l = MatMul(a, R)"
        f" m = com.microsoft.MoE<k = 2, normalize_routing_weights = 1, activation_type = "
        f'"{activation}"{", " if pair else ""}{attributes}>(a, l, W1, , W2) y = Add(m, a) }}'
    )
    held = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    function = gated(1, 0, np.inf) if pair else Activation("silu")
    one = session(model, threads)
    for seed in range(4):
        x = np.random.default_rng(seed).standard_normal((tokens, 64)).astype(np.float32)
        y = np.zeros_like(x)
        p = np.exp(2 * x @ held["R"])
        for t, row in enumerate(p):
            chosen = np.argsort(-row)[:2]
            for e in chosen:
                h = held["W1"][e] @ (2 * x[t])
                y[t] += row[e] / row[chosen].sum() * (held["W2"][e] @ function(h))
        assert np.allclose(one.run(None, {"x": x})[0], y + 2 * x, atol=1e-4 * np.abs(y).max())


# --- the rule -----------------------------------------------------------------------------------

ROUTERS = {
    "softmax, top-k": "p = Softmax(l) w, i = TopK(p, [2])",
    "softmax, top-k, renormalised": "p = Softmax(l) v, i = TopK(p, [2])"
    " s = ReduceSum(v, [-1]) w = Div(v, s)",
    "top-k, softmax": "v, i = TopK(l, [2]) w = Softmax(v)",
    "scaled": "p = Softmax(l) v, i = TopK(p, [2]) s = ReduceSum(v, [-1]) t = Add(s, 1e-20)"
    " n = Div(v, t) w = Mul(n, 2.5)",
    "gathered, scaled before": "p = Softmax(l) v, i = TopK(l, [2]) g = GatherElements<axis=1>(p, i)"
    " c = Mul(0.5, g) s = ReduceSum(c, [-1]) w = Div(c, s)",
    "one by one": "p = Softmax(l) w, i = TopK(p, [1])",
}
OTHERS = {
    "sigmoid, top-k, renormalised": "p = Sigmoid(l) v, i = TopK(p, [2])"
    " s = ReduceSum(v, [-1]) w = Div(v, s)",
    "biased choice": "p = Sigmoid(l) b = Add(p, B) v, i = TopK(b, [2])"
    " w = GatherElements<axis=1>(p, i)",
    "least probable": "p = Softmax(l) w, i = TopK<largest=0>(p, [2])",
    "of other probabilities": "p = Softmax(l) b = Add(p, B) v, i = TopK(b, [2])"
    " w = GatherElements<axis=1>(p, i)",
    "half of the sum": "p = Softmax(l) v, i = TopK(p, [2]) s = ReduceSum(v, [-1]) t = Add(s, 0.5)"
    " w = Div(v, t)",
    "zeros": "p = Relu(l) w, i = TopK(p, [2])",
    "over tokens": "p = Softmax<axis=0>(l) w, i = TopK(p, [2])",
}


@dataclass
class Lowered:
    before: onnx.ModelProto
    after: onnx.ModelProto
    sites: list[Site]

    def ops(self) -> list[str]:
        return [node.op_type for node in self.after.graph.node]

    def moe(self) -> dict[str, Any]:
        (node,) = [n for n in self.after.graph.node if n.op_type == "MoE"]
        assert node.domain == "com.microsoft"
        return {each.name: helper.get_attribute_value(each) for each in node.attribute}

    def compare(self, x: Array, tolerance: float = 1e-5) -> Array:
        old, new = run(self.before, {"x": x})["y"], run(self.after, {"x": x})["y"]
        assert old.dtype == new.dtype
        assert np.isfinite(new).all()
        limit = tolerance * max(np.abs(old).max(initial=0.0), 1e-3)
        assert np.abs(old.astype(np.float64) - new).max(initial=0.0) <= limit
        return old


def lowered(
    overload: str = "swiglu",
    router: str = "top-k, softmax",
    *,
    kind: str = "float",
    experts: int = E,
    hands: str = "",
    weights: dict[str, Array] | None = None,
) -> Lowered:
    """Lower one mixture, its rewrite checked, and compare both models on random tokens."""
    proto = model_of(overload, router, kind, experts, hands, weights)
    model, roles = normalized(proto)
    checker = RewriteChecker(runtime(), roles)
    sampler = Sampler(model.graph, roles, runtime())
    sites = lower_model(model, [Experts()], roles, sampler=sampler, check=checker)
    tidy(model)
    result = Lowered(proto, ir.to_proto(model), sites)
    dtype = np.float16 if kind == "float16" else np.float32
    for tokens in (1, 7, 40):
        x = np.random.default_rng(tokens).standard_normal((tokens, H)).astype(dtype)
        result.compare(x, 1e-5 if kind == "float" else 2e-2)
    return result


def model_of(
    overload: str,
    router: str,
    kind: str = "float",
    experts: int = E,
    hands: str = "",
    weights: dict[str, Array] | None = None,
) -> onnx.ModelProto:
    activation, parts = moe.parts_of(overload)
    width = 2 * INNER if activation.gated and "separate" not in parts else INNER
    sizes = {
        "W1": (H, width) if "fc1t" in parts else (width, H),
        "B1": (width,) if "bias1" in parts else None,
        "W2": (INNER, H) if "fc2t" in parts else (H, INNER),
        "B2": (H,) if "bias2" in parts else None,
        "W3": None,
        "B3": None,
    }
    if "separate" in parts:
        sizes |= {"W3": sizes["W1"], "B3": sizes["B1"]}
    said = ", ".join(
        f"{kind}[{','.join(map(str, (experts, *each)))}] {name}"
        for name, each in sizes.items()
        if each is not None
    )
    given = ", ".join(name if each is not None else "" for name, each in sizes.items())
    nodes = ROUTERS.get(router) or OTHERS.get(router) or router
    extra = f", {kind}[{experts}] B" if ", B)" in nodes else ""
    text = (
        f'<ir_version: 10, opset_import: ["" : 24, "onnxgen" : 1]> g ({kind}[t,{H}] x) => '
        f"({kind}[t,{H}] y) <{kind}[{H},{experts}] R, {said}{extra}> "
        f"{{ l = MatMul(x, R) {nodes} y = onnxgen.MoE (x, w, i, {given.rstrip(', ')}) }}"
    )
    model = parse(text, weights=weights)
    model.graph.node[-1].overload = overload
    own = ir.node(moe.NAME, [], domain=functions.DOMAIN, overload=overload)
    model.functions.extend(functions.called([own], 24))
    return model


LAYOUTS = [
    "swiglu",
    "swiglu_interleaved",
    "swiglu_fc1t_fc2t",
    "swiglu_interleaved_fc1t_bias1_bias2",
    "swiglu_bias1_bias2_separate",
    "swiglu_fc1t_bias1_separate",
    "mul(a,mul(b,sigmoid(b)))_bias1",  # the gate comes second
    "mul(a,mul(b,sigmoid(b)))_interleaved_bias1",
    "mul(a,mul(b,sigmoid(b)))_bias1_separate",
    f"{CLAMPED}_interleaved_fc1t_fc2t_bias1_bias2",
    f"{CLAMPED}_bias1",
    "silu",
    "relu_fc1t_bias1",
    "gelutanh_fc2t_bias2",
    "identity_bias1_bias2",
]


@pytest.mark.parametrize("router", ["top-k, softmax", "sigmoid, top-k, renormalised"])
@pytest.mark.parametrize("overload", LAYOUTS)
def test_any_layout_of_experts(overload: str, router: str) -> None:
    result = lowered(overload, router)
    assert [site.status for site in result.sites] == ["fused"], result.sites
    found = result.moe()
    if CLAMPED in overload:
        assert found["swiglu_limit"] == 7.0
        assert found["activation_alpha"] == np.float32(1.702)
        assert found["activation_beta"] == 1.0
    assert not any(node.domain == "onnxgen" for node in result.after.graph.node)
    assert not result.after.functions


@pytest.mark.parametrize("kind", ["float", "float16"])
@pytest.mark.parametrize("router", ROUTERS)
def test_routers_that_the_kernel_has(router: str, kind: str) -> None:
    if kind == "float16":
        half = ROUTERS[router].replace("p = Softmax(l)", "f = Cast<to=1>(l) p = Softmax(f)")
        text = half.replace("2.5", "2.5" if "f =" in half else "2.5h")
        result = lowered("swiglu", text, kind="float16")
    else:
        result = lowered("swiglu", router)
    (site,) = result.sites
    assert site.status == "fused", site
    assert site.details["router"] == "inside"
    ops = set(result.ops())
    assert not ops & {"Softmax", "TopK", "ReduceSum", "Div", "GatherElements"}, ops
    assert result.moe()["normalize_routing_weights"] == int(
        router not in ("softmax, top-k", "one by one")
    )
    assert ("Mul" in ops) == (router == "scaled")


@pytest.mark.parametrize("router", OTHERS)
def test_any_other_router_stays_outside(router: str) -> None:
    weights = {"B": np.abs(np.random.default_rng(0).standard_normal(E)).astype(np.float32)}
    result = lowered("swiglu", router, weights=weights if "B" in OTHERS[router] else None)
    (site,) = result.sites
    assert site.status == "fused", site
    assert site.details["router"] == "outside"
    assert "TopK" in result.ops()


def test_a_choice_by_float16_probabilities_stays_outside() -> None:
    """Different logits become equal in float16, and the kernel would tell them apart."""
    result = lowered("swiglu", "softmax, top-k", kind="float16")
    assert result.sites[0].details["router"] == "outside"


def test_logits_of_float32_beside_tokens_of_float16_are_not_rounded() -> None:
    router = (
        "g = Cast<to=1>(x) q = Cast<to=1>(R) m = MatMul(g, q) v, i = TopK(m, [2]) w = Softmax(v)"
    )
    model = model_of("swiglu", router, "float16")
    del model.graph.node[0]  # l is not read
    result = lowered_proto(model)
    assert result.sites[0].details["router"] == "inside"
    (node,) = [n for n in result.after.graph.node if n.op_type == "MoE"]
    made = {out: n for n in result.after.graph.node for out in n.output}
    assert made[node.input[0]].op_type == "Cast"
    x = np.random.default_rng(0).standard_normal((50, H)).astype(np.float16)
    result.compare(x, 2e-3)


def test_logits_of_float16_beside_tokens_of_float32() -> None:
    router = (
        "g = Cast<to=10>(x) q = Cast<to=10>(R) m = MatMul(g, q) v, i = TopK(m, [2])"
        " u = Softmax(v) w = Cast<to=1>(u)"
    )
    model = model_of("swiglu", router)
    del model.graph.node[0]  # l is not read
    result = lowered_proto(model)
    assert result.sites[0].status == "fused", result.sites
    assert result.sites[0].details["router"] == "inside"
    x = np.random.default_rng(0).standard_normal((50, H)).astype(np.float32)
    result.compare(x, 2e-3)  # the original rounds its weights


def lowered_proto(proto: onnx.ModelProto) -> Lowered:
    model, roles = normalized(proto)
    checker = RewriteChecker(runtime(), roles)
    sites = lower_model(model, [Experts()], roles, check=checker)
    tidy(model)
    return Lowered(proto, ir.to_proto(model), sites)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("overload", ["swiglu", "silu"])
def test_of_equal_logits_the_first_experts_win(overload: str, router: str) -> None:
    """Router weights of small integers, so that sums are exact, and tokens of zeros and ones."""
    experts = 16
    rng = np.random.default_rng(3)
    columns = rng.integers(-1, 2, (H, experts)).astype(np.float32)
    columns[:, 9] = columns[:, 4]  # always equal
    columns[:, 2] = columns[:, 9]
    result = lowered(overload, router, experts=experts, weights={"R": columns})
    assert result.sites[0].details["router"] == "inside"
    tokens = rng.integers(-1, 2, (200, H)).astype(np.float32)
    tokens[:3] = 0  # all logits are equal
    logits = tokens @ columns
    order = -np.sort(-logits)
    assert (order[:, 1] == order[:, 2]).mean() > 0.2  # ties over the boundary
    assert (order[:, 0] == order[:, 2]).sum() > 10  # of three
    result.compare(tokens)


def test_tokens_that_nobody_wants_are_zero() -> None:
    result = lowered("swiglu", "zeros")
    assert "Where" in result.ops()  # no kernel is given a row of nothing but -inf
    x = np.zeros((3, H), np.float32)
    x[1] = np.random.default_rng(0).standard_normal(H)
    y = result.compare(x)
    assert not y[0].any()
    assert not run(result.after, {"x": x})["y"][0].any()


def test_experts_that_are_named_twice_add_up() -> None:
    """Whatever each of them weighs, and whichever comes first."""
    router = (
        "p = Sigmoid(l) v, j = TopK(p, [1]) i = Concat<axis=1>(j, j) a = Mul(v, {}) b = Mul(v, {})"
        " w = Concat<axis=1>(a, b)"
    )
    models = [
        model_of("swiglu", router.format(*each)) for each in ((0.0, 1.0), (1.0, 0.0), (0.25, 0.75))
    ]
    x = np.random.default_rng(0).standard_normal((T, H)).astype(np.float32)
    wanted = run(models[0], {"x": x})["y"]
    assert np.abs(wanted).max() > 0.01
    for model in models:
        result = lowered_proto(model)
        assert result.sites[0].status == "fused", result.sites
        assert np.allclose(run(result.after, {"x": x})["y"], wanted, atol=1e-6)


def test_no_expert_and_all_experts() -> None:
    result = lowered("silu", "p = Softmax(l) w, i = TopK(p, [5])")
    assert result.moe()["k"] == E
    result.compare(np.zeros((0, H), np.float32))
    result = lowered("silu", "p = Softmax(l) w, i = TopK(p, [1])", experts=1)
    assert result.moe()["k"] == 1


DECLINED = {
    "gelu": ("softmax, top-k", "activation"),
    "geglu": ("softmax, top-k", "activation"),
    "geglutanh": ("softmax, top-k", "activation"),
    "relu2": ("softmax, top-k", "activation"),
    "reglu": ("softmax, top-k", "activation"),
    "bilinear": ("softmax, top-k", "activation"),
    "mul(mul(a,sigmoid(a)),max(b,0))": ("softmax, top-k", "activation"),
    "mul(max(min(b,7),-6),mul(a,sigmoid(a)))": ("softmax, top-k", "activation"),
    "mul(max(min(b,7),-7),mul(a,sigmoid(a)))": ("softmax, top-k", "activation"),
    "swiglu_scaled": ("softmax, top-k", "form"),
    "swiglu": ("v, i = TopK(l, [2]) w = Tanh(v)", "router"),
    "swiglu_bias1": ("p = Sigmoid(l) b = Add(p, B) w, i = TopK(b, [2])", "router"),
}


@pytest.mark.parametrize("overload", DECLINED)
def test_what_the_kernel_cannot_say_stays(overload: str) -> None:
    router, code = DECLINED[overload]
    weights = {"B": -np.ones(E, np.float32)} if ", B)" in router else None
    result = lowered(overload, router, weights=weights)
    (site,) = result.sites
    assert site.status == "kept"
    assert site.decline is not None
    assert (site.decline.rule, site.decline.code) == ("ORT004", code)
    assert any(node.domain == "onnxgen" for node in result.after.graph.node)


def test_dense_weights_stay() -> None:
    model = model_of("swiglu", "w = Softmax(l) v, i = TopK(w, [1])")
    model.graph.node[-1].overload = "swiglu_dense"
    model.graph.node[-1].input[2] = ""
    model.functions[0].CopyFrom(
        functions.called(
            [ir.node(moe.NAME, [], domain=functions.DOMAIN, overload="swiglu_dense")], 24
        )[0]
    )
    result = lowered_proto(model)
    assert result.sites[0].decline is not None
    assert result.sites[0].decline.code == "form"


def test_computed_weights_stay() -> None:
    model = model_of("silu", "softmax, top-k")
    call = model.graph.node[-1]
    sum_of = helper.make_node("Mul", [call.input[3], "scale"], ["computed"])
    scale = helper.make_node("ReduceMean", ["x"], ["scale"], keepdims=0)
    model.graph.node.insert(0, scale)
    model.graph.node.insert(1, sum_of)
    call.input[3] = "computed"
    model.graph.node.sort(key=lambda node: node is call)
    result = lowered_proto(model)
    assert result.sites[0].decline is not None
    assert result.sites[0].decline.code == "weights"


@pytest.mark.parametrize("external", [False, True])
def test_a_file_is_written_and_proven(external: bool, tmp_path: Path) -> None:
    proto = model_of("swiglu_separate", "softmax, top-k, renormalised")
    path, output = tmp_path / "model.onnx", tmp_path / "ort.onnx"
    before = onnx.ModelProto()
    before.CopyFrom(proto)  # saving moves its weights out
    onnx.save(before, path, save_as_external_data=external, location="m.data", size_threshold=512)
    report = fuse(path, FuseOptions(output=output, target="ort"), lambda message: None)
    assert report.proof is not None
    assert report.proof.worst is not None
    assert [site.rule for site in report.lowered] == ["ORT004"]
    written = onnx.load(output)
    assert [node.op_type for node in written.graph.node][-1] == "MoE"
    x = np.random.default_rng(0).standard_normal((T, H)).astype(np.float32)
    assert np.allclose(run(proto, {"x": x})["y"], run(written, {"x": x})["y"], atol=1e-6)
    again = fuse(output, FuseOptions(output=tmp_path / "again.onnx"), lambda message: None)
    assert again.proof is not None
