"""Users' rules join the pipeline: before ours or after them, checked alike, and reported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx
from onnxscript.rewriter import RewriteRuleClassBase, RewriteRuleSet

from onnxgen import pipeline, pipeline_paged
from onnxgen.pipeline import FuseOptions
from onnxgen.testing import corpus
from tests.graphs import assert_same_graph, parse
from tests.own_rules import (
    MISH,
    NORM,
    SCALED,
    Doubled,
    Mish,
    file_of_common,
    fused,
    run,
    statuses,
    written,
)


def test_a_rule_is_applied_checked_and_reported(tmp_path: Path) -> None:
    report, after = fused(MISH, tmp_path, Mish)
    assert_same_graph(after, parse("(float[b,s,40] x) => (float[b,s,40] y) { y = Mish(x) }"))
    (site,) = report.sites
    assert (site.rule, site.kind, site.status, site.replaced) == ("Mish", "Mish", "fused", 3)
    assert report.proof is not None
    assert (report.proof.status, report.proof.rewrites) == ("proven", 1)
    assert report.own_rules == {"Mish": "the rules given"}
    assert report.near_misses == []
    (node,) = after.graph.node
    assert {prop.key: prop.value for prop in node.metadata_props}["onnxgen.rule"] == "Mish"


def test_a_file_of_rules_on_the_command_line(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(parse(MISH).SerializeToString())
    rules = written(
        tmp_path,
        """
        from onnxscript.rewriter import RewriteRuleClassBase

        class Mish(RewriteRuleClassBase):
            code, kind = "MINE1", "activation"
            def pattern(self, op, x):
                return op.Mul(x, op.Tanh(op.Softplus(x)))
            def rewrite(self, op, x):
                return op.Mish(x)

        rules = [Mish]
        """,
    )
    result = run("fuse", model, "--rules", rules)
    assert result.exit_code == 0, result.output
    assert "activation" in result.stdout
    fused = onnx.load(tmp_path / "model.fused.onnx")
    assert [node.op_type for node in fused.graph.node] == ["Mish"]
    result = run("fuse", model, "--rules", rules, "--disable", "MINE1")
    assert result.exit_code == 0, result.output
    fused = onnx.load(tmp_path / "model.fused.onnx")
    assert [node.op_type for node in fused.graph.node] == ["Softplus", "Tanh", "Mul"]


def test_a_rule_may_give_back_what_was_there(tmp_path: Path) -> None:
    class Twice(RewriteRuleClassBase):
        def pattern(self, op: Any, x: Any) -> Any:
            return op.Neg(op.Neg(x))

        def rewrite(self, op: Any, x: Any) -> Any:
            return x

    text = (
        "(float[b,s,40] x) => (float[b,s,40] y) { a = Abs(x)  c = Neg(a)  d = Neg(c)  y = Exp(d) }"
    )
    report, after = fused(text, tmp_path, Twice)
    assert statuses(report) == {"Twice": ["fused"]}
    assert [node.op_type for node in after.graph.node] == ["Abs", "Exp"]


def test_a_rule_may_make_constants_and_initializers(tmp_path: Path) -> None:
    import numpy as np
    import onnx_ir as ir

    class Folded(RewriteRuleClassBase):
        """A scale goes into the weight: true of this very weight only."""

        def pattern(self, op: Any, x: Any, w: Any) -> Any:
            return op.Mul(op.MatMul(x, w), 3.0)

        def rewrite(self, op: Any, x: Any, w: Any) -> Any:
            tensor = ir.tensor(w.const_value.numpy() * np.float32(3), name="scaled")
            zero = op.Constant(value=ir.tensor(np.zeros((), np.float32)))
            return op.Add(op.MatMul(x, op.initializer(tensor)), zero)

    text = (
        "(float[b,s,40] x) => (float[b,s,40] y) <float[40,40] v, float[40,40] w>"
        "{ a = MatMul(x, v)  c = Mul(a, 3.0)  d = MatMul(c, w)  e = Mul(d, 3.0)  y = Neg(e) }"
    )
    report, after = fused(text, tmp_path, Folded)
    assert statuses(report) == {"Folded": ["fused", "fused"]}, "two weights of one name"
    assert "Mul" not in {node.op_type for node in after.graph.node}
    assert len(after.graph.initializer) == 3, "and a zero"


def test_what_holds_for_these_weights_only_is_compared_with_them(tmp_path: Path) -> None:
    """Random weights in their place show a difference; the weights themselves do not."""
    import numpy as np

    class Projection(RewriteRuleClassBase):
        def pattern(self, op: Any, x: Any, w: Any) -> Any:
            return op.MatMul(op.MatMul(x, w), w)

        def rewrite(self, op: Any, x: Any, w: Any) -> Any:
            return op.MatMul(x, w)

    text = (
        "(float[b,s,40] x) => (float[b,s,40] y) <float[40,40] w>"
        "{ a = MatMul(x, w)  c = MatMul(a, w)  y = Exp(c) }"
    )
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 20)))[0]
    for weight, status in ((basis @ basis.T, "fused"), (2 * basis @ basis.T, "undone")):
        model = parse(text, weights={"w": weight.astype(np.float32)})
        report, _ = fused(model, tmp_path, Projection)
        assert statuses(report) == {"Projection": [status]}


def test_two_outputs_are_replaced_together(tmp_path: Path) -> None:
    class Both(RewriteRuleClassBase):
        def pattern(self, op: Any, x: Any) -> Any:
            a = op.Neg(x)
            return a, op.Exp(a)

        def rewrite(self, op: Any, x: Any) -> Any:
            a = op.Sub(op.Constant(value_float=0.0), x)
            return a, op.Exp(a)

    text = "(float[b,s,40] x) => (float[b,s,40] y, float[b,s,40] z) { y = Neg(x)  z = Exp(y) }"
    report, after = fused(text, tmp_path, Both)
    assert statuses(report) == {"Both": ["fused"]}
    assert [node.op_type for node in after.graph.node] == ["Sub", "Exp"]


def test_operands_in_either_order_are_one_rule(tmp_path: Path) -> None:
    text = MISH.replace("Mul(x, t)", "Mul(t, x)")
    report, _ = fused(text, tmp_path, Mish)
    assert statuses(report) == {}
    report, _ = fused(text, tmp_path, RewriteRuleSet([Mish.rule()], commute=True))
    assert statuses(report) == {"Mish": ["fused"]}


def test_before_ours_by_default_and_after_where_it_says_so(tmp_path: Path) -> None:
    class Root(RewriteRuleClassBase):
        """Inside what RMS001 fuses; its result is another spelling that RMS001 reads."""

        def pattern(self, op: Any, x: Any, r: Any) -> Any:
            return op.Div(x, op.Sqrt(r))

        def rewrite(self, op: Any, x: Any, r: Any) -> Any:
            return op.Mul(x, op.Reciprocal(op.Sqrt(r)))

    report, after = fused(NORM, tmp_path, Root)
    assert statuses(report) == {"Root": ["fused"], "RMS001": ["fused"]}
    assert [node.op_type for node in after.graph.node] == ["RMSNormalization"]

    class Late(Root):
        stage = "after"

    report, after = fused(NORM, tmp_path, Late)
    assert statuses(report) == {"RMS001": ["fused"]}, "nothing is left for it"

    class Canonical(RewriteRuleClassBase):
        stage = "after"

        def pattern(self, op: Any, x: Any, w: Any) -> Any:
            return op.RMSNormalization(x, w)

        def rewrite(self, op: Any, x: Any, w: Any) -> Any:
            return op.RMSNormalization(op.Identity(x), w, axis=-1, epsilon=0.003)

    report, _ = fused(NORM, tmp_path, Canonical)
    assert statuses(report) == {"RMS001": ["fused"], "Canonical": ["fused"]}


def test_what_a_rule_makes_is_normalized_before_ours_see_it(tmp_path: Path) -> None:
    """ONNX Runtime's own spelling of a norm's sum, through a copy that changes nothing."""

    class Spelled(RewriteRuleClassBase):
        def pattern(self, op: Any, x: Any) -> Any:
            return op.Mul(x, x)

        def rewrite(self, op: Any, x: Any) -> Any:
            same = op.Dropout(op.Identity(x))
            return op.Pow(same, op.Add(op.Constant(value_float=1.5), op.Constant(value_float=0.5)))

    report, after = fused(NORM, tmp_path, Spelled)
    assert statuses(report) == {"Spelled": ["fused"], "RMS001": ["fused"]}
    assert [node.op_type for node in after.graph.node] == ["RMSNormalization"]


def test_operators_of_any_domain_can_be_matched(tmp_path: Path) -> None:
    """A rule takes out what ONNX Runtime cannot run: nothing is checked, and it says so."""

    class Custom(RewriteRuleClassBase):
        def pattern(self, op: Any, x: Any) -> Any:
            return op.Twice(x, _domain="my.own")

        def rewrite(self, op: Any, x: Any) -> Any:
            return op.Add(x, x)

    model = parse(
        '<ir_version: 10, opset_import: ["" : 20, "my.own" : 1]> g '
        "(float[b,s,40] x) => (float[b,s,40] y) { y = my.own.Twice(x) }"
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    options = FuseOptions(rules=(Custom,), verify=False)
    report = pipeline.fuse(path, options, lambda message: None)
    assert statuses(report) == {"Custom": ["fused"]}
    assert report.ops_after == {"Add": 1}
    assert report.proof is not None
    assert report.proof.status == "unproven"


def test_a_decoder_keeps_its_attention_beside_a_users_rule(tmp_path: Path) -> None:
    class Silu(RewriteRuleClassBase):
        def pattern(self, op: Any, x: Any) -> Any:
            return op.Mul(x, op.Sigmoid(x))

        def rewrite(self, op: Any, x: Any) -> Any:
            return op.Div(x, op.Add(op.Exp(op.Neg(x)), op.Constant(value_float=1.0)))

    (entry,) = corpus("llama/dynamo20")
    plain, _ = fused(entry.load(), tmp_path)
    report, _ = fused(entry.load(), tmp_path, Silu)
    own = statuses(report).pop("Silu")
    assert own == ["fused"] * len(own) != []
    assert {**statuses(report), "Silu": own} == {**statuses(plain), "Silu": own}
    options = pipeline_paged.PageOptions(tmp_path / "paged", rules=(Silu,), budget="quick")
    path = tmp_path / "model.onnx"
    paged = pipeline_paged.to_paged(path, options, lambda message: None)
    assert statuses(paged)["Silu"] == own
    assert paged.proof is not None
    assert paged.proof.status == "proven"


def test_rules_of_our_own_kind_are_taken_too(tmp_path: Path) -> None:
    report, _ = fused(SCALED, tmp_path, Doubled, [Mish.rule()])
    assert statuses(report) == {"DBL1": ["fused", "fused"]}
    report, _ = fused(MISH, tmp_path, Doubled())
    assert [(s.status, s.decline and s.decline.code) for s in report.sites] == [
        ("kept", "computed")
    ]


def test_onnxscripts_own_rules_are_taken_as_they_are(tmp_path: Path) -> None:
    """Some 50, those that come in several spellings among them; ours find what they found."""
    from onnxscript.rewriter.rules import common

    offered = [getattr(common, name) for name in common.__all__]
    rules = [each() if callable(each) else each for each in offered]
    (entry,) = corpus("llama/torchscript")
    plain, _ = fused(entry.load(), tmp_path)
    report, _ = fused(entry.load(), tmp_path, rules)
    assert report.proof is not None
    assert report.proof.status == "proven"
    found = statuses(report)
    assert found["UnsqueezeUnsqueeze"] == ["fused"] * 3
    assert "undone" not in {status for each in found.values() for status in each}
    assert {rule: found[rule] for rule in statuses(plain)} == statuses(plain)
    said = run("fuse", tmp_path / "model.onnx", "--rules", file_of_common(tmp_path)).stdout
    assert said.count("fits nowhere") == 4, "the others are counted"
    assert re.search(r"And \d\d other rules of yours fit nowhere", said)
