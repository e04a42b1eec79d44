"""ONNX Runtime, run where a crash of it cannot take the tool along.

    with Runtime() as runtime:
        session = runtime.load(model_bytes)
        outputs = runtime.run(session, {"x": x})

Analysis (masks and tables are read by running them), the check of each rewrite and the
comparison of whole models all run models through here.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxgen.ort_worker import read_message, write_message
from onnxgen.twin import Types, float32_twin, widened


class RuntimeFailure(Exception):
    """ONNX Runtime refused a model, failed while running it, died, or took too long.

    The message is the runtime's own, on one line.
    """


class Runtime:
    """A child process with ONNX Runtime on CPU; started on first use, restarted when it dies.

    Attributes:
        aliases: inputs, by name, that are one buffer of the device with an output; none unless set.

    Args:
        timeout: seconds one load or one run may take.
        threads: threads of one run; 0 lets the runtime choose.
        twins: types of which models are run as their float32 twins; what is fed of them is
            widened, what comes out is float32.
        webgpu: run on ONNX Runtime's WebGPU plugin provider, where that is installed and has a
            device, and on CPU what it does not take.
    """

    def __init__(
        self,
        *,
        timeout: float = 600.0,
        threads: int = 0,
        twins: Types = frozenset(),
        webgpu: bool = False,
    ) -> None:
        self.timeout = timeout
        self.threads = threads
        self.twins = twins
        self.webgpu = webgpu
        self.aliases: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._sessions = 0
        self._alive: set[int] = set()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(
        self, model: bytes | Path, *, optimize: bool = False, folder: Path | None = None
    ) -> int:
        """Load a model (bytes, or a path where it has external data) and return its handle.

        Args:
            optimize: run the runtime's own graph optimisations, as a user's session would.
            folder: where the external data of bytes is.

        Raises:
            RuntimeFailure: the runtime refuses the model.
        """
        self._sessions += 1
        with tempfile.TemporaryDirectory(prefix="onnxgen-") as scratch:
            source = model
            if self.twins:
                source = float32_twin(model, Path(scratch), self.twins, folder)
                folder = folder if isinstance(source, bytes) else None
            request = {
                "model": source if isinstance(source, bytes) else str(source),
                "optimize": optimize,
                "threads": self.threads,
                "webgpu": self.webgpu,
                "folder": "" if folder is None else str(folder),
            }
            self._ask("load", self._sessions, request)  # it maps the weights: they may go now
        self._alive.add(self._sessions)
        return self._sessions

    def run(
        self,
        session: int,
        feeds: Mapping[str, np.ndarray[Any, Any]],
        outputs: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Run a loaded model; all outputs unless some are named.

        Raises:
            RuntimeFailure: the run failed, or the session died with an earlier crash.
        """
        if session not in self._alive:
            raise RuntimeFailure("the session was lost when ONNX Runtime crashed")
        if self.twins:
            feeds = {name: widened(array, self.twins) for name, array in feeds.items()}
        request = {
            "feeds": dict(feeds),
            "outputs": list(outputs) if outputs else None,
            "aliases": self.aliases,
        }
        answer: dict[str, np.ndarray[Any, Any]] = self._ask("run", session, request)
        return answer

    def unload(self, session: int) -> None:
        """Free a session's memory."""
        if session in self._alive:
            self._alive.discard(session)
            self._ask("unload", session, {})

    def close(self) -> None:
        """End the child process."""
        process, self._process = self._process, None
        self._alive.clear()
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()
        process.kill()
        process.wait()

    def _ask(self, verb: str, session: int, request: dict[str, Any]) -> Any:
        process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        late = False
        try:
            write_message(process.stdin, {"do": verb, "id": session, **request})
            # Polled, not timed by a thread: a thread for each of some thousand questions costs
            # more than the answers.
            waiting = select.poll()
            waiting.register(process.stdout, select.POLLIN)
            late = not waiting.poll(self.timeout * 1000)
            if late:
                process.kill()
            status, answer = read_message(process.stdout)
        except (EOFError, OSError) as error:
            code = process.wait()
            self.close()
            cause = f"took more than {self.timeout:g} s" if late else f"crashed (status {code})"
            raise RuntimeFailure(f"ONNX Runtime {cause} during {verb}") from error
        if status == "error":
            raise RuntimeFailure(one_line(answer))
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._alive.clear()
            environment = dict(os.environ)
            # The child imports onnxgen from wherever this process did.
            root = str(Path(__file__).resolve().parent.parent)
            environment["PYTHONPATH"] = os.pathsep.join(
                filter(None, [root, environment.get("PYTHONPATH")])
            )
            self._process = subprocess.Popen(
                [sys.executable, "-m", "onnxgen.ort_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        return self._process


def one_line(message: str) -> str:
    """An ONNX Runtime message without its source paths, on one line of at most 300 characters."""
    message = re.sub(r"/\S+?\.(?:cc|h):\d+ ", "", message)
    message = re.sub(r"\s+", " ", message).strip()
    return message if len(message) <= 300 else message[:297] + "..."
