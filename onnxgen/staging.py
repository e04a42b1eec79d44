"""Writing a model in two steps: complete and loadable beside its place, then moved into it.

What goes where:
- An external tensor whose data lies in the output's folder is referenced where it is; from
  any other folder it is copied, streamed, to the output's data file.
- Where a model uses external data, new tensors of 64 KiB and more go to the data file too.
- Embedded tensors stay embedded while the file stays below 2 GB; above, every initializer
  of 1 KiB and more goes to the data file.

The data file is named after the output and the hash of its content, `model.fused.<sha>.data`,
so it never replaces another one's content: a model that is written again leaves the data file
of its previous version, which other models may reference; delete it when none does. What a run
that was killed leaves under temporary names the next one on the same output removes. Nothing
random is in the content of either file: the same model gives the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import onnx
import onnx_ir as ir

from onnxgen.data_file import DataFile
from onnxgen.errors import FileError, UsageError
from onnxgen.mapped import cleaned
from onnxgen.places import check_place, same_place
from onnxgen.scratch import create, held, scratch_path, sweep, sync
from onnxgen.serializer import Serializer
from onnxgen.tensor_slots import EmbeddedTensor, TensorSlot, tensor_slots
from onnxgen.wire import WireError, tensors_of

MAX_FILE = 2**31 - 1  # a protobuf message holds no more bytes
LARGE = 64 * 1024  # a new tensor of a model with external data goes out from here
MOVABLE = 1024  # what goes out at all, of a model above MAX_FILE


@dataclass
class Staged:
    """A model that is completely written but not yet in its place.

    Attributes:
        path: the .onnx under a temporary name in the output's folder; ONNX Runtime loads it
            from there, external data and all.
        output: where commit() moves it.
        data: the data file written for it, None where it needs none.
        bytes: of the .onnx and of the data files that it names, each once.
        beside: where commit() moves further files, by where they are written, in this order.
    """

    path: Path
    output: Path
    data: Path | None = None
    bytes: int = 0
    beside: dict[Path, Path] = field(default_factory=dict)

    @property
    def committed(self) -> bool:
        """Whether it has been moved into place."""
        return not os.path.lexists(self.path)

    def commit(self) -> None:
        """Move the model into place, atomically, then the files beside it, each atomically.

        Raises:
            FileError: one cannot be moved; the block's end then removes what was not.
        """
        with _writing(self.output):
            if self.data is not None and not self.data.exists():
                raise OSError(None, f"its data file {self.data.name} was removed meanwhile")
            os.replace(self.path, self.output)
        for path, place in self.beside.items():
            with _writing(place):
                os.replace(path, place)
        sync_folder(self.output.parent)


@contextmanager
def staged(
    model: ir.Model,
    output: Path,
    *,
    source: Path,
    force: bool,
    beside: Mapping[str, bytes] | None = None,
    reads: Collection[Path] = (),
    passing: bool = False,
) -> Iterator[Staged]:
    """Write `model` beside `output`; it takes its place when commit() is called.

    Leaving the block without commit() removes everything written, by an exception, Ctrl-C,
    SIGTERM and SIGHUP too. The model itself is not changed. A link at `output` is replaced,
    not followed: blobs that a cache links to are never written.

    Args:
        model: what to write; its ir_version and opsets are written as they are.
        output: where it goes in the end; its folder must exist.
        source: the file that the model was read from; it is replaced only with `force`.
        force: allow `output` to be `source`.
        beside: further files of the output's folder, by name; files there are replaced.
        reads: files that were read too, such as data files that the model no longer refers to.
        passing: it is never committed: its data file, too, has a temporary name.

    Raises:
        UsageError: `output`, or a file beside it, is the source or another file that was read.
        FileError: it cannot be written: no such folder, no regular file, no permission, a
            full disk.
    """
    output = Path(output)
    slots = list(tensor_slots(model))
    data = (slot.tensor.path for slot in slots if isinstance(slot.tensor, ir.ExternalTensor))
    read = [*map(Path, data), *reads]
    check_output(output, Path(source), read, force=force)
    _check_beside(beside or {}, output, Path(source), read)
    folder = output.parent.resolve()
    for suffix in (".data", ".onnx"):
        sweep(folder, output.stem, suffix)
    created: list[Path] = []
    data_file = DataFile(folder, output.stem, created)
    stage: Staged | None = None

    def clean() -> None:
        committed = stage is not None and stage.committed
        for path in created:
            with contextlib.suppress(OSError):
                path.unlink()
        if not committed:
            data_file.remove()

    with termination_raises(), cleaned(clean):
        with _writing(output):
            place = folder / output.name
            made = stage = _write(model, slots, place, data_file, created, passing=passing)
        for name, content in (beside or {}).items():
            with _writing(folder / name):
                made.beside[_scratch(folder / name, content, created)] = folder / name
        scratch = [made.data] if passing and made.data is not None else []
        with held([made.path, *made.beside, *scratch]):
            yield made


def _scratch(place: Path, content: bytes, created: list[Path]) -> Path:
    """Write a file under a temporary name beside its place."""
    check_place(place)
    sweep(place.parent, place.name)
    path = scratch_path(place.parent, place.name)
    with create(path, created) as file:
        file.write(content)
        sync(file)
    return path


def check_output(output: Path, source: Path, reads: Iterable[Path], *, force: bool) -> None:
    """Whether a model may be written there; see `staged`."""
    check_place(output)
    if same_place(output, source) and source.exists() and not force:
        raise UsageError(f"{output} is the input itself: replacing it needs --force")
    if not same_place(output, source) and any(same_place(output, path) for path in reads):
        raise UsageError(
            f"{output} holds the input's weights or what else is read with it: "
            "choose another output"
        )


def _check_beside(names: Iterable[str], output: Path, source: Path, reads: list[Path]) -> None:
    for place in map(output.with_name, names):
        if any(same_place(place, path) for path in (output, source, *reads)):
            raise UsageError(
                f"{place} would be written beside the output, and is read or written otherwise: "
                "choose another output"
            )


def _write(
    model: ir.Model,
    slots: Sequence[TensorSlot],
    output: Path,
    data: DataFile,
    created: list[Path],
    *,
    passing: bool,
) -> Staged:
    """Write the data file, then the model that refers to it."""
    proto = _without_weights(model, slots)
    moved = _what_moves(slots, output.parent, proto.ByteSize())
    places = {index: data.add(slots[index].tensor) for index in moved}
    name = data.finish(passing=passing)

    main = len(proto.graph.initializer)
    embedded: dict[int, ir.TensorProtocol] = {}
    named: set[Path] = {output.with_name(name)} if places else set()
    for position, tensor in enumerate(tensors_of(proto)):  # the main graph's initializers first
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        index = int(tensor.external_data[0].value)
        del tensor.external_data[:]
        original = slots[index].tensor
        if index in places:
            _refer(tensor, name, *places[index])
        elif isinstance(original, ir.ExternalTensor):
            _refer(tensor, os.fspath(original.location), original.offset, original.length)
            named.add(Path(original.path))
        else:
            tensor.ClearField("data_location")
            if position < main:
                embedded[position] = original
            else:
                tensor.raw_data = original.tobytes()

    serializer = Serializer(proto, embedded)
    if serializer.size > MAX_FILE:
        raise FileError(f"{output} cannot be written: its graph alone takes over 2 GB")
    path = scratch_path(output.parent, output.stem, ".onnx")
    with create(path, created) as file:
        serializer.write(file)
        sync(file)
    size = serializer.size + sum(each.stat().st_size for each in named)
    return Staged(path, output, output.with_name(name) if places else None, size)


def _without_weights(model: ir.Model, slots: Sequence[TensorSlot]) -> onnx.ModelProto:
    """The model as a proto; initializers and external tensors name their slot as location."""
    with contextlib.ExitStack() as undo:
        for index, slot in enumerate(slots):
            tensor = slot.tensor
            external = isinstance(tensor, ir.ExternalTensor)
            if external or (slot.initializer and tensor.dtype != ir.DataType.STRING):
                stand_in = ir.ExternalTensor(
                    str(index),
                    None,
                    None,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=tensor.name or "",
                    doc_string=tensor.doc_string,
                    metadata_props=dict(tensor.metadata_props),
                )
                undo.callback(slot.swap(stand_in))
        return ir.serde.serialize_model(model)


def _what_moves(slots: Sequence[TensorSlot], folder: Path, graph_size: int) -> list[int]:
    """Indices of the tensors that go to the data file, in the order they are written."""
    external = [isinstance(slot.tensor, ir.ExternalTensor) for slot in slots]
    bases = {slot.tensor.base_dir for slot in slots if isinstance(slot.tensor, ir.ExternalTensor)}
    here = {base for base in bases if base and Path(base).resolve() == folder}
    moved: list[int] = []
    stay: list[int] = []
    for index, slot in enumerate(slots):
        tensor = slot.tensor
        if isinstance(tensor, ir.ExternalTensor):
            if tensor.base_dir not in here:
                moved.append(index)
        elif slot.initializer and tensor.dtype != ir.DataType.STRING:
            read = isinstance(tensor, EmbeddedTensor | ir.serde.TensorProtoTensor)
            new_and_large = not read and tensor.nbytes >= LARGE
            (moved if new_and_large and any(external) else stay).append(index)
    # Each reference or embedded tensor adds a little to what it takes in the graph.
    size = graph_size + sum(slots[index].tensor.nbytes for index in stay) + 256 * len(slots)
    if size > MAX_FILE:
        moved += [index for index in stay if slots[index].tensor.nbytes >= MOVABLE]
    return sorted(moved)


def _refer(tensor: onnx.TensorProto, location: str, offset: int | None, length: int | None) -> None:
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))


def sync_folder(folder: Path) -> None:
    """Make a rename last, where the system lets a folder be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, WireError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise FileError(f"{output} cannot be written: {cause}") from error


@contextmanager
def termination_raises() -> Iterator[None]:
    """Turn a request to end the process into an exception, so that files are removed."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                previous[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
