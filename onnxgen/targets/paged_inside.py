"""What com.microsoft::PagedAttention does itself of a query's and a key's way into attention.

    x -> RMSNormalization over each head? -> RotaryEmbedding? -> rows [N, heads * D]
    ->
    x, q_norm_weight?, k_norm_weight?, cos_cache?, sin_cache?

The rotary embedding goes inside where its tables are a function of the position alone
(`paged_tables`), the norm right before it with it. What does not stays outside: always right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.graph import attribute, constant, given, producer
from onnxgen.analysis.shapes import Shapes
from onnxgen.functions import paged_plan
from onnxgen.patterns.building import Builder
from onnxgen.runtime import Runtime
from onnxgen.targets.paged_schema import WIDTH, LiveSchema
from onnxgen.targets.paged_tables import RotaryRows, rotary_rows


@dataclass(frozen=True)
class Inside:
    """What of a query's and a key's way into attention the operator does itself.

    Attributes:
        query, key: what is left to feed.
        inputs, attributes: what says it.
        said: for the report.
        limit: most tokens of a sequence, None where nothing limits them.
    """

    query: ir.Value
    key: ir.Value
    inputs: Mapping[str, ir.Value]
    attributes: Mapping[str, int | float]
    said: Mapping[str, str]
    limit: int | None = None


class Insides:
    """Finds it for each attention of a paged model; remembers the tables that it has run."""

    def __init__(
        self,
        builder: Builder,
        shapes: Shapes,
        graph: ir.Graph,
        tokens: ir.Value,
        runtime: Runtime,
        length: int,
        schema: LiveSchema,
    ) -> None:
        """Prepare.

        Args:
            tokens: the graph's input of them.
            length: positions that rotary tables hold, at most.
        """
        self._builder = builder
        self._shapes = shapes
        self._graph = graph
        self._tokens = tokens
        self._runtime = runtime
        self._length = length
        self._schema = schema
        self._rows: dict[tuple[ir.Value | None, ...], RotaryRows | str] = {}

    def of(
        self, node: ir.Node, query: ir.Value, key: ir.Value, size: int, dtype: ir.DataType
    ) -> Inside:
        """As much of what is before an attention as the operator does.

        Args:
            node: an onnxgen::PagedAttention.
            query, key: what it is fed, [N, heads * D].
            size, dtype: D, and the type of the pools.
        """
        rotaries = [_turned(each) for each in (query, key)]
        rotary: tuple[RotaryRows, ir.Node] | None = None
        said, limit = "none", None
        if rotaries[0] is not None or rotaries[1] is not None:
            found = self._rotary(rotaries, size, dtype)
            if isinstance(found, str):
                return Inside(query, key, {}, {}, {"rotary": f"outside, since {found}"})
            rotary, said = found, "inside"
        operands = [query, key]
        inputs: dict[str, ir.Value] = {}
        attributes: dict[str, int | float] = {}
        if rotary is not None:
            operands = [given(each) for each in rotaries if each is not None]
            for name, table in (("cos_cache", rotary[0].cos), ("sin_cache", rotary[0].sin)):
                inputs[name] = self._builder.constant(table, f"onnxgen/{name}")
            attributes["do_rotary"] = 1
            attributes["rotary_interleaved"] = int(attribute(rotary[1], "interleaved", 0))
            limit = len(rotary[0].cos)
        details = {"rotary": said}
        heads = [int(attribute(node, name)) for name in ("num_heads", "kv_num_heads")]
        norms = [self._norm(x, h, size) for x, h in zip(operands, heads, strict=True)]
        names = {"q_norm_weight", "k_norm_weight", "qk_norm_epsilon"}
        if norms[0] is not None and norms[1] is not None:
            epsilons = [attribute(each, "epsilon", 1e-5) for each in norms if each is not None]
            if epsilons[0] == epsilons[1] and names <= {
                *self._schema.inputs,
                *self._schema.attributes,
            }:
                operands = [given(each) for each in norms if each is not None]
                inputs["q_norm_weight"] = given(norms[0], 1)
                inputs["k_norm_weight"] = given(norms[1], 1)
                attributes["qk_norm_epsilon"] = epsilons[0]
                details["norms"] = "inside"
        if operands != [query, key]:
            operands = [
                self._builder.op("Reshape", [x, self._builder.ints(-1, h * size)])
                for x, h in zip(operands, heads, strict=True)
            ]
        return Inside(operands[0], operands[1], inputs, attributes, details, limit)

    def _rotary(
        self, rotaries: list[ir.Node | None], size: int, dtype: ir.DataType
    ) -> tuple[RotaryRows, ir.Node] | str:
        """What queries and keys are both rotated by; the reason where it stays outside."""
        first, second = rotaries
        if first is None or second is None:
            return "queries and keys are not both rotated"
        wanted = {"cos_cache", "sin_cache", "do_rotary", "rotary_interleaved"}
        if not wanted <= {*self._schema.inputs, *self._schema.attributes}:
            return f"the operator of ONNX Runtime {self._schema.version} has none inside"
        if dtype == ir.DataType.BFLOAT16:
            # Tables would be rounded where a float32 twin's are not: no proof.
            return "its tables would be rounded to bfloat16"
        if attribute(first, "interleaved", 0) != attribute(second, "interleaved", 0):
            return "queries and keys are rotated differently"
        found = [self._read(each) for each in (first, second)]
        for each in found:
            if isinstance(each, str):
                return each
        a, b = found
        assert isinstance(a, RotaryRows)
        assert isinstance(b, RotaryRows)
        if not (np.array_equal(a.cos, b.cos) and np.array_equal(a.sin, b.sin)):
            return "queries and keys are rotated differently"
        columns = a.cos.shape[-1]
        if columns % WIDTH or 2 * columns > size:
            return f"{2 * columns} columns of a head are rotated, no multiple of {2 * WIDTH}"
        return a, first

    def _read(self, rotary: ir.Node) -> RotaryRows | str:
        key = tuple(rotary.inputs[1:])
        if key not in self._rows:
            plan = [n for n in self._graph if n.op_type == paged_plan.TOKENS]
            positions = plan[0].outputs[0] if plan else None
            self._rows[key] = (
                "there are no positions"
                if positions is None
                else rotary_rows(
                    self._graph, rotary, positions, self._tokens, self._runtime, self._length
                )
            )
        return self._rows[key]

    def _norm(self, value: ir.Value, heads: int, size: int) -> ir.Node | None:
        """The RMSNormalization over each head that makes rows [.., heads * size]."""
        node = producer(value, "Reshape")
        node = None if node is None else producer(node.inputs[0], "RMSNormalization")
        if node is None:
            return None
        shape, weight = self._shapes.of(node.inputs[0]), constant(given(node, 1))
        fits = shape is not None and len(shape) > 2 and shape[-2:] == (heads, size)
        last = attribute(node, "axis", -1) in (-1, len(shape or ()) - 1)
        wide = attribute(node, "stash_type", 1) == int(ir.DataType.FLOAT)
        return (
            node
            if fits and last and wide and weight is not None and weight.shape == (size,)
            else None
        )


def _turned(rows: ir.Value) -> ir.Node | None:
    """The RotaryEmbedding that makes rows [N, heads * D]."""
    node = producer(rows, "Reshape")
    return None if node is None else producer(node.inputs[0], "RotaryEmbedding")
