"""--genai-config: the config says what the graph does, and onnxruntime-genai generates with it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxgen import pipeline
from onnxgen.analysis.roles import find_roles
from onnxgen.cli import main
from onnxgen.errors import FileError, RefusedError, UsageError
from onnxgen.model_io import read_model
from onnxgen.report.values import Report
from onnxgen.targets.genai import Said, genai_config
from onnxgen.targets.genai_names import Cache, name_templates
from tests.generating import CONFIG, ENDLESS, OUTPUTS, PASTS, PROMPTS, step_by_step, written


def fused(path: Path, output: Path, **options: Any) -> tuple[Report, dict[str, Any]]:
    """Fuse with --genai-config; the report, and the config as written."""
    output.parent.mkdir(parents=True, exist_ok=True)
    given = {"verify": False, "target": "ort", **options}
    asked = pipeline.FuseOptions(output=output, genai_config=True, **given)
    report = pipeline.fuse(path, asked, lambda message: None)
    return report, json.loads(output.with_name("genai_config.json").read_text("utf-8"))


# --- the config ----------------------------------------------------------------------------------


def test_what_the_graph_says(tmp_path: Path) -> None:
    report, config = fused(written(tmp_path / "in", "llama/dynamo20"), tmp_path / "out" / "m.onnx")
    decoder = config["model"]["decoder"]
    assert decoder["filename"] == "m.onnx"
    assert decoder["inputs"] == {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "position_ids": "position_ids",
        **PASTS,
    }
    assert decoder["outputs"] == OUTPUTS
    sizes = ("num_attention_heads", "num_key_value_heads", "head_size", "hidden_size")
    assert [decoder[size] for size in sizes] == [6, 3, 48, 84]
    assert decoder["num_hidden_layers"] == 2
    assert config["model"]["vocab_size"] == 131
    assert config["model"]["type"] == "decoder"
    assert config["search"]["past_present_share_buffer"] is True
    assert report.beside == ["genai_config.json"]
    assert report.warnings == [
        "genai_config.json does not say which token ends a text: there is no config.json beside model.onnx"
    ]


def test_the_standard_operator_shares_no_buffer(tmp_path: Path) -> None:
    _, config = fused(written(tmp_path, "qwen3/dynamo20"), tmp_path / "m.onnx", target="onnx")
    assert config["search"]["past_present_share_buffer"] is False
    assert config["model"]["decoder"]["num_attention_heads"] == 6


def test_what_config_files_say(tmp_path: Path) -> None:
    path = written(tmp_path, "llama/dynamo20", CONFIG)
    generation = {"eos_token_id": [2, 7], "temperature": 0.6, "top_k": None, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    report, config = fused(path, tmp_path / "m.onnx")
    model = config["model"]
    assert model["type"] == "llama"
    assert model["context_length"] == config["search"]["max_length"] == 96
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, [2, 7], 0)
    assert config["search"]["temperature"] == 0.6
    assert config["search"]["top_k"] == 50
    assert config["search"]["do_sample"] is True
    assert not report.warnings


@pytest.mark.parametrize("eos", [None, "</s>", [], ["2"], True])
def test_an_end_that_is_no_number_is_not_passed_on(eos: Any, tmp_path: Path) -> None:
    path = written(tmp_path, "llama/dynamo20", {**CONFIG, "eos_token_id": eos})
    why = "genai_config.json does not say which token ends a text: "
    report, config = fused(path, tmp_path / "m.onnx", verify=False)
    assert "eos_token_id" not in config["model"]
    beside = f"config.json beside {path.name} gives no eos_token_id that is a number"
    assert report.warnings == [why + beside]
    (tmp_path / "generation_config.json").write_text("{}")
    report, _ = fused(path, tmp_path / "m.onnx", verify=False)
    assert "config.json and generation_config.json beside" in report.warnings[0]


def test_a_text_model_inside_a_config(tmp_path: Path) -> None:
    text = {**CONFIG, "model_type": "gpt2", "max_position_embeddings": 77}
    path = written(tmp_path, "llama/dynamo20", {"model_type": "llava", "text_config": text})
    _, config = fused(path, tmp_path / "m.onnx")
    assert config["model"]["context_length"] == 77
    assert config["model"]["type"] == "decoder"  # the runtime's gpt2 has one tensor a layer


def test_the_contract_limits_the_length(tmp_path: Path) -> None:
    path = written(tmp_path, "llama/dynamo20", CONFIG)
    _, config = fused(path, tmp_path / "m.onnx", padding="none", max_length=40)
    assert config["model"]["context_length"] == 40


def test_padding_is_done_with_the_end_where_nothing_else_is_said(tmp_path: Path) -> None:
    path = written(tmp_path, "llama/dynamo20", {"eos_token_id": [5, 6], "pad_token_id": None})
    _, config = fused(path, tmp_path / "m.onnx")
    assert config["model"]["pad_token_id"] == 5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama/dynamo20-prefill", "continues no cache"),
        ("llama/dynamo20-decode", "number of new tokens is fixed at 1"),
        ("bert/dynamo20", "does not feed the input 'token_type_ids'"),
        ("whisper_decoder/dynamo20", "does not feed the input"),
        ("gemma2/dynamo20-cropped", "is cropped"),
        ("llama/transformers-static", "does not feed the input"),
    ],
)
def test_what_the_runtime_cannot_run_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    path = written(tmp_path, name)
    with pytest.raises(RefusedError, match=reason):
        fused(path, tmp_path / "m.onnx")
    assert sorted(os.listdir(tmp_path)) == ["model.onnx"]


def changed(path: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def test_a_mask_of_another_type_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "llama/dynamo20")
    model, roles = read_model(path), find_roles(read_model(path))
    mask = dataclasses.replace(roles.inputs["attention_mask"], dtype=onnx.TensorProto.BOOL)
    other = dataclasses.replace(roles, inputs={**roles.inputs, "attention_mask": mask})
    with pytest.raises(RefusedError, match="'attention_mask' \\(mask\\) is not int32 or int64"):
        genai_config(model, other, Said({}, {}), filename="m.onnx", max_length=None)


# --- names ---------------------------------------------------------------------------------------


def caches(*patterns: str, layers: Sequence[int] = (0, 1)) -> list[Cache]:
    return [Cache(*(pattern.replace("#", str(layer)) for pattern in patterns)) for layer in layers]


USUAL = ("past.#.key", "past.#.value", "present.#.key", "present.#.value")
SLOTS = ("past_2.#.k", "past_2.#.v", "out_#.k", "out_#.v")


@pytest.mark.parametrize("patterns", [USUAL, SLOTS, ("k#", "v#", "k#_out", "v#_out")])
@pytest.mark.parametrize("layers", [(0, 1), (10, 3, 2), (2,)])
def test_templates(patterns: tuple[str, ...], layers: tuple[int, ...]) -> None:
    found = caches(*patterns, layers=layers)
    names = [name for cache in found for name in cache[:2]]
    template = name_templates(found, ["input_ids", *names])
    assert isinstance(template, Cache)
    for text, column in zip(template, zip(*found, strict=True), strict=True):
        ((before, after),) = [text.split("%d")]
        assert all(name.startswith(before) and name.endswith(after) for name in column)
    made = [Cache(*(text % layer for text in template)) for layer in layers]
    assert set(made) == set(found) or len(layers) == 1


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (caches("k", "v.#", "a.#", "b.#", layers=[0]), "are not one name with a number"),
        ([*caches(*USUAL, layers=[0]), Cache("a", "b", "c", "d")], "are not one name"),
        ([Cache("c.0", "c.1", "p.0", "p.1"), Cache("c.2", "c.3", "p.2", "p.3")], "do not bear"),
        (caches(*USUAL[:3], "100%.#"), "holds a %"),
        (caches(*(f"{'x' * 60}{name}" for name in USUAL)), "longer than 63"),
        (caches("c0#", *USUAL[1:]), "are not one name with a number"),
        (caches("c_#", "c_#_v", *USUAL[2:]), "do not bear"),  # the runtime counts c_0_v as a key
    ],
)
def test_names_that_fit_no_template(found: list[Cache], reason: str) -> None:
    said = name_templates(found, [name for cache in found for name in cache[:2]])
    assert isinstance(said, str)
    assert reason in said


# --- files ---------------------------------------------------------------------------------------


def test_the_tokenizer_goes_where_the_model_goes(tmp_path: Path) -> None:
    path = written(tmp_path / "in", "llama/dynamo20", CONFIG)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        path.with_name(name).write_text(f"{name} of this")
    output = tmp_path / "out" / "m.onnx"
    report, _ = fused(path, output)
    assert sorted(os.listdir(output.parent)) == sorted([*report.beside, "m.onnx"])
    assert output.with_name("tokenizer.json").read_text() == "tokenizer.json of this"
    again, _ = fused(path, output)
    assert again.beside == ["genai_config.json"]


def test_files_of_another_model_are_kept(tmp_path: Path) -> None:
    path = written(tmp_path, "llama/dynamo20")
    fused(path, tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="is another model's"):
        fused(path, tmp_path / "n.onnx")
    assert not (tmp_path / "n.onnx").exists()
    _, config = fused(path, tmp_path / "n.onnx", force=True)
    assert config["model"]["decoder"]["filename"] == "n.onnx"

    path.with_name("tokenizer.json").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("theirs")
    with pytest.raises(UsageError, match="another tokenizer's"):
        fused(path, tmp_path / "out" / "m.onnx")
    fused(path, tmp_path / "out" / "m.onnx", force=True)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "mine"


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_config_is_a_sentence(content: str, tmp_path: Path) -> None:
    path = written(tmp_path, "llama/dynamo20")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(FileError, match=r"config\.json"):
        fused(path, tmp_path / "m.onnx")


def test_nothing_is_left_where_the_config_cannot_be_written(tmp_path: Path) -> None:
    path = written(tmp_path / "in", "llama/dynamo20")
    out = tmp_path / "out"
    (out / "genai_config.json").mkdir(parents=True)
    with pytest.raises(FileError, match=r"genai_config\.json"):
        fused(path, out / "m.onnx", force=True)
    assert os.listdir(out) == ["genai_config.json"]


def test_the_command(tmp_path: Path) -> None:
    from click.testing import CliRunner

    path = written(tmp_path, "llama/dynamo20", CONFIG)
    words = ["fuse", str(path), "--target", "ort", "--genai-config"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "Beside it: genai_config.json" in result.output
    assert (tmp_path / "genai_config.json").exists()


# --- generating ----------------------------------------------------------------------------------


def generated(folder: Path, prompts: Sequence[Sequence[int]], count: int, split: int = 0) -> Any:
    """What onnxruntime-genai generates greedily; prompts are padded behind.

    Args:
        split: append the prompt in two parts, the first of this length.
    """
    genai = pytest.importorskip("onnxruntime_genai")
    length = max(map(len, prompts))
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=length + count, batch_size=len(prompts), do_sample=False)
    generator = genai.Generator(model, params)
    padded = np.array([[*p, *[0] * (length - len(p))] for p in prompts], np.int32)
    parts = [padded[:, :split], padded[:, split:]] if split else [padded]
    for part in parts:
        generator.append_tokens(part)
    while not generator.is_done():
        generator.generate_next_token()
    return [list(generator.get_sequence(i))[length:] for i in range(len(prompts))]


PROMPT = PROMPTS[0]
FORMS = ["llama/dynamo20", "qwen2/torchscript", "qwen3/dynamo23", "gemma2/dynamo20"]
FORMS += ["llama/transformers", "phi3/dynamo20", "gpt2/dynamo20", "gpt_neox/torchscript"]


@pytest.mark.parametrize("options", [{}, {"padding": "none"}, {"target": "onnx"}], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_generated_as_by_the_original(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    path = written(tmp_path / "in", name, ENDLESS)
    fused(path, tmp_path / "out" / "m.onnx", **options)
    wanted = step_by_step(path, name, [PROMPT], 12)
    assert generated(tmp_path / "out", [PROMPT], 12) == wanted
    assert generated(tmp_path / "out", [PROMPT], 12, split=4) == wanted


def test_prompts_of_several_lengths(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    path = written(tmp_path / "in", "llama/dynamo20", ENDLESS)
    fused(path, tmp_path / "out" / "m.onnx")
    prompts = [PROMPT, PROMPT[:4], PROMPT[1:6]]
    wanted = step_by_step(path, "llama/dynamo20", prompts, 9)
    assert generated(tmp_path / "out", prompts, 9) == wanted
