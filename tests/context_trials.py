"""Ways in which what a model holds for backends cannot be used, each made of a model that holds it.

change = damaged(model, folder)             # another file, or the same with something hidden
change.load(["openvino:CPU"])               # what a user gets; `change.says` is why
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import onnxgen
from onnxgen.contexts.forms import Held, decode, encode
from onnxgen.contexts.values import Blob, Context
from onnxgen.element_types import bits_of
from onnxgen.reading import open_model

OPENVINO = "openvino:CPU"


@dataclass(frozen=True)
class Outcome:
    """What a session did.

    Attributes:
        picked: the backends that ran its regions, or "original", each once.
        reasons: why backends were passed over.
        outputs: of each run, by name.
    """

    picked: tuple[str, ...]
    reasons: tuple[str, ...]
    outputs: tuple[Mapping[str, Any], ...]


def loaded(path: Path, prefer: Sequence[str] | None, feeds: Sequence[Mapping[str, Any]]) -> Outcome:
    """A model loaded as a user loads it, and run on each of the feeds."""
    session = onnxgen.load(path, prefer=prefer)
    names = [each.name for each in session.get_outputs()]
    found = [dict(zip(names, session.run(None, feed), strict=True)) for feed in feeds]
    reasons = [passed.reason for choice in session.choices for passed in choice.passed]
    picked = dict.fromkeys(session.picked.values())
    return Outcome(tuple(picked), tuple(dict.fromkeys(reasons)), tuple(found))


def damaged(path: Path, to: Path) -> None:
    """Bytes of OpenVINO's first blob flipped where they lie in the file; its hash stays."""
    held = decode(onnx.load(path))
    blob = held.blobs[_context(held).blob.sha256].raw_data
    _overwrite(path, to, path.read_bytes().index(blob) + len(blob) // 2, _flip)


def rehashed(path: Path, to: Path) -> str:
    """As `damaged`, and the table agrees with the bytes; returns the new hash, which nobody trusts."""
    proto = onnx.load(path)
    held = decode(proto)
    before = _context(held).blob
    data = bytearray(held.blobs[before.sha256].raw_data)
    middle = len(data) // 2
    data[middle : middle + 16] = _flip(bytes(data[middle : middle + 16]))
    after = Blob(hashlib.sha256(data).hexdigest(), len(data))
    tensor = onnx.TensorProto()
    tensor.CopyFrom(held.blobs[before.sha256])
    tensor.raw_data = bytes(data)
    held.blobs[after.sha256] = tensor
    _edit(held, lambda each: replace(each, blob=after) if each.blob == before else each)
    onnx.save(encode(held, held.encoding or "function"), to)
    return after.sha256


def of_another_version(path: Path, to: Path) -> None:
    """OpenVINO's objects were made by a version that is not here."""
    _with_identity(path, to, version="2019.1.0")


def for_another_machine(path: Path, to: Path) -> None:
    """Their compatibility string is that of another machine."""
    _with_identity(path, to, compatibility="another machine")


def reweighted(path: Path, original: Path, to: Path, original_to: Path) -> str:
    """The largest weight of a region turned around where it lies, in both models; returns its name."""
    opened = open_model(path)
    held = decode(opened.proto)
    tensors = {each.name: each for each in held.proto.graph.initializer}
    names = [name for region in held.table.regions for name in region.weights]
    places = {each.name: each for each in opened.weights}
    name = max(
        (each for each in names if each in places and _is_floating(tensors[each])),
        key=lambda each: places[each].length,
        default="",
    )
    if not name:
        return ""
    width = (bits_of(tensors[name].data_type) or 8) // 8

    def turned(data: bytes) -> bytes:
        return np.frombuffer(data, f"V{width}")[::-1].tobytes()

    for source, target in ((path, to), (original, original_to)):
        place = next(each for each in open_model(source).weights if each.name == name)
        _overwrite(source, target, place.offset, turned, place.length)
    return name


@contextmanager
def not_trusted(folder: Path) -> Iterator[None]:
    """As another user, who added nothing."""
    before = os.environ.get("ONNXGEN_CONFIG")
    os.environ["ONNXGEN_CONFIG"] = str(folder / "nobody")
    try:
        yield
    finally:
        if before is None:
            del os.environ["ONNXGEN_CONFIG"]
        else:
            os.environ["ONNXGEN_CONFIG"] = before


@contextmanager
def without_openvino() -> Iterator[Callable[[Path, Sequence[Mapping[str, Any]]], Outcome]]:
    """A process in which the package cannot be imported, to load models in."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_hide_openvino) as pool:
        yield lambda path, feeds: pool.submit(_loaded_by, _user(), path, feeds).result()


def _user() -> dict[str, str]:
    return {name: text for name, text in os.environ.items() if name.startswith("ONNXGEN_")}


def _loaded_by(user: dict[str, str], path: Path, feeds: Sequence[Mapping[str, Any]]) -> Outcome:
    os.environ.update(user)  # whose blobs are trusted
    return loaded(path, [OPENVINO], feeds)


def _hide_openvino() -> None:
    import sys

    sys.modules["openvino"] = None  # type: ignore[assignment]


def _context(held: Held) -> Context:
    contexts = (each for region in held.table.regions for each in region.contexts)
    return next(each for each in contexts if each.backend == OPENVINO)


def _edit(held: Held, change: Callable[[Context], Context]) -> None:
    held.table.regions = [
        replace(
            region,
            contexts=tuple(
                change(each) if each.backend == OPENVINO else each for each in region.contexts
            ),
        )
        for region in held.table.regions
    ]


def _with_identity(path: Path, to: Path, **fields: str) -> None:
    held = decode(onnx.load(path))
    _edit(held, lambda each: replace(each, identity=replace(each.identity, **fields)))
    onnx.save(encode(held, held.encoding or "function"), to)


def _overwrite(
    path: Path, to: Path, offset: int, change: Callable[[bytes], bytes], length: int = 16
) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + length] = change(bytes(data[offset : offset + length]))
    to.write_bytes(data)


def _flip(data: bytes) -> bytes:
    return bytes(each ^ 0xFF for each in data)


def _is_floating(tensor: onnx.TensorProto) -> bool:
    with contextlib.suppress(KeyError):
        kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        return kind.itemsize > 1 and np.issubdtype(kind, np.floating)
    return False
