"""The command: words in, pipeline called, outcome said, exit code right."""

from __future__ import annotations

import importlib
import json
import os
import pty
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import onnxgen
from onnxgen.cli import main
from onnxgen.cli_reference import reference
from onnxgen.errors import (
    ExpectationError,
    FileError,
    ModelDiffersError,
    OnnxgenError,
    RefusedError,
)
from onnxgen.expectations import NOTHING, Expectations
from onnxgen.patterns import RULES
from onnxgen.places import default_output
from onnxgen.report.values import Case, Proof, Report, Site
from onnxgen.targets import ort

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class FuseOptions:
    output: Path | None = None
    target: str = "onnx"
    padding: str = "any"
    max_length: int | None = None
    verify: bool = True
    budget: str = "full"
    disable: tuple[str, ...] = ()
    opset: int | None = None
    inline: bool = False
    roles: Mapping[str, str] | None = None
    force: bool = False
    genai_config: bool = False
    expect: Expectations = NOTHING
    check: bool = False
    rules: tuple[Path, ...] = ()


class FakePipeline(ModuleType):
    """The pipeline's interface with an outcome that a test chooses."""

    FuseOptions = FuseOptions

    def __init__(self) -> None:
        super().__init__("onnxgen.pipeline")
        self.status: Any = "proven"
        self.reason = ""
        self.error: BaseException | None = None
        self.calls: list[tuple[Any, ...]] = []

    def proof(self) -> Proof:
        difference = float("inf") if self.status == "differs" else 2e-6
        case = Case("prefill", 2, 4, 0, "none", difference, "logits")
        return Proof(self.status, 1e-4, [case], reason=self.reason)

    def fuse(self, path: Path, options: FuseOptions, progress: Callable[[str], None]) -> Report:
        self.calls.append((path, options))
        progress("reading")
        if self.error is not None:
            raise self.error
        site = Site("attention", "ATT001", "n", "model.layers.0", "fused")
        return Report(
            str(path), str(options.output), "onnx", 18, 24, 9, 2, sites=[site], proof=self.proof()
        )

    def verify(
        self,
        original: Path,
        rewritten: Path,
        *,
        roles: Mapping[str, str],
        budget: str = "full",
        progress: Callable[[str], None],
    ) -> Proof:
        self.calls.append((original, rewritten, roles))
        progress("running")
        if self.error is not None:
            raise self.error
        return self.proof()


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    fake = FakePipeline()
    monkeypatch.setitem(sys.modules, "onnxgen.pipeline", fake)
    monkeypatch.setattr(onnxgen, "pipeline", fake, raising=False)
    return fake


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_fuse_says_what_it_did(pipeline: FakePipeline) -> None:
    result = run("fuse", "model.onnx")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "attention" in result.stdout
    assert "Proven" in result.stdout
    assert "Written to model.fused.onnx" in result.stdout
    assert pipeline.calls == [
        (Path("model.onnx"), FuseOptions(output=Path("model.fused.onnx"), roles={}))
    ]


def test_every_option_reaches_the_pipeline(pipeline: FakePipeline) -> None:
    words = "-o out.onnx --target ort --padding right --max-length 96 --no-verify --disable ATT001 --disable NRM002 --opset 23"
    result = run(
        "fuse",
        "m.onnx",
        *words.split(),
        "--inline",
        "--role",
        "a=b=ids",
        "--force",
        "--genai-config",
    )
    assert result.exit_code == 0, result.stderr
    options = FuseOptions(
        output=Path("out.onnx"),
        target="ort",
        padding="right",
        max_length=96,
        verify=False,
        disable=("ATT001", "NRM002"),
        opset=23,
        inline=True,
        roles={"a=b": "ids"},
        force=True,
        genai_config=True,
    )
    assert pipeline.calls == [(Path("m.onnx"), options)]


@pytest.mark.parametrize(
    ("model", "output"),
    [
        ("model.onnx", "model.fused.onnx"),
        ("a/b.v2.onnx", "a/b.v2.fused.onnx"),
        ("model", "model.fused.onnx"),
        ("MODEL.ONNX", "MODEL.fused.onnx"),
        (".onnx", ".onnx.fused.onnx"),
        ("m.onnx.onnx", "m.onnx.fused.onnx"),
    ],
)
def test_the_default_output(model: str, output: str) -> None:
    assert default_output(Path(model)) == Path(output)


@pytest.mark.parametrize(
    ("status", "fuse_code", "verify_code"),
    [("proven", 0, 0), ("differs", 1, 1), ("unverifiable", 3, 3), ("unproven", 0, 3)],
)
def test_exit_codes_of_proofs(
    pipeline: FakePipeline, status: str, fuse_code: int, verify_code: int
) -> None:
    pipeline.status = status
    assert run("fuse", "m.onnx").exit_code == fuse_code
    assert run("verify", "m.onnx", "n.onnx").exit_code == verify_code


@pytest.mark.parametrize(
    "error",
    [
        ModelDiffersError("logits differ"),
        RefusedError("no ids"),
        FileError("m.onnx is empty"),
        ExpectationError("2 fused, not 3"),
    ],
)
@pytest.mark.parametrize("command", [("fuse", "m.onnx"), ("verify", "m.onnx", "n.onnx")])
def test_failures_are_one_sentence(
    pipeline: FakePipeline, command: tuple[str, ...], error: OnnxgenError, tmp_path: Path
) -> None:
    pipeline.error = error
    result = run(*command)
    assert result.exit_code == error.exit_code
    assert result.stdout == ""
    assert result.stderr == f"Error: {error}\n"
    report_file = tmp_path / "report.json"
    result = run(*command, "--json", "--report", report_file)
    assert result.exit_code == error.exit_code
    document = json.loads(result.stdout)
    assert document == json.loads(report_file.read_text())
    assert document["error"] == str(error)
    assert document["exit_code"] == error.exit_code


def test_verify_says_why_it_fails(pipeline: FakePipeline) -> None:
    pipeline.status, pipeline.reason = "differs", "output 'logits' differs"
    result = run("verify", "m.onnx", "n.onnx")
    assert result.exit_code == 1
    assert result.stderr == "Error: n.onnx: output 'logits' differs\n"
    assert "output 'logits' differs" not in result.stdout
    document = json.loads(run("verify", "m.onnx", "n.onnx", "--json").stdout)
    assert document["error"] == "n.onnx: output 'logits' differs"


def test_a_report_that_an_error_carries_is_shown(pipeline: FakePipeline, tmp_path: Path) -> None:
    error = ModelDiffersError("logits differ in prefill")
    pipeline.status = "differs"
    error.report = Report("m.onnx", "", "onnx", proof=pipeline.proof())
    pipeline.error = error
    result = run("fuse", "m.onnx", "--report", tmp_path / "report.json")
    assert result.exit_code == 1
    assert "Differs" in result.stdout
    assert "Nothing was written" in result.stdout
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["report"]["proof"]["worst"]["difference"] == "Infinity"


def test_json_is_all_there_is_on_stdout(pipeline: FakePipeline) -> None:
    result = run("fuse", "m.onnx", "--json")
    assert json.loads(result.stdout)["report"]["nodes_after"] == 2
    assert result.stderr == ""
    result = run("verify", "m.onnx", "n.onnx", "--json")
    assert json.loads(result.stdout)["proof"]["status"] == "proven"


@pytest.mark.parametrize(
    "words",
    [
        ("fuse",),
        ("fuse", "m.onnx", "--target", "toaster"),
        ("fuse", "m.onnx", "--opset", "0"),
        ("fuse", "m.onnx", "--role", "ids"),
        ("fuse", "m.onnx", "--role", "=ids"),
        ("fuse", "m.onnx", "--role", "a=ids", "--role", "a=mask"),
        ("fuse", "m.onnx", "--report", "m.onnx"),
        ("fuse", "m.onnx", "--report", "m.fused.onnx"),
        ("verify", "m.onnx"),
        ("verify", "m.onnx", "n.onnx", "--report", "n.onnx"),
        ("toast",),
    ],
)
def test_usage(pipeline: FakePipeline, words: tuple[str, ...]) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert pipeline.calls == []


def test_a_report_that_cannot_be_written_is_noticed_first(
    pipeline: FakePipeline, tmp_path: Path
) -> None:
    result = run("fuse", "m.onnx", "--report", tmp_path / "gone" / "report.json")
    assert result.exit_code == 4
    assert pipeline.calls == []


def test_a_bug_is_said_to_be_one(pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.error = ZeroDivisionError("division\nby zero")
    result = run("fuse", "m.onnx")
    assert result.exit_code == 3
    assert "ZeroDivisionError: division by zero" in result.stderr
    assert "report" in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setenv("ONNXGEN_DEBUG", "1")
    assert "Traceback" in run("fuse", "m.onnx").stderr


def test_too_little_memory_is_no_bug(pipeline: FakePipeline) -> None:
    pipeline.error = MemoryError("Unable to allocate 9 EiB")
    result = run("fuse", "m.onnx")
    assert result.exit_code == 3
    assert "not enough memory" in result.stderr
    assert "bug" not in result.stderr


def test_an_interruption_is_no_difference(pipeline: FakePipeline) -> None:
    pipeline.error = KeyboardInterrupt()
    result = run("fuse", "m.onnx")
    assert result.exit_code == 130
    assert result.stderr == "Interrupted\n"


def test_the_version() -> None:
    result = run("--version")
    assert result.stdout == f"onnxgen, version {onnxgen.__version__}\n"


def test_every_command_helps_with_an_example() -> None:
    assert "Exit codes: 0 done" in run("--help").stdout
    for name, command in main.commands.items():
        shown = run(name, "--help").stdout
        assert f"Example:\n    onnxgen {name}" in shown, shown
        for param in command.params:
            if isinstance(param, click.Option):
                assert param.help, f"{name} {param.name}"


def test_the_reference_is_fresh() -> None:
    stale = "cli.md is stale: python -m onnxgen.cli_reference > cli.md"
    assert (ROOT / "cli.md").read_text() == reference(), stale


def test_the_reference_names_every_rule() -> None:
    rows = [line.split("|") for line in reference().splitlines() if line.startswith("| `")]
    titles = {row[1].strip(" `"): row[2].strip() for row in rows}
    for code in [*(rule.code for rule in RULES), *ort.CODES]:
        assert titles[code].endswith("."), code
        assert code not in titles[code]


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from onnxgen.cli import main\n"
        "try: main(['fuse', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(sorted({'onnx', 'onnx_ir', 'onnxruntime', 'numpy', 'rich'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.stderr.strip() == "[]"


def in_terminal(environment: Mapping[str, str]) -> str:
    """What `onnxgen fuse` prints on a terminal, the pipeline being the fake one."""
    code = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("fakes", sys.argv[1])
fakes = importlib.util.module_from_spec(spec); sys.modules["fakes"] = fakes
spec.loader.exec_module(fakes)
import onnxgen
fake = onnxgen.pipeline = sys.modules["onnxgen.pipeline"] = fakes.FakePipeline()
fuse = fake.fuse
def slow(path, options, progress):
    report = fuse(path, options, progress)
    time.sleep(0.4)
    return report
fake.fuse = slow
onnxgen.cli.main(["fuse", "m.onnx"])
"""
    parent, child = pty.openpty()
    full = {**os.environ, "TERM": "xterm-256color", **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", code, __file__], stdin=child, stdout=child, stderr=child, env=full
    )
    os.close(child)
    printed = b""
    while True:
        try:
            chunk = os.read(parent, 4096)
        except OSError:  # how Linux says that the other side is closed
            break
        if not chunk:
            break
        printed += chunk
    os.close(parent)
    assert process.wait(30) == 0, printed.decode()
    return printed.decode()


def test_progress_and_colours_on_a_terminal() -> None:
    printed = in_terminal({})
    assert "reading" in printed
    assert "\x1b[32m" in printed
    printed = in_terminal({"NO_COLOR": "1"})
    assert "reading" in printed
    assert "\x1b[32m" not in printed


def test_libraries_do_not_chatter_and_any_encoding_will_do() -> None:
    code = """
import logging, sys, types, warnings
import onnxgen.cli
from onnxgen.report.values import Report
def fuse(path, options, progress):
    logging.getLogger("onnx_ir").warning("chatter")
    warnings.warn("chatter")
    return Report("m.onnx", "f.onnx", "onnx", 18, 24, 9, 2)
onnxgen.pipeline = types.SimpleNamespace(fuse=fuse, FuseOptions=dict)
onnxgen.cli.main(["fuse", "m.onnx"])
"""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert result.stderr == ""
    assert "opset 18 ? 24" in result.stdout


def test_the_module_runs() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "onnxgen", "--version"], capture_output=True, text=True, check=True
    )
    assert onnxgen.__version__ in result.stdout


def test_a_report_replaces_only_a_report(pipeline: FakePipeline, tmp_path: Path) -> None:
    """An input's weights, say, whose names are no secret to a completing shell."""
    weights = tmp_path / "m.onnx.data"
    weights.write_bytes(bytes(100))
    for command in (("fuse", "m.onnx"), ("verify", "m.onnx", "n.onnx")):
        result = run(*command, "--report", weights)
        assert result.exit_code == 2
        assert "is no report of onnxgen" in result.stderr
        assert weights.read_bytes() == bytes(100)
    assert pipeline.calls == []
    report = tmp_path / "report.json"
    report.touch()
    for _ in range(2):  # an empty file, then a report
        assert run("fuse", "m.onnx", "--report", report).exit_code == 0
    assert json.loads(report.read_text())["command"] == "fuse"


@pytest.mark.parametrize("name", ["genai_config.json", "config.json", "tokenizer.json", "o.onnx"])
def test_a_report_is_no_file_of_the_command(
    pipeline: FakePipeline, name: str, tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    for place in (tmp_path / name, tmp_path / "sub" / ".." / name):
        result = run("fuse", "m.onnx", "-o", tmp_path / "o.onnx", "--report", place)
        assert result.exit_code == 2
        assert "another file of this command" in result.stderr
    assert pipeline.calls == []


def test_a_report_goes_over_no_special_file(pipeline: FakePipeline, tmp_path: Path) -> None:
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    for place in (fifo, link):
        result = run("fuse", "m.onnx", "--report", place)
        assert result.exit_code == 4
        assert "not a regular file" in result.stderr
    assert fifo.is_fifo()
    assert link.is_symlink()
    assert pipeline.calls == []


@pytest.mark.parametrize(
    "words",
    [("fuse", ""), ("fuse", "m.onnx", "-o", ""), ("verify", "m.onnx", "n.onnx", "--report", "")],
)
def test_an_empty_path_is_a_mistake(pipeline: FakePipeline, words: tuple[str, ...]) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert "a path is empty" in result.stderr
    assert pipeline.calls == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_what_may_not_be_read_is_a_sentence() -> None:
    importlib.import_module("onnxgen.pipeline")  # while it may be read
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        model, report = folder / "model.onnx", folder / "report.json"
        for path in (model, report):
            path.write_bytes(b"x")
            path.chmod(0)
        os.seteuid(65534)
        try:
            read = run("fuse", model)
            written = run("fuse", model, "--report", report)
        finally:
            os.seteuid(0)
    assert (read.exit_code, written.exit_code) == (4, 4)
    assert f"{model} cannot be read: Permission denied" in read.stderr
    assert "cannot be replaced: Permission denied" in written.stderr
