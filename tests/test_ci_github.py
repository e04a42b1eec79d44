"""What GitHub Actions is told: annotations on stderr, a section of the run's summary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from onnxgen import testing
from onnxgen.cli import main
from onnxgen.report import github, markdown
from onnxgen.report.values import Case, Decline, Outcome, Proof, Report, Site


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The summary's file, as on a runner that has checked out `tmp_path`."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    return tmp_path / "summary.md"


def unescaped(text: str) -> str:
    """As the runner reads a property."""
    for code, letter in (("%3A", ":"), ("%2C", ","), ("%0D", "\r"), ("%0A", "\n"), ("%25", "%")):
        text = text.replace(code, letter)
    return text


@pytest.mark.parametrize("text", ["50% done", "a\r\nb", "::error::x", "a,b=c:d", "%0A", "é →"])
def test_a_command_is_one_line_that_says_the_text(text: str) -> None:
    line = github.command("error", text, title=text, file="")
    assert "\n" not in line
    assert "\r" not in line
    head, _, message = line.removeprefix("::error ").partition("::")
    assert ":" not in head
    assert "," not in head
    assert unescaped(head.removeprefix("title=")) == text
    assert unescaped(message) == text
    assert line.endswith(message)


def kept(kind: str, code: str, scope: str = "layers.0") -> Site:
    decline = Decline("ATT001", code, "nothing multiplies\nit | `<b>`", ("n",))
    return Site(kind, "ATT001", "n", scope, "kept", decline)


def test_what_was_kept_is_said_once_a_reason_and_not_without_end(tmp_path: Path) -> None:
    sites = [kept("attention", f"reason-{number % 8}") for number in range(80)]
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "m.onnx"
    report = Report(str(path), "f.onnx", "onnx", sites=sites, warnings=["look"])
    lines = list(github.annotated(report, str(tmp_path)))
    assert [line.split("::")[1].partition(" ")[0] for line in lines] == ["warning"] * 6 + ["notice"]
    assert all(",file=sub/m.onnx::" in line for line in lines)
    assert "10 attention kept: ATT001 reason-0: nothing multiplies\\nit" in lines[0]
    assert "[layers.0 and 9 more]" in lines[0]
    assert "and 4 more; the report has all" in lines[5]
    assert all("file=" not in line for line in github.annotated(report, str(tmp_path / "other")))


def test_a_run_is_annotated_and_summed_up(tmp_path: Path, summary: Path) -> None:
    model = testing.write_demo_model(tmp_path)
    summary.write_text("before\n")
    result = run("fuse", model, "--verify", "quick", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["exit_code"] == 0  # nothing else on stdout
    assert result.stderr.startswith("::notice title=onnxgen,file=demo.onnx::")
    assert "fused. Proven by" in result.stderr
    text = summary.read_text()
    assert text.startswith("before\n<!-- report of onnxgen -->\n### ✅ onnxgen fuse: demo.onnx")
    assert "| ✅ Attention |" in text


def test_failures_are_errors(tmp_path: Path, summary: Path) -> None:
    model = testing.write_demo_model(tmp_path)
    result = run("fuse", model, "--expect", "attention=99", "--check")
    assert result.exit_code == 5
    (sentence,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
    sentence = sentence.removeprefix("Error: ")
    assert github.command("error", sentence, title="onnxgen") in result.stderr.splitlines()
    assert "**" in summary.read_text()
    for words, code in ((("fuse", tmp_path / "gone.onnx"), 4), (("fuse", model, "--opset"), 2)):
        result = run(*words)
        assert result.exit_code == code
        assert any(
            line.startswith("::error title=onnxgen::") for line in result.stderr.splitlines()
        )


def test_each_of_several_is_told(tmp_path: Path, summary: Path) -> None:
    model = testing.write_demo_model(tmp_path)
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"nonsense")
    result = run("fuse", model, bad, "--verify", "quick")
    assert result.exit_code == 4
    assert "::notice title=onnxgen,file=demo.onnx::" in result.stderr
    assert result.stderr.count("::error title=onnxgen::") == 1
    assert summary.read_text().count(" onnxgen fuse: ") == 2


def test_a_comparison_is_told_too(tmp_path: Path, summary: Path) -> None:
    model = testing.write_demo_model(tmp_path)
    result = run("verify", model, model, "--verify", "quick")
    assert result.exit_code == 0
    assert result.stderr.startswith("::notice title=onnxgen verify::Proven by")
    assert " onnxgen verify: demo.onnx — proven" in summary.read_text()


def test_a_summary_that_cannot_be_written_is_a_warning(
    tmp_path: Path, summary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "gone" / "s.md"))
    model = testing.write_demo_model(tmp_path)
    result = run("fuse", model, "--check", "--no-verify")
    assert result.exit_code == 0
    assert "::warning title=onnxgen::" in result.stderr
    assert "s.md cannot be written: No such file" in result.stderr


def test_elsewhere_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "false")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "s.md"))
    assert "::" not in run("fuse", tmp_path / "gone.onnx").stderr
    assert not (tmp_path / "s.md").exists()


def test_names_begin_no_line_of_what_is_printed() -> None:
    """A line that begins with :: would be a command, whatever program prints it."""
    from onnxgen.report import details, text

    hostile = "x\n::error::gotcha"
    fused = Site("attention", "ATT001", hostile, hostile, "fused", details={"branch": hostile})
    decline = Decline("ATT001", "c", hostile, (hostile,))
    other = Site("rotary", "ROT001", hostile, hostile, "kept", decline)
    case = Case(hostile, 1, 4, 0, "none", 2e-6, hostile)
    skipped = Case(hostile, 1, 4, 0, "none", skipped=hostile)
    proof = Proof("proven", 1e-4, [case, skipped], note=hostile, not_run=[hostile])
    report = Report(
        *(hostile, "o.onnx", "onnx"),
        sites=[fused, other],
        lowered=[fused, other],
        contract=hostile,
        beside=[hostile],
        warnings=[hostile],
        proof=proof,
    )
    console = text.console()
    with console.capture() as captured:
        console.print(text.render(report))
        console.print(details.render_details(report))
    printed = captured.get()
    assert "gotcha" in printed
    assert not any(line.lstrip().startswith("::") for line in printed.splitlines())
    shown = markdown.render(Outcome("fuse", 1, hostile, report))
    assert "\n::error" not in shown
    assert all(line.count("\n") == 0 for line in github.annotated(report))


def test_a_difference_is_said() -> None:
    case = Case("prefill", 1, 4, 0, "none", 2e-6)
    report = Report("m.onnx", "o.onnx", "onnx", proof=Proof("proven", 1e-4, [case]))
    (line,) = github.annotated(report)
    assert line.endswith("nothing fused. Proven by 1 cases, largest difference 2.0e-06")
