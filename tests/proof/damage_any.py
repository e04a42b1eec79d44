"""Kinds of damage that ask for no transformer: any edge, attribute, constant or op of a graph."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from tests.proof import strokes
from tests.proof.view import Damage, View, label

Array = npt.NDArray[Any]

_SIBLINGS = (
    ("Less", "LessOrEqual", "Greater", "GreaterOrEqual"),
    ("And", "Or", "Xor"),
    ("Add", "Sub"),
    ("Mul", "Div"),
    ("Max", "Min"),
    ("Sin", "Cos"),
    ("ReduceMax", "ReduceMin"),
    ("ReduceSum", "ReduceMean"),
    ("Sigmoid", "HardSigmoid", "Tanh"),
    ("Relu", "Gelu", "Swish"),
    ("Ceil", "Floor", "Round"),
    ("Exp", "Identity"),
    ("Sqrt", "Abs"),
)
_SMALL = 64
_EARLIER = 4


def edges(view: View) -> Iterator[Damage]:
    """Another value of the same type and shape, made earlier, in the place of one that is read."""
    alike: dict[Any, list[str]] = {}
    for name in view.born:
        if name in view.kinds and name not in view.outputs:
            alike.setdefault(view.kinds[name], []).append(name)
    for place, node in view.nodes:
        for index, name in enumerate(node.input):
            if not name or name not in view.kinds:
                continue
            others = [
                other
                for other in alike.get(view.kinds[name], ())
                if other != name and view.born[other] < place[1]
            ]
            for other in sorted(others, key=lambda each: -view.born[each])[:_EARLIER]:
                where = f"{label(node)} input {index}: {other}"
                yield Damage("any edge", where, partial(strokes.rewire, place, index, other))


def order(view: View) -> Iterator[Damage]:
    """Two inputs of a node exchanged; an input left out; a node left out."""
    for place, node in (*view.nodes, *view.inner):
        names = list(node.input)
        if node.op_type not in ("Add", "Mul", "And", "Or", "Equal", "Max", "Min"):
            for a in range(len(names) - 1):
                if names[a] and names[a + 1] and names[a] != names[a + 1]:
                    where = f"{label(node)} inputs {a}, {a + 1}"
                    yield Damage(
                        "inputs exchanged", where, partial(strokes.exchange, place, a, a + 1)
                    )
        for index in range(1, len(names)):
            if names[index]:
                where = f"{label(node)} input {index}"
                yield Damage("input left out", where, partial(strokes.rewire, place, index, ""))
        inner = bool(place[0])
        if inner and node.op_type in ("Add", "Sub", "Mul", "Div", "And", "Max", "Min", "Tanh"):
            yield Damage("node left out", label(node), partial(strokes.bypass, place, 0))
        for index, name in enumerate(names if not inner else ()):
            if name in view.kinds and view.kinds[name] == view.kinds.get(node.output[0]):
                where = f"{label(node)}, its input {index} instead"
                yield Damage("node left out", where, partial(strokes.bypass, place, index))


def siblings(view: View) -> Iterator[Damage]:
    """An op that computes something like it."""
    for place, node in (*view.nodes, *view.inner):
        for family in _SIBLINGS:
            if node.op_type in family and node.domain == "":
                for other in family:
                    if other != node.op_type:
                        where = f"{label(node)} -> {other}"
                        yield Damage("another op", where, partial(strokes.retype, place, other))


def attributes(view: View) -> Iterator[Damage]:
    """A neighbour of any attribute."""
    for place, node in (*view.nodes, *view.inner):
        if node.op_type in ("Constant", "Cast") or not node.attribute:
            continue
        for attribute in (each for each in node.attribute if not each.ref_attr_name):
            value = onnx.helper.get_attribute_value(attribute)
            for other in _neighbours(value):
                where = f"{label(node)}: {attribute.name} {value} -> {other}"
                yield Damage(
                    "any attribute",
                    where,
                    partial(strokes.put_attribute, place, attribute.name, other),
                )


def _neighbours(value: Any) -> list[Any]:
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, float):
        return [value * 1.05, value * 2] if value else [1.0]
    if isinstance(value, (list, tuple)) and len(value) > 1 and isinstance(value[0], int):
        found = list(value)
        return [[found[1], found[0], *found[2:]], [*found[:-2], found[-1], found[-2]]]
    return []


def constants(view: View) -> Iterator[Damage]:
    """Neighbours of small constants, and weights moved, scaled or with one element wrong."""
    for name in view.constants:
        if name.startswith("damage") or name in view.inputs:
            continue
        values = view.values(name)
        if values.size == 0 or values.dtype.kind not in "iufb":
            continue
        if values.size <= _SMALL:
            for at in sorted({0, values.size // 2, values.size - 1}):
                for other in _beside(values.flat[at]):
                    where = f"{name}[{at}] {values.flat[at]} -> {other}"
                    yield Damage("small constant", where, partial(strokes.put_at, name, at, other))
        shape = list(values.shape)
        for axis in (axis for axis in range(values.ndim) if shape[axis] > 1):
            where = f"{name} {shape} axis {axis}"
            late, back = partial(np.roll, shift=1, axis=axis), partial(np.flip, axis=axis)
            yield Damage("weight moved", where, partial(strokes.put, name, late))
            yield Damage("weight moved", f"{where}, back", partial(strokes.put, name, back))
            if axis and shape[axis] == shape[axis - 1]:
                turned = partial(np.swapaxes, axis1=axis - 1, axis2=axis)
                yield Damage("weight turned", where, partial(strokes.put, name, turned))
        if values.dtype.kind == "f" and values.size > _SMALL:
            more = partial(np.multiply, 1.01)
            yield Damage("weight by 1 %", name, partial(strokes.put, name, more))
            yield Damage("weight's row wrong", name, partial(strokes.put, name, _one_row))
    for place, node in view.inner:
        if node.op_type == "Constant" and len(node.attribute) == 1:
            attribute = node.attribute[0]
            if attribute.type == onnx.AttributeProto.TENSOR:
                values = numpy_helper.to_array(attribute.t)
                if values.size == 1 and values.dtype.kind in "iufb":
                    for other in _beside(values.flat[0]):
                        new = numpy_helper.from_array(np.full_like(values, other))
                        where = f"{label(node)} {values.flat[0]} -> {other}"
                        yield Damage(
                            "small constant",
                            where,
                            partial(strokes.put_attribute, place, "value", new),
                        )
            elif attribute.name in ("value_int", "value_float") and not attribute.ref_attr_name:
                value = onnx.helper.get_attribute_value(attribute)
                for other in _beside(np.asarray(value)[()]):
                    where = f"{label(node)} {value} -> {other}"
                    change = partial(
                        strokes.put_attribute, place, attribute.name, np.asarray(other).item()
                    )
                    yield Damage("small constant", where, change)


def _one_row(values: Array) -> Array:
    new = values.copy()
    new[len(new) // 2] = new[0]
    return new


def _beside(value: Any) -> list[Any]:
    if isinstance(value, (bool, np.bool_)):
        return [not value]
    if np.issubdtype(type(value), np.integer):
        return [int(value) + 1, int(value) - 1]
    if not np.isfinite(value) or abs(value) > 1e30:
        return [0.0]
    return [value * 1.01, value * 1.5] if value else [0.1]


def precision(view: View) -> Iterator[Damage]:
    """Values through half precision, lengths off by one, rows and columns of others."""
    for place, node, index, name in view.edges():
        dtype, shape = view.kinds.get(name, (None, ()))
        if dtype == np.float32 and np.prod(shape) > _SMALL:
            where = f"{label(node)} input {index}"
            ops = [("Cast", [...], {"to": 16}), ("Cast", [...], {"to": 1})]
            yield Damage("precision lost", where, partial(strokes.edge, place, index, ops))
        if dtype is not None and np.issubdtype(dtype, np.integer):
            for step in (-1, 1):
                where = f"{label(node)} input {index} {step:+}"
                change = partial(strokes.shift_edge, place, index, dtype.type(step))
                yield Damage("integer off by one", where, change)
        if dtype is not None and len(shape) > 1 and np.prod(shape) > 4:
            for axis in range(len(shape)):
                if shape[axis] > 1:
                    where = f"{label(node)} input {index} axis {axis}"
                    yield Damage(
                        "moved along an axis", where, partial(strokes.move_edge, place, index, axis)
                    )


SOURCES = (edges, order, siblings, attributes, constants, precision)
