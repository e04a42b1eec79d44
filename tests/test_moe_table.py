"""The table of mixtures of experts is whole, some of its rows are measured, what gets worse is said."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from onnx import numpy_helper

from onnxgen.testing import corpus, load_corpus_model
from tests import moe_table

KNOWN = moe_table.read(moe_table.TABLE.read_text("utf-8"))
# Routers inside, outside and kept; rows sorted, gathered, looped over, and all experts at once.
MEASURED = (
    "deepseek_v3/transformers",
    "llama4_nope/dynamo20",
    "mixtral/torchscript-looped",
    "phimoe/dynamo20-batched",
)


@pytest.mark.parametrize("name", MEASURED)
def test_rows_say_what_comes_out(name: str) -> None:
    (entry,) = corpus(name)
    assert list(moe_table.worse(moe_table.measure(entry), KNOWN.get(name))) == []


def test_the_table_is_whole() -> None:
    assert set(KNOWN) == {entry.name for entry in moe_table.chosen()}
    assert moe_table.as_text(KNOWN.values()) == moe_table.TABLE.read_text("utf-8")


def test_everything_in_the_table_is_proven() -> None:
    for row in KNOWN.values():
        assert list(moe_table.worse(row, row)) == []


ROW = moe_table.Row(
    *("mixtral", "dynamo20", "2/2", "2 of 5", "swiglu", "inside", "2.7e-06", "2.4e-06"),
    *("261 → 98 / 73", "1.3e-06 / 1.4e-06", "5 tokens leave 1 of 5: 1.8e-06 / 1.9e-06"),
    "0 1: 2.5e-06 / 2.2e-06",
)


@pytest.mark.parametrize(
    ("column", "text", "said"),
    [
        ("onnx", "9.0e-06", []),
        ("fused", "1/2", ["1 of 2 fused, 2 before"]),
        ("router", "outside", ["router: outside, was inside"]),
        ("ort", "unproven", ["ort: unproven, was 2.4e-06"]),
        ("one_token", "1.3e-06 / 2.0e-01", ["one_token: 1.3e-06 / 2.0e-01, was 1.3e-06 / 1.4e-06"]),
        (
            "ties",
            "3 4: 2.5e-06 / 2.2e-06",
            ["ties: 3 4: 2.5e-06 / 2.2e-06, was 0 1: 2.5e-06 / 2.2e-06"],
        ),
        ("empty", "none is left empty", [f"empty: none is left empty, was {ROW.empty}"]),
    ],
)
def test_worse(column: str, text: str, said: list[str]) -> None:
    changed = dataclasses.replace(ROW, **{column: text})
    assert list(moe_table.worse(changed, ROW)) == said


def test_what_is_not_in_the_table_is_to_be_written() -> None:
    (said,) = moe_table.worse(ROW, None)
    assert "--write" in said


@pytest.mark.parametrize("name", ["mixtral/dynamo20-batched", "glm4_moe/torchscript-batched"])
def test_tied_routers_say_the_same_of_every_expert(name: str) -> None:
    model = load_corpus_model(name)
    found = moe_table.routers(model)
    tied = moe_table.tied(model, found)
    held = {each.name: numpy_helper.to_array(each) for each in tied.graph.initializer}
    before = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    assert found
    for router in found:
        assert not held[router.weight].any()
        assert before[router.weight].any()
        assert all(np.ptp(held[bias]) == 0 for bias in router.biases)
    changed = {n for n, array in held.items() if not np.array_equal(array, before[n])}
    assert changed == {n for each in found for n in (each.weight, *each.biases)}
