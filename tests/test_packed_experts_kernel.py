"""What com.microsoft QMoE on CPU takes, refuses and computes, beside numpy in float64.

The kernel's limits are probed and not assumed: a test that fails with a new version of ONNX Runtime
shows what `targets.ort.packed_experts` may now say otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from onnxgen.analysis.graph import CONTRIB
from onnxgen.functions.activation import Activation
from tests.graphs import runtime
from tests.quantising import Model, drawn, packed

Array = np.ndarray[Any, Any]
E, K, T = 4, 2, 40
SWIGLU = {"activation_alpha": 1.0, "activation_beta": 0.0}
EXACT = 2e-5


def difference(
    activation: str = "swiglu",
    *,
    bits: int = 4,
    block: int = 32,
    zeros: bool = True,
    bias: bool = False,
    size: int = 64,
    weights: str = "",
    kind: Any = np.float32,
    **said: Any,
) -> float:
    """How far the kernel is from its definition, over the standard deviation.

    Args:
        size: hidden and inner.
        weights: router_weights: "" for none, "positive", "some" for half of them zero, or "signed".
    """
    rng = np.random.default_rng(0)
    gated = activation == "swiglu"
    sizes = ((2 if gated else 1) * size, size), (size, size)
    first, second = (
        [drawn(rng, *each, bits, block, zeros=zeros) for _ in range(E)] for each in sizes
    )
    held: dict[str, Array] = {}
    for name, each in (("1", first), ("2", second)):
        held[f"W{name}"] = np.stack([packed(one.codes, bits) for one in each])
        scales = np.stack([one.scales for one in each]).astype(kind)
        held[f"S{name}"] = scales if block else scales[..., 0]
        if zeros:
            points = np.stack([one.zeros for one in each])
            held[f"Z{name}"] = packed(points if block else points[..., 0], bits)
        if bias:
            held[f"B{name}"] = rng.standard_normal((E, len(each[0].codes))).astype(kind)
    x, logits = (rng.standard_normal((T, n)).astype(kind) for n in (size, E))
    shares = np.abs(rng.standard_normal((T, E))) if weights == "positive" else None
    if weights in ("some", "signed"):
        shares = np.maximum(rng.standard_normal((T, E)), -np.inf if weights == "signed" else 0)
    feeds = {"x": x, "logits": logits} | ({} if shares is None else {"w": shares.astype(kind)})
    order = ["W1", "S1", "B1", "W2", "S2", "B2", "", "", "", "Z1", "Z2", "", "w"]
    inputs = ["x", "logits", *(each if each in {**held, **feeds} else "" for each in order)]
    attributes: dict[str, Any] = {
        "k": K,
        "activation_type": activation,
        "expert_weight_bits": bits,
        "normalize_routing_weights": 0 if weights else 1,
        "weights_prepacked": 0,
        **({"block_size": block} if block else {}),
        **({"swiglu_fusion": 1, **SWIGLU} if gated else {}),
        **said,
    }
    y = one_node("QMoE", inputs, held, feeds, attributes)[0].astype(np.float64)

    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    wanted = np.zeros((T, size))
    plain = Activation({"gelu": "gelutanh"}.get(activation, activation))
    for t in range(T):
        chosen = np.argsort(-p[t])[:K]
        mixing = p[t][chosen] if shares is None else shares[t][chosen]
        if attributes["normalize_routing_weights"]:
            mixing = mixing / mixing.sum()
        for e, share in zip(chosen, mixing, strict=True):
            h = first[e].numbers() @ x[t] + (held["B1"][e] if bias else 0)
            inner = Activation("swiglu")(h[0::2], h[1::2]) if gated else plain(h)
            wanted[t] += share * (second[e].numbers() @ inner + (held["B2"][e] if bias else 0))
    return float(np.abs(y - wanted).max() / wanted.std())


def one_node(
    op: str, inputs: list[str], held: dict[str, Array], feeds: dict[str, Array], said: Any
) -> list[Array]:
    while not inputs[-1]:
        inputs.pop()
    infos = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(each.dtype), ["t", each.shape[1]]
        )
        for name, each in feeds.items()
    ]
    output = helper.make_tensor_value_info("y", infos[0].type.tensor_type.elem_type, None)
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["y"], domain=CONTRIB, **said)],
        "g",
        infos,
        [output],
        [numpy_helper.from_array(np.ascontiguousarray(each), n) for n, each in held.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: list[Array] = session.run(None, feeds)
    return found


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_four_bits_in_blocks_are_exact(block: int, zeros: bool, size: int) -> None:
    assert difference(block=block, zeros=zeros, size=size) < EXACT


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_scale_a_row_is_exact(bits: int, zeros: bool) -> None:
    """Zero points of 4 bits share bytes between rows: [E, ceil(N*4/8)]."""
    assert difference(bits=bits, block=0, zeros=zeros) < EXACT
    assert difference(bits=bits, block=0, zeros=zeros, size=256, accuracy_level=4) < EXACT


@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "identity", "swiglu"])
def test_activations_and_biases(activation: str, block: int) -> None:
    assert difference(activation, block=block, bias=True) < EXACT


def test_float16() -> None:
    assert difference(kind=np.float16) < 1e-2


def test_what_rounds_what_it_multiplies() -> None:
    """8 bits in blocks, whatever it is told; 2 bits at some sizes; and where it has leave."""
    assert difference(bits=8) > 1e-3
    assert difference(bits=8, accuracy_level=1) > 1e-3
    assert difference(bits=2, size=512) > 1e-3
    assert difference(accuracy_level=4) > 1e-3
    assert difference(accuracy_level=1) < EXACT


@pytest.mark.parametrize("fusion", [0, 2])
def test_the_kernel_takes_the_features_of_a_gate_in_turns_only(fusion: int) -> None:
    with pytest.raises(Exception, match=r"(?i)swiglu|fc3|moe"):
        difference(swiglu_fusion=fusion)


@pytest.mark.parametrize("block", [8, 24])
def test_the_kernel_takes_no_such_blocks(block: int) -> None:
    with pytest.raises(Exception, match=r"(?i)block"):
        difference(block=block, size=96)


def test_without_router_weights_it_always_renormalises() -> None:
    assert difference(normalize_routing_weights=1) < EXACT
    assert difference(normalize_routing_weights=0) > 0.1


def test_router_weights_say_how_much_and_are_never_below_zero() -> None:
    assert difference(weights="positive") < EXACT
    assert difference(weights="some") < EXACT
    assert difference(weights="signed") > 0.1


def test_a_dequantised_weight_is_what_it_says_where_we_run_it() -> None:
    """ONNX Runtime's own optimisation makes 8-bit products of it."""
    model = Model(how="columns", signed=False)
    proto = model.proto().SerializeToString()
    x = np.random.default_rng(0).standard_normal((T, 64)).astype(np.float32)
    wanted = model.wanted(x)
    for optimize in (False, True):
        session = runtime().load(proto, optimize=optimize)
        found = runtime().run(session, {"x": x})["y"]
        runtime().unload(session)
        assert np.abs(found - wanted).max() < EXACT * np.abs(wanted).max()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    plain = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    assert np.abs(plain.run(None, {"x": x})[0] - wanted).max() > 1e-3
