"""onnxruntime-genai's Engine runs what `to-paged --genai-config` writes, as the original does."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from onnxgen import pipeline_paged
from onnxgen.analysis.roles import find_roles
from onnxgen.cli import main
from onnxgen.errors import RefusedError, UsageError
from onnxgen.model_io import read_model
from onnxgen.report.values import Report
from onnxgen.targets.genai import Said
from onnxgen.targets.genai_engine import engine_config
from onnxgen.targets.paged import PagedModel, PagedOptions, Pool
from tests.generating import (
    BLOCK,
    CONFIG,
    ENDLESS,
    OUTPUTS,
    PASTS,
    PROMPTS,
    page,
    step_by_step,
    written,
)


def paged(path: Path, output: Path, **options: Any) -> tuple[Report, dict[str, Any]]:
    """Page with --genai-config; the report, and the config as written."""
    report = page(path, output, genai_config=True, **options)
    return report, json.loads((output / "genai_config.json").read_text("utf-8"))


# --- the config ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inline", [False, True])
def test_what_the_graph_says(inline: bool, tmp_path: Path) -> None:
    path = written(tmp_path / "in", "llama/dynamo20", CONFIG)
    path.with_name("tokenizer.json").write_text("{}")
    report, config = paged(path, tmp_path / "out", inline=inline)
    assert report.beside == ["tokenizer.json", "genai_config.json"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(["model.onnx", *report.beside])
    assert not report.warnings
    decoder = config["model"]["decoder"]
    model = onnx.load(tmp_path / "out" / "model.onnx")
    inputs = [value.name for value in model.graph.input]
    assert decoder["inputs"] == {**{name: name for name in inputs[:4]}, **PASTS}
    assert decoder["outputs"] == OUTPUTS
    sizes = ("num_attention_heads", "num_key_value_heads", "head_size", "num_hidden_layers")
    assert [decoder[size] for size in sizes] == [6, 3, 48, 2]
    assert decoder["hidden_size"] == 84
    assert decoder["filename"] == "model.onnx"
    assert config["model"]["type"] == "llama"
    assert config["model"]["vocab_size"] == 131
    assert config["model"]["context_length"] == 96
    assert config["search"]["past_present_share_buffer"] is True
    assert config["engine"] == {
        "dynamic_batching": {
            "block_size": BLOCK,
            "num_blocks": 16 * 96 // BLOCK,
            "max_batch_size": 16,
            "max_scheduled_tokens": 2048,
        }
    }


def test_a_long_context_does_not_size_the_pools(tmp_path: Path) -> None:
    long = {**CONFIG, "max_position_embeddings": 131072}
    _, config = paged(written(tmp_path, "llama/dynamo20", long), tmp_path / "out", block_size=32)
    assert config["model"]["context_length"] == 131072
    assert config["engine"]["dynamic_batching"]["num_blocks"] == 16 * 1024 // 32


def test_rotary_tables_limit_the_length(tmp_path: Path) -> None:
    path = written(tmp_path / "in", "llama/dynamo20", CONFIG)
    options = pipeline_paged.PageOptions(
        output=tmp_path / "out",
        paged=PagedOptions(flavor="ort"),
        max_length=40,
        verify=False,
        genai_config=True,
    )
    pipeline_paged.to_paged(path, options, lambda message: None)
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text("utf-8"))
    assert config["model"]["context_length"] == config["search"]["max_length"] == 40
    assert config["model"]["decoder"]["num_attention_heads"] == 6


def test_rows_that_are_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path, "llama/dynamo20", CONFIG)
    _, config = paged(path, tmp_path / "out", logits="indices")
    assert config["model"]["decoder"]["inputs"]["logits_indices"] == "logits_indices"


def test_an_input_that_the_engine_does_not_feed(tmp_path: Path) -> None:
    path = written(tmp_path, "llama/dynamo20", CONFIG)
    with pytest.raises(RefusedError, match="does not feed the input 'slot_mapping'"):
        paged(path, tmp_path / "out", slot_mapping=True)
    assert not (tmp_path / "out").exists()


def test_pools_that_differ_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "llama/dynamo20")
    model, roles = read_model(path), find_roles(read_model(path))
    first = Pool("a", "b", "past_key_values.0.key", "c", 3, 48, _dtype(roles))
    second = dataclasses.replace(first, name="past_key_values.0.value", size=64)
    model.graph.inputs.clear()
    found = PagedModel(model, PagedOptions(), (first, second), 1, (), "input_ids", ())
    with pytest.raises(RefusedError, match=r"key_values\.0\.value' has 3 heads of 64 float"):
        engine_config(found, roles, Said({}, {}), filename="m.onnx")


def _dtype(roles: Any) -> Any:
    return roles.inputs[roles.pairs[0].past].dtype


def test_files_of_another_model_are_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "in", "llama/dynamo20", CONFIG)
    out = tmp_path / "out"
    out.mkdir()
    (out / "genai_config.json").write_text('{"model": {"decoder": {"filename": "other.onnx"}}}')
    with pytest.raises(UsageError, match="is another model's"):
        paged(path, out)
    assert os.listdir(out) == ["genai_config.json"]
    paged(path, out, force=True)
    paged(path, out)  # its own


def test_the_input_is_replaced_with_force_only(tmp_path: Path) -> None:
    path = written(tmp_path, "llama/dynamo20", CONFIG)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="is the input itself: replacing it needs --force"):
        paged(path, tmp_path)
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.onnx"]
    paged(path, tmp_path, force=True)
    assert "block_table" in {value.name for value in onnx.load(path).graph.input}


def test_the_command(tmp_path: Path) -> None:
    path = written(tmp_path, "llama/dynamo20")
    result = CliRunner().invoke(main, ["to-paged", str(path), "--genai-config"])
    assert result.exit_code == 0, result.output
    assert "Beside it: genai_config.json" in result.output
    assert "genai_config.json does not say which token ends a text" in result.output
    assert (tmp_path / "model.paged" / "genai_config.json").exists()


# --- generating ----------------------------------------------------------------------------------


MORE = [
    *PROMPTS,
    [26, 43, 83, 27, 95, 28, 84, 19, 71, 69, 39, 93, 75, 10, 58, 20, 97, 49, 2],
    [111, 15],
    [62, 57, 24, 1],
    [47, 18, 86, 53, 40, 72, 30, 99, 11, 68, 21, 94, 36],
]
NEW = [11, 9, 7, 12, 8, 10, 6, 13, 9, 7]


def begun(engine: Any, tokens: Sequence[int], count: int) -> Any:
    """A request that generates so many tokens greedily."""
    genai = pytest.importorskip("onnxruntime_genai")
    request = engine.create_request()
    options = genai.TurnOptions(request)
    options.set_max_generated_tokens(count)
    options.set_do_sample(False)
    request.begin_turn(np.array(tokens, np.int32), options)
    return request


class Client:
    """Sends requests to an Engine, all at once, and puts off the youngest where blocks run out.

    Attributes:
        found: the new tokens of each prompt.
        put_off: how often a request was closed and later sent again with what it had.
    """

    def __init__(self, folder: Path, **batching: int) -> None:
        self._genai = pytest.importorskip("onnxruntime_genai")
        path = folder / "genai_config.json"
        config = json.loads(path.read_text("utf-8"))
        config["engine"]["dynamic_batching"].update(batching)
        path.write_text(json.dumps(config))
        self._engine = self._genai.Engine(self._genai.Model(str(folder)))
        self._requests: dict[int, Any] = {}
        self.found: list[list[int]] = [[] for _ in MORE]
        self.put_off = 0

    def generate(self) -> None:
        """Generate greedily of all prompts, to the length that each has in NEW."""
        flags = self._genai.EngineEventFlags
        buffer = self._engine.create_event_buffer(64)
        later = list(range(len(MORE)))
        for _ in range(2000):
            while later and not (self.put_off and self._requests):
                self._send(later.pop(0))
            if not self._requests:
                return
            blocked = False
            for event in self._engine.run(buffer):
                said = int(event.flags)
                assert not said & int(flags.FAILED), event.error_code
                blocked |= bool(said & int(flags.CAPACITY_BLOCKED))
                for index, request in list(self._requests.items()):
                    if event.request != request:
                        continue
                    if said & int(flags.TOKEN):
                        self.found[index].append(event.token)
                    if said & int(flags.TURN_FINISHED):
                        self._requests.pop(index).close()  # its blocks are others' now
                        if later:
                            self._send(later.pop(0))
            if blocked:
                last = max(self._requests)
                self._requests.pop(last).close()
                later.insert(0, last)
                self.put_off += 1
        raise AssertionError(f"requests {sorted(self._requests)} never end: {self.found}")

    def _send(self, index: int) -> None:
        tokens = [*MORE[index], *self.found[index]]
        self._requests[index] = begun(self._engine, tokens, NEW[index] - len(self.found[index]))


def alone(path: Path, name: str) -> list[list[int]]:
    """What the original generates of each prompt, step by step."""
    found = step_by_step(path, name, MORE, max(NEW))
    return [tokens[:count] for tokens, count in zip(found, NEW, strict=True)]


FORMS = ["llama/dynamo20", "qwen3/dynamo20", "mistral/dynamo20", "gpt2/dynamo20"]


@pytest.mark.parametrize("name", FORMS)
def test_generated_as_by_the_original(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    path = written(tmp_path / "in", name, ENDLESS)
    paged(path, tmp_path / "out")
    wanted = alone(path, name)
    client = Client(tmp_path / "out")
    client.generate()
    assert client.found == wanted
    assert not client.put_off
    few = Client(tmp_path / "out", num_blocks=20, max_scheduled_tokens=12, max_batch_size=8)
    few.generate()
    assert few.found == wanted
    assert few.put_off


@pytest.mark.parametrize("options", [{"logits": "last"}, {"logits": "indices"}, {"inline": True}])
def test_other_forms_of_a_paged_model(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    path = written(tmp_path / "in", "llama/dynamo20", ENDLESS)
    paged(path, tmp_path / "out", **options)
    client = Client(tmp_path / "out", num_blocks=24, max_scheduled_tokens=9)
    client.generate()
    assert client.found == alone(path, "llama/dynamo20")


def test_a_beginning_that_the_engine_shares(tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    path = written(tmp_path / "in", "llama/dynamo20", ENDLESS)
    paged(path, tmp_path / "out")
    wanted = alone(path, "llama/dynamo20")
    engine = genai.Engine(genai.Model(str(tmp_path / "out")))
    buffer = engine.create_event_buffer(8)
    cached = []
    for index in (5, 6):  # alike in 18 tokens
        request = begun(engine, MORE[index], NEW[index])
        tokens: list[int] = []
        while len(tokens) < NEW[index]:
            for event in engine.run(buffer):
                if int(event.flags) & int(genai.EngineEventFlags.TOKEN):
                    tokens.append(event.token)
                if int(event.flags) & int(genai.EngineEventFlags.TURN_FINISHED):
                    cached.append(event.usage.cached_prompt_tokens)
        assert tokens == wanted[index]
        request.close()
    assert cached == [0, 16]
