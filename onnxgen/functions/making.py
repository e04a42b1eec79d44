"""What the bodies of functions are made with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
from onnxscript import OpBuilder, build_function

DOMAIN = "onnxgen"
VERSION = 1


def made(
    name: str,
    overload: str,
    opset: int,
    inputs: Mapping[str, bool],
    outputs: Sequence[str],
    attributes: Sequence[ir.Attr],
    body: Callable[..., Sequence[ir.Value]],
) -> ir.Function:
    """A function of the domain.

    Args:
        inputs: names of the inputs, and whether this overload is given them.
        outputs: names of the outputs.
        attributes: those it takes, with their defaults.
        body: called with an `OpBuilder` and the inputs, None for those that are not given.
    """
    slots: dict[str, ir.Value | None] = {
        each: ir.Value(name=each) if given else None for each, given in inputs.items()
    }
    function = build_function(
        body,
        list(slots.values()),
        domain=DOMAIN,
        name=name,
        attributes=attributes,
        opset_imports={"": opset},
    )
    for value, wanted in zip(function.inputs, inputs, strict=True):
        value.name = wanted
    for value, wanted in zip(function.outputs, outputs, strict=True):
        value.name = wanted
    taken = {value.name for value in (*function.inputs, *function.outputs)}
    for number, node in enumerate(function.all_nodes()):
        node.metadata_props.clear()  # where in Python it was traced
        for index, output in enumerate(node.outputs):
            if output.name not in taken:  # a builder of a subgraph counts from the start again
                output.name = f"{node.op_type}_{number}" + (f"_{index}" if index else "")
    function.overload = overload
    function.sort()  # as a model's functions are when it is tidied
    return function


def parameter(op: OpBuilder, name: str, like: ir.Value) -> ir.Value:
    """A float attribute of the function as a scalar of another value's type."""
    number = op.Constant(value_float=ir.RefAttr("value_float", name, ir.AttributeType.FLOAT))
    return op.CastLike(number, like)


def ints(op: OpBuilder, *numbers: int) -> ir.Value:
    """A constant int64 vector."""
    return op.Constant(value_ints=list(numbers))
