"""Verification by layers: the models cut down alike, and every mistake still seen."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from onnxgen import pipeline, pipeline_paged
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.roles import find_roles
from onnxgen.cli import main
from onnxgen.errors import ModelDiffersError
from onnxgen.model_io import read_model
from onnxgen.pipeline import FuseOptions
from onnxgen.pipeline_paged import PageOptions
from onnxgen.runtime import Runtime
from onnxgen.testing import corpus
from onnxgen.verify.cases import plan
from onnxgen.verify.compare import verify_models
from onnxgen.verify.joints import find_joints
from onnxgen.verify.layers import shorten
from onnxgen.verify.opened import Source
from onnxgen.verify.side import Side
from tests.graphs import parse
from tests.large_decoder import Sizes, write_decoder

LAYERS = 5
SIZES = Sizes(layers=LAYERS)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime(threads=1) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = write_decoder(tmp_path_factory.mktemp("decoder"), SIZES)
    output = path.with_name("fused.onnx")
    options = FuseOptions(output=output, budget="layers")
    report = pipeline.fuse(path, options, lambda message: None)
    assert report.proof is not None
    assert (report.proof.status, report.proof.budget) == ("proven", "layers")
    # Attention and MLP of every layer, the last norm, the head: one of each kind.
    assert (report.proof.layers, report.proof.layers_run) == (2 * LAYERS + 2, 4)
    return path, output


def joints(model: ir.Model) -> list[str]:
    roles = find_roles(model)
    return [str(v.name) for v in find_joints(model.graph, Facts(model.graph, roles))]


def answers(
    runtime: Runtime, source: Source, feeds: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    side = Side(runtime, source, as_written=True, packed=False)
    side.load()
    try:
        return side.run(feeds)
    finally:
        side.unload()


def test_what_is_left_is_the_model_of_one_layer(
    fused: tuple[Path, Path], tmp_path: Path, runtime: Runtime
) -> None:
    """The first layer's own weights, and nothing of the others."""
    short = shorten(*fused, find_roles(read_model(fused[0])))
    one = write_decoder(tmp_path, Sizes(layers=1))
    weights = {t.name: t for t in onnx.load(fused[0]).graph.initializer}
    model = onnx.load(one)
    for tensor in model.graph.initializer:
        if tensor.name in weights and not tensor.name.startswith("constant"):
            tensor.CopyFrom(weights[tensor.name])
    rng = np.random.default_rng(0)
    feeds = {
        "input_ids": rng.integers(0, 128, (2, 3)),
        "attention_mask": np.ones((2, 7), np.int64),
        "position_ids": np.arange(4, 7)[None].repeat(2, 0),
        **{
            f"past.0.{kind}": rng.standard_normal((2, 2, 4, 16), np.float32)
            for kind in ("key", "value")
        },
    }
    wanted = answers(runtime, model.SerializeToString(), feeds)
    for source in (short.original, short.rewritten):
        found = answers(runtime, source, feeds)
        assert list(found) == ["logits", "present.0.key", "present.0.value"]
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-5)


Damage = Callable[[onnx.ModelProto], None]


def last(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == op][-1]


def scale(model: onnx.ModelProto) -> None:
    (found,) = [each for each in last(model, "Attention").attribute if each.name == "scale"]
    found.f *= 1.01


def epsilon(model: onnx.ModelProto) -> None:
    norms = [node for node in model.graph.node if node.op_type == "RMSNormalization"]
    (found,) = [each for each in norms[-2].attribute if each.name == "epsilon"]
    found.f = 1e-2


def causal(model: onnx.ModelProto) -> None:
    node = last(model, "Attention")
    node.input[3] = ""
    node.attribute.append(onnx.helper.make_attribute("is_causal", 1))


def crossed_weights(model: onnx.ModelProto) -> None:
    """The last layer's queries are made by the layer's before."""
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            if name == f"layers.{LAYERS - 1}.q":
                node.input[at] = f"layers.{LAYERS - 2}.q"


def crossed_caches(model: onnx.ModelProto) -> None:
    node = last(model, "Attention")
    node.input[4] = f"past.{LAYERS - 2}.key"


def skipped_layer(model: onnx.ModelProto) -> None:
    """The last MLP adds to what came before its attention."""
    adds = [node for node in model.graph.node if node.op_type == "Add"]
    assert adds[-1].input[0] in adds[-2].output
    adds[-1].input[0] = adds[-2].input[0]


@pytest.mark.parametrize(
    "damage", [scale, epsilon, causal, crossed_weights, crossed_caches, skipped_layer]
)
def test_a_mistake_in_the_last_layer_is_seen(
    fused: tuple[Path, Path], tmp_path: Path, runtime: Runtime, damage: Damage
) -> None:
    model = onnx.load(fused[1], load_external_data=False)
    before = model.SerializeToString()
    damage(model)
    assert model.SerializeToString() != before
    path = fused[1].with_name(f"{damage.__name__}.onnx")
    path.write_bytes(model.SerializeToString())
    proof = verify_models(fused[0], path, budget="layers", runtime=runtime)
    assert proof.status == "differs", damage.__name__
    assert proof.layers_run > 4


def test_weights_that_are_not_the_originals_are_run(
    fused: tuple[Path, Path], tmp_path: Path, runtime: Runtime
) -> None:
    """Copied, they are compared by their contents; one other number makes a layer another kind."""
    for path in (fused[1], fused[0].with_name("model.data")):
        shutil.copy(path, tmp_path / path.name)
    copy = tmp_path / fused[1].name
    proof = verify_models(fused[0], copy, budget="layers", runtime=runtime)
    assert (proof.status, proof.layers_run) == ("proven", 4)
    place = next(
        {each.key: int(each.value) for each in tensor.external_data if each.key != "location"}
        for tensor in onnx.load(copy, load_external_data=False).graph.initializer
        if tensor.name == f"layers.{LAYERS - 1}.down"
    )
    data = np.memmap(tmp_path / "model.data", np.float32, "r+", place["offset"], (8,))
    data[3] += 1
    data.flush()
    proof = verify_models(fused[0], copy, budget="layers", runtime=runtime)
    assert proof.status == "differs"
    assert proof.layers_run > 4


def test_a_hidden_state_that_is_an_output_stays(runtime: Runtime, tmp_path: Path) -> None:
    """A layer whose result is answered is not taken out."""
    path = write_decoder(tmp_path, Sizes(layers=3))
    model = onnx.load(path, load_external_data=False)
    (name,) = [
        n.output[0]
        for n in model.graph.node
        if n.name.startswith("/model/layers.1/mlp/Add") and n.input[1].endswith("_output_0")
    ][-1:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, ["B", "S", 96]))
    path.write_bytes(model.SerializeToString())
    roles = find_roles(read_model(path))
    short = shorten(path, path, roles)
    assert (short.layers, short.kept) == (9, 6)
    assert name in answers(
        runtime,
        short.original,
        {
            "input_ids": np.ones((1, 2), np.int64),
            "attention_mask": np.ones((1, 2), np.int64),
            "position_ids": np.arange(2)[None],
            **{
                each.name: np.zeros((1, 2, 0, 16), np.float32)
                for each in onnx.ModelProto.FromString(short.original[0]).graph.input
                if each.name.startswith("past")
            },
        },
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama/dynamo20", 8),  # two a layer, the embedding, the last norm and its weight, the head
        ("gptj/torchscript", 7),  # attention and MLP side by side: one a layer
        ("bert/dynamo20", 12),  # norms behind the sums: the sums and the norms
        ("whisper_encoder/dynamo20", 12),
    ],
)
def test_joints_of_exports(name: str, count: int, tmp_path: Path) -> None:
    (entry,) = corpus(name)
    onnx.save(entry.load(), tmp_path / "model.onnx")
    assert len(joints(read_model(tmp_path / "model.onnx"))) == count


def test_what_avoids_a_value_makes_it_no_joint() -> None:
    """A long way round: `c` and `d` are passed by, `b` and `e` are not."""
    model = parse(
        """
        (int64[b,s] input_ids) => (float[b,s,16] y) {
            x = Gather(table, input_ids)
            b = Relu(x)
            c = Relu(b)
            d = Relu(c)
            e = Add(d, b)
            y = MatMul(e, w)
        }
        """,
        weights={
            "table": np.ones((9, 16), np.float32),
            "w": np.ones((16, 16), np.float32),
        },
    )
    assert joints(ir.from_proto(model)) == ["x", "b", "e", "y"]


@pytest.mark.parametrize("flavor", ["portable", "ort"])
def test_paged_models_are_cut_down_too(flavor: str, tmp_path: Path) -> None:
    path = write_decoder(tmp_path, Sizes(layers=4))
    paged = pipeline_paged.PagedOptions(flavor=flavor)
    options = PageOptions(
        output=tmp_path / "paged",
        paged=paged,
        budget="layers",
        max_length=2048 if flavor == "ort" else None,
    )
    report = pipeline_paged.to_paged(path, options, lambda message: None)
    assert report.proof is not None
    assert (report.proof.status, report.proof.layers) == ("proven", 10)
    assert 4 <= report.proof.layers_run <= 6


def test_a_mistake_in_the_last_layer_of_a_paged_model_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_decoder(tmp_path, Sizes(layers=4))
    finish = pipeline_paged.onnx_target.finish

    def broken(model: ir.Model, version: str, target: str) -> None:
        finish(model, version, target)
        nodes = [node for node in model.graph if node.op_type == "PagedAttention"]
        scale = nodes[-1].attributes["scale"].as_float()
        nodes[-1].attributes["scale"] = ir.AttrFloat32("scale", scale * 1.05)

    monkeypatch.setattr(pipeline_paged.onnx_target, "finish", broken)
    options = PageOptions(output=tmp_path / "paged", budget="layers")
    with pytest.raises(ModelDiffersError):
        pipeline_paged.to_paged(path, options, lambda message: None)
    assert not (tmp_path / "paged").exists()


# Quick, and the command.


def test_quick_is_a_handful_and_says_what_it_left(fused: tuple[Path, Path]) -> None:
    assert len(plan(find_roles(read_model(fused[0])), [64], quick=True)) == 5
    result = CliRunner().invoke(main, ["verify", *map(str, fused), "--verify", "quick"])
    assert result.exit_code == 0
    assert "Proven: 5 cases run" in result.stdout
    assert "not run: lengths at which behaviour may switch, and greedy steps" in result.stdout


def test_layers_say_what_was_run(fused: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(main, ["verify", *map(str, fused), "--verify", "layers"])
    assert result.exit_code == 0
    assert "4 of 12 parts run, one of each kind; 8 are like these" in result.stdout


def test_a_budget_and_none_exclude_one_another(fused: tuple[Path, Path]) -> None:
    for command in ("fuse", "to-paged"):
        words = [command, str(fused[0]), "--no-verify", "--verify", "quick"]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 2
        assert "--no-verify and --verify quick exclude one another" in result.stderr
