"""Types of values as text: `FLOAT[?,?,64]`, a size that is not fixed is `?`; `FLOAT` of any rank."""

from __future__ import annotations

import re
from collections.abc import Iterable

import onnx
from onnx import TensorProto as T

_TEXT = re.compile(r"([A-Z0-9]+)(?:\[((?:(?:\d+|\?)(?:,(?:\d+|\?))*)?)\])?")


def elements(kind: int, dims: Iterable[int | str]) -> str:
    """The text of an element type and sizes."""
    sizes = (str(dim) if isinstance(dim, int) else "?" for dim in dims)
    return f"{T.DataType.Name(kind)}[{','.join(sizes)}]"


def as_text(value: onnx.ValueInfoProto) -> str:
    """The text of what a graph declares; "" where it declares nothing, or no tensor."""
    tensor = value.type.tensor_type
    if value.type.WhichOneof("value") != "tensor_type" or tensor.elem_type == T.UNDEFINED:
        return ""
    if not tensor.HasField("shape"):
        return str(T.DataType.Name(tensor.elem_type))
    dims = (dim.dim_value if dim.HasField("dim_value") else "?" for dim in tensor.shape.dim)
    return elements(tensor.elem_type, dims)


def parsed(text: str) -> tuple[int, list[int | None] | None]:
    """Element type and sizes; None for a size that is not fixed, or for sizes of any number.

    Raises:
        ValueError: it is no such text.
    """
    found = _TEXT.fullmatch(text)
    if found is None or found[1] == "UNDEFINED":
        raise ValueError(f"{text!r} is no type")
    kind = T.DataType.Value(found[1])  # ValueError where there is none
    if found[2] is None:
        return kind, None
    return kind, [None if each == "?" else int(each) for each in found[2].split(",") if each]


def as_proto(name: str, text: str) -> onnx.ValueInfoProto:
    """A value of that type, as a graph declares it."""
    kind, dims = parsed(text)
    return onnx.helper.make_tensor_value_info(name, kind, dims)


def fits(text: str, shape: tuple[int, ...]) -> bool:
    """Whether a value of that shape is of that type; element types are not looked at."""
    _, dims = parsed(text)
    if dims is None:
        return True
    return len(dims) == len(shape) and all(
        dim is None or dim == size for dim, size in zip(dims, shape, strict=True)
    )
