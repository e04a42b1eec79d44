"""`-`: models through pipes."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from onnxgen import testing
from onnxgen.cli import main
from tests.large_decoder import Sizes, write_decoder

QUICK = ("--verify", "quick")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    model = testing.write_demo_model(folder)
    assert CliRunner().invoke(main, ["fuse", str(model), *QUICK]).exit_code == 0
    return model


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go, to see that none stays."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def run(*words: object, comes: bytes = b"") -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], input=comes)


@pytest.mark.parametrize("words", [("-", "-o", "-"), ("-",)])
def test_a_model_comes_and_goes(demo: Path, scratch: Path, words: tuple[str, ...]) -> None:
    result = run("fuse", *words, *QUICK, comes=demo.read_bytes())
    assert result.exit_code == 0, result.stderr
    assert result.stdout_bytes == demo.with_name("demo.fused.onnx").read_bytes()
    assert "Proven" in result.stderr
    assert "Written to -, " in result.stderr
    assert str(scratch) not in result.stderr
    assert list(scratch.iterdir()) == []


def test_one_of_them_alone(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.onnx"
    assert run("fuse", "-", "-o", out, *QUICK, comes=demo.read_bytes()).exit_code == 0
    gone = run("fuse", demo, "-o", "-", *QUICK)
    assert gone.stdout_bytes == out.read_bytes()
    assert run("fuse", "-", "--out-dir", tmp_path, *QUICK, comes=demo.read_bytes()).exit_code == 0
    assert (tmp_path / "stdin.fused.onnx").exists()


def test_either_model_of_a_comparison(demo: Path) -> None:
    fused = demo.with_name("demo.fused.onnx")
    assert run("verify", "-", fused, *QUICK, comes=demo.read_bytes()).exit_code == 0
    assert run("verify", demo, "-", *QUICK, comes=fused.read_bytes()).exit_code == 0
    result = run("verify", "-", "-")
    assert (result.exit_code, "- is one model" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("comes", "said"), [(b"", "Error: stdin is empty\n"), (b"nonsense", "Error: stdin is no ONNX")]
)
def test_what_comes_is_called_stdin(comes: bytes, said: str, scratch: Path) -> None:
    result = run("fuse", "-", comes=comes)
    assert (result.exit_code, result.stdout_bytes) == (4, b"")
    assert result.stderr.startswith(said)
    assert list(scratch.iterdir()) == []


def test_one_that_is_to_be_paged(demo: Path, tmp_path: Path) -> None:
    words = ("to-paged", "-", "-o", tmp_path / "p", *QUICK)
    result = run(*words, comes=demo.read_bytes())
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("-: target paged")
    assert (tmp_path / "p" / "model.onnx").exists()
    assert run(*words, comes=b"nonsense").stderr.startswith("Error: stdin is no ONNX model")


def test_an_expectation_that_is_not_met_sends_nothing(demo: Path) -> None:
    result = run("fuse", "-", *QUICK, "--expect", "moe=1", comes=demo.read_bytes())
    assert (result.exit_code, result.stdout_bytes) == (5, b"")


def test_data_files_cannot_come_along(tmp_path: Path) -> None:
    model = write_decoder(tmp_path, Sizes(layers=1), "sparse")
    came = run("fuse", "-", comes=model.read_bytes())
    assert came.exit_code == 4
    assert came.stderr.startswith("Error: stdin names the data file model.data, which cannot come")
    gone = run("fuse", model, "-o", "-")
    assert (gone.exit_code, gone.stdout_bytes) == (4, b"")
    assert "has the data file model.data" in gone.stderr
    assert "give -o FILE" in gone.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-", "-o", "-", "--json"), "--json and the model both go to stdout"),
        (("-", "--genai-config"), "a stream has no folder"),
        (("-", "m.onnx"), "cannot be among several"),
    ],
)
def test_what_does_not_fit(words: tuple[str, ...], said: str) -> None:
    result = run("fuse", *words)
    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


def test_a_terminal_is_no_pipe(demo: Path) -> None:
    parent, child = pty.openpty()
    try:
        for words, said in (((str(demo), "-o", "-"), b"stdout"), (("-", "-o", "x"), b"stdin")):
            result = subprocess.run(
                [sys.executable, "-m", "onnxgen", "fuse", *words],
                stdin=child,
                stdout=child,
                stderr=subprocess.PIPE,
                check=False,
            )
            assert result.returncode == 2
            assert said + b", which is a terminal" in result.stderr
    finally:
        os.close(parent)
        os.close(child)
