"""Types of the values that regions and nodes share, by whatever means it takes to know them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnxgen.analysis.feeds import RunShape, make_feeds, nearest_shape
from onnxgen.analysis.roles import Roles
from onnxgen.contexts.regions import declared_types
from onnxgen.contexts.types import elements, parsed
from onnxgen.errors import RefusedError
from onnxgen.runtime import Runtime, RuntimeFailure
from onnxgen.verify.opened import expose, opened

_LENGTHS = (RunShape(2, 5, 7), RunShape(3, 4, 9), RunShape(1, 6))


def types_of(
    path: Path, proto: onnx.ModelProto, names: Collection[str], roles: Roles, runtime: Runtime
) -> dict[str, str]:
    """Types, in the words of `contexts.types`: declared, inferred, or else seen in a run.

    Of what is only seen, a size that two runs of different lengths share is believed: whoever runs a
    region checks what it is given, see `onnxgen.session`.

    Raises:
        RefusedError: the model cannot be run, and something is not known otherwise.
    """
    found = {name: kind for name, kind in declared_types(proto).items() if name in names}
    # Compilers choose by the number of dimensions, and by that of the sizes that a value holds: it is
    # worth a run to know them.
    unknown = [name for name in names if _matters(found.get(name, ""))]
    if unknown:
        found |= _seen(path, unknown, roles, runtime)
    return found


def _matters(kind: str) -> bool:
    """Whether a type leaves open what a compiler needs."""
    if not kind:
        return True
    element, dims = parsed(kind)
    return dims is None or (element == onnx.TensorProto.INT64 and dims == [None])


def _seen(path: Path, names: list[str], roles: Roles, runtime: Runtime) -> dict[str, str]:
    proto, folder = opened(path)
    expose(proto, names)
    shapes = dict.fromkeys(nearest_shape(roles, shape) for shape in _LENGTHS)
    found: list[dict[str, str]] = []
    try:
        session = runtime.load(proto.SerializeToString(), folder=folder)
        for shape in filter(None, shapes):
            feeds = make_feeds(roles, shape, np.random.default_rng(0))
            found.append(_types(runtime.run(session, feeds, names)))
        runtime.unload(session)
    except RuntimeFailure as error:
        raise RefusedError(
            f"{path}: the type of '{names[0]}' is known only by running it: {error}"
        ) from error
    if not found:
        raise RefusedError(f"{path}: the type of '{names[0]}' is known only by running it")
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
