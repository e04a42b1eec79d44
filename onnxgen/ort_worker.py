"""The child process that runs ONNX Runtime: reads requests, writes answers.

A model that is not ours can crash the runtime it is loaded into, so it is never loaded into
the process that holds the user's work. Started by `onnxgen.runtime`, imports nothing of ours but
`onnxgen.messages`, unless backends are to run the model: then what loads it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from typing import Any

import numpy as np

from onnxgen.messages import MessageError, receive, send


def _load(model: bytes | str, request: dict[str, Any]) -> Any:
    if request["backend"]:
        return _load_contexts(str(model), request["backend"], request["trust"])
    import onnxruntime as ort

    if request["provider"]:
        from onnxgen.backends.ort_compile import settings

        return ort.InferenceSession(model, settings(request["provider"]))

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = request["threads"]
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # shapes change from run to run
    # A dequantized weight stays what it says: fused with its MatMul the activations would be
    # quantized as well, and a right rewrite would seem to differ by percents.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not request["optimize"]:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not request["packed"]:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if request["folder"]:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, request["folder"])
    if request["webgpu"]:
        _add_webgpu(ort, options)
        return ort.InferenceSession(model, options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _load_contexts(path: str, backend: str, trust: list[str]) -> Any:
    """A session of `onnxgen.load` whose regions are all run by one backend."""
    from onnxgen.session import load

    session = load(path, prefer=[backend], trust=trust)
    for choice in session.choices:
        if choice.context is None:
            why = choice.passed[0].reason if choice.passed else "it compiled nothing for it"
            raise RuntimeError(f"{backend} does not run region '{choice.region.name}': {why}")
    return session


def _run_contexts(session: Any, feeds: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """A run in which no backend may fail."""
    before = session.picked
    found = dict(zip(names, session.run(names, feeds), strict=True))
    for choice in session.choices:
        if choice.context is None and before[choice.region.name] != "original":
            raise RuntimeError(f"region '{choice.region.name}': {choice.passed[0].reason}")
    return found


def _add_webgpu(ort: Any, options: Any) -> None:
    """Let the WebGPU plugin provider run what it can; the CPU takes the rest."""
    import onnxruntime_ep_webgpu as plugin

    name = plugin.get_ep_name()
    if not any(device.ep_name == name for device in ort.get_ep_devices()):
        ort.register_execution_provider_library("webgpu", plugin.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise RuntimeError("the WebGPU provider lists no device")
    options.add_provider_for_devices([devices[0]], {})


def _run(session: Any, request: dict[str, Any], feeds: dict[str, Any]) -> dict[str, Any]:
    if hasattr(session, "choices"):
        names = request["outputs"] or [output.name for output in session.get_outputs()]
        return _run_contexts(session, feeds, names)
    import onnxruntime as ort

    options = ort.RunOptions()
    options.log_severity_level = 4
    names = request["outputs"] or [output.name for output in session.get_outputs()]
    if request["aliases"]:
        return _run_aliased(session, feeds, names, request["aliases"], options)
    return dict(zip(names, session.run(names, feeds, options), strict=True))


def _run_aliased(
    session: Any, feeds: dict[str, Any], names: list[str], aliases: dict[str, str], options: Any
) -> dict[str, Any]:
    """A run whose named inputs and outputs are one buffer on the device each."""
    import onnxruntime as ort

    binding = session.io_binding()
    buffers = {}
    for name, array in feeds.items():
        if name in aliases:
            value = ort.OrtValue.ortvalue_from_numpy(array, "gpu", 0, 0)
            buffers[aliases[name]] = value
            binding.bind_ortvalue_input(name, value)
        else:
            binding.bind_cpu_input(name, array)
    for name in names:
        if name in buffers:
            binding.bind_ortvalue_output(name, buffers[name])
        else:
            binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding, options)
    return {
        name: buffers.get(name, value).numpy()
        for name, value in zip(names, binding.get_outputs(), strict=True)
    }


def main() -> None:
    _end_with(os.getppid())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no copy of the weights
    # ONNX Runtime and its libraries print to the standard streams: keep ours for messages.
    requests, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sessions: dict[int, Any] = {}
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            request, arrays = receive(requests)
            try:
                send(answers, {}, _answer(sessions, request, arrays))
            except MemoryError:
                send(answers, {"error": "out of memory"}, {})
            except MessageError as error:
                send(answers, {"error": f"an output cannot be read: {error}"}, {})
            except BrokenPipeError:
                return
            except Exception as error:
                send(answers, {"error": str(error)}, {})


def _answer(
    sessions: dict[int, Any], request: dict[str, Any], arrays: dict[str, Any]
) -> dict[str, Any]:
    match request["do"]:
        case "load":
            model = arrays["model"].tobytes() if arrays else request["path"]
            arrays.clear()
            sessions[request["id"]] = _load(model, request)
        case "run":
            found = _run(sessions[request["id"]], request, arrays)
            size = sum(each.nbytes for each in found.values() if isinstance(each, np.ndarray))
            if size > request["most"]:
                raise ValueError(f"its outputs are {size} bytes, more than {request['most']}")
            return found
        case _:
            sessions.pop(request["id"], None)
    return {}


def _end_with(parent: int) -> None:
    """Have this process end when its parent does, even within a run: nobody waits for it then."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
