"""ONNX Runtime on this machine's CPU: a blob is the graph as ONNX Runtime optimised it for it.

It is optimised with its weights as the constants that they are. Weights that came through as they
were are taken out again, and given when it is run; what ONNX Runtime made of the others (packed,
transposed, folded) stays inside. That nothing inside follows from a weight that was taken out is
seen by optimising once more with other contents: everything else must be the same.
"""

from __future__ import annotations

import hashlib
import platform
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import external_data_helper, helper

from onnxgen.backends.interface import BackendError, Compiled, Identity, Part, Weight
from onnxgen.backends.ort_session import (
    FORM,
    bindable,
    open_session,
    options,
    ort_value,
    runtime,
    sealed,
)
from onnxgen.backends.parts import LARGEST_INSIDE, is_floating, large, with_inside

DEVICE = "cpu"
PROVIDERS = ["CPUExecutionProvider"]
_FILE = "onnxgen.data"  # of contents, beside the optimised graph
# What MLAS asks a processor for: the layouts that the optimised graph has follow from it.
_INSTRUCTIONS = [
    "sse4_1",
    "avx",
    "f16c",
    "fma",
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "fphp",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
    "sme",
]


def identity() -> Identity:
    """This machine's processor; compatible is what has the same instructions."""
    name, instructions = _processor()
    return Identity("ONNX Runtime", runtime().__version__, name, compatibility=instructions)


def compile_part(part: Part) -> Iterator[Compiled]:
    """The optimised graph with its weights outside, and then with all of them inside.

    Raises:
        BackendError: ONNX Runtime cannot load the part.
    """
    outside = tuple(i for i in large(part) if bindable(part.weights[i]))
    failures: list[BackendError] = []
    yielded = set()
    for asked in dict.fromkeys((outside, _read_once(part, outside), ())):
        try:
            compiled = _compiled(part, asked)
        except BackendError as error:
            failures.append(error)
            continue
        if compiled.parameters not in yielded:
            yielded.add(compiled.parameters)
            yield compiled
    if not yielded:
        raise failures[0]


def _compiled(part: Part, asked: Sequence[int]) -> Compiled:
    """The optimised graph, given those of the weights at `asked` that came through."""
    names = [value.name for value in part.model.graph.input][part.inputs :]
    with tempfile.TemporaryDirectory(prefix="onnxgen-") as folder:
        optimised = _optimise(part, Path(folder))
        parameters = tuple(i for i in asked if optimised.holds(names[i], part.weights[i]))
        taken = {names[i]: part.weights[i] for i in parameters}
        if taken:
            weights = list(part.weights)
            for position in parameters:
                weights[position] = _other(weights[position])
            with tempfile.TemporaryDirectory(prefix="onnxgen-") as second:
                again = _optimise(replace(part, weights=tuple(weights)), Path(second))
                if again.digest(taken) != optimised.digest(taken):
                    raise BackendError("what ONNX Runtime puts inside follows from the weights")
        blob = optimised.blob(taken)
    open_session(blob, options(), PROVIDERS)  # some kernels take a weight as a constant only
    return Compiled(sealed(blob), FORM, parameters)


def _read_once(part: Part, positions: Collection[int]) -> tuple[int, ...]:
    """The weights that one node reads: where they come through, nothing was made of them."""
    reads = [name for node in part.model.graph.node for name in node.input]
    names = [value.name for value in part.model.graph.input][part.inputs :]
    return tuple(i for i in positions if reads.count(names[i]) == 1)


def _other(weight: Weight) -> Weight:
    """A weight with other contents, such as could stand in its place."""
    kind = helper.tensor_dtype_to_np_dtype(weight.dtype)
    if is_floating(weight.dtype):
        some = (np.arange(997) * 0.001 + 0.5).astype(kind)
        values = np.resize(some, weight.data.nbytes // kind.itemsize)
    else:  # indices stay within what they index
        values = np.ascontiguousarray(weight.array.reshape(-1)[::-1])
    return replace(weight, data=values.view(np.uint8))


# --- optimising ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Optimised:
    """What ONNX Runtime made of a part.

    Attributes:
        model: the graph; its large initializers have no data.
        contents: theirs, by name, uint8 [bytes], mapped.
    """

    model: onnx.ModelProto
    contents: Mapping[str, npt.NDArray[np.uint8]]

    def holds(self, name: str, weight: Weight) -> bool:
        """Whether an initializer of this name is this weight, unchanged."""
        return any(
            tensor.name == name
            and tensor.data_type == weight.dtype
            and tuple(tensor.dims) == weight.shape
            and name in self.contents
            and np.array_equal(self.contents[name], weight.data)
            for tensor in self.model.graph.initializer
        )

    def digest(self, without: Collection[str]) -> str:
        """Of everything but the contents of some initializers."""
        found = hashlib.sha256(self.model.SerializeToString(deterministic=True))
        for name in sorted(set(self.contents) - set(without)):
            found.update(name.encode() + b"\0")
            found.update(self.contents[name].data)
        return found.hexdigest()

    def blob(self, taken: Mapping[str, Weight]) -> bytes:
        """The model with some initializers as inputs, in the order given, and all others inside."""
        inside = sum(data.nbytes for name, data in self.contents.items() if name not in taken)
        if inside > LARGEST_INSIDE:
            raise BackendError(f"{inside} bytes would be inside, more than one proto holds")
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        initializers = list(model.graph.initializer)
        del model.graph.initializer[:]
        for tensor in initializers:
            if tensor.name in taken:
                continue
            if tensor.name in self.contents:
                tensor.raw_data = self.contents[tensor.name].tobytes()
            model.graph.initializer.append(tensor)
        for name, weight in taken.items():
            described = helper.make_tensor_value_info(name, weight.dtype, weight.shape)
            model.graph.input.append(described)
        found: bytes = model.SerializeToString()
        return found


def _optimise(part: Part, folder: Path) -> _Optimised:
    """Let ONNX Runtime optimise a part for this machine; the answer maps files in `folder`.

    Raises:
        BackendError: it cannot load the part.
    """
    ort = runtime()
    given = {i for i in large(part) if bindable(part.weights[i])}
    model = with_inside(part, [i for i in range(len(part.weights)) if i not in given])
    values = list(model.graph.input)[part.inputs :]
    del model.graph.input[part.inputs :]
    for value, position in zip(values, sorted(given), strict=True):
        weight = part.weights[position]
        tensor = model.graph.initializer.add(
            name=value.name,
            data_type=weight.dtype,
            dims=weight.shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, entry in (("location", _FILE), ("length", str(weight.data.nbytes))):
            tensor.external_data.add(key=key, value=entry)
    settings = options()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.optimized_model_filepath = str(folder / "optimised.onnx")
    for key, entry in (
        ("session.optimized_model_external_initializers_file_name", _FILE),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "0"),
        ("session.disable_prepacking", "1"),
    ):
        settings.add_session_config_entry(key, entry)
    made = [ort_value(part.weights[i]) for i in sorted(given)]  # the data, too, until it is loaded
    names = [value.name for value in values]
    settings.add_external_initializers(names, [value for value, _ in made])
    open_session(model.SerializeToString(), settings, PROVIDERS)
    return _read(folder)


def _read(folder: Path) -> _Optimised:
    model = onnx.load(folder / "optimised.onnx", load_external_data=False)
    contents = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}
        contents[tensor.name] = np.memmap(
            folder / where["location"], np.uint8, "r", int(where["offset"]), int(where["length"])
        )
        del tensor.external_data[:]
        tensor.ClearField("data_location")
    external_data_helper.load_external_data_for_model(model, str(folder))  # of nested graphs
    return _Optimised(model, contents)


# --- this machine -------------------------------------------------------------------------------


def _processor() -> tuple[str, str]:
    """The processor's name, and what can be told of its instructions."""
    machine = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        name = platform.processor() or machine
        return name, f"{platform.system()} {machine} {name}"
    told = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    told = {key.strip(): value.strip() for key, value in told.items()}
    flags = set((told.get("flags") or told.get("Features") or "").split())
    known = [each for each in _INSTRUCTIONS if each in flags]
    return told.get("model name", machine), " ".join([platform.system(), machine, *known])
