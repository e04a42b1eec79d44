"""What tokens that are run together learn of one another by other means than attention.

    mixes_tokens(facts, node)               e.g. Conv over states, ReduceMean along the tokens
    lengths_as_numbers(outputs, lengths)    e.g. scores divided by the length of the keys

A model that does either cannot be paged: each sequence would see what runs beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.edges import COMPARISONS
from onnxgen.analysis.evaluate import sorted_nodes
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import FLOATS, ancestors, attribute, constant, names
from onnxgen.analysis.reads import SIZES, reads_of
from onnxgen.functions import DOMAIN
from onnxgen.report.values import Obstacle

# Recurrent, convolved, pooled.
_COUPLING = names(
    """
    AveragePool CausalConvWithState Conv ConvInteger ConvTranspose GRU GlobalAveragePool If LSTM
    LinearAttention Loop MaxPool QLinearConv RNN Scan
    """
)
# One of these along tokens makes the value of one depend on the others.
JOINING = names(
    """
    ArgMax ArgMin CumSum LogSoftmax ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
    ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Softmax TopK
    """
)
_STILL_LENGTHS = names(
    """
    Add Cast Concat Div Gather Identity Max Min Mod Mul Neg Reshape ScatterND Slice Squeeze Sub
    Unsqueeze
    """
)


def mixes_tokens(facts: Facts, node: ir.Node) -> bool:
    """Whether a node computes a token's states from those of others."""
    if node.op_type in _COUPLING and any(map(facts.is_activation, node.outputs)):
        return True
    return _along_tokens(facts, node)


def _along_tokens(facts: Facts, node: ir.Node) -> bool:
    """Whether states are summed up, or chosen from, along the axis of the tokens.

    Whole numbers may be: how tokens are sent to experts is counted so.
    """
    value = node.inputs[0] if node.inputs else None
    tokens = [v for v in facts.graph.inputs if facts.role(v) in ("ids", "embeds")]
    if node.op_type not in JOINING or value is None or not tokens or value.dtype not in FLOATS:
        return False
    shape, rows = facts.shapes.of(value), facts.shapes.of(tokens[0])
    if shape is None or rows is None or len(rows) < 2:
        return False
    given = node.inputs[1] if len(node.inputs) > 1 and node.op_type != "TopK" else None
    axes = constant(given) if given is not None else attribute(node, "axes")
    if axes is None:
        default = 0 if node.op_type in ("ArgMax", "ArgMin") else -1
        every = node.op_type.startswith("Reduce") and "axis" not in node.attributes
        axes = range(len(shape)) if every else [attribute(node, "axis", default)]
    along = any(facts.shapes.same(shape[int(axis)], rows[1]) for axis in np.ravel(list(axes)))
    return along and tokens[0] in reads_of(value).inputs


def lengths_as_numbers(outputs: Sequence[ir.Value], lengths: Sequence[ir.Value]) -> list[Obstacle]:
    """Where a length is more than a size: a number that others are scaled by, or compared with.

    Among packed tokens there is no one length: sizes may be as large as the longest sequence asks
    for, numbers may not. What counts up to a length tells the tokens of the run apart, and may do no
    more.

    Args:
        outputs: of the paged graph.
        lengths: what stands for lengths in it; the results of Shape and Size do too.
    """
    nodes = list(ancestors(outputs, frozenset()))
    numbers, places = set(lengths), set[ir.Value]()
    obstacles = []
    for node in sorted_nodes(nodes):
        if node.op_type in ("Shape", "Size"):
            numbers.update(node.outputs)
            continue
        if node.op_type == "Range" and any(value in numbers for value in node.inputs):
            places.update(node.outputs)
            continue
        if any(value in places for value in node.inputs):
            if _takes_place(node, places):
                reason = f"{node.op_type} takes a place in the run for one in its sequence"
                obstacles.append(Obstacle("PAG008", reason, node.name or ""))
            elif node.op_type in _STILL_LENGTHS:
                places.update(node.outputs)
            continue
        sizes = SIZES.get(node.op_type, ())
        used = [i for i, v in enumerate(node.inputs) if v in numbers and i not in sizes]
        if not used or node.domain == DOMAIN:
            continue
        if node.op_type in _STILL_LENGTHS and not _is_real(node):
            numbers.update(node.outputs)
        else:
            reason = f"{node.op_type} takes a length for more than a size"
            obstacles.append(Obstacle("PAG008", reason, node.name or ""))
    return obstacles


def _takes_place(node: ir.Node, places: set[ir.Value]) -> bool:
    """Whether what counts the tokens of a run is more than the index of a token's own row: a
    number, something compared with another, or a row of a table of the model's.
    """
    if node.op_type in ("Gather", "GatherND", "GatherElements"):
        table = node.inputs[0]
        constant_table = table is not None and table.const_value is not None
        return constant_table and node.inputs[1] in places
    return node.op_type in COMPARISONS or (node.op_type == "Cast" and _is_real(node))


def _is_real(node: ir.Node) -> bool:
    """Whether a node makes real numbers."""
    dtype = node.outputs[0].dtype
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int()).is_floating_point()
    return dtype is not None and dtype.is_floating_point()
