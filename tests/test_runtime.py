"""ONNX Runtime's child process: what takes too long is ended, numbers are a model's own."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, parser

from onnxgen.runtime import Runtime, RuntimeFailure
from tests.graphs import parse

DOUBLED = "(float[n] x) => (float[n] y) { y = Add(x, x) }"


def endless() -> bytes:
    """A loop of 2^60 rounds."""
    body = parser.parse_graph(
        "body (int64 i, bool c, float a) => (bool d, float b) { d = Identity(c) b = Add(a, a) }"
    )
    rounds = helper.make_tensor("rounds", TensorProto.INT64, [], [1 << 60])
    node = helper.make_node("Loop", ["rounds", "", "x"], ["y"], body=body)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in "xy")
    graph = helper.make_graph([node], "endless", [x], [y], [rounds])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    data: bytes = model.SerializeToString()
    return data


def test_a_run_without_end_is_ended_and_the_next_model_runs() -> None:
    with Runtime(threads=1) as runtime:
        session = runtime.load(endless())
        runtime.timeout = 0.2
        with pytest.raises(RuntimeFailure, match=r"took more than 0\.2 s during run"):
            runtime.run(session, {"x": np.array(1, np.float32)})
        runtime.timeout = 600
        with pytest.raises(RuntimeFailure, match="the session was lost"):
            runtime.run(session, {"x": np.array(1, np.float32)})
        other = runtime.load(parse(DOUBLED).SerializeToString())
        assert runtime.run(other, {"x": np.ones(2, np.float32)})["y"].tolist() == [2, 2]


@pytest.mark.parametrize("optimize", [False, True])
def test_a_dequantized_weight_is_what_it_says(optimize: bool) -> None:
    """Optimised, ONNX Runtime would quantize the activations too, and be off by percents."""
    weights = np.random.default_rng(0).integers(-127, 128, (26, 8)).astype(np.int8)
    model = parse(
        "(float[n,26] x) => (float[n,8] y) <int8[26,8] w, float[8] s>"
        "{ f = DequantizeLinear<axis = 1>(w, s)  y = MatMul(x, f) }",
        weights={"w": weights, "s": np.full(8, 0.01, np.float32)},
    )
    x = np.random.default_rng(1).standard_normal((3, 26)).astype(np.float32)
    with Runtime(threads=1) as runtime:
        session = runtime.load(model.SerializeToString(), optimize=optimize)
        y = runtime.run(session, {"x": x})["y"]
    np.testing.assert_allclose(y, x @ (weights * np.float32(0.01)), rtol=1e-5, atol=1e-5)
