"""Runs the real command in forks of one warm process, with faults of the file system.

    server = Server()
    server.run(Job(["fuse", "model.onnx"], folder, fault="kill"))   # once for each moment

A fault comes at the k-th event: a file is created, written to, synced, renamed, removed or read.
The command is run up to the point where it begins to write; there the process is forked, a fork
for each k, until one comes through without its fault. So every moment is tried, with the command's
own state, and the folder is put back before each.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib
import json
import mmap
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.proof.failing import Failing


@dataclass
class Job:
    """A command and what happens to it.

    Attributes:
        words: the command's.
        folder: where it runs; its content is looked at before and after, and put back.
        fault: "" for none; "kill", "full" (no space from then on), "error" (this one fails),
            "unread" (this read fails).
        limit: the most bytes of a file.
        plain: permissions hold for it.
        meanwhile: what happens when the output is about to be written ("staged"), or moved into
            place ("commit"): Python, with `again()` for the command as a whole in another process.
    """

    words: list[str]
    folder: str
    fault: str = ""
    limit: int = 0
    plain: bool = False
    meanwhile: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What came of one run.

    Attributes:
        code: the exit code; negative for a signal.
        said: stderr.
        after: what each file holds, by its path in the folder; see `contents`.
        again: of a run that was killed: code and content after the command was run once more.
        event: what the fault was at.
    """

    code: int
    said: str
    after: dict[str, str]
    again: tuple[int, dict[str, str]] | None = None
    event: str = ""


class Server:
    """The warm process, started on first use."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()

    def run(self, job: Job) -> list[Outcome]:
        """One outcome, or with a fault one for each moment; the folder is as it was then."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.proof.file_server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
        self._process.stdin.flush()
        found = json.loads(self._process.stdout.readline())
        return [Outcome(**each) for each in found]


def contents(folder: Path) -> dict[str, str]:
    """A hash of each file below; of a report whether it is whole; of a link where it leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            found[name] = f"link to {os.readlink(path)}"
        elif not stat.S_ISREG(mode):
            found[name] = f"kind {stat.S_IFMT(mode):o}"
        elif path.name == "report.json":
            found[name] = "report"
            try:
                json.loads(path.read_bytes())
            except ValueError:
                found[name] = "half a report"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _serve() -> None:
    for heavy in ("cli", "pipeline", "pipeline_paged"):  # once, for every command that is forked
        importlib.import_module(f"onnxgen.{heavy}")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = Job(**json.loads(line))
        with tempfile.TemporaryDirectory(prefix="onnxgen-proof-") as scratch:
            place = Path(scratch)
            os.chmod(place, 0o777)
            child = os.fork()
            if not child:
                with _never_back():
                    _explore(job, place)
            os.waitpid(child, 0)
            answers.write((place / "outcomes").read_text("utf-8") + "\n")
            answers.flush()


@contextlib.contextmanager
def _never_back() -> Iterator[None]:
    try:
        yield
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(99)


def _explore(job: Job, scratch: Path) -> None:
    """Write the outcomes of a job; runs in a process of its own."""
    folder, kept = Path(job.folder), scratch / "kept"
    shutil.copytree(folder, kept, symlinks=True, ignore=_irregular)
    os.chdir(folder)
    outcomes: list[Outcome] = []

    def fork(work: Callable[[], None]) -> tuple[int, str]:
        """Go on in a fork; returns its end, and what it said."""
        said = scratch / "said"
        child = os.fork()
        if not child:
            with open(said, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            work()
            return -999, ""
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), said.read_text("utf-8", "replace")

    def every_moment() -> bool:
        """Try each; True in the fork that goes on with the command."""
        for at in range(1, 500):
            _put_back(kept, folder)
            shared = mmap.mmap(-1, 64)
            code, said = fork(
                lambda at=at, shared=shared: (Failing(job.fault, at, shared), None)[1]
            )
            if code == -999:
                return True
            event = shared[:].split(b"\0")[0].decode()
            if not event:
                break
            outcome = Outcome(code, said, contents(folder), event=event)
            outcomes.append(outcome)
            if job.fault == "kill":
                for path in folder.rglob(".*"):
                    os.utime(path, (0, 0), follow_symlinks=False)  # long ago
                code, _ = fork(lambda: None)
                if code == -999:
                    return True
                outcome.again = (code, contents(folder))
        _put_back(kept, folder)
        (scratch / "outcomes").write_text(json.dumps([dataclasses.asdict(o) for o in outcomes]))
        os._exit(0)

    if job.fault == "unread":
        every_moment()
    elif job.fault:
        _at_staging(every_moment)
    else:
        again = os.fork  # the whole command once more, from here
        code, said = fork(lambda: _prepare(job))
        if code != -999:
            outcome = Outcome(code, said, contents(folder))
            (scratch / "outcomes").write_text(json.dumps([dataclasses.asdict(outcome)]))
            os._exit(0)
        _meanwhile(job, again)
    _command(job.words)


def _at_staging(hook: Callable[[], object]) -> None:
    from onnxgen import pipeline, pipeline_paged, staging

    before, called = staging.staged, []

    def staged(*arguments: Any, **named: Any) -> Any:
        if not called:
            called.append(True)
            hook()
        return before(*arguments, **named)

    pipeline.staged = pipeline_paged.staged = staged


def _meanwhile(job: Job, fork: Callable[[], int]) -> None:
    """Have something happen while the command runs."""
    from onnxgen import pipeline, staging

    originals = (pipeline.staged, staging.Staged.commit)

    def again() -> int:
        child = fork()
        if not child:
            pipeline.staged, staging.Staged.commit = originals
            _command(job.words)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    scope = {"again": again, "os": os, "Path": Path, "sys": sys, "signal": signal}
    if "staged" in job.meanwhile:
        _at_staging(lambda: exec(job.meanwhile["staged"], scope))
    if "commit" in job.meanwhile:

        def commit(stage: Any) -> None:
            staging.Staged.commit = originals[1]
            exec(job.meanwhile["commit"], {**scope, "stage": stage})
            originals[1](stage)

        staging.Staged.commit = commit


def _prepare(job: Job) -> None:
    if job.limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.limit, job.limit))
    if job.plain and not os.geteuid():
        # Root without its right to read and write everything.
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if ctypes.CDLL(None).capset(header, none):
            raise OSError("capset")


def _command(words: list[str]) -> None:
    from onnxgen.cli import main

    code: Any = 98
    try:
        main.main(args=words, prog_name="onnxgen")
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code or 0)


def _irregular(folder: str, names: list[str]) -> list[str]:
    paths = [Path(folder, name) for name in names]
    return [p.name for p in paths if not (p.is_symlink() or p.is_file() or p.is_dir())]


def _put_back(kept: Path, folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.copytree(kept, folder, symlinks=True, dirs_exist_ok=True)


if __name__ == "__main__":
    _serve()
