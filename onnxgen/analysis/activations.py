"""GELU and Swish, whatever they are spelled with.

Both are x times a function of x that has one node of its own, an Erf, a Tanh or a Sigmoid. What
that node is given, and what is made of what it gives, is written out as a polynomial of x and of
it, so that factors may stand anywhere and sums be multiplied out or not:

    gelu, exact      t = erf(x / sqrt(2))                            0.5 x + 0.5 x t
    gelu, tanh       t = tanh(sqrt(2 / pi) (x + 0.044715 x^3))       0.5 x + 0.5 x t
                     t = sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))  x t
    swish            t = sigmoid(alpha x)                            x t

    (Hendrycks and Gimpel, 2016; Ramachandran et al., 2017; alpha 1 is SiLU, 1.702 "quick GELU".)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from onnxgen.analysis.graph import given, producer, scalar

MAX_STEPS = 8  # operators between x and the node, and between the node and the result

# Products of "x" and "t", sorted -> factor.
Polynomial: TypeAlias = Mapping[tuple[str, ...], float]

_HALF_AND_HALF: Polynomial = {("x",): 0.5, ("t", "x"): 0.5}
_PRODUCT: Polynomial = {("t", "x"): 1.0}
_ROOT = math.sqrt(2 / math.pi)
_CUBIC: Polynomial = {("x",): _ROOT, ("x", "x", "x"): 0.044715 * _ROOT}


@dataclass(frozen=True)
class Gelu:
    """y = x * P(X <= x) for a normal X; `approximate` is "none" or "tanh", as in Gelu-20."""

    x: ir.Value
    y: ir.Value
    approximate: str


@dataclass(frozen=True)
class Swish:
    """y = x * sigmoid(alpha * x), as in Swish-24."""

    x: ir.Value
    y: ir.Value
    alpha: float


def gelu_of(node: ir.Node) -> Gelu | None:
    """The GELU that an Erf, Tanh or Sigmoid node is the heart of."""
    forms: dict[str, tuple[Polynomial, Polynomial, str]] = {
        "Erf": ({("x",): math.sqrt(0.5)}, _HALF_AND_HALF, "none"),
        "Tanh": (_CUBIC, _HALF_AND_HALF, "tanh"),
        "Sigmoid": ({term: 2 * factor for term, factor in _CUBIC.items()}, _PRODUCT, "tanh"),
    }
    if producer(node.outputs[0], *forms) is None:
        return None
    argument, result, approximate = forms[node.op_type]
    for x in _sources(given(node)):
        if _equal(_written(given(node), x), argument, x):
            y = _made(node.outputs[0], x, result)
            if y is not None:
                return Gelu(x, y, approximate)
    return None


def swish_of(node: ir.Node) -> Swish | None:
    """The Swish that a Sigmoid node is the heart of."""
    if producer(node.outputs[0], "Sigmoid") is None:
        return None
    for x in _sources(given(node)):
        argument = _written(given(node), x)
        if argument is None or set(argument) != {("x",)}:
            continue
        y = _made(node.outputs[0], x, _PRODUCT)
        if y is not None:
            return Swish(x, y, argument["x",])
    return None


def _sources(argument: ir.Value) -> Iterator[ir.Value]:
    """What an argument may be a function of: itself, and what it is computed from, nearest first."""
    queue = [argument]
    for value in queue:
        yield value
        node = producer(value, *_ARITHMETIC)
        if node is not None and len(queue) < MAX_STEPS * 2:
            queue += [v for v in node.inputs if v is not None and v not in queue and not _number(v)]


def _made(t: ir.Value, x: ir.Value, wanted: Polynomial) -> ir.Value | None:
    """The value that is this polynomial of x and t, among those computed from t."""
    queue = [t]
    for value in queue:
        for use in value.uses():
            y = use.node.outputs[0]
            if producer(y, *_ARITHMETIC) is None or y in queue or len(queue) > MAX_STEPS * 2:
                continue
            if _equal(_written(y, x, t), wanted, x):
                return y
            queue.append(y)
    return None


def _written(
    value: ir.Value, x: ir.Value, t: ir.Value | None = None, steps: int = MAX_STEPS
) -> Polynomial | None:
    """A value as a polynomial of x and t; None where it is none, or reads anything else."""
    if value is x:
        return {("x",): 1.0}
    if value is t:
        return {("t",): 1.0}
    number = scalar(value)
    if number is not None:
        return {(): number}
    node = producer(value, *_ARITHMETIC)
    if node is None or steps == 0:
        return None
    terms = [_written(v, x, t, steps - 1) for v in node.inputs if v is not None]
    first, second = terms[0], terms[-1]
    if first is None or second is None:
        return None
    match node.op_type:
        case "Identity":
            return first
        case "Neg":
            return _times(first, {(): -1.0})
        case "Mul":
            return _times(first, second)
        case "Add":
            return _plus(first, second)
        case "Sub":
            return _plus(first, _times(second, {(): -1.0}))
        case "Div" if set(second) == {()} and second[()]:
            return _times(first, {(): 1 / second[()]})
        case "Pow" if second in ({(): 2.0}, {(): 3.0}):
            square = _times(first, first)
            return square if second[()] == 2.0 else _times(square, first)
    return None


def _number(value: ir.Value) -> bool:
    return scalar(value) is not None


def _plus(a: Polynomial, b: Polynomial) -> Polynomial:
    return {term: a.get(term, 0.0) + b.get(term, 0.0) for term in {**a, **b}}


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    result: dict[tuple[str, ...], float] = {}
    for one, factor in a.items():
        for other, times in b.items():
            term = tuple(sorted(one + other))
            result[term] = result.get(term, 0.0) + factor * times
    return result


def _equal(found: Polynomial | None, wanted: Polynomial, x: ir.Value) -> bool:
    """Equal up to how exactly the type of x holds the factors."""
    if found is None or set(found) != set(wanted):
        return False
    narrow = x.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    tolerance = 1e-2 if x.dtype == ir.DataType.BFLOAT16 else 2e-3 if narrow else 1e-5
    return all(math.isclose(found[term], wanted[term], rel_tol=tolerance) for term in wanted)


_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow", "Neg", "Identity")
