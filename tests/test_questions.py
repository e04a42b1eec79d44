"""docs/questions.md: each question has a command that is there, and a test that is there."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from onnxgen.cli import main

ROOT = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "questions.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| question")
]


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:40] for row in ROWS])
def test_a_question_has_its_answer(row: list[str]) -> None:
    _, asked, command, test = row
    assert asked
    for said in re.findall(r"`onnxgen ([^`]+)`", command):
        name, *words = said.split()
        options = {
            option
            for param in main.commands[name].params
            if isinstance(param, click.Option)
            for option in param.opts
        }
        assert {word for word in words if word.startswith("-")} <= options
    file, _, function = test.strip("`").partition("::")
    text = (ROOT / "tests" / file).read_text()
    assert f"\ndef {function}(" in text


def test_every_issue_that_is_known_is_there() -> None:
    issues = re.findall(r"#(\d+)", " ".join(row[1] for row in ROWS))
    assert len(set(issues)) == 26
