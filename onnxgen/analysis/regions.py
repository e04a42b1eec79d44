"""Which parts of a model are given to backends.

    places = find_regions(model, "all")            # everything, in one piece where that can be
    places = find_regions(model, "attention")      # each attention layer, known by its structure
    places = find_regions(model, r"layers\\.\\d+")   # by the module paths that the exporter left

Places are disjoint, and each can be run in one piece: see `analysis.convex`, which cuts what cannot.
A part that is cut is called name#1, name#2 and so on, in the order of the graph.

Constants, and what is computed from them alone, go where they are read; those that several places
read stay outside. Outside stays also what no backend can be held to: random numbers, and nodes that
read or make strings, sequences or optional values, which are no arrays.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import onnx_ir as ir

from onnxgen.analysis.attention_parts import attention_layers
from onnxgen.analysis.convex import Wires, settle
from onnxgen.analysis.graph import NONDETERMINISTIC, names, read_by
from onnxgen.analysis.scopes import path_of
from onnxgen.errors import UsageError

# What gives sequences, optional values or strings.
_NO_ARRAYS = names(
    """
    Optional OptionalGetElement SequenceConstruct SequenceEmpty SequenceErase SequenceInsert
    SequenceMap SplitToSequence StringConcat StringNormalizer StringSplit
    """
)
_SHOWN = 5  # paths that an error names


@dataclass(frozen=True)
class Place:
    """A part of a model that is given to backends.

    Attributes:
        name: unique among the places of one answer.
        nodes: positions in the main graph's list of nodes, ascending.
    """

    name: str
    nodes: tuple[int, ...]


def find_regions(model: ir.Model, which: str) -> list[Place]:
    """The parts that are asked for, in the order of their first nodes.

    Args:
        which: "all"; "attention"; or a regular expression, looked for in the module path of every
            node, and in the name of one that has none. Nodes are of one part where the path up to
            the end of what was found is the same; a number in it counts as a whole.

    Raises:
        UsageError: it is no regular expression, or is found in no path.
    """
    graph = model.graph
    nodes, wires = list(graph), Wires.of(graph)
    usable, fixed = _usable(model, nodes), _fixed(graph, nodes, wires)
    if which == "all":
        groups = {"all": list(range(len(nodes)))}
    elif which == "attention":
        layers = attention_layers(graph, wires, fixed)
        groups = {f"attention.{number}": layer for number, layer in enumerate(layers)}
    else:
        groups = _by_path(nodes, which)
    computed = usable - fixed
    pieces = settle(wires, [computed.intersection(group) for group in groups.values()], computed)
    read = {at for at, node in enumerate(nodes) if any(v.is_graph_output() for v in node.outputs)}
    pieces = [[each for each in parts if _is_read(each, wires, read)] for parts in pieces]
    _give_constants(pieces, groups.values(), wires, usable & fixed)
    places = [
        Place(name, tuple(sorted(each)))
        for name, each in zip(_names(groups, pieces), chain(*pieces), strict=True)
    ]
    return sorted(places, key=lambda place: place.nodes)


def _is_read(piece: Collection[int], wires: Wires, outputs: Collection[int]) -> bool:
    """Whether anything of a piece is read outside."""
    held = set(piece)
    return any(at in outputs or not held.issuperset(wires.readers[at]) for at in held)


def _names(groups: Iterable[str], pieces: Sequence[Sequence[object]]) -> list[str]:
    """A name for each piece; those of a group that was cut are counted."""
    taken = set(groups)
    found: list[str] = []
    for group, parts in zip(groups, pieces, strict=True):
        for number in range(1, len(parts) + 1):
            name = f"{group}#{number}" if len(parts) > 1 else group
            while len(parts) > 1 and name in taken:
                name += "#"
            taken.add(name)
            found.append(name)
    return found


# --- nodes --------------------------------------------------------------------------------------


def _usable(model: ir.Model, nodes: Sequence[ir.Node]) -> set[int]:
    """The nodes that a backend can be given."""
    random = {
        key
        for key, function in model.functions.items()
        if any(node.op_type in NONDETERMINISTIC for node in function.all_nodes())
    }
    return {
        at
        for at, node in enumerate(nodes)
        if not any(
            each.op_type in NONDETERMINISTIC or each.op_identifier() in random
            for each in (node, *_inside(node))
        )
        and all(map(_is_array, (*read_by(node), *node.outputs)))
    }


def _inside(node: ir.Node) -> Iterator[ir.Node]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield from graph.all_nodes()


def _is_array(value: ir.Value) -> bool:
    """Whether a value is a tensor of numbers, as far as it is declared or its maker tells."""
    if value.type is None:
        maker = value.producer()
        return maker is None or maker.op_type not in _NO_ARRAYS
    return isinstance(value.type, ir.TensorType) and value.dtype != ir.DataType.STRING


def _fixed(graph: ir.Graph, nodes: Sequence[ir.Node], wires: Wires) -> set[int]:
    """The nodes that depend on constants alone."""
    known = {value for value in graph.initializers.values() if not value.is_graph_input()}
    fixed: set[int] = set()
    for at in wires.order:
        if nodes[at].op_type not in NONDETERMINISTIC and known.issuperset(read_by(nodes[at])):
            fixed.add(at)
            known.update(nodes[at].outputs)
    return fixed


def _give_constants(
    pieces: Sequence[Sequence[list[int]]],
    groups: Iterable[Collection[int]],
    wires: Wires,
    constants: Collection[int],
) -> None:
    """Put what depends on constants alone into the piece that alone reads it.

    What no node reads is an answer of the graph, and stays in its group where that is whole.
    """
    inside = {at: piece for parts in pieces for piece in parts for at in piece}
    own = {
        at: parts[0]
        for group, parts in zip(groups, pieces, strict=True)
        if len(parts) == 1
        for at in group
    }
    for at in reversed(wires.order):
        if at not in constants:
            continue
        readers = wires.readers[at]
        found = inside.get(readers[0]) if readers else own.get(at)
        if found is not None and all(inside.get(each) is found for each in readers):
            found.append(at)
            inside[at] = found


# --- paths --------------------------------------------------------------------------------------


def _by_path(nodes: Sequence[ir.Node], which: str) -> dict[str, list[int]]:
    """The nodes in whose paths something is found, by the path up to there."""
    try:
        pattern = re.compile(which)
    except re.error as error:
        raise UsageError(f"{which!r} is no regular expression: {error}") from error
    groups: dict[str, list[int]] = {}
    paths = [path_of(node) or node.name or "" for node in nodes]
    for at, path in enumerate(paths):
        found = pattern.search(path)
        if found is not None and found.group():
            end = found.end()
            # layers.1 is not the beginning of layers.10
            while path[end - 1 : end + 1].isdecimal() and end < len(path):
                end += 1
            groups.setdefault(path[:end], []).append(at)
    if not groups:
        raise UsageError(f"{which!r} is found in no node's module path{_some(paths)}")
    return groups


def _some(paths: Sequence[str]) -> str:
    """A few of the paths there are, from all over the model."""
    there = list(dict.fromkeys(path for path in paths if path))
    if not there:
        return ", and none has one, nor a name"
    shown = dict.fromkeys(there[at * len(there) // _SHOWN] for at in range(_SHOWN))
    return f", which are such as {', '.join(map(repr, shown))}"
