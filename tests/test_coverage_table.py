"""README's coverage table: true for a few exports, and notices what gets worse."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("coverage_table.py")
QUICK = ("llama/dynamo20", "qwen3/torchscript", "mistral/dynamo23")


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("coverage_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", QUICK)
def test_readme_is_true(script: Any, name: str) -> None:
    [entry] = script.chosen("all", [name])
    assert script.check([script.measure(entry)], script.README.read_text("utf-8")) == []


def test_every_form_of_the_complete_models_is_in_the_readme_and_fused(script: Any) -> None:
    rows = script.read_table(script.README.read_text("utf-8"))
    entries = script.chosen(",".join(script.COMPLETE))
    assert {entry.name for entry in entries} <= set(rows)
    for row in rows.values():
        for column in script.COLUMNS:
            found, fused = script._counts(row, column)
            assert found == fused, row
            assert fused or "already" in row.sites[column], row
        assert script._proven(row), row


def row(script: Any, **changes: Any) -> Any:
    sites = {"attention": "2/2", "RMS norm": "5/5", "rotary": "(4 already)"}
    whole = script.Row("llama", "dynamo20", sites, "1,212 → 97", "18", "3.2e-06")
    return dataclasses.replace(whole, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"nodes": "1,212 → 99", "difference": "9.9e-06"}, []),
        ({"nodes": "1,212 → 100"}, ["nodes: 1,212 → 100, before 1,212 → 97"]),
        ({"difference": "differs"}, ["differs, was proven before"]),
        ({"cases": "17"}, ["cases: 17 run, 18 before"]),
        (
            {"sites": {"attention": "2/1", "RMS norm": "5/5", "rotary": "4/4"}},
            ["attention: 1 fused, 2 before", "attention: 1 not fused, 0 before"],
        ),
        (
            {"sites": {"attention": "2/2", "RMS norm": "6/5", "rotary": "(4 already)"}},
            ["RMS norm: 1 not fused, 0 before"],
        ),
    ],
)
def test_worse(script: Any, changes: dict[str, Any], said: list[str]) -> None:
    assert list(script.worse(row(script, **changes), row(script))) == said


def test_written_table_is_read_back(script: Any) -> None:
    readme = f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n"
    text = script.with_table(readme, [row(script)])
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert script.read_table(text) == {"llama/dynamo20": row(script)}
    assert script.with_table(text, [row(script)]) == text


def test_a_new_form_must_be_written_to_the_readme(script: Any) -> None:
    readme = script.with_table(f"{script.BEGIN}{script.END}", [])
    [said] = script.check([script.Result(row(script), ())], readme)
    assert "--write" in said
