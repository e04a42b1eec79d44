"""Models whose operators may compute coarsely, as twins that compute in full precision.

MatMulNBits and QMoE let a runtime round activations to int8 (accuracy_level 4) or to half precision
(2 and 3). Such a rounding makes a step of 1e-2 out of a difference of 1e-7, in one model or in the
other, so that two equal models differ from run to run. Compared are twins without that leave:
the same graphs, weights and all, at the precision of their inputs. What is written keeps it.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from onnxgen.analysis.graph import CONTRIB, attribute

NOTE = "quantised weights are multiplied in full precision here, without leave to round activations"
_ROUNDING = ("MatMulNBits", "QMoE")
_ATTRIBUTE = "accuracy_level"
_FULL = (0, 1)  # unset, float32


def rounds_activations(model: ir.Model) -> bool:
    """Whether an operator may round what it is given."""
    return any(
        node.op_type in _ROUNDING
        and node.domain == CONTRIB
        and attribute(node, _ATTRIBUTE, 0) not in _FULL
        for node in model.graph.all_nodes()
    )


def without_leave(proto: onnx.ModelProto) -> None:
    """Take from a model, in place, the leave to round."""
    _visit(proto.graph)
    for function in proto.functions:
        for node in function.node:
            _strip(node)


def _visit(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        _strip(node)
        for each in node.attribute:
            for inner in (each.g, *each.graphs):
                _visit(inner)


def _strip(node: onnx.NodeProto) -> None:
    if node.op_type in _ROUNDING:
        kept = [each for each in node.attribute if each.name != _ATTRIBUTE]
        del node.attribute[:]
        node.attribute.extend(kept)
