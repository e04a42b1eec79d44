"""Types of the values that regions and nodes share, by whatever means it takes to know them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnxgen.contexts.regions import declared_types
from onnxgen.contexts.types import elements, parsed
from onnxgen.errors import RefusedError
from onnxgen.runtime import Runtime, RuntimeFailure
from onnxgen.verify.opened import expose, opened

Array = npt.NDArray[Any]


def types_of(
    path: Path,
    proto: onnx.ModelProto,
    names: Collection[str],
    runs: Iterator[dict[str, Array]],
    runtime: Runtime,
) -> dict[str, str]:
    """Types, in the words of `contexts.types`: declared, inferred, or else seen in a run.

    Of what is only seen, a size that two runs of different lengths share is believed: whoever runs a
    region checks what it is given, see `onnxgen.session`.

    Args:
        runs: what to feed, of different lengths.

    Raises:
        RefusedError: the model cannot be run, and something is not known otherwise.
    """
    found = {name: kind for name, kind in declared_types(proto).items() if name in names}
    # Compilers choose by the number of dimensions, and by that of the sizes that a value holds: it is
    # worth a run to know them.
    unknown = [name for name in names if _matters(found.get(name, ""))]
    if unknown:
        found |= _seen(path, unknown, runs, runtime)
    return found


def _matters(kind: str) -> bool:
    """Whether a type leaves open what a compiler needs."""
    if not kind:
        return True
    element, dims = parsed(kind)
    return dims is None or (element == onnx.TensorProto.INT64 and dims == [None])


def _seen(
    path: Path, names: list[str], runs: Iterator[dict[str, Array]], runtime: Runtime
) -> dict[str, str]:
    proto, folder = opened(path)
    expose(proto, names)
    found: list[dict[str, str]] = []
    failure = "no run of it is known"
    try:
        session = runtime.load(proto.SerializeToString(), folder=folder)
        for feeds in runs:
            try:
                found.append(_types(runtime.run(session, feeds, names)))
            except RuntimeFailure as error:  # the model does not take such a run
                failure = str(error)
        runtime.unload(session)
    except RuntimeFailure as error:
        failure = str(error)
    if not found:
        raise RefusedError(
            f"{path}: the type of '{names[0]}' is known only by running it: {failure}"
        )
    return {name: _common([each[name] for each in found], alone=len(found) == 1) for name in names}


def _types(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, str]:
    return {
        name: elements(int(ir.DataType.from_numpy(array.dtype)), array.shape)
        for name, array in arrays.items()
    }


def _common(kinds: list[str], *, alone: bool) -> str:
    """What types share; of one alone no size is believed."""
    element, dims = parsed(kinds[0])
    sizes: list[int | str] = ["?" if alone else size or 0 for size in dims or []]
    for kind in kinds[1:]:
        _, others = parsed(kind)
        if others is None or len(others) != len(sizes):
            return str(onnx.TensorProto.DataType.Name(element))
        sizes = [a if a == b else "?" for a, b in zip(sizes, others, strict=True)]
    return elements(element, sizes)
