"""What `onnxgen.load` runs on ONNX Runtime: the whole model, or the nodes that no backend runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt

from onnxgen.contexts import steps
from onnxgen.reading import Opened, refer_to_file
from onnxgen.unchanged import Files

Array = npt.NDArray[Any]
Run = Callable[[dict[str, Any]], dict[str, Array]]


class NodesRuntime:
    """Sessions of ONNX Runtime, for the whole model or parts of it.

    Attributes:
        asked: `options` of the run that goes on in this thread.
    """

    def __init__(
        self, opened: Opened, options: Callable[[], Any] | None, providers: Sequence[Any] | None
    ) -> None:
        self._opened = opened
        self._files = Files(opened)
        self._make = options
        self._providers = providers
        self.asked = threading.local()

    def whole(self, outputs: Sequence[str]) -> Run:
        """The model as any runtime runs it, from its file."""
        self._files.check()
        return self._session(os.fspath(self._opened.path), self._options(), outputs)

    def part(self, nodes: steps.Nodes) -> Run:
        """Some of its nodes; the weights are mapped from where they are."""
        self._files.check()
        refer_to_file(self._opened, nodes.model.graph.initializer)
        options = self._options()
        # Threads that wait for this session's next run would hold up the sessions after it.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, os.fspath(self._opened.folder))
        inner = self._session(nodes.model.SerializeToString(), options, nodes.outputs)
        return lambda values: inner({name: values[name] for name in nodes.inputs})

    def _options(self) -> Any:
        import onnxruntime as ort

        return ort.SessionOptions() if self._make is None else self._make()

    def _session(self, source: str | bytes, options: Any, outputs: Sequence[str]) -> Run:
        import onnxruntime as ort

        providers = self._providers or ["CPUExecutionProvider"]
        session = ort.InferenceSession(source, options, providers=providers)

        def run(feeds: dict[str, Array]) -> dict[str, Array]:
            found = session.run(list(outputs), feeds, getattr(self.asked, "options", None))
            return dict(zip(outputs, found, strict=True))

        return run
