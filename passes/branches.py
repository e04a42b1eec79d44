"""Branches: an If whose condition is a constant is replaced by the branch that is taken.

TorchScript writes Ifs around sizes that turn out fixed once constants are folded.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxgen.analysis.graph import constant, producer


def take_branches(model: ir.Model) -> bool:
    """Replace the Ifs of the main graph that have no choice, in place; whether there were any."""
    graph = model.graph
    found = False
    for node in list(graph):
        if node.graph is not graph or producer(node.outputs[0], "If") is None:
            continue
        condition = constant(node.inputs[0], 1)
        if condition is None:
            continue
        taken = "then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"
        branch = node.attributes[taken].as_graph()
        _move(graph, branch, node)
        found = True
    return found


def _move(graph: ir.Graph, branch: ir.Graph, node: ir.Node) -> None:
    outputs, nodes = list(branch.outputs), list(branch)
    for name, value in list(branch.initializers.items()):
        branch.initializers.pop(name)
        number = 1
        while value.name in graph.initializers:
            number += 1
            value.name = f"{name}_{number}"
        graph.register_initializer(value)
    branch.outputs.clear()
    branch.remove(nodes)
    graph.insert_before(node, nodes)
    for old, new in zip(node.outputs, outputs, strict=True):
        if old.is_graph_output():  # its name is the model's interface
            same = ir.node("Identity", [new])
            same.outputs[0].type, same.outputs[0].shape = old.type, old.shape
            graph.insert_before(node, [same])
            old.name, same.outputs[0].name = f"{old.name}:replaced", old.name
            new = same.outputs[0]
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
