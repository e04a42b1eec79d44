"""Backend contexts from Python, in the words of `onnxgen context`.

    onnxgen.add_contexts("model.onnx", ["openvino:CPU"], output="model.context.onnx")
    onnxgen.load("model.context.onnx").run(None, feeds)

Models are files here: what is added lies in them, or beside them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxgen import pipeline_contexts as pipeline
from onnxgen.context_files import BlobPlace
from onnxgen.contexts.forms import Encoding
from onnxgen.contexts.trust import Given
from onnxgen.errors import UsageError
from onnxgen.report.contexts import Contexts
from onnxgen.report.values import Budget

File = str | os.PathLike[str]


def add_contexts(
    model: File,
    backend: Sequence[str],
    *,
    output: File | None = None,
    region: str = "all",
    encoding: Encoding | None = None,
    blob: BlobPlace = "inline",
    verify: Budget = "full",
    no_verify: bool = False,
    role: Mapping[str, str] | None = None,
    force: bool = False,
) -> Contexts:
    """Have backends compile a model, or regions of it, and write it with what they made, proven.

    Args:
        model: the file.
        backend: who compiles, ["openvino:CPU", "ort:cpu"].
        output: where to write; MODEL with .context.onnx unless given.
        region: "all", "attention", or a regular expression for module paths.
        encoding: "function" or "metadata".
        blob: "inline", in the model, or "file", in files beside it.
        verify, no_verify, role, force: as of `onnxgen.fuse`.

    Raises:
        FileError: the model cannot be read, or the result not written.
        UsageError: an argument does not fit.
        RefusedError: a backend is not here or cannot compile it, or nothing can be compared.
        ModelDiffersError: run by a backend it differs; nothing was written.
    """
    if isinstance(backend, str):
        raise UsageError(f"backend is several words: [{backend!r}]")
    options = pipeline.AddOptions(
        tuple(backend),
        None if output is None else Path(output),
        region,
        encoding,
        blob,
        not no_verify,
        verify,
        role or {},
        force,
    )
    return pipeline.add(Path(model), options, _quiet)


def check_contexts(
    model: File, *, prefer: Sequence[str] | None = None, trust: Given | None = None
) -> Contexts:
    """What would run each region of a model here, and why not another; see `onnxgen.load`.

    Raises:
        FileError: the model, its table, or the list cannot be read.
    """
    return pipeline.check(Path(model), prefer, trust)


def _quiet(message: str) -> None:
    """Progress that nobody reads."""
