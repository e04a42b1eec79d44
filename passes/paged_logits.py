"""The rows that a paged model answers with: one for each token, for each sequence, or for those asked.

    hidden [1, N, H] -> Gather of the wanted rows -> the last projection -> logits [rows, V]

The rows are chosen before the last projection, which is the largest of a model.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import names
from onnxgen.analysis.paging import UnpageableError
from onnxgen.analysis.roles import Roles
from onnxgen.report.values import Obstacle

_ROWWISE = names("Add Cast Clip Div Identity Mul Neg Sub Tanh")
_PROJECTIONS = names("MatMul MatMulInteger MatMulNBits QLinearMatMul")


def row_outputs(facts: Facts, roles: Roles) -> tuple[list[ir.Value], list[str]]:
    """The outputs that have a row for each token, the scores first, and those that are dropped.

    Caches aside; what an exporter passes through, or counts, a paged model has not.

    Raises:
        UnpageableError: an output is neither that nor a cache.
    """
    rows: list[ir.Value] = []
    dropped: list[str] = []
    obstacles = []
    tokens = [v for v in facts.graph.inputs if facts.role(v) in ("ids", "embeds")]
    given = facts.shapes.of(tokens[0]) if tokens else None
    for value in facts.graph.outputs:
        role = roles.outputs[value.name or ""].role
        if role == "present":
            continue
        if role == "copy" or not facts.is_activation(value):
            dropped.append(value.name or "")
            continue
        shape = facts.shapes.of(value)
        if (
            shape is None
            or given is None
            or len(shape) != 3
            or not facts.shapes.same(shape[1], given[1])
        ):
            reason = f"output {value.name!r} has no row for each token"
            obstacles.append(Obstacle("PAG009", reason, value.name or ""))
        rows.append(value)
    rows.sort(key=facts.order, reverse=True)  # scores are made of states, and last
    if not rows and not obstacles:
        obstacles.append(Obstacle("PAG009", "no output has a row for each token"))
    if obstacles:
        raise UnpageableError(obstacles)
    return rows, dropped


def last_projection(facts: Facts, y: ir.Value) -> ir.Node | None:
    """The projection whose rows the scores are; None where they are made otherwise."""
    value = y
    for _ in range(16):
        node = value.producer()
        if node is None:
            return None
        weights = [v for v in node.inputs[1:] if v is not None]
        if node.op_type in _PROJECTIONS and not any(map(facts.is_activation, weights)):
            return node
        data = [v for v in node.inputs if v is not None and facts.is_activation(v)]
        if node.op_type not in _ROWWISE or len(data) != 1:
            return None
        (value,) = data
    return None
