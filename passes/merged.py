"""Merged decoders: an If on a bool input is two models, each raised on its own.

    model(x, c): If(c, A, B)      split ->  A(x), B(x)      join ->  If(c, A', B')

optimum merges a decoder that makes its cache with one that continues it; `use_cache_branch`
chooses. With c given, the If is the branch that it takes and what stands around it belongs to
both, so that a part is a model like any other: it has the same inputs (those it does not read as
well), outputs, and weights, which are shared. Joined, the parts are the If's branches in whole;
inputs and outputs keep their names, order and types.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxgen.analysis.graph import producer

_BRANCHES = ("then_branch", "else_branch")
# What changes no bool but its shape.
_VIEWS = ("Identity", "Squeeze", "Unsqueeze", "Reshape", "Cast")


@dataclass(frozen=True)
class Part:
    """A model for one value of the input that chooses.

    Attributes:
        model: it; the original itself where nothing chooses.
        branch: the attribute of the If that it is, "" where nothing chooses.
        switch: the name of the input that chooses.
    """

    model: ir.Model
    branch: str = ""
    switch: str = ""


def split_branches(model: ir.Model) -> list[Part]:
    """One part for each branch of the If nodes on a bool input; the model where there are none."""
    switches = {_switch(node) for node in model.graph} - {None}
    if len(switches) != 1:
        return [Part(model)]
    (name,) = switches
    assert name is not None
    parts = [Part(model.clone(), branch, name) for branch in _BRANCHES]
    for part in parts:
        graph = part.model.graph
        for node in list(graph):
            if _switch(node) == name:
                _inline(graph, node, node.attributes[part.branch].as_graph())
                _forget(node)
    return parts


def join_branches(parts: Sequence[Part]) -> ir.Model:
    """The parts as one model again."""
    if len(parts) == 1:
        return parts[0].model
    first, second = parts
    model, graph = first.model, first.model.graph
    outputs = list(graph.outputs)
    _share(graph, second.model.graph)
    branches = [_as_branch(part) for part in parts]
    condition = next(value for value in graph.inputs if value.name == first.switch)
    attributes = [
        ir.AttrGraph(part.branch, branch) for part, branch in zip(parts, branches, strict=True)
    ]
    choice = ir.Node("", "If", [condition], attributes, num_outputs=len(outputs), name="branches")
    for new, old in zip(choice.outputs, outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    for branch in branches:  # names inside differ from those around
        for value in branch.outputs:
            value.name = f"{value.name}:{branch.name}"
    graph.append(choice)
    graph.outputs.extend(choice.outputs)
    for domain, version in second.model.graph.opset_imports.items():
        graph.opset_imports.setdefault(domain, version)
    for key, function in second.model.functions.items():
        model.functions.setdefault(key, function)
    return model


def _switch(node: ir.Node) -> str | None:
    """The name of the bool input that an If asks, through views."""
    if node.op_type != "If" or node.domain not in ("", "ai.onnx"):
        return None
    bodies = [node.attributes[name].as_graph() for name in _BRANCHES if name in node.attributes]
    if [len(body.outputs) for body in bodies] != [len(node.outputs)] * 2:
        return None
    value = node.inputs[0]
    while (view := producer(value, *_VIEWS)) is not None:
        value = view.inputs[0]
    if value is None or not value.is_graph_input() or value.dtype != ir.DataType.BOOL:
        return None
    return None if value.const_value is not None else value.name


def _inline(graph: ir.Graph, choice: ir.Node, branch: ir.Graph) -> None:
    """Put a branch's nodes in the place of its If."""
    results = list(branch.outputs)
    branch.outputs.clear()
    for name, value in list(branch.initializers.items()):
        del branch.initializers[name]
        while value.name in graph.initializers:
            value.name = f"{value.name}_"
        graph.register_initializer(value)
    nodes = list(branch)
    branch.remove(nodes)
    graph.insert_before(choice, nodes)
    made = {output for node in nodes for output in node.outputs}
    for old, new in zip(choice.outputs, results, strict=True):
        if new not in made:  # passed through, or the result of another output, too
            copy = ir.node("Identity", [new])
            graph.insert_before(choice, [copy])
            new = copy.outputs[0]
        made.discard(new)
        if old.is_graph_output():
            old.name, new.name = f"{old.name}:chosen", old.name
        new.type, new.shape = new.type or old.type, new.shape or old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(choice, safe=True)


def _forget(choice: ir.Node) -> None:
    """Let a removed If, and the branch that is not taken, read nothing any more."""
    bodies = [node for name in _BRANCHES for node in choice.attributes[name].as_graph().all_nodes()]
    for node in (choice, *bodies):
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
    choice.attributes.clear()


def _share(graph: ir.Graph, other: ir.Graph) -> None:
    """Let another graph's nodes read this one's inputs and constants; take over its own."""
    for mine, theirs in zip(graph.inputs, other.inputs, strict=True):
        theirs.replace_all_uses_with(mine, replace_graph_outputs=True)
    for name, value in list(other.initializers.items()):
        if value.is_graph_input():
            continue
        del other.initializers[name]
        known = graph.initializers.get(name)
        if known is not None and _equal(known, value):
            value.replace_all_uses_with(known, replace_graph_outputs=True)
            continue
        while value.name in graph.initializers:
            value.name = f"{value.name}_"
        graph.register_initializer(value)


def _equal(a: ir.Value, b: ir.Value) -> bool:
    first, second = a.const_value, b.const_value
    if first is second:
        return True
    if first is None or second is None:
        return False
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return bool(first.tobytes() == second.tobytes())


def _as_branch(part: Part) -> ir.Graph:
    """A part's nodes and outputs as the body of an If."""
    graph = part.model.graph
    outputs, nodes = list(graph.outputs), list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    made = {output for node in nodes for output in node.outputs}
    results = []
    for value in outputs:
        if value not in made:  # a body gives what it makes itself
            copy = ir.node("Identity", [value])
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            copy.outputs[0].name = value.name
            nodes.append(copy)
            value = copy.outputs[0]
        results.append(value)
    return ir.Graph([], results, nodes=nodes, name=part.branch.removesuffix("_branch"))
