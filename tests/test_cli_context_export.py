"""`onnxgen context export`, as a user runs it; what is written is run where its provider is installed."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner, Result

from onnxgen.cli import main
from tests.context_graphs import corpus_file

PROVIDER = "OpenVINOExecutionProvider"
INSTALLED = importlib.util.find_spec("onnxruntime_ep_openvino") is not None
BOTH = ("--backend", "openvino:CPU", "--backend", "ort:cpu")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["context", *map(str, words)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONNXGEN_CONFIG", str(place / "config"))
        patch.setenv("ONNXGEN_CACHE", str(place / "cache"))
        model = corpus_file("llama/dynamo20", place).rename(place / "model.onnx")
        for region, name in (("all", "all.onnx"), ("attention", "parts.onnx")):
            words = ("--region", region, "-o", place / name, "--verify", "quick")
            result = run("add", model, *BOTH, *words)
            assert result.exit_code == 0, result.output
    return place


@pytest.fixture(autouse=True)
def who_added_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXGEN_CONFIG", str(folder / "config"))


def test_a_package_has_a_variant_for_each_backend_and_the_original(
    folder: Path, tmp_path: Path
) -> None:
    result = run("export", folder / "all.onnx", "--package", tmp_path / "p")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert (f"{PROVIDER} ✓ proven: 28 cases" if INSTALLED else "unproven: no provider") in said
    assert "what ort:cpu compiled cannot be exported: ONNX Runtime's CPU looks at no" in said
    component = json.loads((tmp_path / "p" / "model" / "component.json").read_text())
    assert {*component["variants"]} == {"openvino-CPU", "original", f"original-{PROVIDER}"}
    weights = list((tmp_path / "p" / "shared_assets").rglob("weights.data"))
    assert len(weights) == 1
    if not hasattr(ort, "ModelPackageContext"):
        return
    options = ort.ModelPackageOptions(ort.SessionOptions())
    package = ort.ModelPackageContext(str(tmp_path / "p")).select_component("model", options)
    assert package.get_selected_variant_name() == "original"
    names = [each.name for each in package.create_session().get_outputs()]
    assert names == [each.name for each in onnx.load(folder / "model.onnx").graph.output]


def test_a_strangers_blob_is_run_only_where_it_is_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXGEN_CONFIG", str(tmp_path / "nobody"))
    words = ("export", folder / "all.onnx", "--epcontext", "--backend", "openvino:CPU", "-o")
    result = run(*words, tmp_path / "one.onnx")
    assert "is not trusted" in " ".join(result.stdout.split())
    trusted = folder / "config" / "trusted"
    result = run(*words, tmp_path / "two.onnx", "--trust", trusted)
    assert "is not trusted" not in result.stdout
    assert (f"{PROVIDER} ✓ proven" in result.stdout) == INSTALLED


def test_an_epcontext_model_keeps_inputs_and_outputs(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "ep.onnx"
    words = ("--epcontext", "--backend", "openvino:CPU", "-o", out)
    result = run("export", folder / "all.onnx", *words)
    assert result.exit_code == 0, result.output
    model, original = onnx.load(out), onnx.load(folder / "model.onnx")
    assert sum(node.op_type == "EPContext" for node in model.graph.node) == 1
    assert [each.name for each in model.graph.output] == [e.name for e in original.graph.output]
    assert not any(each.domain == "onnxgen.backend" for each in model.functions)


@pytest.mark.parametrize(
    ("model", "words", "code", "sentence"),
    [
        ("all.onnx", (), 2, "give --package DIR, or --epcontext and --backend"),
        ("all.onnx", ("--epcontext",), 2, "--epcontext is for one --backend"),
        ("all.onnx", ("--epcontext", "--backend", "ort:cpu"), 3, "no compatibility string"),
        ("all.onnx", ("--epcontext", "--backend", "x:y"), 2, "holds what openvino:CPU, ort:cpu"),
        ("all.onnx", ("--package", "full"), 4, "full"),
        ("model.onnx", ("--package", "new"), 3, "holds nothing that a package can"),
        ("parts.onnx", ("--epcontext", "--backend", "openvino:CPU"), 3, "--region all"),
        ("parts.onnx", ("--package", "new"), 3, "--region all"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_sentence(
    model: str,
    words: tuple[str, ...],
    code: int,
    sentence: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(folder / model, tmp_path / model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    monkeypatch.chdir(tmp_path)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    result = run("export", model, *words)
    assert (result.exit_code, sentence in result.stderr) == (code, True), result.output
    assert result.stderr.count("\n") == 1
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.mark.skipif(not INSTALLED, reason="needs onnxruntime-ep-openvino")
def test_an_export_that_computes_something_else_is_not_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two weights of one shape trade places."""
    from onnxgen import pipeline_export

    real = pipeline_export.epcontext_model

    def damaged(*args: object) -> onnx.ModelProto:
        model = real(*args)
        shapes: dict[tuple[int, ...], list[onnx.TensorProto]] = {}
        for each in model.graph.initializer:
            shapes.setdefault(tuple(each.dims), []).append(each)
        first, twin = next(each for dims, each in shapes.items() if len(dims) == 2 and each[1:])[:2]
        for node in model.graph.node:
            names = {first.name: twin.name, twin.name: first.name}
            node.input[:] = [names.get(name, name) for name in node.input]
        return model

    monkeypatch.setattr(pipeline_export, "epcontext_model", damaged)
    words = ("--epcontext", "--backend", "openvino:CPU", "-o", tmp_path / "ep.onnx")
    result = run("export", folder / "all.onnx", *words)
    assert result.exit_code == 1, result.output
    assert f"run by {PROVIDER} it differs" in result.stderr
    assert list(tmp_path.iterdir()) == []
