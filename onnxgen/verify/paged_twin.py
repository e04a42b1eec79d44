"""What a written model of flavor `ort` says, in operators that ONNX Runtime's CPU can run.

    com.microsoft::PagedAttention -> Cast, RMSNormalization?, RotaryEmbedding?,
                                     onnxgen::PagedTokens, PagedKeys, PagedAttention, Cast

The operator has no kernel on CPU. Its meaning is put together again from the file alone, by its
documentation, and not by what it was lowered from: a wrong attribute, or an input in a wrong
place, is a model that differs. Inputs are read by name as the installed ONNX Runtime's schema
places them. Sums are made in float32, as kernels make them; what they store is rounded as theirs.

N tokens, H query heads, K key heads, D head size, R rotated columns, T rows of tables.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxgen import functions
from onnxgen.analysis.graph import attribute, names
from onnxgen.analysis.shapes import Shapes
from onnxgen.errors import RefusedError
from onnxgen.functions import paged_attention, paged_plan
from onnxgen.model_io import read_model, staged
from onnxgen.patterns.building import Builder
from onnxgen.targets.paged_ort import take_place
from onnxgen.targets.paged_schema import DOMAIN, NAME, live_schema

FLOAT = int(ir.DataType.FLOAT)
# What is put together again; whatever else a node says is not understood.
_INPUTS = names(
    """
    query key value key_cache value_cache cumulative_sequence_length past_seqlens block_table
    cos_cache sin_cache slot_mapping head_sink q_norm_weight k_norm_weight
    """
)
_ATTRIBUTES = names(
    """
    num_heads kv_num_heads scale softcap local_window_size do_rotary rotary_interleaved
    qk_norm_epsilon
    """
)


@contextmanager
def staged_twins(written: Sequence[Path]) -> Iterator[list[Path]]:
    """Written models with every com.microsoft::PagedAttention expanded, beside them while it lasts.

    Raises:
        RefusedError: a node cannot be read back.
        FileError: there is no room for them.
    """
    with contextlib.ExitStack() as stack:
        twins = []
        for path in written:
            model = read_model(path)
            expand_attention(model)
            place = path.with_name(f"{path.stem.lstrip('.')}.twin.onnx")
            stage = stack.enter_context(staged(model, place, source=path, force=False))
            twins.append(stage.path)
        yield twins


def expand_attention(model: ir.Model) -> int:
    """Put what every com.microsoft::PagedAttention means in its place, in place; how many.

    Raises:
        RefusedError: a node says something that is not known here.
    """
    nodes = [n for n in model.graph if n.domain == DOMAIN and n.op_type == NAME]
    expansion = _Expansion(model.graph)
    for node in nodes:
        expansion.expand(node)
    functions.declare(model)
    return len(nodes)


class _Expansion:
    """Expands the attentions of one graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._builder = Builder(graph, Shapes(graph))
        self._plans: dict[tuple[Any, ...], Sequence[ir.Value]] = {}

    def expand(self, node: ir.Node) -> None:
        """Put what one node means in its place."""
        given = _inputs(node)
        op = self._builder.op
        heads, kv_heads = attribute(node, "num_heads"), attribute(node, "kv_num_heads")
        shape = given["key_cache"].shape
        block, size = (
            (shape[1], shape[3]) if shape is not None and len(shape) == 4 else (None, None)
        )
        if not isinstance(block, int) or not isinstance(size, int):
            raise RefusedError(f"{node.name}: the sizes of its pools are not known")
        lengths = [
            given[name] for name in ("cumulative_sequence_length", "past_seqlens", "block_table")
        ]
        mapping = given.get("slot_mapping")
        positions, _, places, spread, collect = self._plan(
            paged_plan.TOKENS,
            [*lengths, given["query"], mapping],
            5,
            {"block_size": block},
            "mapped" if mapping is not None else "",
        )
        window = attribute(node, "local_window_size", -1)
        keys = {"block_size": block, **({"window": window} if window > 0 else {})}
        overload = "window" if window > 0 else ""
        slots, mask = self._plan(paged_plan.KEYS, lengths, 2, keys, overload)
        rows = {}
        for name, count in (("query", heads), ("key", kv_heads)):
            wide = op("Cast", [given[name]], {"to": FLOAT})
            wide = self._normed(wide, given.get(f"{name[0]}_norm_weight"), node, count, size)
            rows[name] = self._turned(wide, given, node, positions, count, size)
        value = op("Cast", [given["value"]], {"to": FLOAT})
        sinks = given.get("head_sink")
        cap = attribute(node, "softcap", 0.0)
        scores: dict[str, int | float] = {
            "num_heads": heads,
            "kv_num_heads": kv_heads,
            "scale": attribute(node, "scale", 0.0) or size**-0.5,
        }
        if cap:
            scores["softcap"] = cap
        outputs = self._builder.ops(
            paged_attention.NAME,
            [
                rows["query"],
                rows["key"],
                value,
                given["key_cache"],
                given["value_cache"],
                places,
                slots,
                mask,
                spread,
                collect,
                None if sinks is None else op("Cast", [sinks], {"to": FLOAT}),
            ],
            3,
            scores,
            domain=functions.DOMAIN,
            overload=paged_attention.overload_of(
                mapped=mapping is not None, cast=True, cap=bool(cap), sinks=sinks is not None
            ),
        )
        kind = node.outputs[0].dtype or given["key_cache"].dtype
        assert kind is not None
        y = op("Cast", [outputs[0]], {"to": int(kind)})
        self._graph.insert_before(node, self._builder.take())
        for old, new in zip(node.outputs, (y, *outputs[1:]), strict=False):
            new.type, new.shape = old.type, old.shape
            take_place(old, new)
        self._graph.remove(node, safe=True)

    def _plan(
        self,
        name: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        attributes: dict[str, int],
        overload: str,
    ) -> Sequence[ir.Value]:
        """A plan's outputs, made once for equal lengths; of the tokens only the number counts."""
        of = [value for index, value in enumerate(inputs) if index != 3]
        key = (name, *of, *sorted(attributes.items()))
        if key not in self._plans:
            made = self._builder.ops(
                name, inputs, outputs, attributes, domain=functions.DOMAIN, overload=overload
            )
            for value in made:
                value.dtype = ir.DataType.INT64
            if name == paged_plan.KEYS:
                made[1].dtype = ir.DataType.BOOL
            self._plans[key] = made
        return self._plans[key]

    def _normed(
        self, rows: ir.Value, weight: ir.Value | None, node: ir.Node, heads: int, size: int
    ) -> ir.Value:
        """[N, heads * D], each head divided by its root mean square where a gain is given."""
        if weight is None:
            return rows
        op, ints = self._builder.op, self._builder.ints
        split = op("Reshape", [rows, ints(-1, heads, size)])
        gain = op("Cast", [weight], {"to": FLOAT})
        epsilon = attribute(node, "qk_norm_epsilon", 1e-6)
        found = op("RMSNormalization", [split, gain], {"axis": -1, "epsilon": epsilon})
        return op("Reshape", [found, ints(-1, heads * size)])

    def _turned(
        self,
        rows: ir.Value,
        given: dict[str, ir.Value],
        node: ir.Node,
        positions: ir.Value,
        heads: int,
        size: int,
    ) -> ir.Value:
        """[N, heads * D], rotated by each token's place in its sequence where the node says so."""
        if not attribute(node, "do_rotary", 0):
            return rows
        op, ints = self._builder.op, self._builder.ints
        shape = given["cos_cache"].shape
        columns = shape[1] if shape is not None and len(shape) == 2 else None
        if not isinstance(columns, int):
            raise RefusedError(f"{node.name}: the sizes of its rotary tables are not known")
        tables = [op("Cast", [given[f"{n}_cache"]], {"to": FLOAT}) for n in ("cos", "sin")]
        attributes = {
            "num_heads": heads,
            "interleaved": attribute(node, "rotary_interleaved", 0),
        }
        rotated = 2 * columns
        if rotated != size:
            attributes["rotary_embedding_dim"] = rotated
        batch = op("Unsqueeze", [rows, ints(0)])
        places = op("Unsqueeze", [positions, ints(0)])
        found = op("RotaryEmbedding", [batch, *tables, places], attributes)
        return op("Squeeze", [found, ints(0)])


def _inputs(node: ir.Node) -> dict[str, ir.Value]:
    """What a node is given, by the names of the installed ONNX Runtime's schema."""
    schema = live_schema()
    if schema is None:
        raise RefusedError(f"{node.name}: the installed ONNX Runtime has no {DOMAIN}::{NAME}")
    found = {
        name: value
        for name, value in zip(schema.inputs, node.inputs, strict=False)
        if value is not None
    }
    missing = {"query", "key", "value", *schema.required} - set(found)
    unknown = (set(found) - _INPUTS) | (set(node.attributes) - _ATTRIBUTES)
    if missing or unknown or ("cos_cache" in found) != bool(attribute(node, "do_rotary", 0)):
        odd = ", ".join(sorted([*missing, *unknown])) or "do_rotary"
        raise RefusedError(f"{node.name}: what it says of {odd} cannot be read back")
    return found
