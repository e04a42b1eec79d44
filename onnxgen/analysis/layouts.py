"""Where batch, heads, rows and columns are in scores that are viewed between two products.

    [B*H, S, T] --Reshape--> [B, H, S, T] --Softmax--> --Reshape--> [B*H, S, T] @ v

Each tensor on the way is the same scores with its axes cut and merged differently. Written as
digits (`analysis.views`) of the queries' axes, and one of its own for the columns, all of them
can be compared, and a mask that is added to any of them can be brought to [B, H, S, T].
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.symbols import Dim, divide
from onnxgen.analysis.views import VIEW_OPS, Axis, Digit

# The axis that columns are digits of: the keys' rows, which no axis of the queries is.
COLUMNS = -1


def layouts(
    facts: Facts, contraction: ir.Node, steps: Iterable[ir.Value]
) -> dict[ir.Value, tuple[Axis, ...]] | str:
    """The axes of the contraction's output and of each value on the way down from it.

    Args:
        steps: what the scores become, nearest to the contraction first.

    Returns:
        The axes of each value; the reason as text where they cannot be told.
    """
    queries, scores = contraction.inputs[0], contraction.outputs[0]
    assert queries is not None  # a MatMul has both operands
    view, shape = facts.views.of(queries), facts.shapes.of(scores)
    if view is None or shape is None or len(view.axes) != len(shape):
        return "the queries' axes are not known"
    if _broadcast(facts, scores, (*view.axes[:-1], (Digit(COLUMNS, 1, 0),))):
        return "the keys have batches or heads that the queries have not"
    columns: Axis = () if shape[-1] == 1 else (Digit(COLUMNS, 1, facts.shapes.resolve(shape[-1])),)
    axes: tuple[Axis, ...] = (*view.axes[:-1], columns)
    found = {scores: axes}
    for output in steps:
        node = output.producer()
        assert node is not None
        if node.op_type in VIEW_OPS:
            viewed = facts.views.through(node, axes)
            if viewed is None:
                return "the scores are viewed in a way that is not known"
            axes = viewed
        elif _broadcast(facts, output, axes):
            return "a mask repeats the scores for more batches or heads"
        found[output] = axes
    return found


def _broadcast(facts: Facts, value: ir.Value, axes: tuple[Axis, ...]) -> bool:
    """Whether a value is longer than its axes say, in an axis of size 1 or one before the first."""
    shape = facts.shapes.of(value)
    if shape is None or len(shape) != len(axes):
        return True
    return any(not axis and size != 1 for axis, size in zip(axes, shape, strict=True))


def parts_of(digit: Digit, digits: Iterable[Digit]) -> tuple[Digit, ...] | None:
    """The digits that together, outermost first, are this one; None if they are not there.

    Digits of a layout are the same numbers cut finer or coarser: `h` may be met as `k g`.
    """
    candidates = [each for each in digits if each.axis == digit.axis]
    found: list[Digit] = []
    missing: Dim = digit.size
    stride = digit.stride
    while missing != 1:
        inner = next((each for each in candidates if each.stride == stride), None)
        if inner is None:
            return None
        rest = divide(missing, inner.size)
        if rest is None:
            return None
        found.insert(0, inner)
        missing, stride = rest, stride * inner.size
    return tuple(found)
