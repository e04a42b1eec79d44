"""Files of rules and packages: found, refused in one sentence, never a traceback."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from onnxscript.rewriter import RewriteRule

from onnxgen import own_rules
from onnxgen.analysis.facts import Facts
from onnxgen.errors import FileError, UsageError
from onnxgen.own_rules import find_rules
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rule import Rewrite, Rule
from tests.graphs import parse
from tests.own_rules import (
    MISH,
    Doubled,
    Mish,
    file_of_mish,
    fused,
    run,
    statuses,
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
    module = file_of_mish(tmp_path)
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
