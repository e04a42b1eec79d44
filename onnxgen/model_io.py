"""Reading models safely, and writing them so that nothing half done is ever left.

    model = read_model(path)
    with staged(model, output, source=path, force=False) as stage:
        ...                 # stage.path is complete and loads: prove it
        stage.commit()      # move it into place; without this everything written is removed

Weights are memory-mapped, whether they are embedded or external, and read only where a
rewrite asks for their values.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from onnxgen import wire
from onnxgen.errors import FileError, RefusedError
from onnxgen.soundness import UnsoundError, check_sound
from onnxgen.staging import Staged, staged
from onnxgen.tensor_slots import EmbeddedTensor, tensor_slots
from onnxgen.texts import undecodable

__all__ = ["Staged", "data_files", "read_model", "staged"]

# Where a tensor holds its values, if not as raw bytes.
_TYPED = ("float", "int32", "string", "int64", "double", "uint64")


def read_model(path: Path) -> ir.Model:
    """Read a model; its weights stay on disk, memory-mapped, embedded ones too.

    External tensors are `ir.ExternalTensor`s whose `base_dir` is the folder that the model
    file really lies in and whose `location` is relative to it, with links resolved. They are
    followed only within that folder: Hugging Face's cache, where model and data both link to
    one folder of blobs, can be read; a location or a link that leads elsewhere cannot.

    Raises:
        FileError: the file or its external data is missing, broken, truncated, unsafe, or of
            an opset that the installed onnx does not know.
        RefusedError: the model holds what onnxgen would lose (sparse initializers).
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
    _check_external_data(path, real.parent, proto)
    _check_embedded_data(path, proto, {weight.name for weight in weights})
    try:
        with _quiet():
            model = ir.serde.deserialize_model(proto)
        for weight in weights:
            _embed(model, weight, data)
    except Exception as error:
        detail = " ".join(str(error.__cause__ or error).split())[:300]
        raise FileError(f"{path} is no valid ONNX model: {detail}") from error
    _believe_weights(model)
    _check_connected(path, model)
    try:
        check_sound(model)
    except UnsoundError as error:
        raise FileError(f"{path} is no valid ONNX model: {error}") from error
    for slot in tensor_slots(model):
        if isinstance(slot.tensor, ir.ExternalTensor):
            slot.tensor.base_dir = str(real.parent)
    return model


def data_files(model: ir.Model) -> list[Path]:
    """The files beside a model that hold its tensors, each once."""
    tensors = (slot.tensor for slot in tensor_slots(model))
    paths = (each.path for each in tensors if isinstance(each, ir.ExternalTensor))
    return [Path(path) for path in dict.fromkeys(paths)]


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


def _believe_weights(model: ir.Model) -> None:
    """A weight is of its tensor's type and shape, whatever the file declares its value to be."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and not value.is_graph_input():
                value.dtype = value.const_value.dtype
                value.shape = ir.Shape(value.const_value.shape.numpy())


def _check_connected(path: Path, model: ir.Model) -> None:
    """onnx-ir makes up a value for a name that nothing makes; so does no runtime."""
    roots: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for root in roots:
        for node in ir.traversal.RecursiveGraphIterator(root):
            for value in node.inputs:
                if value is not None and not _is_made(value):
                    raise FileError(
                        f"{path} is no valid ONNX model: node '{node.name}' ({node.op_type}) "
                        f"reads '{value.name}', which nothing makes"
                    )
    for value in model.graph.outputs:
        if not _is_made(value):
            raise FileError(
                f"{path} is no valid ONNX model: nothing makes its output '{value.name}'"
            )


def _is_made(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()


@contextmanager
def _quiet() -> Iterator[None]:
    """What onnx-ir warns of while it reads is checked here, and said once."""
    logger = logging.getLogger("onnx_ir")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _embed(model: ir.Model, weight: wire.Weight, data: mmap.mmap) -> None:
    """Give an initializer its weight as a view of the mapped file."""
    value = model.graph.initializers[weight.name]
    header = value.const_value
    assert header is not None
    dtype = weight.dtype.numpy().newbyteorder("<")
    expected = int(np.prod(weight.shape, dtype=np.int64)) * dtype.itemsize
    if weight.length != expected:
        raise ValueError(
            f"initializer '{weight.name}' holds {weight.length} bytes, and its type and shape "
            f"say {expected}"
        )
    flat = np.frombuffer(data, np.uint8, weight.length, weight.offset)
    value.const_value = EmbeddedTensor(
        flat.view(dtype).reshape(weight.shape),
        dtype=weight.dtype,
        name=weight.name,
        doc_string=header.doc_string,
        metadata_props=dict(header.metadata_props),
    )


def _check_external_data(path: Path, folder: Path, proto: onnx.ModelProto) -> None:
    """Check every external tensor, and make its location relative to `folder`, links resolved."""
    files: dict[str, tuple[str, int]] = {}
    for tensor in wire.tensors_of(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
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
        expected = _bytes_needed(where, tensor)
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
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        if external or (tensor.name in cut and not tensor.raw_data):
            continue
        if min(tensor.dims, default=0) < 0:
            raise FileError(
                f"{path} is damaged: tensor '{tensor.name}' has the shape {list(tensor.dims)}"
            )
        try:
            dtype = ir.DataType(tensor.data_type)
        except ValueError:
            continue  # refused when it is deserialized
        if dtype == ir.DataType.UNDEFINED:
            raise FileError(f"{path} is damaged: tensor '{tensor.name}' has no type")
        count = math.prod(tensor.dims)
        if tensor.HasField("raw_data") and dtype != ir.DataType.STRING:
            what, held, needed = "bytes", len(tensor.raw_data), -(-count * dtype.bitwidth // 8)
        else:
            what, held = "values", sum(len(getattr(tensor, f"{kind}_data")) for kind in _TYPED)
            packed = dtype != ir.DataType.STRING and dtype.bitwidth < 8
            needed = -(-count * dtype.bitwidth // 8) if packed else count
            needed *= 2 if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128) else 1
        if held != needed:
            raise FileError(
                f"{path} is damaged: tensor '{tensor.name}' holds {held} {what}, "
                f"and its type and shape say {needed}"
            )


def _bytes_needed(where: str, tensor: onnx.TensorProto) -> int:
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError as error:
        raise FileError(f"{where} has the unknown type {tensor.data_type}") from error
    if dtype in (ir.DataType.UNDEFINED, ir.DataType.STRING) or min(tensor.dims, default=0) < 0:
        raise FileError(f"{where} is external, and its type or its shape cannot be")
    count = 1
    for dim in tensor.dims:
        count *= dim
    return -(-count * dtype.bitwidth // 8)


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
