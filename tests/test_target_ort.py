"""`--target ort`: which operators come out, and what the contract promises inside and outside."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxgen import pipeline
from onnxgen.analysis.feeds import RunShape, make_feeds
from onnxgen.analysis.roles import find_roles
from onnxgen.errors import UsageError
from onnxgen.model_io import read_model
from onnxgen.report.values import Report
from onnxgen.runtime import Runtime, RuntimeFailure
from onnxgen.targets.contract import KEY, Contract, read_contract
from onnxgen.testing import CorpusEntry, corpus, load_corpus_model
from onnxgen.verify.compare import verify_models

Made = tuple[Path, Path, Report]


def make(folder: Path, name: str, **options: Any) -> Made:
    """A corpus model written for ort: the original, the result, the report."""
    path, output = folder / "model.onnx", folder / "ort.onnx"
    path.write_bytes(load_corpus_model(name).SerializeToString())
    asked = pipeline.FuseOptions(output=output, target="ort", **options)
    return path, output, pipeline.fuse(path, asked, lambda message: None)


def ops(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def run(
    made: Made, shape: RunShape, changes: dict[str, Any] | None = None, *, original: bool = False
) -> dict[str, Any]:
    """Run the result, or the original, as a user would feed it, with some inputs changed."""
    roles = find_roles(read_model(made[0]))
    feeds = make_feeds(roles, shape, np.random.default_rng(0))
    for name, change in (changes or {}).items():
        feeds[name] = change(feeds[name])
    with Runtime() as runtime:
        return runtime.run(runtime.load(made[0] if original else made[1]), feeds)


@pytest.fixture(scope="module")
def unpadded(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("none")
    return make(folder, "llama/dynamo20", padding="none", max_length=64)


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("right"), "llama/torchscript", padding="right")


def test_a_layer_is_what_the_genai_builder_writes(unpadded: Made) -> None:
    found = ops(unpadded[1])
    assert found["GroupQueryAttention"] == 2
    assert found["SkipSimplifiedLayerNormalization"] == 4
    assert found["RMSNormalization"] == 1  # the first has no residual before it
    assert found["MatMul"] == 2 * 5 + 1  # qkv, o, gate, up, down, and the head
    assert not {"Attention", "RotaryEmbedding", "Softmax", "Transpose", "Reshape"} & set(found)


def test_the_contract_stands_in_the_metadata_and_in_the_report(unpadded: Made) -> None:
    _, output, report = unpadded
    assert read_contract(read_model(output)) == Contract("none", 64, chunked_batches=False)
    assert "padding none, at most 64 tokens" in report.contract
    assert report.proof is not None
    outside = {case.name: case.outside for case in report.proof.cases if case.outside}
    assert any("left padding" in name for name in outside)
    assert report.proof.worst is not None


@pytest.mark.parametrize(
    ("shape", "changes", "sentence"),
    [
        (RunShape(2, 4, padding="left"), {}, "contract: "),
        (RunShape(2, 4, padding="right"), {}, "contract: "),
        (RunShape(1, 1, 5), {"attention_mask": np.zeros_like}, "without padding"),
        (RunShape(1, 4), {"attention_mask": lambda m: m * [2, 0, 1, 1]}, "zeros and ones"),
        (RunShape(1, 4), {"position_ids": lambda p: p + 1}, "count the tokens"),
        (RunShape(1, 1, 5), {"position_ids": lambda p: p - 1}, "count the tokens"),
        (RunShape(2, 3, 4), {}, "batch_size must be 1"),
        (RunShape(1, 65), {}, "cos_cache"),
        (RunShape(1, 1, 64), {}, "cos_cache"),
    ],
)
def test_outside_the_contract_it_fails(
    unpadded: Made, shape: RunShape, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RuntimeFailure, match=sentence):
        run(unpadded, shape, changes)


def test_inside_the_contract_up_to_its_last_token(unpadded: Made) -> None:
    for shape in (RunShape(1, 64), RunShape(3, 1, 63), RunShape(1, 5, 59), RunShape(2, 9)):
        old, new = run(unpadded, shape, original=True), run(unpadded, shape)
        assert np.allclose(old["logits"], new["logits"], atol=1e-4 * old["logits"].std())


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        (RunShape(2, 4, padding="left"), {}),
        (RunShape(1, 4, 6), {"attention_mask": lambda m: np.where(np.arange(10) == 9, 0, m)}),
        (RunShape(1, 1, 6), {"attention_mask": lambda m: np.where(np.arange(7) == 3, 0, m)}),
        # A row that has ended: the operator would write over its last token.
        (RunShape(2, 1, 5), {"attention_mask": lambda m: np.array([[1] * 6, [1] * 5 + [0]])}),
    ],
)
def test_right_padding_is_behind_a_prompt_or_fails(
    right: Made, shape: RunShape, changes: dict[str, Any]
) -> None:
    with pytest.raises(RuntimeFailure, match="contract: "):
        run(right, shape, changes)


def test_right_padding_is_proven(right: Made) -> None:
    assert right[2].proof is not None
    padded = [case for case in right[2].proof.cases if case.padding == "right"]
    assert any(case.compared for case in padded)
    assert "attention_bias" not in str([site.details for site in right[2].lowered])


def test_a_buffer_shared_by_past_and_present_is_taken(right: Made) -> None:
    """Runtimes that share one buffer feed caches longer than what they hold."""
    shape = RunShape(1, 1, 6)
    roles = find_roles(read_model(right[0]))
    feeds = make_feeds(roles, shape, np.random.default_rng(0))
    longer = dict(feeds)
    for pair in roles.pairs:
        longer[pair.past] = np.pad(feeds[pair.past], ((0, 0), (0, 0), (0, 20), (0, 0)))
    with Runtime() as runtime:
        session = runtime.load(right[1])
        short, shared = runtime.run(session, feeds), runtime.run(session, longer)
    assert np.allclose(short["logits"], shared["logits"], atol=1e-5)
    for pair in roles.pairs:
        assert shared[pair.present].shape[2] == 26
        assert np.allclose(short[pair.present], shared[pair.present][:, :, :7], atol=1e-5)


def test_any_padding_keeps_explicit_positions_outside(tmp_path: Path) -> None:
    _, output, report = make(tmp_path, "qwen3/dynamo20")
    found = ops(output)
    assert (found["GroupQueryAttention"], found["RotaryEmbedding"]) == (2, 4)
    assert found["Transpose"] == 0
    assert report.contract.startswith("padding any")
    assert report.proof is not None
    assert any(c.compared and c.padding == "left" and c.past for c in report.proof.cases)


def test_positions_that_the_graph_counts_go_inside_for_any_padding(tmp_path: Path) -> None:
    _, output, report = make(tmp_path, "llama/transformers", max_length=512)
    assert ops(output)["RotaryEmbedding"] == 0
    assert "at most 512 tokens" in report.contract


@pytest.mark.parametrize("name", ["mistral/dynamo20", "gemma2/torchscript"])
@pytest.mark.parametrize("padding", ["any", "none"])
def test_windows_and_caps_are_attributes(tmp_path: Path, name: str, padding: str) -> None:
    _, output, _ = make(tmp_path, name, padding=padding)
    model = onnx.load(output)
    attentions = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    attributes = [
        {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        for node in attentions
    ]
    assert [each.get("local_window_size") for each in attributes] == (
        [6, 6] if name.startswith("mistral") else [6, None]
    )
    assert [("softcap" in each) for each in attributes] == [name.startswith("gemma2")] * 2


def test_a_cropped_cache_keeps_its_mask(tmp_path: Path) -> None:
    _, output, report = make(tmp_path, "mistral/dynamo20-cropped", padding="none")
    assert ops(output)["GroupQueryAttention"] == 2
    assert all(site.details["mask"] == "attention_bias" for site in report.lowered if site.details)


def test_what_continues_no_cache_stays_attention(tmp_path: Path) -> None:
    _, output, report = make(tmp_path, "bert/dynamo20")
    assert ops(output)["Attention"] == 2
    assert ops(output)["SkipLayerNormalization"] == 0  # many times slower on CPU
    reasons = {site.decline.code for site in report.lowered if site.decline}
    assert reasons == {"no-cache"}
    assert report.contract == "padding any"


def test_what_is_the_targets_own_stays(tmp_path: Path) -> None:
    path, output, report = make(tmp_path, "llama/builder")
    assert ops(output)["GroupQueryAttention"] == ops(path)["GroupQueryAttention"] == 2
    assert sum(ops(output).values()) <= sum(ops(path).values())
    assert report.proof is not None
    assert report.proof.status == "proven"


def test_split_projections_are_packed_again(tmp_path: Path) -> None:
    _, output, _ = make(tmp_path, "phi3/dynamo20", padding="none")
    packed = [n for n in onnx.load(output).graph.node if n.op_type == "GroupQueryAttention"]
    assert len(packed) == 2
    assert all(node.input[1] == "" and node.input[2] == "" for node in packed)


def test_the_length_is_that_of_config_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 96}))
    _, output, _ = make(tmp_path, "llama/dynamo20", padding="none")
    assert read_contract(read_model(output)).max_length == 96


def test_a_length_too_short_to_tell_keeps_rotary_outside(tmp_path: Path) -> None:
    _, output, report = make(tmp_path, "llama/dynamo20", padding="right", max_length=4)
    assert ops(output)["GroupQueryAttention"] == 2
    said = {str(site.details["rotary"]) for site in report.lowered if site.kind == "attention"}
    assert said == {"outside: 4 positions are too few to read its tables, at least 12 are needed"}
    assert "tokens," not in report.contract
    assert report.warnings == []


def test_what_was_undone_is_no_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = pipeline.RewriteChecker.__call__

    def undo(self: Any, facts: Any, rewrite: Any, nodes: Any) -> str | None:
        if rewrite.node.op_type == "GroupQueryAttention":
            return "it differs"
        return check(self, facts, rewrite, nodes)

    monkeypatch.setattr(pipeline.RewriteChecker, "__call__", undo)
    _, output, report = make(tmp_path, "llama/dynamo20", padding="right")
    assert ops(output)["Attention"] == 2
    assert report.contract == "padding any"
    assert read_contract(read_model(output)) == Contract()
    (warning,) = report.warnings
    assert warning.endswith("Attention and 1 more: the rewrite was undone: it differs")


def test_lengths_beyond_all_memory_are_refused(tmp_path: Path) -> None:
    for length in ((1 << 24) + 1, 99_999_999_999):
        with pytest.raises(UsageError, match=f"--max-length {length}: .* the most is 16777216"):
            make(tmp_path, "llama/dynamo20", max_length=length)


def test_answering_outside_the_contract_is_a_difference(unpadded: Made) -> None:
    """The check can fail: a model that promises more than it keeps is found out."""
    model = onnx.load(unpadded[1])
    for node in model.graph.node:
        if node.name.startswith("contract: "):  # the guards let everything through
            node.op_type, node.input[:] = "Identity", [node.input[0]]
            del node.attribute[:]
    proof = verify_models(unpadded[0], model.SerializeToString())
    assert proof.status == "differs"
    assert "padding" in proof.reason


def test_a_contract_that_hides_nothing_is_not_believed(unpadded: Made) -> None:
    """Without the metadata a failure inside what the original takes is a difference."""
    model = onnx.load(unpadded[1])
    for index, each in enumerate(model.metadata_props):
        if each.key == KEY:
            del model.metadata_props[index]
            break
    assert verify_models(unpadded[0], model.SerializeToString()).status == "differs"


def test_options_of_ort_are_refused_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(load_corpus_model("llama/dynamo20").SerializeToString())
    with pytest.raises(UsageError, match="--target ort"):
        pipeline.fuse(path, pipeline.FuseOptions(padding="none"), lambda message: None)


def test_sinks_are_an_input(tmp_path: Path) -> None:
    _, output, _ = make(tmp_path, "gpt_oss/dynamo20-batched", padding="none")
    model = onnx.load(output)
    attentions = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    assert [len(node.input) for node in attentions] == [12, 12]
    assert not model.functions


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["any", "right", "none"])
@pytest.mark.parametrize("entry", corpus(), ids=lambda entry: entry.name)
def test_every_export_for_every_padding(entry: CorpusEntry, padding: Any, tmp_path: Path) -> None:
    _, _, report = make(tmp_path, entry.name, padding=padding, max_length=2048)
    assert report.proof is not None
    assert report.proof.status == "proven"
    assert {site.status for site in report.lowered} <= {"fused", "kept"}


def test_bfloat16_takes_any_padding(tmp_path: Path) -> None:
    """The lowest number that is added where a key is padding is the type's own."""
    _, _, report = make(tmp_path, "llama/dynamo20-bf16", padding="any")
    assert {site.status for site in report.lowered if site.kind == "attention"} == {"fused"}
