"""Models that hold contexts, written, and described."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from onnxgen.contexts.forms import Encoding, Held, encode
from onnxgen.contexts.sides import inline_blobs, side_files
from onnxgen.contexts.values import Region
from onnxgen.contexts.weights import Weights
from onnxgen.model_io import as_model, staged
from onnxgen.places import stem
from onnxgen.reading import BLOB, Opened
from onnxgen.report import contexts as report
from onnxgen.staging import Staged
from onnxgen.tensor_slots import tensor_slots

BlobPlace = Literal["inline", "file"]


@contextmanager
def written(
    opened: Opened,
    held: Held,
    contents: Mapping[str, bytes],
    output: Path,
    encoding: Encoding,
    *,
    blob: BlobPlace = "inline",
    force: bool,
) -> Iterator[Staged]:
    """A model with its table, staged as `model_io.staged` does; neither argument is changed.

    Args:
        opened: whose weights it has; `held.proto` is the graph.
        contents: bytes of blobs that `held` does not have yet.
        blob: where these go.
    """
    with contextlib.ExitStack() as stack:
        made: list[Path] = []
        tensors = inline_blobs(contents)
        if blob == "file":
            files = side_files(output.parent.resolve(), stem(output), contents)
            tensors, made = stack.enter_context(files)
        full = Held(copy.deepcopy(held.proto), held.table, {**held.blobs, **tensors})
        proto = encode(full, encoding)
        declared = {each.name for each in proto.graph.value_info}
        model = as_model(replace(opened, proto=proto))
        _declare_no_more(model, declared)
        if blob == "file":
            _beside(model, tensors, output.parent.resolve())
        stage = stack.enter_context(
            staged(model, output, source=opened.path, force=force, reads=opened.beside)
        )
        yield stage
        if stage.committed:
            made.clear()


def describe(said: report.Contexts, opened: Opened, held: Held) -> None:
    """Put what a model holds into a report."""
    table = held.table
    weights = Weights(opened)
    said.encoding = held.encoding
    alike: Counter[str] = Counter()
    for region in table.regions:
        said.places.append(
            report.Place(
                region.name,
                len(region.nodes),
                len(region.inputs),
                len(region.weights),
                len(region.outputs),
                region.subgraph,
                region.weights_sha256,
                alike[region.subgraph],
            )
        )
        alike[region.subgraph] += 1
        said.held += _held(region, weights)


def _held(region: Region, weights: Weights) -> Iterator[report.Held]:
    for context in region.contexts:
        given = set(context.parameters)
        inside = [name for i, name in enumerate(region.weights) if i not in given]
        identity = context.identity
        yield report.Held(
            region.name,
            context.backend,
            identity.source,
            identity.version,
            identity.device,
            identity.driver,
            identity.compatibility,
            context.form,
            context.blob.sha256,
            context.blob.size,
            len(given),
            len(inside),
            sum(weights[name].data.nbytes for name in inside),
        )


def _declare_no_more(model: ir.Model, declared: Collection[str]) -> None:
    """What the graph did not say of its weights is not written: their tensors say it."""
    for name, value in model.graph.initializers.items():
        if name not in declared and not value.is_graph_input() and not value.is_graph_output():
            value.type = value.shape = None


def _beside(model: ir.Model, tensors: Mapping[str, object], folder: Path) -> None:
    """Blobs that lie beside the output rather than beside the input."""
    for slot in tensor_slots(model):
        tensor = slot.tensor
        if (tensor.name or "").removeprefix(BLOB) in tensors and isinstance(
            tensor, ir.ExternalTensor
        ):
            tensor.base_dir = str(folder)
