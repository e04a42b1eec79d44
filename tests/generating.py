"""What tests of generation share: corpus models in folders, and what they generate alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from onnxgen.testing import CorpusEntry, corpus

CONFIG = {"model_type": "llama", "max_position_embeddings": 96, "bos_token_id": 1}
CONFIG |= {"eos_token_id": 2, "pad_token_id": 0}
# A number that no model generates, so that every generation runs to its length.
ENDLESS = {**CONFIG, "eos_token_id": 130, "vocab_size": 131}


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
