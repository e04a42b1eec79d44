"""Users' rules that are wrong are undone, and matches that fail say why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from onnxscript.rewriter import RewriteRuleClassBase

from onnxgen import pipeline
from onnxgen.analysis.facts import Facts
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rule import Rewrite
from onnxgen.pipeline import FuseOptions
from tests.graphs import assert_same_graph, parse
from tests.own_rules import (
    MISH,
    NORM,
    SCALED,
    Doubled,
    Mish,
    file_of_mish,
    fused,
    run,
    statuses,
)


class DropsScale(RewriteRuleClassBase):
    def pattern(self, op: Any, x: Any, w: Any, c: Any) -> Any:
        return op.MatMul(op.Mul(x, c), w)

    def rewrite(self, op: Any, x: Any, w: Any, c: Any) -> Any:
        return op.MatMul(x, w)


class MakesNonsense(RewriteRuleClassBase):
    def pattern(self, op: Any, x: Any, w: Any) -> Any:
        return op.MatMul(x, w)

    def rewrite(self, op: Any, x: Any, w: Any) -> Any:
        return op.MatMulButBetter(x, w, speed=3)


class WrongShape(MakesNonsense):
    def rewrite(self, op: Any, x: Any, w: Any) -> Any:
        return op.Unsqueeze(op.MatMul(x, w), op.Constant(value_ints=[0]))


class CyclicRule(MakesNonsense):
    def pattern(self, op: Any, x: Any, w: Any) -> Any:
        return op.MatMul(x, w, _outputs=["y"])

    def rewrite(self, op: Any, x: Any, w: Any, y: Any) -> Any:
        return op.Add(y, y)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (DropsScale, "differs by"),
        (MakesNonsense, "ONNX Runtime refuses it"),
        (WrongShape, "becomes"),
    ],
)
def test_a_wrong_rewrite_is_undone_and_said(rule: Any, reason: str, tmp_path: Path) -> None:
    _, unchanged = fused(SCALED, tmp_path)
    report, after = fused(SCALED, tmp_path, rule)
    (site,) = report.sites
    assert (site.rule, site.status) == (rule.__name__, "undone")
    assert site.decline is not None
    assert reason in site.decline.reason
    assert site.decline.code == "check-failed"
    assert [each for each in report.warnings if "the rewrite was undone" in each]
    assert_same_graph(after, unchanged)
    assert len(after.graph.initializer) == len(unchanged.graph.initializer)


@pytest.mark.parametrize("to", [10, 11])
def test_another_type_is_never_put_in(to: int, tmp_path: Path) -> None:
    """Without any check too: float16, double."""

    class OtherType(MakesNonsense):
        def rewrite(self, op: Any, x: Any, w: Any) -> Any:
            return op.Cast(op.MatMul(x, w), to=to)

    path = tmp_path / "model.onnx"
    path.write_bytes(parse(SCALED).SerializeToString())
    for verify in (True, False):
        options = FuseOptions(rules=(OtherType,), verify=verify)
        report = pipeline.fuse(path, options, lambda message: None)
        (site,) = report.sites
        assert site.decline is not None
        assert (site.status, site.decline.code) == ("kept", "other-type")


def test_another_type_is_undone_of_a_rule_of_our_kind_too(tmp_path: Path) -> None:
    class Halved(Doubled):
        def rewrite(self, facts: Facts, builder: Builder, node: Any) -> Rewrite | None:
            y = builder.op("Cast", [node.inputs[0]], {"to": 10})
            return Rewrite(y.producer(), ((node.outputs[0], y),))

    text = "(float[b,s,40] x) => (float[b,s,40] y) { a = Neg(x)  c = Mul(a, 1.0)  y = Mul(c, 2.0) }"
    report, _ = fused(text, tmp_path, Halved)
    assert [site.status for site in report.sites] == ["undone"]
    assert "becomes float16, was float32" in report.warnings[0]


def test_a_replacement_that_reads_what_it_replaces_is_kept_out(tmp_path: Path) -> None:
    report, _ = fused(SCALED, tmp_path, CyclicRule)
    (site,) = report.sites
    assert site.decline is not None
    assert site.decline.code == "cycle"


def test_a_wrong_rule_where_ours_would_fuse_leaves_ours(tmp_path: Path) -> None:
    class Wrong(RewriteRuleClassBase):
        def pattern(self, op: Any, x: Any) -> Any:
            return op.Sqrt(x)

        def rewrite(self, op: Any, x: Any) -> Any:
            return op.Reciprocal(x)

    report, after = fused(NORM, tmp_path, Wrong)
    assert statuses(report) == {"Wrong": ["undone"], "RMS001": ["fused"]}
    assert [node.op_type for node in after.graph.node] == ["RMSNormalization"]


# --- matches that fail --------------------------------------------------------------------------


def test_what_check_refuses_is_kept_with_its_reason(tmp_path: Path) -> None:
    from onnxscript.rewriter import MatchResult

    class Picky(Mish):
        def check(self, context: Any, x: Any) -> Any:
            return MatchResult().fail("x is not to my liking", x.uses()[0].node)

    class Silent(Mish):
        def check(self, context: Any, x: Any) -> Any:
            return False

    class GivesUp(Mish):
        def rewrite(self, op: Any, x: Any) -> Any:
            return MatchResult().fail("there is nothing to put there")

    for rule, code, reason in (
        (Picky, "check", "x is not to my liking"),
        (Silent, "check", "its check says no, and gives no reason"),
        (GivesUp, "rewrite", "there is nothing to put there"),
    ):
        report, _ = fused(MISH, tmp_path, rule)
        (site,) = report.sites
        assert site.decline is not None
        assert (site.status, site.rule) == ("kept", rule.__name__)
        assert (site.decline.code, site.decline.reason) == (code, reason)
        assert site.decline.nodes


def test_a_near_miss_says_what_stopped_it_and_is_no_site(tmp_path: Path) -> None:
    text = (
        "(float[b,s,40] x, float[b,s,40] z) => (float[b,s,40] y)"
        "{ p = Softplus(x)  t = Tanh(p)  u = Mul(z, t)  q = Exp(u)  y = Mul(q, u) }"
    )
    report, _ = fused(text, tmp_path, Mish)
    assert report.sites == []
    (miss,) = report.near_misses
    assert miss.decline is not None
    assert (miss.rule, miss.status, miss.details["matched"]) == ("Mish", "kept", 3)
    assert miss.decline.code == "no-match"
    assert "bound to two different values" in miss.decline.reason
    result = run("fuse", tmp_path / "model.onnx", "--rules", file_of_mish(tmp_path))
    assert "Mish of" in result.stdout
    assert "fits nowhere: nearest (1): 3 nodes fit, then: Binding failure" in result.stdout


def test_explain_tells_of_near_misses(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(parse(MISH.replace("Tanh(p)", "Sigmoid(p)")).SerializeToString())
    result = run("explain", model, "--rules", file_of_mish(tmp_path), "--rule", "Mish")
    assert result.exit_code == 0, result.output
    assert "no-match: OpType mismatch: expected Tanh, got Sigmoid." in result.stdout
    assert "Mish: " in result.stdout
    assert not (tmp_path / "model.fused.onnx").exists()


def test_where_it_found_its_sites_roots_alone_are_no_near_misses(tmp_path: Path) -> None:
    text = (
        "(float[b,s,40] x, float[b,s,40] z) => (float[b,s,40] y)"
        "{ p = Softplus(x)  t = Tanh(p)  u = Mul(x, t)  y = Mul(u, z) }"
    )
    report, _ = fused(text, tmp_path, Mish)
    assert statuses(report) == {"Mish": ["fused"]}
    assert report.near_misses == []


def test_a_pattern_of_one_node_that_check_refuses_is_no_site(tmp_path: Path) -> None:
    class Small(RewriteRuleClassBase):
        def pattern(self, op: Any, x: Any) -> Any:
            return op.Exp(x)

        def check(self, context: Any, x: Any) -> Any:
            return False

        def rewrite(self, op: Any, x: Any) -> Any:
            raise AssertionError

    report, _ = fused("(float[b] x) => (float[b] y) { y = Exp(x) }", tmp_path, Small)
    assert report.sites == []
    assert [miss.decline and miss.decline.code for miss in report.near_misses] == ["check"]
