"""com.microsoft::PagedAttention's own kernel: what the twin says of a node is what WebGPU computes.

    pytest -m webgpu tests/test_paged_kernel.py

Needs the extra `webgpu` and a Vulkan driver; with ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1 a software
one does (Mesa's lavapipe 25 or newer, VK_DRIVER_FILES pointing at its ICD). The first run compiles
shaders for minutes; Mesa keeps them.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from onnxgen import pipeline_paged
from onnxgen.bounds import Bounds
from onnxgen.errors import ModelDiffersError
from onnxgen.report.values import Proof
from onnxgen.runtime import Runtime
from onnxgen.targets import paged_ort
from onnxgen.targets.paged import PagedOptions
from onnxgen.targets.paged_schema import live_schema
from onnxgen.testing import corpus
from onnxgen.verify import paged_kernel
from onnxgen.verify.paged_twin import expand_attention
from tests.graphs import runtime

H, K, D, BS, NB, T = 6, 3, 64, 16, 24, 96
NEW, PAST = (5, 1, 9, 0, 17), (0, 33, 6, 5, 14)
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def device() -> Any:
    why = paged_kernel.missing()
    if why:
        pytest.skip(why)
    with Runtime(webgpu=True, bounds=Bounds(timeout=900)) as found:
        yield found


def node(attributes: dict[str, Any], more: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    """A graph of one operator, blocks of BS slots."""
    schema = live_schema()
    assert schema is not None
    half, int32 = TensorProto.FLOAT16, TensorProto.INT32
    shapes: dict[str, tuple[int, list[Any]]] = {
        "query": (half, ["N", H * D]),
        "key": (half, ["N", K * D]),
        "value": (half, ["N", K * D]),
        "key_cache": (half, ["NB", BS, K, D]),
        "value_cache": (half, ["NB", BS, K, D]),
        "cumulative_sequence_length": (int32, ["C"]),
        "past_seqlens": (int32, ["B"]),
        "block_table": (int32, ["B", "M"]),
        **{name: (half, list(shape)) for name, shape in more.items()},
    }
    inputs = [name if name in shapes else "" for name in schema.inputs]
    while not inputs[-1]:
        inputs.pop()
    outputs = ["output", "key_cache_out", "value_cache_out"]
    made = helper.make_node(
        "PagedAttention",
        inputs,
        outputs,
        domain="com.microsoft",
        num_heads=H,
        kv_num_heads=K,
        **attributes,
    )
    pool = [half, ["NB", BS, K, D]]
    graph = helper.make_graph(
        [made],
        "g",
        [helper.make_tensor_value_info(name, *shapes[name]) for name in inputs if name],
        [
            helper.make_tensor_value_info(name, *info)
            for name, info in zip(outputs, ([half, ["N", H * D]], pool, pool), strict=True)
        ],
    )
    imports = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=11)


def feeds(more: dict[str, tuple[int, ...]], new: tuple[int, ...]) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    order = iter(rng.permutation(NB).tolist())
    table = np.full((len(new), 4), -1, np.int32)
    for row, (count, past) in enumerate(zip(new, PAST, strict=True)):
        for place in range(-(-(count + past) // BS)):
            table[row, place] = next(order)
    n = sum(new)
    halves = {
        "query": (n, H * D),
        "key": (n, K * D),
        "value": (n, K * D),
        "key_cache": (NB, BS, K, D),
        "value_cache": (NB, BS, K, D),
        **more,
    }
    given: dict[str, Array] = {
        name: rng.standard_normal(shape).astype(np.float16) for name, shape in halves.items()
    }
    if "cos_cache" in more:
        angles = np.arange(T)[:, None] / 50.0 ** (np.arange(more["cos_cache"][1])[None] / 16)
        given["cos_cache"] = np.cos(angles).astype(np.float16)
        given["sin_cache"] = np.sin(angles).astype(np.float16)
    given["cumulative_sequence_length"] = np.array([0, *itertools.accumulate(new)], np.int32)
    given["past_seqlens"] = np.array(PAST, np.int32)
    given["block_table"] = table
    return given


TABLES = {"cos_cache": (T, D // 2), "sin_cache": (T, D // 2)}
PART = {"cos_cache": (T, D // 4), "sin_cache": (T, D // 4)}
CASES = {
    "plain": ({"scale": 0.1}, {}),
    "scale unsaid": ({}, {}),
    "rotary": ({"do_rotary": 1}, TABLES),
    "rotary interleaved": ({"do_rotary": 1, "rotary_interleaved": 1}, TABLES),
    "rotary of half a head": ({"do_rotary": 1}, PART),
    "sinks": ({"scale": 0.1}, {"head_sink": (H,)}),
    "window of single tokens": ({"local_window_size": 7}, {}),
}


@pytest.mark.webgpu
@pytest.mark.parametrize("case", CASES)
def test_a_node_means_what_the_kernel_computes(device: Runtime, case: str) -> None:
    attributes, more = CASES[case]
    model = node(attributes, more)
    given = feeds(more, NEW if "single" not in case else (1,) * len(NEW))
    twin = ir.from_proto(model)
    expand_attention(twin)
    session = runtime().load(ir.to_proto(twin).SerializeToString())
    wanted = runtime().run(session, given)
    runtime().unload(session)
    device.aliases = {"key_cache": "key_cache_out", "value_cache": "value_cache_out"}
    session = device.load(model.SerializeToString(), optimize=True)
    found = device.run(session, given)
    device.unload(session)
    for name, right in wanted.items():
        wide, other = right.astype(np.float64), found[name].astype(np.float64)
        assert np.abs(wide - other).max() / wide.std() < 1e-2, (case, name)


@pytest.mark.webgpu
@pytest.mark.parametrize("name", ["llama/dynamo20", "gpt2/dynamo20"])
@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_exports_run_on_the_kernel(
    name: str, wrong: bool, device: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right ones are proven there; of a wrong scale the kernel alone tells, too."""
    del device  # there is one

    def lower(*given: Any) -> Any:
        result, sites = paged_ort.lower_paged(*given)
        for each in result.model.graph if wrong else []:
            if each.domain == "com.microsoft":
                scale = each.attributes["scale"].as_float()
                each.attributes["scale"] = ir.AttrFloat32("scale", scale * 3)
        return result, sites

    def prove(*sides: Any) -> tuple[Proof, str]:
        proof = Proof("proven", 1e-2)
        return proof, paged_kernel.run_kernel(*sides[:5], proof)

    monkeypatch.setattr(pipeline_paged, "lower_paged", lower)
    monkeypatch.setattr(pipeline_paged, "prove_operator", prove)
    (entry,) = corpus(name)
    onnx.save(entry.load(), tmp_path / "m.onnx")
    options = pipeline_paged.PageOptions(tmp_path / "paged", PagedOptions(flavor="ort"))
    if wrong:
        with pytest.raises(ModelDiffersError, match="on the WebGPU kernel"):
            pipeline_paged.to_paged(tmp_path / "m.onnx", options, lambda message: None)
        return
    report = pipeline_paged.to_paged(tmp_path / "m.onnx", options, lambda message: None)
    assert report.paging is not None
    assert report.paging.kernel.startswith("run on WebGPU: ")
