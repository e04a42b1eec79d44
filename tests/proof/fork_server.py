"""A process that has imported everything already, and runs each command in a fork of itself.

    with Server() as server:
        outcome = server.run("cycles", 17, seed=0)

The fork runs `onnxgen.cli.main` as the `onnxgen` program does, in a folder of its own, under
limits that protect the machine. ONNX Runtime's own process is a fork too, save where the case
says otherwise: the same program, but for the second that its start takes.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MEMORY = 3 << 30  # bytes of RLIMIT_DATA: beyond what is allowed, below what hurts
SECONDS = 20  # of processor time for one process
PATIENCE = 150.0  # seconds on the clock, on however slow a machine
UNCAUGHT = 99  # exit status of a command that raised


@dataclass
class Ended:
    """How a forked command ended.

    Attributes:
        status: its exit code; the negative number of the signal that killed it.
        seconds: processor time of it and of the processes that it waited for.
        peak: most bytes of memory that one of them held, shared libraries included.
        left: whether a process of it was still there.
        late: whether it was killed for taking too long on the clock.
    """

    status: int
    seconds: float
    peak: int
    left: bool
    late: bool


def run_forked(work: Callable[[], int], folder: Path, scratch: Path) -> Ended:
    """Run `work` in a fork, its streams in `scratch`, in `folder`; its answer is the exit code."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = UNCAUGHT
        try:
            _confine(folder, scratch)
            status = work()
        except SystemExit as leave:
            status = leave.code if isinstance(leave.code, int) else 1 if leave.code else 0
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(status)
    handle = os.pidfd_open(pid)
    late = not select.select([handle], [], [], PATIENCE)[0]
    os.close(handle)
    if late:
        os.killpg(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    left = _group_lives(pid)
    code = os.waitstatus_to_exitcode(status)
    return Ended(code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, left, late)


def _confine(folder: Path, scratch: Path) -> None:
    os.setsid()
    for limit, value in (
        (resource.RLIMIT_DATA, MEMORY),
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_FSIZE, 1 << 30),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    os.chdir(folder)
    # What a model computes may take what its user allows: here, less than what is judged.
    os.environ |= {"ONNXGEN_MEMORY": "400MB", "ONNXGEN_TIMEOUT": "3"}
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch / "tmp")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(scratch / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))


def _group_lives(group: int) -> bool:
    """Whether a process of a group that should be gone is still there; it is killed."""
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.005)  # init has not reaped it yet
    os.killpg(group, signal.SIGKILL)
    return True


class ForkedWorker:
    """Stands in for `subprocess.Popen` of `onnxgen.ort_worker`: the same program, forked."""

    def __init__(self, args: Sequence[str], **options: Any) -> None:
        at = list(args).index("onnxgen.ort_worker")
        questions, ours_out = os.pipe()
        ours_in, answers = os.pipe()
        self.args = args
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.dup2(questions, 0)
                os.dup2(answers, 1)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                for number in (ours_in, ours_out, questions, answers):
                    os.close(number)
                sys.argv = [str(each) for each in args[at:]]
                sys.stdin = os.fdopen(0, "r", closefd=False)
                if options.get("preexec_fn"):
                    options["preexec_fn"]()
                from onnxgen import ort_worker

                ort_worker.main()
            finally:
                os._exit(0)
        os.close(questions)
        os.close(answers)
        self.stdin = os.fdopen(ours_out, "wb")
        self.stdout = os.fdopen(ours_in, "rb")
        self.stderr = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            _, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    terminate = kill


def command(words: Sequence[str], own_worker: bool) -> Callable[[], int]:
    """What a fork does to be `onnxgen WORDS`."""

    def work() -> int:
        from onnxgen import cli, runtime

        if not own_worker:
            fake = type(runtime.subprocess)("subprocess")
            vars(fake).update(vars(subprocess), Popen=ForkedWorker)
            vars(runtime)["subprocess"] = fake
        sys.argv = ["onnxgen", *words]
        cli.main(args=list(words), prog_name="onnxgen")
        return 0

    return work


def main() -> None:
    """Answer lines of "kind number seed" by lines of JSON."""
    import onnxruntime

    from onnxgen import cli, ort_worker, pipeline, pipeline_paged
    from onnxgen.report import text
    from tests.proof import fuzz_judge

    assert all((onnxruntime, cli, ort_worker, pipeline, pipeline_paged, text))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.freeze()
    with tempfile.TemporaryDirectory(prefix="onnxgen-fuzz-") as place:
        for line in sys.stdin:
            kind, number, seed = line.split()
            folder = Path(place) / "case"
            shutil.rmtree(folder, ignore_errors=True)
            outcome = fuzz_judge.outcome(kind, int(number), int(seed), folder)
            answers.write(json.dumps(asdict(outcome)) + "\n")
            answers.flush()


@dataclass
class Outcome:
    """What became of a case.

    Attributes:
        kind, number: which case.
        status: exit code, or the negative number of a signal.
        seconds, peak: as in `Ended`, of the command alone.
        failures: what must not be, one line each.
        said: the last line of what it said on stderr.
    """

    kind: str
    number: int
    status: int
    seconds: float
    peak: int
    failures: list[str] = field(default_factory=list)
    said: str = ""


class Server:
    """The server's process, started with the block and ended with it."""

    def __enter__(self) -> Server:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.proof.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=environment["PYTHONPATH"],
        )
        return self

    def run(self, kind: str, number: int, seed: int = 0) -> Outcome:
        """Run one case.

        Raises:
            RuntimeError: the server itself ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{kind} {number} {seed}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the fork server ended in {kind} {number}")
        return Outcome(**json.loads(line))

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


if __name__ == "__main__":
    from tests.proof import fork_server  # the module that others import, not __main__

    fork_server.main()
