"""Weights that are computed from other weights when a model is written, piece by piece.

    experts = stacked(tensors).transposed()          # E of [K, N] -> [E, N, K]
    rows = whole(tensor).interleaved().reversed()    # [E, 2I, H]: a0 b0 a1 b1 ..., last expert first
    weight = DerivedTensor(rows, "model.layers.3.experts")

A `Rows` is what a weight will hold, told along its first axis: reading some of its rows reads no
more of the weights it is made from than it needs and keeps none of them. Gigabytes of experts are
rearranged in the memory of one expert; what they are made from may be external, embedded, or
derived itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

Array: TypeAlias = "np.ndarray[Any, Any]"

PIECE = 4 * 1024 * 1024
"""Bytes that are made at a time, or one row of the first axis where that holds more."""


class Rows(ABC):
    """What a weight holds, read along its first axis.

    Attributes:
        shape: of all of it, at least one axis.
        dtype: of its elements, of whole bytes each.
    """

    shape: tuple[int, ...]
    dtype: ir.DataType

    @abstractmethod
    def read(self, start: int, stop: int) -> Array:
        """Rows start to stop-1, [stop - start, *shape[1:]]."""

    @abstractmethod
    def outline(self, name: Callable[[ir.TensorProtocol], str]) -> str:
        """How it is made, of tensors by these names."""

    def transposed(self) -> Rows:
        """Each row's last two axes exchanged: [E, N, K] of [E, K, N]."""
        assert len(self.shape) > 2
        *first, rows, columns = self.shape
        return _Each(self, (*first, columns, rows), "transposed")

    def interleaved(self) -> Rows:
        """Each row's two halves in turns, a0 b0 a1 b1 ... of a0 a1 ... b0 b1 ...: [E, 2I, ...]."""
        assert self.shape[1] % 2 == 0
        return _Each(self, self.shape, "interleaved")

    def exchanged(self) -> Rows:
        """Each row's neighbours exchanged, a0 b0 a1 b1 ... of b0 a0 b1 a1 ...: [E, 2I, ...]."""
        assert self.shape[1] % 2 == 0
        return _Each(self, self.shape, "exchanged")

    def reshaped(self, *sizes: int) -> Rows:
        """Each row in another shape of as many elements: [E, *sizes]."""
        return _Each(self, (self.shape[0], *sizes), "reshaped")

    def packed(self, bits: int) -> Rows:
        """Each row's codes as bytes without a sign: [E, .., ceil(N*bits/8)] of [E, .., N].

        Of whole numbers of `bits` bits, signed ones moved by 2^(bits-1). The first code of a byte
        is in its lowest bits; the last byte's may be zero.
        """
        return _Packed(self, bits)

    def reversed(self) -> Rows:
        """The last row first."""
        return _Reversed(self)


def whole(tensor: ir.TensorProtocol) -> Rows:
    """A tensor as it is."""
    return tensor.rows if isinstance(tensor, DerivedTensor) else _Whole(tensor)


def stacked(tensors: Sequence[ir.TensorProtocol]) -> Rows:
    """Tensors of one shape, each a row: [E, *shape]."""
    return _Stacked(tensors)


def joined(parts: Sequence[Rows], axis: int) -> Rows:
    """Parts one after the other along an axis."""
    return parts[0] if len(parts) == 1 else _Joined(parts, axis)


class DerivedTensor(ir.LazyTensor):
    """A tensor that is made when it is asked for; `pieces` makes it bit by bit.

    Attributes:
        rows: what it holds.
    """

    def __init__(self, rows: Rows, name: str) -> None:
        assert rows.dtype.bitwidth % 8 == 0, rows.dtype
        super().__init__(
            lambda: ir.tensor(np.ascontiguousarray(rows.read(0, rows.shape[0])), dtype=rows.dtype),
            dtype=rows.dtype,
            shape=ir.Shape(rows.shape),
            name=name,
        )
        self.rows = rows

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, little-endian, in pieces of `PIECE` or one row of the first axis."""
        count = self.rows.shape[0]
        step = max(1, PIECE * count // max(self.nbytes, 1))
        for start in range(0, count, step):
            rows = self.rows.read(start, min(start + step, count))
            yield ir.Tensor(np.ascontiguousarray(rows), dtype=self.dtype).tobytes()


def bytes_of(tensor: ir.TensorProtocol) -> Iterator[bytes]:
    """A tensor's bytes, in pieces where it is derived."""
    if isinstance(tensor, DerivedTensor):
        yield from tensor.pieces()
    else:
        yield tensor.tobytes()


class _Whole(Rows):
    def __init__(self, tensor: ir.TensorProtocol) -> None:
        self._tensor = tensor
        self.shape, self.dtype = _sizes(tensor), tensor.dtype

    def read(self, start: int, stop: int) -> Array:
        array: Array = self._tensor.numpy()  # a view of the file, where it is read from one
        return array[start:stop]

    def outline(self, name: Callable[[ir.TensorProtocol], str]) -> str:
        return name(self._tensor)


class _Stacked(Rows):
    def __init__(self, tensors: Sequence[ir.TensorProtocol]) -> None:
        assert len({(_sizes(each), each.dtype) for each in tensors}) == 1
        self._tensors = tuple(tensors)
        self.shape = (len(self._tensors), *_sizes(tensors[0]))
        self.dtype = tensors[0].dtype

    def read(self, start: int, stop: int) -> Array:
        return np.stack([each.numpy() for each in self._tensors[start:stop]])

    def outline(self, name: Callable[[ir.TensorProtocol], str]) -> str:
        return f"stacked({','.join(map(name, self._tensors))})"


class _Joined(Rows):
    def __init__(self, parts: Sequence[Rows], axis: int) -> None:
        assert len({each.dtype for each in parts}) == 1
        shapes = [list(each.shape) for each in parts]
        total = sum(shape.pop(axis) for shape in shapes)
        assert all(shape == shapes[0] for shape in shapes)
        self._parts, self._axis = tuple(parts), axis
        self.shape = (*shapes[0][:axis], total, *shapes[0][axis:])
        self.dtype = parts[0].dtype

    def read(self, start: int, stop: int) -> Array:
        if self._axis:
            return np.concatenate([each.read(start, stop) for each in self._parts], self._axis)
        found, at = [], 0
        for each in self._parts:
            size = each.shape[0]
            first, last = max(start - at, 0), min(stop - at, size)
            if first < last:
                found.append(each.read(first, last))
            at += size
        return found[0] if len(found) == 1 else np.concatenate(found)

    def outline(self, name: Callable[[ir.TensorProtocol], str]) -> str:
        return f"joined({self._axis},{','.join(each.outline(name) for each in self._parts)})"


@dataclass(eq=False)
class _Each(Rows):
    """Each row rearranged, independently of the others."""

    source: Rows
    shape: tuple[int, ...]
    how: str

    def __post_init__(self) -> None:
        self.dtype = self.source.dtype

    def read(self, start: int, stop: int) -> Array:
        rows = self.source.read(start, stop)
        if self.how == "transposed":
            return rows.swapaxes(-1, -2)
        if self.how == "reshaped":
            return rows.reshape(len(rows), *self.shape[1:])
        half, rest = self.shape[1] // 2, self.shape[2:]
        if self.how == "interleaved":
            turned = rows.reshape(len(rows), 2, half, *rest).swapaxes(1, 2)
        else:
            turned = rows.reshape(len(rows), half, 2, *rest)[:, :, ::-1]
        return turned.reshape(len(rows), *self.shape[1:])

    def outline(self, name: Callable[[ir.TensorProtocol], str]) -> str:
        return f"{self.how}{list(self.shape)}({self.source.outline(name)})"


class _Packed(Rows):
    def __init__(self, source: Rows, bits: int) -> None:
        assert bits in (4, 8)
        self._source, self._bits = source, bits
        self.shape = (*source.shape[:-1], -(-source.shape[-1] * bits // 8))
        self.dtype = ir.DataType.UINT8

    def read(self, start: int, stop: int) -> Array:
        codes = self._source.read(start, stop).astype(np.uint8)
        if self._source.dtype.is_signed():
            codes = codes ^ np.uint8(1 << (self._bits - 1))
        if self._bits == 8:
            return codes
        codes = codes & np.uint8(15)
        if codes.shape[-1] % 2:
            codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], -1)
        return codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)

    def outline(self, name: Callable[[ir.TensorProtocol], str]) -> str:
        return f"packed{self._bits}({self._source.outline(name)})"


class _Reversed(Rows):
    def __init__(self, source: Rows) -> None:
        self._source = source
        self.shape, self.dtype = source.shape, source.dtype

    def read(self, start: int, stop: int) -> Array:
        count = self.shape[0]
        return self._source.read(count - stop, count - start)[::-1]

    def outline(self, name: Callable[[ir.TensorProtocol], str]) -> str:
        return f"reversed({self._source.outline(name)})"


def _sizes(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(int(size) for size in tensor.shape.numpy())
