"""The table of backend contexts is whole, some of its rows come out again, and what gets worse is seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from onnxgen import testing
from tests import context_trials as trials
from tests import contexts_table as script
from tests.contexts_table import Row

ROWS = script.read(script.TABLE.read_text("utf-8"))
SOME = ("llama/dynamo20", "whisper_decoder/dynamo20", "mixtral/torchscript-batched")
NOTHING = "original 0"


def test_every_export_has_its_row() -> None:
    assert set(ROWS) == {entry.name for entry in testing.corpus()}


@pytest.fixture(scope="module")
def missing() -> Iterator[script.Missing]:
    pytest.importorskip("openvino")
    with trials.without_openvino() as found:
        yield found


@pytest.mark.parametrize("name", SOME)
def test_a_row_comes_out_again(name: str, missing: script.Missing) -> None:
    [entry] = testing.corpus(name)
    assert script.worse(script.measure(entry, missing), ROWS[name]) == []


@pytest.mark.parametrize("row", [row for row in ROWS.values() if row.damaged != "-"])
def test_wherever_a_blob_cannot_be_used_the_original_answers(row: Row) -> None:
    cells = [getattr(row, name) for name in script.REASONS]
    assert all(cell.startswith("original ") and "(" not in cell for cell in cells)
    assert all(float(cell.split()[1]) < 1e-4 for cell in cells)


def row(**changes: Any) -> Row:
    said = dict.fromkeys(script.REASONS, NOTHING)
    own = {"plain": "0", "openvino": "openvino:CPU 2.4e-06", "attention": "2: 1.9e-06, 1.3e-06"}
    whole = Row("llama", "dynamo20", size="1,008 + 83 + 87", believed="refused, original 0", **own)
    return dataclasses.replace(whole, **{**said, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"plain": "1.0e-07", "openvino": "openvino:CPU 5.1e-06", "size": "1 + 2 + 3"}, []),
        ({"believed": "taken, differs 3.0e+00"}, []),
        ({"plain": "2.0e-02"}, ["plain: 2.0e-02, was 0"]),
        ({"openvino": "original 0"}, ["openvino: original 0, was openvino:CPU 2.4e-06"]),
        ({"damaged": "openvino:CPU 0"}, ["damaged: openvino:CPU 0, was original 0"]),
        ({"weight": "original inf"}, ["weight: original inf, was original 0"]),
        ({"attention": "1: 1.9e-06, 0"}, ["attention: 1: 1.9e-06, 0, was 2: 1.9e-06, 1.3e-06"]),
    ],
)
def test_worse(changes: dict[str, Any], said: list[str]) -> None:
    assert script.worse(row(**changes), row()) == said


def test_a_written_table_is_read_back() -> None:
    rows = [row(), row(form="other", believed="crash", size="-")]
    text = script.as_text(rows)
    assert script.read(text) == {each.name: each for each in rows}
    [said] = script.worse(row(form="new"), None)
    assert "write it" in said
