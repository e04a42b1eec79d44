"""Merged decoders: both branches of an If on use_cache_branch are raised and keep working."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxgen.passes.merged import join_branches, split_branches
from onnxgen.pipeline import FuseOptions, fuse
from onnxgen.report.values import Report
from onnxgen.testing import load_corpus_model
from tests.graphs import parse, run
from tests.merging import merged

WEIGHTS = " <float[37,50] table, float[50,120] wq, float[50,120] wk, float[50,120] wv>"
HEADS = (
    "x = Gather(table, ids)  qp = MatMul(x, wq)  kp = MatMul(x, wk)  vp = MatMul(x, wv)"
    "  q4 = Reshape(qp, [0, 0, 6, 20])  q = Transpose<perm = [0, 2, 1, 3]>(q4)"
    "  k4 = Reshape(kp, [0, 0, 6, 20])  k = Transpose<perm = [0, 2, 1, 3]>(k4)"
    "  v4 = Reshape(vp, [0, 0, 6, 20])  v = Transpose<perm = [0, 2, 1, 3]>(v4)"
)
ATTEND = (
    "  kt = Transpose<perm = [0, 1, 3, 2]>(key)  s = MatMul(q, kt)  c = Mul(s, 0.25)"
    "  am = Cast<to = 1>(attention_mask)  gone = Sub(1.0, am)  low = Mul(gone, -30000.0)"
    "  mask = Unsqueeze(low, [1, 2])  m = Add(c, mask)  p = Softmax<axis = -1>(m)"
    "  o = MatMul(p, value)  t = Transpose<perm = [0, 2, 1, 3]>(o)  y = Reshape(t, [0, 0, 120])"
)
OUTPUTS = "(float[b,s,120] y, float[b,6,t,20] present_key, float[b,6,t,20] present_value)"


def decoder(past: bool) -> onnx.ModelProto:
    pasts = ", float[b,6,p,20] past_key, float[b,6,p,20] past_value" if past else ""
    cache = (
        "key = Concat<axis = 2>(past_key, k)  value = Concat<axis = 2>(past_value, v)"
        if past
        else "key = Identity(k)  value = Identity(v)"
    )
    presents = "present_key = Identity(key)  present_value = Identity(value)"
    model = parse(
        f"(int64[b,s] ids, int64[b,t] attention_mask{pasts}) => {OUTPUTS}"
        f"{WEIGHTS} {{ {HEADS}  {cache}  {presents} {ATTEND} }}"
    )
    assert isinstance(model, onnx.ModelProto)
    return model


def fused(model: onnx.ModelProto, folder: Path) -> tuple[onnx.ModelProto, Report]:
    path = folder / "model.onnx"
    onnx.save(model, path)
    report = fuse(path, FuseOptions(), lambda message: None)
    return onnx.load(report.output), report


def bodies(model: onnx.ModelProto) -> dict[str, list[str]]:
    (choice,) = model.graph.node
    assert choice.op_type == "If"
    return {a.name: [node.op_type for node in a.g.node] for a in choice.attribute}


def test_both_branches_are_raised(tmp_path: Path) -> None:
    model = merged(decoder(past=True), decoder(past=False))
    after, report = fused(model, tmp_path)
    found = bodies(after)
    assert found["then_branch"].count("Attention") == found["else_branch"].count("Attention") == 1
    assert "Softmax" not in found["then_branch"] + found["else_branch"]
    assert [site.details["cache"] for site in report.sites] == ["concatenated", "none"]
    assert [site.details["branch"] for site in report.sites] == [
        "use_cache_branch, then",
        "use_cache_branch, else",
    ]
    assert report.proof is not None
    run_cases = [case for case in report.proof.cases if not case.skipped]
    assert {case.past > 0 for case in run_cases} == {True, False}
    assert report.proof.rewrites == 2
    for kind in ("input", "output"):
        before, now = ([v.name for v in getattr(m.graph, kind)] for m in (model, after))
        assert before == now
    names = [tensor.name for tensor in after.graph.initializer]
    assert sum(name.startswith("w") for name in names) == 3  # the branches share their weights


@pytest.mark.parametrize(("name", "sites"), [("whisper_decoder", 12), ("t5_decoder", 22)])
def test_exported_decoders(name: str, sites: int, tmp_path: Path) -> None:
    cached, first = (load_corpus_model(f"{name}/torchscript{mod}") for mod in ("", "-prefill"))
    after, report = fused(merged(cached, first), tmp_path)
    assert [site.status for site in report.sites] == ["fused"] * sites
    assert all("Softmax" not in ops for ops in bodies(after).values())


def test_split_and_joined_is_the_same_model() -> None:
    before = merged(decoder(past=True), decoder(past=False))
    parts = split_branches(ir.from_proto(before))
    assert [part.branch for part in parts] == ["then_branch", "else_branch"]
    for part in parts:
        assert "If" not in {node.op_type for node in part.model.graph}
        ids = part.model.graph.inputs[0]
        assert all(use.node.graph is part.model.graph for use in ids.uses())
    after = ir.to_proto(join_branches(parts))
    onnx.checker.check_model(after, full_check=True)
    rng = np.random.default_rng(0)
    for past, cached in ((0, False), (4, True)):
        feeds = {
            "ids": rng.integers(0, 37, (2, 3)),
            "attention_mask": np.ones((2, past + 3), np.int64),
            "past_key": rng.standard_normal((2, 6, past, 20)).astype(np.float32),
            "past_value": rng.standard_normal((2, 6, past, 20)).astype(np.float32),
            "use_cache_branch": np.array([cached]),
        }
        for name, value in run(before, feeds).items():
            np.testing.assert_array_equal(value, run(after, feeds)[name])


CHOICE = (
    "(bool[1] c, float[s] x, float[s] z) => (float[s] y, float[s] w)"
    " { d = Squeeze(c)  h = Mul(x, 2.0)  y, w = If(d) <"
    "then_branch = a () => (float[s] ya, float[s] wa)"
    " { ya = Add(h, k)  wa = Identity(z) },"
    " else_branch = b () => (float[s] yb, float[s] wb)"
    " { yb = Sub(h, m)  wb = Identity(yb) }> }"
)


def choosing() -> onnx.ModelProto:
    text = f'<ir_version: 10, opset_import: ["" : 20]> g {CHOICE}'
    model = onnx.parser.parse_model(text.replace("Mul(x, 2.0)", "Add(x, x)"))
    assert isinstance(model, onnx.ModelProto)
    (choice,) = [node for node in model.graph.node if node.op_type == "If"]
    for name, attribute in zip("km", choice.attribute, strict=True):
        array = np.array([3.0 if name == "k" else 5.0], np.float32)
        attribute.g.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def test_nodes_and_constants_around_and_inside() -> None:
    before = choosing()
    parts = split_branches(ir.from_proto(before))
    assert len(parts) == 2
    after = ir.to_proto(join_branches(parts))
    onnx.checker.check_model(after, full_check=True)
    x, z = np.arange(4, dtype=np.float32), np.ones(4, np.float32)
    for chosen in (True, False):
        feeds = {"c": np.array([chosen]), "x": x, "z": z}
        for name, value in run(before, feeds).items():
            np.testing.assert_array_equal(value, run(after, feeds)[name])


def test_a_condition_that_is_computed_chooses_nothing() -> None:
    model = choosing()
    (first,) = [node for node in model.graph.node if node.op_type == "Squeeze"]
    first.op_type = "Not"
    parts = split_branches(ir.from_proto(model))
    assert len(parts) == 1
    assert join_branches(parts) is parts[0].model


def test_two_inputs_that_choose_are_left_alone() -> None:
    model = choosing()
    (choice,) = [node for node in model.graph.node if node.op_type == "If"]
    other = model.graph.node.add()
    other.CopyFrom(choice)
    other.input[:] = ["c2"]
    other.output[:] = ["y2", "w2"]
    value = model.graph.input.add()
    value.CopyFrom(model.graph.input[0])
    value.name = "c2"
    assert len(split_branches(ir.from_proto(model))) == 1
