"""`-`: a model from stdin, by way of a temporary file, and one to stdout.

Weights are read by mapping a file, and a model is written beside its place and moved there: a
stream can do neither. What comes in or goes out is one stream of bytes, so that its weights are
embedded: a data file has no name there.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from onnxgen.errors import FileError, OnnxgenError, UsageError

STREAM = Path("-")


def check_streams(source: Path | None, output: Path | None, *, json_output: bool = False) -> None:
    """Whether what would be read and written are streams of bytes.

    Raises:
        UsageError: one is a terminal, or the report would go where the model goes.
    """
    if source == STREAM and sys.stdin.isatty():
        raise UsageError("- reads the model from stdin, which is a terminal")
    if output == STREAM and json_output:
        raise UsageError("--json and the model both go to stdout: give --report FILE.json instead")
    if output == STREAM and sys.stdout.isatty():
        raise UsageError("the model would go to stdout, which is a terminal: give -o FILE")


@contextmanager
def received(source: Path) -> Iterator[Path]:
    """The file itself, or one that holds what comes on stdin where it is `-`.

    What is raised inside names stdin, not that file.

    Raises:
        FileError: nothing comes, or a model whose weights are in data files.
    """
    if source != STREAM:
        yield source
        return
    with scratch_folder() as folder:
        file = folder / "stdin.onnx"
        with _named(file, "stdin"):
            try:
                with file.open("wb") as into:
                    shutil.copyfileobj(sys.stdin.buffer, into, 1 << 20)
            except OSError as error:
                raise FileError(f"stdin cannot be read: {error.strerror}") from error
            location = _data_file_of(file)
            if location:
                raise FileError(
                    f"stdin names the data file {location}, which cannot come with it: "
                    "give the model as a file"
                )
            yield file


@contextmanager
def sent(source: Path, output: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Where to write a model that goes to stdout, and what sends it; else `output`, and nothing.

    Raises:
        FileError: its weights are in data files, or must go to one.
    """
    if output != STREAM:
        yield output, lambda: None
        return
    location = _data_file_of(source)
    if location:
        raise FileError(
            f"{source} has the data file {location}, and what goes to stdout has its weights "
            "inside: give -o FILE"
        )
    with scratch_folder() as folder:
        file = folder / "stdout.onnx"

        def send() -> None:
            if any(each != file for each in folder.iterdir()):
                raise FileError("the model is over 2 GB and needs a data file: give -o FILE")
            stdout = sys.stdout.buffer
            with file.open("rb") as content:
                shutil.copyfileobj(content, stdout, 1 << 20)
            stdout.flush()

        with _named(file, "stdout"):
            yield file, send


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that goes at the end, at one by a signal too."""
    from onnxgen.staging import termination_raises

    with termination_raises(), tempfile.TemporaryDirectory(prefix="onnxgen-") as name:
        yield Path(name)


@contextmanager
def _named(file: Path, name: str) -> Iterator[None]:
    """Failures name the stream instead of the file that stands for it."""
    try:
        yield
    except OnnxgenError as error:
        error.args = (str(error).replace(str(file), name).replace(file.name, name),)
        raise


def _data_file_of(path: Path) -> str:
    """The first data file that a model names, "" where it has none, or is no model at all."""
    import mmap

    import onnx

    from onnxgen import wire

    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        proto = onnx.ModelProto.FromString(wire.cut_weights(data)[0])
    except Exception:  # said, in words, when it is read in earnest
        return ""
    for tensor in wire.tensors_of(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            return next((each.value for each in tensor.external_data if each.key == "location"), "")
    return ""
