"""A model's proto, to be changed a little before it runs; its weights stay where they are, on disk.

Embedded ones are read by the runtime as external data too: of the model file itself.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import onnx
import onnx_ir as ir

from onnxgen.errors import FileError
from onnxgen.model_io import read_model
from onnxgen.tensor_slots import tensor_slots
from onnxgen.wire import cut_weights, tensors_of


class Placed(NamedTuple):
    """A serialized model, and the folder that its external data is relative to."""

    data: bytes
    folder: Path


Source = Path | bytes | Placed


def opened(source: Source) -> tuple[onnx.ModelProto, Path | None]:
    """The model, and the folder that its external data is relative to; None where there is none."""
    if isinstance(source, bytes):
        return onnx.ModelProto.FromString(source), None
    if isinstance(source, Placed):
        return onnx.ModelProto.FromString(source.data), source.folder
    with (
        source.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        skeleton, weights = cut_weights(data)
    proto = onnx.ModelProto.FromString(skeleton)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for weight in weights:
        tensor = tensors[weight.name]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        place = (("location", source.name), ("offset", weight.offset), ("length", weight.length))
        for key, value in place:
            tensor.external_data.add(key=key, value=str(value))
    return proto, _relocate(proto, source.parent)


def read(source: Source) -> ir.Model:
    """The model, as `read_model` reads a path.

    Raises:
        FileError: it cannot be read as a model.
    """
    if isinstance(source, Path):
        return read_model(source)
    try:
        proto, folder = opened(source)
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # protobuf's DecodeError has no public base class
        raise FileError("the serialized model is no ONNX model or is damaged") from error
    for slot in tensor_slots(model):
        if isinstance(slot.tensor, ir.ExternalTensor) and folder is not None:
            slot.tensor.base_dir = str(folder)
    return model


def expose(proto: onnx.ModelProto, names: Iterable[str]) -> None:
    """Make inner values outputs too."""
    there = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)


def _relocate(proto: onnx.ModelProto, folder: Path) -> Path:
    """Name external data by where it really is, behind links; the folder that holds all of it."""
    entries = [
        entry
        for tensor in tensors_of(proto)
        for entry in tensor.external_data
        if entry.key == "location"
    ]
    real = {entry.value: (folder / entry.value).resolve() for entry in entries}
    if not real:
        return folder.resolve()
    shared = Path(os.path.commonpath([path.parent for path in real.values()]))
    for entry in entries:
        entry.value = str(real[entry.value].relative_to(shared))
    return shared
