"""What the backends of this package ask of a part before they compile it."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from onnxgen.backends.interface import BackendError, Part

SMALL = 1024  # bytes: weights below it are constants inside of a blob, where a compiler sees them
LARGEST_INSIDE = (1 << 31) - (1 << 24)  # bytes of weights in one proto; what is left is for nodes

_FLOATING = frozenset(
    number
    for number in onnx.TensorProto.DataType.values()
    if onnx.TensorProto.DataType.Name(number).startswith(("FLOAT", "DOUBLE", "BFLOAT"))
)


def large(part: Part) -> tuple[int, ...]:
    """Positions of the weights that are to be given to a blob rather than be inside of it."""
    return tuple(i for i, weight in enumerate(part.weights) if weight.data.nbytes >= SMALL)


def floating(part: Part, positions: Iterable[int]) -> tuple[int, ...]:
    """Those of the positions whose weights are floating point numbers: no shape follows from them."""
    return tuple(i for i in positions if part.weights[i].dtype in _FLOATING)


def with_inside(part: Part, positions: Iterable[int]) -> onnx.ModelProto:
    """`Part.with_inside`, held to what a proto can hold.

    Raises:
        BackendError: the weights at these positions come to more than that.
    """
    positions = tuple(positions)
    size = sum(part.weights[i].data.nbytes for i in positions)
    if size > LARGEST_INSIDE:
        raise BackendError(f"{size} bytes of weights would be inside, more than one proto holds")
    return part.with_inside(positions)


def clause(error: BaseException) -> str:
    """What a runtime said, as the end of a sentence: its lines in one, without what it repeats."""
    lines = [line.strip() for line in str(error).splitlines()]
    text = " ".join(dict.fromkeys(line for line in lines if line))
    return text[:400] or type(error).__name__
