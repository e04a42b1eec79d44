"""CAC001: new keys or values written into a cache of fixed length.

Replaces
    ScatterND(past, start + arange(S), new)      index_copy, index_put, a slice that is assigned
    ScatterElements(past, start + arange(S), new, axis)
    Where(arange(L) == start, new, past)                                   for one new row
    Concat(past[:start], new, past[start + S:])
    -> TensorScatter-24(past, new, start; axis)  (start [B]: a row for each sequence)

    Transposes that put the sequence in front for ScatterND go with it. Positions modulo the
    cache's length are the operator's circular mode.

Looks for
    1. a write into a tensor that continues a past
    2. whole rows that are written
    3. rows that follow one another
    4. the number of sequences

Declines
    rows: something else than whole rows is written.
        Expected: new keys or values of every head, [B, K, S, D], into [B, K, L, D].
        Change: write whole rows: past[:, :, start:start + S] = new.
    positions: the rows cannot be shown to be neighbours. Where an input says where each row goes,
        any places are legal for ScatterND, and one new row only is sure to be one write.
        Expected: positions start, start + 1, ... that the graph itself counts, or one new row a
        run.
        Change: export with a counted position (cache_position made inside the model), or for one
        token a run.

Numerics
    The same elements. Outside of what fits (start < 0, start + S > L) ONNX Runtime's TensorScatter
    fails, as ScatterND does behind the end; ScatterND counts negative positions from the end.

Seen in
    transformers' OnnxExporter 5.23 (StaticCache); index_copy, index_put, scatter and assigned
    slices by TorchScript and dynamo, torch 2.13.

Example
    opset 20
    (int64[b,1] ids, int64 at, float[b,3,24,20] past)
    => (float[b,3,24,20] present)
    <int64[3,1] heads = {0, 1, 2}, float[37,50] table, float[50,60] wk>
    {
      x = Gather(table, ids)
      kp = MatMul(x, wk)
      k3 = Reshape(kp, [0, 0, 3, 20])
      k = Transpose<perm = [0, 2, 1, 3]>(k3)
      sl = Shape<start = 1, end = 2>(ids)
      ss = Squeeze(sl, [0])
      bl = Shape<start = 0, end = 1>(ids)
      bb = Squeeze(bl, [0])
      row = Range(0, ss, 1)
      places = Add(row, at)
      all = Range(0, 24, 1)
      here = Equal(all, at)
      hu = Unsqueeze(here, [0, 1, 3])
      present = Where(hu, k, past)
    }
    becomes
        ...
        transpose = Transpose<perm = (0, 2, 1, 3)>(k3)
        present = TensorScatter<axis = 2>(past, transpose, expand)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.cache_places import (
    Place,
    follow_when_run,
    free_inputs,
    place_of,
    unwrapped,
)
from onnxgen.analysis.cache_writes import Write, buffers_of, write_of
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute, given, is_read, producer
from onnxgen.analysis.ramps import Ramp, Term
from onnxgen.analysis.symbols import Dim
from onnxgen.analysis.views import VIEW_OPS
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rule import Declined, Rewrite, Rule


class StaticCacheWrite(Rule):
    """Anchored at the node that writes."""

    code = "CAC001"
    kind = "cache"
    anchors = frozenset({"ScatterND", "ScatterElements", "Where", "Concat"})

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        if not any(_is_cache(facts, value) for value in buffers_of(node)):
            return None
        builder.passed(1)
        write = write_of(facts, node)
        if isinstance(write, str):
            raise Declined(self, "rows", write, node)
        past_shape, new_shape = facts.shapes.of(write.past), facts.shapes.of(write.new)
        if past_shape is None or new_shape is None or len(past_shape) != len(new_shape):
            raise Declined(self, "rows", "the sizes of the new rows are not known", node)
        for axis, (size, own) in enumerate(zip(past_shape, write.order, strict=True)):
            if axis != write.axis and not facts.shapes.same(new_shape[own], size):
                reason = f"{new_shape[own]} of {size} places of axis {axis} are written"
                raise Declined(self, "rows", reason, node)
        builder.passed(2)
        place = self._place(facts, builder, write, node)
        builder.passed(3)
        layout = _layout(write, place.batch)
        start = _start(facts, builder, place, past_shape[layout[0]])
        if start is None and not place.at_zero:
            raise Declined(self, "positions", "how many sequences there are is not known", node)
        past = _transposed(facts, builder, write.past, layout)
        new = _transposed(facts, builder, write.new, tuple(write.order[axis] for axis in layout))
        attributes: dict[str, int | str] = {"axis": layout.index(write.axis)}
        if place.circular:
            attributes["mode"] = "circular"
        written = builder.op("TensorScatter", [past, new, start], attributes)
        fused = written.producer()
        assert fused is not None
        details = {
            "length": str(past_shape[write.axis]),
            "new": str(new_shape[write.order[write.axis]]),
            "mode": "circular" if place.circular else "linear",
        }
        return Rewrite(fused, _outputs(facts, builder, node, written, layout), details)

    def _place(self, facts: Facts, builder: Builder, write: Write, node: ir.Node) -> Place:
        """Where the first new row goes.

        Raises:
            Declined: the rows behind it are not shown to follow.
        """
        ramp, circular = unwrapped(facts, write), True
        if ramp is None:
            ramp, circular = write.ramp, False
        found = place_of(facts, write, ramp)
        if found is None and follow_when_run(facts, write):
            assert write.positions is not None
            index = builder.constant(np.array(0, dtype=np.int64))
            first = builder.op("Gather", [write.positions, index], {"axis": write.along})
            axes = [axis for axis in range(len(ramp.slopes)) if axis != write.along]
            sizes = facts.shapes.of(write.positions) or ()
            terms = (Term(first, 1, tuple(None if sizes[a] == 1 else a for a in axes)),)
            slopes = tuple(int(axis == write.along) for axis in range(len(ramp.slopes)))
            found, circular = place_of(facts, write, Ramp(slopes, 0, terms)), False
        if found is None:
            free = free_inputs(facts, write.positions)
            reason = (
                f"{free[0]!r} says where each new row goes, and may say any place"
                if free
                else "the new rows are not shown to be written one behind the other"
            )
            raise Declined(self, "positions", reason, node)
        return replace(found, circular=circular)


def _start(facts: Facts, builder: Builder, place: Place, sequences: Dim) -> ir.Value | None:
    """int64 [B]; None where it is zero for all, or where B is not known."""
    if place.at_zero:
        return None
    total: ir.Value | None = None
    for term in place.ramp.terms:
        value = term.source
        if value.dtype != ir.DataType.INT64:
            value = builder.op("Cast", [value], {"to": int(ir.DataType.INT64)})
        rank = facts.shapes.rank(value) or 0
        if rank > 1 or (rank == 0 and place.batch is not None):
            value = builder.op("Reshape", [value, builder.ints(-1)])
        if term.factor == -1:
            value = builder.op("Neg", [value])
        elif term.factor != 1:
            value = builder.op("Mul", [value, builder.ints(term.factor)])
        total = value if total is None else builder.op("Add", [total, value])
    if total is None:
        total = builder.ints(place.ramp.start)
    elif place.ramp.start:
        total = builder.op("Add", [total, builder.ints(place.ramp.start)])
    shape = facts.shapes.of(total)
    if place.batch is not None or (shape == (1,) and sequences == 1):
        return total
    size = builder.sizes([sequences])
    return None if size is None else builder.op("Expand", [total, size])


def _is_cache(facts: Facts, buffer: ir.Value) -> bool:
    """Whether a buffer is, or is a part of, an input that is a static cache."""
    value: ir.Value | None = buffer
    for _ in range(64):
        if value is None:
            return False
        if value.is_graph_input():
            return facts.role(value) == "static_past"
        node = producer(value)
        if node is None or node.op_type not in _PARTS:
            return False
        value = node.inputs[0]
    return False


_PARTS = VIEW_OPS | {"Slice", "Split", "Cast", "TensorScatter", "ScatterND", "ScatterElements"}


def _layout(write: Write, batch: int | None) -> tuple[int, ...]:
    """The buffer's axes as TensorScatter takes them: the sequences first, never the rows."""
    own = tuple(range(len(write.order)))
    transpose = producer(write.past, "Transpose")
    layouts = [own]
    if transpose is not None:
        order = attribute(transpose, "perm", own[::-1])
        layouts.insert(0, tuple(int(axis) for axis in np.argsort(order)))
    for layout in layouts:
        if layout[0] != write.axis and batch in (None, layout[0]):
            return layout
    first = batch if batch is not None else next(axis for axis in own if axis != write.axis)
    return (first, *(axis for axis in own if axis != first))


def _transposed(
    facts: Facts, builder: Builder, value: ir.Value, order: tuple[int, ...]
) -> ir.Value:
    """A value with its axes in this order, past the Transposes and empty Expands before it."""
    while True:
        node = producer(value, "Transpose", "Expand", "Identity")
        if node is None:
            break
        source = given(node)
        if node.op_type == "Transpose":
            inner = attribute(node, "perm", tuple(range(len(order)))[::-1])
            order = tuple(inner[axis] for axis in order)
        elif not facts.shapes.same_shape(facts.shapes.of(source), facts.shapes.of(value)):
            break
        value = source
    if order == tuple(range(len(order))):
        return value
    return builder.op("Transpose", [value], {"perm": list(order)})


def _outputs(
    facts: Facts, builder: Builder, node: ir.Node, written: ir.Value, layout: tuple[int, ...]
) -> tuple[tuple[ir.Value, ir.Value], ...]:
    """What the written buffer replaces: the node's output, and Transposes of it that it spares."""
    old = node.outputs[0]
    if layout == tuple(range(len(layout))):
        return ((old, written),)
    spared = [
        user.outputs[0]
        for user, _ in old.uses()
        if user.op_type == "Transpose" and tuple(attribute(user, "perm", ())) == layout
    ]
    outputs = [(value, written) for value in sorted(spared, key=facts.order, reverse=True)]
    if len(spared) < len(old.uses()) or old.is_graph_output() or not is_read(old):
        back = tuple(int(axis) for axis in np.argsort(layout))
        outputs.append((old, builder.op("Transpose", [written], {"perm": list(back)})))
    return tuple(outputs)
