"""What every command shares with its user: paths in, sentences and progress out."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from onnxgen.errors import OnnxgenError, RefusedError

Progress = Callable[[str], None]


class PathType(click.Path):
    """A path; whether it can be read or written is said later, with exit code 4."""

    def __init__(self, **kinds: bool) -> None:
        super().__init__(readable=False, path_type=Path, **kinds)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if not os.fspath(value):
            self.fail("a path is empty", param, ctx)
        return Path(os.fsdecode(super().convert(value, param, ctx)))


def prepare_streams() -> None:
    """Only what onnxgen says is said, and saying it cannot fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # "→" where the encoding has none
    if not _debugging():
        logging.getLogger().addHandler(logging.NullHandler())
        warnings.simplefilter("ignore")


def _debugging() -> bool:
    return os.environ.get("ONNXGEN_DEBUG") == "1"


def say_error(error: Exception | str) -> None:
    click.echo(f"Error: {error}", err=True)


def unexpected(error: Exception) -> OnnxgenError:
    """A failure of onnxgen itself, as a sentence."""
    if _debugging():
        traceback.print_exception(error)
    if isinstance(error, MemoryError):
        return RefusedError("there is not enough memory for this model and what is asked of it")
    detail = " ".join(str(error).split())[:300]
    return RefusedError(
        f"onnxgen failed unexpectedly ({type(error).__name__}: {detail}); this is a bug, please "
        "report it with what ONNXGEN_DEBUG=1 prints"
    )


@contextmanager
def show_progress() -> Iterator[Progress]:
    """What is being done, on one line of stderr while it is a terminal; nothing in a pipe."""
    if not sys.stderr.isatty():
        yield lambda message: None
        return
    from rich.text import Text

    from onnxgen.report import text

    with text.console(stderr=True).status(Text("starting")) as status:
        yield lambda message: status.update(Text(message))
