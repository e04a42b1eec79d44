"""`onnxgen new-pattern`: what it writes works as it is, in an empty folder."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from onnxgen.cli import main
from onnxgen.rule_writing import assert_kept, assert_rewritten, seen
from tests.graphs import parse

ROOT = Path(__file__).resolve().parent.parent
BOUNDED = (
    "(float[b,s,40] x) => (float[b,s,40] y)"
    "{ e = Exp(x)  m = Max(e, -1.5)  n = Min(m, 2.0)  y = Neg(n) }"
)


def call(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    result = call(tmp_path, "onnxgen", "new-pattern", "my_bounds")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "Written my_bounds.py",
        "Written test_my_bounds.py",
        "Next: pytest test_my_bounds.py; then onnxgen fuse MODEL --rules my_bounds.py",
    ]
    return tmp_path


def test_the_scaffolds_own_test_passes(folder: Path) -> None:
    result = call(folder, "pytest", "-q", "-p", "no:cacheprovider", "test_my_bounds.py")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 passed" in result.stdout


@pytest.mark.parametrize(
    ("old", "new", "failing"),
    [
        ("op.Clip(x, lo, hi)", "op.Clip(x, lo)", "differs by"),
        ("op.Clip(x, lo, hi)", "op.Clip(x, lo, hi, _domain='x.y')", "ONNX Runtime refuses"),
        ("len(bound.const_value.shape) > 0", "False", "fused or undone"),
        ("op.Min(op.Max(x, lo), hi)", "op.Min(op.Abs(x), op.Max(lo, hi))", "no rule fits"),
    ],
)
def test_the_scaffolds_test_fails_where_the_rule_is_wrong(
    old: str, new: str, failing: str, folder: Path
) -> None:
    rule = folder / "my_bounds.py"
    assert old in rule.read_text()
    rule.write_text(rule.read_text().replace(old, new))
    said = []
    for name, test in runpy.run_path(str(folder / "test_my_bounds.py")).items():
        if name.startswith("test_"):
            try:
                test()
            except AssertionError as error:
                said.append(str(error))
    assert any(failing in each for each in said), said


def test_fuse_takes_the_scaffold(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(parse(BOUNDED).SerializeToString())
    result = call(folder, "onnxgen", "fuse", "model.onnx", "--rules", "my_bounds.py")
    assert result.returncode == 0, result.stderr
    assert "my_bounds       1       1      0" in result.stdout
    fused = onnx.load(folder / "model.fused.onnx")
    assert [node.op_type for node in fused.graph.node] == ["Exp", "Clip", "Neg"]


def test_nothing_is_replaced_and_names_are_checked(tmp_path: Path) -> None:
    run = CliRunner()
    there = tmp_path / "test_mine.py"
    there.write_text("mine")
    result = run.invoke(main, ["new-pattern", "mine", "-o", str(tmp_path)])
    assert result.exit_code == 2
    assert "test_mine.py is there already" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["test_mine.py"]
    for name in ("my-bounds", "class", "../up", "1st", "größe", "a b"):
        result = run.invoke(main, ["new-pattern", name, "-o", str(tmp_path)])
        assert result.exit_code == 2
        assert "is no name of a Python module" in result.stderr
    new = tmp_path / "a" / "folder"
    assert run.invoke(main, ["new-pattern", "mine", "-o", str(new)]).exit_code == 0
    assert sorted(path.name for path in new.iterdir()) == ["mine.py", "test_mine.py"]


def test_the_page_about_patterns_is_true(tmp_path: Path) -> None:
    """The rule and the graphs in docs/patterns.md."""
    page = (ROOT / "docs" / "patterns.md").read_text()
    blocks = [block.split("```", 1)[0] for block in page.split("```python\n")[1:]]
    (rule,) = [block for block in blocks if "class " in block]
    (test,) = [block for block in blocks if "def test" in block]
    (tmp_path / "mish.py").write_text(rule)
    (tmp_path / "test_mish.py").write_text(test)
    result = call(tmp_path, "pytest", "-q", "-p", "no:cacheprovider", "test_mish.py")
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_rules_see(tmp_path: Path) -> None:
    """Functions inlined, opset 24, constants as initializers; or the canonical form."""
    model = parse(
        '<ir_version: 10, opset_import: ["" : 17, "f" : 1]> g '
        "(float[b,s,40] x) => (float[b,s,40] y) <float[40] w>"
        "{ h = f.Half(x)  q = Mul(h, h)  m = ReduceMean<axes = [-1], keepdims = 1>(q)"
        "  e = Add(m, 0.003)  r = Sqrt(e)  n = Div(h, r)  y = Mul(n, w) }"
        '<domain: "f", opset_import: ["" : 17]> Half (a) => (b)'
        "{ c = Constant<value_float = 0.5>()  b = Mul(a, c) }"
    )
    lines = seen(model).splitlines()
    assert lines[0] == "input x:f32[b,s,40]"
    assert lines[-1] == "output y"
    assert "Half" not in seen(model)
    assert any("= Mul(x, " in line and "=0.5)" in line for line in lines)
    assert any("ReduceMean(q, " in line and "=[-1])" in line for line in lines)
    assert "RMSNormalization" not in seen(model)
    assert "RMSNormalization" in seen(model, "after")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert call(tmp_path, "onnxgen.rule_writing", "model.onnx").stdout == seen(path) + "\n"
    after = call(tmp_path, "onnxgen.rule_writing", "model.onnx", "after").stdout
    assert "RMSNormalization" in after
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_the_helpers_say_what_is_not_so(tmp_path: Path) -> None:
    rule = tmp_path / "mine.py"
    CliRunner().invoke(main, ["new-pattern", "mine", "-o", str(tmp_path)])
    after = BOUNDED.replace("m = Max(e, -1.5)  n = Min(m, 2.0)", "n = Clip(e, -1.5, 2.0)")
    assert_rewritten(BOUNDED, after, rule)
    with pytest.raises(AssertionError, match=r"Clip"):
        assert_rewritten(BOUNDED, BOUNDED, rule)
    with pytest.raises(AssertionError, match=r"no rule fits: mine at .*expected Max, got Abs"):
        assert_rewritten(BOUNDED.replace("Max(e, -1.5)", "Abs(e)"), after, rule)
    with pytest.raises(AssertionError, match="fused or undone: mine"):
        assert_kept(BOUNDED, rule, reason="")
    with pytest.raises(AssertionError, match="'no such words' is not said"):
        assert_kept(BOUNDED.replace("Max(e, -1.5)", "Abs(e)"), rule, reason="no such words")
