"""Whether a model is one: what everything behind reading may take for granted.

    check_sound(model)      # its nodes come sorted, or UnsoundError says what is wrong

A file can be read, and still be no model: nodes that wait for each other, operators without the
inputs or attributes that they demand, functions that call themselves. Analyses index inputs and
read attributes as the operators' schemas promise them; here is where the promise is checked.
onnx's own checker is not asked: it refuses real exports, for types that it cannot infer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import onnx
import onnx_ir as ir

from onnxgen import functions
from onnxgen.analysis.graph import CONTRIB
from onnxgen.contrib_demands import NEEDS, TYPES

Root: TypeAlias = ir.Graph | ir.Function

# Calls may make a model this much larger, and no larger; a tower of functions of two calls each,
# forty lines of text, would make 10^12 nodes.
MORE_NODES, TIMES_NODES = 20_000, 20
DEEPEST = 100  # functions that call functions; more than an inliner's recursion takes

_TYPES_BY_NAME = ("to", "dtype", "stash_type", "softmax_precision", "output_dtype")
_UNDEFINED = ir.DataType.UNDEFINED


class UnsoundError(ValueError):
    """The model is none; the message names the node and says why."""


def check_sound(model: ir.Model) -> None:
    """Check a model, put its nodes in order, and give every call all the outputs it can have.

    Raises:
        UnsoundError: it is no model.
    """
    roots: list[Root] = [model.graph, *model.functions.values()]
    for root in roots:
        _check_attributes(model, root)
        try:
            root.sort()
        except ValueError as error:
            raise UnsoundError(
                f"nodes of {_called(root)} wait for each other in a circle"
            ) from error
        _check_order(root, set(root.inputs))
    _check_calls(model)


def _check_order(root: Root, known: set[ir.Value]) -> None:
    """Every value is made before it is read or given, in this graph or one around it."""
    around = known - set(root.inputs)
    if isinstance(root, ir.Graph):
        known = {*known, *root.inputs, *root.initializers.values()}
    for node in root:
        for value in node.inputs:
            if value is not None and value not in known:
                raise UnsoundError(f"{_where(node)} reads '{value.name}' before it is made")
        for attribute in node.attributes.values():
            for graph in graphs_of(attribute):
                _check_order(graph, known)
        known.update(node.outputs)
    for value in root.outputs:
        if value not in known:
            raise UnsoundError(f"'{value.name}', an output of {_called(root)}, is not made in it")
        if value in around:  # ONNX Runtime refuses it as well
            raise UnsoundError(
                f"'{value.name}', an output of a graph within {_called(root)}, is a value of the "
                "graph around it: an Identity must stand between"
            )


def graphs_of(attribute: ir.Attr) -> Sequence[ir.Graph]:
    """The graphs that an attribute holds."""
    if attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else ()


def _check_attributes(model: ir.Model, root: Root) -> None:
    parameters = set(root.attributes) if isinstance(root, ir.Function) else set()
    for node in ir.traversal.RecursiveGraphIterator(root):
        for attribute in node.attributes.values():
            if attribute.is_ref() and attribute.ref_attr_name not in parameters:
                raise UnsoundError(
                    f"{_where(node)} takes its {attribute.name} from a parameter "
                    f"'{attribute.ref_attr_name}', and there is none"
                )
        if any(not _is_named(each.configuration) for each in node.device_configurations):
            raise UnsoundError(f"{_where(node)} is for a device configuration without a name")
        function = model.functions.get(node.op_identifier())
        if node.domain == functions.DOMAIN and node.op_type in functions.DEFINITIONS:
            _check_ours(node, function)
        if function is not None:
            _check_call(node, function)
        elif node.domain == CONTRIB:
            _check_contrib(node)
        else:
            version = root.opset_imports.get(node.domain) or model.opset_imports.get(node.domain)
            _check_node(node, version or 1)


def _check_call(node: ir.Node, function: ir.Function) -> None:
    given = (len(node.inputs), len(node.outputs))
    most = (len(function.inputs), len(function.outputs))
    if given[0] > most[0] or given[1] > most[1]:
        raise UnsoundError(
            f"{_where(node)} has {given[0]} inputs and {given[1]} outputs, and the function "
            f"that it calls {most[0]} and {most[1]}"
        )
    node.resize_outputs(most[1])  # inlining replaces all of them


def _check_contrib(node: ir.Node) -> None:
    needed, attributes = NEEDS.get(node.op_type, ("", ""))
    inputs = [int(each) for each in needed.split()]
    _check_demands(node, max(inputs, default=-1) + 1, attributes.split(), TYPES)
    for index in inputs:
        if node.inputs[index] is None:
            raise UnsoundError(f"{_where(node)} is not given its input {index}")
    for name in attributes.split():
        count = node.attributes[name]
        if not count.is_ref() and count.as_int() < 1:
            raise UnsoundError(f"{_where(node)} has {count.as_int()} as its {name}")
    if not node.outputs:
        raise UnsoundError(f"{_where(node)} has no outputs")


def _check_ours(node: ir.Node, function: ir.Function | None) -> None:
    """It is given what our body reads; without a body of the model's own we declare ours."""
    try:
        own = functions.definition(node)
    except KeyError:
        if function is None:
            raise UnsoundError(
                f"{_where(node)} calls the function '{node.op_type}:{node.overload}' of the "
                f"domain '{node.domain}', and there is none"
            ) from None
        return
    read = {name for inner in own.node for name in inner.input}
    for index, name in enumerate(own.input):
        if name in read and (index >= len(node.inputs) or node.inputs[index] is None):
            raise UnsoundError(f"{_where(node)} is not given its input '{name}'")
    if len(node.inputs) > len(own.input) or len(node.outputs) > len(own.output):
        raise UnsoundError(f"{_where(node)} has more inputs or outputs than '{node.op_type}' has")


def _check_bodies(node: ir.Node, version: int) -> None:
    """The graphs of an If, Loop or Scan take and give as many values as the node does."""
    inputs, outputs = len(node.inputs), len(node.outputs)
    if node.op_type == "If":
        wanted = (0, outputs)
    elif node.op_type == "Loop":
        wanted = (max(inputs, 2), outputs + 1)
    elif node.op_type == "Scan" and version >= 9:
        wanted = (inputs, outputs)
        scanned = node.attributes["num_scan_inputs"]
        if not scanned.is_ref() and not 1 <= scanned.as_int() <= inputs:
            raise UnsoundError(f"{_where(node)} scans {scanned.as_int()} of {inputs} inputs")
    else:
        return
    for attribute in node.attributes.values():
        for graph in graphs_of(attribute):
            found = (len(graph.inputs), len(graph.outputs))
            if found != wanted:
                raise UnsoundError(
                    f"{_where(node)} has a graph of {found[0]} inputs and {found[1]} outputs, "
                    f"not {wanted[0]} and {wanted[1]}"
                )


def _check_node(node: ir.Node, version: int) -> None:
    schema = _schema(node.op_type, "" if node.domain == "ai.onnx" else node.domain, version)
    if schema is None:
        if node.domain in ("", "ai.onnx") and node.op_type in NEEDS:  # it has some there as well
            _check_contrib(node)
        return  # nobody knows what it demands
    needed, types = _attributes(schema)
    _check_demands(node, schema.min_input, needed, types)
    unknown = next((name for name in node.attributes if name not in types), None)
    if unknown is not None and schema.since_version <= version:
        raise UnsoundError(f"{_where(node)} has the attribute '{unknown}', which is none of its")
    if node.op_type == "Constant" and len(node.attributes) != 1:
        raise UnsoundError(f"{_where(node)} has {len(node.attributes)} values, not one")
    for index, formal in enumerate(schema.inputs):
        missing = index >= len(node.inputs) or node.inputs[index] is None
        if formal.option == _SINGLE and missing:
            raise UnsoundError(f"{_where(node)} is not given its input '{formal.name}'")
    for what, count, least, most in (
        ("inputs", len(node.inputs), 0, schema.max_input),
        ("outputs", len(node.outputs), schema.min_output, schema.max_output),
    ):
        if not least <= count <= most:
            raise UnsoundError(f"{_where(node)} has {count} {what}, not {least} to {most}")
    _check_bodies(node, version)


def _check_demands(
    node: ir.Node, inputs: int, attributes: Sequence[str], types: Mapping[str, int]
) -> None:
    if len(node.inputs) < inputs:
        raise UnsoundError(f"{_where(node)} has {len(node.inputs)} inputs and needs {inputs}")
    for name in attributes:
        if name not in node.attributes:
            raise UnsoundError(f"{_where(node)} needs the attribute '{name}'")
    for name, attribute in node.attributes.items():
        kind = types.get(name)
        if kind is not None and attribute.type != kind:
            raise UnsoundError(
                f"{_where(node)} has the attribute '{name}' as {attribute.type.name}, "
                f"not {ir.AttributeType(kind).name}"
            )
        number = None if attribute.is_ref() else attribute.value
        if name in _TYPES_BY_NAME and number not in _NUMBERS and isinstance(number, int):
            raise UnsoundError(f"{_where(node)} names the unknown type {number} as its '{name}'")


_NUMBERS = frozenset(int(each) for each in ir.DataType)
_SINGLE = onnx.defs.OpSchema.FormalParameterOption.Single


@functools.cache
def _schema(op_type: str, domain: str, version: int) -> onnx.defs.OpSchema | None:
    """The schema of that version; the newest where the file uses an operator before its time."""
    newest = onnx.defs.onnx_opset_version() if domain == "" else version
    for each in (version, newest):
        try:
            schema = onnx.defs.get_schema(op_type, each, domain)
        except (onnx.defs.SchemaError, TypeError):  # TypeError: no int32, and so no version
            continue
        return None if schema.deprecated else schema
    return None


@functools.cache
def _attributes(schema: onnx.defs.OpSchema) -> tuple[tuple[str, ...], dict[str, int]]:
    """Names of those that are needed, and every one's type."""
    found: Mapping[str, Any] = schema.attributes
    needed = tuple(name for name, each in found.items() if each.required)
    return needed, {name: int(each.type.value) for name, each in found.items()}


def _check_calls(model: ir.Model) -> None:
    """Functions call no circle, not too deep, and expand to no more nodes than can be held."""
    if not model.functions:
        return
    called = {key: _calls(model, function) for key, function in model.functions.items()}
    sizes: dict[ir.OperatorIdentifier, int] = {}
    depths: dict[ir.OperatorIdentifier, int] = {}
    for start in called:
        path: dict[ir.OperatorIdentifier, None] = {}
        pending = [start]
        while pending:
            key = pending[-1]
            if key in sizes:
                pending.pop()
                continue
            unknown = [each for each in called[key] if each not in sizes]
            path[key] = None
            if any(each in path for each in unknown):
                raise UnsoundError(f"its function '{key[1]}' calls itself, or one that calls it")
            if unknown:
                pending.extend(unknown[:1])
                continue
            own = sum(1 for _ in ir.traversal.RecursiveGraphIterator(model.functions[key]))
            sizes[key] = own + sum(map(sizes.__getitem__, called[key]))
            depths[key] = 1 + max((depths[each] for each in called[key]), default=0)
            path.pop(key)
            pending.pop()
    own = sum(1 for _ in ir.traversal.RecursiveGraphIterator(model.graph))
    stored = own + sum(1 for f in model.functions.values() for _ in f)
    expanded = own + sum(map(sizes.__getitem__, _calls(model, model.graph)))
    if expanded > MORE_NODES + TIMES_NODES * stored:
        raise UnsoundError(f"its functions expand to {expanded} nodes, from {stored} in the file")
    if max(depths.values()) > DEEPEST:
        raise UnsoundError(f"its functions call each other more than {DEEPEST} deep")
    for function in model.functions.values():
        _check_opsets(model, function)


def _calls(model: ir.Model, root: Root) -> list[ir.OperatorIdentifier]:
    nodes = ir.traversal.RecursiveGraphIterator(root)
    return [key for node in nodes if (key := node.op_identifier()) in model.functions]


def _check_opsets(model: ir.Model, function: ir.Function) -> None:
    for domain, version in function.opset_imports.items():
        own = model.opset_imports.get(domain, version)
        if own != version:
            raise UnsoundError(
                f"its function '{function.name}' needs version {version} of the domain "
                f"'{domain or 'ai.onnx'}', and the model version {own}; they cannot be joined"
            )


def _is_named(configuration: ir.ModelConfiguration | None) -> bool:
    return configuration is not None and bool(configuration.name)


def _where(node: ir.Node) -> str:
    return f"node '{node.name}' ({node.op_type})"


def _called(root: Root) -> str:
    return f"the function '{root.name}'" if isinstance(root, ir.Function) else "its graph"
