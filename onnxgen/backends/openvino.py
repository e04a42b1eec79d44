"""OpenVINO: parts compiled by its own compiler, as blobs of its `export_model`.

    OpenVINO().compile(part, "CPU")      # devices are those that OpenVINO itself lists

Weights are parameters of what is compiled, all but small integers and single numbers: they stay where
they are mapped, and the blob is kilobytes. Only where OpenVINO cannot compile that are integers, and then all weights,
constants inside. An array that cannot be written to, or is not aligned, is copied when it is bound.

Numerics: everything is computed in float32, whatever precision OpenVINO would choose for speed
(bfloat16, and caches of 8 bits, on CPUs that have them), except that its CPU computes float64 as
float32 and int64 as int32.

Model-local functions are inlined: OpenVINO reads none. So is the standard's RotaryEmbedding, since
a blob of it is wrong after `import_model` (2026.4.1): the operator that OpenVINO makes of it loses
the width of its tables, and reads beyond them wherever they hold half of a head, as the standard's
do. Where that form is not right either, all operators that the standard defines by others follow.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from onnxgen.backends.interface import (
    Array,
    Backend,
    BackendError,
    Call,
    Compiled,
    Identity,
    Loaded,
    MissingError,
    Part,
    Weight,
)
from onnxgen.backends.parts import clause, expanded, inlined, is_floating, large, with_inside

_FORM = "openvino"
_EXACT = {  # of what a device would otherwise choose for speed
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "KEY_CACHE_PRECISION": "f32",
    "VALUE_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "PERFORMANCE_HINT": "LATENCY",
}
# Types of ONNX by OpenVINO's names for them.
_TYPES = {
    "FLOAT": "f32",
    "FLOAT16": "f16",
    "BFLOAT16": "bf16",
    "DOUBLE": "f64",
    "BOOL": "boolean",
    "FLOAT8E4M3FN": "f8e4m3",
    "FLOAT8E5M2": "f8e5m2",
    **{
        f"{sign}INT{bits}": f"{sign[:1].lower() or 'i'}{bits}"
        for sign in ("", "U")
        for bits in (4, 8, 16, 32, 64)
    },
}
_NARROW = {
    "bf16": ml_dtypes.bfloat16,
    "f8e4m3": ml_dtypes.float8_e4m3fn,
    "f8e5m2": ml_dtypes.float8_e5m2,
}


class OpenVINO(Backend):
    """The backend; see this module."""

    name = "openvino"

    def devices(self) -> list[str]:
        if importlib.util.find_spec("openvino") is None:
            return []
        return list(_core().available_devices)

    def identity(self, device: str) -> Identity:
        return _identity(device)

    def compile(self, part: Part, device: str) -> Iterator[Compiled]:
        _identity(device)
        failures: list[BackendError] = []
        found = False
        outside = large(part)
        floats = tuple(i for i in outside if is_floating(part.weights[i].dtype))
        for parameters in dict.fromkeys((outside, floats, ())):
            for form in _forms(part.model):
                try:
                    compiled = _compiled(replace(part, model=form), parameters, device)
                except BackendError as error:
                    failures.append(error)
                    continue
                found = True
                yield compiled
        if not found:
            raise failures[0]

    def load(self, blob: bytes, form: str, device: str) -> Loaded:
        _identity(device)
        if form != _FORM:
            raise BackendError(f"it knows no blobs of the form {form!r}")
        try:
            return _Imported(_core().import_model(blob, device, _settings(device)))
        except (RuntimeError, ValueError) as error:
            raise BackendError(f"OpenVINO cannot read the blob: {clause(error)}") from error


class _Imported(Loaded):
    """A compiled model that was imported; every place has a request of its own, and so its weights."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._outputs = [_numpy_type(port) for port in model.outputs]

    def bind(self, parameters: Sequence[Weight]) -> Call:
        ports = list(self._model.inputs)
        own = len(ports) - len(parameters)
        if own < 0:
            raise BackendError(f"it takes {len(ports)} inputs, not {len(parameters)} weights")
        try:
            request = self._model.create_infer_request()
            held = [_usable(weight.data, ports[i]) for i, weight in enumerate(parameters, own)]
            for index, weight in enumerate(parameters, own):
                tensor = _weight_tensor(ports[index], weight, held[index - own])
                request.set_input_tensor(index, tensor)
        except (RuntimeError, ValueError, TypeError) as error:
            raise BackendError(f"a weight does not fit: {clause(error)}") from error
        return _Place(request, own, held, self._outputs)


class _Place:
    """A request with its weights, run by one thread at a time."""

    def __init__(
        self, request: Any, own: int, held: list[Array], outputs: list[np.dtype[Any]]
    ) -> None:
        self._request = request
        self._held = held  # the request reads them where they are
        self._outputs = outputs
        self._inputs = [_numpy_type(port) for port in request.model_inputs[:own]]
        self._lock = threading.Lock()

    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
        if len(inputs) != len(self._inputs):
            raise BackendError(f"it takes {len(self._inputs)} inputs, not {len(inputs)}")
        with self._lock:
            try:
                for index, (array, dtype) in enumerate(zip(inputs, self._inputs, strict=True)):
                    self._request.set_input_tensor(index, _tensor(array, dtype))
                self._request.infer()
                return [
                    _copied(self._request.get_output_tensor(index), dtype)
                    for index, dtype in enumerate(self._outputs)
                ]
            except (RuntimeError, ValueError, TypeError) as error:
                raise BackendError(f"OpenVINO fails: {clause(error)}") from error


# --- compiling ----------------------------------------------------------------------------------


def _compiled(part: Part, parameters: tuple[int, ...], device: str) -> Compiled:
    inside = [i for i in range(len(part.weights)) if i not in set(parameters)]
    whole = with_inside(part, inside)
    wanted = [value.name for value in whole.graph.input]
    text = whole.SerializeToString()
    try:
        model = _core().read_model(text)
        del text
        found = [port.names for port in model.inputs]
        file = io.BytesIO()
        compiled = _core().compile_model(model, device, _settings(device))
        compiled.export_model(file)
    except (RuntimeError, ValueError) as error:
        raise BackendError(f"OpenVINO cannot compile it: {clause(error)}") from error
    if len(found) != len(wanted) or any(a not in b for a, b in zip(wanted, found, strict=True)):
        raise BackendError("OpenVINO leaves out an input that nothing reads")
    return Compiled(file.getvalue(), _FORM, parameters)


def _forms(model: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """The model as OpenVINO can take it, and then with every operator expanded that has a body."""
    typed = inlined(model)
    try:
        first = expanded(typed, ["RotaryEmbedding"])
    except BackendError:  # a type is not known: as it is, which the caller proves or refuses
        first = typed
    yield first
    try:
        every = expanded(typed)
    except BackendError:  # a type is not known: there is no such form
        return
    if len(every.graph.node) != len(first.graph.node):
        yield every


# --- tensors ------------------------------------------------------------------------------------


def _usable(data: Array, port: Any) -> Array:
    """The bytes where they are, or a copy where they can be neither written to nor read at once.

    A tensor does not keep what it reads alive: whoever asked must.
    """
    aligned = data.ctypes.data % max(port.element_type.size, 1) == 0
    return data if data.flags.writeable and aligned else data.copy()


def _weight_tensor(port: Any, weight: Weight, data: Array) -> Any:
    """A tensor over the weight's bytes."""
    ov = _openvino()
    name = _TYPES.get(onnx.TensorProto.DataType.Name(weight.dtype), "")
    if port.element_type.get_type_name() != name:
        raise ValueError(f"it is {name or weight.dtype}, not {port.element_type}")
    if not port.partial_shape.compatible(ov.PartialShape(list(weight.shape))):
        raise ValueError(f"it is {list(weight.shape)}, not {port.partial_shape}")
    return ov.Tensor(data, ov.Shape(list(weight.shape)), port.element_type)


def _tensor(array: Array, dtype: np.dtype[Any]) -> Any:
    """A tensor over the array's memory where that can be."""
    ov = _openvino()
    if array.dtype != dtype:
        raise ValueError(f"an input is {array.dtype}, not {dtype}")
    # Numpy has two names for the same integers, and OpenVINO knows one of them.
    array = np.require(array, requirements=["C", "A", "W"]).view(dtype)
    name = next((name for name, narrow in _NARROW.items() if np.dtype(narrow) == dtype), "")
    if not name:
        return ov.Tensor(array, shared_memory=True)
    return ov.Tensor(array.view(np.uint8), ov.Shape(list(array.shape)), getattr(ov.Type, name))


def _copied(tensor: Any, dtype: np.dtype[Any]) -> Array:
    found: Array = np.array(tensor.data)  # the next run overwrites what is in the tensor
    return found.view(dtype) if found.dtype != dtype else found


def _numpy_type(port: Any) -> np.dtype[Any]:
    """What an input or output is in numpy.

    Raises:
        BackendError: it has no whole bytes, or is no number.
    """
    name = port.element_type.get_type_name()
    if name not in _TYPES.values() or name in ("i4", "u4"):
        raise BackendError(f"inputs and outputs of type {name} are not taken")
    found: np.dtype[Any] = np.dtype(_NARROW.get(name) or port.element_type.to_dtype())
    return found


# --- OpenVINO itself ----------------------------------------------------------------------------


def _openvino() -> Any:
    """The package.

    Raises:
        MissingError: it is not here.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingError(
            f"OpenVINO is not installed ({error}); the extra 'openvino' brings it"
        ) from error
    return openvino


@functools.cache
def _core() -> Any:
    return _openvino().Core()


@functools.cache
def _settings(device: str) -> dict[str, str]:
    """What keeps the numbers right, as far as the device knows it."""
    known = _core().get_property(device, "SUPPORTED_PROPERTIES")
    return {key: value for key, value in _EXACT.items() if known.get(key) == "RW"}


@functools.cache
def _identity(device: str) -> Identity:
    ov = _openvino()
    try:
        name = str(_core().get_property(device, "FULL_DEVICE_NAME"))
    except RuntimeError as error:
        here = ", ".join(_core().available_devices)
        raise MissingError(f"OpenVINO has no device {device!r} here, but {here}") from error
    # What it writes into the head of a blob is known only of something that was compiled.
    parameter = ov.opset13.parameter([1], ov.Type.f32)
    model = ov.Model([ov.opset13.result(parameter)], [parameter])
    compiled = _core().compile_model(model, device)
    needs = ""
    if "RUNTIME_REQUIREMENTS" in compiled.get_property("SUPPORTED_PROPERTIES"):
        needs = str(compiled.get_property("RUNTIME_REQUIREMENTS"))
    return Identity("OpenVINO", ov.__version__, name, compatibility=needs)
