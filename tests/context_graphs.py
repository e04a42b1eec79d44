"""Models with regions, for tests of backend contexts: no backend is needed to make them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from onnxgen.backends.interface import Identity
from onnxgen.contexts.forms import Held
from onnxgen.contexts.regions import declared_types, described, outlined
from onnxgen.contexts.values import Blob, Context, Region, Table
from onnxgen.contexts.weights import Weights
from onnxgen.reading import Opened, open_model
from onnxgen.testing import load_corpus_model


def corpus_file(name: str, folder: Path) -> Path:
    """An export of the corpus, such as "llama/dynamo20", as a file in a folder."""
    path = folder / f"{name.replace('/', '_')}.onnx"
    onnx.save(load_corpus_model(name), path)
    return path


def region_of(opened: Opened, name: str, nodes: Sequence[int]) -> Region:
    """A region of these nodes; types that nothing declares are floats of any shape."""
    found = outlined(opened.proto, name, nodes)
    known = declared_types(opened.proto)
    types = {each: known.get(each, "FLOAT") for each in (*found.inputs, *found.outputs)}
    return described(opened.proto, found, types, Weights(opened))


def invented(content: bytes, backend: str = "none:CPU") -> tuple[Context, onnx.TensorProto]:
    """A context that no backend made, and its blob."""
    sha256 = hashlib.sha256(content).hexdigest()
    identity = Identity("None", "1.0", "a device", "", "x=1")
    tensor = onnx.TensorProto(
        data_type=onnx.TensorProto.UINT8, dims=[len(content)], raw_data=content
    )
    return Context(backend, identity, Blob(sha256, len(content)), "bytes", ()), tensor


def held_with(path: Path, spans: Sequence[tuple[int, int]]) -> Held:
    """A model with one region for each span of its nodes, and an invented context in each."""
    opened = open_model(path)
    regions, blobs = [], {}
    for index, (first, last) in enumerate(spans):
        context, tensor = invented(b"blob %d" % (index % 2))
        region = region_of(opened, f"part {index}", range(first, last))
        regions.append(replace(region, contexts=(context,)))
        blobs[context.blob.sha256] = tensor
    return Held(opened.proto, Table(regions), blobs)
