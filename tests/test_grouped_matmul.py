"""onnxgen::GroupedMatMul against numpy, and the mixture of attention that it is raised from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_ir import serde

from onnxgen import functions
from onnxgen.functions import grouped_matmul
from onnxgen.pipeline import FuseOptions, fuse
from onnxgen.testing import load_corpus_model
from tests.graphs import run

K, N, G = 6, 4, 5


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_it_is_each_row_times_the_matrices_it_chooses(
    rows: int, bias: bool, turned: bool, kind: type
) -> None:
    rng = np.random.default_rng(rows)
    weights = rng.standard_normal((G, K, N)).astype(kind)
    feeds = {
        "x": rng.standard_normal((rows, K)).astype(kind),
        "w": np.ascontiguousarray(weights.swapaxes(1, 2)) if turned else weights,
        "i": rng.integers(0, G, (rows, 2)),
    }
    if bias:
        feeds["b"] = rng.standard_normal((G, N)).astype(kind)
    overload = grouped_matmul.overload_of(turned=turned, bias=bias)
    y = run(model_of(feeds, overload), feeds)["y"]
    wanted = np.einsum("mk,mjkn->mjn", feeds["x"], weights[feeds["i"]], dtype=np.float64)
    if bias:
        wanted = wanted + feeds["b"][feeds["i"]]
    assert y.shape == (rows, 2, N)
    assert np.allclose(y, wanted, atol=1e-5 if kind is np.float32 else 2e-2)


def model_of(feeds: dict[str, np.ndarray], overload: str) -> onnx.ModelProto:
    """A model of one node."""
    infos = [
        helper.make_tensor_value_info(
            name,
            helper.np_dtype_to_tensor_dtype(array.dtype),
            [f"{name}{a}" for a in range(array.ndim)],
        )
        for name, array in feeds.items()
    ]
    kind = helper.np_dtype_to_tensor_dtype(feeds["x"].dtype)
    node = helper.make_node(
        grouped_matmul.NAME, list(feeds), ["y"], domain=functions.DOMAIN, overload=overload
    )
    output = helper.make_tensor_value_info("y", kind, ["m", "k", "n"])
    graph = helper.make_graph([node], "one", infos, [output])
    imports = [helper.make_opsetid("", 24), helper.make_opsetid(functions.DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    model.functions.append(serde.serialize_function(grouped_matmul.build(overload, 24)))
    onnx.checker.check_model(model)
    return model


def test_an_overload_that_is_not() -> None:
    with pytest.raises(KeyError):
        grouped_matmul.build("bias_turned", 24)


def test_a_mixture_of_attention_is_made_of_it(tmp_path: Path) -> None:
    """JetMoE: queries and outputs of each of two layers, its experts beside them."""
    path = tmp_path / "model.onnx"
    onnx.save(load_corpus_model("jetmoe/dynamo20"), path)
    report = fuse(path, FuseOptions(output=tmp_path / "fused.onnx"), lambda message: None)
    assert report.proof is not None
    assert report.proof.status == "proven"
    assert (report.ops_after["GroupedMatMul"], report.ops_after["MoE"]) == (4, 2)
    assert [site for site in report.sites if site.status != "fused"] == []
