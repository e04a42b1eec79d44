"""The corpus: every stored export grows, loads, runs, and depends on its inputs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from onnxgen import testing
from onnxgen.testing import CorpusEntry, Growth, corpus
from onnxgen.twin import widened
from tests.graphs import runnable

ENTRIES = corpus()
EXPORT = Path(__file__).parent / "corpus" / "export.py"
PINNED = [  # values of one growth: if they change, every stored model changes
    [0.0920298621058464, -0.04097161069512367, -0.1236284077167511],
    [-0.15179744362831116, -0.09585119783878326, 0.08462243527173996],
]


def run(model: onnx.ModelProto, feeds: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    session = open_session(model)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def open_session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        runnable(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def main_output(entry: CorpusEntry) -> int:
    """The index of logits, or of the last hidden state."""
    roles = [output["role"] for output in entry.info["outputs"].values()]
    return next(i for i, role in enumerate(roles) if role in ("logits", "hidden"))


def test_there_is_a_corpus() -> None:
    assert len(ENTRIES) >= 100
    assert {"llama", "qwen3", "mistral", "bert", "whisper_decoder"} <= {e.model for e in ENTRIES}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_runs(entry: CorpusEntry) -> None:
    session = open_session(entry.load())
    index = main_output(entry)
    assert entry.info["runs"], "an export that runs nowhere is no use"
    for batch, new, past in entry.info["runs"]:
        feeds = {name: widened(a) for name, a in entry.feeds(batch, new, past).items()}
        outputs = session.run(None, feeds)
        for output in outputs:
            assert output.dtype.kind != "f" or np.isfinite(output).all()
        changed = dict(feeds)
        for name, described in entry.info["inputs"].items():
            if described["role"] == "ids":
                changed[name] = (feeds[name] + 1) % entry.info["dims"]["vocab"]
            elif described["role"] == "features":
                changed[name] = feeds[name] * -1
        other = session.run([session.get_outputs()[index].name], changed)[0]
        assert np.abs(outputs[index] - other).max() > 1e-2
        if past:  # and on its past
            for name, described in entry.info["inputs"].items():
                if described["role"] in ("past_value", "static_value"):
                    changed[name] = feeds[name] * -1
            again = session.run([session.get_outputs()[index].name], changed)[0]
            assert np.abs(other - again).max() > 1e-2


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_stored_small_and_complete(entry: CorpusEntry) -> None:
    assert entry.path.stat().st_size <= 40 * 1024
    assert {"model", "form", "kind", "torch", "transformers", "dims", "runs"} <= set(entry.info)
    assert (entry.info["model"], entry.info["form"]) == (entry.model, entry.form)
    assert list(entry.info["inputs"]) == [value.name for value in entry.stored.graph.input]
    assert list(entry.info["outputs"]) == [value.name for value in entry.stored.graph.output]
    for tensor in testing.tensors(entry.stored):
        props = {prop.key: prop.value for prop in tensor.metadata_props}
        if testing.GROW in props:
            assert not tensor.raw_data
            assert not tensor.float_data
            assert str(Growth.parse(props[testing.GROW])) == props[testing.GROW]


def test_whole_corpus_is_small() -> None:
    assert sum(entry.path.stat().st_size for entry in ENTRIES) <= 5_000_000


def test_forms_of_a_model_share_their_weights() -> None:
    results = []
    for entry in corpus("llama/*"):
        if entry.form in ("torchscript", "dynamo20", "dynamo23", "transformers"):
            outputs = open_session(entry.load()).run(None, _llama_feeds(entry))
            results.append(outputs[main_output(entry)])
    assert len(results) == 4
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=1e-4)


def _llama_feeds(entry: CorpusEntry) -> dict[str, Any]:
    # The random pasts are drawn in the inputs' order, which differs: draw them by layer here.
    feeds = entry.feeds(2, 4, 3)
    pasts = [n for n, d in entry.info["inputs"].items() if d["role"].startswith("past_")]
    for name in pasts:
        layer = int("".join(c for c in name if c.isdigit()))
        is_value = "value" in name.rsplit(".", 1)[-1]
        generator = np.random.default_rng(2 * layer + is_value)
        feeds[name] = generator.standard_normal(feeds[name].shape).astype(np.float32)
    return feeds


def test_growing_is_the_same_everywhere() -> None:
    growth = Growth("model.layers.0.mlp.down_proj.weight", 0.0, 0.1, (3, 2), (1, 0))
    assert Growth.parse(str(growth)) == growth
    np.testing.assert_allclose(growth.values(), PINNED, rtol=1e-6)
    assert not np.array_equal(growth.values(seed=1), growth.values())


def test_a_part_of_a_growth() -> None:
    whole = Growth("experts.gate_up_proj", 0.0, 0.1, (3, 4, 2))
    part = Growth("experts.gate_up_proj", 0.0, 0.1, (3, 4, 2), (1, 0), "2,1:")
    assert Growth.parse(str(part)) == part
    np.testing.assert_array_equal(part.values(), whole.values()[2, 1:].T)


def test_forms_of_experts_share_their_weights() -> None:
    results = {}
    for entry in corpus("mixtral/*"):
        if "fp16" not in entry.form and not entry.form.startswith("transformers"):
            outputs = open_session(entry.load()).run(None, _llama_feeds(entry))
            results[entry.form] = outputs[main_output(entry)]
    assert {"torchscript-batched", "torchscript-looped", "torchscript-dense"} <= set(results)
    for result in results.values():
        np.testing.assert_allclose(result, results["torchscript-batched"], atol=1e-4)


def test_grow_leaves_other_models_alone() -> None:
    model = testing.grow(testing.read_stored(ENTRIES[0].path))
    data = model.SerializeToString(deterministic=True)
    assert testing.grow(model).SerializeToString(deterministic=True) == data
    assert not any(p.key == testing.GROW for t in testing.tensors(model) for p in t.metadata_props)


def test_load_corpus_model_takes_a_name_or_a_path() -> None:
    entry = corpus("qwen3/dynamo20")[0]
    want = entry.load().SerializeToString(deterministic=True)
    for path in (entry.path, str(entry.path), entry.name):
        got = testing.load_corpus_model(path).SerializeToString(deterministic=True)
        assert got == want
    with pytest.raises(FileNotFoundError):
        testing.load_corpus_model("qwen3/nonsense")


def test_feeds_of_an_unknown_role() -> None:
    info = {"dims": {}, "inputs": {"x": {"role": "?", "shape": ["B"], "dtype": "int64"}}}
    with pytest.raises(ValueError, match="unknown role"):
        testing.make_feeds(info)


def test_demo_is_the_corpus_model(tmp_path: Path) -> None:
    entry = corpus("qwen3/dynamo20")[0]
    demo = Path(testing.__file__).parent / "demo" / "decoder.onnx.xz"
    assert demo.read_bytes() == entry.path.read_bytes(), "copy tests/corpus/qwen3/dynamo20.onnx.xz"
    path = testing.write_demo_model(tmp_path)
    assert path == tmp_path / "demo.onnx"
    outputs = run(onnx.load(path), entry.feeds(2, 4, 3))
    assert np.isfinite(outputs["logits"]).all()


def test_imports_are_light() -> None:
    code = "import sys, onnxgen.testing; print([m for m in ('torch', 'onnxruntime', 'onnx_ir', 'onnxscript') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_failures_are_in_the_readme() -> None:
    failures = json.loads((EXPORT.parent / "failures.json").read_text())
    readme = (EXPORT.parent / "README.md").read_text()
    for cell in failures:
        assert cell in readme, "run: python tests/corpus/export.py --readme"
        assert cell not in {entry.name for entry in ENTRIES}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama/torchscript", "qwen3/dynamo20"])
def test_exporting_again_gives_the_same_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(EXPORT.parent)
    spec = importlib.util.spec_from_file_location("corpus_export", EXPORT)
    assert spec is not None
    assert spec.loader is not None
    export: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = export
    spec.loader.exec_module(export)
    model = next(m for m in export.MODELS if m.name == name.split("/")[0])
    again, _ = export.export(model, name.split("/")[1], model.dims)
    stored = testing.read_stored(EXPORT.parent / f"{name}.onnx.xz")
    assert structure(again) == structure(stored)


def structure(model: onnx.ModelProto) -> list[Any]:
    """Op types, attributes and topology, whatever the names: values are numbered as they come."""
    numbers: dict[str, int] = {}

    def number(name: str) -> int:
        return numbers.setdefault(name, len(numbers)) if name else -1

    rows: list[Any] = [[number(value.name) for value in model.graph.input]]
    for node in model.graph.node:
        attributes = sorted(_attribute(attribute) for attribute in node.attribute)
        inputs = [number(name) for name in node.input]
        rows.append((node.op_type, attributes, inputs, [number(name) for name in node.output]))
    rows.append([number(value.name) for value in model.graph.output])
    rows.append(sorted(Counter((t.data_type, *t.dims) for t in model.graph.initializer).items()))
    return rows


def _attribute(attribute: onnx.AttributeProto) -> tuple[str, bytes]:
    copy = onnx.AttributeProto()
    copy.CopyFrom(attribute)
    copy.t.name = ""
    return attribute.name, copy.SerializeToString(deterministic=True)
