"""Kinds of damage that a rewrite of a transformer could do: each a node, a constant or an edge.

`damages` lists all of a model, these and those of `damage_any`, which knows nothing of
transformers.

Shapes: B batch, S new tokens, H query heads, K key heads, D head size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from tests.proof import damage_any, strokes
from tests.proof.view import Change, Damage, View, label

Array = npt.NDArray[Any]
ATTENTIONS = (
    "Attention",
    "SinkAttention",
    "PagedAttention",
    "GroupQueryAttention",
    "MultiHeadAttention",
)
_HEADS = (("num_heads", "kv_num_heads"), ("q_num_heads", "kv_num_heads"))


def _flip(value: int) -> list[int]:
    return [1 - value]


def _near(value: int) -> list[int]:
    return [value - 1, value + 1] if value > 0 else []


def _by(*factors: float) -> Callable[[float], list[float]]:
    return lambda value: [value * factor for factor in factors]


# Kind of damage -> attribute -> its other values.
_ATTRIBUTES: Mapping[str, Mapping[str, Callable[[Any], list[Any]]]] = {
    "scale": {"scale": _by(1.02, 0.5)},
    "epsilon": {"epsilon": _by(0.1, 10, 100), "qk_norm_epsilon": _by(10, 100)},
    "rotary interleaved": {"interleaved": _flip, "rotary_interleaved": _flip},
    "window off by one": {
        "local_window_size": _near,
        "left_window_size": _near,
        "window": _near,
    },
    "causal": {"is_causal": _flip, "unidirectional": _flip},
    "softcap": {"softcap": lambda value: [None, value * 1.1] if value else [20.0]},
    "router renormalised": {"normalize_routing_weights": _flip},
    "rotary left out": {"do_rotary": _flip},
    "experts' activation": {
        "activation_type": lambda value: [b"gelu" if value != b"gelu" else b"relu"],
        "swiglu_limit": _by(0.7),
        "activation_alpha": _by(1.05),
        "activation_beta": lambda value: [value + 1.0],
    },
    "gelu": {"approximate": lambda value: ["none" if value == b"tanh" else "tanh"]},
}
_DEFAULTS: Mapping[tuple[str, str], Any] = {
    ("Gelu", "approximate"): b"none",
    ("Attention", "is_causal"): 0,
}


def attributes(view: View) -> Iterator[Damage]:
    """Attributes that say what an attention, a norm, a rotary or experts compute."""
    for place, node in (*view.nodes, *view.inner):
        for kind, names in _ATTRIBUTES.items():
            for name, others in names.items():
                value = view.attribute(node, name, _DEFAULTS.get((node.op_type, name)))
                if value is None or isinstance(value, onnx.AttributeProto):
                    continue
                for other in others(value):
                    where = f"{label(node)}: {name} {value} -> {other}"
                    yield Damage(kind, where, partial(strokes.put_attribute, place, name, other))
    for place, node in view.nodes:
        if node.op_type in ("Attention", "SinkAttention") and not view.attribute(node, "scale"):
            yield Damage(
                "scale",
                f"{label(node)}: scale -> 0.16",
                partial(strokes.put_attribute, place, "scale", 0.16),
            )


def heads(view: View) -> Iterator[Damage]:
    """Queries, keys and values of other heads, and of each other."""
    for place, node in view.nodes:
        if node.op_type not in ATTENTIONS:
            continue
        for index, part in enumerate("qkv"):
            found = _heads_of(view, node, index)
            if found is None:
                continue
            axis, count, size = found
            groups = _heads_of(view, node, 1)
            orders = {"heads swapped": [1, 0, *range(2, count)]}
            if index == 0 and groups and count % groups[1] == 0 and count > groups[1] > 1:
                repeat = np.arange(count).reshape(groups[1], -1).T.ravel()
                orders["heads of other groups"] = list(repeat)
            for kind, order in orders.items():
                if count < 2:
                    continue
                picked = np.add.outer(np.array(order) * size, np.arange(size)).ravel()
                change = partial(strokes.pick, place, index, axis, picked)
                yield Damage(kind, f"{label(node)} {part}", change)
        for a, b, kind in ((0, 1, "q and k swapped"), (1, 2, "k and v swapped")):
            if len(node.input) > b and view.alike(node.input[a], node.input[b]):
                yield Damage(kind, label(node), partial(strokes.exchange, place, a, b))
        mask = {"Attention": 3, "SinkAttention": 3}.get(node.op_type)
        if node.op_type in ("GroupQueryAttention", "MultiHeadAttention"):
            mask = {"GroupQueryAttention": 10, "MultiHeadAttention": 5}[node.op_type]
        if mask is None or len(node.input) <= mask or not node.input[mask]:
            continue
        yield Damage("mask dropped", label(node), partial(strokes.rewire, place, mask, ""))
        bools = view.kinds.get(node.input[mask], (np.dtype(float), ()))[0] == np.bool_
        inverted = [("Not" if bools else "Neg", [...], {})]
        yield Damage("mask inverted", label(node), partial(strokes.edge, place, mask, inverted))
        for axis in (-1, -2):
            rolled = partial(strokes.move_edge, place, mask, axis)
            yield Damage("mask shifted", f"{label(node)} axis {axis}", rolled)


def _heads_of(view: View, node: onnx.NodeProto, index: int) -> tuple[int, int, int] | None:
    """(axis, heads, elements of one along the axis) of an attention's query, key or value."""
    if len(node.input) <= index or not node.input[index]:
        return None
    shape = view.shape(node.input[index])
    if shape is None:
        return None
    if len(shape) == 4:
        return (1, shape[1], 1)
    for many, few in _HEADS:
        count = view.attribute(node, few if index else many)
        if count and len(shape) in (2, 3) and shape[-1] % count == 0:
            return (len(shape) - 1, count, shape[-1] // count)
    return None


def rotary(view: View) -> Iterator[Damage]:
    """Tables and widths of rotary embeddings."""
    for place, node in view.nodes:
        at = {"RotaryEmbedding": (1, 2), "GroupQueryAttention": (7, 8), "PagedAttention": (8, 9)}
        if node.domain == "com.microsoft" and node.op_type == "RotaryEmbedding":
            at["RotaryEmbedding"] = (2, 3)
        if node.op_type == "PagedAttention" and node.domain != "com.microsoft":
            continue
        pair = at.get(node.op_type)
        if pair is None or len(node.input) <= pair[1] or not node.input[pair[1]]:
            continue
        shape = view.shape(node.input[pair[0]])
        if shape is None:
            continue
        width = shape[-1]
        for kind, kept in (("half a rotary", width // 2), ("rotary width", width - 1)):
            change = partial(strokes.narrow, place, pair, kept, width)
            yield Damage(kind, f"{label(node)}: {kept} of {width} columns", change)
        swapped = partial(strokes.exchange, place, *pair)
        yield Damage("sine and cosine", f"{label(node)} exchanged", swapped)
        negative = partial(strokes.edge, place, pair[1], [("Neg", [...], {})])
        yield Damage("sine and cosine", f"{label(node)} turned back", negative)
        columns = partial(strokes.move_edge, place, pair[0], -1)
        yield Damage("rotary columns", label(node), columns)
        for index in pair:
            name = node.input[index]
            if name in view.constants:
                values = view.values(name)
                if values.ndim == 2 and len(values) > 2:
                    late = partial(np.roll, shift=1, axis=0)
                    yield Damage("table shifted", name, partial(strokes.put, name, late))
                    rows = np.round(np.arange(len(values)) * 0.97).astype(int)
                    yield Damage(
                        "rotary base",
                        name,
                        partial(strokes.put, name, partial(np.take, indices=rows, axis=0)),
                    )
        if node.op_type == "RotaryEmbedding" and node.domain == "":
            for index in pair:
                if len(node.input) < 4 or not node.input[3]:
                    moved = partial(strokes.move_edge, place, index, 1)
                    yield Damage("table shifted", f"{label(node)} input {index}", moved)


def caches(view: View) -> Iterator[Damage]:
    """Pasts and presents of other layers, late writes, and what the inputs say of lengths."""
    wide = [n for n in view.inputs if len(view.shape(n) or ()) == 4 and view.floating(n)]
    for i, a in enumerate(wide):
        for b in wide[i + 1 :]:
            if view.kinds[a] == view.kinds[b]:
                yield Damage(
                    "past of another layer", f"{a} and {b}", partial(strokes.cross_inputs, a, b)
                )
    made = [n for n in view.outputs if len(view.shape(n) or ()) == 4]
    for i, a in enumerate(made):
        for b in made[i + 1 :]:
            if view.kinds[a] == view.kinds[b]:
                change = partial(strokes.cross_outputs, a, b)
                yield Damage("present of another layer", f"{a} and {b}", change)
    for name in view.outputs:
        shape = view.shape(name) or ()
        for axis in range(len(shape)):
            if shape[axis] > 1 and name not in view.inputs:
                kind = "present moved" if name in made else "logits of another row"
                yield Damage(kind, f"{name} axis {axis}", partial(strokes.move_output, name, axis))
    for name in view.inputs:
        if not view.integral(name):
            continue
        dtype, shape = view.kinds[name]
        for step in (-1, 1):
            change = partial(strokes.shift_input, name, dtype.type(step))
            yield Damage("input off by one", f"{name} {step:+}", change)
        for axis in range(len(shape)):
            if shape[axis] > 1:
                change = partial(strokes.move_input, name, axis)
                kind = (
                    "block table"
                    if "block" in name
                    else "padding side"
                    if ("mask" in name)
                    else "input of another row"
                )
                yield Damage(kind, f"{name} axis {axis}", change)


def weights(view: View) -> Iterator[Damage]:
    """Gains, biases, experts and layers left out or taken from elsewhere."""
    norms: dict[tuple[int, ...], list[str]] = {}
    for place, node in view.nodes:
        gain = 1 if "Norm" in node.op_type else 0
        gain += gain and node.op_type.startswith("Skip")
        if gain and len(node.input) > gain and node.input[gain] in view.constants:
            name = node.input[gain]
            values = view.values(name)
            yield Damage("norm weight dropped", name, partial(strokes.put, name, np.ones_like))
            others = norms.setdefault(values.shape, [])
            for other in [each for each in others if each != name][-1:]:
                change = partial(strokes.rewire, place, gain, other)
                yield Damage("norm weight of another layer", f"{name}: {other}", change)
            others.append(name)
        for index, name in enumerate(node.input):
            if name not in view.constants or not view.floating(name):
                continue
            shape = view.shape(name) or ()
            bias = len(shape) == 1 and shape[0] > 1 and index
            if bias and (node.op_type == "Add" or index > gain):
                yield Damage("bias dropped", name, partial(strokes.put, name, np.zeros_like))
                twice = partial(np.multiply, 2)
                yield Damage("bias twice", name, partial(strokes.put, name, twice))
            many = len(shape) >= 3 or node.op_type in ("MoE", "QMoE", "GroupedMatMul")
            if many and 1 < shape[0] <= 16:
                order = np.arange(shape[0])
                order[[0, -1]] = order[[-1, 0]]
                change = partial(strokes.put, name, partial(np.take, indices=order, axis=0))
                yield Damage("expert order", f"{name} {list(shape)}", change)
    yield from _layers(view)


def _layers(view: View) -> Iterator[Damage]:
    """Residual sums, and what reads an earlier one in place of a later."""
    sums: list[tuple[int, str]] = []
    for (_, number), node in view.nodes:
        names = node.input[:2]
        if node.op_type != "Add" and not node.op_type.startswith("Skip"):
            continue
        kinds = {view.kinds.get(name) for name in names}
        out = node.output[0] if node.op_type == "Add" else [*node.output, "", "", ""][3]
        if len(kinds) == 1 and None not in kinds and not set(names) & set(view.constants):
            for _, earlier in sums[-2:]:
                if out and view.kinds[earlier] == view.kinds[names[0]]:
                    change: Change = partial(strokes.rename_from, out, earlier, number + 1)
                    yield Damage("layer skipped", f"{out}: {earlier}", change)
            sums.append((number, out or node.output[0]))


def damages(view: View) -> dict[str, list[Damage]]:
    """All that can be done to a model, by kind."""
    found: dict[str, list[Damage]] = {}
    for source in (attributes, heads, rotary, caches, weights, *damage_any.SOURCES):
        for damage in source(view):
            found.setdefault(damage.kind, []).append(damage)
    return found
