"""Operators with leave to round what they are given are compared in full precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxgen.model_io import read_model
from onnxgen.verify.compare import verify_models
from onnxgen.verify.opened import opened
from onnxgen.verify.precision import NOTE, rounds_activations, without_leave
from tests.graphs import runtime


def quantized(level: int, *, scale: float = 1.0) -> onnx.ModelProto:
    """Two MatMulNBits in a row over token embeddings."""
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("Gather", ["table", "ids"], ["x0"])]
    tensors = [
        numpy_helper.from_array(rng.standard_normal((37, 64)).astype(np.float32) * scale, "table")
    ]
    for index in range(2):
        weights = rng.integers(0, 255, (64, 2, 16), dtype=np.uint8)
        scales = (0.1 * rng.standard_normal(128)).astype(np.float32)
        tensors.append(numpy_helper.from_array(weights, f"w{index}"))
        tensors.append(numpy_helper.from_array(scales, f"s{index}"))
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                [f"x{index}", f"w{index}", f"s{index}"],
                [f"x{index + 1}"],
                domain="com.microsoft",
                K=64,
                N=64,
                bits=4,
                block_size=32,
                accuracy_level=level,
            )
        )
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "s"])
    y = helper.make_tensor_value_info("x2", TensorProto.FLOAT, ["b", "s", 64])
    graph = helper.make_graph(nodes, "g", [ids], [y], initializer=tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("level", [0, 4])
def test_a_difference_below_a_rounding_step_is_no_difference(level: int) -> None:
    original = quantized(level).SerializeToString()
    rewritten = quantized(level, scale=1 + 3e-7).SerializeToString()
    proof = verify_models(original, rewritten, runtime=runtime())
    assert proof.status == "proven", proof.reason
    assert proof.note == (NOTE if level else "")


def test_a_real_difference_is_one() -> None:
    rewritten = quantized(4, scale=1.001).SerializeToString()
    proof = verify_models(quantized(4).SerializeToString(), rewritten, runtime=runtime())
    assert proof.status == "differs"


def test_external_data_stays_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(quantized(4), path, save_as_external_data=True, size_threshold=0, location="d")
    assert rounds_activations(read_model(path))
    twin, folder = opened(path)
    without_leave(twin)
    assert folder == tmp_path.resolve()
    assert {tensor.data_location for tensor in twin.graph.initializer} == {TensorProto.EXTERNAL}
    names = {a.name for node in twin.graph.node for a in node.attribute}
    assert "accuracy_level" not in names
    assert "block_size" in names
    (tmp_path / "links").mkdir()
    for name in ("model.onnx", "d"):  # as in a cache of downloads
        (tmp_path / f"{name}.blob").write_bytes((tmp_path / name).read_bytes())
        (tmp_path / "links" / name).symlink_to(tmp_path / f"{name}.blob")
    proof = verify_models(path, tmp_path / "links" / "model.onnx", runtime=runtime())
    assert (proof.status, proof.note) == ("proven", NOTE)
