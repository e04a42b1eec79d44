"""ONNX Runtime, run where a crash of it cannot take the tool along.

    with Runtime() as runtime:
        session = runtime.load(model_bytes)
        outputs = runtime.run(session, {"x": x})

Analysis (masks and tables are read by running them), the check of each rewrite and the
comparison of whole models all run models through here.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxgen.bounds import Bounds, anonymous_memory, in_words
from onnxgen.messages import MessageError, receive, send
from onnxgen.twin import Types, float32_twin, widened

_GLANCES = (0.002, 0.02)  # seconds between two looks at the process's memory, at first and later


@dataclass(frozen=True)
class Picking:
    """What is to run a model, other than ONNX Runtime's CPU.

    Attributes:
        backend: runs its regions, see `onnxgen.load`; or "", and then
        provider: an execution provider of ONNX Runtime, as `ort:NAME` calls it.
        trust: sha256 of blobs that may be used.
    """

    backend: str = ""
    trust: tuple[str, ...] = ()
    provider: str = ""


class RuntimeFailure(Exception):
    """ONNX Runtime refused a model, failed while running it, died, or took too much.

    The message is the runtime's own, on one line.
    """


class SpentError(RuntimeFailure):
    """The time is spent that all loads and runs have together: it says nothing of the model asked."""


class _LateError(Exception):
    """What is waited for takes too long."""


class _GreedyError(Exception):
    """What is waited for takes too much memory."""


class Runtime:
    """A child process with ONNX Runtime on CPU; started on first use, restarted when it dies.

    The process is given nothing that a model's folder could hold: it looks for modules and
    libraries where Python is installed, runs in a folder of ours, and takes no settings of ONNX
    Runtime from the environment, by one of which a model may bring session options of its own.

    Attributes:
        aliases: inputs, by name, that are one buffer of the device with an output; none unless set.
        seconds: that loads and runs took so far.
        memory: bytes of anonymous memory that the process was seen to have at most; 0 where the
            system does not say.

    Args:
        bounds: what the process may take. After the first load or run that takes too long nothing
            more is run: what follows would most likely wait for the same thing again.
        threads: threads of one run; 0 lets the runtime choose.
        twins: types of which models are run as their float32 twins; what is fed of them is
            widened, what comes out is float32.
        webgpu: run on ONNX Runtime's WebGPU plugin provider, where that is installed and has a
            device, and on CPU what it does not take.
    """

    def __init__(
        self,
        *,
        bounds: Bounds | None = None,
        threads: int = 0,
        twins: Types = frozenset(),
        webgpu: bool = False,
    ) -> None:
        self.bounds = bounds or Bounds()
        self.threads = threads
        self.twins = twins
        self.webgpu = webgpu
        self.aliases: dict[str, str] = {}
        self.seconds = 0.0
        self.memory = 0
        self._late = ""
        self._watch: _Watch | None = None
        self._sessions = 0
        self._alive: set[int] = set()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(
        self,
        model: bytes | Path,
        *,
        optimize: bool = False,
        folder: Path | None = None,
        packed: bool = True,
        picking: Picking | None = None,
    ) -> int:
        """Load a model (bytes, or a path where it has external data) and return its handle.

        Args:
            optimize: run the runtime's own graph optimisations, as a user's session would.
            folder: where the external data of bytes is.
            packed: let the runtime copy weights into the order that is fastest for it; else they
                stay where they are mapped, on disk.
            picking: have `onnxgen.load` run the path, each region by the backend that it names.

        Raises:
            RuntimeFailure: the runtime refuses the model, or takes too much for it.
            SpentError: there is no time left.
        """
        self._check_time()
        self._sessions += 1
        with tempfile.TemporaryDirectory(prefix="onnxgen-") as scratch:
            source = model
            if self.twins:
                source = float32_twin(model, Path(scratch), self.twins, folder)
                folder = folder if isinstance(source, bytes) else None
            request = {
                "path": "" if isinstance(source, bytes) else os.path.abspath(source),
                "optimize": optimize,
                "threads": self.threads,
                "webgpu": self.webgpu,
                "packed": packed,
                "folder": "" if folder is None else os.path.abspath(folder),
                "backend": "" if picking is None else picking.backend,
                "trust": [] if picking is None else list(picking.trust),
                "provider": "" if picking is None else picking.provider,
            }
            data = {"model": np.frombuffer(source, np.uint8)} if isinstance(source, bytes) else {}
            self._ask("load", self._sessions, request, data)  # it maps the weights: they may go now
        self._alive.add(self._sessions)
        return self._sessions

    def run(
        self,
        session: int,
        feeds: Mapping[str, np.ndarray[Any, Any]],
        outputs: Sequence[str] | None = None,
        *,
        most: int | None = None,
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Run a loaded model; all outputs unless some are named.

        Args:
            most: bytes that the outputs may take; as much as the process unless given.

        Raises:
            RuntimeFailure: the run failed or took too much, or the session died with an earlier
                crash.
            SpentError: there is no time left.
        """
        self._check_time()
        if session not in self._alive:
            raise RuntimeFailure("the session was lost when ONNX Runtime crashed")
        if self.twins:
            feeds = {name: widened(array, self.twins) for name, array in feeds.items()}
        request = {
            "outputs": list(outputs) if outputs else None,
            "aliases": self.aliases,
            "most": self.bounds.memory if most is None else most,
        }
        return self._ask("run", session, request, feeds)

    def unload(self, session: int) -> None:
        """Free a session's memory."""
        if session in self._alive:
            self._alive.discard(session)
            self._ask("unload", session, {}, {})

    def close(self) -> None:
        """End the child process."""
        watch, self._watch = self._watch, None
        self._alive.clear()
        if watch is not None:
            watch.end()

    def _check_time(self) -> None:
        if self._late:
            raise SpentError(f"{self._late}; nothing more was run")
        if self.seconds >= self.bounds.time:
            raise SpentError(f"ONNX Runtime had {self.bounds.time:g} s in all, which are spent")

    def _ask(
        self, verb: str, session: int, request: dict[str, Any], arrays: Mapping[str, Any]
    ) -> dict[str, Any]:
        watch = self._start()
        started = time.monotonic()
        limit = min(self.bounds.timeout, self.bounds.time - self.seconds)
        watch.deadline = started + limit
        try:
            request = {"do": verb, "id": session, **request}
            send(watch.input, request, arrays, watch.writable)
            watch.readable()
            answer, found = receive(watch.output, watch.readable, most=self.bounds.memory)
            watch.glance()
        except _LateError as error:
            self.close()
            if limit < self.bounds.timeout:
                self.seconds = self.bounds.time
                self._check_time()
            self._late = f"ONNX Runtime took more than {limit:g} s during {verb}"
            raise RuntimeFailure(self._late) from error
        except _GreedyError as error:
            self.close()
            needed = f"needed more than {in_words(self.bounds.memory)} of memory"
            raise RuntimeFailure(f"ONNX Runtime {needed} during {verb}") from error
        except (EOFError, OSError, MessageError, ValueError, TypeError) as error:
            cause = _how_it_ended(watch.process)
            self.close()
            raise RuntimeFailure(f"ONNX Runtime {cause} during {verb}") from error
        finally:
            self.seconds += time.monotonic() - started
            self.memory = max(self.memory, watch.memory)
        if "error" in answer:
            raise RuntimeFailure(one_line(str(answer["error"])))
        return found

    def _start(self) -> _Watch:
        if self._watch is None or self._watch.process.poll() is not None:
            self.close()
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "onnxgen.ort_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=Path(__file__).resolve().parent,
                env=child_environment(),
            )
            self._watch = _Watch(process, self.bounds.memory)
        return self._watch


class _Watch:
    """Looks at a process while it is waited for: its time, and its memory.

    Attributes:
        input, output: descriptors of its standard streams, which do not block.
        deadline: when it has taken too long.
        memory: bytes of anonymous memory that it was seen to have at most.
    """

    def __init__(self, process: subprocess.Popen[bytes], most: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self.input, self.output = process.stdin.fileno(), process.stdout.fileno()
        self.deadline = math.inf
        self.memory = 0
        self._most = most
        self._looked = 0.0
        # Polled, not timed by a thread: a thread for each of some thousand questions costs
        # more than the answers.
        self._writable, self._readable = select.poll(), select.poll()
        self._writable.register(self.input, select.POLLOUT)
        self._readable.register(self.output, select.POLLIN)
        for fd in (self.input, self.output):
            os.set_blocking(fd, False)

    def writable(self) -> None:
        """Wait until it takes more of a question; raises _LateError or _GreedyError."""
        self._wait(self._writable)

    def readable(self) -> None:
        """Wait until there is more of an answer; raises _LateError or _GreedyError."""
        self._wait(self._readable)

    def glance(self) -> None:
        """Look at its memory, if nobody did just now."""
        if time.monotonic() - self._looked > _GLANCES[-1]:
            self._look()

    def end(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()
        self.process.kill()
        self.process.wait()

    def _wait(self, ready: select.poll) -> None:
        pause, slowest = _GLANCES
        while not ready.poll(pause * 1000):
            pause = min(1.5 * pause, slowest)
            self._look()
            if time.monotonic() > self.deadline:
                raise _LateError

    def _look(self) -> None:
        self._looked = time.monotonic()
        self.memory = max(self.memory, anonymous_memory(self.process.pid))
        if self.memory > self._most:
            raise _GreedyError


def child_environment() -> dict[str, str]:
    """The environment without what would have the process load code from where the user works."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "PYTHONINSPECT" and (not name.startswith("ORT_") or "_WEBGPU_" in name)
    }
    # The child imports onnxgen from wherever this process did.
    paths = [str(Path(__file__).resolve().parent.parent)]
    paths += filter(os.path.isabs, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(5)
    except subprocess.TimeoutExpired:
        return "gave no answer that can be read"
    if code == -signal.SIGKILL:
        return "was killed, perhaps by a system short of memory,"
    return f"crashed (status {code})"


def one_line(message: str) -> str:
    """An ONNX Runtime message without its source paths, on one line of at most 300 characters."""
    message = re.sub(r"/\S+?\.(?:cc|h):\d+ ", "", message)
    message = re.sub(r"\s+", " ", message).strip()
    return message if len(message) <= 300 else message[:297] + "..."
