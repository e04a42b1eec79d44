"""OpenVINO's own blobs as its execution provider for ONNX Runtime takes them.

The provider (onnxruntime-ep-openvino 1.8.1) reads what `export_model` of the same OpenVINO wrote when
it lies in the provider's container: a header, a document in BSON that says where each blob is by the
name of its partition, and the blobs, each aligned to 64 KiB.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

from onnxgen.errors import RefusedError

PROVIDER = "OpenVINOExecutionProvider"
# Without these the provider computes in bfloat16 on CPUs that have it, whatever was compiled.
PROVIDER_OPTIONS = {"load_config": json.dumps({"CPU": {"INFERENCE_PRECISION_HINT": "f32"}})}
VERSION = "1.1.0"  # of the container's document

_ALIGNMENT = 1 << 16
_MAGIC = b"OVEP_BIN"
_CPU_MAGIC = b"RR_UPCVO"  # of a blob for the CPU: what it requires follows
_STRING, _DOCUMENT, _INT64 = 0x02, 0x03, 0x12  # types of BSON

Value = str | int | Mapping[str, "Value"]


def contained(partition: str, blob: bytes) -> bytes:
    """A blob in the provider's container, as `ep_cache_context` of an EPContext node."""
    where = {"data_offset": _ALIGNMENT, "size": len(blob)}
    document = _document(
        {"blob_metadata_map": {partition: where}, "producer": "onnxgen", "version": VERSION}
    )
    size = struct.calcsize("<8s4Q")
    head = struct.pack("<8s4Q", _MAGIC, 1, size, size, len(document)) + document
    if len(head) > _ALIGNMENT:
        raise ValueError("the name of a partition is too long")
    return b"".join((head.ljust(_ALIGNMENT, b"\0"), blob, bytes(-len(blob) % _ALIGNMENT)))


def compatibility(blob: bytes) -> str:
    """What the provider is asked whether it takes the blob: OpenVINO's version, and the CPU's kind.

    Raises:
        RefusedError: the blob is not one for the CPU, or is damaged.
    """
    start = len(_CPU_MAGIC) + 4
    if blob.startswith(_CPU_MAGIC) and len(blob) >= start + 8:
        (length,) = struct.unpack_from("<Q", blob, start)
        needs = blob[start + 8 : start + 8 + length]
        if len(needs) == length and 0 < length < 1000 and needs.isascii():
            fields = {
                "ovep_compat_ver": "1.0",
                "ovep_bin_ver": VERSION.rpartition(".")[0],
                "ov_compat_string": needs.decode(),
            }
            return json.dumps(fields, separators=(",", ":"))
    raise RefusedError(
        "a blob of OpenVINO's is not one for its CPU device, or is damaged: only such were seen to "
        "work in an EPContext model"
    )


def _document(fields: Mapping[str, Value]) -> bytes:
    """BSON."""
    body = b"".join(_field(name.encode() + b"\0", value) for name, value in fields.items())
    return struct.pack("<i", len(body) + 5) + body + b"\0"


def _field(name: bytes, value: Value) -> bytes:
    if isinstance(value, str):
        text = value.encode() + b"\0"
        return bytes([_STRING]) + name + struct.pack("<i", len(text)) + text
    if isinstance(value, int):
        return bytes([_INT64]) + name + struct.pack("<q", value)
    return bytes([_DOCUMENT]) + name + _document(value)
