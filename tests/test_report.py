"""Reports: every view of them is made of the same values."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from onnxgen.errors import FileError
from onnxgen.report import as_json, files, text
from onnxgen.report.values import Case, Decline, Proof, Report, Site


def fused(kind: str, layer: int, **details: int | str) -> Site:
    scope = f"model.layers.{layer}"
    return Site(
        kind, "ATT001", f"{scope}/{kind}", scope, "fused", replaced=30, details=dict(details)
    )


def kept(kind: str, layer: int, code: str, reason: str, status: str = "kept") -> Site:
    decline = Decline("ATT001", code, reason, (f"node_{layer}",))
    return Site(kind, "ATT001", f"softmax_{layer}", f"model.layers.{layer}", status, decline)


def proof(**changes: object) -> Proof:
    values: dict[str, object] = {
        "status": "proven",
        "tolerance": 1e-4,
        "cases": [
            Case("prefill", 2, 4, 0, "none", 1.5e-6, "logits"),
            Case("decode over past 7, left padding", 2, 1, 7, "left", 3.2e-6, "present.0.key"),
            Case("batch 1, past 0", 1, 1, 0, "none", skipped="the original fails on it"),
        ],
        "rewrites": 12,
        "structures": 3,
        "rewrite_difference": 2e-7,
        "seconds": 3.14,
        "memory": 1_234_000_000,
    }
    return Proof(**{**values, **changes})


def report(sites: list[Site], proved: Proof | None = None, **changes: object) -> Report:
    values: dict[str, object] = {
        "input": "model.onnx",
        "output": "model.fused.onnx",
        "target": "onnx",
        "opset_before": 18,
        "opset_after": 24,
        "nodes_before": 612,
        "nodes_after": 98,
        "ops_before": {"MatMul": 96},
        "ops_after": {"MatMul": 32, "Attention": 2},
        "sites": sites,
        "proof": proved or proof(),
        "seconds": {"read": 0.1, "verify": 1.25},
    }
    return Report(**{**values, **changes})


def said(value: Report | Proof | None, width: int = 100) -> str:
    """The text as it arrives in a pipe."""
    console = text.console()
    console.file = io.StringIO()
    console.width = width
    console.print(text.render(value) if value else text.render_proof(None))
    return console.file.getvalue()


def test_what_was_done_and_proven() -> None:
    sites = [fused("attention", layer, heads=6, mask="causal") for layer in range(2)]
    lines = said(report([*sites, fused("rms_norm", 0)])).splitlines()
    assert lines[0] == "model.onnx: target onnx, opset 18 → 24, nodes 612 → 98"
    assert [line.split() for line in lines if line.lstrip().startswith(("attention", "RMS"))] == [
        ["attention", "2", "2", "0"],
        ["RMS", "norm", "1", "1", "0"],
    ]
    assert "Fused attention (2): heads 6, mask causal" in lines
    assert (
        "Proven: 2 cases run, largest difference 3.2e-06 standard deviations of 1e-04 allowed "
        "(output present.0.key, decode over past 7, left padding)"
    ) in lines
    assert (
        "  12 rewrites checked in place (3 distinct structures), largest difference 2.0e-07"
        in lines
    )
    assert "  1 case skipped (batch 1, past 0): the original fails on it" in lines
    assert lines[-1] == "Written to model.fused.onnx in 1.4 s (read 0.10 s, verify 1.2 s)"


def test_a_hundred_layers_say_as_much_as_two() -> None:
    reason = "the value is read through a Gather"
    few = said(report([kept("attention", layer, "value-gather", reason) for layer in range(2)]))
    many = said(report([kept("attention", layer, "value-gather", reason) for layer in range(100)]))
    assert len(few.splitlines()) == len(many.splitlines())
    assert (
        "Kept attention (100): ATT001 value-gather: the value is read through a Gather "
        "[model.layers.0, model.layers.1, model.layers.2 and 97 more]"
    ) in many.splitlines()


def test_reasons_that_differ_only_in_names_share_a_line() -> None:
    sites = [kept("attention", i, "odd-scale", f"node_{i} scales twice") for i in range(9)]
    (line,) = [line for line in said(report(sites)).splitlines() if line.startswith("Kept")]
    assert "node_0 scales twice (and 8 like reasons)" in line


def test_an_undone_rewrite_has_a_column() -> None:
    output = said(report([kept("rotary", 0, "differs", "2e-2 away", "undone"), fused("rotary", 1)]))
    assert "undone" in output.splitlines()[2]
    assert "Undone rotary embedding (1): ATT001 differs: 2e-2 away" in output


def test_many_forms_are_counted_not_listed() -> None:
    sites = [fused("attention", layer, window=layer) for layer in range(20)]
    lines = [line for line in said(report(sites)).splitlines() if line.startswith("Fused")]
    assert len(lines) == text.GROUPS_SHOWN + 1
    assert "and 16 other forms" in lines[-1]


def test_outcomes_without_success() -> None:
    assert "Nothing was found to fuse." in said(report([]))
    assert "Nothing was written" in said(report([], output=""))
    assert said(None) == "Unproven: nothing was run\n"
    assert "Unproven: told not to" in said(proof(status="unproven", reason="told not to"))
    differs = said(proof(status="differs", reason="logits differ"))
    assert differs.startswith("Differs: 2 cases run")
    assert "logits differ" not in differs  # the command ends with that sentence
    assert said(proof(status="unverifiable", cases=[], rewrites=0, seconds=0, reason="no ids")) == (
        "Unverifiable: no case was run\n"
    )
    assert "Warning: one" in said(report([], warnings=["one"]))


def test_names_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    sites = [kept("attention", 0, "odd", "[bold]x[/] is :smile: odd")]
    assert "[bold]x[/] is :smile: odd" in said(report(sites))


def test_long_lines_are_not_wrapped_in_a_pipe() -> None:
    sites = [kept("attention", 0, "odd", "word " * 60)]
    assert len(said(report(sites), 40).splitlines()) == len(said(report(sites), 400).splitlines())


def test_json_holds_every_field() -> None:
    sites = [fused("attention", 0, heads=6), kept("attention", 1, "odd", "it is odd")]
    document = json.loads(as_json.dumps(as_json.report_document("fuse", report(sites), 0, None)))
    assert set(document) == {"schema", "onnxgen", "command", "exit_code", "error", "report"}
    assert document["schema"] == 1
    body = document["report"]
    assert body["summary"] == {"attention": {"found": 2, "fused": 1, "kept": 1, "undone": 0}}
    assert body["sites"][1]["decline"] == {
        "rule": "ATT001",
        "code": "odd",
        "reason": "it is odd",
        "nodes": ["node_1"],
        "reached": [],
        "ahead": [],
        "expected": "",
        "found": "",
        "change": "",
    }
    assert body["sites"][0]["details"] == {"heads": 6}
    assert body["proof"]["worst"]["output"] == "present.0.key"
    assert len(body["proof"]["cases"]) == 3
    assert body["nodes_before"] == 612


def test_json_of_a_failure() -> None:
    document = as_json.report_document("fuse", None, 3, "it is refused")
    assert (document["report"], document["exit_code"]) == (None, 3)
    document = as_json.verify_document("a", "b", None, 4, "a is empty")
    assert (document["proof"], document["original"], document["error"]) == (None, "a", "a is empty")


def test_json_is_valid_whatever_the_numbers() -> None:
    case = Case("prefill", np.int64(2), 4, 0, "none", float("inf"), "y")
    odd = proof(cases=[case], rewrite_difference=np.float32("nan"), tolerance=-float("inf"))

    def refuse(word: str) -> None:
        raise AssertionError(word)

    document = json.loads(
        as_json.dumps(as_json.verify_document("a", "b", odd, 1, None)), parse_constant=refuse
    )
    assert document["proof"]["cases"][0]["difference"] == "Infinity"
    assert document["proof"]["cases"][0]["batch"] == 2
    assert document["proof"]["rewrite_difference"] == "NaN"
    assert document["proof"]["tolerance"] == "-Infinity"


def test_report_files_are_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    files.write_text(path, "first")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnxgen.report.files.os.replace", full)
    with pytest.raises(FileError, match=r"report\.json cannot be written: No space left"):
        files.write_text(path, "second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_report_files_are_refused_early(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "report.json")
    for path in (tmp_path, tmp_path / "gone" / "report.json"):
        with pytest.raises(FileError, match="cannot be written"):
            files.check_writable(path)


def test_a_proof_says_what_running_took() -> None:
    assert "ONNX Runtime ran 3.1 s in at most 1.2 GB of memory" in said(proof())
    assert "of memory" not in said(proof(memory=0))
    document = as_json.verify_document("a", "b", proof(), 0, None)
    assert (document["proof"]["seconds"], document["proof"]["memory"]) == (3.14, 1_234_000_000)


def test_a_proof_on_twins_says_so() -> None:
    assert "float32 twins" in said(proof(twins=("bfloat16",)))
    assert "twins" not in said(proof())
