"""Types of the values that regions and nodes share, by whatever means it takes to know them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from onnxgen.analysis.feeds import RunShape, make_feeds, nearest_shape
from onnxgen.analysis.roles import Roles
from onnxgen.contexts.regions import declared_types
from onnxgen.contexts.types import elements
from onnxgen.errors import RefusedError
from onnxgen.runtime import Runtime, RuntimeFailure
from onnxgen.verify.opened import expose, opened


def types_of(
    path: Path, proto: onnx.ModelProto, names: Collection[str], roles: Roles, runtime: Runtime
) -> dict[str, str]:
    """Types, in the words of `contexts.types`: declared, inferred, or else seen in a run.

    Of what is only seen in a run the sizes are not believed, but their number is.

    Raises:
        RefusedError: the model cannot be run, and something is not known otherwise.
    """
    found = {name: kind for name, kind in declared_types(proto).items() if name in names}
    unknown = [name for name in names if name not in found]
    if unknown:
        found |= _seen(path, unknown, roles, runtime)
    return found


def _seen(path: Path, names: list[str], roles: Roles, runtime: Runtime) -> Mapping[str, str]:
    shape = nearest_shape(roles, RunShape(2, 5, 7)) or nearest_shape(roles, RunShape(1, 5))
    if shape is None:
        raise RefusedError(f"{path}: the types of {names[0]!r} and others are not known")
    proto, folder = opened(path)
    expose(proto, names)
    try:
        session = runtime.load(proto.SerializeToString(), folder=folder)
        feeds = make_feeds(roles, shape, np.random.default_rng(0))
        arrays = runtime.run(session, feeds, names)
        runtime.unload(session)
    except RuntimeFailure as error:
        raise RefusedError(
            f"{path}: the type of '{names[0]}' is known only by running it: {error}"
        ) from error
    return {
        name: elements(int(ir.DataType.from_numpy(array.dtype)), ["?"] * array.ndim)
        for name, array in arrays.items()
    }
