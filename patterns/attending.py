"""What every attention rule ends in: the standard Attention with its cache inside.

Rules find queries, keys and values; here they are arranged and take a concatenated cache into the
node. `masking` makes the mask that the operator accepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute, names, producer
from onnxgen.analysis.symbols import Dim, product
from onnxgen.analysis.views import VIEW_OPS, Axis, Digit
from onnxgen.functions import DOMAIN, sink_attention
from onnxgen.patterns.arranging import arranged
from onnxgen.patterns.building import Builder


@dataclass(frozen=True)
class Heads:
    """An operand of a contraction as batch, heads, rows and columns.

    Attributes:
        value: the operand.
        batch: digits of the batch axis.
        heads: digits of the heads, without the repeats.
        groups: how many times each head is repeated for neighbouring query heads; 1 for queries.
        rows, columns: digits of the last two axes.
    """

    value: ir.Value
    batch: Axis
    heads: Axis
    groups: Dim
    rows: Axis
    columns: Axis

    @property
    def count(self) -> Dim:
        """How many heads there are."""
        return product(digit.size for digit in self.heads)

    def arranged(
        self, facts: Facts, builder: Builder, *, transposed: bool = False
    ) -> tuple[ir.Value, float] | None:
        """[batch, heads, rows, columns], or with the last two swapped, and the factor inside."""
        last = (self.columns, self.rows) if transposed else (self.rows, self.columns)
        return arranged(facts, builder, self.value, (self.batch, self.heads, *last))


def heads_of(
    facts: Facts,
    value: ir.Value,
    axes: Sequence[Axis],
    *,
    queries: Heads | None,
    shared: bool = True,
) -> Heads | str:
    """Read an operand's leading axes as batch and heads; the reason as text where that fails.

    Args:
        axes: those of the scores that are its product, or that it is multiplied by, as digits of
            the queries' axes: an operand of size 1 is repeated along them.
        queries: the queries' own heads; None for the queries themselves.
        shared: take repeated heads as they were before they were repeated.
    """
    view = facts.views.of(value)
    if view is None or len(view.axes) < 2:
        return "its rank is not known"
    like = axes[:-2]
    leading: list[Axis] = [()] * (len(like) - len(view.axes) + 2) + list(view.axes[:-2])
    if queries is not None:
        for index, (axis, wanted) in enumerate(zip(leading, like, strict=True)):
            size = product(digit.size for digit in wanted)
            if not axis and size != 1:
                if not shared:
                    return "its heads are repeated by the product alone"
                leading[index] = (Digit(None, 1, size),)
    batch: Axis = leading[0] if leading else ()
    rest: Axis = ()
    if queries is None and len(leading) == 1:
        # [B*H, S, D]: heads come from the axis that the columns come from, or stand behind.
        inner = {digit.axis for digit in view.axes[-1]}
        count = 0 if all(digit.axis in inner for digit in batch) else 1
        batch, rest = batch[:count], batch[count:]
    elif queries is not None and like and like[0] != queries.batch:
        count = len(queries.batch)
        if like[0][:count] != queries.batch:
            return "its batch is not the queries'"
        batch, rest = batch[:count], batch[count:]
    heads = [*rest, *(digit for axis in leading[1:] for digit in axis)]
    groups: Dim = 1
    while shared and heads and heads[-1].repeats:
        groups = groups * heads.pop().size
    inside = heads if shared else ()
    if any(digit.repeats for digit in (*batch, *inside, *view.axes[-1], *view.axes[-2])):
        return "its repeated heads are not neighbours, or more than heads are repeated"
    return Heads(value, batch, tuple(heads), groups, view.axes[-2], view.axes[-1])


@dataclass(frozen=True)
class Cache:
    """A concatenated cache: total = Concat(past, new) along the sequence.

    Attributes:
        total: the concatenation, [B, K, P+S, D] after `order`.
        past, new: its parts.
        order: the permutation from the concatenation's axes to [B, K, T, D].
    """

    total: ir.Value
    past: ir.Value
    new: ir.Value
    order: tuple[int, ...]


def cache_of(facts: Facts, value: ir.Value) -> Cache | None:
    """The cache that a [B, K, T, D] tensor is the concatenation of, else None."""
    order = (0, 1, 2, 3)
    transpose = producer(value, "Transpose")
    total: ir.Value | None = value
    if transpose is not None:
        order = tuple(attribute(transpose, "perm", (3, 2, 1, 0)))
        total = transpose.inputs[0]
    node = producer(total, "Concat")
    if node is None or total is None or len(node.inputs) != 2 or len(order) != 4:
        return None
    past, new = node.inputs
    if past is None or new is None or attribute(node, "axis") % 4 != order[2]:
        return None
    if facts.shapes.rank(total) != 4:
        return None
    return Cache(total, past, new, order)


def caches_of(
    facts: Facts, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None
) -> tuple[tuple[Cache, Cache] | None, str]:
    """The caches that an Attention over these takes inside, if it can, and what its cache is.

    "concatenated": inside; "static": its keys and values are buffers that TensorScatter writes;
    "shared": the queries need the concatenation, which an earlier layer takes inside; "outside":
    keys and values are made of a cache in another way, nobody reads what they are joined to, or the
    mask is made of keys and could not wait for the node's own present; "none".
    """
    keys, values = cache_of(facts, k), cache_of(facts, v)
    if keys is not None and values is not None:
        totals = (keys.total, values.total)
        if any(_reaches(facts, total, q) for total in totals):
            return None, "shared"
        if mask is not None and any(_reaches(facts, total, mask) for total in totals):
            return None, "outside"
        # Runtimes take a past from the node only where they give a present, which is read.
        if any(len(list(t.uses())) < 2 and not t.is_graph_output() for t in totals):
            return None, "outside"
        return (keys, values), "concatenated"
    views = [facts.views.of(each) for each in (k, v)]
    sources = [None if view is None else producer(view.source) for view in views]
    if all(source is not None and source.op_type == "TensorScatter" for source in sources):
        return None, "static"
    if all(source is not None and source.op_type == "Attention" for source in sources):
        return None, "shared"
    return None, "outside" if _from_cache(facts, k) or _from_cache(facts, v) else "none"


def _from_cache(facts: Facts, value: ir.Value) -> bool:
    """Whether a value is joined, written or cut from an input that is a cache."""
    pending, seen = [value], set()
    while pending:
        each = pending.pop()
        if facts.role(each) in ("past", "static_past"):
            return True
        node = producer(each)
        if node is not None and node.op_type in _CARRYING and node not in seen:
            seen.add(node)
            pending.extend(given for given in node.inputs[:3] if given is not None)
    return False


_CARRYING = VIEW_OPS | names(
    """
    Cast Concat DequantizeLinear QuantizeLinear ScatterElements ScatterND Slice Split TensorScatter
    Where
    """
)


def _reaches(facts: Facts, value: ir.Value, later: ir.Value) -> bool:
    """Whether a value is needed to compute another."""
    first = facts.order(value)
    pending, seen = [later], set()
    while pending:
        each = pending.pop()
        if each is value:
            return True
        node = each.producer()
        # A node that is not placed yet has no order: it is looked through.
        if node is not None and node not in seen and not 0 <= facts.order(each) < first:
            seen.add(node)
            pending.extend(given for given in node.inputs if given is not None)
    return False


def permuted(builder: Builder, value: ir.Value, order: tuple[int, ...]) -> ir.Value:
    if order == (0, 1, 2, 3):
        return value
    return builder.op("Transpose", [value], {"perm": list(order)})


def attention(
    builder: Builder,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    mask: ir.Value | None,
    caches: tuple[Cache, Cache] | None,
    attributes: dict[str, int | float],
    sinks: ir.Value | None = None,
) -> tuple[ir.Node, ir.Value, list[tuple[ir.Value, ir.Value]]]:
    """The Attention node, its output [B, H, S, D], and (old, new) for the caches it takes over.

    Args:
        sinks: [H]: then it is a SinkAttention.
    """
    inputs: list[ir.Value | None] = [q, k, v, mask]
    if caches is not None:
        (keys, values) = caches
        inputs = [
            q,
            permuted(builder, keys.new, keys.order),
            permuted(builder, values.new, values.order),
            mask,
            permuted(builder, keys.past, keys.order),
            permuted(builder, values.past, values.order),
        ]
    made = attended(builder, inputs, attributes, sinks)
    node = made[0].producer()
    assert node is not None
    replaced = []
    for cache, present in zip(caches or (), made[1:], strict=True):
        back = tuple(int(axis) for axis in np.argsort(cache.order))
        replaced.append((cache.total, permuted(builder, present, back)))
    return node, made[0], replaced


def attended(
    builder: Builder,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, int | float],
    sinks: ir.Value | None = None,
) -> Sequence[ir.Value]:
    """The outputs of an Attention: [B, H, S, D], and the presents where there is a past.

    Args:
        inputs: q, k, v, mask?, past_key?, past_value?.
        sinks: [H]: then it is a SinkAttention, which knows no is_causal.
    """
    cache = len(inputs) > 4 and inputs[4] is not None
    count = 3 if cache else 1
    if sinks is None:
        return builder.ops("Attention", inputs, count, attributes)
    attributes = dict(attributes)
    precision = attributes.pop("softmax_precision", None)
    mask = inputs[3] if len(inputs) > 3 else None
    overload = sink_attention.overload_of(
        None if mask is None else mask.dtype,
        cache=cache,
        cap="softcap" in attributes,
        wide=precision is not None,
    )
    inputs = [*inputs, *[None] * (sink_attention.SINKS - len(inputs)), sinks]
    return builder.ops(
        sink_attention.NAME, inputs, count, attributes, domain=DOMAIN, overload=overload
    )
