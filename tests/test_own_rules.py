"""Users' rules: joined to the pipeline, checked like ours, undone where wrong, never a traceback."""

from __future__ import annotations

import re
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result
from onnxscript.rewriter import RewriteRule, RewriteRuleClassBase, RewriteRuleSet

from onnxgen import own_rules, pipeline, pipeline_paged
from onnxgen.analysis.facts import Facts
from onnxgen.cli import main
from onnxgen.errors import FileError, UsageError
from onnxgen.own_rules import find_rules
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rule import Declined, Rewrite, Rule
from onnxgen.pipeline import FuseOptions
from onnxgen.report.values import Report
from onnxgen.testing import corpus
from tests.graphs import assert_same_graph, assert_same_numbers, parse

MISH = "(float[b,s,40] x) => (float[b,s,40] y) { p = Softplus(x)  t = Tanh(p)  y = Mul(x, t) }"
SCALED = (
    "(float[b,s,40] x) => (float[b,s,24] y) <float[40,24] w>"
    "{ u = Mul(x, 0.125)  v = MatMul(u, w)  y = Mul(v, 3.0) }"
)
NORM = (
    "(float[b,s,40] x) => (float[b,s,40] y) <float[40] w>"
    "{ q = Mul(x, x)  m = ReduceMean(q, [-1])  e = Add(m, 0.003)  r = Sqrt(e)  n = Div(x, r)"
    "  y = Mul(n, w) }"
)


class Mish(RewriteRuleClassBase):
    def pattern(self, op: Any, x: Any) -> Any:
        return op.Mul(x, op.Tanh(op.Softplus(x)))

    def rewrite(self, op: Any, x: Any) -> Any:
        return op.Mish(x)


def fused(
    text: str | onnx.ModelProto, folder: Path, *rules: Any, **options: Any
) -> tuple[Report, onnx.ModelProto]:
    """What `onnxgen fuse --rules` does to a graph."""
    path = folder / "model.onnx"
    model = parse(text) if isinstance(text, str) else text
    path.write_bytes(model.SerializeToString())
    report = pipeline.fuse(path, FuseOptions(rules=rules, **options), lambda message: None)
    after = onnx.load(report.output)
    if isinstance(text, str):
        assert_same_numbers(model, after)
    return report, after


def written(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def statuses(report: Report) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for site in report.sites:
        found.setdefault(site.rule, []).append(site.status)
    return found


# --- rules that are right -----------------------------------------------------------------------


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

    report, after = fused(SCALED, tmp_path, Folded)
    assert statuses(report) == {"Folded": ["fused"]}
    assert [node.op_type for node in after.graph.node].count("Mul") == 1


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


class Doubled(Rule):
    """A rule of our own kind."""

    code, kind, anchors = "DBL1", "doubled", frozenset({"Mul"})

    def rewrite(self, facts: Facts, builder: Builder, node: Any) -> Rewrite | None:
        x, factor = node.inputs
        if factor.const_value is None:
            raise Declined(self, "computed", "the factor is computed", node)
        y = builder.op("Mul", [factor, x])
        return Rewrite(y.producer(), ((node.outputs[0], y),))


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
    said = run("fuse", tmp_path / "model.onnx", "--rules", _file_of_common(tmp_path)).stdout
    assert said.count("fits nowhere") == 4, "the others are counted"
    assert re.search(r"And \d\d other rules of yours fit nowhere", said)


# --- rules that are wrong -----------------------------------------------------------------------


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
    result = run("fuse", tmp_path / "model.onnx", "--rules", _file_of_mish(tmp_path))
    assert "Mish of" in result.stdout
    assert "fits nowhere: nearest (1): 3 nodes fit, then: Binding failure" in result.stdout


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


# --- files that are broken ----------------------------------------------------------------------


def _file_of_mish(folder: Path, rest: str = "") -> Path:
    return written(
        folder,
        """
        from onnxscript.rewriter import RewriteRuleClassBase
        class Mish(RewriteRuleClassBase):
            def pattern(self, op, x):
                return op.Mul(x, op.Tanh(op.Softplus(x)))
            def rewrite(self, op, x):
                return op.Mish(x)
        rules = [Mish]
        """
        + rest,
    )


def _file_of_common(folder: Path) -> Path:
    return written(
        folder,
        """
        from onnxscript.rewriter.rules import common
        offered = [getattr(common, name) for name in common.__all__]
        rules = [each() if callable(each) else each for each in offered]
        """,
    )


BROKEN = {
    "def f(:\n": "line 1: invalid syntax",
    "\nimport nowhere_at_all\n": "line 2: ModuleNotFoundError",
    "import sys\nsys.exit(3)\n": "line 2: SystemExit",
    "x = 1\n": "must define the name 'rules'",
    "rules = []\n": "'rules' is empty",
    "rules = 3\n": "is none",
    "rules = ['GEL001']\n": "is none",
    "\0": "source code string cannot contain null bytes",
}


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize("command", ["fuse", "to-paged"])
def test_a_broken_file_is_one_sentence(text: str, command: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(parse(MISH).SerializeToString())
    path = tmp_path / "broken.py"
    path.write_bytes(text.encode())
    result = run(command, tmp_path / "model.onnx", "--rules", path)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert str(path) in result.stderr
    assert BROKEN[text] in result.stderr


RAISING = {
    "def pattern(self, op, x):\n    return 1 / 0": "the rule Bad cannot be made: line 4: ZeroDivision",
    "def check(self, context, x):\n    return x.nothing": "line 4: AttributeError",
    "def rewrite(self, op, x):\n    return op.Exp(x), x": "Number of outputs",
    "def rewrite(self, op, x):\n    return op.Exp(x, _version=7)": "Multiple versions of opset",
    "def setup(self):\n    raise KeyError('k')": "line 4: KeyError: 'k'",
    "def cleanup(self):\n    raise KeyError('k')": "line 4: KeyError: 'k'",
    "code = 'GEL001'": "the code GEL001 is taken by a rule of onnxgen",
    "code = 'a b'": "is no code",
    "stage = 'late'": "stage is 'late'",
    "def __init__(self):\n    super().__init__(as_function=True)": "as_function",
}


@pytest.mark.parametrize("body", RAISING, ids=range(len(RAISING)))
def test_a_rule_that_fails_is_one_sentence(body: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(parse(MISH).SerializeToString())
    path = tmp_path / "bad.py"
    lines = [
        "from onnxscript.rewriter import RewriteRuleClassBase",
        "class Bad(RewriteRuleClassBase):",
    ]
    lines += [f"    {line}" for line in body.splitlines()]
    for name, made in (("pattern", "op.Tanh(op.Softplus(x))"), ("rewrite", "op.Exp(x)")):
        if f"def {name}" not in body:
            lines += [f"    def {name}(self, op, x):", f"        return {made}"]
    path.write_text("\n".join([*lines, "rules = Bad", ""]))
    result = run("fuse", tmp_path / "model.onnx", "--rules", path)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert str(path) in result.stderr
    assert RAISING[body] in result.stderr
    assert not (tmp_path / "model.fused.onnx").exists()


def test_a_missing_file_is_a_file_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"nothing.py cannot be read: No such file"):
        find_rules([tmp_path / "nothing.py"], [])


def test_a_rule_of_our_kind_that_fails_is_named(tmp_path: Path) -> None:
    class Failing(Doubled):
        def rewrite(self, facts: Facts, builder: Builder, node: Any) -> Rewrite | None:
            raise RuntimeError("broken")

    with pytest.raises(UsageError, match=r"the rule DBL1 fails at node .* RuntimeError: broken"):
        fused(MISH, tmp_path, Failing)

    class Odd(Doubled):
        def rewrite(self, facts: Facts, builder: Builder, node: Any) -> Any:
            return node.outputs[0]

    with pytest.raises(UsageError, match=r"DBL1 fails at node .*: it gives Value"):
        fused(MISH, tmp_path, Odd)

    class Nameless(Rule):
        kind, anchors = "doubled", frozenset({"Mul"})

        def rewrite(self, facts: Facts, builder: Builder, node: Any) -> Rewrite | None:
            return None

    with pytest.raises(UsageError, match="the rule Nameless has no 'code'"):
        find_rules([Nameless], [])


def test_codes_are_unique(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the code Mish is taken by a rule of the rules given"):
        find_rules([Mish, Mish], [])
    unnamed = RewriteRule(lambda op, x: op.Neg(op.Neg(x)), lambda op, x: op.Identity(x))
    other = RewriteRule(lambda op, x: op.Abs(op.Abs(x)), lambda op, x: op.Abs(x), name="a b!")
    assert find_rules([[unnamed, other]], []).codes == ["rule1-1", "a-b-"]

    class Coded(Mish):
        code, kind, stage = "MINE1", "activation", "after"

    (rule,) = find_rules([Coded.rule()], []).rules
    assert (rule.code, rule.kind, rule.stage) == ("MINE1", "activation", "after")


# --- packages that are installed ----------------------------------------------------------------


class Entry:
    """An entry point as `importlib.metadata` gives it."""

    def __init__(self, name: str, loaded: Any) -> None:
        self.name, self.value, self._loaded = name, f"{name}.rules:rules", loaded
        self.dist = type("Distribution", (), {"name": f"pkg-{name}"})()

    def load(self) -> Any:
        if isinstance(self._loaded, BaseException):
            raise self._loaded
        return self._loaded


def test_installed_packages_join_and_broken_ones_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ours(Mish):
        code = "GEL001"

    asked: list[str] = []
    entries = [
        Entry("a", ImportError("no module")),
        Entry("b", SystemExit(1)),
        Entry("c", Ours),
        Entry("d", 3),
        Entry("e", [Mish]),
        Entry("f", Mish.rule()),
    ]

    def entry_points(*, group: str) -> list[Entry]:
        asked.append(group)
        return entries

    monkeypatch.setattr(own_rules.metadata, "entry_points", entry_points)
    report, _ = fused(MISH, tmp_path)
    assert asked == ["onnxgen.patterns"]
    assert statuses(report) == {"Mish": ["fused"]}
    assert report.own_rules == {"Mish": "the package pkg-e"}
    assert [warning.split(" (")[0] for warning in report.warnings] == [
        f"the rules of the package pkg-{name}" for name in "abcdf"
    ]
    assert "ImportError: no module" in report.warnings[0]
    report, _ = fused(MISH, tmp_path, Mish)
    assert report.own_rules == {"Mish": "the rules given"}, "what is asked for comes first"


def test_an_entry_point_of_a_real_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder on the path with a module and its metadata, as an installer leaves them."""
    module = _file_of_mish(tmp_path)
    module.rename(tmp_path / "shelf_of_rules.py")
    info = tmp_path / "shelf-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shelf\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[onnxgen.patterns]\nshelf = shelf_of_rules\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "shelf" in {entry.name for entry in metadata.entry_points(group="onnxgen.patterns")}
    own = find_rules([], [])
    assert (own.codes, own.warnings) == (["Mish"], [])
    assert own.rules[0].origin.name == "the package shelf"
