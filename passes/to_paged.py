"""PAG: a raised decoder's caches become pools of blocks, its batch one row of packed tokens.

    ids [B,S], masks, positions, caches [B,K,P,D]   ->   ids [N], lengths, block_table, pools

    new inputs -> plan of the run -> each attention over pools -> positions (`paged_positions`)
    -> logits (`paged_logits`) -> old inputs and outputs out

The tokens of all sequences stand behind one another in one row: the model sees a batch of one and
a sequence of N. Nothing between the embedding and the logits has to know; only attention, which
alone looks at other tokens, and the positions do.

Declines
    PAG001: the model is paged already.
        Expected: a decoder with caches of its own.
        Change: none needed.
    PAG002: the model has no attention over a cache.
        Expected: past keys and values as inputs, and present ones as outputs.
        Change: export with use_cache=True, past and present.
    PAG003: an attention was not raised, its scores are an output, or its sizes are not known.
        Expected: every attention as the standard's Attention, of fixed heads and head size.
        Change: `onnxgen explain MODEL` says why it was not raised.
    PAG004: a mask is of no family that can be paged.
        Expected: causal, a window, chunks or ALiBi, and padding.
        Change: export a causal decoder, with an attention mask of zeros and ones.
    PAG005: something else than attention mixes tokens, or a cache is read by no attention.
        Expected: tokens that meet in attention alone.
        Change: none: convolutions over tokens and recurrent states have no pages.
    PAG006: an input holds no tokens of the sequence, such as an encoder's states.
        Expected: a decoder without cross-attention.
        Change: none yet: the decoder of an encoder and decoder is not paged.
    PAG007: tokens come in by no input, or by several.
        Expected: one input that holds tokens: ids, or their embeddings.
        Change: --role NAME=tokens says which input they are.
    PAG008: something depends on a token's place in the run, and not in its sequence.
        Expected: positions that are counted from lengths, or read from an input.
        Change: export with position_ids as an input, or computed inside from the mask.
    PAG009: no output has a row for each token.
        Expected: logits [B, S, V].
        Change: export without num_logits_to_keep; --logits last takes the last row afterwards.
    PAG010: the model takes a fixed number of new tokens.
        Expected: one new token, or as many as a run brings.
        Change: export with a dynamic sequence length.
    PAG011: com.microsoft::PagedAttention has no such form: head sizes that are no multiple of 8,
        values of another size than keys, masks with slopes or chunks, layers that read another's
        pools, blocks of less than 16 slots.
        Expected: what the operator takes.
        Change: --flavor portable has no such limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxgen import functions
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.masks import MaskFamily
from onnxgen.analysis.mixing import lengths_as_numbers
from onnxgen.analysis.paging import PagedLayer, UnpageableError, paged_layers
from onnxgen.analysis.roles import Roles
from onnxgen.analysis.sampling import Sampler
from onnxgen.passes.paged_layers import PREFIX, Layers, PagedInputs, new_input, typed
from onnxgen.passes.paged_logits import last_projection, row_outputs
from onnxgen.passes.paged_positions import TokenLengths, page_positions
from onnxgen.passes.tidy import tidy
from onnxgen.patterns.building import Builder
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
    rows, dropped = row_outputs(facts, roles)
    names = [str(value.name) for value in rows]
    writer = _Writer(facts, rows, options)
    projection = last_projection(facts, rows[0]) if options.logits != "all" else None
    writer.attend(layers)
    writer.splice()
    writer.position()
    answers = writer.answer(names, projection)
    pools = writer.finish(answers)
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
        tuple((name, str(y.name)) for name, y in zip(names, answers, strict=True)),
        writer.switches,
        tuple(dropped),
    )


class _Writer:
    """Writes the paged graph around the old one's layers."""

    def __init__(self, facts: Facts, rows: Sequence[ir.Value], options: PagedOptions) -> None:
        self._rows = list(rows)
        self._graph = facts.graph
        self._facts = facts
        self._options = options
        self._builder = Builder(facts.graph, facts.shapes)
        self._old_tokens = self._find_tokens()
        self._inputs = PagedInputs.made(
            self._builder, self._old_tokens, self._token_axis(), options
        )
        self._layers = Layers(facts, self._builder, self._inputs, options)
        self._extra: list[ir.Value] = []
        self.switches = False
        self.tokens_name = _final(self._inputs.tokens)

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

    def attend(self, layers: Sequence[PagedLayer]) -> None:
        """Put attentions over pools in the place of those over caches."""
        for layer in layers:
            self._layers.attend(layer)

    def splice(self) -> None:
        """Put the new nodes into the graph, and what they make in the old values' place."""
        self._splice(self._layers.replaced)

    def _splice(self, replaced: Sequence[tuple[ir.Value, ir.Value]]) -> None:
        for old, new in replaced:
            self._rows = [new if row is old else row for row in self._rows]
            # What is computed keeps its name, as in `passes.rewriting`.
            old.name, new.name = f"{old.name}:contiguous", old.name
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        nodes = self._builder.take()
        self._graph.extend(nodes)
        for node in nodes:
            self._facts.added(node, len(self._graph))

    def position(self) -> None:
        """Make positions and lengths the packed tokens' own, and the tokens the new ones."""
        given = self._inputs
        count = self._builder.op("Shape", [given.tokens], {"start": 0, "end": 1})
        longest = self._layers.longest()
        tokens = TokenLengths(given.positions, given.totals, count, longest, given.axis)
        replaced, self.switches = page_positions(self._facts, self._builder, self._rows, tokens)
        self._splice(replaced)
        obstacles = lengths_as_numbers(self._rows, [longest])
        if obstacles:
            raise UnpageableError(obstacles)
        ir.convenience.replace_all_uses_with(self._old_tokens, given.row)

    def answer(self, names: Sequence[str], projection: ir.Node | None) -> list[ir.Value]:
        """The outputs: scores of the wanted rows, then whatever else has a row for each token.

        Args:
            names: of the original's outputs.
        """
        op, ints, options = self._builder.op, self._builder.ints, self._options
        count = {"all": "num_tokens", "last": "batch_size", "indices": "num_logits"}[options.logits]
        outputs: list[ir.Value] = []
        for index, y in enumerate(self._rows):
            name = "logits" if index == 0 else names[index]
            width = self._facts.shapes.of(y)
            chosen, empty = (None, None)
            if index == 0:
                chosen, empty = self._chosen()
            if chosen is not None and projection is not None:
                states = projection.inputs[0]
                projection.replace_input_with(
                    0, op("Gather", [states, chosen], {"axis": self._inputs.axis})
                )
            elif chosen is not None:
                y = op("Gather", [y, chosen], {"axis": self._inputs.axis})
            last = width[-1] if width else None
            size = last if isinstance(last, int) else -1
            new = op("Squeeze", [y, ints(1 - self._inputs.axis)])
            if empty is not None:
                zero = op("CastLike", [self._builder.constant(np.array(0, np.float32)), new])
                new = op("Where", [empty, zero, new])
            y.name = self._builder.unique(f"{name}.rows")
            new.name = name
            typed(new, y.dtype)
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
            indices = new_input("logits_indices", INT32, ["num_logits"])
            self._extra.append(indices)
            return indices, None
        wide = op("Cast", [self._inputs.cumulative], {"to": int(INT64)})
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
        pools = list(self._layers.pools.values())
        for pool, _ in pools:
            updated = self._layers.updated[pool.past]
            updated.name = pool.output
            outputs = [*outputs, updated]
        assert len(names) == len(outputs) - len(pools)
        graph.outputs.clear()
        graph.outputs.extend(outputs)
        graph.inputs.clear()
        plan = [*self._inputs.given, *self._extra]
        graph.inputs.extend([*plan, *[value for _, value in pools], *kept])
        for value in graph.inputs:
            value.name = _final(value)
        return tuple(pool for pool, _ in pools)


def _final(value: ir.Value) -> str:
    return (value.name or "").removeprefix(PREFIX)
