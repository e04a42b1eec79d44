"""Blobs that are ONNX models, run by ONNX Runtime: the weights are inputs after the part's own.

One session serves every place. What is bound stays where it is: ONNX Runtime reads inputs in
place, where weights of its own it would copy, and pack once more. Only an array that is not aligned
is copied.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from onnxgen.backends.interface import Array, BackendError, Call, Loaded, MissingError, Weight
from onnxgen.backends.parts import clause

FORM = "onnx"
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# ONNX Runtime's words for types that numpy has, and what numpy calls them.
_TYPES = {
    "float": "float32",
    "double": "float64",
    **{each: each for each in ("float16", "bool")},
    **{f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


def sealed(model: bytes) -> bytes:
    """A model with its checksum as a last entry of its metadata; it stays a model."""
    entry = onnx.StringStringEntryProto(key="onnxgen.crc32", value=format(zlib.crc32(model), "08x"))
    return model + bytes(onnx.ModelProto(metadata_props=[entry]).SerializeToString())


def check_seal(blob: bytes) -> None:
    """See that a blob is whole.

    Raises:
        BackendError: it is not what `sealed` made.
    """
    model = blob[: -len(sealed(b""))]
    if sealed(model) != blob:
        raise BackendError("the blob is damaged: its checksum is another")


def runtime() -> Any:
    """The package onnxruntime.

    Raises:
        MissingError: it is not here.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingError(f"ONNX Runtime is not installed ({error})") from error
    return onnxruntime


def options() -> Any:
    """Options of a session that says nothing and changes nothing in the graph."""
    ort = runtime()
    found = ort.SessionOptions()
    found.log_severity_level = 4
    # A model may take several sessions, whose waiting threads would hold up one another's runs.
    found.add_session_config_entry("session.intra_op.allow_spinning", "0")
    found.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return found


def bindable(weight: Weight) -> bool:
    """Whether ONNX Runtime can be given a weight where it lies: whole bytes, and no texts."""
    kind = onnx.helper.tensor_dtype_to_np_dtype(weight.dtype)
    size = kind.itemsize * int(np.prod(weight.shape, dtype=np.int64))
    return kind.itemsize in _UNSIGNED and size == weight.data.nbytes


def ort_value(weight: Weight) -> tuple[Any, Array]:
    """A value over the memory of a weight that is bindable, and what holds that memory.

    The value does not keep it: the caller must.
    """
    size = onnx.helper.tensor_dtype_to_np_dtype(weight.dtype).itemsize
    data = weight.data.view(_UNSIGNED[size]).reshape(weight.shape)
    data = np.require(data, requirements=["C", "A"])
    return runtime().OrtValue.ortvalue_from_numpy_with_onnx_type(data, weight.dtype), data


def open_session(blob: bytes, settings: Any, providers: list[str] | None) -> Loaded:
    """A session on a blob.

    Args:
        providers: as InferenceSession takes them; None where the options name devices.

    Raises:
        BackendError: ONNX Runtime cannot load it.
    """
    ort = runtime()
    try:  # falling back would print, and try the same again
        opened = ort.InferenceSession(blob, settings, providers=providers, enable_fallback=0)
        return _Session(opened)
    except BackendError:
        raise
    except Exception as error:  # ONNX Runtime's have no common base but this one
        raise BackendError(f"ONNX Runtime cannot load the blob: {clause(error)}") from error


class _Session(Loaded):
    def __init__(self, session: Any) -> None:
        self._session = session
        self._inputs = session.get_inputs()
        self._outputs = [output.name for output in session.get_outputs()]
        for output in session.get_outputs():
            _numpy_type(output)

    def bind(self, parameters: Sequence[Weight]) -> Call:
        own = len(self._inputs) - len(parameters)
        if own < 0:
            raise BackendError(
                f"it takes {len(self._inputs)} inputs, not {len(parameters)} weights"
            )
        values, held = {}, []
        for described, weight in zip(self._inputs[own:], parameters, strict=True):
            if not bindable(weight):
                raise BackendError("a weight of this type can only be inside of the blob")
            value, data = ort_value(weight)
            held.append(data)
            told = [size if isinstance(size, int) else None for size in described.shape]
            if value.data_type() != described.type or told != value.shape():
                raise BackendError(
                    f"a weight is {value.data_type()} {value.shape()}, not {described.type} {told}"
                )
            values[described.name] = value
        return _Place(self._session, self._inputs[:own], self._outputs, values, held)


class _Place:
    """A session's run with the weights of one place; ONNX Runtime runs several threads at once."""

    def __init__(
        self,
        session: Any,
        inputs: list[Any],
        outputs: list[str],
        values: dict[str, Any],
        held: list[Array],
    ) -> None:
        self._session = session
        self._types = {described.name: _numpy_type(described) for described in inputs}
        self._outputs = outputs
        self._values = values
        self._held = held  # the values are over their memory

    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
        ort = runtime()
        if len(inputs) != len(self._types):
            raise BackendError(f"it takes {len(self._types)} inputs, not {len(inputs)}")
        feeds = dict(self._values)
        arrays = []  # as long as the run
        for (name, dtype), array in zip(self._types.items(), inputs, strict=True):
            if array.dtype != dtype:
                raise BackendError(f"an input is {array.dtype}, not {dtype}")
            arrays.append(np.require(array, requirements=["C", "A"]))
            feeds[name] = ort.OrtValue.ortvalue_from_numpy(arrays[-1])
        quiet = ort.RunOptions()
        quiet.log_severity_level = 4
        try:
            found = self._session.run_with_ort_values(self._outputs, feeds, quiet)
            return [value.numpy() for value in found]
        except Exception as error:  # as above
            raise BackendError(f"ONNX Runtime fails: {clause(error)}") from error


def _numpy_type(described: Any) -> np.dtype[Any]:
    """What an input or output is in numpy.

    Raises:
        BackendError: numpy has no such type, or it is no tensor.
    """
    name = described.type.removeprefix("tensor(").removesuffix(")")
    if name not in _TYPES:
        raise BackendError(f"inputs and outputs of type {described.type} are not taken")
    return np.dtype(_TYPES[name])
