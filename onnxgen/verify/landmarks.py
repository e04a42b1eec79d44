"""Values that two models both compute, under one name: where they can be compared inside.

What a rewrite leaves as it was, and what it makes anew of equal meaning, keeps its name. Landmarks
are those of them that carry tokens: masks, tables and sizes may be spelled otherwise.

Shapes: B batch, S new tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.feeds import RunShape
from onnxgen.analysis.graph import FLOATS
from onnxgen.analysis.roles import Roles
from onnxgen.analysis.scopes import path_of
from onnxgen.verify.difference import NotANumberError, scaled_difference

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Landmark:
    """One value that both models have.

    Attributes:
        name: its name in both.
        before, after: the value in the original and in the rewritten model.
        rows: its axes of B and S; (0, 0) where they are one axis; None where they are not known.
    """

    name: str
    before: ir.Value
    after: ir.Value
    rows: tuple[int, int] | None

    @property
    def layer(self) -> str:
        """The module that the exporter says it is computed in, "" where it says nothing."""
        node = self.before.producer()
        return (path_of(node) or "") if node is not None else ""

    def difference(self, shape: RunShape, before: Any, after: Any) -> float | None:
        """How far it is apart on the rows of real tokens, as `scaled_difference` measures it.

        Returns:
            None where it cannot be told: another layout or type, rows that are not known, NaN, or
            no tensor but a sequence of them.
        """
        if not (isinstance(before, np.ndarray) and isinstance(after, np.ndarray)):
            return None
        if before.shape != after.shape or before.dtype != after.dtype:
            return None
        if not np.issubdtype(before.dtype, np.floating):
            return None
        if shape.padding != "none":
            if self.rows is None:
                return None
            before, after = (_real(each, self.rows, shape) for each in (before, after))
        try:
            return scaled_difference(before, after)
        except NotANumberError:
            return None


def find_landmarks(original: ir.Model, rewritten: ir.Model, roles: Roles) -> list[Landmark]:
    """The landmarks of two models, in the order in which the original computes them.

    Args:
        roles: the original's.
    """
    facts, other_facts = Facts(original.graph, roles), Facts(rewritten.graph, roles)
    others = {value.name: value for node in rewritten.graph for value in node.outputs}
    found = []
    for value in carrying(original.graph, facts):
        other = others.get(value.name) if value.name else None  # what nobody reads has no name
        if other is None or not {value.dtype, other.dtype} <= {None, *FLOATS}:
            continue  # one that has no type is looked at when it is there
        rows = _rows(facts, value) or _rows(other_facts, other)
        found.append(Landmark(str(value.name), value, other, rows))
    return found


def carrying(graph: ir.Graph, facts: Facts) -> list[ir.Value]:
    """The values that carry tokens, in order: from their embedding on, and caches."""
    found: dict[ir.Value, None] = {}
    for node in graph:
        if node.op_type in ("Shape", "Size"):
            continue
        embeds = embeds_tokens(node, facts)
        if embeds or any(
            v in found or facts.is_activation(v) for v in node.inputs if v is not None
        ):
            found.update(dict.fromkeys(node.outputs))
    return list(found)


def embeds_tokens(node: ir.Node, facts: Facts) -> bool:
    """Whether a node looks rows of a table up by a graph's ids, as they come or in another type."""
    if node.op_type not in ("Gather", "GatherBlockQuantized", "EmbedLayerNormalization"):
        return False
    index = node.inputs[0 if node.op_type.startswith("Embed") else 1]
    while index is not None and (source := index.producer()) is not None:
        if source.op_type not in ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"):
            return False
        index = source.inputs[0]
    return index is not None and facts.role(index) == "ids"


def _rows(facts: Facts, value: ir.Value) -> tuple[int, int] | None:
    """The axes of B and S, by the sizes of the graph's tokens."""
    tokens = [*facts.roles.named("ids"), *facts.roles.named("embeds")]
    given = next((v for v in facts.graph.inputs if tokens and v.name == tokens[0].name), None)
    dims, sizes = facts.shapes.of(value), facts.shapes.of(given)
    if dims is None or sizes is None or len(sizes) != len(tokens[0].axes):
        return None
    if not {"B", "S"} <= set(tokens[0].axes):
        return None
    batch, new = (sizes[tokens[0].axes.index(letter)] for letter in "BS")
    same = facts.shapes.same
    for first, dim in enumerate(dims):
        if same(dim, batch):
            rest = (at for at, each in enumerate(dims) if at != first and same(each, new))
            second = next(rest, None)
            return None if second is None else (first, second)
    return (0, 0) if dims and same(dims[0], batch * new) else None


def _real(values: Array, rows: tuple[int, int], shape: RunShape) -> Array:
    """The rows of real tokens, [N,...]."""
    real = shape.real_new
    if rows[0] == rows[1]:
        return values[real.reshape(-1)] if len(values) == real.size else values[:0]
    moved = np.moveaxis(values, rows, (0, 1))
    return moved[real] if moved.shape[:2] == real.shape else values[:0]


def apart(
    landmarks: Sequence[Landmark],
    shape: RunShape,
    before: Mapping[str, Array],
    after: Mapping[str, Array],
) -> list[tuple[Landmark, float]]:
    """Every landmark that can be compared, and how far it is apart."""
    found = []
    for each in landmarks:
        difference = each.difference(shape, before[each.name], after[each.name])
        if difference is not None:
            found.append((each, difference))
    return found
