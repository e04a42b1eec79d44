"""What is installed is what is in the repository, and it starts in a clean environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import onnxgen

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
OUTSIDE = {"passes", "patterns"}  # installed into onnxgen, and linked from there
DATA = {
    "onnxgen/py.typed",
    "onnxgen/demo/decoder.onnx.xz",
    "onnxgen/report/page.css",
    "onnxgen/report/report.schema.json",
}


def modules() -> set[str]:
    """Every module of the repository, by the path it is installed under."""
    inside = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "onnxgen").rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    }
    outside = {
        f"onnxgen/{path.relative_to(ROOT).as_posix()}"
        for name in OUTSIDE
        for path in (ROOT / name).rglob("*.py")
    }
    return inside | outside


def test_every_package_is_listed() -> None:
    packages = {os.path.dirname(module).replace("/", ".") for module in modules()}
    assert set(SETTINGS["tool"]["setuptools"]["packages"]) == packages
    for package in packages:
        assert f"{package.replace('.', '/')}/__init__.py" in modules()


@pytest.mark.parametrize("name", sorted(OUTSIDE))
def test_the_outside_folders_are_flat_and_linked(name: str) -> None:
    nested = [path for path in (ROOT / name).rglob("*.py") if path.parent != ROOT / name]
    assert nested == []
    link = ROOT / "onnxgen" / name
    assert os.readlink(link) == f"../{name}"
    assert f"onnxgen.{name}" in SETTINGS["tool"]["setuptools"]["packages"]


def test_the_versions_agree() -> None:
    assert SETTINGS["project"]["version"] == onnxgen.__version__


def test_runtime_dependencies_are_the_ones_there_are_reasons_for() -> None:
    names = {requirement.split(">=")[0] for requirement in SETTINGS["project"]["dependencies"]}
    assert names == {"onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy", "click", "rich"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built by way of a source distribution, from a copy of the repository."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "source"
    copy.mkdir()
    for name in ("onnxgen", "passes", "patterns"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(copy)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == modules() | DATA


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Callable[..., str]:
    """Runs a command that the wheel brings, installed in an environment of its own."""
    folder = wheel.parent
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }

    def run(*words: str | Path) -> str:
        result = subprocess.run(
            words, capture_output=True, text=True, check=False, cwd=folder, env=clean
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    run(sys.executable, "-m", "venv", folder / "venv")
    run(folder / "venv" / "bin" / "pip", "install", "-q", wheel)
    return lambda name, *words: run(folder / "venv" / "bin" / name, *words)


def test_the_wheel_starts_in_a_clean_environment(installed: Callable[..., str]) -> None:
    assert installed("onnxgen", "--version") == f"onnxgen, version {onnxgen.__version__}\n"


@pytest.mark.skipif(not (ROOT / "onnxgen" / "pipeline.py").exists(), reason="no pipeline yet")
def test_the_demo_ships_with_the_wheel(installed: Callable[..., str]) -> None:
    assert "Proven" in installed("onnxgen", "demo")
