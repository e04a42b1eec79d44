"""The action, the hooks and the recipes of docs/ci.md: read as their programs read them, and run.

What a runner brings (a virtual environment, pip, a checkout) is stood in for; the commands are run
as they are written.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from onnxgen import testing

ROOT = Path(__file__).resolve().parent.parent
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
HOOKS = {hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}


def block(language: str, title: str) -> str:
    """The one block of docs/ci.md whose first line is the comment `title`."""
    text = (ROOT / "docs" / "ci.md").read_text()
    blocks = re.findall(rf"^```{language}\n# {re.escape(title)}\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) == 1
    return str(blocks[0])


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with two models, as exported."""
    models = tmp_path / "work" / "models"
    models.mkdir(parents=True)
    path = testing.write_demo_model(models)
    shutil.copy(path, models / "a b.onnx")
    return models.parent


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """A folder of programs: onnxgen; pip, which notes what it is told; and python3 for venv."""
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {
        "onnxgen": f'exec {shlex.quote(sys.executable)} -m onnxgen "$@"',
        "pip": f'printf "%s\\n" "$@" >> {shlex.quote(str(tmp_path / "pip.txt"))}',
        "python3": f'test "$1 $2" = "-m venv" && mkdir -p "$3" && ln -s {shlex.quote(str(folder))} "$3/bin"',
    }
    for name, line in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (folder / name).chmod(0o755)
    return folder


def bash(script: str, folder: Path, bin_folder: Path, **environment: str) -> Any:
    """Run lines as GitHub's `shell: bash` does."""
    full = {
        **os.environ,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=folder,
        env=full,
        capture_output=True,
        text=True,
        check=False,
    )


def run_action(
    inputs: Mapping[str, str], checkout: Path, bin_folder: Path
) -> tuple[Any, dict[str, str]]:
    """The action's steps with these inputs, and its outputs."""
    temp = checkout.parent / "runner"
    temp.mkdir()
    assert set(inputs) <= set(ACTION["inputs"])
    values = {name: each.get("default", "") for name, each in ACTION["inputs"].items()} | inputs
    output = temp / "output"
    result = None
    for step in ACTION["runs"]["steps"]:
        assert step["shell"] == "bash"
        assert "${{" not in step["run"], "an input inside a script could be any command"
        environment = {
            name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: values[found[1]], value)
            for name, value in step["env"].items()
        }
        result = bash(
            step["run"],
            checkout,
            bin_folder,
            **environment,
            RUNNER_TEMP=str(temp),
            GITHUB_ACTION_PATH=str(ROOT),
            GITHUB_OUTPUT=str(output),
            GITHUB_ACTIONS="true",
            GITHUB_WORKSPACE=str(checkout),
            GITHUB_STEP_SUMMARY=str(temp / "summary.md"),
        )
        if result.returncode:
            break
    said = dict(line.split("=", 1) for line in output.read_text().splitlines())
    outputs = {}
    for name, each in ACTION["outputs"].items():
        step, key = re.fullmatch(
            r"\$\{\{ steps\.([\w-]+)\.outputs\.([\w-]+) \}\}", each["value"]
        ).groups()
        assert step in {one.get("id") for one in ACTION["runs"]["steps"]}
        outputs[name] = said[key]
    return result, outputs


def test_the_action_fuses_and_says_so(checkout: Path, bin_folder: Path) -> None:
    inputs = {
        "models": "models/*.onnx",
        "options": "--verify quick\n--expect all -j 2",
        "report": "reports/{}.json",
    }
    result, outputs = run_action(inputs, checkout, bin_folder)
    assert result.returncode == 0, result.stderr
    assert outputs == {"exit-code": "0", "out-dir": "fused", "reports": "reports/*.json"}
    written = {path.name for path in (checkout / "fused").iterdir()}
    assert written == {"demo.fused.onnx", "a b.fused.onnx"}
    assert len(list(checkout.glob(outputs["reports"]))) == 2
    assert "::notice title=onnxgen,file=models/demo.onnx::" in result.stderr
    assert (checkout.parent / "runner" / "summary.md").read_text().count(
        "### ✅ onnxgen fuse: "
    ) == 2
    assert (checkout.parent / "pip.txt").read_text().splitlines()[-1] == str(ROOT)


def test_the_action_fails_as_the_command_does(checkout: Path, bin_folder: Path) -> None:
    inputs = {
        "models": "models/a b.onnx\nmodels/demo.onnx",
        "options": "--check --expect attention=99 $(touch hacked) ;touch hacked",
        "version": "0.1.0",
    }
    result, outputs = run_action(inputs, checkout, bin_folder)
    assert (result.returncode, outputs["exit-code"]) == (4, "4")  # $(touch is no file
    assert not (checkout / "hacked").exists()
    assert (checkout.parent / "pip.txt").read_text().splitlines()[-1] == "onnxgen==0.1.0"
    shutil.rmtree(checkout.parent / "runner")
    inputs["options"] = "--check --expect attention=99"
    result, outputs = run_action(inputs, checkout, bin_folder)
    assert (result.returncode, outputs["exit-code"]) == (5, "5")
    assert result.stderr.count("::error title=onnxgen::") == 2


def run_hook(name: str, files: list[str], checkout: Path, bin_folder: Path) -> Any:
    """A hook's entry with the files that its pattern takes, as pre-commit does."""
    hook = HOOKS[name]
    assert hook["language"] == "python"
    taken = [file for file in files if re.search(hook["files"], file)]
    words = " ".join(map(shlex.quote, taken))
    return bash(f"{hook['entry']} {words}", checkout, bin_folder)


def test_the_hooks(checkout: Path, bin_folder: Path) -> None:
    assert set(HOOKS) == {"onnxgen-fused", "onnxgen-fusable"}
    files = ["README.md", "models/demo.onnx", "models/a b.onnx"]
    before = sorted(checkout.rglob("*"))
    result = run_hook("onnxgen-fusable", files, checkout, bin_folder)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    result = run_hook("onnxgen-fused", files, checkout, bin_folder)
    assert (result.returncode, result.stdout) == (5, "")
    assert result.stderr.count("nothing was expected to be left to fuse") == 2
    assert sorted(checkout.rglob("*")) == before
    assert (
        bash("onnxgen fuse -q --verify quick models/demo.onnx", checkout, bin_folder).stderr == ""
    )
    result = run_hook("onnxgen-fused", ["models/demo.fused.onnx"], checkout, bin_folder)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_workflow_gives_the_action_what_it_takes() -> None:
    workflow = yaml.safe_load(block("yaml", ".github/workflows/models.yml"))
    (job,) = workflow["jobs"].values()
    (step,) = (step for step in job["steps"] if "/onnxgen@" in step["uses"])
    assert set(step["with"]) <= set(ACTION["inputs"])
    required = {name for name, each in ACTION["inputs"].items() if each.get("required")}
    assert required <= set(step["with"])
    (upload,) = (step for step in job["steps"] if "upload-artifact" in step["uses"])
    assert upload["with"]["path"].split() == [
        ACTION["inputs"]["out-dir"]["default"],
        os.path.dirname(step["with"]["report"]),
    ]


def test_the_pre_commit_recipe_names_a_hook() -> None:
    (repo,) = yaml.safe_load(block("yaml", ".pre-commit-config.yaml"))["repos"]
    assert {hook["id"] for hook in repo["hooks"]} <= set(HOOKS)


def test_the_gitlab_recipe(checkout: Path, bin_folder: Path) -> None:
    (job,) = yaml.safe_load(block("yaml", ".gitlab-ci.yml")).values()
    result = bash("\n".join(job["script"]), checkout, bin_folder)
    assert result.returncode == 0, result.stderr
    assert (checkout.parent / "pip.txt").read_text().split() == ["install", "onnxgen"]
    files = [str(path.relative_to(checkout)) for path in checkout.rglob("*") if path.is_file()]
    reports = fnmatch.filter(files, job["artifacts"]["reports"]["junit"])
    assert sorted(reports) == ["reports/a b.xml", "reports/demo.xml"]
    (folder,) = job["artifacts"]["paths"]
    assert len([file for file in files if file.startswith(folder)]) == 2


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_the_makefile(checkout: Path, bin_folder: Path) -> None:
    (checkout / "models" / "a b.onnx").unlink()  # make knows no blanks
    (checkout / "Makefile").write_text(block("make", "Makefile"))
    result = bash("make", checkout, bin_folder)
    assert result.returncode == 0, result.stderr
    report = checkout / "fused" / "demo.json"
    assert json.loads(report.read_text())["exit_code"] == 0
    assert (checkout / "fused" / "demo.fused.onnx").exists()
    assert "Nothing to be done" in bash("make", checkout, bin_folder).stdout
    # With baselines, as the text below it says.
    added = "$(addprefix --baseline ,$(wildcard baselines/$*.json))"
    assert added in (ROOT / "docs" / "ci.md").read_text()
    text = block("make", "Makefile").replace("--expect all", f"--expect all {added}")
    (checkout / "Makefile").write_text(text)
    (checkout / "baselines").mkdir()
    better = json.loads(report.read_text())
    better["report"]["already"] = {"moe": 1}
    (checkout / "baselines" / "demo.json").write_text(json.dumps(better))
    (checkout / "fused" / "demo.fused.onnx").unlink()
    result = bash("make", checkout, bin_folder)
    assert result.returncode == 2
    assert "0 moe are fused, and 1 were in baselines/demo.json" in result.stderr
    assert not (checkout / "fused" / "demo.fused.onnx").exists()


def test_the_commands_above_the_recipes(checkout: Path, bin_folder: Path) -> None:
    """Each line of the first and of the last shell block is a command that is understood."""
    text = (ROOT / "docs" / "ci.md").read_text()
    lines = [
        line
        for each in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
        for line in each.splitlines()
    ]
    assert len(lines) >= 5
    models = checkout / "models"
    for name in ("model", "a", "b"):
        shutil.copy(models / "demo.onnx", checkout / f"{name}.onnx")
    for folder in ("reports", "baselines"):
        (checkout / folder).mkdir()
    for name in ("model", "baselines/a", "baselines/b"):
        words = f"onnxgen fuse model.onnx --check --no-verify --report {name}.json -q"
        assert bash(words, checkout, bin_folder).returncode == 0
    for line in lines:
        result = bash(f"{line.partition(' #')[0]} --verify quick", checkout, bin_folder)
        expected = 5 if "attention=24" in line or "unchanged" in line else 0
        assert result.returncode == expected, f"{line}: {result.stderr}"
