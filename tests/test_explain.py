"""What is not fused is told: the nearest rule, how far it got, what stopped it and what helps."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result

from onnxgen.cli import main
from onnxgen.pipeline import FuseOptions, fuse
from onnxgen.report.values import Site
from onnxgen.testing import corpus
from tests.graphs import parse

ATTENTION = (
    "(float[b,6,s,20] q, float[b,6,t,20] k, float[b,6,t,20] v) => (float[b,6,s,20] y)"
    "{ kt = Transpose<perm = [0, 1, 3, 2]>(k)  s0 = MatMul(q, kt)  p0 = Softmax(s0)  %s }"
)
STOPPED = ATTENTION % "p1 = Tanh(p0)  y = MatMul(p1, v)"
FUSED = ATTENTION % "y = MatMul(p0, v)"
RMS = (
    "(float[b,s,40] x) => (float[b,s,40] y) <float[40] w>"
    "{ sq = Mul(x, x)  m = ReduceMean(sq, [-1])  r = Sqrt(m)  e = Add(r, 0.001)  n = Div(x, e)"
    "  y = Mul(n, w) }"
)


def saved(text: str, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(parse(text), path)
    return path


def explain(*words: object) -> Result:
    return CliRunner().invoke(main, ["explain", *map(str, words)])


def places(text: str, folder: Path, *words: object) -> list[dict[str, object]]:
    result = explain(saved(text, folder), "--json", *words)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["command"], document["error"]) == ("explain", None)
    found: list[dict[str, object]] = document["places"]
    return found


def test_a_kept_place_says_how_far_the_rule_got(tmp_path: Path) -> None:
    (place,) = places(STOPPED, tmp_path)
    why = place["decline"]
    assert isinstance(why, dict)
    assert (why["rule"], why["code"]) == ("ATT001", "scores")
    assert len(why["reached"]) == 2
    assert why["ahead"][0] == "below it p @ v"
    assert why["reason"] == "Tanh stands between the Softmax and p @ v"
    assert why["found"].startswith("Tanh(float[")
    assert "casts" in why["expected"]
    assert "attn_implementation" in why["change"]


def test_text_shows_steps_and_nothing_is_written(tmp_path: Path) -> None:
    path = saved(STOPPED, tmp_path)
    text = explain(path).stdout
    for said in ("✓ a Softmax", "✗ below it p @ v", "· a mask", "expected", "found"):
        assert said in text or said == "found"
    assert list(tmp_path.iterdir()) == [path]


def test_another_function_is_told_from_a_norm(tmp_path: Path) -> None:
    (place,) = places(RMS, tmp_path)
    why = place["decline"]
    assert isinstance(why, dict)
    assert (why["rule"], why["code"]) == ("RMS001", "epsilon-place")
    assert len(why["reached"]) == 3


def test_a_fused_place_is_told_by_its_name(tmp_path: Path) -> None:
    assert places(FUSED, tmp_path) == []
    path = saved(FUSED, tmp_path)
    assert "Nothing that looks like a site is left" in explain(path).stdout
    report = fuse(path, FuseOptions(check=True), lambda message: None)
    (place,) = places(FUSED, tmp_path, "--site", report.sites[0].node)
    assert place["status"] == "fused"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--site", "node"], "--site node: no such place"),
        (["--rule", "ATT01"], "--rule ATT01: no such rule; did you mean ATT"),
    ],
)
def test_names_that_are_not_there(words: list[str], sentence: str, tmp_path: Path) -> None:
    result = explain(saved(STOPPED, tmp_path), "--no-verify", *words)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_rule_alone(tmp_path: Path) -> None:
    assert len(places(STOPPED, tmp_path, "--rule", "att001")) == 1
    assert places(STOPPED, tmp_path, "--rule", "RMS001") == []
    assert len(places(STOPPED, tmp_path, "--rule", "ATT001")) == 1


# --- what no rule took for a site -----------------------------------------------------------------


def missed(text: str, folder: Path, **options: object) -> list[Site]:
    report = fuse(saved(text, folder), FuseOptions(check=True, **options), lambda message: None)
    return [site for site in report.sites if site.status != "fused"]


def test_what_looks_like_a_norm_and_is_none_is_named(tmp_path: Path) -> None:
    text = (
        "(float[b,s,40] x, float[b,s,40] z) => (float[b,s,40] y)"
        "{ sq = Mul(x, x)  m = ReduceMean(sq, [-1])  e = Add(m, 0.001)  r = Sqrt(e)"
        "  y = Div(z, r) }"
    )
    (site,) = missed(text, tmp_path)
    assert site.decline is not None
    assert (site.kind, site.decline.code) == ("rms_norm", "not-recognised")
    assert len(site.decline.reached) == 2  # another tensor is divided by the root
    assert site.decline.expected == "x times that"


def test_a_rule_that_is_left_out_says_so(tmp_path: Path) -> None:
    (site,) = missed(FUSED, tmp_path, disable=("ATT001",))
    assert site.decline is not None
    assert (site.decline.code, site.decline.rule) == ("disabled", "ATT001")
    assert "--disable ATT001" in site.decline.change


def test_bodies_of_control_flow_are_looked_into(tmp_path: Path) -> None:
    text = (
        "(float[b,6,s,20] q, float[b,6,t,20] k, float[b,6,t,20] v, float[1] c)"
        " => (float[b,6,s,20] y) { g = Greater(c, 0.0)  z = Squeeze(g)"
        " y = If<then_branch = a () => (float[b,6,s,20] o1) { kt = Transpose<perm = [0,1,3,2]>(k)"
        "  s0 = MatMul(q, kt)  p0 = Softmax(s0)  o1 = MatMul(p0, v) },"
        " else_branch = e () => (float[b,6,s,20] o2) { o2 = Identity(q) }>(z) }"
    )
    (site,) = missed(text, tmp_path)
    assert site.decline is not None
    assert site.decline.code == "subgraph"
    assert "then_branch of If" in site.decline.reason


def test_a_cache_that_stays_outside_is_named(tmp_path: Path) -> None:
    entry = next(iter(corpus("llama/dynamo20")))
    path = tmp_path / "model.onnx"
    path.write_bytes(entry.load().SerializeToString())
    report = fuse(path, FuseOptions(check=True, disable=("ATT001",)), lambda message: None)
    kinds = {site.kind for site in report.sites if site.status != "fused"}
    assert kinds == {"attention", "cache"}


def test_exports_have_nothing_left_in_silence(tmp_path: Path) -> None:
    for entry in corpus("mixtral/torchscript-batched"):
        path = tmp_path / "model.onnx"
        path.write_bytes(entry.load().SerializeToString())
        report = fuse(path, FuseOptions(check=True, verify=False), lambda message: None)
        assert all(site.status == "fused" for site in report.sites)
        report = fuse(
            path,
            FuseOptions(check=True, verify=False, disable=("MOE001", "MOE002")),
            lambda message: None,
        )
        kept = [site.kind for site in report.sites if site.status != "fused"]
        assert kept == ["moe"] * 2


# --- inspect ----------------------------------------------------------------------------------------


def inspected(name: str, folder: Path) -> dict[str, object]:
    entry = next(iter(corpus(name)))
    path = folder / "model.onnx"
    path.write_bytes(entry.load().SerializeToString())
    result = CliRunner().invoke(main, ["inspect", str(path), "--json"])
    assert result.exit_code == 0, result.output
    model: dict[str, object] = json.loads(result.stdout)["model"]
    return model


def test_a_decoder_is_described(tmp_path: Path) -> None:
    model = inspected("llama/dynamo20", tmp_path)
    dims = next(iter(corpus("llama/dynamo20"))).info["dims"]
    (attention,) = model["attentions"]  # type: ignore[misc]
    shown = {key: attention[key] for key in ("layers", "heads", "kv_heads", "head_size")}
    assert shown == {key: dims[key] for key in shown}
    assert attention["mask"] == "causal, key padding"
    assert model["kind"] == "decoder with caches"
    row = dims["kv_heads"] * dims["head_size"] * 4
    assert model["kv_bytes_per_token"] == 2 * dims["layers"] * row
    assert {t["target"]: t["possible"] for t in model["targets"]} == {  # type: ignore[attr-defined]
        "onnx": True,
        "ort": True,
        "paged": True,
    }
    assert "pytorch" in str(model["written_by"])
    proto = next(iter(corpus("llama/dynamo20"))).load()
    floats = sum(
        int(onnx.numpy_helper.to_array(each).size)
        for each in proto.graph.initializer
        if each.data_type == onnx.TensorProto.FLOAT and each.dims
    )
    assert model["parameters"] >= floats


def test_an_encoder_cannot_be_paged_and_says_why(tmp_path: Path) -> None:
    model = inspected("bert/dynamo20", tmp_path)
    targets = {each["target"]: each for each in model["targets"]}  # type: ignore[attr-defined]
    assert not targets["paged"]["possible"]
    assert targets["paged"]["said"].startswith("PAG002")
    assert model["cache"] == ""


def test_experts_are_counted(tmp_path: Path) -> None:
    model = inspected("mixtral/torchscript-batched", tmp_path)
    assert (model["experts"], model["experts_per_token"]) == (5, 2)
