"""Users' rules for tests, and fuse with them."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import onnx
from click.testing import CliRunner, Result
from onnxscript.rewriter import RewriteRuleClassBase

from onnxgen import pipeline
from onnxgen.analysis.facts import Facts
from onnxgen.cli import main
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rule import Declined, Rewrite, Rule
from onnxgen.pipeline import FuseOptions
from onnxgen.report.values import Report
from tests.graphs import assert_same_numbers, parse

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


class Doubled(Rule):
    """A rule of our own kind."""

    code, kind, anchors = "DBL1", "doubled", frozenset({"Mul"})

    def rewrite(self, facts: Facts, builder: Builder, node: Any) -> Rewrite | None:
        x, factor = node.inputs
        if factor.const_value is None:
            raise Declined(self, "computed", "the factor is computed", node)
        y = builder.op("Mul", [factor, x])
        return Rewrite(y.producer(), ((node.outputs[0], y),))


def file_of_mish(folder: Path, rest: str = "") -> Path:
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


def file_of_common(folder: Path) -> Path:
    return written(
        folder,
        """
        from onnxscript.rewriter.rules import common
        offered = [getattr(common, name) for name in common.__all__]
        rules = [each() if callable(each) else each for each in offered]
        """,
    )
