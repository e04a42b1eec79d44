"""Several models: each its own process, report and end; nothing collides, nothing half written."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from onnxgen import testing
from onnxgen.cli import main
from onnxgen.cli_many import GRAVEST, gravest

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("--verify", "quick")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two good models and a bad one in between, to stand in."""
    content = testing.write_demo_model(tmp_path).read_bytes()
    (tmp_path / "demo.onnx").unlink()
    for name in ("a", "b"):
        (tmp_path / f"{name}.onnx").write_bytes(content)
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_that_fails_stops_no_other(models: Path) -> None:
    words = ("--out-dir", "D", "-j", 2, "--report", "D/{}.json", *QUICK)
    result = run("fuse", "a.onnx", "bad.onnx", "b.onnx", *words)
    assert result.exit_code == 4
    assert re.fullmatch(r"Error: bad\.onnx is no ONNX model .*\n", result.stderr)
    rows = [line.split() for line in result.stdout.splitlines() if ".onnx" in line]
    assert [(row[0], row[-1]) for row in rows] == [
        ("a.onnx", "proven"),
        ("bad.onnx", "file"),
        ("b.onnx", "proven"),
    ]
    assert result.stdout.endswith("2 of 3 models done\n")
    names = {"a.fused.onnx", "b.fused.onnx", "a.json", "b.json", "bad.json"}
    assert {path.name for path in (models / "D").iterdir()} == names
    codes = {name: json.loads(Path(f"D/{name}.json").read_text()) for name in ("a", "bad", "b")}
    assert {name: each["exit_code"] for name, each in codes.items()} == {"a": 0, "bad": 4, "b": 0}
    alone = run("fuse", "a.onnx", "-o", "alone.onnx", *QUICK)
    assert alone.exit_code == 0
    assert Path("alone.onnx").read_bytes() == Path("D/a.fused.onnx").read_bytes()


def test_json_is_one_document(models: Path) -> None:
    result = run("fuse", "bad.onnx", "a.onnx", "--json", *QUICK)
    document = json.loads(result.stdout)
    assert document["exit_code"] == result.exit_code == 4
    assert document["error"] is None
    assert [each["exit_code"] for each in document["models"]] == [4, 0]
    assert document["models"][1]["report"]["input"] == "a.onnx"
    assert Path("a.fused.onnx").exists()


def test_each_has_its_own_baseline_and_expectations(models: Path) -> None:
    both = ("fuse", "a.onnx", "b.onnx", "--check")
    assert run(*both, "--report", "{}.json").exit_code == 0
    assert run(*both, "--baseline", "{}.json").exit_code == 0
    worse = json.loads(Path("b.json").read_text())
    worse["report"]["already"] = {"moe": 3}
    Path("b.json").write_text(json.dumps(worse))
    result = run(*both, "--baseline", "{}.json", "-q")
    assert (result.exit_code, result.stdout) == (5, "")
    assert result.stderr == (
        "Error: b.onnx: 0 moe are fused, and 3 were in b.json; nothing was written\n"
    )


def test_the_gravest_end_counts() -> None:
    assert gravest(iter([0, 5, 3, 1, 4])) == 1
    assert gravest(iter([0, 5, 3, 4])) == 3
    assert gravest(iter([0, 5, 2])) == 2
    assert gravest(iter([0, 5])) == 5
    assert gravest(iter([0, 0])) == 0
    assert sorted(GRAVEST) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("a.onnx", "b.onnx", "-o", "o.onnx"), "-o names the place of one model"),
        (("a.onnx", "-o", "o.onnx", "--out-dir", "D"), "-o and --out-dir exclude one another"),
        (("a.onnx", "sub/../a.onnx"), "would both be written to"),
        (("a.onnx", "sub/a.onnx", "--out-dir", "D"), "would both be written to D/a.fused.onnx"),
        (("a.onnx", "sub/a.onnx", "--report", "{}.json"), "would both be reported in a.json"),
        (("a.onnx", "a.fused.onnx"), "would be written to a.fused.onnx, which is a model to read"),
        (("a.onnx", "b.onnx", "--report", "r/x.json"), "a name with {}, such as r/{}.json"),
        (("a.onnx", "b.onnx", "--baseline", "x.json"), "a name with {}, such as {}.json"),
        (("a.onnx", "b.onnx", "--report", "{}.onnx"), "another file of this command"),
        (("a.onnx", "b.onnx", "--genai-config", "--out-dir", "D"), "one genai_config.json for"),
        (("a.onnx", "b.onnx", "-j", "0"), "0 is not in the range"),
    ],
)
def test_what_collides_is_said_before_any_work(
    models: Path, words: tuple[str, ...], said: str
) -> None:
    (models / "sub").mkdir()
    before = sorted(models.rglob("*"))
    result = run("fuse", *words)
    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    assert sorted(models.rglob("*")) == before


def test_a_folder_that_nothing_came_to_goes(models: Path) -> None:
    assert run("fuse", "bad.onnx", "--out-dir", "D/E").exit_code == 4
    assert not Path("D/E").exists()


def start(*words: str, **kinds: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "onnxgen", "fuse", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "90"}
    return subprocess.Popen(  # type: ignore[call-overload]
        command, stdout=subprocess.DEVNULL, env=environment, **kinds
    )


def children(process: int) -> list[int]:
    """Processes that a process started, and those that they started."""
    found = []
    for each in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, each.read_text().split()):
            found += [child, *children(child)]
    return found


def seen(process: subprocess.Popen[bytes], least: int) -> list[int]:
    """Wait until it has started so many processes."""
    for _ in range(600):
        found = children(process.pid)
        if len(found) >= least:
            return found
        assert process.poll() is None
        time.sleep(0.05)
    raise AssertionError("it starts no processes")


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux says children")


@needs_proc
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_an_interruption_ends_all(models: Path, number: signal.Signals, code: int) -> None:
    before = sorted(models.iterdir())
    words = ("a.onnx", "b.onnx", "--out-dir", "D", "-j", "2")
    with start(*words, stderr=subprocess.PIPE, start_new_session=True) as process:
        found = seen(process, 2)
        if number == signal.SIGINT:  # a terminal sends it to all of them
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code
        assert stderr == (b"Interrupted\n" if number == signal.SIGINT else b"")
    for _ in range(600):
        if not any(Path(f"/proc/{child}/exe").exists() for child in found):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("its processes run on")
    left = [path for path in models.rglob("*") if path.name.startswith(".")]
    assert left == []
    if number != signal.SIGKILL:
        assert sorted(models.iterdir()) == before


@needs_proc
def test_a_process_that_is_killed_takes_one_model_with_it(models: Path) -> None:
    with start("a.onnx", "b.onnx", *QUICK, stderr=subprocess.PIPE) as process:
        (child, *_) = seen(process, 1)
        os.kill(child, signal.SIGKILL)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 3
    assert stderr == b"Error: a.onnx: its process was killed, perhaps by a system short of memory\n"
    assert not Path("a.fused.onnx").exists()
    assert Path("b.fused.onnx").exists()


def test_a_bar_each_on_a_terminal(models: Path) -> None:
    parent, child = pty.openpty()
    with start("a.onnx", "bad.onnx", "-j", "2", stderr=child) as process:
        os.close(child)
        printed = b""
        while True:
            try:
                chunk = os.read(parent, 4096)
            except OSError:
                break
            if not chunk:
                break
            printed += chunk
        assert process.wait(60) == 4
    os.close(parent)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed.decode())
    assert re.search(r"a\.onnx +━+", shown)
    assert re.search(r"bad\.onnx +━+", shown)
    assert "starting" in shown
    assert shown.rstrip().splitlines()[-1].startswith("Error: bad.onnx")


def test_memory_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxgen import bounds, cli_many

    monkeypatch.delenv("ONNXGEN_MEMORY", raising=False)
    whole = bounds.Bounds().memory
    monkeypatch.setenv("ONNXGEN_MEMORY", "")  # for monkeypatch to restore
    cli_many._share_memory(4)
    assert abs(bounds.Bounds().memory - whole / 4) < 8
    monkeypatch.setenv("ONNXGEN_MEMORY", "1GB")
    cli_many._share_memory(4)
    assert bounds.Bounds().memory == 10**9
