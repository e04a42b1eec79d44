"""The domain `onnxgen`: bodies against numpy, declared, cut out, expanded, read again."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from onnx_ir import serde

from onnxgen import functions
from onnxgen.functions import sink_attention
from onnxgen.passes.normalize import normalize
from onnxgen.pipeline import FuseOptions, fuse
from onnxgen.testing import load_corpus_model
from tests.graphs import outline, run, runtime

B, H, K, S, P, D, W = 2, 6, 3, 5, 7, 20, 14  # W: width of the values
DTYPES = {"float": np.float32, "half": np.float16}


def info(name: str, kind: int) -> onnx.ValueInfoProto:
    rank = 1 if name == "sinks" else 4
    return helper.make_tensor_value_info(name, kind, [f"{name}{axis}" for axis in range(rank)])


def call(overload: str, dtype: str = "float", opset: int = 24) -> onnx.ModelProto:
    """A model of one SinkAttention."""
    parts = overload.split("_")
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(DTYPES[dtype]))
    names = ["q", "k", "v", "", "", "", "sinks"]
    if "bool" in parts or "bias" in parts:
        names[3] = "mask"
    if "cache" in parts:
        names[4:6] = ["past_k", "past_v"]
    outputs = ["y", "present_k", "present_v"] if "cache" in parts else ["y"]
    attributes = {"scale": 0.3} | ({"softcap": 2.0} if "cap" in parts else {})
    node = helper.make_node(
        sink_attention.NAME,
        names,
        outputs,
        domain=functions.DOMAIN,
        overload=overload,
        **attributes,
    )
    kinds = {
        name: onnx.TensorProto.BOOL if name == "mask" and "bool" in parts else kind
        for name in names
    }
    graph = helper.make_graph(
        [node],
        "g",
        [info(name, kinds[name]) for name in names if name],
        [info(name, kind) for name in outputs],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(functions.DOMAIN, 1)]
    own = functions.called(
        [ir.node(sink_attention.NAME, [], domain="onnxgen", overload=overload)], opset
    )
    return helper.make_model(graph, functions=own, opset_imports=imports, ir_version=10)


def feeds_for(model: onnx.ModelProto, dtype: str) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    past = P if any(value.name == "past_k" for value in model.graph.input) else 0
    shapes = {
        "q": (B, H, S, D),
        "k": (B, K, S, D),
        "v": (B, K, S, W),
        "past_k": (B, K, P, D),
        "past_v": (B, K, P, W),
        "mask": (B, 1, S, past + S),
        "sinks": (H,),
    }
    feeds: dict[str, Any] = {}
    for value in model.graph.input:
        array = rng.standard_normal(shapes[value.name]).astype(DTYPES[dtype])
        if value.name == "mask":
            keep = rng.random(shapes["mask"]) < 0.6
            keep[0, 0, 1] = False  # a row that is masked everywhere
            is_bool = value.type.tensor_type.elem_type == onnx.TensorProto.BOOL
            array = keep if is_bool else np.where(keep, array, -np.inf).astype(DTYPES[dtype])
        feeds[value.name] = array
    return feeds


def expected(feeds: dict[str, Any], cap: float) -> Any:
    """The definition, in float64."""
    wide = {name: each.astype(np.float64) for name, each in feeds.items() if name != "mask"}
    k, v = wide["k"], wide["v"]
    if "past_k" in wide:
        k = np.concatenate([wide["past_k"], k], axis=2)
        v = np.concatenate([wide["past_v"], v], axis=2)
    k, v = (each.repeat(H // K, axis=1) for each in (k, v))
    scores = 0.3 * wide["q"] @ k.swapaxes(2, 3)
    scores = cap * np.tanh(scores / cap) if cap else scores
    mask = feeds.get("mask")
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    sinks = np.broadcast_to(wide["sinks"][:, None, None], (*scores.shape[:3], 1))
    joined = np.exp(np.concatenate([scores, sinks], axis=-1))
    return (joined / joined.sum(-1, keepdims=True))[..., :-1] @ v


OVERLOADS = [
    "_".join(part for part in parts if part)
    for parts in itertools.product(("", "bool", "bias"), ("", "cache"), ("", "cap"), ("", "float"))
]


@pytest.mark.parametrize("overload", OVERLOADS)
def test_every_overload_computes_its_definition(overload: str) -> None:
    for dtype, tolerance in (("float", 1e-6), ("half", 4e-3)):
        model = call(overload, dtype)
        onnx.checker.check_model(model)
        feeds = feeds_for(model, dtype)
        found = run(model, feeds)
        wanted = expected(feeds, 2.0 if "cap" in overload else 0.0)
        assert found["y"].dtype == DTYPES[dtype]
        assert np.abs(found["y"] - wanted).max() <= tolerance * max(1.0, np.abs(wanted).max())
        if "mask" in feeds:
            assert not found["y"][0, :, 1].any()  # nothing but the sink is seen
        if "cache" in overload:
            total = np.concatenate([feeds["past_k"], feeds["k"]], axis=2)
            assert (found["present_k"] == total).all()


def test_a_sink_that_is_low_changes_nothing_and_one_that_is_high_takes_all() -> None:
    model = call("bool")
    feeds = feeds_for(model, "float")
    low = run(model, feeds | {"sinks": np.full(H, -100.0, np.float32)})["y"]
    high = run(model, feeds | {"sinks": np.full(H, 100.0, np.float32)})["y"]
    assert np.abs(low).max() > 1e-1
    assert np.abs(high).max() < 1e-10


@pytest.mark.parametrize("name", ["cap_bool", "bool_bias", "cash"])
def test_overloads_that_are_not(name: str) -> None:
    with pytest.raises(KeyError):
        sink_attention.build(name, 24)


@pytest.mark.parametrize("opset", [23, 24, 25])
def test_declared_for_the_models_opset_and_only_if_called(opset: int) -> None:
    model = ir.from_proto(call("bool_cache", opset=opset))
    model.functions.clear()
    model.functions[("onnxgen", "Old", "")] = serde.deserialize_function(
        functions.called([ir.node(sink_attention.NAME, [], domain="onnxgen")], 24)[0]
    )
    functions.declare(model)
    assert list(model.functions) == [("onnxgen", "SinkAttention", "bool_cache")]
    assert model.functions["onnxgen", "SinkAttention", "bool_cache"].opset_imports[""] == opset
    proto = ir.to_proto(model)
    feeds = feeds_for(proto, "float")
    assert np.allclose(run(proto, feeds)["y"], expected(feeds, 0.0), atol=1e-6)


def test_expanding_keeps_names_metadata_and_every_bit() -> None:
    proto = call("bool_cache")
    proto.graph.node[0].name = "model.layers.3.self_attn/SinkAttention"
    proto.graph.node[0].metadata_props.add(key="onnxgen.rule", value="ATT001")
    model = ir.from_proto(proto)
    functions.expand(model)
    plain = ir.to_proto(model)
    onnx.checker.check_model(plain)
    assert not plain.functions
    assert [each.domain for each in plain.opset_import] == [""]
    assert all(node.domain == "" for node in plain.graph.node)
    for node in plain.graph.node:
        assert node.name.startswith("model.layers.3.self_attn/SinkAttention/")
        assert [(each.key, each.value) for each in node.metadata_props] == [
            ("onnxgen.rule", "ATT001")
        ]
    assert len({node.name for node in plain.graph.node}) == len(plain.graph.node)
    feeds = feeds_for(proto, "float")
    old, new = run(proto, feeds), run(plain, feeds)
    assert all((old[name] == new[name]).all() for name in old)


def test_a_body_that_is_not_ours_is_read_as_it_is_written() -> None:
    """Another function of the same name: its nodes are inlined, none of ours takes its place."""
    proto = call("bool")
    assert functions.is_ours(serde.deserialize_function(proto.functions[0]))
    softmax = next(node for node in proto.functions[0].node if node.op_type == "Softmax")
    softmax.op_type = "Relu"
    del softmax.attribute[:]
    assert not functions.is_ours(serde.deserialize_function(proto.functions[0]))
    model = ir.from_proto(proto)
    normalize(model, 24, runtime())
    assert "Relu" in {node.op_type for node in model.graph}
    assert "SinkAttention" not in {node.op_type for node in model.graph}


def test_a_fused_file_is_read_again_and_stays_as_it_is(tmp_path: Path) -> None:
    """gpt-oss: fused, fused again, and expanded."""
    path = tmp_path / "model.onnx"
    onnx.save(load_corpus_model("gpt_oss/dynamo20-batched"), path)
    fuse(path, FuseOptions(output=tmp_path / "once.onnx"), print)
    once = onnx.load(tmp_path / "once.onnx")
    assert [each.name for each in once.functions] == ["SinkAttention", "MoE"]
    report = fuse(tmp_path / "once.onnx", FuseOptions(output=tmp_path / "twice.onnx"), print)
    assert report.proof is not None
    assert report.proof.status == "proven"
    for name in ("SinkAttention", "MoE"):
        assert report.ops_after[name] == report.ops_before[name] == 2
    twice = onnx.load(tmp_path / "twice.onnx")
    assert outline(twice) == outline(once)
    assert [each.SerializeToString() for each in twice.functions] == [
        each.SerializeToString() for each in once.functions
    ]

    options = FuseOptions(output=tmp_path / "plain.onnx", inline=True)
    report = fuse(path, options, print)
    assert report.proof is not None
    assert report.proof.status == "proven"
    plain = onnx.load(tmp_path / "plain.onnx")
    assert not plain.functions
    assert {each.domain for each in plain.opset_import} == {""}
