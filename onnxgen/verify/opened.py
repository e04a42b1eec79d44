"""A model's proto, to be changed a little before it runs; external data stays where it is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import onnx

from onnxgen.wire import tensors_of

Source = Path | bytes


def opened(source: Source) -> tuple[onnx.ModelProto, Path | None]:
    """The model, and the folder that its external data is relative to; None where there is none."""
    if isinstance(source, bytes):
        return onnx.ModelProto.FromString(source), None
    proto = onnx.load(source, load_external_data=False)
    return proto, _relocate(proto, source.parent)


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
