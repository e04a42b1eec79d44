"""A folder that appears complete: written under a temporary name beside its place, then renamed.

    with new_folder(place) as folder:
        ...                       # files into `folder`; leaving the block moves it to `place`

It is locked while the run that makes it goes on; what a killed run left the next one removes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onnxgen.errors import FileError
from onnxgen.mapped import cleaned
from onnxgen.scratch import held, scratch_path, sweep
from onnxgen.staging import sync_folder, termination_raises


def check_new_folder(place: Path) -> None:
    """Notice before the work that a folder cannot be made.

    Raises:
        FileError: something is there, other than an empty folder; or nothing can be written beside
            it.
    """
    if os.path.lexists(place):
        if place.is_symlink() or not place.is_dir():
            raise FileError(f"{place} cannot be written: it is not a folder")
        with _writing(place):
            if any(place.iterdir()):
                raise FileError(f"{place} cannot be written: the folder is not empty")
    parent = Path(os.path.abspath(place)).parent
    if not parent.is_dir():
        raise FileError(f"{place} cannot be written: there is no folder {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise FileError(f"{place} cannot be written: the folder {parent} is not writable")


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """The folder to write into; nothing stays of it where the block raises.

    Raises:
        FileError: see `check_new_folder`; or writing fails, or something came to be there meanwhile.
    """
    check_new_folder(place)
    place = Path(os.path.abspath(place))
    parent = place.parent
    sweep(parent, place.name)
    scratch = scratch_path(parent, place.name)

    with termination_raises(), cleaned(lambda: shutil.rmtree(scratch, ignore_errors=True)):
        with _writing(place):
            scratch.mkdir()
            with held([scratch]):
                yield scratch
                for folder, _, _ in os.walk(scratch):
                    sync_folder(Path(folder))
                os.rename(scratch, place)  # over an empty folder too, over nothing else
        sync_folder(parent)


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(f"{place} cannot be written: {error.strerror or error}") from error
