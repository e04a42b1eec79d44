"""Two models that differ: where that starts is said; what no output shows is found inside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from onnxgen import pipeline, pipeline_paged
from onnxgen.analysis.roles import find_roles
from onnxgen.cli import main
from onnxgen.errors import ModelDiffersError, RefusedError
from onnxgen.model_io import read_model
from onnxgen.pipeline import FuseOptions
from onnxgen.pipeline_paged import PageOptions
from onnxgen.report.text import console, render
from onnxgen.report.values import Proof
from onnxgen.runtime import Runtime
from onnxgen.targets.paged import PagedOptions
from onnxgen.testing import corpus
from onnxgen.verify.compare import verify_models
from onnxgen.verify.landmarks import find_landmarks
from tests.graphs import parse
from tests.large_decoder import Sizes, write_decoder


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime(threads=1) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A decoder of three layers, and what it is fused to."""
    path = write_decoder(tmp_path_factory.mktemp("decoder"), Sizes(layers=3))
    output = path.with_name("fused.onnx")
    report = pipeline.fuse(path, FuseOptions(output=output), lambda message: None)
    assert report.proof is not None
    assert report.proof.status == "proven"
    assert report.proof.inner > 50
    assert report.proof.faint == []
    return path, output


def scaled(path: Path, layer: int, factor: float = 1.01) -> bytes:
    """The model with one attention's scale a little off."""
    model = onnx.load(path)
    node = [node for node in model.graph.node if node.op_type == "Attention"][layer]
    (scale,) = [each for each in node.attribute if each.name == "scale"]
    scale.f *= factor
    return model.SerializeToString()


def change(path: Path, folder: Path, name: str, values: float) -> Path:
    """A copy of a decoder in which every weight whose name ends so holds these values."""
    for each in (path, path.with_name("model.data")):
        shutil.copy(each, folder / each.name)
    copy = folder / path.name
    for tensor in onnx.load(copy, load_external_data=False).graph.initializer:
        if tensor.name.endswith(name):
            place = {each.key: each.value for each in tensor.external_data}
            count, start = int(place["length"]) // 4, int(place["offset"])
            data = np.memmap(folder / "model.data", np.float32, "r+", start, (count,))
            data[:] = values
            data.flush()
    return copy


def said(proof: Proof) -> str:
    """What a person reads of it."""
    screen = console()
    with screen.capture() as capture:
        screen.print(render(proof))
    return capture.get()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_layer_and_the_rewrite_are_named(
    fused: tuple[Path, Path], runtime: Runtime, layer: int
) -> None:
    proof = verify_models(fused[0], scaled(fused[1], layer), runtime=runtime)
    assert proof.status == "differs"
    assert proof.origin is not None
    assert proof.origin.layer == f"model.layers.{layer}.self_attn"
    assert (proof.origin.rule, proof.origin.op) == ("ATT001", "Attention")
    assert proof.origin.node == f"model.layers.{layer}.self_attn/Attention"
    assert 1e-4 < proof.origin.difference < 1
    assert f"the difference starts in layer model.layers.{layer}.self_attn at value" in proof.reason
    assert f"rewrite ATT001, node 'model.layers.{layer}.self_attn/Attention'" in proof.reason


def test_the_command_says_it_too(fused: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "wrong.onnx"
    path.write_bytes(scaled(fused[1], 1))
    result = CliRunner().invoke(main, ["verify", str(fused[0]), str(path), "--json"])
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["proof"]["origin"]["layer"] == "model.layers.1.self_attn"
    assert document["error"].endswith("node 'model.layers.1.self_attn/Attention', Attention)")


def test_fuse_names_it_where_every_rewrite_agreed(
    fused: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = pipeline.onnx_target.finish

    def broken(model, version, target):
        finish(model, version, target)
        norms = [node for node in model.graph if node.op_type == "RMSNormalization"]
        norms[3].replace_input_with(1, norms[0].inputs[1])  # the weight of another layer

    monkeypatch.setattr(pipeline.onnx_target, "finish", broken)
    output = tmp_path / "out.onnx"
    with pytest.raises(
        ModelDiffersError, match=r"starts in layer model\.layers\.1\.mlp at value .*RMS001"
    ):
        pipeline.fuse(fused[0], FuseOptions(output=output), lambda message: None)
    assert list(tmp_path.iterdir()) == []


def test_of_padded_runs_only_rows_of_tokens_count(
    fused: tuple[Path, Path], runtime: Runtime
) -> None:
    """A mask that hides nothing: only padded runs differ, and padding itself is not to blame."""
    model = onnx.load(fused[1])
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            if name == "attention_mask" and node.op_type == "Unsqueeze":
                node.input[at] = "ones"
    model.graph.node.insert(
        0,
        helper.make_node(
            "ConstantOfShape",
            ["shape"],
            ["ones"],
            value=helper.make_tensor("v", TensorProto.INT64, [1], [1]),
        ),
    )
    model.graph.node.insert(0, helper.make_node("Shape", ["attention_mask"], ["shape"]))
    proof = verify_models(fused[0], model.SerializeToString(), runtime=runtime)
    assert proof.status == "differs"
    assert proof.origin is not None
    assert (proof.origin.layer, proof.origin.op) == ("model.layers.0.self_attn", "Attention")


def test_without_a_name_in_common_the_difference_stands_alone(
    fused: tuple[Path, Path], runtime: Runtime
) -> None:
    model = onnx.ModelProto.FromString(scaled(fused[1], 1))
    kept = {
        value.name for value in (*model.graph.input, *model.graph.output, *model.graph.initializer)
    }
    for node in model.graph.node:
        for names in (node.input, node.output):
            for at, name in enumerate(names):
                if name and name not in kept:
                    names[at] = f"other {name}"
    del model.graph.value_info[:]
    proof = verify_models(fused[0], model.SerializeToString(), runtime=runtime)
    assert proof.status == "differs"
    # Outputs bear the same names: the first cache that is apart is that of the layer behind.
    assert proof.origin is None or proof.origin.value.startswith(("present", "logits"))


# What outputs do not show.


def test_outputs_that_hardly_depend_on_the_past_are_noticed(
    fused: tuple[Path, Path], tmp_path: Path
) -> None:
    """Attention whose output is thrown away: no output shows the past, positions or the mask."""
    path = change(fused[0], tmp_path, ".o", 0.0)
    report = pipeline.fuse(path, FuseOptions(output=tmp_path / "out.onnx"), lambda message: None)
    assert report.proof is not None
    assert report.proof.status == "proven"
    assert {each.what for each in report.proof.faint} >= {"past", "mask"}
    assert all(each.effect < 1e-3 for each in report.proof.faint)
    assert "the outputs hardly depend on the past (" in said(report.proof)
    assert "values inside were compared too and each rewrite on random inputs" in said(report.proof)


def test_a_mistake_that_no_output_shows_is_found_inside(
    fused: tuple[Path, Path], tmp_path: Path, runtime: Runtime
) -> None:
    path = change(fused[0], tmp_path, ".o", 0.0)
    output = tmp_path / "out.onnx"
    pipeline.fuse(path, FuseOptions(output=output), lambda message: None)
    proof = verify_models(path, scaled(output, 1, 1.5), runtime=runtime)
    assert max(case.difference for case in proof.cases) <= proof.tolerance
    assert proof.status == "unverifiable"
    assert proof.origin is not None
    assert proof.origin.layer == "model.layers.1.self_attn"
    assert proof.reason.startswith("the outputs agree and hardly depend on what differs inside: ")


def test_a_zeroed_layer_hides_nothing(fused: tuple[Path, Path], tmp_path: Path) -> None:
    """The past still shows through the others: what the layer itself does is seen inside."""
    path = change(fused[0], tmp_path, "layers.1.o", 0.0)
    output = tmp_path / "out.onnx"
    report = pipeline.fuse(path, FuseOptions(output=output), lambda message: None)
    assert report.proof is not None
    assert report.proof.faint == []
    wrong = tmp_path / "wrong.onnx"
    wrong.write_bytes(scaled(output, 1, 1.5))
    result = CliRunner().invoke(main, ["verify", str(path), str(wrong)])
    assert result.exit_code == RefusedError.exit_code
    assert "hardly depend on what differs inside" in result.stderr
    assert "model.layers.1.self_attn" in result.stderr


def test_fuse_writes_nothing_that_differs_inside(
    fused: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = change(fused[0], tmp_path, ".o", 0.0)
    finish = pipeline.onnx_target.finish

    def broken(model, version, target):
        finish(model, version, target)
        node = next(node for node in model.graph if node.op_type == "Attention")
        rotary = node.inputs[0].producer()
        node.replace_input_with(0, rotary.inputs[0])  # queries that are not turned

    monkeypatch.setattr(pipeline.onnx_target, "finish", broken)
    with pytest.raises(RefusedError, match="hardly depend on what differs inside"):
        pipeline.fuse(path, FuseOptions(output=tmp_path / "out.onnx"), lambda message: None)
    assert not (tmp_path / "out.onnx").exists()


# Landmarks.


def test_values_keep_their_names(tmp_path: Path) -> None:
    """Every rewritten attention, norm and rotary embedding answers under the exporter's name."""
    (entry,) = corpus("llama/torchscript")
    path, output = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(entry.load(), path)
    for target in ("onnx", "ort"):
        pipeline.fuse(path, FuseOptions(output=output, target=target), lambda message: None)
        model, other = read_model(path), read_model(output)
        names = {each.name for each in find_landmarks(model, other, find_roles(model))}
        made = [node for node in other.graph if "onnxgen.replaced" in node.metadata_props]
        kept = [node for node in made if {v.name for v in node.outputs} & names]
        assert len(kept) > 3
        attentions = [n for n in made if n.op_type in ("Attention", "GroupQueryAttention")]
        assert attentions
        assert target == "ort" or all(node in kept for node in attentions)


def test_masks_and_tables_are_no_landmarks(fused: tuple[Path, Path]) -> None:
    model, other = read_model(fused[0]), read_model(fused[1])
    landmarks = find_landmarks(model, other, find_roles(model))
    scopes = {each.layer for each in landmarks}
    assert "model.rotary_emb" not in scopes
    assert {f"model.layers.{n}.{part}" for n in range(3) for part in ("self_attn", "mlp")} <= scopes
    assert all(each.rows is not None for each in landmarks if not each.name.startswith("present"))


def test_what_no_output_of_a_paged_model_shows_is_found_inside(
    fused: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = change(fused[0], tmp_path, ".o", 0.0)
    options = PageOptions(output=tmp_path / "paged")
    report = pipeline_paged.to_paged(path, options, lambda message: None)
    assert report.proof is not None
    assert report.proof.inner > 20
    assert {each.what for each in report.proof.faint} >= {"past", "mask"}
    shutil.rmtree(options.output)
    finish = pipeline_paged.onnx_target.finish

    def broken(model, version, target):
        finish(model, version, target)
        node = [node for node in model.graph if node.op_type == "PagedAttention"][1]
        scale = node.attributes["scale"].as_float()
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.5 * scale)

    monkeypatch.setattr(pipeline_paged.onnx_target, "finish", broken)
    with pytest.raises(RefusedError, match="hardly depend on what differs inside"):
        pipeline_paged.to_paged(path, options, lambda message: None)
    assert not options.output.exists()


def test_a_float16_model_that_chooses_experts_is_looked_into(
    tmp_path: Path, runtime: Runtime
) -> None:
    """That it is run as it is, too, with roundings that choose others, is no difference."""
    (entry,) = corpus("mixtral/dynamo20-batched-fp16")
    path = tmp_path / "model.onnx"
    onnx.save(entry.load(), path)
    report = pipeline.fuse(path, FuseOptions(output=tmp_path / "out.onnx"), lambda message: None)
    assert report.proof is not None
    assert (report.proof.status, report.proof.reason) == ("proven", "")
    assert report.proof.twins == ("float16",)
    assert report.proof.inner > 30
    assert report.proof.inner_difference < 1e-4


def test_sequences_of_tensors_are_passed_by(runtime: Runtime) -> None:
    model = parse(
        """
        (int64[b,s] input_ids) => (float[b,s,16] y) {
            x = Gather(table, input_ids)
            h = MatMul(x, w)
            both = SequenceConstruct(h, x)
            one = SequenceAt(both, zero)
            y = Relu(one)
        }
        """,
        weights={
            "table": np.random.default_rng(0).standard_normal((9, 16), np.float32),
            "w": np.eye(16, dtype=np.float32),
            "zero": np.array(0),
        },
    ).SerializeToString()
    proof = verify_models(model, model, runtime=runtime)
    assert (proof.status, proof.not_run) == ("proven", [])
    assert proof.inner >= 3


def test_outputs_without_a_name_are_no_landmarks(tmp_path: Path) -> None:
    """The genai builder leaves out what nobody reads; ONNX Runtime loads no such output."""
    path = tmp_path / "model.onnx"
    path.write_bytes(next(iter(corpus("llama/builder"))).load().SerializeToString())
    report = pipeline.fuse(path, FuseOptions(target="ort"), lambda message: None)
    assert report.proof is not None
    assert report.proof.inner > 20
    assert not report.proof.not_run


def test_of_answers_for_last_tokens_only_whole_rows_are_compared_inside(tmp_path: Path) -> None:
    """Gemma caps its scores: what lies between the projection and the cap has fewer rows, too."""
    path = tmp_path / "model.onnx"
    path.write_bytes(next(iter(corpus("gemma2/transformers-sliding"))).load().SerializeToString())
    options = PageOptions(tmp_path / "paged", PagedOptions(logits="last"))
    report = pipeline_paged.to_paged(path, options, lambda message: None)
    assert report.proof is not None
    assert report.proof.status == "proven"
    assert report.proof.inner > 10
