"""A model's proto, to be changed a little before it runs; its weights stay where they are, on disk.

Embedded ones are read by the runtime as external data too: of the model file itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import onnx
import onnx_ir as ir

from onnxgen.contexts.forms import strip
from onnxgen.errors import FileError
from onnxgen.model_io import read_model
from onnxgen.reading import open_model, refer_to_file
from onnxgen.tensor_slots import tensor_slots


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
    found = open_model(source)
    refer_to_file(found, found.proto.graph.initializer)
    strip(found.proto)
    return found.proto, found.folder


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
