"""The child process that runs ONNX Runtime: reads pickled requests, writes pickled answers.

A model that is not ours can crash the runtime it is loaded into, so it is never loaded into
the process that holds the user's work. Started by `onnxgen.runtime`, imports nothing of ours.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
from typing import IO, Any


def read_message(stream: IO[bytes]) -> Any:
    """One length-prefixed pickle; raises EOFError when the other side is gone."""
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", header)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)


def write_message(stream: IO[bytes], message: Any) -> None:
    data = pickle.dumps(message, protocol=5)
    stream.write(struct.pack("<Q", len(data)))
    stream.write(data)
    stream.flush()


def _load(request: dict[str, Any]) -> Any:
    import onnxruntime as ort

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
    if request["folder"]:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, request["folder"])
    if request["webgpu"]:
        _add_webgpu(ort, options)
        return ort.InferenceSession(request["model"], options)
    return ort.InferenceSession(request["model"], options, providers=["CPUExecutionProvider"])


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


def _run(session: Any, request: dict[str, Any]) -> dict[str, Any]:
    import onnxruntime as ort

    options = ort.RunOptions()
    options.log_severity_level = 4
    names = request["outputs"] or [output.name for output in session.get_outputs()]
    if request["aliases"]:
        return _run_aliased(session, request["feeds"], names, request["aliases"], options)
    return dict(zip(names, session.run(names, request["feeds"], options), strict=True))


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
    # ONNX Runtime and its libraries print to the standard streams: keep ours for messages.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests = sys.stdin.buffer
    sessions: dict[int, Any] = {}
    while True:
        try:
            request = read_message(requests)
        except EOFError:
            return
        answer: tuple[str, Any]
        try:
            match request["do"]:
                case "load":
                    sessions[request["id"]] = _load(request)
                    answer = ("ok", None)
                case "run":
                    answer = ("ok", _run(sessions[request["id"]], request))
                case _:
                    sessions.pop(request["id"], None)
                    answer = ("ok", None)
        except MemoryError:
            answer = ("error", "out of memory")
        except Exception as error:
            answer = ("error", str(error))
        write_message(answers, answer)


if __name__ == "__main__":
    main()
