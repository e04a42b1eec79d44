"""A model file as it lies: parsed and checked, its large weights left where they are.

    opened = open_model(path)
    opened.proto, opened.weights

`model_io.read_model` makes a model to work on of it. Nothing of onnx-ir is needed here, so that a
model which is only to be run is open soon.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto as T

from onnxgen import wire
from onnxgen.element_types import bits_of
from onnxgen.errors import FileError, RefusedError
from onnxgen.texts import undecodable

# Where a tensor holds its values, if not as raw bytes.
_TYPED = ("float", "int32", "string", "int64", "double", "uint64")


@dataclass(frozen=True)
class Opened:
    """A model file.

    Attributes:
        path: as it was given.
        folder: that the file really lies in, links resolved; external data is relative to it.
        proto: the model; initializers that were cut out hold no data.
        data: the file's bytes, mapped.
        weights: where the data of those initializers is.
        beside: files that blobs of backends are said to be in, as far as they are there.
    """

    path: Path
    folder: Path
    proto: onnx.ModelProto
    data: mmap.mmap
    weights: tuple[wire.Weight, ...]
    beside: tuple[Path, ...] = ()


def open_model(path: Path) -> Opened:
    """Parse a model file and check what can be checked without its weights; see `read_model`.

    The blobs of backends are not looked for: a model without them still runs.

    Raises:
        FileError, RefusedError: as of `read_model`.
    """
    path = Path(path)
    real = _real_file(path)
    try:
        with real.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    try:
        skeleton, weights = wire.cut_weights(data)
        proto = onnx.ModelProto.FromString(skeleton)
    except Exception as error:  # protobuf's DecodeError has no public base class
        detail = str(error) if isinstance(error, wire.WireError) else "it does not parse"
        raise FileError(f"{path} is no ONNX model or is damaged: {detail}") from error
    _check_model(path, proto)
    check_external_data(path, real.parent, [t for t in wire.tensors_of(proto) if not is_blob(t)])
    _check_embedded_data(path, proto, {weight.name for weight in weights})
    beside = tuple(_blob_files(real.parent, proto))
    return Opened(path, real.parent, proto, data, tuple(weights), beside)


def refer_to_file(opened: Opened, initializers: Iterable[onnx.TensorProto]) -> None:
    """Let initializers that were cut out say that their data is in the model file, as external data.

    ONNX Runtime takes it from there, given `opened.folder`.
    """
    cut = {weight.name: weight for weight in opened.weights}
    name = opened.path.resolve().name
    for tensor in initializers:
        weight = cut.get(tensor.name)
        if weight is not None:
            tensor.data_location = T.EXTERNAL
            place = (("location", name), ("offset", weight.offset), ("length", weight.length))
            for key, value in place:
                tensor.external_data.add(key=key, value=str(value))


BLOB = "onnxgen.blob."  # what the names of tensors begin with that hold a backend's blob


def is_blob(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor is what a backend compiled; see docs/contexts.md."""
    return tensor.name.startswith(BLOB)


def _blob_files(folder: Path, proto: onnx.ModelProto) -> Iterator[Path]:
    for function in proto.functions:
        for node in function.node:
            for tensor in (each.t for each in node.attribute if is_blob(each.t)):
                for name in (each.value for each in tensor.external_data if each.key == "location"):
                    if "\0" not in name and (folder / name).is_file():
                        yield folder / name


def _real_file(path: Path) -> Path:
    """The file itself, links resolved; it exists, is a regular file and is not empty."""
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise FileError(f"{path} is a link to {os.readlink(path)}, which is missing") from error
        raise FileError(f"{path} does not exist") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, Python < 3.13
        cause = error.strerror if isinstance(error, OSError) else "its links run in a circle"
        raise FileError(f"{path} cannot be read: {cause}") from error
    if real.is_dir():
        raise FileError(f"{path} is a folder, not a model file")
    if not real.is_file():
        raise FileError(f"{path} is not a regular file")
    if real.stat().st_size == 0:
        raise FileError(f"{path} is empty")
    return real


def _check_model(path: Path, proto: onnx.ModelProto) -> None:
    if not proto.HasField("graph"):
        raise FileError(f"{path} is no ONNX model: it holds no graph")
    if not proto.opset_import:
        raise FileError(f"{path} is no ONNX model, or is truncated: it names no opset")
    if not proto.graph.output:
        raise FileError(f"{path} is no ONNX model: its graph has no outputs")
    names = [each.name for each in proto.graph.input]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise FileError(f"{path} is no valid ONNX model: two of its inputs are called '{twice}'")
    text = undecodable(proto)
    if text is not None:
        raise FileError(f"{path} is damaged: {text}, which is no UTF-8")
    newest = onnx.defs.onnx_opset_version()
    for opset in [*proto.opset_import, *(o for f in proto.functions for o in f.opset_import)]:
        if opset.domain in ("", "ai.onnx") and not 1 <= opset.version <= newest:
            raise FileError(
                f"{path} needs opset {opset.version}, and the installed onnx "
                f"{onnx.__version__} knows 1 to {newest}"
            )
    if proto.graph.sparse_initializer:
        raise RefusedError(f"{path} has sparse initializers, which onnxgen does not handle")


def check_external_data(path: Path, folder: Path, tensors: Iterable[onnx.TensorProto]) -> None:
    """Check every external tensor, and make its location relative to `folder`, links resolved."""
    files: dict[str, tuple[str, int]] = {}
    for tensor in tensors:
        if tensor.data_location != T.EXTERNAL:
            continue
        where = f"{path}: tensor '{tensor.name}'"
        entries = {entry.key: entry for entry in tensor.external_data}
        if "location" not in entries or not entries["location"].value:
            raise FileError(f"{where} is external and does not say where its data is")
        location = entries["location"].value
        if location not in files:
            files[location] = _data_file(path, folder, location)
        entries["location"].value, size = files[location]
        try:
            offset = int(entries["offset"].value) if "offset" in entries else 0
            length = int(entries["length"].value) if "length" in entries else None
        except ValueError as error:
            raise FileError(f"{where} has an offset or a length that is no number") from error
        expected = bytes_needed(where, tensor)
        if offset < 0 or (length is not None and length != expected):
            raise FileError(
                f"{where} has {length} bytes at {offset} of {location}, "
                f"and its type and shape say {expected} bytes"
            )
        if offset + expected > size:
            raise FileError(
                f"{path}: its data file {location} is truncated: tensor '{tensor.name}' "
                f"ends at byte {offset + expected}, the file at {size}"
            )


def _check_embedded_data(path: Path, proto: onnx.ModelProto, cut: Collection[str]) -> None:
    """Check that tensors hold what their shape says; those of the names in `cut` are elsewhere."""
    for tensor in wire.tensors_of(proto):
        external = tensor.data_location == T.EXTERNAL
        if external or (tensor.name in cut and not tensor.raw_data):
            continue
        if min(tensor.dims, default=0) < 0:
            raise FileError(
                f"{path} is damaged: tensor '{tensor.name}' has the shape {list(tensor.dims)}"
            )
        kind, bits = tensor.data_type, bits_of(tensor.data_type)
        if kind == T.UNDEFINED:
            raise FileError(f"{path} is damaged: tensor '{tensor.name}' has no type")
        if bits is None:
            continue  # refused when it is deserialized
        count = math.prod(tensor.dims)
        if tensor.HasField("raw_data") and kind != T.STRING:
            what, held, needed = "bytes", len(tensor.raw_data), -(-count * bits // 8)
        else:
            what, held = "values", sum(len(getattr(tensor, f"{kind}_data")) for kind in _TYPED)
            packed = 0 < bits < 8
            needed = -(-count * bits // 8) if packed else count
            needed *= 2 if kind in (T.COMPLEX64, T.COMPLEX128) else 1
        if held != needed:
            raise FileError(
                f"{path} is damaged: tensor '{tensor.name}' holds {held} {what}, "
                f"and its type and shape say {needed}"
            )


def bytes_needed(where: str, tensor: onnx.TensorProto) -> int:
    """Bytes that the type and shape of an external tensor say; raises FileError, about `where`."""
    bits = bits_of(tensor.data_type)
    if bits is None and tensor.data_type != T.UNDEFINED:
        raise FileError(f"{where} has the unknown type {tensor.data_type}")
    if not bits or min(tensor.dims, default=0) < 0:
        raise FileError(f"{where} is external, and its type or its shape cannot be")
    size: int = math.prod(tensor.dims) * bits
    return -(-size // 8)


def _data_file(path: Path, folder: Path, location: str) -> tuple[str, int]:
    """A data file's real location, relative to the model's real folder, and its size."""
    normal = os.path.normpath(location)
    if os.path.isabs(location) or normal.split(os.sep)[0] == "..":
        raise FileError(f"{path}: its data file {location} lies outside the model's folder")
    # Beside the path that was given, or beside the file that it links to.
    candidates = [path.parent / normal, folder / normal]
    try:
        found = next((candidate for candidate in candidates if candidate.exists()), None)
    except (OSError, ValueError) as error:  # a name that no file can have
        cause = error.strerror if isinstance(error, OSError) else str(error)
        raise FileError(f"{path}: its data file {location} cannot be read: {cause}") from error
    if found is None:
        raise FileError(f"{path}: its data file {location} is missing")
    real = found.resolve()
    if not real.is_relative_to(folder):
        raise FileError(
            f"{path}: its data file {location} links to {real}, "
            f"outside {folder}, the folder that the model lies in"
        )
    if not real.is_file():
        raise FileError(f"{path}: its data file {location} is not a regular file")
    status = real.stat()
    if status.st_nlink > 1:
        raise FileError(
            f"{path}: its data file {location} is hard-linked from {status.st_nlink} places, "
            "which ONNX tools refuse to read; replace it by a copy"
        )
    if not os.access(real, os.R_OK):
        raise FileError(f"{path}: its data file {location} cannot be read: permission denied")
    return str(real.relative_to(folder)), status.st_size
