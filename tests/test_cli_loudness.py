"""How much is printed: -q, -v, and no screenful on a model of a hundred layers."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from onnxgen import testing
from onnxgen.cli import main
from onnxgen.report import text
from onnxgen.report.values import Obstacle, Paging, Report
from onnxgen.words import near, time_in_words
from tests.large_decoder import Sizes, write_decoder

SCREEN = 24  # lines of a terminal's window


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.write_demo_model(tmp_path_factory.mktemp("demo"))


def test_quiet_prints_errors_only(demo: Path, tmp_path: Path) -> None:
    result = run("fuse", demo, "-o", tmp_path / "o.onnx", "--verify", "quick", "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert run("verify", demo, tmp_path / "o.onnx", "--verify", "quick", "-q").output == ""
    assert run("to-paged", demo, "--check", "-q").output == ""
    result = run("fuse", tmp_path / "gone.onnx", "-q")
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr.startswith("Error: ")
    assert run("fuse", demo, "--check", "--no-verify", "-q", "--json").stdout.startswith("{")


def test_verbose_prints_every_site_and_case(demo: Path, tmp_path: Path) -> None:
    words = ("fuse", demo, "-o", tmp_path / "o.onnx", "--verify", "quick")
    plain, loud = run(*words).stdout.splitlines(), run(*words, "-v").stdout.splitlines()
    assert len(loud) > len(plain)
    sites = [line for line in loud if line.startswith("  fused attention ATT001 ")]
    assert sites
    assert all("heads " in line and " nodes)" in line for line in sites)
    assert any("Cases (" in line for line in loud)
    assert sum(", past " in line and ", output " in line for line in loud) > 3


def test_both_exclude_one_another(demo: Path) -> None:
    for words in (("-v", "-q"), ("-q", "-v")):
        result = run("fuse", demo, *words)
        assert (result.exit_code, "exclude one another" in result.stderr) == (2, True)
    assert run("fuse", demo, "-q", "-q", "--check", "--no-verify").exit_code == 0


def test_a_hundred_layers_fit_on_a_screen(tmp_path: Path) -> None:
    model = write_decoder(tmp_path, Sizes(layers=100, hidden=24, inner=32), "sparse")
    result = run("fuse", model, "--check", "--no-verify", "-v")
    assert result.exit_code == 0, result.stderr
    plain, loud = result.stdout.split("Sites (501):\n")  # what -v adds comes last
    assert "100" in plain
    assert len(plain.splitlines()) <= SCREEN
    assert len(loud.splitlines()) == 501


def test_a_hundred_reasons_fit_on_a_screen() -> None:
    paging = Paging(16, obstacles=[Obstacle("PAG008", f"{n} mixes", f"n{n}") for n in range(100)])
    warnings = [f"node {number} is odd" for number in range(100)]
    console = text.console()
    with console.capture() as captured:
        console.print(text.render(Report("m", "", "paged", paging=paging, warnings=warnings)))
    printed = captured.get()
    assert len(printed.splitlines()) <= SCREEN
    assert "and 92 other reasons (--json lists all)" in printed
    assert "and 92 other warnings (--json lists all)" in printed


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.00 s"),
        (0.42, "0.42 s"),
        (0.996, "1.0 s"),
        (12.34, "12.3 s"),
        (59.96, "1 min 00 s"),
        (192, "3 min 12 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_times_for_a_person(seconds: float, said: str) -> None:
    assert time_in_words(seconds) == said


def test_a_mistyped_word_is_near_one() -> None:
    assert near("atention", ["rotary", "attention"]) == "; did you mean attention?"
    assert near("toaster", ["rotary", "attention"]) == ""
