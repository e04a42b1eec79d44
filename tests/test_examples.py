"""The examples run, each in an empty folder, with model hubs out of reach."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from onnxgen.testing import corpus

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

pytestmark = pytest.mark.slow


def run(folder: Path, name: str, *words: str) -> str:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OLIVE_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(EXAMPLES.parent),
    }
    command = [sys.executable, str(EXAMPLES / name), *words]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_after_torch_export(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    said = run(tmp_path, "after_torch_export.py")
    assert "proven, attention 1 of 1" in said
    assert [path.name for path in tmp_path.iterdir()] == ["attention.onnx"]


def test_after_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    said = run(tmp_path, "after_transformers.py")
    assert "for onnx: proven, rms_norm 5 of 5, rotary 4 of 4, attention 2 of 2" in said
    assert "for paged: proven" in said


def test_olive_pass(tmp_path: Path) -> None:
    pytest.importorskip("olive", reason="needs olive-ai and requests")
    (entry,) = corpus("qwen3/dynamo20")
    model = tmp_path / "model.onnx"
    model.write_bytes(entry.load().SerializeToString())
    said = run(tmp_path, "olive_pass.py", str(model), str(tmp_path / "out"))
    assert "proven, rms_norm 9 of 9, rotary 4 of 4, attention 2 of 2" in said
    assert (tmp_path / "out" / "model.onnx").exists()
