"""onnxgen from Python: the command's words, any form of a model, nothing changed, nothing left."""

from __future__ import annotations

import gc
import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnxgen
from onnxgen import api, model_forms, staging
from onnxgen.cli import main
from onnxgen.errors import FileError, ModelDiffersError, RefusedError, UsageError
from onnxgen.report.values import Proof
from onnxgen.testing import corpus
from tests.graphs import assert_same_graph, assert_same_numbers, parse

NORM = (
    "(float[b,s,40] x) => (float[b,s,40] y) <float[40] w>"
    "{ q = Mul(x, x)  m = ReduceMean(q, [-1])  e = Add(m, 0.003)  r = Sqrt(e)  n = Div(x, r)"
    "  y = Mul(n, w) }"
)
FUSED = (
    "(float[b,s,40] x) => (float[b,s,40] y) <float[40] w>"
    "{ y = RMSNormalization<axis = -1, epsilon = 0.003, stash_type = 1>(x, w) }"
)
# What is for a shell: the report is a value here, and several models are a loop.
FOR_A_SHELL = {"report", "json", "expect", "baseline", "out-dir", "jobs", "verbose", "quiet"}


class Program:
    """What torch.onnx.export returns, as far as it is looked at."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Temporary files go to a folder of the test's, which is empty in the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


@pytest.fixture
def path(tmp_path: Path) -> Path:
    place = tmp_path / "model.onnx"
    place.write_bytes(parse(NORM).SerializeToString())
    return place


FORMS: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "str": str,
    "proto": onnx.load,
    "ir": lambda path: ir.load(path),
    "program": lambda path: Program(ir.load(path)),
    "result": lambda path: onnxgen.fuse(path, disable=["RMS001"]),
    "written result": lambda path: onnxgen.fuse(
        path, disable=["RMS001"], output=path.with_name("first.onnx")
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_model_is_fused_and_left_as_it_is(form: str, path: Path) -> None:
    model = FORMS[form](path)
    files = set(path.parent.iterdir())
    held = getattr(model, "model", model)
    before = ir.to_proto(held) if isinstance(held, ir.Model) else held
    told = before.SerializeToString() if isinstance(before, onnx.ModelProto) else None
    result = onnxgen.fuse(model)
    assert_same_graph(result.model, parse(FUSED))
    assert result.path is None
    assert result.report.output == ""
    assert set(path.parent.iterdir()) == files, "nothing is left on the disk"
    if told is not None:
        after = ir.to_proto(held) if isinstance(held, ir.Model) else held
        assert after.SerializeToString() == told
    assert "proven, rms_norm 1 of 1, nodes" in repr(result)
    assert onnxgen.verify(model, result).status == "proven"


def test_with_an_output_it_is_written_there(path: Path) -> None:
    output = path.with_name("out.onnx")
    for given in (onnx.load(path), path):
        result = onnxgen.fuse(given, output=output)
        assert result.path == output
        assert result.report.output == str(output)
        assert_same_graph(onnx.load(output), parse(FUSED))
        assert_same_graph(result.model, parse(FUSED))
        assert repr(result).endswith(f"{output}>")
    with pytest.raises(UsageError, match=r"is the input itself: replacing it needs --force"):
        onnxgen.fuse(path, output=path)
    assert onnxgen.fuse(path, output=path, force=True).path == path
    assert_same_graph(onnx.load(path), parse(FUSED))


def test_a_result_outlives_its_files(path: Path, tmp_path: Path) -> None:
    """Weights are those of the model, whoever of the two goes first, and each load is one's own."""
    result = onnxgen.fuse(path)
    gc.collect()
    first, second = result.load(), result.load()
    assert first is not second
    first.graph.outputs[0].name = "renamed"
    saved = result.save(tmp_path / "saved.onnx")
    del result
    gc.collect()
    assert_same_numbers(onnx.load(path), onnx.load(saved))
    weights = {name: v.const_value.numpy() for name, v in second.graph.initializers.items()}
    assert all(np.isfinite(weight).all() for weight in weights.values())


def test_a_model_is_saved_where_there_is_a_folder_only(path: Path, tmp_path: Path) -> None:
    result = onnxgen.fuse(path)
    with pytest.raises(FileError, match="there is no folder"):
        result.save(tmp_path / "nowhere" / "model.onnx")


# --- large models -------------------------------------------------------------------------------


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 8 KB are as full as others of 2 GB."""
    monkeypatch.setattr(staging, "MAX_FILE", 8000)
    monkeypatch.setattr(model_forms, "MAX_FILE", 8000)


def large() -> onnx.ModelProto:
    text = (
        "(float[b,s,40] x) => (float[b,s,80] y) <float[40] w, float[40,80] m>"
        "{ q = Mul(x, x)  u = ReduceMean(q, [-1])  e = Add(u, 0.003)  r = Sqrt(e)  n = Div(x, r)"
        "  k = Mul(n, w)  y = MatMul(k, m) }"
    )
    return parse(text)


@pytest.mark.usefixtures("small_files")
def test_above_two_gigabytes_weights_lie_beside_the_file(tmp_path: Path) -> None:
    original = tmp_path / "original.onnx"
    onnx.save(large(), original)
    for model in (ir.from_proto(large()), Program(ir.from_proto(large()))):
        result = onnxgen.fuse(model, output=tmp_path / "out.onnx")
        assert [each.suffix for each in tmp_path.glob("out.*.data")] == [".data"]
        assert isinstance(result.load().graph.initializers["m"].const_value, ir.ExternalTensor)
        with pytest.raises(UsageError, match=r"use Result.path, load\(\) or save\(\)"):
            _ = result.model
        assert onnxgen.verify(original, result).status == "proven"
        inside = onnxgen.fuse(model)
        with pytest.raises(UsageError, match="more than 2 GB"):
            _ = inside.model
        saved = inside.save(tmp_path / "saved.onnx")
        assert onnxgen.verify(original, saved).status == "proven"
        for each in tmp_path.glob("*.data"):
            each.unlink()


def test_weights_in_files_are_referred_to_where_they_lie(tmp_path: Path) -> None:
    """An onnx_ir.Model says in which folder; an onnx.ModelProto does not."""
    place = tmp_path / "model.onnx"
    onnx.save(large(), place, save_as_external_data=True, location="w.bin", size_threshold=64)
    files = set(tmp_path.iterdir())
    result = onnxgen.fuse(ir.load(place))
    assert set(tmp_path.iterdir()) == files
    assert onnxgen.verify(place, result).status == "proven"
    assert set(tmp_path.iterdir()) == files
    written = onnxgen.fuse(ir.load(place), output=tmp_path / "out.onnx")
    assert list(tmp_path.glob("*.data")) == [], "the file is referred to, not copied"
    assert onnxgen.verify(place, written).status == "proven"
    assert sum(len(t.raw_data) for t in written.model.graph.initializer) > 40 * 80 * 4
    without = onnx.load(place, load_external_data=False)
    with pytest.raises(UsageError, match="does not say in which folder"):
        onnxgen.fuse(without)
    os.chmod(tmp_path, 0o500)
    try:
        if not os.access(tmp_path, os.W_OK):  # not for root
            assert onnxgen.fuse(ir.load(place)).report.proof is not None
    finally:
        os.chmod(tmp_path, 0o700)


# --- what goes wrong ----------------------------------------------------------------------------


def test_failures_are_the_commands_and_carry_its_report(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(*_: Any, **__: Any) -> Proof:
        return Proof("differs", 1e-4, reason="output 'y' differs")

    monkeypatch.setattr("onnxgen.pipeline.verify_models", differs)
    with pytest.raises(onnxgen.ModelDiffersError) as caught:
        onnxgen.fuse(onnx.load(path))
    assert onnxgen.ModelDiffersError is ModelDiffersError
    assert str(caught.value) == "the model: output 'y' differs; nothing was written"
    assert caught.value.report is not None
    assert caught.value.report.input == "the model"
    assert caught.value.report.sites
    with pytest.raises(onnxgen.OnnxgenError, match=r"model.onnx: output 'y' differs"):
        onnxgen.fuse(path)


def test_files_that_are_missing_or_none_are_said(tmp_path: Path) -> None:
    with pytest.raises(onnxgen.FileError, match=r"none.onnx does not exist"):
        onnxgen.fuse(tmp_path / "none.onnx")
    with pytest.raises(onnxgen.FileError, match=r"the model is no ONNX model: it holds no graph"):
        onnxgen.fuse(onnx.ModelProto(ir_version=10))
    for nothing in (3, None, b"bytes", Program(3)):
        with pytest.raises(onnxgen.UsageError, match="a model is a path"):
            onnxgen.fuse(nothing)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "tensorrt"}, "target is 'tensorrt': it is one of onnx, ort"),
        ({"padding": "left"}, "padding is 'left'"),
        ({"verify": "all"}, "verify is 'all'"),
        ({"opset": 0}, "opset is 0"),
        ({"max_length": -1}, "max_length is -1"),
        ({"disable": "GEL001"}, r"disable is several words: \['GEL001'\]"),
        ({"disable": ["NIX001"]}, "no such rule"),
        ({"no_verify": True, "verify": "quick"}, "exclude one another"),
        ({"genai_config": True}, "give a path and an output"),
        ({"rules": ["nowhere.py"]}, "nowhere.py cannot be read"),
    ],
)
def test_arguments_that_do_not_fit_are_said(options: dict[str, Any], said: str, path: Path) -> None:
    with pytest.raises((UsageError, FileError), match=said):
        onnxgen.fuse(path, **options)


# --- to_paged and verify ------------------------------------------------------------------------


def test_paging_from_memory(tmp_path: Path) -> None:
    (entry,) = corpus("llama/dynamo20")
    model = entry.load()
    told = model.SerializeToString()
    result = onnxgen.to_paged(model, verify="quick", block_size=8)
    assert result.report.proof is not None
    assert result.report.proof.status == "proven"
    assert "block_table" in {value.name for value in result.model.graph.input}
    written = onnxgen.to_paged(model, verify="quick", block_size=8, output=tmp_path / "paged")
    assert written.path == tmp_path / "paged" / "model.onnx"
    assert written.model.SerializeToString() == result.model.SerializeToString()
    assert model.SerializeToString() == told
    checked = onnxgen.to_paged(model, check=True)
    assert checked.report.paging is not None
    assert checked.report.paging.obstacles == []
    with pytest.raises(UsageError, match="only asked"):
        _ = checked.model
    with pytest.raises(RefusedError, match="the model cannot be paged: PAG002") as caught:
        onnxgen.to_paged(parse(NORM))
    assert caught.value.report is not None
    assert caught.value.report.paging is not None
    assert caught.value.report.paging.obstacles


def test_a_comparison_says_what_differs(path: Path) -> None:
    wrong = onnx.load(path)
    (w,) = [each for each in wrong.graph.initializer if each.name == "w"]
    w.raw_data = (np.frombuffer(w.raw_data, np.float32) * 1.1).tobytes()
    proof = onnxgen.verify(path, wrong)
    assert proof.status == "differs"
    assert onnxgen.verify(path, path, verify="quick").status == "proven"


def test_what_is_not_fused_is_explained(path: Path) -> None:
    model = onnx.load(path)
    places = onnxgen.explain(model)
    assert all(place.decline is not None and place.decline.change for place in places)
    with pytest.raises(onnxgen.UsageError, match="no such place"):
        onnxgen.explain(model, site="nowhere")


def test_a_model_in_memory_is_inspected(path: Path) -> None:
    found = onnxgen.inspect(onnx.load(path))
    assert found.parameters == onnxgen.inspect(path).parameters > 0
    assert [port.name for port in found.inputs] == [i.name for i in onnx.load(path).graph.input]


# --- the same words -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fuse", "to-paged", "verify", "explain", "inspect"])
def test_every_option_of_a_command_is_a_keyword(name: str) -> None:
    """Of the same name, with the same default and the same choices."""
    command = main.commands[name]
    function = getattr(api, name.replace("-", "_"))
    keywords = dict(inspect.signature(function).parameters)
    options = {o.opts[-1][2:]: o for o in command.params if isinstance(o, click.Option)}
    assert options.keys() & FOR_A_SHELL
    for word, option in options.items():
        if word in FOR_A_SHELL:
            assert word not in keywords
            continue
        keyword = keywords.pop(word.replace("-", "_"))
        assert keyword.kind is inspect.Parameter.KEYWORD_ONLY
        if option.multiple:
            assert not keyword.default
        elif option.is_flag:
            assert keyword.default is False
        elif isinstance(option.default, str | int):
            assert keyword.default == option.default
        else:
            assert keyword.default is None
        if isinstance(option.type, click.Choice):
            kind = function.__annotations__[keyword.name].removesuffix(" | None")
            assert set(api.get_args(getattr(api, kind))) == set(option.type.choices)
        said = "no_verify, inline, genai_config, force, role, rules"
        assert word.replace("-", "_") in (function.__doc__ or "") + said
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    models = {str(p.name) if p.nargs == 1 else "model" for p in arguments}
    assert set(keywords) == models


def test_the_package_starts_without_heavy_imports() -> None:
    """The child process that runs ONNX Runtime begins with it; each name is there when used."""
    script = (
        "import sys, onnxgen;"
        "heavy = {'onnx', 'onnx_ir', 'numpy', 'onnxscript', 'click', 'onnxruntime'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "assert set(onnxgen.__all__) <= set(dir(onnxgen));"
        "values = [getattr(onnxgen, name) for name in onnxgen.__all__];"
        "assert callable(onnxgen.verify) and callable(onnxgen.fuse);"
        "import onnxgen.verify.compare;"
        "assert callable(onnxgen.verify)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = onnxgen.nothing


def test_types_are_seen_by_a_checker(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(
        "import onnx, onnx_ir, onnxgen\n"
        "result = onnxgen.fuse('a.onnx', target='ort', disable=['GEL001'])\n"
        "reveal_type(result.model)\n"
        "reveal_type(result.report.proof)\n"
        "reveal_type(onnxgen.verify(onnx_ir.load('a'), result))\n"
        "onnxgen.fuse('a.onnx', target='tensorrt')\n"
        "onnxgen.fuse(3)\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file=", "--ignore-missing-imports"]
    environment = {**os.environ, "MYPYPATH": str(Path(onnxgen.__file__).parent.parent)}
    found = subprocess.run(
        [*command, "user.py"], cwd=tmp_path, capture_output=True, text=True, env=environment
    ).stdout
    lines = [line for line in found.splitlines() if line.startswith("user.py")]
    assert len(lines) == 5, found
    assert "ModelProto" in lines[0]
    assert "onnxgen.report.values.Proof | None" in lines[1]
    assert "onnxgen.report.values.Proof" in lines[2]
    assert "incompatible type \"Literal['tensorrt']\"" in lines[3]
    assert "incompatible type" in lines[4]
