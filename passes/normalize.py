"""Normalize: one spelling where a difference means nothing.

    functions inlined -> opset raised -> constants lifted -> other spellings of standard operators
    expanded -> constants folded -> Ifs without a choice taken -> nodes that change nothing out
    -> Einsum as MatMul -> shape arithmetic from the inputs' sizes -> duplicates merged

What is left of exporters' differences is seen through by the analyses, not rewritten here: this
pass changes no arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import version_converter

from onnxgen import functions
from onnxgen.analysis.dtypes import output_dtypes
from onnxgen.analysis.graph import has_subgraph, names
from onnxgen.analysis.roles import Roles
from onnxgen.errors import RefusedError
from onnxgen.passes.branches import take_branches
from onnxgen.passes.einsum import lower_einsums
from onnxgen.passes.expand import expand_contrib
from onnxgen.passes.fold import fold_constants
from onnxgen.passes.shape_arithmetic import canonical_shape_arithmetic
from onnxgen.passes.simplify import simplify
from onnxgen.runtime import Runtime

# The first opset that onnxscript's converter, which keeps names and metadata, can start from.
_KEEPS_NAMES = 18
# Operators of ONNX Runtime in the default domain, below the opset that has them, if one does.
_RUNTIMES_OWN = {"SimplifiedLayerNormalization": 1 << 30, "LayerNormalization": 17}
# What ONNX Runtime 1.32 has a CPU kernel for, but not of the newest version, which allows bfloat16.
_UNLOADABLE_FROM = 22
_UNLOADABLE = names(
    """
    GlobalLpPool MaxRoiPool Multinomial RandomNormal RandomNormalLike RandomUniform
    RandomUniformLike RoiAlign
    """
)
# Tensors up to this size travel through the converters; it reads axes and shapes from them.
_SMALL = 1024


def normalize(
    model: ir.Model, opset: int, runtime: Runtime, roles: Roles | None = None
) -> list[str]:
    """Bring a model to the form that the raising passes expect, in place.

    Args:
        opset: version of the default domain to convert to; a model above it stays where it is.
        runtime: evaluates the constants.
        roles: what the inputs are for; sizes that are equal in use are read off one input.

    Returns:
        Warnings, one sentence each.

    Raises:
        RefusedError: the opset cannot be converted.
    """
    if model.functions:
        # Ours stay: their calls are what raising would make of their bodies.
        common.InlinePass(criteria=lambda function: not functions.is_ours(function))(model)
        model.functions.clear()  # nothing calls the others any more; raising declares ours again
    common.TopologicalSortPass()(model)
    common.NameFixPass()(model)
    raise_opset(model, opset)
    return settle(model, runtime, roles)


def settle(model: ir.Model, runtime: Runtime, roles: Roles | None = None) -> list[str]:
    """`normalize` from where the opset is raised: again, where rules have made new nodes since."""
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.IdentityEliminationPass()(model)
    _own_outputs(model.graph)
    drop_dead(model)
    set_dtypes(model)
    warnings = list(expand_contrib(model, roles))
    fold_constants(model, runtime)
    while take_branches(model):
        common.NameFixPass()(model)
        drop_dead(model)
        set_dtypes(model)
        fold_constants(model, runtime)
    simplify(model)
    lower_einsums(model, roles)
    canonical_shape_arithmetic(model, roles)
    drop_dead(model)
    merge_duplicates(model)
    return warnings


def _own_outputs(graph: ir.Graph) -> None:
    """A subgraph's output is made in it: runtimes refuse a value of the graph outside."""
    for node in list(graph.all_nodes()):
        for found in node.attributes.values():
            if found.type != ir.AttributeType.GRAPH:
                continue
            inner = found.as_graph()
            for index, value in enumerate(inner.outputs):
                source = value.producer()
                if source is None or source.graph is not inner:
                    same = ir.node("Identity", [value])
                    same.outputs[0].type, same.outputs[0].shape = value.type, value.shape
                    inner.append(same)
                    inner.outputs[index] = same.outputs[0]


def drop_dead(model: ir.Model) -> None:
    common.RemoveUnusedNodesPass()(model)


def merge_duplicates(model: ir.Model) -> None:
    """Nodes that compute the same from the same inputs become one."""
    common.DeduplicateInitializersPass(size_limit=_SMALL)(model)
    if not any(_names_type(node) for node in model.graph):
        common.CommonSubexpressionEliminationPass()(model)


def _names_type(node: ir.Node) -> bool:
    """Whether an attribute is a type, which the pass above cannot compare."""
    kinds = (ir.AttributeType.TYPE_PROTO, ir.AttributeType.TYPE_PROTOS)
    return any(each.type in kinds for each in node.attributes.values())


def set_dtypes(model: ir.Model) -> None:
    """Give every value of the main graph its element type."""
    opset = model.graph.opset_imports.get("", 24)
    for value in model.graph.initializers.values():
        if value.dtype is None and value.const_value is not None:
            value.dtype = value.const_value.dtype
    for node in model.graph:
        for output, dtype in zip(node.outputs, output_dtypes(node, opset), strict=False):
            if dtype is not None:
                output.dtype = dtype


def raise_opset(model: ir.Model, opset: int) -> None:
    """Convert the default domain to `opset`, keeping node names and metadata.

    From opset 18 up onnxscript's converter does it. Below, it leaves some nodes in the old form
    (ReduceMean keeps its axes attribute), so onnx's own converter goes to 18 first, on the graph
    without its weights; it drops metadata, which is kept aside and put back by node name.

    Raises:
        RefusedError: a converter does not know how, with its reason.
    """
    before = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 0))
    if before >= opset:
        return
    for node in model.graph.all_nodes():
        if before < _UNLOADABLE_FROM <= opset and node.op_type in _UNLOADABLE:
            raise RefusedError(
                f"opset {before} cannot be converted to {opset}: ONNX Runtime has the operator "
                f"of node '{node.name}' ({node.op_type}) below opset {_UNLOADABLE_FROM} only"
            )
    try:
        if before < _KEEPS_NAMES:
            _convert_with_onnx(model, _KEEPS_NAMES)
        version_converter.convert_version(model, opset)
    except RefusedError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise RefusedError(f"opset {before} cannot be converted to {opset}: {reason}") from error
    if model.graph.opset_imports.get("") != opset:
        raise RefusedError(f"opset {before} cannot be converted to {opset}")


def _convert_with_onnx(model: ir.Model, opset: int) -> None:
    graph = model.graph
    kept = dict(graph.initializers)
    metadata = {node.name: dict(node.metadata_props) for node in graph}
    values = {value.name: value for node in graph for value in node.outputs}
    proto = _without_weights(model)
    aside = _foreign(model)
    _leave_out(proto, aside)
    converted = ir.from_proto(onnx.version_converter.convert_version(proto, opset))
    old_outputs = list(graph.outputs)
    # The converted nodes replace the old ones inside the same graph object, so that inputs,
    # outputs and initializers keep their identity.
    by_name: dict[str, ir.Value] = {value.name or "": value for value in graph.inputs}
    by_name |= kept
    by_name |= {value.name or "": value for node in aside for value in node.outputs}
    for name, value in converted.graph.initializers.items():
        if name not in by_name:
            by_name[name] = value
    new_nodes = []
    outer = set(converted.graph.inputs) | set(converted.graph.initializers.values())
    outer.update(output for node in converted.graph for output in node.outputs)
    for node in converted.graph:
        _recapture(node, outer, by_name)
        new_nodes.append(_adopt(node, by_name, metadata, values))
    for value in old_outputs:
        if value.producer() is not None and by_name.get(value.name or "") is None:
            raise RefusedError(f"onnx's version converter lost the output {value.name!r}")
    graph.outputs[:] = [by_name[value.name or ""] for value in old_outputs]
    for node in aside:
        for index, read in enumerate(node.inputs):
            if read is not None:
                node.replace_input_with(index, by_name[read.name or ""])
    old_nodes = list(graph)
    graph.remove(old_nodes, safe=False)
    for node in set(old_nodes) - set(aside):  # else a weight counts as read by what is gone
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
    for value in converted.graph.initializers.values():
        if value.name not in graph.initializers:
            fresh = by_name[value.name or ""]
            if fresh.uses():
                graph.register_initializer(fresh)
    graph.extend([*new_nodes, *aside])
    graph.sort()
    graph.opset_imports[""] = opset


def _recapture(node: ir.Node, outer: set[ir.Value], by_name: dict[str, ir.Value]) -> None:
    """What a node's subgraphs read of the converted graph they read of the original one."""
    for found in node.attributes.values():
        graphs = found.value if found.type == ir.AttributeType.GRAPHS else [found.value]
        for graph in graphs if has_subgraph(node) else []:
            if not isinstance(graph, ir.Graph):
                continue
            for inner in graph.all_nodes():
                for index, value in enumerate(inner.inputs):
                    if value in outer:
                        inner.replace_input_with(index, by_name[value.name or ""])
            for index, value in enumerate(graph.outputs):
                if value in outer:
                    graph.outputs[index] = by_name[value.name or ""]


def _foreign(model: ir.Model) -> list[ir.Node]:
    """ONNX Runtime's own nodes, which need no conversion; some stand in the default domain."""
    opset = model.graph.opset_imports.get("", 1)
    return [
        node
        for node in model.graph
        if node.domain not in ("", "ai.onnx") or opset < _RUNTIMES_OWN.get(node.op_type, 0)
    ]


def _leave_out(proto: onnx.ModelProto, nodes: Sequence[ir.Node]) -> None:
    """Take nodes out of a serialized model: what they make becomes an input, what they read an
    output, so that the converter sees every other node with what is around it."""
    if not nodes:
        return
    graph = proto.graph
    made = {value.name: value for node in nodes for value in node.outputs if value.name}
    others = [node for node in graph.node if not made.keys() & set(node.output)]
    computed = {name for node in others for name in node.output}
    inputs = {str(v.name) for node in nodes for v in node.inputs if v is not None}
    read = inputs & computed
    outputs = [each for each in graph.output if each.name not in made]
    read -= {each.name for each in outputs}
    graph.ClearField("node")
    graph.node.extend(others)
    graph.ClearField("output")
    graph.output.extend([*outputs, *(onnx.ValueInfoProto(name=name) for name in sorted(read))])
    for name, value in made.items():
        dtype = int(value.dtype or ir.DataType.FLOAT)
        shape = None if value.shape is None else [_dim(size) for size in value.shape]
        graph.input.append(onnx.helper.make_tensor_value_info(name, dtype, shape))
    imports = [each for each in proto.opset_import if each.domain in ("", "ai.onnx")]
    proto.ClearField("opset_import")
    proto.opset_import.extend(imports)


def _dim(size: int | ir.SymbolicDim) -> int | str | None:
    return size if isinstance(size, int) else size.value


def _adopt(
    node: ir.Node,
    by_name: dict[str, ir.Value],
    metadata: dict[str | None, dict[str, str]],
    values: dict[str | None, ir.Value],
) -> ir.Node:
    """The converted node over the values of the original graph."""
    inputs = [None if v is None or not v.name else by_name[v.name] for v in node.inputs]
    while inputs and inputs[-1] is None:  # ONNX Runtime has crashed on trailing empty inputs
        inputs.pop()
    new = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        num_outputs=len(node.outputs),
        name=node.name,
        metadata_props=metadata.get(node.name),
    )
    for old, output in zip(node.outputs, new.outputs, strict=True):
        output.name = old.name
        known = values.get(old.name)
        if known is not None:
            output.shape, output.type = known.shape, known.type
        if old.name:
            by_name[old.name] = output
    return new


def _without_weights(model: ir.Model) -> onnx.ModelProto:
    """The model's protobuf with every large initializer turned into an input."""
    graph = model.graph
    large = {
        name: value
        for name, value in graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes > _SMALL
    }
    for name in large:
        graph.initializers.pop(name)
    try:
        proto = ir.to_proto(model)
    finally:
        for value in large.values():
            graph.register_initializer(value)
    declared = {each.name for each in proto.graph.input}
    for name, value in large.items():
        if name not in declared and value.const_value is not None:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(
                    name, int(value.const_value.dtype), list(value.const_value.shape.numpy())
                )
            )
    return proto
