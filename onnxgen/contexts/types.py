"""Types of values as text: `FLOAT[?,?,64]`, a size that is not fixed is `?`; `FLOAT` of any rank."""

from __future__ import annotations

import re
from collections.abc import Iterable

import onnx
from onnx import TensorProto as T

_SIZE = r"(?:\d{1,18}|\?)"
_TEXT = re.compile(rf"([A-Z0-9]+)(?:\[((?:{_SIZE}(?:,{_SIZE})*)?)\])?", re.ASCII)


def elements(kind: int, dims: Iterable[int | str]) -> str:
    """The text of an element type and sizes."""
    sizes = (str(dim) if isinstance(dim, int) else "?" for dim in dims)
    return f"{T.DataType.Name(kind)}[{','.join(sizes)}]"


def as_text(value: onnx.ValueInfoProto) -> str:
    """The text of what a graph declares; "" where it declares nothing, or no tensor."""
    return type_text(value.type) if value.type.HasField("tensor_type") else ""


def type_text(kind: onnx.TypeProto) -> str:
    """The text of a type of any kind; "" where it says nothing."""
    match kind.WhichOneof("value"):
        case "tensor_type":
            return _tensor(kind.tensor_type)
        case "sparse_tensor_type":
            return f"SPARSE({_tensor(kind.sparse_tensor_type)})"
        case "sequence_type":
            return f"SEQUENCE({type_text(kind.sequence_type.elem_type)})"
        case "optional_type":
            return f"OPTIONAL({type_text(kind.optional_type.elem_type)})"
        case "map_type":
            key = T.DataType.Name(kind.map_type.key_type)
            return f"MAP({key},{type_text(kind.map_type.value_type)})"
        case "opaque_type":
            named = (kind.opaque_type.domain, kind.opaque_type.name)
            return f"OPAQUE({','.join(repr(each.encode().hex()) for each in named)})"
    return ""


def _tensor(kind: onnx.TypeProto.Tensor | onnx.TypeProto.SparseTensor) -> str:
    if kind.elem_type == T.UNDEFINED:
        return ""
    if not kind.HasField("shape"):
        return str(T.DataType.Name(kind.elem_type))
    fixed = [dim.HasField("dim_value") and dim.dim_value >= 0 for dim in kind.shape.dim]
    sizes = zip(fixed, kind.shape.dim, strict=True)
    return elements(kind.elem_type, (dim.dim_value if known else "?" for known, dim in sizes))


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
