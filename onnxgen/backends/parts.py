"""What the backends of this package ask of a part before they compile it."""

from __future__ import annotations

import re
from collections.abc import Iterable

import onnx
import onnx.inliner

from onnxgen.backends.interface import BackendError, Part

SMALL = 1024  # bytes: integers below it are constants inside of a blob, where a compiler sees them
LARGEST_INSIDE = (1 << 31) - (1 << 24)  # bytes of weights in one proto; what is left is for nodes

_WHERE = re.compile(
    r"Exception from \S+:\d+:|Check '.*?' failed at \S+:\d+:|^\S+\.cc:\d+ .*?(?=\[ONNX)"
    r"|\[ONNXRuntimeError\] : \d+ : \w+ :"
)
_FLOATING = frozenset(
    number
    for number in onnx.TensorProto.DataType.values()
    if onnx.TensorProto.DataType.Name(number).startswith(("FLOAT", "DOUBLE", "BFLOAT"))
)


def large(part: Part) -> tuple[int, ...]:
    """Positions of the weights that are to be given to a blob rather than be inside of it.

    Floating point weights of any length are, a layer's norms and biases: what is inside keeps layers
    that are alike from sharing a blob. Single numbers and small integers are what shapes and
    attributes follow from.
    """
    return tuple(
        i
        for i, weight in enumerate(part.weights)
        if weight.data.nbytes >= SMALL
        or (is_floating(weight.dtype) and weight.shape and max(weight.shape) > 1)
    )


def is_floating(dtype: int) -> bool:
    """Whether a type is one of floating point numbers, of any width."""
    return dtype in _FLOATING


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


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without functions of its own, and with the types of its values."""
    return onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model))


def expanded(model: onnx.ModelProto, operators: Iterable[str] | None = None) -> onnx.ModelProto:
    """With standard operators replaced by the bodies that the standard gives them.

    Args:
        model: has no functions, and knows the types of its values; see `inlined`.
        operators: which, by their names; None: all that have a body.

    Raises:
        BackendError: a body needs a type that is not known.
    """
    try:
        return onnx.inliner.inline_selected_functions(
            model,
            [("", name) for name in operators or ()],
            exclude=operators is None,
            inline_schema_functions=True,
        )
    except RuntimeError as error:
        raise BackendError(f"its operators cannot be expanded: {clause(error)}") from error


def clause(error: BaseException) -> str:
    """What a runtime said, as the end of a sentence: without where in its source it said so."""
    text = _WHERE.sub(" ", " ".join(str(error).split()))
    return " ".join(text.split())[:400].rstrip(" .") or type(error).__name__
