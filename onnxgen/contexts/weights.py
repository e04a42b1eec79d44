"""Where the contents of a model's initializers lie, and their hashes.

    weights = Weights(opened)
    weights["w"].data                 # uint8 [bytes], mapped: read when it is looked at
    weights.sha256(["w", "b"])

Hashing gigabytes whenever a model is loaded would cost more than what a blob saves. So the hash of a
piece of a file is remembered in the user's cache folder under what the system says of that file: its
number, its size, and when it was last changed in content or otherwise, in nanoseconds.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto as T

from onnxgen.backends.interface import Weight
from onnxgen.contexts.places import read_json, remember
from onnxgen.contexts.types import elements
from onnxgen.reading import Opened, bytes_needed

_SETTLED = (
    2.0  # seconds: a file that changed just now may change again within one tick of its clock
)
_SMALL = 1 << 16  # bytes that are hashed sooner than looked up


class Weights:
    """The initializers of a model's main graph, by name, each once."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._cut = {weight.name: weight for weight in opened.weights}
        self._tensors = {tensor.name: tensor for tensor in opened.proto.graph.initializer}
        self._maps: dict[Path, npt.NDArray[np.uint8]] = {}
        self._found: dict[str, Weight] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Weight:
        if name not in self._found:
            tensor = self._tensors[name]
            place = self._place(name)
            data = self._within(tensor) if place is None else self._mapped(*place)
            self._found[name] = Weight(tensor.data_type, tuple(tensor.dims), data)
        return self._found[name]

    def sha256(self, names: Sequence[str]) -> str:
        """Of a line for each: its type and sizes, a space, the sha256 of its bytes, a newline."""
        digests = self._digests(names)
        lines = (
            f"{elements(self._tensors[name].data_type, self._tensors[name].dims)} {digests[name]}\n"
            for name in names
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _digests(self, names: Iterable[str]) -> dict[str, str]:
        """The sha256 of each one's bytes; those of large ones are remembered."""
        found: dict[str, str] = {}
        places: dict[Path, dict[str, str]] = {}  # by file: name -> its key in what is remembered
        for name in dict.fromkeys(names):
            place = self._place(name)
            if place is None or place[2] < _SMALL:
                found[name] = _digest(self[name].data)
            else:
                places.setdefault(place[0], {})[name] = f"{place[1]}:{place[2]}"
        for path, keys in places.items():
            known = _Remembered(path)
            unknown = [name for name, key in keys.items() if key not in known.digests]
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                new = pool.map(_digest, [self[name].data for name in unknown])
                known.digests |= {keys[name]: each for name, each in zip(unknown, new, strict=True)}
            if unknown:
                known.keep()
            found |= {name: known.digests[key] for name, key in keys.items()}
        return found

    def _place(self, name: str) -> tuple[Path, int, int] | None:
        """File, offset and bytes of a weight that is in a file; None for one within the proto."""
        tensor = self._tensors[name]
        if name in self._cut:
            return self._opened.path.resolve(), self._cut[name].offset, self._cut[name].length
        if tensor.data_location != T.EXTERNAL:
            return None
        entries = {each.key: each.value for each in tensor.external_data}
        path = self._opened.folder / entries["location"]
        return path, int(entries.get("offset", 0)), bytes_needed(f"tensor '{name}'", tensor)

    def _mapped(self, path: Path, offset: int, length: int) -> npt.NDArray[np.uint8]:
        if not length:  # the file may be empty, and then there is nothing to map
            return np.empty(0, np.uint8)
        if path not in self._maps:
            with path.open("rb") as file:
                # Writable in name, for backends that take no other arrays; no page is ever copied.
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._maps[path] = np.frombuffer(data, np.uint8)
        return self._maps[path][offset : offset + length]

    def _within(self, tensor: onnx.TensorProto) -> npt.NDArray[np.uint8]:
        return np.frombuffer(bytearray(bytes_of(tensor)), np.uint8)


def bytes_of(tensor: onnx.TensorProto) -> bytes:
    """A tensor's bytes as raw_data has them; of strings, each one's length in 8 bytes before it."""
    if tensor.data_type == T.STRING:
        each = (struct.pack("<Q", len(text)) + text for text in tensor.string_data)
        return b"".join(each)
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    array = onnx.numpy_helper.to_array(tensor)
    return onnx.numpy_helper.from_array(array).raw_data


def _digest(data: npt.NDArray[np.uint8]) -> str:
    return hashlib.sha256(data.data).hexdigest()


class _Remembered:
    """Hashes of pieces of one file, as it is now."""

    def __init__(self, path: Path) -> None:
        status = path.stat()
        self._state = [
            str(path),
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        ]
        self._settled = time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED
        self._name = f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"
        kept: Any = read_json("weights", self._name)
        good = isinstance(kept, dict) and kept.get("file") == self._state
        digests = kept.get("digests") if good else None
        self.digests: dict[str, str] = digests if isinstance(digests, dict) else {}

    def keep(self) -> None:
        if self._settled:
            remember("weights", self._name, {"file": self._state, "digests": self.digests})
