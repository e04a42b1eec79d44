"""ROT001: rotary position embedding, in any arrangement of its halves or pairs.

Replaces
    y[i] = x[i] * cos[i] - x[j] * sin[i]
    y[j] = x[j] * cos[i] + x[i] * sin[i]          (Su et al., RoFormer, 2021)
    -> RotaryEmbedding-23(x, cos, sin; interleaved, rotary_embedding_dim)

    with j = i + R/2 (halves) or j = i + 1 (pairs, interleaved), over the first R of D lanes; the
    lanes behind R pass. It is recognised from what happens to each lane (`analysis.lanes`), not
    from slices and concatenations. Tables stay as the model computes them: any scaling is exact.

Declines
    table-layout: the tables differ from head to head, or are not made of whole lanes.
    batch-unknown: the tables have to be repeated for a batch whose size cannot be computed.

Numerics
    The same operations in the same precision.

Seen in
    torch.onnx.export, TorchScript and dynamo, torch 2.13; transformers' OnnxExporter 5.23.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.lanes import Form, Lane, Lanes, candidates, lanes
from onnxgen.analysis.rotary_tables import Tables
from onnxgen.patterns.arranging import arranged
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rule import Declined, Rewrite, Rule


@dataclass(frozen=True)
class Rotation:
    """What the lanes showed: `cos` and `sin` hold a lane of a table for each of R/2 pairs."""

    size: int
    interleaved: bool
    cos: tuple[Lane, ...]
    sin: tuple[Lane, ...]
    sign: float


class Rotary(Rule):
    """Anchored at whatever makes the rotated tensor whole: an Add, a Concat, a Reshape."""

    code = "ROT001"
    kind = "rotary"
    anchors = frozenset({"Add", "Sub", "Concat", "Reshape"})

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        y = node.outputs[0]
        shape = facts.shapes.of(y)
        if shape is None or len(shape) not in (3, 4) or not facts.is_activation(y):
            return None
        if not isinstance(shape[-1], int) or shape[-1] < 2 or shape[-1] > 1024:
            return None
        for x in candidates(facts, y):
            if facts.shapes.rank(x) != len(shape):
                continue
            written = lanes(facts, y, x)
            rotation = None if written is None else recognise(facts, written, x)
            if rotation is not None:
                return self._emit(facts, builder, node, x, rotation)
        return None

    def _emit(
        self, facts: Facts, builder: Builder, node: ir.Node, x: ir.Value, rotation: Rotation
    ) -> Rewrite:
        y, shape = node.outputs[0], facts.shapes.of(x)
        assert shape is not None
        head = self._head_axis(facts, node, rotation, len(shape), shape[1] == 1)
        order = [0, 2, 1, 3]
        inner = builder.op("Transpose", [x], {"perm": order}) if head == 2 else x
        attributes: dict[str, int] = {"interleaved": int(rotation.interleaved)}
        heads = 1 if head is None else shape[head]
        if rotation.size != shape[-1]:
            attributes["rotary_embedding_dim"] = rotation.size
        if isinstance(heads, int) and (head is None or rotation.size != shape[-1]):
            attributes["num_heads"] = heads
        batch, new = shape[0], shape[1] if head in (None, 2) else shape[2]
        tables = [
            self._table(facts, builder, node, table, head, (batch, new), sign)
            for table, sign in ((rotation.cos, 1.0), (rotation.sin, rotation.sign))
        ]
        rotated = builder.op("RotaryEmbedding", [inner, *tables], attributes)
        fused = rotated.producer()
        assert fused is not None
        if head == 2:
            rotated = builder.op("Transpose", [rotated], {"perm": order})
        details = {"rotary_dim": rotation.size, "interleaved": rotation.interleaved}
        return Rewrite(fused, ((y, rotated),), details)

    def _head_axis(
        self, facts: Facts, node: ir.Node, rotation: Rotation, rank: int, one_new: bool
    ) -> int | None:
        """The axis of x that the tables do not vary along; None for x without heads."""
        if rank == 3:
            return None
        varies = {1: False, 2: False}
        for value in {lane[0] for lane in (*rotation.cos, *rotation.sin)}:
            shape = facts.shapes.of(value)
            assert shape is not None
            for axis in varies:
                position = axis - rank + len(shape)
                varies[axis] |= position >= 0 and shape[position] != 1
        if all(varies.values()):
            raise Declined(self, "table-layout", "the tables differ from head to head", node)
        if not any(varies.values()):  # one new token: either axis will do
            return 2 if one_new else 1
        return 2 if varies[1] else 1

    def _table(
        self,
        facts: Facts,
        builder: Builder,
        node: ir.Node,
        table: tuple[Lane, ...],
        head: int | None,
        rows: tuple[object, object],
        sign: float,
    ) -> ir.Value:
        """The table's lanes as [B, S, R/2]."""
        value = table[0][0]
        indices = [index for _, index in table]
        if any(lane[0] is not value for lane in table):
            raise Declined(self, "table-layout", "a table is made of several tensors", node)
        result = self._rows(facts, builder, value, head)
        shape = facts.shapes.of(result)
        assert shape is not None
        step = indices[1] - indices[0] if len(indices) > 1 else 1
        stop = indices[0] + step * len(indices)
        if step < 1 or indices != list(range(indices[0], stop, step)):
            result = builder.op("Gather", [result, builder.ints(*indices)], {"axis": -1})
        elif len(indices) != shape[-1]:
            bounds = (indices[0], stop, -1, step)
            result = builder.op("Slice", [result, *(builder.ints(n) for n in bounds)])
        if sign < 0:
            result = builder.op("Neg", [result])
        wanted = (*rows, len(indices))
        # The operator does not broadcast, and position_ids of batch 1 are legal: `tidy` takes the
        # Expand out again where the sizes are equal whatever is fed.
        target = builder.sizes(wanted)  # type: ignore[arg-type]
        if target is None:
            raise Declined(self, "batch-unknown", "the size of the batch cannot be computed", node)
        return builder.op("Expand", [result, target])

    def _rows(self, facts: Facts, builder: Builder, table: ir.Value, head: int | None) -> ir.Value:
        """The table without its axis of heads, as [B, S, lanes] or with sizes of 1."""
        view = facts.views.of(table)
        assert view is not None
        axes = list(view.axes)
        if head is not None and len(axes) > 4 - head:
            del axes[head - 4]
        axes = [()] * (3 - len(axes)) + axes
        found = arranged(facts, builder, table, tuple(axes))
        if found is not None and found[1] == view.scale:
            return found[0]
        result = table
        if head is not None and len(view.axes) > 4 - head:
            result = builder.op("Squeeze", [result, builder.ints(head - 4)])
        missing = 3 - (facts.shapes.rank(result) or 3)
        if missing > 0:
            result = builder.op("Unsqueeze", [result, builder.ints(*range(missing))])
        return result


def recognise(facts: Facts, written: Lanes, x: ir.Value) -> Rotation | None:
    """The rotation that the lanes of y describe; None where they are no rotation."""
    if written.ndim != 1:
        return None
    count = written.size
    size = next((i for i in range(count) if set(written[i]) == {((x, i),)}), count)
    if size < 2 or size % 2:
        return None
    if any(dict(written[i]) != {((x, i),): 1.0} for i in range(size, count)):
        return None
    half = size // 2
    tables = Tables(facts)
    for interleaved in (False, True):
        pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
        found = [_pair(tables, written[i], written[j], x, i, j) for i, j in pairs]
        if all(each is not None for each in found):
            known = [each for each in found if each is not None]
            signs = {sign for _, _, sign in known}
            if len(signs) == 1:
                cos, sin = tuple(c for c, _, _ in known), tuple(s for _, s, _ in known)
                return Rotation(size, interleaved, cos, sin, signs.pop())
    return None


def _pair(
    tables: Tables, first: Form, second: Form, x: ir.Value, i: int, j: int
) -> tuple[Lane, Lane, float] | None:
    """(cos, sin, sign) where x[i] and x[j] are rotated by them; sign -1 turns the other way."""
    a, b = _terms(first, x), _terms(second, x)
    if set(a) != {i, j} or set(b) != {i, j}:
        return None
    (cos, cos_sign), (sin, sin_sign) = a[i], a[j]
    (other_cos, other_cos_sign), (other_sin, other_sin_sign) = b[j], b[i]
    if cos_sign != 1.0 or other_cos_sign != 1.0:
        return None
    if (sin_sign, other_sin_sign) not in ((-1.0, 1.0), (1.0, -1.0)):
        return None
    if not tables.same(cos, other_cos) or not tables.same(sin, other_sin):
        return None
    return cos, sin, other_sin_sign


def _terms(form: Form, x: ir.Value) -> dict[int, tuple[Lane, float]]:
    """For a sum of x[i] * table: lane of x -> (lane of the table, factor); {} for any other."""
    result: dict[int, tuple[Lane, float]] = {}
    for term, factor in form.items():
        of_x = [index for value, index in term if value is x]
        rest = [lane for lane in term if lane[0] is not x]
        if len(of_x) != 1 or len(rest) != 1 or of_x[0] in result:
            return {}
        result[of_x[0]] = (rest[0], factor)
    return result
