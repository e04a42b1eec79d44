"""How many bits an element of a tensor takes, by the number of its type.

Kept apart from onnx-ir, which knows it too: a model is loaded to be run without that.
"""

from __future__ import annotations

from onnx import TensorProto as T

_WIDTHS = {
    64: (T.INT64, T.UINT64, T.DOUBLE, T.COMPLEX64),
    32: (T.INT32, T.UINT32, T.FLOAT),
    16: (T.INT16, T.UINT16, T.FLOAT16, T.BFLOAT16),
    128: (T.COMPLEX128,),
}


def bits_of(kind: int) -> int | None:
    """Bits of an element, 0 for a string; None for a type that is unknown or undefined."""
    if kind == T.UNDEFINED or kind not in T.DataType.values():
        return None
    if kind == T.STRING:
        return 0
    for bits, kinds in _WIDTHS.items():
        if kind in kinds:
            return bits
    # The rest say it in their names, FLOAT8E4M3FN, INT4, but BOOL; a byte is the most they take.
    name = T.DataType.Name(kind)
    return next((bits for bits in (8, 6, 4, 2) if f"T{bits}" in name), 8)
