"""A model of 20 GB whose weights are a hole in a file: what rewriting it takes.

The model is a real export with wider feed-forward layers; only their matrices are grown, and with
them the file. A hole is read as zeros and takes no disk, so the file is as large as it says to
whoever reads it all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import helper

from onnxgen.testing import load_corpus_model

SIZE = 20 * 10**9
MOST = 10**9  # bytes of anonymous memory
_SHARES = re.compile(rb"^(RssAnon|RssFile):\s+(\d+) kB", re.MULTILINE)


def measure(*, long: bool) -> tuple[list[tuple[str, ...]], list[str], list[str]]:
    """Rows of the table, notes and failures."""
    rows, wrong = [], []
    forms = ["llama/dynamo20", "qwen3/torchscript", "gemma2/dynamo23"] if long else [_SHORT]
    with tempfile.TemporaryDirectory(prefix="onnxgen-proof-") as name:
        if not _knows_holes(Path(name)):
            return [], ["20 GB: not run, the file system here knows no holes"], []
        for form in forms:
            row, failures = _fuse(form, Path(name) / form.replace("/", "-"))
            rows.append(row)
            wrong += [f"20 GB, {form}: {line}" for line in failures]
    return rows, [], wrong


_SHORT = "llama/dynamo20"


def _fuse(form: str, folder: Path) -> tuple[tuple[str, ...], list[str]]:
    folder.mkdir()
    path = folder / "model.onnx"
    grow(load_corpus_model(form), path, SIZE)
    data = path.with_name("model.data")
    before = (data.stat().st_size, data.stat().st_mtime_ns, data.stat().st_blocks)
    command = [sys.executable, "-m", "onnxgen", "fuse", str(path), "--no-verify"]
    started = time.monotonic()
    code, most, said = _watched(command)
    seconds = time.monotonic() - started
    new = [p for p in folder.iterdir() if p.name not in ("model.onnx", "model.data")]
    written = sum(each.stat().st_size for each in new)
    wrong = []
    if code:
        wrong.append(f"ended with {code}: {said[-300:]}")
    if most > MOST:
        wrong.append(f"took {most / 1e6:.0f} MB of anonymous memory")
    if written > 50e6 or [each.name for each in new] != ["model.fused.onnx"]:
        wrong.append(f"wrote {written} bytes: {sorted(each.name for each in new)}")
    after = (data.stat().st_size, data.stat().st_mtime_ns, data.stat().st_blocks)
    if after != before:
        wrong.append("the data file changed")
    what = (
        f"{data.stat().st_size / 1e9:.0f} GB of weights in a sparse file ({form})",
        "fuse, into the same folder",
        str(code),
        f"{most / 1e6:.0f} MB of anonymous memory at most, {seconds:.0f} s, "
        f"{written / 1e6:.1f} MB written",
        "new",
        "intact" if after == before else "changed",
        "nothing",
    )
    return what, wrong


def grow(model: onnx.ModelProto, path: Path, size: int) -> None:
    """Write a model with the matrices of its feed-forward layers, the widest, as wide as it takes."""
    widths = {}
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 2:
            for dim in tensor.dims:
                widths[dim] = widths.get(dim, 0) + 1
    hidden = max(widths, key=lambda dim: widths[dim])
    inner = max(
        (dim for dim in widths if dim != hidden and _pairs(model, hidden, dim) >= 4),
        key=lambda dim: _pairs(model, hidden, dim),
    )
    matrices = _pairs(model, hidden, inner)
    wide = -(-size // (4 * hidden * matrices * 64)) * 64
    offset = 0
    with open(path.with_name("model.data"), "wb") as file:
        for tensor in model.graph.initializer:
            dims = list(tensor.dims)
            grown = sorted(dims) == sorted([hidden, inner]) and tensor.data_type == 1
            if not grown:
                continue
            dims = [wide if dim == inner else dim for dim in dims]
            length = 4 * dims[0] * dims[1]
            del tensor.dims[:]
            tensor.dims.extend(dims)
            tensor.ClearField("raw_data")
            del tensor.float_data[:]
            tensor.data_location = onnx.TensorProto.EXTERNAL
            entries = (("location", "model.data"), ("offset", offset), ("length", length))
            for key, value in entries:
                tensor.external_data.add(key=key, value=str(value))
            offset += -(-length // 4096) * 4096
        file.truncate(offset)
    del model.graph.value_info[:]  # they say the old width
    helper.set_model_props(model, {})
    onnx.save(model, path)


def _pairs(model: onnx.ModelProto, one: int, other: int) -> int:
    """How many matrices are of these two sizes."""
    return sum(sorted(tensor.dims) == sorted([one, other]) for tensor in model.graph.initializer)


def _watched(command: Sequence[str]) -> tuple[int, int, str]:
    """Run a command; its exit code, the most anonymous memory of it and its children, its words."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        most = 0
        while process.poll() is None:
            most = max(most, sum(map(_anonymous, [process.pid, *_children(process.pid)])))
            time.sleep(0.01)
        said.seek(0)
        return process.returncode, most, said.read()


def _children(process: int) -> list[int]:
    try:
        return [*map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())]
    except OSError:
        return []


def _anonymous(process: int) -> int:
    try:
        found = dict(_SHARES.findall(Path(f"/proc/{process}/status").read_bytes()))
    except OSError:
        return 0
    return 1024 * int(found.get(b"RssAnon", 0))


def _knows_holes(folder: Path) -> bool:
    with open(folder / "hole", "wb") as file:
        file.truncate(1 << 30)
        return os.fstat(file.fileno()).st_blocks < 1000
