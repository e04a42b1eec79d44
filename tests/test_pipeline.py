"""fuse, from a file to a file: every stored export comes out proven, and nothing wrong is written."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from onnxgen import pipeline
from onnxgen.errors import ModelDiffersError, RefusedError, UsageError
from onnxgen.patterns import RULES
from onnxgen.patterns.building import Builder
from onnxgen.pipeline import FuseOptions, fuse
from onnxgen.report.values import Report
from onnxgen.runtime import Runtime
from onnxgen.testing import CorpusEntry, corpus
from tests import coverage_table
from tests.graphs import parse

ENTRIES = corpus()
KNOWN = coverage_table.read_table(coverage_table.TABLE.read_text("utf-8"))


def quiet(message: str) -> None:
    """Progress that nobody reads."""


def written(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def exported(name: str) -> CorpusEntry:
    (entry,) = corpus(name)
    return entry


def interface(model: onnx.ModelProto) -> list[tuple[Any, ...]]:
    """Names, types and shapes of inputs and outputs, in order."""
    return [
        (
            value.name,
            value.type.tensor_type.elem_type,
            [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim],
        )
        for value in (*model.graph.input, *model.graph.output)
    ]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_export_comes_out_proven_and_complete(entry: CorpusEntry, tmp_path: Path) -> None:
    """Also: no cell of the coverage table is worse than the committed one."""
    original = entry.load()
    path = written(original, tmp_path)
    report = fuse(path, FuseOptions(), quiet)
    assert report.proof is not None
    assert report.proof.status == "proven"
    assert report.proof.cases
    assert report.output == str(tmp_path / "model.fused.onnx")
    fused = onnx.load(report.output)
    assert interface(fused) == interface(original)
    assert not [site for site in report.sites if site.status == "undone"], report.sites
    for site in report.sites:
        assert (site.decline is None) == (site.status == "fused")
        assert site.decline is None or site.decline.reason
    nodes = [node.op_type for node in fused.graph.node]
    assert {op: nodes.count(op) for op in set(nodes)} == report.ops_after
    row = coverage_table.row_of(entry, report, fused)
    assert list(coverage_table.worse(row, KNOWN.get(row.name))) == []
    assert list(coverage_table.incomplete(row)) == []
    assert_modules_kept(report, fused)


def assert_modules_kept(report: Report, fused: onnx.ModelProto) -> None:
    """Each Attention that was made keeps the module that the exporter said it came from."""
    made = {site.node for site in report.sites if site.kind == "attention" and site.scope}
    paths = [
        prop.value
        for node in fused.graph.node
        if node.op_type in ("Attention", "SinkAttention") and node.name in made
        for prop in node.metadata_props
        if prop.key == "pkg.torch.onnx.name_scopes"
    ]
    assert len(set(paths)) == len(paths) == len(made)


# --- the same bytes -----------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from onnxgen.pipeline import FuseOptions, fuse
fuse(Path(sys.argv[1]), FuseOptions(output=Path(sys.argv[2]), verify=False), lambda message: None)
"""


@pytest.mark.parametrize("name", ["qwen3/torchscript", "mistral/dynamo20"])
def test_the_same_model_is_written_every_time(name: str, tmp_path: Path) -> None:
    path = written(exported(name).load(), tmp_path)
    hashes = []
    for seed in ("0", "12345"):
        output = tmp_path / f"out{seed}.onnx"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(path), str(output)], env=environment, check=True
        )
        hashes.append(hashlib.sha256(output.read_bytes()).hexdigest())
    fuse(path, FuseOptions(output=tmp_path / "here.onnx"), quiet)
    hashes.append(hashlib.sha256((tmp_path / "here.onnx").read_bytes()).hexdigest())
    assert len(set(hashes)) == 1, "checked or not, here or there"


def test_what_is_fused_already_stays_as_it_is(tmp_path: Path) -> None:
    path = written(exported("llama/dynamo20").load(), tmp_path)
    once = fuse(path, FuseOptions(), quiet)
    twice = fuse(Path(once.output), FuseOptions(), quiet)
    assert twice.proof is not None
    assert twice.proof.status == "proven"
    assert twice.ops_after == once.ops_after
    assert not [site for site in twice.sites if site.status == "fused"]


# --- options ------------------------------------------------------------------------------------


def test_told_not_to_verify_little_is_run_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be compared")

    monkeypatch.setattr(pipeline, "verify_models", forbidden)
    monkeypatch.setattr(pipeline, "RewriteChecker", forbidden)
    path = written(exported("llama/dynamo20").load(), tmp_path)
    report = fuse(path, FuseOptions(verify=False), quiet)
    assert report.proof is not None
    assert report.proof.status == "unproven"
    assert report.proof.reason
    assert report.proof.cases == []
    assert (report.proof.rewrites, report.proof.structures) == (0, 0)
    assert report.ops_after["Attention"] == 2
    assert Path(report.output).exists()


@pytest.mark.parametrize("rule", [rule.code for rule in RULES])
def test_a_disabled_rule_changes_nothing(rule: str, tmp_path: Path) -> None:
    entry = exported("llama/dynamo20")
    path = written(entry.load(), tmp_path)
    report = fuse(path, FuseOptions(disable=(rule,), verify=False), quiet)
    said = {site.decline.code for site in report.sites if site.rule == rule and site.decline}
    assert said <= {"disabled"}  # what it would have fused is said to be left
    assert not any(site.rule == rule and site.status == "fused" for site in report.sites)
    left = {"RMS001": "RMSNormalization", "ROT001": "RotaryEmbedding", "ATT001": "Attention"}
    for code, op in left.items():
        assert (op in report.ops_after) == (code != rule)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (FuseOptions(disable=("XYZ123",)), "--disable XYZ123: no such rule"),
        (FuseOptions(target="tpu"), "--target tpu: no such target"),
        (FuseOptions(opset=17), "--opset 17"),
        (FuseOptions(opset=99), "--opset 99"),
        (FuseOptions(roles={"nothing": "ids"}), "no such input"),
        (FuseOptions(roles={"input_ids": "nothing"}), "no such role"),
    ],
)
def test_options_that_do_not_fit(options: FuseOptions, sentence: str, tmp_path: Path) -> None:
    path = written(exported("llama/dynamo20").load(), tmp_path)
    with pytest.raises(UsageError, match=sentence):
        fuse(path, options, quiet)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("opset", [23, 24, 25])
def test_the_opset_is_the_one_that_was_asked_for(opset: int, tmp_path: Path) -> None:
    path = written(exported("llama/dynamo20").load(), tmp_path)
    report = fuse(path, FuseOptions(opset=opset, verify=opset < 25), quiet)
    assert report.opset_after == opset
    assert (report.opset_before, report.ops_after["Attention"]) == (20, 2)


def test_an_output_is_written_where_it_was_asked_for(tmp_path: Path) -> None:
    path = written(exported("gpt2/dynamo20").load(), tmp_path)
    target = tmp_path / "elsewhere.onnx"
    report = fuse(path, FuseOptions(output=target), quiet)
    assert report.output == str(target)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["elsewhere.onnx", "model.onnx"]


def test_the_input_is_replaced_only_by_force(tmp_path: Path) -> None:
    model = exported("gpt2/dynamo20").load()
    path = written(model, tmp_path)
    with pytest.raises(UsageError, match="force"):
        fuse(path, FuseOptions(output=path), quiet)
    assert path.read_bytes() == model.SerializeToString()
    fuse(path, FuseOptions(output=path, force=True), quiet)
    assert "Attention" in {node.op_type for node in onnx.load(path).graph.node}


def test_nothing_to_find_is_no_failure(tmp_path: Path) -> None:
    path = written(
        parse(
            "(float[b,s,40] x) => (float[b,s,40] y) <float[40,40] w> { h = MatMul(x, w)  y = Relu(h) }"
        ),
        tmp_path,
    )
    report = fuse(path, FuseOptions(), quiet)
    assert report.sites == []
    assert report.proof is not None
    assert report.proof.status == "proven"


def test_progress_names_what_is_done_and_time_is_kept(tmp_path: Path) -> None:
    path = written(exported("gpt2/dynamo20").load(), tmp_path)
    told: list[str] = []
    report = fuse(path, FuseOptions(), told.append)
    assert told[0] == "reading model.onnx"
    assert any(message.startswith("comparing 1/") for message in told)
    assert list(report.seconds) == ["read", "normalize", "raise", "write", "verify"]


# --- nothing wrong is written -------------------------------------------------------------------


def break_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Attention that is made is scaled by 1% too much."""
    plain = Builder.ops

    def wrong(
        self: Builder, op_type: str, inputs: Any, outputs: int, attributes: Any = None, **more: Any
    ) -> Any:
        if op_type == "Attention":
            attributes = {**attributes, "scale": attributes["scale"] * 1.01}
        return plain(self, op_type, inputs, outputs, attributes, **more)

    monkeypatch.setattr(Builder, "ops", wrong)


def test_a_model_that_differs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rewrites' own check is out of order, and the last one catches it."""
    break_scale(monkeypatch)
    monkeypatch.setattr(pipeline.RewriteChecker, "__call__", lambda *_: None)
    path = written(exported("llama/dynamo20").load(), tmp_path)
    with pytest.raises(ModelDiffersError, match="nothing was written") as caught:
        fuse(path, FuseOptions(), quiet)
    report = caught.value.report
    assert report is not None
    assert report.proof is not None
    assert report.proof.status == "differs"
    worst = report.proof.worst
    assert worst is not None
    assert worst.output in str(caught.value)
    assert worst.name in str(caught.value)
    assert report.output == ""
    assert caught.value.exit_code == 1
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_a_rewrite_that_differs_is_undone_and_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_scale(monkeypatch)
    path = written(exported("llama/dynamo20").load(), tmp_path)
    report = fuse(path, FuseOptions(), quiet)
    assert report.proof is not None
    assert report.proof.status == "proven"
    undone = [site for site in report.sites if site.status == "undone"]
    assert {site.rule for site in undone} == {"ATT001"}
    assert len(undone) == 2
    assert report.ops_after["Softmax"] == 2
    assert "Attention" not in report.ops_after
    assert report.ops_after["RMSNormalization"] == 5
    assert len(report.warnings) >= 2
    assert any("undone" in warning for warning in report.warnings)


def test_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    model = parse(
        "(float[b,s,40] x) => (float[b,s,40] y) { h = com.example.Unheard(x)  y = Relu(h) }"
    )
    model.opset_import.add(domain="com.example", version=1)
    path = written(model, tmp_path)
    with pytest.raises(RefusedError) as caught:
        fuse(path, FuseOptions(), quiet)
    assert caught.value.exit_code == 3
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_the_runtime_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Runtime] = []
    plain = Runtime.close

    def close(self: Runtime) -> None:
        closed.append(self)
        plain(self)

    monkeypatch.setattr(Runtime, "close", close)
    break_scale(monkeypatch)
    monkeypatch.setattr(pipeline.RewriteChecker, "__call__", lambda *_: None)
    path = written(exported("gpt2/dynamo20").load(), tmp_path)
    with pytest.raises(ModelDiffersError):
        fuse(path, FuseOptions(), quiet)
    assert closed
