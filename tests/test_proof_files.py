"""Faults of files, each in the real command; see `tests.proof.files`."""

from __future__ import annotations

from tests.proof import files


def test_no_fault_of_a_file_costs_a_model() -> None:
    table = files.measure(long=False, jobs=1, seed=0)
    assert not table.failures
    assert len(table.rows) > 50
