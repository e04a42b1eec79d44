"""Merged decoders as optimum writes them: an If on use_cache_branch, weights outside."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper


def merged(cached: onnx.ModelProto, first: onnx.ModelProto) -> onnx.ModelProto:
    """One model of a decoder that continues its cache and one that makes it.

    An output that the first has alone passes the past of its name through in the other.
    """
    initializers: dict[str, onnx.TensorProto] = {}
    inputs = {value.name: value for value in (*cached.graph.input, *first.graph.input)}
    outputs = {value.name: value for value in (*cached.graph.output, *first.graph.output)}
    branches = []
    for tag, model in (("cached", cached), ("first", first)):
        renamed = {name: f"{name}.{tag}" for name in outputs}
        for tensor in model.graph.initializer:
            known = initializers.setdefault(tensor.name, tensor)
            if known.SerializeToString() != tensor.SerializeToString():
                other = onnx.TensorProto()
                other.CopyFrom(tensor)
                other.name = renamed[tensor.name] = f"{tensor.name}.{tag}"
                initializers[other.name] = other
        nodes = []
        for node in model.graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = [renamed.get(name, name) for name in node.input]
            copy.output[:] = [renamed.get(name, name) for name in node.output]
            nodes.append(copy)
        made = {value.name for value in model.graph.output}
        results = []
        for name, value in outputs.items():
            if name not in made:
                past = name.replace("present", "past_key_values")
                nodes.append(helper.make_node("Identity", [past], [renamed[name]]))
            result = onnx.ValueInfoProto()
            result.CopyFrom(value)
            result.name = renamed[name]
            results.append(result)
        branches.append(helper.make_graph(nodes, tag, [], results))
    choice = helper.make_node(
        "If", ["use_cache_branch"], list(outputs), then_branch=branches[0], else_branch=branches[1]
    )
    switch = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    graph = helper.make_graph(
        [choice],
        "merged",
        [*inputs.values(), switch],
        list(outputs.values()),
        initializer=list(initializers.values()),
    )
    return helper.make_model(
        graph, opset_imports=list(cached.opset_import), ir_version=cached.ir_version
    )
