"""Numbers in a graph at which its behaviour may switch: what lengths and positions meet."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from onnxgen.analysis.graph import ancestors, names
from onnxgen.analysis.roles import Roles

COMPARISONS = names("Less LessOrEqual Greater GreaterOrEqual")
LIMITS = names("Max Min Clip")
OFFSETS = names("Add Sub Div Mod")

FARTHEST = 1 << 20
"""No length is larger: such numbers are fills."""

LONGEST = 8192
"""No run is longer than this: an edge beyond it is noted, not run."""

_MOST_FOUND = 6
# Through these a length or a position is followed back to the constants that it meets.
_PASSED = names(
    """
    Abs Cast Concat Expand Floor Identity Mul Neg Range ReduceMax ReduceMin Reshape Squeeze
    Transpose Unsqueeze Where
    """
)
_WINDOWS = ("local_window_size", "left_window_size")
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


def find_edges(model: ir.Model, roles: Roles) -> tuple[list[int], list[int]]:
    """Total lengths at which the graph's own arithmetic may switch: to run, and to note only.

    They are the constants that lengths and positions are compared with, limited to or shifted
    by before a comparison, window attributes of fused attentions, and the lengths of cropped
    caches. At most the six smallest are to be run.
    """
    found = {pair.cap + 1 for pair in roles.pairs if pair.cap is not None}
    seen: set[ir.Value] = set()
    stack: list[ir.Value] = []
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for node in (node for graph in graphs for node in graph.all_nodes()):
        for name in _WINDOWS:
            attribute = node.attributes.get(name)
            if attribute is not None and attribute.type == ir.AttributeType.INT:
                found.add(attribute.as_int())
        if node.op_type in COMPARISONS | LIMITS:
            floats = node.op_type in COMPARISONS
            found.update(number for v in node.inputs if (number := integer(v, floats)) is not None)
        if node.op_type in COMPARISONS:
            stack.extend(value for value in node.inputs if value is not None)
    while stack:
        value = stack.pop()
        source = value.producer()
        if value in seen or source is None or len(seen) > 10_000:
            continue
        seen.add(value)
        if source.op_type in OFFSETS:
            found.update(n for v in source.inputs if (n := integer(v, False)) is not None)
        if source.op_type in OFFSETS | _PASSED | LIMITS:
            stack.extend(each for each in source.inputs if each is not None)
    lengths = sorted(abs(number) for number in found if abs(number) >= 2)
    near = [length for length in dict.fromkeys(lengths) if length <= LONGEST]
    far = [length for length in dict.fromkeys(lengths) if LONGEST < length <= FARTHEST]
    return near[:_MOST_FOUND], near[_MOST_FOUND:] + far
