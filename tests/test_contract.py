"""Every mask there is, at small lengths: a model written for ort fails, or answers rightly."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxgen import pipeline
from onnxgen.analysis.feeds import RunShape, make_feeds
from onnxgen.analysis.roles import Roles, find_roles
from onnxgen.model_io import read_model
from onnxgen.runtime import Runtime, RuntimeFailure
from onnxgen.testing import load_corpus_model

Array = np.ndarray[Any, Any]

# Past and new tokens of two rows; one row gets every past up to 4 and up to 3 new tokens.
TWO_ROWS = ((0, 1), (0, 2), (0, 3), (1, 1), (2, 1), (1, 2))


class Both:
    """An original and what was written for ort.

    Attributes:
        outcomes: how many runs were equal, and how many failed with which sentence.
        wrong: the masks, with their past, where the answers differ.
    """

    def __init__(self, folder: Path, name: str, padding: Any, runtime: Runtime) -> None:
        path, output = folder / "model.onnx", folder / "ort.onnx"
        path.write_bytes(load_corpus_model(name).SerializeToString())
        options = pipeline.FuseOptions(output=output, target="ort", padding=padding)
        report = pipeline.fuse(path, options, lambda message: None)
        assert {site.status for site in report.lowered} == {"fused"}
        self.runtime = runtime
        self.roles: Roles = find_roles(read_model(path))
        self.sessions = (runtime.load(path), runtime.load(output))
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[tuple[Any, int]] = []

    def feeds(self, mask: Array, past: int, *, counted: bool) -> dict[str, Array]:
        """Random tokens and caches; positions that count real tokens, or places."""
        batch, total = mask.shape
        rng = np.random.default_rng(0)
        feeds = make_feeds(self.roles, RunShape(batch, total - past, past), rng)
        places = np.broadcast_to(np.arange(total), mask.shape)
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0) if counted else places
        for each, values in (("mask", mask), ("positions", positions[:, past:])):
            for role in self.roles.named(each):
                feeds[role.name] = np.ascontiguousarray(values.astype(role.dtype.numpy()))
        return feeds

    def compare(self, mask: Array, past: int, *, counted: bool) -> None:
        feeds = self.feeds(mask, past, counted=counted)
        old = self.runtime.run(self.sessions[0], feeds)
        try:
            new = self.runtime.run(self.sessions[1], feeds)
        except RuntimeFailure as error:
            words = (
                "without padding",
                "behind a prompt",
                "count the tokens",
                "batch_size must be 1",
            )
            said = [each for each in words if each in str(error)]
            self.outcomes[said[0] if said else str(error)] += 1
            return
        self.outcomes["equal"] += 1
        real = mask.astype(bool)
        for name, a in old.items():
            # Rows of tokens [B,S,V], or caches [B,K,T,D]: both to what real tokens own.
            b = new[name]
            pair = a.ndim == 4
            a, b = ((x.transpose(0, 2, 1, 3) if pair else x) for x in (a, b))
            owned = real if pair else real[:, past:]
            if not np.allclose(a[owned], b[owned], atol=1e-3):
                self.wrong.append((mask.tolist(), past))


def masks() -> Iterator[tuple[Array, int]]:
    """Every mask of one row and, at fewer lengths, of two; with its past."""
    for past, new in itertools.product(range(5), range(1, 4)):
        for bits in itertools.product((0, 1), repeat=past + new):
            yield np.array([bits]), past
    for past, new in TWO_ROWS:
        for bits in itertools.product((0, 1), repeat=2 * (past + new)):
            yield np.array(bits).reshape(2, -1), past


@pytest.mark.parametrize(
    ("name", "padding"),
    [
        ("llama/torchscript", "right"),
        ("llama/torchscript", "none"),
        ("llama/torchscript", "any"),
        ("llama/transformers", "any"),  # positions are counted: the rotary embedding is inside
        ("mistral/dynamo20", "right"),  # with a window
    ],
)
def test_every_mask_fails_or_is_answered_rightly(name: str, padding: str, tmp_path: Path) -> None:
    with Runtime() as runtime:
        both = Both(tmp_path, name, padding, runtime)
        for mask, past in masks():
            for counted in (False, True):
                both.compare(mask, past, counted=counted)
    assert both.wrong == []
    # Where the padding is wrong that is what is said, whatever the positions are.
    sentence = {"right": "behind a prompt", "none": "without padding"}.get(padding)
    assert set(both.outcomes) == {"equal", "batch_size must be 1"} | ({sentence} - {None})
    assert both.outcomes["equal"] >= 40


@pytest.mark.parametrize("padding", ["any", "right", "none"])
def test_empty_runs_fail_with_a_sentence(padding: str, tmp_path: Path) -> None:
    """The operator divides by the number of rows: without a guard the process ends."""
    with Runtime() as runtime:
        both = Both(tmp_path, "llama/transformers", padding, runtime)
        full = both.feeds(np.ones((1, 7), np.int64), 4, counted=False)
        for cut in ("rows", "tokens"):
            feeds = {}
            for role in both.roles.inputs.values():
                lengths = {"B": 0, "T": 7} if cut == "rows" else {"S": 0, "T": 4}
                index = tuple(slice(lengths.get(letter)) for letter in role.axes)
                feeds[role.name] = full[role.name][index]
            with pytest.raises(RuntimeFailure, match="at least one row and one new token'"):
                runtime.run(both.sessions[1], feeds)
