"""Models whose reading and writing takes every path, and little time."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

from onnxgen.testing import load_corpus_model

SIDE = 192  # of a weight: more than 64 KiB


@cache
def _norm(side: int) -> bytes:
    model = parser.parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[b,s,{side}] x) => (float[b,s,{side}] y) <float two = {{2}}, float e = {{1e-6}}> {{
          q = Pow(x, two)
          m = ReduceMean<axes = [-1]>(q)
          a = Add(m, e)
          r = Sqrt(a)
          n = Div(x, r)
          h = Mul(n, w)
          z = MatMul(h, v)
          y = MatMul(z, u)
        }}""".replace("ReduceMean<axes = [-1]>(q)", "ReduceMean(q, axis)")
    )
    draw = np.random.default_rng(0).standard_normal
    for name, shape in (("w", (side,)), ("v", (side, side)), ("u", (side, side))):
        values = draw(shape, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "axis"))
    return bytes(model.SerializeToString())


def norm() -> onnx.ModelProto:
    """An RMS norm and two products; 300 kB of weights."""
    return onnx.ModelProto.FromString(_norm(SIDE))


@cache
def _decoder() -> bytes:
    return bytes(load_corpus_model("llama/dynamo20").SerializeToString())


def embedded(folder: Path) -> Path:
    """The norm with an older output beside it that has a data file."""
    return _build(folder, norm(), external=False)


def external(folder: Path) -> Path:
    return _build(folder, norm(), external=True)


def decoder(folder: Path) -> Path:
    """A decoder with external data, and files of a tokenizer."""
    path = _build(folder, onnx.ModelProto.FromString(_decoder()), external=True)
    config = {"bos_token_id": 1, "eos_token_id": 2, "model_type": "llama"}
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        (path.parent / name).write_text(json.dumps(config))
    (folder / "out" / "tokenizer.json").write_text(json.dumps(config))
    return path


def _build(folder: Path, model: onnx.ModelProto, *, external: bool) -> Path:
    for name in ("in", "out"):
        (folder / name).mkdir()
        (folder / name).chmod(0o777)
    path = folder / "in" / "model.onnx"
    save(model, path, "model.data" if external else "")
    old = folder / "out"
    save(norm(), old / "model.fused.onnx", "model.fused.0123456789ab.data")
    (folder / "report.json").write_text('{\n  "schema": 1\n}\n')
    return path


def save(model: onnx.ModelProto, path: Path, location: str = "") -> None:
    if location:
        onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=256)
        (path.parent / location).chmod(0o644)
    else:
        path.write_bytes(model.SerializeToString())


def locate(path: Path, **entries: object) -> None:
    """Change where the first external tensor of a model is said to be."""
    model = onnx.load(path, load_external_data=False)
    tensor = next(each for each in model.graph.initializer if each.data_location)
    known = {entry.key: entry for entry in tensor.external_data}
    for key, value in entries.items():
        known[key].value = str(value)
    path.write_bytes(model.SerializeToString())


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.chmod(0o777)
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
