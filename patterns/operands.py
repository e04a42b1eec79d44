"""An Attention's operands and output with the heads in the columns, as many operators take them.

[B, H, S, D] and [B, S, H * D] hold the same numbers; what an exporter wrote on the way from one to
the other is followed, so that nothing is turned around twice.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute, given, producer
from onnxgen.analysis.views import Axis, canonical
from onnxgen.patterns.arranging import arranged
from onnxgen.patterns.building import Builder


def rows_first(
    facts: Facts, builder: Builder, value: ir.Value, heads: int, *, turned: bool
) -> tuple[ir.Value, float] | None:
    """A [B, heads, S, D] operand as [B, S, heads * D], and the factor that is left to apply.

    Args:
        turned: whether a RotaryEmbedding that made the operand is applied, or left out.

    Returns:
        None where the operand cannot be rearranged.
    """
    rotary = producer(value, "RotaryEmbedding")
    found = _rows_first(facts, builder, value if rotary is None else given(rotary))
    if found is None or rotary is None or not turned:
        return found
    attributes = {name: each.value for name, each in rotary.attributes.items()}
    attributes["num_heads"] = heads
    return builder.op("RotaryEmbedding", [found[0], *rotary.inputs[1:]], attributes), found[1]


def _rows_first(facts: Facts, builder: Builder, value: ir.Value) -> tuple[ir.Value, float] | None:
    view = facts.views.of(value)
    if view is None or len(view.axes) != 4:
        return None
    batch, heads, rows, columns = view.axes
    axes: tuple[Axis, ...] = (batch, rows, canonical((*heads, *columns)))
    found = arranged(facts, builder, value, axes)
    return None if found is None else (found[0], view.scale / found[1])


def merged_heads(facts: Facts, y: ir.Value) -> ir.Value | None:
    """The value behind a [B, H, S, D] output that is it as [B, S, H * D], if all read that."""
    whole = facts.views.identity(y)
    if whole is None:
        return None
    batch, heads, rows, columns = whole.axes
    wanted = (batch, rows, canonical((*heads, *columns)))
    value = y
    while True:
        users = {use.node for use in value.uses()}
        if len(users) != 1 or value.is_graph_output():
            return None
        (user,) = users
        if not user.outputs or user.inputs[0] is not value:
            return None
        value = user.outputs[0]
        view = facts.views.of(value)
        if view is None or view.source is not y or view.scale != 1.0:
            return None
        if view.axes == wanted:
            return value


def scale_of(facts: Facts, node: ir.Node, q: ir.Value) -> float:
    """What the scores are multiplied by: the attribute, else 1 / sqrt(D)."""
    shape = facts.shapes.of(q)
    assert shape is not None
    size = shape[-1]
    assert isinstance(size, int)
    return float(attribute(node, "scale", size**-0.5))
