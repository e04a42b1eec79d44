"""Cutting a part out of a graph and running it on ONNX Runtime.

Masks, rotary tables, folded constants and the check of every rewrite are read this way: whatever
spelling an exporter chose, the numbers are the meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir import serde

from onnxgen import functions
from onnxgen.analysis.graph import ancestors, read_by

Array: TypeAlias = "np.ndarray[Any, Any]"


class CutError(Exception):
    """A part cannot be cut out; the message says what it depends on that was not given."""


def cut(
    inputs: Iterable[ir.Value],
    outputs: Sequence[ir.Value],
    opsets: Mapping[str, int],
    *,
    max_nodes: int = 2000,
    max_bytes: int = 1 << 28,
) -> onnx.ModelProto:
    """A model that computes `outputs` from `inputs`, holding the initializers in between.

    Args:
        inputs: where to cut; those the outputs do not depend on are left out.
        outputs: values of one graph, or of nodes not inserted in a graph yet.
        opsets: opset imports of the model they come from.

    Raises:
        CutError: the part reads a graph input that was not given, has a value without an element
            type, or is larger than the limits.
    """
    stop = frozenset(inputs)
    wanted = [value for value in outputs if value not in stop]
    nodes = list(ancestors(wanted, stop))
    if len(nodes) > max_nodes:
        raise CutError(f"more than {max_nodes} nodes are between the inputs and the outputs")
    graph = onnx.GraphProto(name="part")
    used: dict[ir.Value, None] = {}
    for node in sorted_nodes(nodes):
        proto = serde.serialize_node(node)
        proto.ClearField("metadata_props")
        graph.node.append(proto)
        used.update((value, None) for value in read_by(node))
    used.update((value, None) for value in outputs)
    inside = {output for node in nodes for output in node.outputs}
    size = 0
    for value in used:
        if value in inside:
            continue
        if value in stop:
            graph.input.append(_info(value))
        elif value.const_value is not None and not value.is_graph_input():
            if value.const_value.dtype == ir.DataType.STRING:
                raise CutError(f"it reads strings, {value.name!r}")
            size += value.const_value.nbytes
            if size > max_bytes:
                raise CutError("it holds more constants than are run in one piece")
            tensor = serde.serialize_tensor(
                ir.tensor(value.const_value.numpy(), dtype=value.const_value.dtype)
            )
            tensor.name = value.name or ""
            graph.initializer.append(tensor)
        else:
            raise CutError(f"it depends on {value.name!r}, which was not given")
    graph.output.extend(_info(value) for value in outputs)
    model = onnx.ModelProto(ir_version=10, graph=graph)
    model.functions.extend(functions.called(nodes, opsets.get("", 24)))
    imports = dict(opsets)
    if model.functions:
        imports[functions.DOMAIN] = functions.VERSION
    for domain, version in imports.items():
        model.opset_import.add(domain=domain, version=version)
    return model


def sorted_nodes(nodes: Iterable[ir.Node]) -> list[ir.Node]:
    """The nodes with every producer before its consumers."""
    members = dict.fromkeys(nodes)  # in the order given: the same part is cut the same way again
    ordered: list[ir.Node] = []
    state: dict[ir.Node, bool] = {}  # False: its inputs are under way, True: placed
    for root in members:
        stack = [root]
        while stack:
            node = stack[-1]
            if node in state:
                stack.pop()
                if not state[node]:
                    state[node] = True
                    ordered.append(node)
                continue
            state[node] = False
            for value in read_by(node):
                source = value.producer()
                if source is not None and source in members and source not in state:
                    stack.append(source)
    return ordered


def _info(value: ir.Value) -> onnx.ValueInfoProto:
    if value.dtype is None:
        raise CutError(f"the element type of {value.name!r} is not known")
    return onnx.helper.make_tensor_value_info(value.name or "", int(value.dtype), None)
