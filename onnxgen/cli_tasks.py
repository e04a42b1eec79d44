"""What each model of a command becomes: where it goes, and its report, before any work begins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxgen.cli_streams import STREAM
from onnxgen.cli_words import check_report_file
from onnxgen.errors import UsageError
from onnxgen.places import default_output, same_place, stem
from onnxgen.report import files

NAME = "{}"
"""In the names of reports and baselines: the model's own."""


@dataclass(frozen=True)
class Task:
    """One model of a command, in values that another process can be given.

    Attributes:
        model, output: where it is read and written; `-` is a stream.
        report_file, baseline: its own.
        asked: the options' values, by name, as click gives them.
    """

    model: Path
    output: Path
    report_file: Path | None
    baseline: Path | None
    asked: Mapping[str, Any]


def tasks_of(
    models: Sequence[Path],
    output: Path | None,
    out_dir: Path | None,
    report_file: Path | None,
    baseline: Path | None,
    asked: Mapping[str, Any],
) -> list[Task]:
    """The models' tasks.

    Raises:
        UsageError: two of them would write one file, or one what another reads; or an option is
            for one model.
        FileError: a report cannot be written.
    """
    several = len(models) > 1
    if output is not None and out_dir is not None:
        raise UsageError("-o and --out-dir exclude one another")
    if output is not None and several:
        raise UsageError("-o names the place of one model: for several give --out-dir DIR")
    if STREAM in models and several:
        raise UsageError("- is one model: it cannot be among several")
    for option, path in (("--report", report_file), ("--baseline", baseline)):
        if path is not None and several and NAME not in str(path):
            raise UsageError(
                f"{option} {path} is one file: of several models give a name with {NAME}, such as "
                f"{path.with_name(NAME + path.suffix)}, for each model's own"
            )
    if STREAM in (*models, output) and asked["genai_config"]:
        raise UsageError("--genai-config writes files beside the model, and a stream has no folder")
    tasks = [
        Task(
            model,
            _place(model, output, out_dir),
            _own(report_file, model),
            _own(baseline, model),
            asked,
        )
        for model in models
    ]
    if not asked.get("check"):  # which writes nothing
        _check_apart(tasks, genai_config=asked["genai_config"])
    for task in tasks:
        _check_report(task)
    return tasks


@contextmanager
def made_folder(folder: Path | None) -> Iterator[None]:
    """Make a folder where it is missing; it goes again where nothing was written to it.

    Raises:
        FileError: it cannot be made.
    """
    made = folder is not None and not folder.exists()
    if folder is not None:
        files.make_folder(folder)
    try:
        yield
    finally:
        if made and folder is not None:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _place(model: Path, output: Path | None, out_dir: Path | None) -> Path:
    if output is not None:
        return output
    if model == STREAM:
        return STREAM if out_dir is None else out_dir / "stdin.fused.onnx"
    place = default_output(model)
    return place if out_dir is None else out_dir / place.name


def _own(path: Path | None, model: Path) -> Path | None:
    """The path with the model's name in it."""
    if path is None:
        return None
    return Path(str(path).replace(NAME, "stdin" if model == STREAM else stem(model)))


def _check_apart(tasks: Sequence[Task], *, genai_config: bool) -> None:
    """Whether each task's files are its own."""
    for index, task in enumerate(tasks):
        for other in tasks[:index]:
            for what, one, two in (
                ("written to", task.output, other.output),
                ("reported in", task.report_file, other.report_file),
            ):
                if one is not None and two is not None and same_place(one, two):
                    raise UsageError(f"{other.model} and {task.model} would both be {what} {one}")
            if genai_config and same_place(task.output.parent, other.output.parent):
                raise UsageError(
                    f"--genai-config would write one genai_config.json for {other.model} and "
                    f"{task.model}: give each a folder of its own"
                )
        for other in tasks:
            if other is not task and same_place(task.output, other.model):
                raise UsageError(
                    f"{task.model} would be written to {task.output}, which is a model to read"
                )


def _check_report(task: Task) -> None:
    from onnxgen.targets.genai_files import CONFIG, READ

    named = [path for path in (task.model, task.output) if path != STREAM]
    beside = (path.with_name(name) for path in named for name in (CONFIG, *READ))
    before = [task.baseline] if task.baseline is not None else []
    check_report_file(task.report_file, *named, *before, *beside)
