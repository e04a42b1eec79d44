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
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxgen import wire
from onnxgen.contexts.forms import strip
from onnxgen.errors import FileError
from onnxgen.reading import Opened, open_model
from onnxgen.soundness import UnsoundError, check_sound
from onnxgen.staging import Staged, staged
from onnxgen.tensor_slots import EmbeddedTensor, tensor_slots

__all__ = ["Staged", "data_files", "read_model", "staged"]

DROPPED = "onnxgen.dropped_backends"
_BESIDE = "onnxgen.blob_files"  # of a model's `meta`


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

    What it holds for backends is left out, and named in the model's `meta` under `DROPPED`: it was
    compiled for the graph as it is.
    """
    opened = open_model(path)
    dropped = strip(opened.proto)
    model = as_model(opened)
    if dropped:
        model.meta[DROPPED] = dropped
    return model


def as_model(opened: Opened) -> ir.Model:
    """What was opened, to work on; `opened.proto` may have been changed before."""
    path, proto = opened.path, opened.proto
    try:
        with _quiet():
            model = ir.serde.deserialize_model(proto)
        for weight in opened.weights:
            _embed(model, weight, opened.data)
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
            slot.tensor.base_dir = str(opened.folder)
    if opened.beside:
        model.meta[_BESIDE] = [str(each) for each in opened.beside]
    return model


def data_files(model: ir.Model) -> list[Path]:
    """The files beside a model that hold its tensors, or what backends compiled of it, each once."""
    tensors = (slot.tensor for slot in tensor_slots(model))
    paths = (each.path for each in tensors if isinstance(each, ir.ExternalTensor))
    return [Path(path) for path in dict.fromkeys([*paths, *model.meta.get(_BESIDE, ())])]


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
    dtype = ir.DataType(weight.dtype).numpy().newbyteorder("<")
    expected = int(np.prod(weight.shape, dtype=np.int64)) * dtype.itemsize
    if weight.length != expected:
        raise ValueError(
            f"initializer '{weight.name}' holds {weight.length} bytes, and its type and shape "
            f"say {expected}"
        )
    flat = np.frombuffer(data, np.uint8, weight.length, weight.offset)
    value.const_value = EmbeddedTensor(
        flat.view(dtype).reshape(weight.shape),
        dtype=ir.DataType(weight.dtype),
        name=weight.name,
        doc_string=header.doc_string,
        metadata_props=dict(header.metadata_props),
    )
