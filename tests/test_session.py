"""The loader: what it takes, what it says of a model, and who runs what; see test_session_fallbacks."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnxgen
from onnxgen.contexts.forms import Encoding
from onnxgen.errors import FileError, UsageError
from tests.context_graphs import corpus_file
from tests.fake_backend import Fake, answers, assert_equal, use_fakes, with_regions

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[n,6] x) => (float[n,4] y, float[n,5] side) {
        h = MatMul(x, w)
        side = Relu(h)
        t = MatMul(side, v)
        y = Tanh(t)
    }"""
REGIONS = {"first": [0, 1], "second": [2, 3]}
rng = np.random.default_rng(8)
X = rng.standard_normal((3, 6)).astype(np.float32)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    return use_fakes(monkeypatch)


def saved(text: str, folder: Path, **weights: Any) -> Path:
    """A model whose weights are these, as a file."""
    model = onnx.parser.parse_model(text)
    for name, values in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    path = folder / "m.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Two matrices, and an output between them."""
    w, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 5), (5, 4)))
    return saved(TEXT, tmp_path, w=w, v=v)


@pytest.mark.parametrize("encoding", ["function", "metadata"])
@pytest.mark.parametrize(
    "regions", [{"all": [0, 1, 2, 3]}, REGIONS, {"second": [2, 3]}, {"first": [0]}]
)
def test_regions_run_on_their_backends(
    plain: Path, fakes: dict[str, Fake], encoding: Encoding, regions: dict[str, list[int]]
) -> None:
    path = with_regions(plain, regions, ["fake:CPU"], encoding)
    session = onnxgen.load(path)
    assert_equal(session.run(None, {"x": X}), answers(plain, {"x": X}))
    assert session.picked == dict.fromkeys(regions, "fake:CPU")
    assert fakes["fake"].runs == len(regions)
    assert_equal(answers(path, {"x": X}), answers(plain, {"x": X}))


@pytest.mark.parametrize(
    ("prefer", "picked"),
    [
        (None, "fake:CPU"),
        (["fake:CPU", "other:CPU"], "fake:CPU"),
        (["other:CPU", "fake:CPU"], "other:CPU"),
        (["other:CPU"], "other:CPU"),
        (["other:GPU"], "original"),
        (["nobody:CPU", "other:CPU"], "other:CPU"),
        ([], "original"),
    ],
)
def test_what_is_preferred_runs(
    plain: Path, fakes: dict[str, Fake], prefer: list[str] | None, picked: str
) -> None:
    path = with_regions(plain, REGIONS, ["fake:CPU", "other:CPU"])
    session = onnxgen.load(path, prefer=prefer)
    assert_equal(session.run(None, {"x": X}), answers(plain, {"x": X}))
    assert session.picked == dict.fromkeys(REGIONS, picked)
    ran = {f"{name}:CPU": fake.runs for name, fake in fakes.items()}
    assert ran == {name: 2 * (name == picked) for name in ran}


def test_a_backend_alone_is_no_list_of_backends(plain: Path) -> None:
    with pytest.raises(UsageError, match="prefer is several backends"):
        onnxgen.load(plain, prefer="openvino:CPU")


def test_outputs_as_they_are_asked_for(plain: Path, fakes: dict[str, Fake]) -> None:
    session = onnxgen.load(with_regions(plain, REGIONS, ["fake:CPU"]))
    y, side = answers(plain, {"x": X})
    for names, wanted in (
        (["side"], [side]),
        (["side", "y"], [side, y]),
        (["y", "y"], [y, y]),
        ([], [y, side]),
    ):
        assert_equal(session.run(names, {"x": X}), wanted)
    for names in (["t"], ["y", ""], ["Y"]):
        with pytest.raises(ValueError, match="there are no outputs"):
            session.run(names, {"x": X})
    assert fakes["fake"].runs == 8


@pytest.mark.parametrize("feeds", [{}, {"X": X}, {"x": X, "w": X}, {"x": X, "h": X}])
@pytest.mark.parametrize("prefer", [None, []])
def test_inputs_that_are_missing_or_unknown(
    plain: Path, fakes: dict[str, Fake], feeds: dict[str, Any], prefer: list[str] | None
) -> None:
    session = onnxgen.load(with_regions(plain, REGIONS, ["fake:CPU"]), prefer=prefer)
    with pytest.raises(ValueError, match="inputs"):
        session.run(None, feeds)


def test_an_array_of_the_caller_stays_theirs(tmp_path: Path, fakes: dict[str, Fake]) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
        g (float[n,6] x) => (float[n,5] y, float[n,6] x, float[6,5] w) { y = MatMul(x, w) }"""
    path = saved(text, tmp_path, w=rng.standard_normal((6, 5)).astype(np.float32))
    session = onnxgen.load(with_regions(path, {"all": [0]}, ["fake:CPU"]))
    x = X.copy()
    found = session.run(None, {"x": x})
    assert_equal(found, answers(path, {"x": X}))
    assert fakes["fake"].runs == 1
    found[1][:] = 0
    found[2][:] = 0
    assert_equal([x], [X])
    assert_equal(session.run(None, {"x": X}), answers(path, {"x": X}))


@pytest.mark.parametrize("encoding", ["function", "metadata"])
@pytest.mark.parametrize("regions", [{"all": [0, 1]}, {"second": [1]}])
def test_inputs_that_are_initializers_too(
    tmp_path: Path, fakes: dict[str, Fake], encoding: Encoding, regions: dict[str, list[int]]
) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
        g (float[n,6] x, float[6,5] w) => (float[n,5] y) { h = MatMul(x, w)  y = Tanh(h) }"""
    own, other = (rng.standard_normal((6, 5)).astype(np.float32) for _ in range(2))
    path = saved(text, tmp_path, w=own)
    session = onnxgen.load(with_regions(path, regions, ["fake:CPU"], encoding))
    assert [each.name for each in session.get_inputs()] == ["x"]
    for feeds in ({"x": X}, {"x": X, "w": other}, {"x": X, "w": own}):
        assert_equal(session.run(None, feeds), answers(path, feeds))
    assert session.picked == dict.fromkeys(regions, "fake:CPU")
    assert fakes["fake"].runs == 3


def test_many_threads_run_one_session(plain: Path, fakes: dict[str, Fake]) -> None:
    session = onnxgen.load(with_regions(plain, REGIONS, ["fake:CPU"]))
    feeds = [{"x": X * number} for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda feed: session.run(None, feed), feeds))
    for feed, each in zip(feeds, found, strict=True):
        assert_equal(each, answers(plain, feed))
    assert fakes["fake"].runs == 80


def test_a_model_without_contexts(plain: Path) -> None:
    session = onnxgen.load(plain, prefer=["openvino:CPU"])
    assert session.choices == []
    assert session.picked == {}
    assert_equal(session.run(["side"], {"x": X}), answers(plain, {"x": X})[1:])


def test_regions_that_nodes_pass_through(tmp_path: Path, fakes: dict[str, Fake]) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
        g (float[n,6] x) => (float[n,6] y, float[n,6] z) {
            a = Relu(x)  b = Exp(x)  c = Add(a, b)  z = Neg(a)  y = Mul(c, z)
        }"""
    path = saved(text, tmp_path)
    for regions in ({"r": [0, 3]}, {"r": [0, 3], "s": [1, 2]}, {"r": [2, 4], "s": [0]}):
        for encoding in ("function", "metadata"):
            session = onnxgen.load(with_regions(path, regions, ["fake:CPU"], encoding))
            assert_equal(session.run(None, {"x": X}), answers(path, {"x": X}))
            assert session.picked == dict.fromkeys(regions, "fake:CPU")


@pytest.mark.parametrize(
    "export",
    ["llama/dynamo20-fp16", "whisper_decoder/dynamo20", "bert/torchscript", "vit/dynamo20"],
)
def test_inputs_and_outputs_are_described_as_by_onnx_runtime(export: str, tmp_path: Path) -> None:
    path = corpus_file(export, tmp_path)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    theirs = ort.InferenceSession(path, options)
    ours = onnxgen.load(path)
    for one, other in (
        (ours.get_inputs(), theirs.get_inputs()),
        (ours.get_outputs(), theirs.get_outputs()),
    ):
        assert [(each.name, each.type, list(each.shape)) for each in one] == [
            (each.name, each.type, list(each.shape)) for each in other
        ]


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    empty, text = tmp_path / "empty.onnx", tmp_path / "text.onnx"
    empty.touch()
    text.write_text("no model")
    for path in (tmp_path, tmp_path / "absent.onnx", empty, text):
        with pytest.raises(FileError, match=path.name):
            onnxgen.load(path)


def test_what_is_saved_is_time(plain: Path) -> None:
    """Neither onnx-ir nor, where nothing is left for it, ONNX Runtime are imported."""
    pytest.importorskip("openvino")
    path = plain.with_name("added.onnx")
    onnxgen.add_contexts(plain, ["openvino:CPU"], output=path)
    code = f"""
import sys, numpy, onnxgen
session = onnxgen.load({str(path)!r}, prefer=sys.argv[1:])
session.run(None, {{"x": numpy.zeros((2, 6), numpy.float32)}})
print(session.picked["all"], *(name for name in ("onnx_ir", "onnxruntime") if name in sys.modules))
"""
    for prefer, said in ((["openvino:CPU"], "openvino:CPU"), ([], "original onnxruntime")):
        command = [sys.executable, "-c", code, *prefer]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == said
