"""The flavor `ort`: onnxgen::PagedAttention becomes com.microsoft::PagedAttention.

    x -> RMSNormalization? -> RotaryEmbedding? -> onnxgen::PagedAttention
    ->
    x -> com.microsoft::PagedAttention(query, key, value, key_cache, value_cache,
             cumulative_sequence_length, past_seqlens, block_table, cos_cache?, sin_cache?,
             slot_mapping?, head_sink?, q_norm_weight?, k_norm_weight?)

What the operator works out itself is left to it: which slots are read and written, which keys a
token sees, positions, and rotary embeddings and norms where it can (`paged_inside`). Everything
else stays outside, which is always right, and the report says why.

The operator takes float16 and bfloat16: a float32 model has casts around it. Its inputs move from
release to release, so they are placed by name as the schema of the installed ONNX Runtime has
them; what that schema lacks is refused, or stays outside.

Refused (PAG011): head sizes that are no multiple of 8, values of another size than keys, masks
with slopes or chunks, layers that read another's pools, blocks of less than 16 slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxgen import functions
from onnxgen.analysis.graph import attribute, constant, given, optional
from onnxgen.analysis.paging import UnpageableError
from onnxgen.analysis.shapes import Shapes
from onnxgen.functions import paged_attention, paged_plan
from onnxgen.patterns.building import Builder
from onnxgen.report.values import Obstacle, Site
from onnxgen.runtime import Runtime
from onnxgen.targets.paged import PagedModel
from onnxgen.targets.paged_inside import Insides
from onnxgen.targets.paged_schema import DOMAIN, NAME, WIDTH, LiveSchema, live_schema

CODE = "PAG011"
SMALLEST_BLOCK = 16
LONGEST = 32768
"""Positions that rotary tables hold where nothing says how long a sequence may be."""

TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
INT32 = int(ir.DataType.INT32)


def lower_paged(
    result: PagedModel, runtime: Runtime, length: int = 0, schema: LiveSchema | None = None
) -> tuple[PagedModel, list[Site]]:
    """Lower every attention of a paged model, in place; what nobody reads any more is left in it.

    Args:
        length: positions that rotary tables hold (T, past and new); 0 for what the model's own
            hold, at most `LONGEST`.
        schema: what to write for; the installed ONNX Runtime's unless given.

    Returns:
        The model with what it is limited to, and a site for each attention.

    Raises:
        UnpageableError: the operator cannot say what an attention does; carries every obstacle.
    """
    schema = schema or live_schema()
    if schema is None:
        reason = f"the installed ONNX Runtime has no {DOMAIN}::{NAME}"
        raise UnpageableError([Obstacle(CODE, reason)])
    lowering = _Lowering(result, runtime, length or LONGEST, schema)
    graph = result.model.graph
    nodes = [n for n in graph if n.domain == functions.DOMAIN and n.op_type == NAME]
    obstacles = lowering.obstacles(nodes)
    if obstacles:
        raise UnpageableError(obstacles)
    sites = [lowering.lower(node) for node in nodes]
    graph.opset_imports[DOMAIN] = 1
    return replace(result, max_length=lowering.limit), sites


class _Lowering:
    """Lowers one model's attentions.

    Attributes:
        limit: most tokens of a sequence, None where nothing limits them.
    """

    def __init__(
        self, result: PagedModel, runtime: Runtime, length: int, schema: LiveSchema
    ) -> None:
        self._graph = result.model.graph
        self._options = result.options
        self._schema = schema
        shapes = Shapes(self._graph)
        self._builder = Builder(self._graph, shapes)
        tokens = next(v for v in self._graph.inputs if v.name == result.tokens)
        self._insides = Insides(self._builder, shapes, self._graph, tokens, runtime, length, schema)
        self._past: dict[tuple[ir.Value, int], ir.Value] = {}
        self.limit: int | None = None

    def obstacles(self, nodes: list[ir.Node]) -> list[Obstacle]:
        """Whatever the operator cannot say of these attentions."""
        found = []
        if self._options.block_size < SMALLEST_BLOCK:
            reason = (
                f"blocks have {self._options.block_size} slots, and {DOMAIN}::{NAME} takes "
                f"{SMALLEST_BLOCK} or more"
            )
            found.append(Obstacle(CODE, reason))
        for node in nodes:
            found += [Obstacle(CODE, why, node.name or "") for why in self._against(node)]
        return found

    def _against(self, node: ir.Node) -> list[str]:
        """Why an attention cannot be lowered, a sentence each."""
        reasons = []
        if "gathered" in node.overload.split("_"):
            what = "its keys are computed from what is kept (MLA)"
            return [f"{what}, and {DOMAIN}::{NAME} reads keys from its pools"]
        if "shared" in node.overload.split("_"):
            reasons.append(f"it reads another layer's pools, and {DOMAIN}::{NAME} writes its own")
        sizes = [self._pool(node, i)[-1] for i in (0, 1)]
        if sizes[0] != sizes[1]:
            reasons.append(f"keys have {sizes[0]} and values {sizes[1]} columns a head")
        elif sizes[0] % WIDTH:
            reasons.append(f"a head has {sizes[0]} columns, which is no multiple of {WIDTH}")
        for part, words in (("slopes", "added by distance (ALiBi)"), ("chunk", "of chunks")):
            if part in _keys_of(node).overload.split("_"):
                reasons.append(f"its mask is {words}, which {DOMAIN}::{NAME} cannot say")
        if attribute(node, "scale", 1.0) == 0.0:
            reasons.append(f"its scores are scaled by 0, which {DOMAIN}::{NAME} takes for unset")
        pool = node.inputs[paged_attention.KEY_CACHE]
        if pool is None or pool.dtype not in TYPES:
            kind = "of no known type" if pool is None or pool.dtype is None else pool.dtype.name
            reasons.append(f"its pools are {kind}, and {DOMAIN}::{NAME} takes float16 and bfloat16")
        inputs, attributes = self._plain(node)
        lacking = sorted(set(inputs) - set(self._schema.inputs))
        lacking += sorted(set(attributes) - self._schema.attributes)
        lacking += sorted(self._schema.required - set(inputs))
        if lacking:
            listed = ", ".join(map(repr, lacking))
            reasons.append(
                f"the {DOMAIN}::{NAME} of ONNX Runtime {self._schema.version} differs in {listed}"
            )
        return reasons

    def _pool(self, node: ir.Node, index: int) -> tuple[int, int]:
        """(heads, columns of a head) of the keys' pool (0) or the values' (1)."""
        value = given(node, paged_attention.KEY_CACHE + index)
        assert value.shape is not None
        heads, size = value.shape[2], value.shape[3]
        assert isinstance(heads, int)
        assert isinstance(size, int)
        return heads, size

    def _plain(self, node: ir.Node) -> tuple[dict[str, ir.Value], dict[str, int | float]]:
        """Inputs and attributes with nothing inside, by the operator's names."""
        keys = _keys_of(node)
        inputs = {
            "query": given(node, paged_attention.QUERY),
            "key_cache": given(node, paged_attention.KEY_CACHE),
            "value_cache": given(node, paged_attention.VALUE_CACHE),
            "cumulative_sequence_length": given(keys, 0),
            "past_seqlens": given(keys, 1),
            "block_table": given(keys, 2),
        }
        places = optional(node, paged_attention.PLACES)
        tokens = None if places is None else places.producer()
        more = {
            "key": optional(node, paged_attention.KEY),
            "value": optional(node, paged_attention.VALUE),
            "head_sink": optional(node, paged_attention.SINKS),
            "slot_mapping": None if tokens is None else optional(tokens, 4),
        }
        inputs |= {name: value for name, value in more.items() if value is not None}
        attributes: dict[str, int | float] = {
            name: attribute(node, name) for name in ("num_heads", "kv_num_heads", "scale")
        }
        if "cap" in node.overload.split("_"):
            attributes["softcap"] = attribute(node, "softcap")
        if "window" in keys.overload.split("_"):  # both count the token itself
            attributes["local_window_size"] = attribute(keys, "window")
        return inputs, attributes

    def lower(self, node: ir.Node) -> Site:
        """Put the operator in the place of one attention."""
        inputs, attributes = self._plain(node)
        dtype = inputs["key_cache"].dtype
        assert dtype is not None
        size = self._pool(node, 0)[1]
        inside = self._insides.of(node, inputs["query"], inputs["key"], size, dtype)
        if inside.limit is not None:
            self.limit = min(inside.limit, self.limit or inside.limit)
            inputs["past_seqlens"] = self._checked(inputs, inside.limit)
        inputs |= {"query": inside.query, "key": inside.key, **inside.inputs}
        attributes |= inside.attributes
        for name in ("query", "key", "value", "head_sink", *inside.inputs):
            if name in inputs:
                inputs[name] = self._narrow(inputs[name], dtype)
        placed = [inputs.get(name) for name in self._schema.inputs]
        outputs = self._builder.ops(NAME, placed, 3, attributes, domain=DOMAIN)
        heads = int(attribute(node, "num_heads"))
        rows = ir.Shape(["num_tokens", heads * self._pool(node, 1)[1]])
        shapes = [rows, inputs["key_cache"].shape, inputs["value_cache"].shape]
        for value, shape in zip(outputs, shapes, strict=True):
            assert shape is not None
            value.dtype, value.shape = dtype, shape.copy()
        y, old = outputs[0], node.outputs[0]
        if old.dtype not in (None, dtype):
            assert old.dtype is not None
            y = self._builder.op("Cast", [y], {"to": int(old.dtype)})
            y.shape = outputs[0].shape
        made = outputs[0].producer()
        assert made is not None
        made.metadata_props.update(node.metadata_props)
        self._graph.insert_before(node, self._builder.take())
        for before, after in zip(node.outputs, (y, *outputs[1:]), strict=True):
            take_place(before, after)
        self._graph.remove(node, safe=True)
        made.name = node.name
        details: dict[str, str | int | float | bool] = dict(inside.said)
        for name, word in (("local_window_size", "window"), ("softcap", "softcap")):
            if name in attributes:
                details[word] = attributes[name]
        if "head_sink" in inputs:
            details["sinks"] = True
        return Site("attention", CODE, made.name or NAME, "", "fused", details=details)

    def _narrow(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A value in the operator's type."""
        if value.dtype == dtype:
            return value
        found: np.ndarray[Any, Any] | None = constant(value, limit=1 << 28)
        if found is not None:
            return self._builder.constant(found.astype(dtype.numpy()), f"onnxgen/{value.name}")
        return self._builder.op("Cast", [value], {"to": int(dtype)})

    def _checked(self, inputs: Mapping[str, ir.Value], rows: int) -> ir.Value:
        """The pasts, int32 [B], read only where no sequence is longer than so many tokens."""
        op, ints = self._builder.op, self._builder.ints
        past, edges = inputs["past_seqlens"], inputs["cumulative_sequence_length"]
        if (past, rows) not in self._past:
            starts = op("Slice", [edges, ints(0), ints(-1)])
            ends = op("Slice", [edges, ints(1), ints(1 << 30)])
            total = op("Add", [past, op("Sub", [ends, starts])], name="total_lengths")
            longest = op("ReduceMax", [total], {"keepdims": 1})
            most, zero, one = (
                self._builder.constant(np.array([n], np.int32)) for n in (rows, 0, 1)
            )
            over = op("Min", [op("Max", [op("Sub", [longest, most]), zero]), one])
            sentence = f"contract: this model was written for at most {rows} tokens a sequence"
            guard = op("Gather", [zero, over], {"axis": 0}, name=sentence)
            self._past[past, rows] = op("Add", [past, guard], name="past_lengths")
        return self._past[past, rows]


def take_place(old: ir.Value, new: ir.Value) -> None:
    """Let a value be read where another was, under its name where that is an output's."""
    name = old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if new.is_graph_output():
        old.name, new.name = f"{name}.replaced", name


def _keys_of(node: ir.Node) -> ir.Node:
    """The PagedKeys node that says what an attention's tokens see."""
    keys = given(node, paged_attention.MASK).producer()
    assert keys is not None
    assert keys.op_type == paged_plan.KEYS
    return keys
