"""How a paged model is compared with its original: what is run, and on what."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from onnxgen.errors import OnnxgenError, RefusedError
from onnxgen.pipeline_paged import PageOptions, to_paged
from onnxgen.report.values import Proof
from onnxgen.runtime import Runtime
from onnxgen.targets.paged import PagedOptions
from onnxgen.testing import corpus
from onnxgen.verify.paged_program import Event, program
from onnxgen.verify.paged_steps import compare_steps
from onnxgen.verify.paged_twin import expand_attention
from onnxgen.verify.side import Side
from tests.proof.subjects import Subject, subjects


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Subject]]:
    """gpt2, of 96 positions, and llama for the operator."""
    folder = tmp_path_factory.mktemp("made")
    (gpt2,), (llama,) = corpus("gpt2/dynamo20"), corpus("llama/dynamo20")
    with (
        subjects(gpt2, ("paged",), folder / "gpt2", 0) as first,
        subjects(llama, ("paged-ort",), folder / "llama", 0) as second,
    ):
        yield {"gpt2": first[0], "llama": second[0]}


def test_a_model_of_few_positions_is_run_as_far_as_they_go(made: dict[str, Subject]) -> None:
    proof = made["gpt2"].baseline
    assert proof.status == "proven"
    assert any("90 of f over 0" in case.name for case in proof.cases)
    assert not any(" over 150" in case.name or " over 700" in case.name for case in proof.cases)


def test_prompts_begin_with_nothing_before_them_and_share_blocks(
    made: dict[str, Subject],
) -> None:
    for subject in made.values():
        first, *_, fifth = subject.baseline.cases[:5]
        assert "5 of a over 0" in first.name
        size = subject.results[0].options.block_size
        assert f"4 of d over {size}" in fifth.name  # its first block is another's
        assert "0 of z over 0" in subject.baseline.cases[6].name


def test_a_model_without_such_a_limit_is_run_far_behind(made: dict[str, Subject]) -> None:
    names = [case.name for case in made["llama"].baseline.cases]
    assert any(" over 700" in name for name in names)
    assert all(sum(e.joins[n][0] for n in e.joins) < 50 for e in program(16, (), far=False))


@pytest.mark.parametrize("seed", [3, 4])
def test_a_sequence_may_come_before_it_runs(made: dict[str, Subject], seed: int) -> None:
    subject = made["gpt2"]
    runtime, events = (
        subject.runtime,
        [
            Event({"a": (5, 0, ""), "b": (3, 0, "")}, {"a": 5, "b": 0}),
            Event({}, {"b": 3, "a": 1}),
        ],
    )
    runtime.twins = frozenset()
    first = Side(runtime, subject.original, as_written=True)
    second = Side(runtime, subject.write(subject.model), as_written=False)
    first.load()
    second.load()
    proof = Proof("unverifiable", 1e-4)
    compare_steps(first, second, subject.roles, subject.results[0], events, proof, seed=seed)
    assert not proof.reason
    assert [case.compared and case.difference < 1e-4 for case in proof.cases] == [True, True]


def test_rounding_to_narrow_pools_chooses_no_other_experts(tmp_path: Path) -> None:
    """A model of float32 that chooses experts, its pools in float16: compared as twins."""
    (entry,) = corpus("mixtral/dynamo20-batched")
    path = tmp_path / "model.onnx"
    path.write_bytes(entry.load().SerializeToString())
    options = PageOptions(tmp_path / "out", PagedOptions(flavor="ort"))
    proof = to_paged(path, options, lambda _: None).proof
    assert proof is not None
    assert (proof.status, proof.twins, proof.tolerance) == ("proven", ("float16",), 1e-2)


def test_as_it_is_such_a_model_has_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = corpus("mixtral/dynamo20-batched")
    path = tmp_path / "model.onnx"
    path.write_bytes(entry.load().SerializeToString())
    load = Runtime.load

    def refuse(self: Runtime, model: bytes | Path, **settings: object) -> int:
        return load(self, b"" if not self.twins and "twin" in str(model) else model, **settings)

    monkeypatch.setattr(Runtime, "load", refuse)
    options = PageOptions(tmp_path / "out", PagedOptions(flavor="ort"))
    with pytest.raises(OnnxgenError) as caught:
        to_paged(path, options, lambda _: None)
    assert "with its pools as they are" in str(caught.value)


def test_tables_whose_size_nothing_says_are_refused(made: dict[str, Subject]) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(made["llama"].model)
    node = next(n for n in model.graph.node if n.op_type == "PagedAttention")
    at = next(i for i, name in enumerate(node.input) if "cos" in name)
    same = onnx.helper.make_node("Identity", [node.input[at]], ["cosines"])
    node.input[at] = "cosines"
    model.graph.node.insert(0, same)
    with pytest.raises(RefusedError, match="rotary tables"):
        expand_attention(ir.from_proto(model))
    assert math.isfinite(made["llama"].baseline.tolerance)
