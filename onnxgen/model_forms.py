"""The forms that a model comes in and goes out in, from Python: files, protos, onnx_ir, programs.

with as_file(model) as (path, name): ...     a file of it, temporary where it is in memory
Result                                       a rewritten model, on the disk or in memory
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeAlias

import onnx
import onnx_ir as ir

from onnxgen.errors import FileError, OnnxgenError, UsageError
from onnxgen.model_io import read_model, staged
from onnxgen.report.as_json import summary
from onnxgen.report.values import Report
from onnxgen.staging import MAX_FILE
from onnxgen.tensor_slots import tensor_slots
from onnxgen.wire import tensors_of


class Program(Protocol):
    """What holds a model as `model`: torch's `ONNXProgram`."""

    @property
    def model(self) -> ir.Model: ...


Model: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto | ir.Model | Program | Result"


class Result:
    """A model that was rewritten, and what was done.

    Attributes:
        report: what was found, fused and kept, and the proof.
        path: where the model was written; None where no `output` was given: it is in memory, and
            nothing is left on the disk.
    """

    def __init__(self, report: Report, path: Path | None, held: ir.Model | None) -> None:
        self.report = report
        self.path = path
        self._held = held
        self._proto: onnx.ModelProto | None = None

    @property
    def model(self) -> onnx.ModelProto:
        """The model with its weights inside, made when it is first asked for.

        Raises:
            UsageError: it takes 2 GB or more, which protobuf can neither write nor hand to a
                runtime: take `path`, `load()` or `save()`; or nothing was converted.
        """
        if self._proto is None:
            model = self.load()
            size = sum(slot.tensor.nbytes for slot in tensor_slots(model))
            if size > MAX_FILE:
                raise UsageError(
                    f"the model takes {size / 1e9:.1f} GB, and an onnx.ModelProto of more than 2 GB "
                    "can be neither written nor run: use Result.path, load() or save()"
                )
            into_memory(model)
            self._proto = ir.to_proto(model)
        return self._proto

    def load(self) -> ir.Model:
        """The model as an `onnx_ir.Model` of the caller's own, of any size.

        Weights of a model that was written are mapped, and read where they are asked for.

        Raises:
            UsageError: nothing was converted.
            FileError: the file at `path` is no longer what was written.
        """
        if self.path is not None:
            return read_model(self.path)
        if self._held is None:
            raise UsageError("there is no model: it was only asked whether it could be converted")
        return self._held.clone()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the model, whole or not at all; above 2 GB its weights go to a file beside it.

        Raises:
            FileError: it cannot be written.
            UsageError: `path` is a file that the weights are read from; or nothing was converted.
        """
        place = Path(path)
        source = self.path or place
        with staged(self.load(), place, source=source, force=True) as stage:
            stage.commit()
        return place

    def __repr__(self) -> str:
        report = self.report
        said: list[str] = [report.proof.status if report.proof is not None else "not run"]
        for kind, count in summary(report.sites).items():
            said.append(f"{kind} {count['fused']} of {count['found']}")
        if report.nodes_after:
            said.append(f"nodes {report.nodes_before} → {report.nodes_after}")
        said.append("in memory" if self.path is None else str(self.path))
        return f"<onnxgen.Result for {report.target}: {', '.join(said)}>"


@contextmanager
def as_file(model: Model) -> Iterator[tuple[Path, str]]:
    """The model as a file, and what to call it; a temporary one where it is in memory."""
    if isinstance(model, str | os.PathLike):
        path = Path(model)
        yield path, str(path)
        return
    if isinstance(model, Result):
        if model.path is not None:
            yield model.path, str(model.path)
            return
        model = model.load()
    held = model if isinstance(model, onnx.ModelProto | ir.Model) else getattr(model, "model", None)
    if not isinstance(held, onnx.ModelProto | ir.Model):
        raise UsageError(
            f"a model is a path, an onnx.ModelProto, an onnx_ir.Model or torch's ONNXProgram, "
            f"not {type(model).__name__}"
        )
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxgen-")))
        if isinstance(held, onnx.ModelProto):
            yield _proto_staged(held, folder, stack), "the model"
        else:
            yield _staged(held, _data_folder(held) or folder, stack), "the model"


def _proto_staged(model: onnx.ModelProto, folder: Path, stack: contextlib.ExitStack) -> Path:
    outside = [t.name for t in tensors_of(model) if t.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        raise UsageError(
            f"the tensor '{outside[0]}' of the model is external, and an onnx.ModelProto does not "
            "say in which folder: give the path, or load it with its data"
        )
    try:
        data = model.SerializeToString()
    except Exception:  # above 2 GB, of which protobuf says different things
        return _staged(ir.from_proto(model), folder, stack)
    path = folder / "model.onnx"
    try:
        path.write_bytes(data)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _staged(model: ir.Model, folder: Path, stack: contextlib.ExitStack) -> Path:
    place = folder / "onnxgen-input.onnx"  # never committed: it has a temporary name only
    stage = staged(model, place, source=place, force=True, passing=True)
    return stack.enter_context(stage).path


def _data_folder(model: ir.Model) -> Path | None:
    """The one folder that external weights lie in, if it takes a file: there they need no copy."""
    tensors = (slot.tensor for slot in tensor_slots(model))
    folders = {Path(each.base_dir) for each in tensors if isinstance(each, ir.ExternalTensor)}
    if len(folders) != 1:
        return None
    folder = folders.pop()
    return folder if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK) else None


@contextmanager
def place_for(output: str | os.PathLike[str] | None, name: str) -> Iterator[Path]:
    """Where to write: a temporary place where none was given."""
    if output is not None:
        yield Path(output)
        return
    with tempfile.TemporaryDirectory(prefix="onnxgen-") as folder:
        yield Path(folder) / name


@contextmanager
def named(names: Mapping[Path, object]) -> Iterator[None]:
    """Failures speak of models as the caller knows them, not of temporary files."""
    try:
        yield
    except OnnxgenError as error:
        said = str(error)
        for path, name in names.items():
            known = "the result" if name is None else str(name)
            said = said.replace(str(path), known)
            if error.report is not None and error.report.input == str(path):
                error.report.input = known
        error.args = (said,)
        raise


def into_memory(model: ir.Model) -> None:
    """External tensors are read; embedded ones stay views of the file, removed or not."""
    for slot in tensor_slots(model):
        tensor = slot.tensor
        if isinstance(tensor, ir.ExternalTensor):
            slot.swap(ir.external_data.convert_tensors_from_external([tensor])[0])
