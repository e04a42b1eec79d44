"""`onnxgen context`, as a user runs it: OpenVINO and ONNX Runtime compile, and the nodes stay."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from click.testing import CliRunner, Result

import onnxgen
from onnxgen.backends.openvino import OpenVINO
from onnxgen.backends.registry import named
from onnxgen.cli import main
from onnxgen.compiling import CompiledBy
from tests.context_graphs import corpus_file

BOTH = ("--backend", "openvino:CPU", "--backend", "ort:cpu")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["context", *map(str, words)])


def told(*words: object) -> dict[str, Any]:
    """What a command says as JSON."""
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document["contexts"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export, and what both backends compiled of it, for tests that only read."""
    place = tmp_path_factory.mktemp("contexts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONNXGEN_CONFIG", str(place / "config"))
        patch.setenv("ONNXGEN_CACHE", str(place / "cache"))
        model = corpus_file("llama/dynamo20", place).rename(place / "model.onnx")
        result = run("add", model, *BOTH, "--encoding", "function")
    assert result.exit_code == 0, result.output
    assert "openvino:CPU ✓ proven: 28 cases" in result.stdout
    assert "ort:cpu ✓ proven: 28 cases" in result.stdout
    return place


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may change, with the trust of whoever added it."""
    for name in ("model.onnx", "model.context.onnx"):
        shutil.copy(folder / name, tmp_path / name)
    monkeypatch.setenv("ONNXGEN_CONFIG", str(folder / "config"))
    monkeypatch.setenv("ONNXGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path


def feeds() -> dict[str, Any]:
    caches = {
        f"past_key_values.{layer}.{kind}": np.zeros((1, 3, 0, 48), np.float32)
        for layer in range(2)
        for kind in ("key", "value")
    }
    ids, mask = np.arange(5)[None], np.ones((1, 5), np.int64)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": ids, **caches}


def test_plain_onnx_runtime_runs_the_original_nodes(here: Path) -> None:
    one, other = (
        ort.InferenceSession(here / name).run(None, feeds())
        for name in ("model.onnx", "model.context.onnx")
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("backend", ["openvino:CPU", "ort:cpu"])
def test_the_loader_runs_what_was_compiled(here: Path, backend: str) -> None:
    session = onnxgen.load(here / "model.context.onnx", prefer=[backend])
    assert session.picked == {"all": backend}
    wanted = ort.InferenceSession(here / "model.onnx").run(["logits"], feeds())[0]
    found = session.run(["logits"], feeds())[0]
    assert np.abs(found - wanted).max() < 1e-4
    assert backend == "ort:cpu" or not np.array_equal(found, wanted)  # other kernels did it


def test_weights_are_there_once(here: Path) -> None:
    held = told("list", here / "model.context.onnx")["held"]
    before = (here / "model.onnx").stat().st_size
    after = (here / "model.context.onnx").stat().st_size
    assert {each["backend"] for each in held} == {"openvino:CPU", "ort:cpu"}
    assert after <= before * 1.01 + sum(each["bytes"] for each in held)
    assert all(each["given"] >= 16 and each["inside_bytes"] < 2000 for each in held)


def test_strip_gives_back_the_original(here: Path) -> None:
    assert run("strip", here / "model.context.onnx", "-o", here / "back.onnx").exit_code == 0
    assert run("strip", here / "model.context.onnx", "--backend", "ort:cpu").exit_code == 0
    one = told("list", here / "model.context.stripped.onnx")["held"]
    assert [each["backend"] for each in one] == ["openvino:CPU"]
    back = onnx.load(here / "back.onnx")
    model = ir.to_proto(ir.from_proto(onnx.load(here / "model.onnx")))  # as every file of ours
    assert [n.SerializeToString() for n in back.graph.node] == [
        n.SerializeToString() for n in model.graph.node
    ]
    assert back.ir_version == model.ir_version
    assert list(back.opset_import) == list(model.opset_import)
    assert list(back.functions) == list(model.functions)


def test_the_other_form_holds_the_same(here: Path) -> None:
    first = told("list", here / "model.context.onnx")
    there = here / "there.onnx"
    assert (
        run("convert", here / "model.context.onnx", "--to", "metadata", "-o", there).exit_code == 0
    )
    second = told("list", there)
    assert (first["encoding"], second["encoding"]) == ("function", "metadata")
    assert (first["places"], first["held"]) == (second["places"], second["held"])
    assert onnxgen.load(there, prefer=["openvino:CPU"]).picked == {"all": "openvino:CPU"}
    assert run("convert", there, "--to", "function", "-o", here / "back.onnx").exit_code == 0
    assert (here / "back.onnx").read_bytes() == (here / "model.context.onnx").read_bytes()


def test_check_says_what_would_run_it_and_why_not(here: Path, monkeypatch: Any) -> None:
    model = here / "model.context.onnx"
    picked = {each["backend"]: each["picked"] for each in told("check", model)["held"]}
    assert picked == {"openvino:CPU": True, "ort:cpu": False}
    assert run("check", model, "--expect", "openvino:CPU").exit_code == 0
    other = run("check", model, "--expect", "ort:cpu")
    assert (other.exit_code, "--expect ort:cpu" in other.stderr) == (5, True)
    assert run("check", model, "--prefer", "ort:cpu", "--expect", "ort:cpu").exit_code == 0
    hashes = [each["blob"] for each in told("check", model)["held"]]
    monkeypatch.setenv("ONNXGEN_CONFIG", str(here / "nobody"))
    reasons = {each["reason"] for each in told("check", model)["held"]}
    assert reasons == {
        f"its blob {each[:12]}… is not trusted (see --trust, trust=)" for each in hashes
    }
    (here / "trusted.txt").write_text(f"# mine\n{hashes[1]} by hand\n")
    found = told("check", model, "--trust", here / "trusted.txt")["held"]
    assert [each["picked"] for each in found] == [False, True]


def test_a_backend_that_is_added_again_replaces_its_own(here: Path) -> None:
    model = here / "model.context.onnx"
    assert run("add", model, "--backend", "ort:cpu", "-o", model, "--force").exit_code == 0
    held = told("list", model)["held"]
    assert [each["backend"] for each in held] == ["openvino:CPU", "ort:cpu"]
    refused = run("add", model, "--backend", "ort:cpu", "--region", "attention")
    assert refused.exit_code == 3
    assert "region 'attention.0' overlaps with one that openvino:CPU compiled" in refused.stderr


def test_blobs_lie_beside_the_model_where_that_is_asked_for(here: Path) -> None:
    out = here / "out"
    out.mkdir()
    words = ("--region", "attention", "--encoding", "metadata", "--blob", "file")
    result = run("add", here / "model.onnx", *BOTH, *words, "-o", out / "m.onnx")
    assert result.exit_code == 0, result.output
    held = told("list", out / "m.onnx")["held"]
    names = {f"m.{each['blob'][:12]}.blob" for each in held}
    assert {path.name for path in out.iterdir()} == {"m.onnx", *names}
    assert onnxgen.load(out / "m.onnx", prefer=["ort:cpu"]).picked == {
        "attention.0": "ort:cpu",
        "attention.1": "ort:cpu",
    }
    gone = held[0]["backend"]
    (out / f"m.{held[0]['blob'][:12]}.blob").unlink()
    reasons = {each["reason"] for each in told("check", out / "m.onnx", "--prefer", gone)["held"]}
    assert any("its blob cannot be read" in reason for reason in reasons)
    ort.InferenceSession(out / "m.onnx").run(None, feeds())  # nobody else misses it


def test_layers_that_are_alike_share_one_blob(here: Path, tmp_path: Path) -> None:
    from tests.large_decoder import Sizes, write_decoder

    (tmp_path / "deep").mkdir()
    model = write_decoder(tmp_path / "deep", Sizes(layers=5))
    assert CliRunner().invoke(main, ["fuse", str(model), "--no-verify"]).exit_code == 0
    fused = model.with_name("model.fused.onnx")
    result = run("add", fused, *BOTH, "--region", r"layers\.\d+")
    assert result.exit_code == 0, result.output
    held = told("list", model.with_name("model.fused.context.onnx"))["held"]
    for backend in ("openvino:CPU", "ort:cpu"):
        blobs = [each["blob"] for each in held if each["backend"] == backend]
        assert len(blobs) == 5
        assert len(set(blobs[1:])) == 1
    assert "(4 regions): 25 nodes each" in result.stdout


def test_other_commands_drop_what_was_compiled_with_a_word(here: Path) -> None:
    model = str(here / "model.context.onnx")
    for command in ("fuse", "to-paged"):
        result = CliRunner().invoke(main, [command, model, "--verify", "quick"])
        assert result.exit_code == 0, result.output
        assert "what openvino:CPU, ort:cpu compiled is dropped" in " ".join(result.stdout.split())
    for path in (here / "model.context.fused.onnx", here / "model.context.paged" / "model.onnx"):
        assert told("list", path)["held"] == []
        assert run("add", path, "--backend", "ort:cpu", "--verify", "quick").exit_code == 0
    said = CliRunner().invoke(main, ["inspect", model]).stdout
    assert "compiled by  openvino:CPU, ort:cpu" in said
    same = CliRunner().invoke(
        main, ["verify", model, str(here / "model.onnx"), "--verify", "quick"]
    )
    assert same.exit_code == 0, same.output


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("--backend", "none:CPU"), 2, "no backend has this name (known are"),
        (("--backend", "ort"), 2, "names no device"),
        (("--backend", "openvino:MOON"), 3, "OpenVINO has no device 'MOON' here"),
        (("--backend", "ort:MoonExecutionProvider"), 3, "MoonExecutionProvider"),
        (("--backend", "ort:cpu", "--region", "["), 2, "regular expression"),
        (("--backend", "ort:cpu", "--region", "nowhere"), 2, "nowhere"),
        (("--backend", "ort:cpu", "--verify", "layers"), 2, "a blob cannot be cut"),
        (("--backend", "ort:cpu", "-o", "model.onnx"), 2, "is the input itself"),
        (("--backend", "ort:cpu", "-o", "no/where.onnx"), 4, "there is no folder"),
        (("--backend", "ort:cpu", "--role", "nothing=ids"), 2, "nothing"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(
    words: tuple[str, ...], code: int, sentence: str, here: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(here)
    before = sorted(path.name for path in here.iterdir())
    result = run("add", "model.onnx", *words)
    assert (result.exit_code, sentence in result.stderr) == (code, True), result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in here.iterdir()) == before


def test_a_backend_whose_package_is_missing_compiles_nothing(here: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    for cached in ("_core", "_identity", "_settings"):
        getattr(__import__("onnxgen.backends.openvino", fromlist=[cached]), cached).cache_clear()
    result = run("add", here / "model.onnx", "--backend", "openvino:CPU")
    assert result.exit_code == 3
    assert "the extra 'openvino' brings it" in result.stderr
    session = onnxgen.load(here / "model.context.onnx", prefer=["openvino:CPU"])
    assert session.picked == {"all": "original"}
    assert "OpenVINO is not installed" in session.choices[0].passed[0].reason
    assert session.run(["logits"], feeds())[0].shape == (1, 5, 131)


def test_a_backend_that_is_wrong_is_never_written(here: Path, monkeypatch: Any) -> None:
    """Compiling multiplies a weight: both ways of compiling are wrong, and are seen to be."""
    import dataclasses

    from onnxgen import compiling

    real = compiling.part_of

    def damaged(*args: Any) -> Any:
        part = real(*args)
        for node in part.model.graph.node:
            if node.op_type == "Sigmoid":
                node.op_type = "HardSigmoid"
        return dataclasses.replace(part)

    monkeypatch.setattr(compiling, "part_of", damaged)
    ways = []
    monkeypatch.setattr(
        CompiledBy, "next_way", lambda self, o=CompiledBy.next_way: ways.append(o(self)) or ways[-1]
    )
    trusted = (Path(__import__("os").environ["ONNXGEN_CONFIG"]) / "trusted").read_text()
    result = run(
        "add",
        here / "model.onnx",
        "--backend",
        "openvino:CPU",
        "--blob",
        "file",
        "-o",
        here / "x.onnx",
    )
    assert result.exit_code == 1
    assert "run by openvino:CPU it differs: output " in result.stderr
    assert ways[-1] is False
    assert sorted(path.name for path in here.glob("x*")) == []
    assert (Path(__import__("os").environ["ONNXGEN_CONFIG"]) / "trusted").read_text() == trusted


def test_a_damaged_table_is_a_sentence_and_strip_mends_it(here: Path) -> None:
    model = onnx.load(here / "model.context.onnx")
    next(p for p in model.metadata_props if p.key == "onnxgen.contexts").value = "{"
    onnx.save(model, here / "bad.onnx")
    for command in ("list", "check"):
        result = run(command, here / "bad.onnx")
        assert (result.exit_code, "its table is no JSON" in result.stderr) == (4, True)
    session = onnxgen.load(here / "bad.onnx")
    assert session.picked == {}
    assert session.run(["logits"], feeds())[0].shape == (1, 5, 131)
    assert run("strip", here / "bad.onnx", "-o", here / "good.onnx").exit_code == 0
    assert told("list", here / "good.onnx")["places"] == []


@pytest.mark.parametrize(
    ("command", "function"), [("add", onnxgen.add_contexts), ("check", onnxgen.check_contexts)]
)
def test_every_option_is_a_keyword_in_python(command: str, function: Any) -> None:
    group = main.commands["context"]
    assert isinstance(group, click.Group)
    shell = {"json", "quiet", "verbose", "expect"}
    options = {
        max(each.opts, key=len).removeprefix("--").replace("-", "_")
        for each in group.commands[command].params
        if isinstance(each, click.Option)
    }
    assert options - shell == {*inspect.signature(function).parameters} - {"model"}


def test_the_built_in_backends_are_known() -> None:
    assert isinstance(named("openvino"), OpenVINO)
    assert named("ort").devices()[0] == "cpu"
