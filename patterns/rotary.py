"""ROT001: rotary position embedding, in any arrangement of its halves or pairs.

Replaces
    y[i] = x[i] * cos[i] - x[j] * sin[i]
    y[j] = x[j] * cos[i] + x[i] * sin[i]          (Su et al., RoFormer, 2021)
    -> RotaryEmbedding-23(x, cos, sin; interleaved, rotary_embedding_dim)

    with any pairs (i, j) of R of the D lanes: halves, neighbours (interleaved), neighbours in and
    halves out (DeepSeek), real and imaginary parts; the other lanes pass. It is recognised from
    what happens to each lane (`analysis.lanes`), not from slices and concatenations. Lanes in
    another order than the operator's are moved around it. Tables stay as the model computes them:
    any scaling is exact.

Looks for
    1. a tensor whose lanes are made of lanes of another and of tables
    2. pairs of lanes, each turned by an angle of its own
    3. a type that the operator has
    4. tables that are the same for all heads
    5. a batch whose size can be computed

Declines
    lanes: x is mixed with tables as in a rotation, but its lanes make none.
        Expected: y[i] = x[i] cos - x[j] sin beside y[j] = x[j] cos + x[i] sin, for pairs of lanes.
        Change: none: another mixture is another function.
    table-layout: the tables differ from head to head.
        Expected: tables [B, S, R/2], for all heads.
        Change: none: the operator has no tables of heads.
    element-type: the operator has no such type (float64).
        Expected: float32, float16 or bfloat16.
        Change: export the model in float32.
    batch-unknown: the tables have to be repeated for a batch whose size cannot be computed.
        Expected: sizes that follow from the inputs'.
        Change: make only batch and lengths dynamic when exporting.

Numerics
    The same operations in the same precision.

Seen in
    torch.onnx.export, TorchScript and dynamo, torch 2.13; transformers' OnnxExporter 5.23.

Example
    opset 20
    (float[b,s,20] h, int64[b,s] position_ids)
    => (float[b,s,20] y)
    {
      pf = Cast<to = 1>(position_ids)
      pu = Unsqueeze(pf, [-1])
      a = Mul(pu, [1.0, 0.63, 0.4, 0.25, 0.158, 0.1, 0.063, 0.04, 0.025, 0.0158])
      aa = Concat<axis = -1>(a, a)
      c2 = Cos(aa)
      s2 = Sin(aa)
      c = Identity(c2)
      n = Identity(s2)
      lo = Slice(h, [0], [10], [-1])
      hi = Slice(h, [10], [100], [-1])
      ng = Neg(hi)
      t = Concat<axis = -1>(ng, lo)
      hc = Mul(h, c)
      ts = Mul(t, n)
      y = Add(hc, ts)
    }
    becomes
        ...
        y = RotaryEmbedding<interleaved = 0, num_heads = 1>(h, expand, expand_2)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import producer
from onnxgen.analysis.lanes import MAX_LANES, candidates, lanes
from onnxgen.analysis.rotations import Rotation, recognise, resembles
from onnxgen.analysis.symbols import Dim
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rotary_layout import (
    Layout,
    find_layout,
    picked,
    reshape,
    returned,
    shown,
    table,
    varying,
)
from onnxgen.patterns.rule import Declined, Rewrite, Rule

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class Rotary(Rule):
    """Anchored at whatever makes the rotated tensor whole: an Add, a Concat, a Reshape."""

    code = "ROT001"
    kind = "rotary"
    anchors = frozenset({"Add", "Sub", "Concat", "Reshape", "Gather", "MatMul"})

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        y = node.outputs[0]
        if not facts.is_activation(y):
            return None
        for leading, x in _over(facts, y):
            written = lanes(facts, y, x, leading)
            if written is None:
                continue
            found = recognise(facts, written, x)
            if found is not None:
                if not found.leads and _has_inner(facts, y, x, leading):
                    return None
                return _Emission(self, facts, builder, node, x, found, leading).rewrite()
            if not resembles(written, x):
                continue
            builder.passed(1)
            if node.op_type in ("Add", "Sub", "Concat"):
                if _has_inner(facts, y, x, leading):
                    return None
                reason = "it is mixed with tables as in a rotation, but its lanes make none"
                raise Declined(self, "lanes", f"{x.name!r}: {reason}", node)
        return None


def _over(facts: Facts, y: ir.Value) -> Iterator[tuple[int, ir.Value]]:
    """What y may be rotated from, with the number of axes before the lanes."""
    shape = facts.shapes.of(y)
    if shape is None or not shape or not isinstance(shape[-1], int) or shape[-1] > MAX_LANES:
        return
    options = [len(shape) - 1] if 2 <= len(shape) <= 5 and shape[-1] > 1 else []
    if 3 <= len(shape) <= 6 and 2 in shape[-2:]:
        options.append(len(shape) - 2)
    if not options:
        return
    found = candidates(facts, y)
    for leading in options:
        for x in found:
            whole = facts.shapes.of(x)
            if whole is None or len(whole) <= leading:
                continue
            # Of one rank, tables may have a batch of their own; what is reshaped keeps its own.
            if len(whole) == len(shape) or facts.shapes.same_shape(
                whole[:leading], shape[:leading]
            ):
                yield leading, x


def _has_inner(facts: Facts, y: ir.Value, x: ir.Value, leading: int) -> bool:
    """Whether a part that is joined with others is itself rotated: it is found on its own."""
    node = producer(y)
    while node is not None and node.op_type in ("Reshape", "Transpose", "Gather"):
        node = producer(node.inputs[0])
    if node is None or node.op_type != "Concat":
        return False
    for part in node.inputs:
        written = None if part is None else lanes(facts, part, x, leading)
        if written is None:
            continue
        if recognise(facts, written, x) is not None or resembles(written, x):
            return True
    return False


class _Emission:
    """The nodes for one rotation of x, whose first `leading` axes are no lanes."""

    def __init__(
        self,
        rule: Rule,
        facts: Facts,
        builder: Builder,
        node: ir.Node,
        x: ir.Value,
        rotation: Rotation,
        leading: int,
    ) -> None:
        self._rule, self._facts, self._builder, self._node = rule, facts, builder, node
        self._x, self._rotation = x, rotation
        self._leading = self._shape(x)[:leading]
        lanes_of_x = self._shape(x)[leading:]
        self._count = math.prod(size for size in lanes_of_x if isinstance(size, int))

    def rewrite(self) -> Rewrite:
        """The nodes as a rewrite.

        Raises:
            Declined: with the rule's codes.
        """
        builder, rotation, y = self._builder, self._rotation, self._node.outputs[0]
        builder.passed(2)
        if y.dtype not in _TYPES:
            raise self._declined("element-type", f"the operator has no {y.dtype}")
        builder.passed(3)
        varies = varying(self._facts, rotation.cos + rotation.sin, len(self._leading))
        layout = find_layout(self._leading, varies)
        if layout is None:
            raise self._declined("table-layout", "the tables differ from head to head")
        builder.passed(4)
        x = self._x
        if x.dtype != y.dtype:
            x = builder.op("Cast", [x], {"to": int(y.dtype)})
        x = self._known(reshape(builder, x, (*self._leading, self._count)))
        whole = rotation.leads and rotation.size + len(rotation.passing) == self._count
        if whole and (rotation.size == self._count or isinstance(layout.heads, int)):
            fused, result = self._operator(x, layout)
        else:
            fused, turned = self._operator(picked(builder, x, rotation.taken), layout)
            result = self._joined(x, turned)
        result_lanes = self._shape(y)[len(self._leading) :]
        result = self._known(reshape(builder, result, (*self._leading, *result_lanes)))
        details = {"rotary_dim": rotation.size, "interleaved": rotation.interleaved}
        return Rewrite(fused, ((y, result),), details)

    def _operator(self, x: ir.Value, layout: Layout) -> tuple[ir.Node, ir.Value]:
        """RotaryEmbedding of x [leading.., lanes], all of them or the first."""
        builder, rotation, shape = self._builder, self._rotation, self._shape(x)
        attributes: dict[str, int] = {"interleaved": int(rotation.interleaved)}
        inner = self._known(shown(builder, x, layout))
        partial = rotation.size != shape[-1]
        if partial:
            attributes["rotary_embedding_dim"] = rotation.size
        if isinstance(layout.heads, int) and (partial or len(self._shape(inner)) == 3):
            attributes["num_heads"] = layout.heads
        cos, sin = (
            self._known(table(self._facts, builder, lanes_, layout, len(self._leading)))
            for lanes_ in (rotation.cos, rotation.sin)
        )
        if rotation.sign < 0:
            sin = builder.op("Neg", [sin])
        y = builder.op("RotaryEmbedding", [inner, cos, sin], attributes)
        fused = y.producer()
        assert fused is not None
        return fused, self._known(returned(builder, y, layout, shape))

    def _joined(self, x: ir.Value, turned: ir.Value) -> ir.Value:
        """The turned lanes where they belong, with those of x that pass."""
        builder, given, passing = self._builder, self._rotation.given, self._rotation.passing
        first, stop = given[0], given[0] + len(given)
        if given == tuple(range(first, stop)):
            ends = [[lane for lane in passing if lane < first], [n for n in passing if n >= stop]]
            before, after = (
                [picked(builder, x, [passing[lane] for lane in sorted(end)])] if end else []
                for end in ends
            )
            parts = [*before, turned, *after]
            return turned if len(parts) == 1 else builder.op("Concat", parts, {"axis": -1})
        held = list(given)
        if passing:
            rest = picked(builder, x, list(passing.values()))
            turned = builder.op("Concat", [turned, rest], {"axis": -1})
            held += list(passing)
        return picked(builder, turned, [held.index(lane) for lane in range(len(held))])

    def _shape(self, value: ir.Value) -> tuple[Dim, ...]:
        shape = self._facts.shapes.of(value)
        assert shape is not None
        return shape

    def _known(self, value: ir.Value | None) -> ir.Value:
        if value is None:
            raise self._declined("batch-unknown", "the size of the batch cannot be computed")
        return value

    def _declined(self, code: str, reason: str) -> Declined:
        return Declined(self._rule, code, reason, self._node)
