"""What is said between this process and ONNX Runtime's: JSON, and arrays as they lie in memory.

    send(fd, {"do": "run"}, {"x": x})
    fields, arrays = receive(fd)                    # what the other side sent

A message is the sizes of its two parts; JSON of some fields, and of names, types and shapes; and
the arrays' bytes behind one another. Reading one builds nothing but what JSON knows and arrays of
known types, whatever the other side wrote: a model that took over the runtime's process finds no
way into this one.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

_SIZES = struct.Struct("<QQ")
_MAX_JSON = 1 << 30  # bytes; texts of string tensors are in it
_SMALL = 1 << 16  # bytes that are sent at once
_AHEAD = 1 << 12  # bytes that are read before it is known how many there are
_TO_JSON = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
_FROM_JSON = json.JSONDecoder().decode

_NUMBERS = ["bool", "float16", "float32", "float64", "complex64", "complex128"] + [
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
]
_NARROW = [n for n in dir(ml_dtypes) if re.fullmatch(r"bfloat16|u?int[124]|float[468]_e\w+", n)]
_TYPES: dict[str, np.dtype[Any]] = {
    **{name: np.dtype(name) for name in _NUMBERS},
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in _NARROW},
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}

Array = npt.NDArray[Any]
Wait = Callable[[], None]
"""Returns when a descriptor that does not block may be ready again; raises to give up."""


class MessageError(Exception):
    """What came is no message, or what is to be sent fits in none."""


def send(
    fd: int, fields: Mapping[str, Any], arrays: Mapping[str, Any], wait: Wait | None = None
) -> None:
    """Write a message.

    Args:
        fields: what JSON knows.
        arrays: arrays of numbers or texts, or lists of them, or mappings; None where there is none.

    Raises:
        MessageError: it holds something other than what a message is made of.
        OSError: nobody reads.
    """
    buffers: list[memoryview] = []
    kinds = [_described(value, buffers) for value in arrays.values()]
    head = _TO_JSON((fields, list(arrays), kinds)).encode()
    total = sum([buffer.nbytes for buffer in buffers])
    parts = [memoryview(_SIZES.pack(len(head), total)), memoryview(head), *buffers]
    if len(head) + total <= _SMALL:
        parts = [memoryview(b"".join(parts))]
    for part in parts:
        while part.nbytes:
            try:
                part = part[os.write(fd, part) :]
            except BlockingIOError:
                _blocked(wait)


def receive(
    fd: int, wait: Wait | None = None, *, most: float = math.inf
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a message's fields and its arrays.

    Args:
        most: bytes that its arrays may take.

    Raises:
        EOFError: the other side is gone.
        MessageError: what came is no message.
    """
    # Nothing comes behind a message before it is answered: what is read at once is of this one.
    ahead = memoryview(_read_some(fd, wait))
    while len(ahead) < _SIZES.size:
        ahead = memoryview(bytes(ahead) + _read_some(fd, wait))
    head, total = _SIZES.unpack(ahead[: _SIZES.size])
    ahead = ahead[_SIZES.size :]
    if head > _MAX_JSON or total > most:
        raise MessageError(f"a message of {head} and {total} bytes")

    def fill(view: memoryview) -> None:
        nonlocal ahead
        there = min(len(ahead), len(view))
        view[:there], ahead = ahead[:there], ahead[there:]
        _fill(fd, view[there:], wait)

    text = bytearray(head)
    fill(memoryview(text))
    try:
        fields, names, kinds = _FROM_JSON(text.decode())
    except (ValueError, TypeError, RecursionError) as error:
        raise MessageError("no JSON of ours") from error
    left = total

    def take(count: int) -> Array:
        nonlocal left
        left -= count
        if left < 0:
            raise MessageError("arrays of more bytes than were announced")
        found = np.empty(count, np.uint8)
        fill(found.data)
        return found

    try:
        arrays = {str(n): _made(kind, take) for n, kind in zip(names, kinds, strict=True)}
        fields = dict(fields)
    except (
        TypeError,
        ValueError,
        IndexError,
        KeyError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise MessageError("it does not say what it is made of") from error
    if left or ahead:
        raise MessageError("more bytes than were announced")
    return fields, arrays


def _described(value: Any, buffers: list[memoryview]) -> Any:
    """What an array is, for JSON; its bytes go to the buffers."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return ["list", *[_described(each, buffers) for each in value]]
    if isinstance(value, Mapping):
        keys = _described(np.array(list(value)), buffers)
        return ["mapping", keys, _described(list(value.values()), buffers)]
    array = np.asarray(value)
    if array.dtype.kind in "OUS":
        texts = [each.decode() if isinstance(each, bytes) else each for each in array.flat]
        if not all(isinstance(each, str) for each in texts):
            raise MessageError("an array of objects")
        return ["text", texts, *array.shape]
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    name = _NAMES.get(array.dtype)
    if name is None:
        raise MessageError(f"an array of {array.dtype}")
    if not array.flags.c_contiguous:
        array = array.copy(order="C")
    buffers.append(array.reshape(-1).view(np.uint8).data)
    return [name, *array.shape]


def _made(kind: Any, take: Callable[[int], Array]) -> Any:
    """The value that `_described` was given; a number alone is an array without dims."""
    if kind is None:
        return None
    name, *rest = kind
    if name == "list":
        return [_made(each, take) for each in rest]
    if name == "mapping":
        return dict(zip(_made(rest[0], take).tolist(), _made(rest[1], take), strict=True))
    if name == "text":
        texts = np.empty(len(rest[0]), object)
        texts[:] = [str(each) for each in rest[0]]
        return texts.reshape([_size(dim) for dim in rest[1:]])
    dtype, shape = _TYPES[name], [_size(dim) for dim in rest]
    return take(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError
    return value


def _read_some(fd: int, wait: Wait | None) -> bytes:
    while True:
        try:
            data = os.read(fd, _AHEAD)
        except BlockingIOError:
            _blocked(wait)
            continue
        if not data:
            raise EOFError
        return data


def _fill(fd: int, view: memoryview, wait: Wait | None) -> None:
    while view.nbytes:
        try:
            count = os.readv(fd, [view])
        except BlockingIOError:
            _blocked(wait)
            continue
        if not count:
            raise EOFError
        view = view[count:]


def _blocked(wait: Wait | None) -> None:
    if wait is None:
        raise MessageError("the other side is slow, and nobody waits")
    wait()
