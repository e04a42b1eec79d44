"""What a person at a terminal expects of every command."""

from __future__ import annotations

import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from onnxgen.cli import main


@pytest.mark.parametrize("name", main.commands)
def test_help_has_an_example(name: str) -> None:
    text = CliRunner().invoke(main, [name, "--help"]).stdout
    assert "Example:" in text
    assert f"  onnxgen {name}" in text.partition("Example:")[2]


@pytest.mark.parametrize("name", main.commands)
def test_every_option_says_what_it_does(name: str) -> None:
    options = [each for each in main.commands[name].params if isinstance(each, click.Option)]
    assert all(option.help for option in options)


@pytest.mark.parametrize(
    ("words", "hint"),
    [(["fuze"], "fuse"), (["fuse", "m.onnx", "--tarfet", "ort"], "--target")],
)
def test_a_typo_gets_a_hint(words: list[str], hint: str) -> None:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert hint in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_how_to_complete(shell: str) -> None:
    environment = {**os.environ, "_ONNXGEN_COMPLETE": f"{shell}_source"}
    script = "from onnxgen.cli import main; main(prog_name='onnxgen')"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    if shell == "bash" and "Bash version" in done.stderr:
        pytest.skip("Bash is too old")
    assert "_ONNXGEN_COMPLETE" in done.stdout


def test_explain_is_plain_in_a_pipe() -> None:
    result = CliRunner().invoke(main, ["rules", "ATT001"])
    assert "\x1b" not in result.stdout
