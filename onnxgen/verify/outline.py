"""The structure of a part of a graph as a text, equal for parts that differ in names and weights.

What a part is computed from counts by its place: the value that it continues, its caches, and its
weights. Small constants, and those of masks and tables, count by their contents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from onnxgen.analysis.evaluate import sorted_nodes
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import ancestors
from onnxgen.analysis.roles import Roles
from onnxgen.data_file import content_of

SMALL = 16
"""Elements: constants up to here are compared by contents, and indices of any number."""

_INDICES = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.STRING)

_VECTOR = 1 << 16  # of a weight of so many elements it counts whether all of them are one number


def digest(tensor: ir.TensorProtocol) -> str:
    """The hash of a tensor's contents, read piece by piece where it lies in a file."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape.numpy())}".encode())
    if tensor.dtype == ir.DataType.STRING:
        found.update(repr(tensor.numpy().tolist()).encode())
    else:
        for piece in content_of(tensor):
            found.update(piece)
    return found.hexdigest()


@dataclass
class Places:
    """The weights and caches of a part, numbered as they are met; another's are told by these numbers.

    Args:
        digests: hashes by place in a file; shared, so that each weight is read once.
    """

    digests: dict[Any, str]
    caches: dict[str, int] = field(default_factory=dict)
    numbers: dict[Any, int] = field(default_factory=dict)
    tensors: list[ir.TensorProtocol] = field(default_factory=list)

    def number(self, tensor: ir.TensorProtocol) -> int:
        key = place_of(tensor)
        if key not in self.numbers:
            self.numbers[key] = len(self.tensors)
            self.tensors.append(tensor)
        return self.numbers[key]

    def like(self, tensor: ir.TensorProtocol) -> int | None:
        """The number of the weight that holds the same; None where none does."""
        found = self.numbers.get(place_of(tensor))
        if found is not None:
            return found
        alike = (t.dtype == tensor.dtype and t.nbytes == tensor.nbytes for t in self.tensors)
        if not any(alike):
            return None
        wanted = self._digest(tensor)
        same = (
            n
            for n, each in enumerate(self.tensors)
            if each.nbytes == tensor.nbytes and self._digest(each) == wanted
        )
        return next(same, None)

    def _digest(self, tensor: ir.TensorProtocol) -> str:
        key = place_of(tensor)
        if key not in self.digests:
            self.digests[key] = digest(tensor)
        return self.digests[key]


def place_of(tensor: ir.TensorProtocol) -> Any:
    """What is equal for tensors of the same bytes of one file, or the same object."""
    if isinstance(tensor, ir.ExternalTensor):
        return (str(tensor.path), tensor.offset, tensor.nbytes)
    return id(tensor)


def outline(
    facts: Facts,
    targets: Sequence[ir.Value],
    start: ir.Value,
    carries: Collection[ir.Value],
    places: Places,
    original: Places | None = None,
    aliases: Mapping[str, str] | None = None,
) -> str:
    """The structure of what lies between a value and those that follow from it.

    Args:
        targets: the part's last values, in an order that equal parts share.
        start: the value that it continues.
        carries: the values of its graph that carry tokens.
        places: gets the part's own.
        original: those of the part that this one is to equal: weights that are the same tensors,
            and its caches, count by their number there, others as new ones.
        aliases: the original's names of caches that have others here.
    """
    stop = frozenset([start])
    nodes = sorted_nodes(ancestors(targets, stop))
    said: dict[ir.Value, str] = {start: "start"}
    lines: list[str] = []
    for node in nodes:
        inside = any(output in carries for output in node.outputs)
        words = []
        for value in node.inputs:
            if value is None:
                words.append("-")
                continue
            cache = value.is_graph_input() and facts.role(value) in _CACHES
            if cache and node.op_type in ("Shape", "Size"):
                # Lengths are read off whichever cache was at hand: all of a form are as long.
                words.append(f"a cache of {form_of(facts.roles, str(value.name))}")
                continue
            if value not in said:
                if cache:
                    name = (aliases or {}).get(str(value.name), str(value.name))
                    said[value] = _cache(name, places, original)
                elif value.is_graph_input() or value.const_value is None:
                    said[value] = f"input {value.name}"
            words.append(said.get(value) or _constant(value, inside, places, original))
        for output in node.outputs:
            said[output] = f"v{len(said)}"
        attributes = sorted(node.attributes.values(), key=lambda each: each.name)
        kind = f"{node.domain}:{node.op_type}:{node.overload}"
        lines.append(f"{kind}({','.join(words)}) {' '.join(map(_attribute, attributes))}")
    lines.append(",".join(said.get(value, "?") for value in targets))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


_CACHES = ("past", "static_past", "cross_past")


def form_of(roles: Roles, name: str) -> tuple[object, ...]:
    """What caches of the same lengths have in common."""
    each, pair = roles.inputs[name], roles.pair_of(name)
    fixed = tuple(dim if isinstance(dim, int) else "" for dim in each.shape)
    crop = None if pair is None else (pair.cap, pair.window, pair.counted)
    return each.role, each.dtype, each.axes, fixed, crop


def _cache(name: str, places: Places, original: Places | None) -> str:
    if original is None:
        return f"cache {places.caches.setdefault(name, len(places.caches))}"
    known = original.caches.get(name)
    return f"foreign {name}" if known is None else f"cache {known}"


def _constant(value: ir.Value, inside: bool, places: Places, original: Places | None) -> str:
    tensor = value.const_value
    assert tensor is not None
    if not inside or tensor.size <= SMALL or tensor.dtype in _INDICES:
        return f"constant {digest(tensor)}"
    kind = f"{tensor.dtype} {list(tensor.shape.numpy())}"
    if tensor.size <= _VECTOR and tensor.dtype.bitwidth >= 8:
        array = tensor.numpy().reshape(-1)
        kind += f" all {array[0]}" if (array == array[0]).all() else ""
    like = None if original is None else original.like(tensor)
    if like is not None:
        return f"weight {like}"
    return f"{'weight' if original is None else 'new'} {places.number(tensor)}: {kind}"


def _attribute(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
        return f"{attribute.name}={digest(attribute.as_tensor())}"
    content = ir.serde.serialize_attribute(attribute).SerializeToString(deterministic=True)
    return f"{attribute.name}={hashlib.sha256(content).hexdigest()}"
