"""What killed runs leave is removed by the next; what other runs use is not."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir
import pytest

from onnxgen.errors import FileError
from onnxgen.model_io import read_model, staged
from onnxgen.report import files
from onnxgen.scratch import create, held, scratch_path, sweep
from tests.test_model_io import write_external


def left_by_a_killed_run(path: Path) -> Path:
    path.write_bytes(b"half")
    os.utime(path, (0, 0))
    return path


def write(model: ir.Model, source: Path, output: Path, *, commit: bool = True) -> None:
    with staged(model, output, source=source, force=False) as stage:
        if commit:
            stage.commit()


def test_the_next_run_on_an_output_removes_what_is_left(tmp_path: Path) -> None:
    source = write_external(tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    stale = [
        left_by_a_killed_run(scratch_path(folder, "out", suffix)) for suffix in (".onnx", ".data")
    ]
    report = left_by_a_killed_run(scratch_path(folder, "r.json"))
    kept = [
        left_by_a_killed_run(folder / name)
        for name in (".out.onnx", ".out.0123456789ab", ".other.0123456789ab.onnx", "out.data")
    ]
    write(read_model(source), source, folder / "out.onnx")
    assert not any(path.exists() for path in stale)
    assert report.exists()
    files.write_text(folder / "r.json", "{}")
    assert not report.exists()
    assert all(path.exists() for path in kept)


def test_what_a_run_still_writes_or_checks_is_kept(tmp_path: Path) -> None:
    writing, checked = (scratch_path(tmp_path, "out", ".onnx") for _ in range(2))
    fresh = scratch_path(tmp_path, "out", ".onnx")
    fresh.write_bytes(b"its lock comes in a moment")
    left_by_a_killed_run(checked)
    link = scratch_path(tmp_path, "out", ".onnx")
    link.symlink_to(checked)
    with create(writing, []), held([checked]):
        os.utime(writing, (0, 0))
        sweep(tmp_path, "out", ".onnx")
        assert all(path.exists() for path in (writing, checked, fresh, link))
    sweep(tmp_path, "out", ".onnx")
    assert (writing.exists(), checked.exists(), fresh.exists()) == (False, False, True)


@pytest.mark.parametrize("last", [True, False])
def test_a_run_that_fails_keeps_the_data_that_another_committed(tmp_path: Path, last: bool) -> None:
    """Two runs at once write one data file: its name is its content's."""
    source = write_external(tmp_path)
    output = tmp_path / "out" / "out.onnx"
    output.parent.mkdir()
    model = read_model(source)
    if last:
        with staged(model, output, source=source, force=False) as first:
            write(read_model(source), source, output, commit=False)
            first.commit()
    else:
        with staged(model, output, source=source, force=False):
            write(read_model(source), source, output)
    assert read_model(output).graph.initializers.keys() == model.graph.initializers.keys()
    assert len(list(output.parent.iterdir())) == 2


def test_data_that_was_removed_meanwhile_is_noticed(tmp_path: Path) -> None:
    source = write_external(tmp_path)
    output = tmp_path / "out" / "out.onnx"
    output.parent.mkdir()
    with staged(read_model(source), output, source=source, force=False) as stage:
        assert stage.data is not None
        stage.data.unlink()
        with pytest.raises(FileError, match=r"its data file out\.\w+\.data was removed meanwhile"):
            stage.commit()
    assert not list(output.parent.iterdir())
