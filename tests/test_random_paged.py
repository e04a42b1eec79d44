"""Drawn attention models with caches: each is paged and proven, or refused with a code.

    pytest tests/test_random_paged.py                       # as in CI
    ONNXGEN_EXAMPLES=20000 ONNXGEN_SEED=1 pytest tests/test_random_paged.py -n 2

The models are those of `tests.random_spec`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from onnxgen import pipeline_paged
from onnxgen.errors import RefusedError
from onnxgen.pipeline_paged import PageOptions, to_paged
from onnxgen.report.values import Report
from tests.random_models import build
from tests.random_runs import Shared, check_drawn
from tests.random_spec import Spec, not_claimed

SHARDS = 4
EXAMPLES = 240
PAGED = ("causal", "window", "chunked", "alibi")


@pytest.fixture(autouse=True)
def one_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_paged, "Runtime", Shared)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_what_is_drawn_is_paged_or_refused_and_never_differs(shard: int) -> None:
    check_drawn(check, shard, SHARDS, EXAMPLES)


def check(spec: Spec) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(build(spec).SerializeToString())
        options = PageOptions(output=Path(folder) / "out")
        try:
            report: Report | None = to_paged(path, options, lambda message: None)
        except RefusedError as refused:
            report = refused.report
    assert report is not None
    assert report.paging is not None
    if report.paging.obstacles:
        assert all(each.code and each.reason for each in report.paging.obstacles)
        assert refusable(spec), report.paging.obstacles
        return
    assert report.proof is not None
    assert report.proof.status == "proven"


def refusable(spec: Spec) -> bool:
    """Whether a model may be refused: it has no cache, or what no block table can say."""
    blurred = spec.mask == "alibi" and spec.masking == "add-1e4"
    return (
        spec.cache == "none"
        or spec.mask not in PAGED
        or spec.second == "cross"
        or blurred
        or bool(not_claimed(spec))
    )
