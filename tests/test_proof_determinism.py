"""The same bytes from every process; see `tests.proof.determinism`."""

from __future__ import annotations

from tests.proof import determinism


def test_the_same_bytes_in_every_process() -> None:
    table = determinism.measure(long=False, jobs=1, seed=0)
    assert not table.failures
    assert all(exports == written for _, exports, written, *_ in table.rows), table
