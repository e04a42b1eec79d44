"""Numbers in a graph at which its behaviour may switch: what lengths and positions meet."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from onnxgen.analysis.graph import ancestors, names

COMPARISONS = names("Less LessOrEqual Greater GreaterOrEqual")
LIMITS = names("Max Min Clip")
OFFSETS = names("Add Sub Div Mod")

FARTHEST = 1 << 20
"""No length is larger: such numbers are fills."""

_DECIDING = COMPARISONS | names("Equal Floor Ceil Round Sign")


def integer(value: ir.Value | None, floats: bool) -> int | None:
    """A constant of one integer; with `floats` a float that is one counts too."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size != 1:
        return None
    if not (tensor.dtype.is_integer() or (floats and tensor.dtype.is_floating_point())):
        return None
    number = float(tensor.numpy().ravel()[0])
    return int(number) if number.is_integer() and abs(number) < 1 << 31 else None


def edges_among(nodes: Iterable[ir.Node]) -> list[int]:
    """The lengths, sorted, that the nodes which compute a mask or a table may switch at.

    Numbers among integers, and those among floats on the way to a decision: what is added to
    scores is no length.
    """
    nodes = list(nodes)
    deciding = [node for node in nodes if node.op_type in _DECIDING or _rounds(node)]
    before = set(ancestors([v for node in deciding for v in node.inputs if v], frozenset()))
    before.update(deciding)
    found: set[int] = set()
    for node in nodes:
        if node.op_type in _DECIDING | LIMITS | OFFSETS | {"Trilu"}:
            numbers = (integer(value, node in before) for value in node.inputs)
            found.update(abs(number) for number in numbers if number is not None)
    return sorted(number for number in found if 2 <= number <= FARTHEST)


def _rounds(node: ir.Node) -> bool:
    """Whether a node makes whole numbers, or bools, of others."""
    to = node.attributes.get("to") if node.op_type == "Cast" else None
    return to is not None and not ir.DataType(to.as_int()).is_floating_point()
