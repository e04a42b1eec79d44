"""Shape arithmetic: sizes are read off the graph's inputs, each once.

Exporters compute every shape they need from some tensor nearby: Shape, Gather, Unsqueeze, Concat,
in every layer again. Each such number is a polynomial of the inputs' sizes
(`onnxgen.analysis.symbols`), so it is computed from those instead, once for the whole model, and a
Reshape gets a constant target where 0 (keep) and -1 (the rest) can say it.

Besides the nodes it saves, this frees Attention: a mask whose length is read off a layer's present
key could not be an input of the node that makes the present key.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import sizes_in_use
from onnxgen.analysis.graph import attribute
from onnxgen.analysis.roles import Roles
from onnxgen.analysis.shapes import Shapes
from onnxgen.patterns.building import Builder, SizesOfInputs, literal_target


def canonical_shape_arithmetic(model: ir.Model, roles: Roles | None) -> None:
    """Rewrite every index tensor that ordinary nodes read, in place."""
    graph = model.graph
    shapes = Shapes(graph, sizes_in_use(roles))
    builder = Builder(graph, shapes)
    sizes = SizesOfInputs(builder)
    first = next(iter(graph), None)
    for node in list(graph):
        if all(shapes.content(output) is not None for output in node.outputs):
            continue  # shape arithmetic itself: dies when nothing reads it any more
        if node.op_type == "Reshape" and node.domain == "" and _literal_target(node, builder):
            continue
        for index, value in enumerate(node.inputs):
            content = shapes.content(value)
            if content is None or value is None or value.producer() is None:
                continue
            if value.dtype not in (ir.DataType.INT64, None) or content.dtype == bool:
                continue
            if any(isinstance(element, (bool, np.bool_)) for element in content.flat):
                continue
            made = sizes.tensor(list(content.flat), content.shape)
            if made is not None and made is not value:
                node.replace_input_with(index, made)
    nodes = builder.take()
    if first is not None and nodes:
        graph.insert_before(first, nodes)


def _literal_target(node: ir.Node, builder: Builder) -> bool:
    """Give a Reshape a constant target, if 0 and at most one -1 can say it."""
    shapes = builder.shapes
    source, result = shapes.of(node.inputs[0]), shapes.of(node.outputs[0])
    if source is None or result is None:
        return False
    target = literal_target(shapes, source, result)
    if target is None:
        return False
    given = shapes.content(node.inputs[1])
    if attribute(node, "allowzero", 0) and 0 in target:
        del node.attributes["allowzero"]
    elif given is not None and list(given.flat) == target:
        return True
    node.replace_input_with(1, builder.ints(*target))
    return True
