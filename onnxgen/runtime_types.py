"""Inputs and outputs as ONNX Runtime's sessions describe them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx
from onnx import TensorProto as T

_WORDS: dict[int, str] = {
    T.FLOAT: "float",
    T.DOUBLE: "double",
    T.FLOAT16: "float16",
    T.BFLOAT16: "bfloat16",
}
_NAMES: dict[int, str] = {number: name.lower() for name, number in T.DataType.items()}


@dataclass(frozen=True)
class NodeArg:
    """One input or output.

    Attributes:
        name: of the value.
        type: "tensor(float)", "tensor(int64)".
        shape: sizes; a name, or None, where one is not fixed.
    """

    name: str
    type: str
    shape: list[int | str | None]


def node_args(values: Iterable[onnx.ValueInfoProto]) -> list[NodeArg]:
    """The descriptions of a graph's inputs or outputs."""
    found = []
    for value in values:
        tensor = value.type.tensor_type
        kind = _WORDS.get(tensor.elem_type) or _NAMES.get(tensor.elem_type, "unknown")
        shape: list[int | str | None] = [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
            for dim in tensor.shape.dim
        ]
        found.append(NodeArg(value.name, f"tensor({kind})", shape))
    return found
