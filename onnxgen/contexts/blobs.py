"""The bytes of a blob, in the model file or in one beside it."""

from __future__ import annotations

import hashlib

import onnx

from onnxgen.contexts.forms import Held
from onnxgen.contexts.values import Blob
from onnxgen.errors import FileError
from onnxgen.reading import Opened, check_external_data

LARGEST = 1 << 31  # bytes of a blob that is read at all, unless told otherwise


class BlobError(Exception):
    """A blob is missing or is not what the table says; the message is a clause."""


def read_blob(opened: Opened, held: Held, blob: Blob, largest: int = LARGEST) -> bytes:
    """A blob's bytes; their number and their hash are those of the table.

    Raises:
        BlobError: they are not, or there are none, or more than `largest`.
    """
    if blob.size > largest:
        raise BlobError(f"its blob has {blob.size} bytes, more than {largest}")
    tensor = held.blobs.get(blob.sha256)
    if tensor is None:
        raise BlobError("its blob is missing")
    data = _content(opened, tensor, blob.size)
    if len(data) != blob.size or hashlib.sha256(data).hexdigest() != blob.sha256:
        raise BlobError("its blob is damaged: the sha256 differs")
    return data


def _content(opened: Opened, tensor: onnx.TensorProto, size: int) -> bytes:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return bytes(tensor.raw_data)
    if tensor.data_type != onnx.TensorProto.UINT8 or list(tensor.dims) != [size]:
        raise BlobError("its blob is of another size")
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    try:
        check_external_data(opened.path, opened.folder, [copy])
        entries = {each.key: each.value for each in copy.external_data}
        with (opened.folder / entries["location"]).open("rb") as file:
            file.seek(int(entries.get("offset", 0)))
            content: bytes = file.read(size)
            return content
    except (FileError, OSError) as error:
        raise BlobError(f"its blob cannot be read: {error}") from error
