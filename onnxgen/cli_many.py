"""Several models at once: each in a process of its own, one bar each, a table at the end.

A process that dies takes its own model with it and no other. What it says comes over a pipe; it
ends when the pipe does, so that nothing runs on after Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import click

from onnxgen.cli_tasks import Task
from onnxgen.cli_words import (
    Progress,
    debugging,
    is_quiet,
    is_verbose,
    proof_exit_code,
    say_error,
    show_outcome,
    unexpected,
)
from onnxgen.errors import FileError, OnnxgenError, RefusedError
from onnxgen.report import as_json
from onnxgen.report.values import Outcome, Report

Work = Callable[[Task, Progress], Report]
Show = Callable[[int, str], None]  # a task's number, and what is being done

GRAVEST = (1, 3, 4, 2, 5, 0)
"""Exit codes of models, the one that counts for all of them first."""

_PATIENCE = 20.0  # seconds that a process has to remove what it was writing


@dataclass(frozen=True)
class End:
    """How one model ended.

    Attributes:
        report: None where it failed before there was one.
        code: its own exit code.
        error: the sentence that it failed with, "" where it did not.
        seconds: wall time.
    """

    task: Task
    report: Report | None
    code: int
    error: str
    seconds: float = 0.0


def run_all(command: str, tasks: Sequence[Task], work: Work, jobs: int, json_output: bool) -> None:
    """Do the work for each task, show what came of it, and exit with the gravest code."""
    documents: dict[int, dict[str, object]] = {}

    def ended(number: int, end: End) -> None:
        report, error = end.report, end.error or None
        documents[number] = as_json.report_document(command, report, end.code, error)
        try:
            outcome = Outcome(command, end.code, error, report)
            loud = is_verbose() and not json_output
            show_outcome(outcome, end.task.report_file, json_output=False, printed=loud)
        except OnnxgenError as failure:  # the report cannot be written
            end = End(end.task, report, end.code or failure.exit_code, end.error or str(failure))
            ends[number] = end

    ends: list[End | None] = [None] * len(tasks)
    with _bars(tasks) as show:
        for number, end in in_processes(tasks, work, jobs, show):
            ends[number] = end
            ended(number, end)
    finished = [end for end in ends if end is not None]
    code = gravest(end.code for end in finished)
    if json_output:
        every = [documents[number] for number in range(len(tasks))]
        click.echo(as_json.dumps(as_json.models_document(command, every, code)), nl=False)
    elif not is_quiet():
        from onnxgen.report import several, text

        rows = [(str(e.task.model), e.report, e.code, e.seconds) for e in finished]
        console = text.console()
        if not console.is_terminal:
            console.width = several.WIDE
        console.print(several.render(rows))
    for end in finished:
        if end.error:
            named = (
                end.error if str(end.task.model) in end.error else f"{end.task.model}: {end.error}"
            )
            say_error(named)
    if code:
        sys.exit(code)


def gravest(codes: Iterator[int]) -> int:
    """The exit code of several models: a difference counts most, an expectation least."""
    return min(codes, key=lambda code: GRAVEST.index(code) if code in GRAVEST else -1, default=0)


def in_processes(
    tasks: Sequence[Task], work: Work, jobs: int, show: Show
) -> Iterator[tuple[int, End]]:
    """Yield each task's number and end, as they end; at most `jobs` run at once."""
    from onnxgen.staging import termination_raises

    waiting = deque(enumerate(tasks))
    running: dict[Connection, _Child] = {}
    try:
        with termination_raises():
            while waiting or running:
                while waiting and len(running) < jobs:
                    number, task = waiting.popleft()
                    child = _Child(number, task, work, min(jobs, len(tasks)))
                    running[child.channel] = child
                    show(number, "starting")
                ready = wait(list(running))
                for child in [each for channel, each in running.items() if channel in ready]:
                    said = child.receive()
                    if isinstance(said, str):
                        show(child.number, said)
                        continue
                    del running[child.channel]
                    child.close()
                    show(child.number, "")
                    yield child.number, said
    finally:
        for child in running.values():
            child.stop()
        for child in running.values():
            child.close()


class _Child:
    """A process that does one task."""

    def __init__(self, number: int, task: Task, work: Work, jobs: int) -> None:
        from onnxgen.runtime import child_environment

        self.number, self.task, self.started = number, task, time.monotonic()
        mine, theirs = os.pipe()
        reading, writing = os.pipe()
        with ExitStack() as stack:
            for handle in (theirs, reading):
                stack.callback(os.close, handle)
            self.channel = Connection(mine, writable=False)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "onnxgen.one_of_many", str(reading), str(theirs)],
                pass_fds=(reading, theirs),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None
                if debugging()
                else subprocess.DEVNULL,  # what it says comes by the pipe
                process_group=0,  # Ctrl-C is for who started it, and asks it to end
                env=child_environment(),
            )
        with Connection(writing, readable=False) as request:
            request.send((work, task, jobs))

    def receive(self) -> str | End:
        """What it is doing, or its end."""
        try:
            said = self.channel.recv()
        except (EOFError, OSError):
            return self._died()
        if isinstance(said, str):
            return said
        report, code, error = said
        return End(self.task, report, code, error, time.monotonic() - self.started)

    def stop(self) -> None:
        """Ask it to end; it removes what it was writing."""
        self._process.terminate()

    def close(self) -> None:
        """Wait for it, not for ever."""
        self.channel.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _died(self) -> End:
        code = self._process.wait()
        seconds = time.monotonic() - self.started
        if code == FileError.exit_code:  # it has said so: see onnxgen.mapped
            said = "a file was cut off, or its disk failed, while it was read"
            return End(self.task, None, code, said, seconds)
        how = (
            "was killed, perhaps by a system short of memory"
            if code == -signal.SIGKILL
            else (f"ended with status {code}")
        )
        return End(self.task, None, RefusedError.exit_code, f"its process {how}", seconds)


def serve(reading: int, writing: int) -> None:
    """In such a process: do the task that comes, say how it goes on and how it ended."""
    with Connection(reading, writable=False) as request:
        work, task, jobs = request.recv()
    _share_memory(jobs)
    channel = Connection(writing, readable=False)
    report: Report | None = None
    error: OnnxgenError | None = None
    try:
        report = work(task, channel.send)
    except OnnxgenError as failure:
        error, report = failure, failure.report
    except Exception as failure:
        error = unexpected(failure)
    if error is not None:
        channel.send((report, error.exit_code, str(error)))
    else:
        assert report is not None
        channel.send((report, proof_exit_code(report.proof, unproven=0), ""))


def _share_memory(jobs: int) -> None:
    """What ONNX Runtime may take by default is for all of them together."""
    from onnxgen.bounds import SHARE, machine_memory

    if jobs > 1 and not os.environ.get("ONNXGEN_MEMORY"):
        os.environ["ONNXGEN_MEMORY"] = str(int(SHARE * machine_memory() / jobs))


@contextmanager
def _bars(tasks: Sequence[Task]) -> Iterator[Show]:
    """A bar for each model on stderr, while it is a terminal; nothing in a pipe."""
    if is_quiet() or not sys.stderr.isatty():
        yield lambda number, message: None
        return
    from onnxgen.report import several

    with several.bars([Path(task.model).name for task in tasks]) as show:
        yield show
