"""What a backend is to onnxgen: it compiles a part of a model, says what it is, and runs blobs again.

    class MyBackend(Backend):
        name = "mine"

    [project.entry-points."onnxgen.backends"]     # in the pyproject.toml of its package
    mine = "my_package:MyBackend"

`onnxgen.backends.conformance` tries one. Nothing here imports a runtime: a backend imports its own
when it is asked for something.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

Array = npt.NDArray[Any]
Call = Callable[[Sequence[Array]], list[Array]]


class BackendError(Exception):
    """A backend cannot do what was asked; the message is one clause, such as "it knows no Foo"."""


class MissingError(BackendError):
    """The backend's package, or its device, is not on this machine."""


@dataclass(frozen=True)
class Identity:
    """Who compiles, or runs: what a blob was made by is compared with what is here.

    Attributes:
        source: the program, "OpenVINO".
        version: its version, as it says it.
        device: the device's full name.
        driver: the driver's version, "" where there is none.
        compatibility: a string of the backend's own by which it tells whether it takes a blob.
    """

    source: str
    version: str
    device: str
    driver: str = ""
    compatibility: str = ""


@dataclass(frozen=True)
class Weight:
    """The values of an initializer, where they lie: nothing is copied until it is asked for.

    Attributes:
        dtype: the type's number in onnx.TensorProto.
        shape: of the tensor.
        data: its bytes as in a tensor's raw_data, uint8 [bytes], a view of the mapped file; of texts
            each one's length in 8 bytes, little-endian, and then the text.
    """

    dtype: int
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    @cached_property
    def array(self) -> Array:
        """The values as numpy has them (bfloat16 and such by ml_dtypes), a view where it can be one.

        Types of less than a byte are unpacked, and so copied; so are texts, as objects.
        """
        if self.dtype == onnx.TensorProto.STRING:
            return np.array(list(self._texts()), object).reshape(self.shape)
        tensor = onnx.TensorProto(data_type=self.dtype, dims=self.shape)
        kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self.dtype))
        if self.data.nbytes == kind.itemsize * int(np.prod(self.shape, dtype=np.int64)):
            found = self.data.view(kind) if self.data.nbytes else np.empty(0, kind)
            return np.require(found.reshape(self.shape), requirements="A")
        tensor.raw_data = self.data.tobytes()
        return onnx.numpy_helper.to_array(tensor)

    def _texts(self) -> Iterator[str]:
        data, start = self.data.tobytes(), 0
        while start < len(data):
            end = start + 8 + int.from_bytes(data[start : start + 8], "little")
            yield data[start + 8 : end].decode("utf-8", "surrogateescape")
            start = end


@dataclass(frozen=True)
class Part:
    """A part of a model that is to be compiled, a model of its own.

    Attributes:
        model: its graph's inputs are the part's own inputs and then its weights, every one; it has
            no initializers but those within nested graphs, and the functions that it calls. Names
            and the order of nodes are canonical: parts that are alike are equal.
        inputs: how many of the graph's inputs are not weights.
        weights: the contents of the others, in the order of the graph's inputs.
    """

    model: onnx.ModelProto
    inputs: int
    weights: tuple[Weight, ...]

    def with_inside(self, positions: Sequence[int]) -> onnx.ModelProto:
        """The model with the weights at these positions (of `weights`) as initializers.

        Their contents are copied in, so they must come to less than 2 GB together.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        taken = {self.inputs + position: self.weights[position] for position in positions}
        inputs = list(model.graph.input)
        del model.graph.input[:]
        for index, value in enumerate(inputs):
            weight = taken.get(index)
            if weight is None:
                model.graph.input.append(value)
            else:
                model.graph.initializer.append(
                    onnx.TensorProto(
                        name=value.name,
                        data_type=weight.dtype,
                        dims=weight.shape,
                        raw_data=weight.data.tobytes(),
                    )
                )
        return model


@dataclass(frozen=True)
class Compiled:
    """What a backend made of a part.

    Attributes:
        blob: the backend's own bytes.
        form: what kind of bytes, a word of the backend's own, "openvino", "onnx".
        parameters: positions of the weights that it is given whenever it is loaded; the contents
            of all others are inside of the blob.
    """

    blob: bytes
    form: str
    parameters: tuple[int, ...] = ()


class Backend(ABC):
    """One runtime that compiles and runs parts of models on its devices.

    Attributes:
        name: the word before the colon of `openvino:CPU`.
    """

    name: str

    @abstractmethod
    def devices(self) -> list[str]:
        """The devices that are here, as they are written after the colon; [] without its package."""

    @abstractmethod
    def identity(self, device: str) -> Identity:
        """What is here.

        Raises:
            MissingError: the package or the device is not.
        """

    @abstractmethod
    def compile(self, part: Part, device: str) -> Iterator[Compiled]:
        """Compile a part, in the ways there are, the best first: the first that is proven is kept.

        Each must give one output for each of the graph's outputs, in their order, on inputs of any
        size that the part takes.

        Raises:
            BackendError: it cannot; also after some were yielded.
        """

    def refuses(self, made: Identity, device: str) -> str:
        """Why what `made` says was compiled elsewhere is not run here, as a clause; "" where it is.

        Unless a backend knows better, version and compatibility string must be equal.

        Raises:
            MissingError: the package or the device is not here.
        """
        here = self.identity(device)
        if made.version != here.version:
            return f"it was compiled by {made.source} {made.version}, and {here.version} is here"
        if made.compatibility != here.compatibility:
            return f"it was compiled for {made.compatibility!r}, and this is {here.compatibility!r}"
        return ""

    @abstractmethod
    def load(self, blob: bytes, form: str, device: str) -> Loaded:
        """Take a blob, once, however many places use it.

        Raises:
            BackendError: it cannot be read.
        """


class Loaded(ABC):
    """A blob that is ready to be given its weights."""

    @abstractmethod
    def bind(self, parameters: Sequence[Weight]) -> Call:
        """What runs one place: takes the part's own inputs, in order, gives its outputs.

        Args:
            parameters: of `Compiled.parameters`, in that order. Their bytes stay where they are as
                long as the answer lives; a backend that must copy them says so in its page.

        Raises:
            BackendError: they do not fit.
        """
