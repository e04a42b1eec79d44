"""What a value follows from: which graph inputs by what they hold, not by their sizes alone.

Reading a value by running it shows what it is for the inputs that were fed. What an input may hold
beside those is not seen, so whoever concludes something has to ask here first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from onnxgen.analysis.graph import has_subgraph, read_by

# Operands whose numbers are the size of the result; the others count by their own sizes.
SIZES: dict[str, tuple[int, ...]] = {
    "CenterCropPad": (1,),
    "Compress": (1,),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "GroupQueryAttention": (6,),
    "NonZero": (0,),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unique": (0,),
}


@dataclass(frozen=True)
class Reads:
    """What a value is computed from.

    Attributes:
        inputs: graph inputs that are read by what they hold.
        nodes: what computes it, without what only sizes are read of.
    """

    inputs: dict[ir.Value, None] = field(default_factory=dict)
    nodes: dict[ir.Node, None] = field(default_factory=dict)


def reads_of(value: ir.Value) -> Reads:
    """Follow a value back to the inputs; what is read for its size is followed for its size."""
    found = Reads()
    pending, seen = [(value, True)], set()
    while pending:
        each, held = pending.pop()
        if (each, held) in seen:
            continue
        seen.add((each, held))
        node = each.producer()
        if node is None:
            if held and each.is_graph_input():
                found.inputs[each] = None
        elif held and node.op_type in ("Shape", "Size"):
            found.nodes[node] = None
            pending.extend((source, False) for source in read_by(node))
        elif held or has_subgraph(node):
            found.nodes[node] = None
            pending.extend((source, True) for source in read_by(node))
        else:
            sizes = SIZES.get(node.op_type, ())
            sources = [(v, i in sizes) for i, v in enumerate(node.inputs) if v is not None]
            pending.extend(sources)
    return found
