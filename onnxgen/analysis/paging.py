"""What of a raised model can be paged: its attentions and their caches, or what stands in the way.

    layers = paged_layers(facts, families)         raises Unpageable with every reason found

A model pages where every token depends on other tokens through attention only, and every attention
reads what a cache holds, as far as a mask of a known family lets it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.edges import COMPARISONS
from onnxgen.analysis.evaluate import sorted_nodes
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import FLOATS, ancestors, attribute, constant, names
from onnxgen.analysis.masks import MaskFamily
from onnxgen.analysis.reads import SIZES, reads_of
from onnxgen.analysis.roles import CachePair
from onnxgen.functions import DOMAIN
from onnxgen.report.values import Obstacle

# What one token knows of another by none of our means: recurrent, convolved, pooled.
_COUPLING = frozenset(
    [
        "Conv",
        "ConvInteger",
        "ConvTranspose",
        "QLinearConv",
        "LSTM",
        "GRU",
        "RNN",
        "Scan",
        "Loop",
        "If",
    ]
) | frozenset(
    ["LinearAttention", "CausalConvWithState", "AveragePool", "MaxPool", "GlobalAveragePool"]
)
# An operand that is made by one of these has seen other tokens than its own.
_CONTEXT_BOUND = frozenset(["Attention", "SinkAttention", "Softmax", "TensorScatter"])
_JOINING = names(
    """
    ArgMax ArgMin CumSum ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean
    ReduceMin ReduceProd ReduceSum ReduceSumSquare Softmax LogSoftmax TopK
    """
)
# What lengths may become and still be lengths.
_COUNTING = names(
    """
    Add Cast Concat Div Gather Identity Max Min Mod Mul Neg Reshape ScatterND Slice Squeeze Sub
    Unsqueeze
    """
)
_MOST_STEPS = 8  # from an attention back to its cache
_FAMILIES = ("causal", "window", "chunked")
_ATTENTIONS = ("Attention", "SinkAttention")


class UnpageableError(Exception):
    """A model cannot be paged; carries every obstacle that was seen."""

    def __init__(self, obstacles: Sequence[Obstacle]) -> None:
        super().__init__("; ".join(each.reason for each in obstacles))
        self.obstacles = tuple(obstacles)


@dataclass(frozen=True)
class CacheUse:
    """A cache that keys and values are computed from, at every step anew (MLA's latents).

    Attributes:
        pair: the cache.
        new: what is put behind it, of its axes.
        whole: past and new.
        axes: its letters, such as ("B", "K", "P", "D").
        heads, size: K and D.
    """

    pair: CachePair
    new: ir.Value
    whole: ir.Value
    axes: tuple[str, ...]
    heads: int
    size: int


@dataclass(frozen=True)
class PagedLayer:
    """One attention over a cache.

    Attributes:
        node: the Attention or SinkAttention.
        q: [B, H, S, D].
        key, value: the new ones, [B, K, S, D] and [B, K, S, Dv]; None where another layer's are read.
        caches: the pairs of the keys and of the values; of computed ones all they come from.
        heads, kv_heads, size, width: H, K, D and Dv.
        family: what its mask means.
        sinks: [H], or None.
        computed: what keys and values are computed from; empty where they are a cache's own.
    """

    node: ir.Node
    q: ir.Value
    key: ir.Value | None
    value: ir.Value | None
    caches: tuple[CachePair, ...]
    heads: int
    kv_heads: int
    size: int
    width: int
    family: MaskFamily
    sinks: ir.Value | None = None
    computed: tuple[CacheUse, ...] = ()


def paged_layers(facts: Facts, families: Mapping[str, MaskFamily]) -> list[PagedLayer]:
    """Every attention of a raised graph, in graph order.

    Args:
        families: what the mask of each attention means, by node name.

    Raises:
        UnpageableError: something stands in the way.
    """
    obstacles: list[Obstacle] = []
    layers: list[PagedLayer] = []
    for node in facts.graph:
        name = node.name or node.op_type
        if node.op_type == "PagedAttention":
            raise UnpageableError([Obstacle("PAG001", "the model is paged already", name)])
        if node.op_type in _ATTENTIONS and node.domain in ("", "ai.onnx", "onnxgen"):
            found = _layer(facts, node, families.get(node.name or ""))
            if isinstance(found, Obstacle):
                obstacles.append(found)
            else:
                layers.append(found)
        elif (
            node.op_type in _COUPLING and any(map(facts.is_activation, node.outputs))
        ) or _along_tokens(facts, node):
            reason = f"{node.op_type} mixes tokens outside attention"
            obstacles.append(Obstacle("PAG005", reason, name))
        elif node.op_type == "Softmax" and _is_attention(facts, node):
            obstacles.append(Obstacle("PAG003", "an attention was not raised", name))
        elif node.domain == "com.microsoft" and "Attention" in node.op_type:
            obstacles.append(Obstacle("PAG003", f"{node.op_type} was not raised", name))
    held = {pair.past for layer in layers for pair in layer.caches}
    for pair in facts.roles.pairs:
        if pair.past not in held and not obstacles:
            reason = f"cache {pair.past!r} is read by no attention"
            obstacles.append(Obstacle("PAG005", reason, pair.past))
    for each in facts.roles.inputs.values():
        if each.role in ("cross_past", "encoder_states", "pixels", "features"):
            reason = f"input {each.name!r} ({each.role}) holds no tokens of the sequence"
            obstacles.append(Obstacle("PAG006", reason, each.name))
    if not layers and not obstacles:
        obstacles.append(Obstacle("PAG002", "the model has no attention over a cache"))
    if obstacles:
        raise UnpageableError(obstacles)
    return layers


def _along_tokens(facts: Facts, node: ir.Node) -> bool:
    """Whether states are summed up, or chosen from, along the axis of the tokens.

    Whole numbers may be: how tokens are sent to experts is counted so.
    """
    value = node.inputs[0] if node.inputs else None
    tokens = [v for v in facts.graph.inputs if facts.role(v) in ("ids", "embeds")]
    if node.op_type not in _JOINING or value is None or not tokens or value.dtype not in FLOATS:
        return False
    shape, rows = facts.shapes.of(value), facts.shapes.of(tokens[0])
    if shape is None or rows is None or len(rows) < 2:
        return False
    given = node.inputs[1] if len(node.inputs) > 1 and node.op_type != "TopK" else None
    axes = constant(given) if given is not None else attribute(node, "axes")
    if axes is None:
        default = 0 if node.op_type in ("ArgMax", "ArgMin") else -1
        every = node.op_type.startswith("Reduce") and "axis" not in node.attributes
        axes = range(len(shape)) if every else [attribute(node, "axis", default)]
    along = any(facts.shapes.same(shape[int(axis)], rows[1]) for axis in np.ravel(list(axes)))
    return along and tokens[0] in reads_of(value).inputs


def lengths_as_numbers(outputs: Sequence[ir.Value], lengths: Sequence[ir.Value]) -> list[Obstacle]:
    """Where a length is more than a size: a number that others are scaled by, or compared with.

    Among packed tokens there is no one length: sizes may be as large as the longest sequence asks
    for, numbers may not. What counts up to a length tells the tokens of the run apart, and may do no
    more.

    Args:
        outputs: of the paged graph.
        lengths: what stands for lengths in it; the results of Shape and Size do too.
    """
    nodes = list(ancestors(outputs, frozenset()))
    numbers, places = set(lengths), set[ir.Value]()
    obstacles = []
    for node in sorted_nodes(nodes):
        if node.op_type in ("Shape", "Size"):
            numbers.update(node.outputs)
            continue
        if node.op_type == "Range" and any(value in numbers for value in node.inputs):
            places.update(node.outputs)
            continue
        if any(value in places for value in node.inputs):
            if _takes_place(node, places):
                reason = f"{node.op_type} takes a place in the run for one in its sequence"
                obstacles.append(Obstacle("PAG008", reason, node.name or ""))
            elif node.op_type in _COUNTING:
                places.update(node.outputs)
            continue
        sizes = SIZES.get(node.op_type, ())
        used = [i for i, v in enumerate(node.inputs) if v in numbers and i not in sizes]
        if not used or node.domain == DOMAIN:
            continue
        if node.op_type in _COUNTING and not _is_real(node):
            numbers.update(node.outputs)
        else:
            reason = f"{node.op_type} takes a length for more than a size"
            obstacles.append(Obstacle("PAG008", reason, node.name or ""))
    return obstacles


def _takes_place(node: ir.Node, places: set[ir.Value]) -> bool:
    """Whether what counts the tokens of a run is more than the index of a token's own row: a
    number, something compared with another, or a row of a table of the model's.
    """
    if node.op_type in ("Gather", "GatherND", "GatherElements"):
        table = node.inputs[0]
        constant_table = table is not None and table.const_value is not None
        return constant_table and node.inputs[1] in places
    return node.op_type in COMPARISONS or (node.op_type == "Cast" and _is_real(node))


def _is_real(node: ir.Node) -> bool:
    """Whether a node makes real numbers."""
    dtype = node.outputs[0].dtype
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int()).is_floating_point()
    return dtype is not None and dtype.is_floating_point()


def _layer(facts: Facts, node: ir.Node, family: MaskFamily | None) -> PagedLayer | Obstacle:
    name = node.name or node.op_type
    inputs = [*node.inputs, *[None] * (7 - len(node.inputs))]
    q, k, v, _, past_key, past_value, last = inputs[:7]
    assert q is not None
    shapes = [facts.shapes.of(each) for each in (q, k, v)]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return Obstacle("PAG003", "queries, keys and values do not have four axes", name)
    (_, heads, new, size), (_, kv_heads, _, _), (_, _, _, width) = shapes  # type: ignore[misc]
    fixed = [each for each in (heads, kv_heads, size, width) if isinstance(each, int)]
    if len(fixed) < 4:
        return Obstacle("PAG003", "heads and head sizes are not fixed", name)
    if past_key is not None:
        key, value = k, v
        pairs = [_cache(facts, each) for each in (past_key, past_value)]
    else:
        (key, key_pair), (value, value_pair) = _held(facts, k), _held(facts, v)
        pairs = [key_pair, value_pair]
    computed: tuple[CacheUse, ...] = ()
    if pairs[0] is None or pairs[1] is None:
        key, value = None, None
        computed = _computed(facts, k, v)
        pairs = [use.pair for use in computed]
    if not pairs or None in pairs:
        if not facts.roles.pairs:
            return Obstacle("PAG002", "it continues no cache: the model has no past", name)
        return Obstacle("PAG006", "it reads keys that are no cache's, such as an encoder's", name)
    if family is None or family.kind == "general":
        why = family.reason if family is not None else "it was not read"
        return Obstacle("PAG004", f"its mask is of no family that can be paged: {why}", name)
    one = family.kind == "full" and (new == 1 or facts.roles.fixed.get("S") == 1)
    if family.kind not in _FAMILIES and not one:
        reason = f"its mask is {family}: tokens see tokens that come after them"
        return Obstacle("PAG004", reason, name)
    if node.op_type == "Attention" and attribute(node, "qk_matmul_output_mode", 0):
        return Obstacle("PAG003", "the scores are an output", name)
    return PagedLayer(
        node,
        q,
        key,
        value,
        tuple(pair for pair in pairs if pair is not None),
        fixed[0],
        fixed[1],
        fixed[2],
        fixed[3],
        family,
        last if node.op_type == "SinkAttention" else None,
        computed,
    )


def _cache(facts: Facts, value: ir.Value | None) -> CachePair | None:
    """The pair whose past a value is: seen as it may be, cropped, or with places to spare."""
    for _ in range(_MOST_STEPS):
        view = None if value is None else facts.views.of(value)
        if view is None:
            return None
        if view.source.is_graph_input():
            return facts.roles.pair_of(view.source.name or "")
        node = view.source.producer()
        if node is None or node.op_type not in ("Slice", "Concat"):
            return None
        data = node.inputs[:1] if node.op_type == "Slice" else node.inputs
        real = [each for each in data if each is not None and facts.is_activation(each)]
        if len(real) != 1:
            return None
        (value,) = real
    return None


def _held(facts: Facts, value: ir.Value | None) -> tuple[ir.Value | None, CachePair | None]:
    """The new keys that a static cache is given, and the pair; only the pair of another layer's."""
    view = None if value is None else facts.views.of(value)
    if view is None:
        return None, None
    node = view.source.producer()
    if node is not None and node.op_type == "TensorScatter":
        return node.inputs[1], _cache(facts, node.inputs[0])
    if node is not None and node.op_type in _ATTENTIONS and view.source is not node.outputs[0]:
        at = 4 + list(node.outputs).index(view.source) - 1
        return None, _cache(facts, node.inputs[at])
    return None, None


def _computed(facts: Facts, *operands: ir.Value | None) -> tuple[CacheUse, ...]:
    """What keys and values are computed from: caches that grow, and nothing else of the model."""
    found: dict[str, CacheUse] = {}
    seen: set[ir.Value] = set()
    pending = [value for value in operands if value is not None]
    while pending:
        value = pending.pop()
        if value in seen or not facts.is_activation(value):
            continue
        seen.add(value)
        node = value.producer()
        if node is None:
            return ()  # an input that is no cache's
        use = _grown(facts, node)
        if use is not None:
            found.setdefault(use.pair.past, use)
            continue
        if node.op_type in _CONTEXT_BOUND:
            return ()
        pending += [each for each in node.inputs if each is not None]
    return tuple(sorted(found.values(), key=lambda use: facts.order(use.whole)))


def _grown(facts: Facts, node: ir.Node) -> CacheUse | None:
    """A Concat of a past and what is new behind it."""
    if node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    past, new = node.inputs
    if past is None or new is None or not past.is_graph_input():
        return None
    pair = facts.roles.pair_of(past.name or "")
    role = facts.roles.inputs.get(past.name or "")
    shape = facts.shapes.of(past)
    if pair is None or role is None or shape is None:
        return None
    sizes = dict(zip(role.axes, shape, strict=True))
    heads, size = sizes.get("K", 1), sizes.get("D")
    axis = attribute(node, "axis") % len(shape)
    if axis != pair.axis or set(role.axes) - set("BKPD"):
        return None
    if not isinstance(heads, int) or not isinstance(size, int):
        return None
    return CacheUse(pair, new, node.outputs[0], role.axes, heads, size)


def _is_attention(facts: Facts, node: ir.Node) -> bool:
    """Whether a Softmax that was left is one over keys: its last axis is as long as the tokens."""
    shape = facts.shapes.of(node.outputs[0])
    return shape is None or (len(shape) > 2 and not isinstance(shape[-1], int))
