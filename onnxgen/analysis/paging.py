"""What of a raised model can be paged: its attentions and their caches, or what stands in the way.

    layers = paged_layers(facts, families)         raises Unpageable with every reason found

A model pages where every token depends on other tokens through attention only, and every attention
reads what a cache holds, as far as a mask of a known family lets it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute, names
from onnxgen.analysis.masks import MaskFamily
from onnxgen.analysis.mixing import mixes_tokens
from onnxgen.analysis.roles import CachePair
from onnxgen.analysis.symbols import Dim
from onnxgen.report.values import Obstacle

# An operand that is made by one of these has seen other tokens than its own.
_CONTEXT_BOUND = names("Attention SinkAttention Softmax TensorScatter")
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
        elif mixes_tokens(facts, node):
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


def _layer(facts: Facts, node: ir.Node, family: MaskFamily | None) -> PagedLayer | Obstacle:
    name = node.name or node.op_type
    inputs = [*node.inputs, *[None] * (7 - len(node.inputs))]
    q, k, v, _, past_key, past_value, last = inputs[:7]
    assert q is not None
    sizes = _sizes(facts, q, k, v)
    if isinstance(sizes, str):
        return Obstacle("PAG003", sizes, name)
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
    one = family.kind == "full" and (sizes.new == 1 or facts.roles.fixed.get("S") == 1)
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
        sizes.heads,
        sizes.kv_heads,
        sizes.size,
        sizes.width,
        family,
        last if node.op_type == "SinkAttention" else None,
        computed,
    )


@dataclass(frozen=True)
class _Sizes:
    """H, K, D, Dv and S of an attention."""

    heads: int
    kv_heads: int
    size: int
    width: int
    new: Dim


def _sizes(facts: Facts, *operands: ir.Value | None) -> _Sizes | str:
    """The sizes of [B, H, S, D], [B, K, T, D] and [B, K, T, Dv]; the reason where they are others."""
    q, k, v = map(facts.shapes.of, operands)
    if q is None or k is None or v is None or not len(q) == len(k) == len(v) == 4:
        return "queries, keys and values do not have four axes"
    match (q[1], k[1], q[3], v[3]):
        case int(heads), int(kv_heads), int(size), int(width):
            return _Sizes(heads, kv_heads, size, width, q[2])
    return "heads and head sizes are not fixed"


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
