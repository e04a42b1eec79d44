"""Attention over pools in the place of attention over caches, and the inputs that it needs.

Attention(q, k, v, mask, past_key, past_value)
-> onnxgen::PagedAttention(q, k, v, pools, places, slots, mask, ..)          its own cache
   onnxgen::PagedAttention(q, pools, ..)                                     another layer's
   keys, values = f(onnxgen::PagedCache(latents, pool, ..)), PagedAttention  computed from it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxgen import functions
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import FLOATS, attribute
from onnxgen.analysis.paging import CacheUse, PagedLayer, UnpageableError
from onnxgen.analysis.roles import CachePair
from onnxgen.functions import paged_attention, paged_plan
from onnxgen.patterns.building import Builder
from onnxgen.patterns.operands import merged_heads, rows_first, scale_of
from onnxgen.report.values import Obstacle
from onnxgen.targets.paged import PagedOptions, Pool

INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64
PREFIX = "paged/"
"""Of the new inputs' names while the old ones are there: a size is known by its input's name."""


@dataclass(frozen=True)
class PagedInputs:
    """What a paged model is given, and what follows from it for every layer.

    Attributes:
        given: the inputs, pools apart, in order.
        tokens: ids [N] or embeddings [N, H].
        row: the same as the model knows them, [1, N, ..] or [N, 1, ..].
        axis: where the tokens are among the model's batch (0) and sequence (1).
        cumulative, past, table: lengths and blocks of the sequences.
        positions, totals, places, spread, collect: outputs of onnxgen::PagedTokens.
    """

    given: tuple[ir.Value, ...]
    tokens: ir.Value
    row: ir.Value
    axis: int
    cumulative: ir.Value
    past: ir.Value
    table: ir.Value
    positions: ir.Value
    totals: ir.Value
    places: ir.Value
    spread: ir.Value
    collect: ir.Value

    @staticmethod
    def made(
        builder: Builder, old_tokens: ir.Value, axis: int, options: PagedOptions
    ) -> PagedInputs:
        """New inputs in the place of the old ids, or embeddings."""
        real = old_tokens.dtype in FLOATS
        dims: list[int | str] = ["num_tokens"]
        if real:
            width = builder.shapes.of(old_tokens)
            dims.append(width[-1] if width and isinstance(width[-1], int) else "hidden_size")
        kind = old_tokens.dtype if real else INT64
        tokens = new_input("inputs_embeds" if real else "input_ids", kind or INT64, dims)
        cumulative = new_input("cumulative_sequence_lengths", INT32, ["batch_size + 1"])
        past = new_input("past_sequence_lengths", INT32, ["batch_size"])
        table = new_input("block_table", INT32, ["batch_size", "max_num_blocks"])
        given = [tokens, cumulative, past, table]
        mapping = None
        if options.slot_mapping:
            mapping = new_input("slot_mapping", INT32, ["num_tokens"])
            given.append(mapping)
        plan = builder.ops(
            paged_plan.TOKENS,
            [cumulative, past, table, tokens, mapping],
            5,
            {"block_size": options.block_size},
            domain=functions.DOMAIN,
            overload="mapped" if mapping is not None else "",
        )
        for value in plan:
            typed(value, INT64)
        plan[0].shape = ir.Shape(["num_tokens"])
        row = builder.op("Unsqueeze", [tokens, builder.ints(1 - axis)])
        if row.dtype != old_tokens.dtype and old_tokens.dtype is not None:
            row = builder.op("Cast", [row], {"to": int(old_tokens.dtype)})
        lengths = (cumulative, past, table)
        return PagedInputs(tuple(given), tokens, row, axis, *lengths, *plan)


class Layers:
    """Writes the layers of one model.

    Attributes:
        replaced: (old, new) values.
        pools: each with its input, by the name of the past that it was.
        updated: what a pool has become, by that name.
    """

    def __init__(
        self, facts: Facts, builder: Builder, inputs: PagedInputs, options: PagedOptions
    ) -> None:
        self._facts = facts
        self._builder = builder
        self._inputs = inputs
        self._options = options
        self.replaced: list[tuple[ir.Value, ir.Value]] = []
        self.pools: dict[str, tuple[Pool, ir.Value]] = {}
        self.updated: dict[str, ir.Value] = {}
        self._keys: dict[tuple[object, ...], tuple[ir.Value, ir.Value]] = {}
        self._gathered: dict[str, ir.Value] = {}
        self._context: ir.Value | None = None

    def attend(self, layer: PagedLayer) -> None:
        """Put one attention over pools in the place of one over caches."""
        query, factor = self._rows(layer, layer.q, layer.heads * layer.size)
        slots, mask = self._read(layer)
        pools: list[ir.Value] = []
        given: list[ir.Value | None]
        if layer.computed:
            for use in layer.computed:
                self._gather(layer, use, slots)
            given = [query, *self._context_of(layer, slots), None, None, None]
        else:
            pools = [self._pool(layer, index) for index in (0, 1)]
            given = [query, None, None, *pools, None]
            if layer.key is not None and layer.value is not None:
                key, own = self._rows(layer, layer.key, layer.kv_heads * layer.size)
                value, also = self._rows(layer, layer.value, layer.kv_heads * layer.width)
                if (own, also) != (1.0, 1.0):
                    raise self._obstacle(layer, "keys or values are scaled on the way")
                given = [query, key, value, *pools, self._inputs.places]
        cap = attribute(layer.node, "softcap", 0.0)
        precision = attribute(layer.node, "softmax_precision", 0)
        overload = paged_attention.overload_of(
            shared=layer.key is None and not layer.computed,
            gathered=bool(layer.computed),
            mapped=self._options.slot_mapping and layer.key is not None,
            cast=bool(pools) and pools[0].dtype != layer.q.dtype,
            bias=mask.dtype != ir.DataType.BOOL,
            cap=bool(cap),
            sinks=layer.sinks is not None,
            float="float" in layer.node.overload.split("_") or precision == 1,
        )
        attributes: dict[str, int | float] = {
            "num_heads": layer.heads,
            "kv_num_heads": layer.kv_heads,
            "scale": scale_of(self._facts, layer.node, layer.q) * factor,
        }
        if cap:
            attributes["softcap"] = cap
        read = None if layer.computed else slots
        plan = [read, mask, self._inputs.spread, self._inputs.collect]
        outputs = self._builder.ops(
            paged_attention.NAME,
            [*given, *plan, layer.sinks],
            3 if layer.key is not None else 1,
            attributes,
            domain=functions.DOMAIN,
            name=f"{layer.node.name or 'onnxgen'}/{paged_attention.NAME}",
            overload=overload,
        )
        typed(outputs[0], layer.q.dtype)
        for pair, output, pool in zip(layer.caches, outputs[1:], pools, strict=False):
            self._keep(pair, output, pool)
        self._merge(layer, outputs[0])

    def longest(self) -> ir.Value:
        """What a model knows as the length of its keys, int64 [1].

        Of keys that are computed from what was gathered it is all that was, in one row; elsewhere
        no token's position is beyond it.
        """
        op, ints = self._builder.op, self._builder.ints
        if self._context is not None:
            return op("Reshape", [op("Size", [self._context]), ints(1)])
        return op("Add", [op("ReduceMax", [self._inputs.positions], {"keepdims": 1}), ints(1)])

    def _rows(self, layer: PagedLayer, operand: ir.Value, width: int) -> tuple[ir.Value, float]:
        """A [B, heads, S, D] operand as [N, heads * D], and the factor that is left to apply."""
        heads = layer.heads if operand is layer.q else layer.kv_heads
        found = rows_first(self._facts, self._builder, operand, heads, turned=True)
        if found is None:
            raise self._obstacle(layer, f"{operand.name!r} cannot be laid out as rows of tokens")
        return self._builder.op("Reshape", [found[0], self._builder.ints(-1, width)]), found[1]

    def _merge(self, layer: PagedLayer, rows: ir.Value) -> None:
        """Rows [N, H * Dv] in the place of an attention's output."""
        op, ints = self._builder.op, self._builder.ints
        lead = (1, -1) if self._inputs.axis else (-1, 1)
        new = op("Reshape", [rows, ints(*lead, layer.heads * layer.width)])
        old = merged_heads(self._facts, layer.node.outputs[0])
        if old is None:
            split = op("Reshape", [new, ints(*lead, layer.heads, layer.width)])
            old, new = layer.node.outputs[0], op("Transpose", [split], {"perm": [0, 2, 1, 3]})
        self.replaced.append((old, new))

    def _gather(self, layer: PagedLayer, use: CacheUse, slots: ir.Value) -> None:
        """A cache that keys are computed from: its rows of all sequences behind one another.

        [B, L, K*D] as what the model knows: a batch of one that has B * L keys.
        """
        past = use.pair.past
        if past in self._gathered:
            return
        if self._context is not None and self._context is not slots:
            raise self._obstacle(layer, "layers compute keys from pasts of different lengths")
        self._context = slots
        op, ints = self._builder.op, self._builder.ints
        index = 0 if len(self.pools) % 2 == 0 else 1
        pool = self._pool_of(use.pair, index, use.heads, use.size)
        order = [use.axes.index(letter) for letter in "BPKD" if letter in use.axes]
        rows = op("Transpose", [use.new], {"perm": order}) if order != sorted(order) else use.new
        rows = op("Reshape", [rows, ints(-1, use.heads * use.size)])
        mapped, cast = self._options.slot_mapping, pool.dtype != use.new.dtype
        outputs = self._builder.ops(
            paged_attention.CACHE,
            [rows, pool, self._inputs.places, slots],
            2,
            domain=functions.DOMAIN,
            overload=paged_attention.overload_of(mapped=mapped, cast=cast),
        )
        typed(outputs[0], use.new.dtype)
        self._keep(use.pair, outputs[1], pool)
        sizes = {"B": 1, "P": -1, "K": use.heads, "D": use.size}
        plain = [letter for letter in "BPKD" if letter in use.axes]
        whole = op("Reshape", [outputs[0], ints(*(sizes[letter] for letter in plain))])
        back = [plain.index(letter) for letter in use.axes]
        if back != sorted(back):
            whole = op("Transpose", [whole], {"perm": back})
        self._gathered[past] = whole
        self.replaced.append((use.whole, whole))

    def _context_of(self, layer: PagedLayer, slots: ir.Value) -> list[ir.Value]:
        """Computed keys and values, [B, L, K*D] and [B, L, K*Dv]."""
        op, ints = self._builder.op, self._builder.ints
        found = []
        lengths = op("Shape", [slots])
        for operand, size in zip(layer.node.inputs[1:3], (layer.size, layer.width), strict=True):
            assert operand is not None
            rows = op("Transpose", [operand], {"perm": [0, 2, 1, 3]})
            target = op("Concat", [lengths, ints(layer.kv_heads * size)], {"axis": 0})
            found.append(op("Reshape", [rows, target]))
        return found

    def _pool(self, layer: PagedLayer, index: int) -> ir.Value:
        size = (layer.size, layer.width)[index]
        return self._pool_of(layer.caches[index], index, layer.kv_heads, size)

    def _pool_of(self, pair: CachePair, index: int, heads: int, size: int) -> ir.Value:
        """The pool that a cache has become, what was last written to it."""
        if pair.past in self.updated:
            return self.updated[pair.past]
        number, kind = len(self.pools) // 2, ("key", "value")[index]
        name = f"past_key_values.{number}.{kind}"
        dtype = self._options.kv_dtype or self._facts.roles.inputs[pair.past].dtype
        dims: list[int | str] = ["num_blocks", self._options.block_size, heads, size]
        output = f"present.{number}.{kind}"
        pool = Pool(pair.past, pair.present, name, output, heads, size, dtype)
        value = new_input(name, dtype, dims)
        self.pools[pair.past] = (pool, value)
        return value

    def _keep(self, pair: CachePair, output: ir.Value, pool: ir.Value) -> None:
        self.updated[pair.past] = output
        typed(output, pool.dtype)
        output.shape = pool.shape

    def _read(self, layer: PagedLayer) -> tuple[ir.Value, ir.Value]:
        """Slots and mask of a family, once for all layers of it."""
        family, dtype = layer.family, layer.q.dtype
        key = (family.kind, family.size, family.slopes, dtype if family.slopes else None)
        if key not in self._keys:
            slopes = None
            parts = []
            attributes = {"block_size": self._options.block_size}
            if family.kind == "window":
                parts, attributes["window"] = ["window"], family.size
            if family.kind == "chunked":
                parts, attributes["chunk"] = ["chunk"], family.size
            if family.slopes:
                parts.append("slopes")
                kind = dtype.numpy() if dtype is not None else np.float32
                slopes = self._builder.constant(np.array(family.slopes, kind), "onnxgen/slopes")
            given = self._inputs
            slots, mask = self._builder.ops(
                paged_plan.KEYS,
                [given.cumulative, given.past, given.table, slopes],
                2,
                attributes,
                domain=functions.DOMAIN,
                overload="_".join(parts),
            )
            typed(slots, INT64)
            typed(mask, dtype if family.slopes else ir.DataType.BOOL)
            self._keys[key] = slots, mask
        return self._keys[key]

    @staticmethod
    def _obstacle(layer: PagedLayer, reason: str) -> UnpageableError:
        return UnpageableError([Obstacle("PAG003", reason, layer.node.name or "")])


def new_input(name: str, dtype: ir.DataType, dims: Sequence[int | str]) -> ir.Value:
    """An input of the paged model, under a name of its own for now."""
    return ir.Value(name=PREFIX + name, type=ir.TensorType(dtype), shape=ir.Shape(dims))


def typed(value: ir.Value, dtype: ir.DataType | None) -> None:
    """Say a value's type, where it is known."""
    if dtype is not None:
        value.dtype = dtype
