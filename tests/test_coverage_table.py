"""The coverage table is whole, its summary is true, and what gets worse is noticed.

That its cells are true is checked where the whole corpus is fused, in `tests.test_pipeline`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests import coverage_table as script

ROWS = script.read_table(script.TABLE.read_text("utf-8"))


def test_every_export_has_its_row() -> None:
    exports = {entry.name for entry in script.chosen()}
    assert {name.removesuffix(" onnx") for name in ROWS if name.endswith(" onnx")} == exports
    assert {row.target for row in ROWS.values()} <= set(script.TARGETS)


def test_readme_is_the_sum_of_the_table() -> None:
    readme = script.README.read_text("utf-8")
    assert script.with_short_table(readme, list(ROWS.values())) == readme


def row(**changes: Any) -> script.Row:
    own = {"attention": "2/2", "RMS norm": "5/5", "rotary": "(4 already)"}
    sites = {**dict.fromkeys(script.COLUMNS, "-"), **own}
    whole = script.Row(
        "llama", "dynamo20", "onnx", sites, "-", "1,212 → 97", "18", difference="3.2e-06"
    )
    return dataclasses.replace(whole, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"nodes": "1,212 → 99", "difference": "9.9e-06"}, []),
        ({"nodes": "1,212 → 100"}, ["nodes: 1,212 → 100, before 1,212 → 97"]),
        ({"difference": "differs"}, ["differs, was proven before"]),
        ({"cases": "17"}, ["cases: 17 run, 18 before"]),
        ({"left": "1 attention, 2 cache"}, ["left over: 1 attention, 2 cache, before -"]),
        (
            {"sites": {**row().sites, "attention": "2/1"}},
            ["attention: 1 fused, 2 before", "attention: 1 not fused, 0 before"],
        ),
        (
            {"sites": {**row().sites, "RMS norm": "6/5"}},
            ["RMS norm: 1 not fused, 0 before"],
        ),
    ],
)
def test_worse(changes: dict[str, Any], said: list[str]) -> None:
    assert list(script.worse(row(**changes), row())) == said


def test_what_is_not_in_the_table_is_to_be_written() -> None:
    [said] = script.worse(row(), None)
    assert "--write" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"left": "4 cache"}, ["left over: 4 cache"]),
        ({"sites": {**row().sites, "rotary": "4/2"}}, ["rotary: 4 found, 2 fused"]),
        ({"difference": "unverifiable"}, ["unverifiable"]),
    ],
)
def test_incomplete(changes: dict[str, Any], said: list[str]) -> None:
    assert list(script.incomplete(row(**changes))) == said


def test_a_written_table_is_read_back() -> None:
    rows = [row(), row(form="torchscript", left="1 norm"), row(target="ort")]
    text = script.written_table(rows)
    assert script.read_table(text) == {each.name: each for each in rows}
    with pytest.raises(ValueError, match="not a row"):
        script.read_table("| llama | dynamo20 |")


def test_the_short_table_adds_up() -> None:
    rows = [row(), row(form="torchscript", left="1 norm", nodes="600 → 100", difference="4.0e-03")]
    short = script.short_table(rows)
    wanted = "| llama | 2 | 4/4 | 10/10 | - | (already) | - | 1 | 1,812 → 197 | 4.0e-03 |"
    assert short.splitlines()[-1] == wanted
    assert "differs" in script.short_table([*rows, row(form="x", difference="differs")])
    readme = f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n"
    text = script.with_short_table(readme, rows)
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert script.with_short_table(text, rows) == text
