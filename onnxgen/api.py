"""onnxgen from Python, in the words of the command line.

    import onnxgen

    result = onnxgen.fuse("model.onnx", output="model.fused.onnx")
    result = onnxgen.fuse(torch.onnx.export(module, inputs, dynamo=True))
    print(result, result.report.proof.worst)
    onnx.save(result.model, "fused.onnx")

Every keyword is an option of the command and means what it means there. What is for a shell only is
none: `--report` and `--json`, since `Result.report` holds the values. An option that is repeated
takes several words at once, `disable=["GEL001"]`, and `--role NAME=ROLE` a mapping, `{name: role}`.

A model is a path, an `onnx.ModelProto`, an `onnx_ir.Model` or what `torch.onnx.export` returns. None
of them is changed. One that is in memory is written to a temporary file: to be proven it must run in
another process. What goes wrong is a subclass of `onnxgen.OnnxgenError`, whose `report`, where there
is one, holds what was done until then.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, get_args

import onnx
import onnx_ir as ir

from onnxgen import pipeline, pipeline_paged
from onnxgen.errors import FileError, OnnxgenError, UsageError
from onnxgen.model_io import read_model, staged
from onnxgen.report.as_json import summary
from onnxgen.report.values import Budget, Proof, Report
from onnxgen.staging import MAX_FILE
from onnxgen.targets.contract import Padding
from onnxgen.targets.paged import KV_DTYPES, Flavor, Logits, PagedOptions
from onnxgen.tensor_slots import tensor_slots
from onnxgen.wire import tensors_of

__all__ = ["Model", "Program", "Result", "fuse", "to_paged", "verify"]

Target = Literal["onnx", "ort"]
KvDtype = Literal["fp16", "fp32"]


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
            _into_memory(model)
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


def fuse(
    model: Model,
    *,
    output: str | os.PathLike[str] | None = None,
    target: Target = "onnx",
    padding: Padding = "any",
    max_length: int | None = None,
    verify: Budget = "full",
    no_verify: bool = False,
    disable: Sequence[str] = (),
    opset: int | None = None,
    inline: bool = False,
    genai_config: bool = False,
    force: bool = False,
    role: Mapping[str, str] | None = None,
    rules: Sequence[Any] = (),
) -> Result:
    """Fuse attention, norms and rotary embeddings, prove the result, and return or write it.

    Inputs and outputs keep their names, order, types and shapes: tokens stay int64 [B,S], say, and
    caches [B,K,P,D].

    Args:
        model: what to fuse; it is not changed.
        output: where to write, the only place where something is left; None keeps the result in
            memory, weights and all.
        target: what to write for: the ONNX standard, or ONNX Runtime's own operators.
        padding: for "ort": the padding that the result must take; with any other it fails.
        max_length: for "ort": the most tokens, past and new.
        verify: how much to compare: "quick", "full", or "layers", the model cut down.
        no_verify: run nothing; the report says unproven.
        disable: codes of rules to leave out.
        opset: version of the default domain to write.
        inline: expand functions of onnxgen's own.
        genai_config: write what onnxruntime-genai needs beside `output`; reads what lies beside the
            model, which must be a path.
        force: let `output` replace the model.
        role: what inputs are for, by name, where their use leaves that open.
        rules: rules of your own: files, or rules themselves; see `onnxgen.own_rules`.

    Raises:
        FileError: the model cannot be read, or the result not written.
        UsageError: an argument does not fit, or a rule of your own fails.
        RefusedError: the model cannot be converted, or nothing of it can be compared.
        ModelDiffersError: the result differs from the original; nothing was written.
    """
    _choices(target=(target, Target), padding=(padding, Padding), verify=(verify, Budget))
    _numbers(max_length=max_length, opset=opset)
    _check_verify(verify, no_verify)
    _check_beside(model, output, genai_config)
    with _read(model) as (path, name), _written(output, "model.onnx") as place:
        options = pipeline.FuseOptions(
            output=place,
            target=target,
            padding=padding,
            max_length=max_length,
            verify=not no_verify,
            budget=verify,
            disable=_words("disable", disable),
            opset=opset,
            inline=inline,
            roles=role or {},
            rules=_several(rules),
            force=force,
            genai_config=genai_config,
        )
        with _named({path: name, place: output}):
            report = pipeline.fuse(path, options, _quiet)
        return _result(report, name, place, output)


def to_paged(
    model: Model,
    *,
    output: str | os.PathLike[str] | None = None,
    block_size: int = 16,
    logits: Logits = "all",
    flavor: Flavor = "portable",
    kv_dtype: KvDtype | None = None,
    max_length: int | None = None,
    slot_mapping: bool = False,
    check: bool = False,
    verify: Budget = "full",
    no_verify: bool = False,
    inline: bool = False,
    genai_config: bool = False,
    force: bool = False,
    role: Mapping[str, str] | None = None,
    rules: Sequence[Any] = (),
) -> Result:
    """Turn a decoder with caches into one whose keys and values lie in pools of blocks.

    Tokens of all sequences come in one row; see `onnxgen.targets.paged` for every input and its
    shape, and `onnxgen.paged` for what runs such a model.

    Args:
        model: what to page; it is not changed.
        output: the folder to write model.onnx to; None keeps the result in memory.
        block_size: slots of a block, a power of two.
        logits: which rows are answered.
        flavor: a function of standard operators, or com.microsoft's PagedAttention.
        kv_dtype: type of the pools; the caches' own unless given.
        max_length: with flavor "ort": most tokens of a sequence.
        slot_mapping: add an input that says which slot each token is written to.
        check: convert nothing; `Result.report.paging` says what stands in the way, if anything.
        verify, no_verify, inline, genai_config, force, role, rules: as of `fuse`.

    Raises:
        RefusedError: it cannot be paged; `report.paging.obstacles` says why.
        FileError, UsageError, ModelDiffersError: as of `fuse`.
    """
    _choices(logits=(logits, Logits), flavor=(flavor, Flavor), verify=(verify, Budget))
    if kv_dtype is not None:
        _choices(kv_dtype=(kv_dtype, KvDtype))
    _numbers(max_length=max_length)
    _check_verify(verify, no_verify)
    _check_beside(model, output, genai_config)
    with _read(model) as (path, name), _written(output, "paged") as place:
        kind = None if kv_dtype is None else KV_DTYPES[kv_dtype]
        options = pipeline_paged.PageOptions(
            output=place,
            paged=PagedOptions(block_size, logits, kind, slot_mapping, flavor),
            max_length=max_length,
            check=check,
            verify=not no_verify,
            budget=verify,
            inline=inline,
            roles=role or {},
            rules=_several(rules),
            genai_config=genai_config,
            force=force,
        )
        with _named({path: name, place: output}):
            report = pipeline_paged.to_paged(path, options, _quiet)
        return _result(report, name, place / "model.onnx", output)


def verify(
    original: Model,
    rewritten: Model,
    *,
    verify: Budget = "full",
    role: Mapping[str, str] | None = None,
) -> Proof:
    """Compare two models that have the same inputs and outputs, by running both.

    Returns:
        The proof, whatever it says: "proven", "differs" or "unverifiable", and why as `reason`.

    Raises:
        FileError: one cannot be read.
        UsageError: an argument does not fit.
    """
    _choices(verify=(verify, Budget))
    with (
        _read(original) as (one, its_name),
        _read(rewritten) as (other, others_name),
        _named({one: its_name, other: others_name}),
    ):
        return pipeline.verify(one, other, roles=role or {}, budget=verify, progress=_quiet)


def _quiet(message: str) -> None:
    """Progress that nobody reads."""


@contextmanager
def _read(model: Model) -> Iterator[tuple[Path, str]]:
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
            yield _proto_as_file(held, folder, stack), "the model"
        else:
            yield _as_file(held, _data_folder(held) or folder, stack), "the model"


def _proto_as_file(model: onnx.ModelProto, folder: Path, stack: contextlib.ExitStack) -> Path:
    outside = [t.name for t in tensors_of(model) if t.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        raise UsageError(
            f"the tensor '{outside[0]}' of the model is external, and an onnx.ModelProto does not "
            "say in which folder: give the path, or load it with its data"
        )
    try:
        data = model.SerializeToString()
    except Exception:  # above 2 GB, of which protobuf says different things
        return _as_file(ir.from_proto(model), folder, stack)
    path = folder / "model.onnx"
    try:
        path.write_bytes(data)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _as_file(model: ir.Model, folder: Path, stack: contextlib.ExitStack) -> Path:
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
def _written(output: str | os.PathLike[str] | None, name: str) -> Iterator[Path]:
    """Where to write: a temporary place where none was given."""
    if output is not None:
        yield Path(output)
        return
    with tempfile.TemporaryDirectory(prefix="onnxgen-") as folder:
        yield Path(folder) / name


@contextmanager
def _named(names: Mapping[Path, object]) -> Iterator[None]:
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


def _result(report: Report, name: str, place: Path, output: object) -> Result:
    report.input = name
    if not report.output:
        return Result(report, None, None)
    if output is not None:
        return Result(report, place, None)
    held = read_model(place)
    _into_memory(held)
    report.output = ""
    return Result(report, None, held)


def _into_memory(model: ir.Model) -> None:
    """External tensors are read; embedded ones stay views of the file, removed or not."""
    for slot in tensor_slots(model):
        tensor = slot.tensor
        if isinstance(tensor, ir.ExternalTensor):
            slot.swap(ir.external_data.convert_tensors_from_external([tensor])[0])


def _choices(**given: tuple[Any, Any]) -> None:
    for name, (value, kind) in given.items():
        if value not in get_args(kind):
            raise UsageError(f"{name} is {value!r}: it is one of {', '.join(get_args(kind))}")


def _numbers(**given: int | None) -> None:
    for name, value in given.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}: it is 1 or more")


def _check_verify(verify: Budget, no_verify: bool) -> None:
    if no_verify and verify != "full":
        raise UsageError(f"no_verify and verify={verify!r} exclude one another")


def _check_beside(model: Model, output: object, genai_config: bool) -> None:
    """Whether there is a place for files beside the model, and one where they are read."""
    if genai_config and (output is None or not isinstance(model, str | os.PathLike)):
        raise UsageError("genai_config reads and writes files: give a path and an output")


def _words(name: str, given: Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        raise UsageError(f"{name} is several words: [{given!r}]")
    return tuple(given)


def _several(rules: Sequence[Any]) -> tuple[Any, ...]:
    return (rules,) if isinstance(rules, str | os.PathLike | type) else tuple(rules)
