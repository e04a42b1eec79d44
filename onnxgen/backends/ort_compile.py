"""ONNX Runtime's Compile API: what execution providers write as EPContext nodes.

A blob is the whole model that `ModelCompiler` writes, the provider's bytes embedded. Weights are
its inputs where the provider takes that, else inside. A device is a provider's name, such as
`OpenVINOExecutionProvider`, or of several devices of one provider, as ONNX Runtime lists them, the
name and the kind, `OpenVINOExecutionProvider.GPU`.

Providers in packages named onnxruntime_ep_* are registered here; others by whoever has them, with
onnxruntime.register_execution_provider_library.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import pkgutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from onnxgen.backends.interface import BackendError, Compiled, Identity, MissingError, Part
from onnxgen.backends.ort_session import FORM, bindable, open_session, options, runtime, sealed
from onnxgen.backends.parts import clause, expanded, inlined, large, with_inside

_PREFIX = "onnxruntime_ep_"  # of packages
_INFO = "ep_compatibility_info."  # of metadata
_CPU = "CPUExecutionProvider"


def devices() -> list[str]:
    """What plugin providers offer here, of those that compile a small model to EPContext."""
    return [device for device in _offered() if not _silent(device)]


def settings(device: str) -> Any:
    """Options of a session on a device.

    Raises:
        MissingError: no provider offers it.
    """
    found = options()
    offered = _device(device)
    found.add_provider_for_devices([offered], _options(offered))
    return found


def identity(device: str) -> Identity:
    """The provider; compatible is what it says of what it compiles.

    Raises:
        MissingError: no provider offers the device, or it compiles nothing.
    """
    if _silent(device):
        raise MissingError(f"{device!r} compiles nothing here: {_silent(device)}")
    return _identity(device)


def refuses(made: Identity, device: str) -> str:
    """The provider's own word on its string where ONNX Runtime can ask for it."""
    here = _device(device)
    version = _version(here)
    if made.version != version:
        return f"it was compiled by {made.source} {made.version}, and {version} is here"
    from onnxruntime.capi import _pybind_state as state

    if made.compatibility and hasattr(state, "get_model_compatibility_for_ep_devices"):
        said = state.get_model_compatibility_for_ep_devices([here], made.compatibility)
        fine = state.OrtCompiledModelCompatibility.EP_SUPPORTED_OPTIMAL
        return "" if said == fine else f"{here.ep_name} says {said.name} of {made.compatibility!r}"
    if made.compatibility != _identity(device).compatibility:
        return f"it was compiled for {made.compatibility!r}, which is not what is here"
    return ""


def compile_part(part: Part, device: str) -> Iterator[Compiled]:
    """Weights as inputs, then inside; each as the part is, and with what it calls expanded.

    Raises:
        BackendError: the provider takes no part of it, or not all.
        MissingError: no provider offers the device.
    """
    _device(device)
    failures: list[BackendError] = []
    found = False
    outside = tuple(i for i in large(part) if bindable(part.weights[i]))
    for parameters in dict.fromkeys((outside, ())):
        for model in _forms(part.model):
            inside = [i for i in range(len(part.weights)) if i not in set(parameters)]
            try:
                blob = _compiled(with_inside(replace(part, model=model), inside), device)
            except BackendError as error:
                failures.append(error)
                continue
            found = True
            yield Compiled(sealed(blob), FORM, parameters)
    if not found:
        raise failures[0]


def _forms(model: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    yield model
    with contextlib.suppress(BackendError):  # a type is not known: there is no such form
        yield expanded(inlined(model))


def _compiled(model: onnx.ModelProto, device: str) -> bytes:
    ort = runtime()
    if not hasattr(ort, "ModelCompiler"):
        raise BackendError(f"ONNX Runtime {ort.__version__} has no Compile API")
    with tempfile.TemporaryDirectory(prefix="onnxgen-") as folder:
        target = Path(folder) / "compiled.onnx"
        try:
            compiler = ort.ModelCompiler(
                settings(device), model.SerializeToString(), embed_compiled_data_into_model=True
            )
            compiler.compile_to_file(str(target))
        except Exception as error:  # ONNX Runtime's have no common base but this one
            raise BackendError(f"ONNX Runtime cannot compile it: {clause(error)}") from error
        if not target.exists():
            raise BackendError("the provider took no node, and nothing was compiled")
        blob = target.read_bytes()
    nodes = onnx.ModelProto.FromString(blob).graph.node
    if not any(node.op_type == "EPContext" for node in nodes):
        raise BackendError("the provider wrote no EPContext node")
    open_session(blob, settings(device), None)
    return blob


# --- providers ----------------------------------------------------------------------------------


@functools.cache
def _register() -> None:
    """Register the providers of installed packages, once; a broken one is left out."""
    ort = runtime()
    for module in pkgutil.iter_modules():
        if not module.name.startswith(_PREFIX):
            continue
        try:
            package = importlib.import_module(module.name)
            if package.get_ep_name() not in {each.ep_name for each in ort.get_ep_devices()}:
                ort.register_execution_provider_library(module.name, package.get_library_path())
        except Exception:  # another's code: it may raise anything
            continue


def _offered() -> dict[str, Any]:
    """ONNX Runtime's devices by the names that we give them."""
    _register()
    found: dict[str, Any] = {}
    for each in runtime().get_ep_devices():
        if each.ep_name == _CPU:
            continue
        name = each.ep_name
        if name in found:
            name = f"{name}.{each.device.type.name}"
        found.setdefault(name, each)
    return found


def _device(device: str) -> Any:
    offered = _offered()
    if device not in offered:
        here = ", ".join(["cpu", *offered])
        raise MissingError(f"no provider of ONNX Runtime offers {device!r} here (offered: {here})")
    return offered[device]


def _options(offered: Any) -> dict[str, str]:
    """What a provider is told so that it does not compute with less precision than the part says."""
    if offered.ep_name == "OpenVINOExecutionProvider":  # else bfloat16, on CPUs that have it
        exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        return {"load_config": json.dumps({offered.ep_metadata.get("ov_device", "CPU"): exact})}
    return {}


def _version(here: Any) -> str:
    return str(here.ep_metadata.get("version", "")) or f"of ONNX Runtime {runtime().__version__}"


@functools.cache
def _silent(device: str) -> str:
    """Why a device compiles nothing; "" where it does."""
    try:
        _identity(device)
    except MissingError:
        raise
    except BackendError as error:
        return str(error)
    return ""


@functools.cache
def _identity(device: str) -> Identity:
    here = _device(device)
    told = here.ep_metadata
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [answer])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    compiled = onnx.ModelProto.FromString(_compiled(model, device))
    strings = {entry.key: entry.value for entry in compiled.metadata_props}
    return Identity(
        here.ep_name,
        _version(here),
        told.get("FULL_DEVICE_NAME") or f"{here.device.vendor} {here.device.type.name}",
        told.get("driver_version", ""),
        strings.get(_INFO + here.ep_name, ""),
    )
