"""ATT003: rows that see nothing are zeros by a bool mask, not by a Where behind the attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxgen import pipeline
from onnxgen.testing import load_corpus_model
from tests.graphs import assert_raised, raised, run

SIGNATURE = (
    "(int64[b,s] ids, int64[b,t] attention_mask, float[b,3,p,20] past_k, float[b,3,p,20] past_v)"
    " => (float[b,6,s,20] y, float[b,3,t,20] present_k, float[b,3,t,20] present_v)"
    " <float[37,50] table, float[50,120] wq, float[50,60] wk, float[50,60] wv>"
)
PROJECTED = (
    "x = Gather(table, ids)  qp = MatMul(x, wq)  kp = MatMul(x, wk)  vp = MatMul(x, wv)"
    "  q3 = Reshape(qp, [0, 0, 6, 20])  k3 = Reshape(kp, [0, 0, 3, 20])"
    "  v3 = Reshape(vp, [0, 0, 3, 20])"
    "  q = Transpose<perm = [0, 2, 1, 3]>(q3)  k = Transpose<perm = [0, 2, 1, 3]>(k3)"
    "  v = Transpose<perm = [0, 2, 1, 3]>(v3)"
)
KEEP = (
    "tl = Shape<start = 1, end = 2>(attention_mask)  tt = Squeeze(tl, [0])"
    "  sl = Shape<start = 1, end = 2>(ids)  ss = Squeeze(sl, [0])  pp = Sub(tt, ss)"
    "  cols = Range(0, tt, 1)  rows = Range(pp, tt, 1)  ru = Unsqueeze(rows, [1])"
    "  causal = LessOrEqual(cols, ru)  am = Cast<to = 9>(attention_mask)"
    "  au = Unsqueeze(am, [1, 2])  keep = And(causal, au)"
)
LOWEST = "-3.4028235e38"
SCALED = f"gone = Not(keep)  gf = Cast<to = 1>(gone)  mask = Mul(gf, {LOWEST})"
CHOSEN = f"mask = Where(keep, 0.0, {LOWEST})"
ADDED = f"kf = Cast<to = 1>(keep)  less = Sub(1.0, kf)  mask = Mul(less, {LOWEST})"
COUNTED = "kn = Cast<to = 1>(keep)  n = ReduceSum(kn, [-1])  nothing = Less(n, 1.0)"
ATTENTION = (
    "a, present_k, present_v = Attention<scale = 0.31>(q, k, v, mask, past_k, past_v)"
    "  y = Where(nothing, 0.0, a)"
)


def exported(
    mask: str, nothing: str = COUNTED, attention: str = ATTENTION, keep: str = KEEP
) -> str:
    return f"{SIGNATURE} {{ {PROJECTED}  {keep}  {mask}  {nothing}  {attention} }}"


@pytest.mark.parametrize("mask", [SCALED, CHOSEN, ADDED, "mask = Identity(keep)"])
@pytest.mark.parametrize(
    "nothing",
    [
        COUNTED,
        "kn = Cast<to = 7>(keep)  n = ReduceMax(kn, [-1])  nothing = Equal(n, 0)",
        "kn = Cast<to = 6>(keep)  n = ReduceSum(kn, [-1])  some = Cast<to = 9>(n)  nothing = Not(some)",
    ],
)
def test_the_where_goes(mask: str, nothing: str) -> None:
    result = assert_raised(exported(mask, nothing), None, "ATT003", opset=23)
    assert result.count("Where") == 0
    node = result.node("Attention")
    assert list(node.output) == ["y", "present_k", "present_v"]
    assert list(node.input[4:]) == ["past_k", "past_v"]
    # Left padding: a row that sees nothing is zeros before and after.
    feeds = {
        "ids": np.arange(10).reshape(2, 5),
        "attention_mask": np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
        "past_k": np.zeros((2, 3, 0, 20), np.float32),
        "past_v": np.zeros((2, 3, 0, 20), np.float32),
    }
    before, after = run(result.before, feeds), run(result.after, feeds)
    assert not before["y"][1, :, :2].any()
    assert not after["y"][1, :, :2].any()
    assert np.allclose(before["y"], after["y"], atol=1e-5)


@pytest.mark.parametrize(
    "changed",
    [
        # Other rows than those that see nothing.
        exported(SCALED, COUNTED.replace("Less(n, 1.0)", "Less(n, 2.0)")),
        exported(SCALED, "nothing = Unsqueeze(gone, [4])  ".replace("gone, [4]", "au0, [3]")
                 + "", keep=KEEP + "  gz = Not(am)  sl0 = Sub(tt, ss)  sv = Unsqueeze(sl0, [0])"
                 "  te = Unsqueeze(tt, [0])  az = Slice(gz, sv, te, [1])  au0 = Unsqueeze(az, [1])"),
        # A mask that is added and is not only 0 or the lowest number.
        exported(SCALED.replace(LOWEST, "-3.0")),
        exported(f"{CHOSEN.replace('mask', 'm0')}  cf = Cast<to = 1>(cols)  mask = Add(m0, cf)"),
        # Something else than zeros, and a second reader.
        exported(SCALED, attention=ATTENTION.replace("Where(nothing, 0.0", "Where(nothing, 1.0")),
        exported(SCALED, attention=ATTENTION.replace("y = ", "w = ") + "  y = Add(w, a)"),
    ],
    ids=["few", "padded-queries", "weak", "biased", "ones", "read"],
)  # fmt: skip
def test_other_wheres_stay(changed: str) -> None:
    result = raised(changed, opset=23)
    assert not [site for site in result.sites if site.rule == "ATT003"]
    assert "Where" in {node.op_type for node in result.after.graph.node}


def test_what_was_said_of_the_attention_stays_true(tmp_path: Path) -> None:
    """Its site names the node that is there in the end, which keeps its module and its mask."""
    path = tmp_path / "model.onnx"
    path.write_bytes(load_corpus_model("llama/transformers").SerializeToString())
    report = pipeline.fuse(path, pipeline.FuseOptions(verify=False), lambda message: None)
    nodes = {node.name: node for node in onnx.load(report.output).graph.node}
    sites = [site for site in report.sites if site.kind == "attention"]
    assert [site.details["mask"] for site in sites] == ["causal, key padding"] * 2
    for site in sites:
        metadata = {each.key: each.value for each in nodes[site.node].metadata_props}
        assert metadata["pkg.torch.onnx.name_scopes"] == site.scope != ""
