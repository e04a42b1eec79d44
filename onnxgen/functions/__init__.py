"""The `onnxgen` domain: operators that the standard has not, each with a body in standard ones.

A rule emits a node of the domain (`Builder.ops(..., domain=DOMAIN, overload=...)`) and nothing
else: `declare` gives a model the functions that its nodes call, `analysis.evaluate.cut` gives them
to the parts it cuts out, `expand` puts the bodies in the place of the calls. What the outputs'
shapes are is told in `analysis.shape_rules`, what caches and masks the inputs are in
`analysis.role_uses` and `analysis.role_joins`, as for any operator.

An optional input that is left out, or an attribute that changes the body, makes an overload: a
body cannot ask what it was given. To add an operator: a file with a function
`build(overload, opset) -> ir.Function`, and a line in `DEFINITIONS`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable

import onnx
import onnx_ir as ir
from onnx_ir import serde
from onnx_ir.passes import common

from onnxgen.functions import grouped_matmul, moe, paged_attention, paged_plan, sink_attention
from onnxgen.functions.making import DOMAIN, VERSION

__all__ = [
    "DEFINITIONS",
    "DOMAIN",
    "VERSION",
    "called",
    "declare",
    "definition",
    "expand",
    "is_ours",
]

# Name -> what builds the body of an overload at an opset; raises KeyError for no overload of it.
DEFINITIONS: dict[str, Callable[[str, int], ir.Function]] = {
    sink_attention.NAME: sink_attention.build,
    moe.NAME: moe.build,
    grouped_matmul.NAME: grouped_matmul.build,
    paged_plan.TOKENS: paged_plan.build_tokens,
    paged_plan.KEYS: paged_plan.build_keys,
    paged_attention.NAME: paged_attention.build,
    paged_attention.CACHE: paged_attention.build_cache,
}
# Set on calls while they are expanded.
_CALL = "onnxgen.call"


def called(nodes: Iterable[ir.Node], opset: int) -> list[onnx.FunctionProto]:
    """The functions that nodes call, as protobufs whose bodies are of this opset, each once."""
    keys = dict.fromkeys(
        (node.op_type, node.overload)
        for node in nodes
        if node.domain == DOMAIN and node.op_type in DEFINITIONS
    )
    return [_proto(name, overload, opset) for name, overload in keys]


def declare(model: ir.Model) -> None:
    """Give a model the functions that its nodes call, in place; those of ours not called go."""
    opset = model.graph.opset_imports.get("", 24)
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    model.graph.opset_imports.pop(DOMAIN, None)
    for proto in called(model.graph.all_nodes(), opset):
        function = serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
        model.graph.opset_imports[DOMAIN] = VERSION


def is_ours(function: ir.Function) -> bool:
    """Whether a model's function is one of these, body and all: then a call of it means the same."""
    if function.domain != DOMAIN or function.name not in DEFINITIONS:
        return False
    try:
        own = _proto(function.name, function.overload, function.opset_imports.get("", 0))
    except KeyError:
        return False
    return _outline(own) == _outline(serde.serialize_function(function))


def definition(node: ir.Node, opset: int = 24) -> onnx.FunctionProto:
    """The body that a node of ours calls.

    Raises:
        KeyError: there is no such operator, or overload of it.
    """
    return _proto(node.op_type, node.overload, opset)


def expand(model: ir.Model) -> None:
    """Put the bodies of our functions in the place of the calls, in place.

    The nodes bear the name of the call before their own, and its metadata.
    """
    nodes = list(model.graph.all_nodes())
    for node in nodes:
        if node.domain == DOMAIN:
            node.metadata_props[_CALL] = node.name or node.op_type
    common.InlinePass(criteria=lambda function: function.domain == DOMAIN)(model)
    old = set(nodes)
    taken = {node.name for node in nodes}
    for node in model.graph.all_nodes():
        call = node.metadata_props.pop(_CALL, None)
        if call is None or node in old:
            continue
        name, number = f"{call}/{node.op_type}", 1
        while name in taken:
            number += 1
            name = f"{call}/{node.op_type}_{number}"
        taken.add(name)
        node.name = name
        for index, output in enumerate(node.outputs):
            if not output.is_graph_output():
                output.name = f"{name}:{index}"
    model.graph.opset_imports.pop(DOMAIN, None)


@functools.cache
def _proto(name: str, overload: str, opset: int) -> onnx.FunctionProto:
    return serde.serialize_function(DEFINITIONS[name](overload, opset))


def _outline(function: onnx.FunctionProto) -> list[object]:
    """What a function computes, without the names in it and the order that its nodes are listed in."""
    known = {name: f"input {index}" for index, name in enumerate(function.input)}
    _trace(function.node, known, 1)
    attributes = [*function.attribute, *function.attribute_proto]
    given = sorted(each if isinstance(each, str) else _bytes(each).hex() for each in attributes)
    return [len(function.input), given, [known.get(name) for name in function.output]]


def _trace(nodes: Iterable[onnx.NodeProto], known: dict[str, str], depth: int) -> None:
    """Put what nodes compute into `known`: for each name, a digest of all that it follows from."""
    for node in nodes:
        inputs = [known.get(name) for name in node.input]
        given: list[object] = []
        for each in sorted(node.attribute, key=lambda attribute: attribute.name):
            if not each.HasField("g"):
                given.append(_bytes(each))
                continue
            inner = dict(known)
            for index, value in enumerate(each.g.input):
                inner[value.name] = f"input {index} of a graph in {depth}"
            _trace(each.g.node, inner, depth + 1)
            made = [inner.get(value.name) for value in each.g.output]
            given.append((each.name, len(each.g.input), len(each.g.initializer), made))
        said = (node.domain, node.op_type, node.overload, inputs, len(node.output), given)
        digest = hashlib.sha256(repr(said).encode()).hexdigest()
        for index, name in enumerate(node.output):
            known[name] = f"{digest}:{index}"


def _bytes(attribute: onnx.AttributeProto) -> bytes:
    return attribute.SerializeToString(deterministic=True)
