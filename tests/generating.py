"""What tests of generation share: corpus models in folders, prompts, and what is generated alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from onnxgen.pipeline_paged import PageOptions, to_paged
from onnxgen.report.values import Report
from onnxgen.targets.paged import PagedOptions
from onnxgen.testing import CorpusEntry, corpus

CONFIG = {"model_type": "llama", "max_position_embeddings": 96, "bos_token_id": 1}
CONFIG |= {"eos_token_id": 2, "pad_token_id": 0}
# A number that no model generates, so that every generation runs to its length.
ENDLESS = {**CONFIG, "eos_token_id": 130, "vocab_size": 131}
BLOCK = 4  # slots: short prompts have several blocks
PROMPTS = [
    [7, 61, 3, 90, 44, 17, 9],
    [5],
    [100, 2, 64, 8, 33, 12, 77, 41, 19, 56, 120, 6, 88, 31, 70, 4, 23],
    [9, 9, 8],
    [14, 92, 65, 35, 89, 79, 32, 38, 46],
    [26, 43, 83, 27, 95, 28, 84, 19, 71, 69, 39, 93, 75, 10, 58, 20, 97, 49, 44, 59, 23, 7, 81],
]
# What genai_config.json says of the names of a decoder.
PASTS = {
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
}
OUTPUTS = {
    "logits": "logits",
    "present_key_names": "present.%d.key",
    "present_value_names": "present.%d.value",
}


def entry(name: str) -> CorpusEntry:
    (found,) = corpus(name)
    return found


def written(folder: Path, name: str, config: dict[str, Any] | None = None) -> Path:
    """A corpus model in a folder of its own, with a config.json unless it is None."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    path.write_bytes(entry(name).load().SerializeToString())
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return path


def page(
    path: Path,
    output: Path,
    *,
    inline: bool = False,
    force: bool = False,
    genai_config: bool = False,
    **options: Any,
) -> Report:
    """Page a model, in blocks of four slots unless told otherwise; proofs are `test_to_paged`'s."""
    paged = PagedOptions(**{"block_size": BLOCK, **options})
    asked = PageOptions(
        output, paged, verify=False, inline=inline, force=force, genai_config=genai_config
    )
    return to_paged(path, asked, lambda message: None)


def step_by_step(path: Path, name: str, prompts: Sequence[Sequence[int]], count: int) -> Any:
    """What the export itself generates greedily, each prompt alone; [B, count]."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    info = entry(name).info
    inputs = {value["role"]: key for key, value in info["inputs"].items()}
    pasts = [k for k, v in info["inputs"].items() if v["role"] in ("past_key", "past_value")]
    outputs = list(info["outputs"])
    chosen = []
    for prompt in prompts:
        feeds = {k: v for k, v in entry(name).feeds(1, len(prompt), 0).items() if k in pasts}
        new, tokens = list(prompt), []
        total = len(prompt)
        for _ in range(count):
            feeds[inputs["ids"]] = np.array([new])
            feeds[inputs["mask"]] = np.ones((1, total), np.int64)
            if "positions" in inputs:
                feeds[inputs["positions"]] = np.arange(total - len(new), total)[None]
            found = session.run(outputs, feeds)
            new = [int(found[0][0, -1].argmax())]
            tokens += new
            total += 1
            feeds = dict(zip(pasts, found[1:], strict=True))
        chosen.append(tokens)
    return chosen
