"""To paged: a raised decoder's caches become pools of blocks, its batch one row of packed tokens.

    ids [B,S], masks, positions, caches [B,K,P,D]   ->   ids [N], lengths, block_table, pools

    new inputs -> plan of the run -> each attention over pools -> positions (`paged_positions`)
    -> logits (`paged_logits`) -> old inputs and outputs out

The tokens of all sequences stand behind one another in one row: the model sees a batch of one and
a sequence of N. Nothing between the embedding and the logits has to know; only attention, which
alone looks at other tokens, and the positions do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxgen import functions
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute
from onnxgen.analysis.masks import MaskFamily
from onnxgen.analysis.paging import PagedLayer, UnpageableError, paged_layers
from onnxgen.analysis.roles import Roles
from onnxgen.analysis.sampling import Sampler
from onnxgen.functions import paged_attention, paged_plan
from onnxgen.passes.paged_logits import last_projection, row_outputs
from onnxgen.passes.paged_positions import TokenLengths, page_positions
from onnxgen.passes.tidy import tidy
from onnxgen.patterns.building import Builder
from onnxgen.patterns.operands import merged_heads, rows_first, scale_of
from onnxgen.report.values import Obstacle
from onnxgen.targets.paged import PagedModel, PagedOptions, Pool

INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64


def page_model(
    model: ir.Model,
    roles: Roles,
    sampler: Sampler,
    families: Mapping[str, MaskFamily],
    options: PagedOptions,
) -> PagedModel:
    """Page a raised model, in place.

    Raises:
        UnpageableError: something stands in the way; the model is then of no use.
    """
    facts = Facts(model.graph, roles, sampler)
    layers = paged_layers(facts, families)
    rows = row_outputs(facts, roles)
    writer = _Writer(facts, options)
    projection = last_projection(facts, rows[0]) if options.logits != "all" else None
    for layer in layers:
        writer.attend(layer)
    writer.splice()
    writer.position(rows)
    logits = writer.answer(rows, projection)
    pools = writer.finish(logits)
    functions.declare(model)
    tidy(model)
    functions.declare(model)
    return PagedModel(
        model,
        options,
        pools,
        len(layers),
        tuple(dict.fromkeys(layer.family for layer in layers)),
        writer.tokens_name,
        writer.switches,
    )


class _Writer:
    """Writes the paged graph around the old one's layers."""

    def __init__(self, facts: Facts, options: PagedOptions) -> None:
        graph = facts.graph
        self._graph = graph
        self._facts = facts
        self._options = options
        self._builder = Builder(graph, facts.shapes)
        self._replaced: list[tuple[ir.Value, ir.Value]] = []
        self._pools: dict[str, tuple[Pool, ir.Value]] = {}
        self._updated: dict[str, ir.Value] = {}
        self._keys: dict[tuple[object, ...], tuple[ir.Value, ir.Value]] = {}
        self.switches = False
        self._old_tokens = self._find_tokens()
        self._axis = self._token_axis()
        real = self._old_tokens.dtype in _FLOATS
        self.tokens_name = "inputs_embeds" if real else "input_ids"
        dims: list[int | str] = ["num_tokens"]
        if real:
            width = facts.shapes.of(self._old_tokens)
            dims.append(width[-1] if width and isinstance(width[-1], int) else "hidden_size")
        kind = self._old_tokens.dtype if real else INT64
        self._tokens = _input(self.tokens_name, kind or INT64, dims)
        self._cumulative = _input("cumulative_sequence_lengths", INT32, ["batch_size + 1"])
        self._past = _input("past_sequence_lengths", INT32, ["batch_size"])
        self._table = _input("block_table", INT32, ["batch_size", "max_num_blocks"])
        self._extra: list[ir.Value] = []
        mapping = None
        if options.slot_mapping:
            mapping = _input("slot_mapping", INT32, ["num_tokens"])
            self._extra.append(mapping)
        op = self._builder.op
        self._positions, self._totals, self._places, self._spread, self._collect = (
            self._builder.ops(
                paged_plan.TOKENS,
                [self._cumulative, self._past, self._table, self._tokens, mapping],
                5,
                {"block_size": options.block_size},
                domain=functions.DOMAIN,
                overload="mapped" if mapping is not None else "",
            )
        )
        for value in (self._positions, self._totals, self._places, self._spread, self._collect):
            _typed(value, INT64)
        self._positions.shape = ir.Shape(["num_tokens"])
        self._row = op("Unsqueeze", [self._tokens, self._builder.ints(1 - self._axis)])
        if self._row.dtype != self._old_tokens.dtype and self._old_tokens.dtype is not None:
            self._row = op("Cast", [self._row], {"to": int(self._old_tokens.dtype)})

    def _find_tokens(self) -> ir.Value:
        """The input that the tokens come in by."""
        roles = self._facts.roles
        found = [e.name for role in ("ids", "embeds", "type_ids") for e in roles.named(role)]
        if len(found) != 1:
            listed = ", ".join(found) or "none"
            reason = f"tokens come in by one input, and this model has: {listed}"
            raise UnpageableError([Obstacle("PAG007", reason, listed)])
        return next(value for value in self._graph.inputs if value.name == found[0])

    def _token_axis(self) -> int:
        """1, the model's sequence, or its batch where it takes one new token only."""
        fixed = self._facts.roles.fixed
        if "S" not in fixed:
            return 1
        if fixed["S"] != 1 or "B" in fixed:
            reason = f"the model takes {fixed['S']} new tokens, and no other number"
            raise UnpageableError([Obstacle("PAG010", reason, self._old_tokens.name or "")])
        return 0

    def attend(self, layer: PagedLayer) -> None:
        """Put one attention over pools in the place of one over caches."""
        op, ints, options = self._builder.op, self._builder.ints, self._options
        rows: list[ir.Value | None] = []
        factor = 1.0
        sizes = ((layer.q, layer.heads), (layer.key, layer.kv_heads), (layer.value, layer.kv_heads))
        for index, (operand, heads) in enumerate(sizes):
            if operand is None:
                rows.append(None)
                continue
            found = rows_first(self._facts, self._builder, operand, heads, turned=True)
            if found is None or (index and found[1] != 1.0):
                reason = f"{operand.name!r} cannot be laid out as rows of tokens"
                raise UnpageableError([Obstacle("PAG003", reason, layer.node.name or "")])
            factor *= found[1]
            width = layer.width if index == 2 else layer.size
            rows.append(op("Reshape", [found[0], ints(-1, heads * width)]))
        shared = rows[1] is None
        pools = [self._pool(layer, index) for index in (0, 1)]
        slots, mask = self._read(layer, rows[0])
        overload = paged_attention.overload_of(
            shared=shared,
            mapped=options.slot_mapping and not shared,
            cast=pools[0].dtype != layer.q.dtype,
            bias=mask.dtype != ir.DataType.BOOL,
            cap=bool(attribute(layer.node, "softcap", 0.0)),
            sinks=layer.sinks is not None,
            float="float" in layer.node.overload.split("_")
            or attribute(layer.node, "softmax_precision", 0) == 1,
        )
        attributes: dict[str, int | float] = {
            "num_heads": layer.heads,
            "kv_num_heads": layer.kv_heads,
            "scale": scale_of(self._facts, layer.node, layer.q) * factor,
        }
        if attribute(layer.node, "softcap", 0.0):
            attributes["softcap"] = attribute(layer.node, "softcap")
        outputs = self._builder.ops(
            paged_attention.NAME,
            [
                *rows,
                *pools,
                None if shared else self._places,
                slots,
                mask,
                self._spread,
                self._collect,
                layer.sinks,
            ],
            1 if shared else 3,
            attributes,
            domain=functions.DOMAIN,
            overload=overload,
        )
        _typed(outputs[0], layer.q.dtype)
        for pair, output, pool in zip(layer.caches, outputs[1:], pools, strict=False):
            self._updated[pair.past] = output
            _typed(output, pool.dtype)
            output.shape = pool.shape
        lead = (1, -1) if self._axis else (-1, 1)
        new = op("Reshape", [outputs[0], ints(*lead, layer.heads * layer.width)])
        merged = merged_heads(self._facts, layer.node.outputs[0])
        if merged is None:
            split = op("Reshape", [new, ints(*lead, layer.heads, layer.width)])
            merged, new = layer.node.outputs[0], op("Transpose", [split], {"perm": [0, 2, 1, 3]})
        self._replaced.append((merged, new))

    def _pool(self, layer: PagedLayer, index: int) -> ir.Value:
        pair = layer.caches[index]
        if pair.past in self._updated:
            return self._updated[pair.past]
        kind = ("key", "value")[index]
        number = len(self._pools) // 2
        size = (layer.size, layer.width)[index]
        name = f"past_key_values.{number}.{kind}"
        dtype = self._options.kv_dtype or self._facts.roles.inputs[pair.past].dtype
        dims: list[int | str] = ["num_blocks", self._options.block_size, layer.kv_heads, size]
        pool = Pool(
            pair.past, pair.present, name, f"present.{number}.{kind}", layer.kv_heads, size, dtype
        )
        value = _input(name, dtype, dims)
        self._pools[pair.past] = (pool, value)
        return value

    def _read(self, layer: PagedLayer, query: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """Slots and mask of a family, once for all layers of it."""
        family = layer.family
        dtype = layer.q.dtype
        key = (family.kind, family.size, family.slopes, dtype)
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
            slots, mask = self._builder.ops(
                paged_plan.KEYS,
                [self._cumulative, self._past, self._table, slopes],
                2,
                attributes,
                domain=functions.DOMAIN,
                overload="_".join(parts),
            )
            _typed(slots, INT64)
            _typed(mask, dtype if family.slopes else ir.DataType.BOOL)
            self._keys[key] = slots, mask
        return self._keys[key]

    def splice(self) -> None:
        """Put the new nodes into the graph, and what they make in the old values' place."""
        for old, new in self._replaced:
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self._replaced = []
        nodes = self._builder.take()
        self._graph.extend(nodes)
        for node in nodes:
            self._facts.added(node, len(self._graph))

    def position(self, rows: Sequence[ir.Value]) -> None:
        """Make positions and lengths the packed tokens' own, and the tokens the new ones."""
        count = self._builder.op("Shape", [self._tokens], {"start": 0, "end": 1})
        tokens = TokenLengths(self._positions, self._totals, count, self._axis)
        self._replaced, self.switches = page_positions(
            self._facts, self._builder, list(rows), tokens
        )
        self.splice()
        ir.convenience.replace_all_uses_with(self._old_tokens, self._row)

    def answer(self, rows: Sequence[ir.Value], projection: ir.Node | None) -> list[ir.Value]:
        """The outputs: scores of the wanted rows, then whatever else has a row for each token."""
        op, ints, options = self._builder.op, self._builder.ints, self._options
        count = {"all": "num_tokens", "last": "batch_size", "indices": "num_logits"}[options.logits]
        outputs: list[ir.Value] = []
        for index, y in enumerate(rows):
            name = "logits" if index == 0 else str(y.name)
            width = self._facts.shapes.of(y)
            chosen, empty = (None, None)
            if index == 0:
                chosen, empty = self._chosen()
            if chosen is not None and projection is not None:
                states = projection.inputs[0]
                projection.replace_input_with(
                    0, op("Gather", [states, chosen], {"axis": self._axis})
                )
            elif chosen is not None:
                y = op("Gather", [y, chosen], {"axis": self._axis})
            last = width[-1] if width else None
            size = last if isinstance(last, int) else -1
            new = op("Squeeze", [y, ints(1 - self._axis)])
            if empty is not None:
                zero = op("CastLike", [self._builder.constant(np.array(0, np.float32)), new])
                new = op("Where", [empty, zero, new])
            y.name = self._builder.unique(f"{name}.rows")
            new.name = name
            _typed(new, y.dtype)
            dims: list[int | str] = [count if index == 0 else "num_tokens"]
            new.shape = ir.Shape([*dims, size if size > 0 else f"{name}_size"])
            outputs.append(new)
        self._graph.extend(self._builder.take())
        return outputs

    def _chosen(self) -> tuple[ir.Value | None, ir.Value | None]:
        """Which tokens' scores are made, and bool [B, 1]: of which sequences there are none."""
        op, ints = self._builder.op, self._builder.ints
        if self._options.logits == "all":
            return None, None
        if self._options.logits == "indices":
            indices = _input("logits_indices", INT32, ["num_logits"])
            self._extra.append(indices)
            return indices, None
        wide = op("Cast", [self._cumulative], {"to": int(INT64)})
        starts = op("Slice", [wide, ints(0), ints(-1)])
        ends = op("Slice", [wide, ints(1), ints(1 << 30)])
        last = op("Max", [op("Sub", [ends, ints(1)]), ints(0)])
        return last, op("Unsqueeze", [op("Equal", [starts, ends]), ints(1)])

    def finish(self, outputs: list[ir.Value]) -> tuple[Pool, ...]:
        """Give the graph its new inputs and outputs."""
        graph = self._graph
        old = [value for value in graph.inputs if value.name not in graph.initializers]
        kept = [value for value in graph.inputs if value.name in graph.initializers]
        names = {value.name for value in outputs}
        for value in (*graph.outputs, *old):
            if value not in outputs:
                value.name = self._builder.unique(f"{value.name}.contiguous")
        pools = list(self._pools.values())
        for pool, _ in pools:
            updated = self._updated[pool.past]
            updated.name = pool.output
            outputs = [*outputs, updated]
        assert len(names) == len(outputs) - len(pools)
        graph.outputs.clear()
        graph.outputs.extend(outputs)
        graph.inputs.clear()
        plan = [self._tokens, self._cumulative, self._past, self._table, *self._extra]
        graph.inputs.extend([*plan, *[value for _, value in pools], *kept])
        for value in graph.inputs:
            value.name = (value.name or "").removeprefix(_PREFIX)
        return tuple(pool for pool, _ in pools)


_FLOATS = frozenset(
    [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE]
)


_PREFIX = "paged/"
"""Of the new inputs' names while the old ones are there: a size is known by its input's name."""


def _input(name: str, dtype: ir.DataType, dims: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=_PREFIX + name, type=ir.TensorType(dtype), shape=ir.Shape(dims))


def _typed(value: ir.Value, dtype: ir.DataType | None) -> None:
    if dtype is not None:
        value.dtype = dtype
