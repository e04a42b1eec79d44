"""Activations of experts, written down: what the first products become before the second.

    silu                      -> mul(a,sigmoid(a))
    swiglu                    -> mul(mul(a,sigmoid(a)),b)
    max(min(a,7),-7)          an activation without a name

An activation is a function of one feature, `a`, or of two, `a` and `b` (a gate and what it lets
through), computed element by element. Its text is part of the overload of `onnxgen::MoE`, so that
no model needs an activation that we foresaw: whatever elementwise operators an exporter wrote can be
said in it. Words are the operators' names in lower case, `float` a cast to float32, `narrow` one
back; numbers are decimal.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

# Operators of one, two and three operands, by the word that stands for them.
OPERATORS: Mapping[str, tuple[str, int]] = {
    **{
        name.lower(): (name, 1)
        for name in [
            "Sigmoid",
            "Tanh",
            "Erf",
            "Relu",
            "Exp",
            "Log",
            "Neg",
            "Sqrt",
            "Abs",
            "Reciprocal",
            "Softplus",
            "Softsign",
            "Sign",
            "Mish",
            "HardSwish",
        ]
    },
    **{
        name.lower(): (name, 2)
        for name in [
            "Add",
            "Sub",
            "Mul",
            "Div",
            "Pow",
            "Min",
            "Max",
            "Greater",
            "Less",
            "GreaterOrEqual",
            "LessOrEqual",
        ]
    },
    "where": ("Where", 3),
    "float": ("Cast", 1),
    "narrow": ("CastLike", 1),
}
NAMES: Mapping[str, str] = {
    "identity": "a",
    "relu": "relu(a)",
    "relu2": "mul(relu(a),relu(a))",
    "silu": "mul(a,sigmoid(a))",
    "gelu": "mul(mul(0.5,a),add(1,erf(mul(a,0.7071067811865475))))",
    "gelutanh": "mul(mul(0.5,a),add(1,tanh(mul(0.7978845608028654,"
    "add(a,mul(0.044715,mul(a,mul(a,a))))))))",
    "quickgelu": "mul(a,sigmoid(mul(1.702,a)))",
}
# A gate g(a) * b bears the name of g, as its authors gave it (Shazeer, GLU Variants, 2020).
GATES: Mapping[str, str] = {
    "glu": "sigmoid(a)",
    "bilinear": "a",
    "reglu": NAMES["relu"],
    "swiglu": NAMES["silu"],
    "geglu": NAMES["gelu"],
    "geglutanh": NAMES["gelutanh"],
}
_KNOWN = {**NAMES, **{name: f"mul({gate},b)" for name, gate in GATES.items()}}
_TOKEN = re.compile(r"-?inf|[a-z]+[0-9]?|-?[0-9.]+(?:e[+-]?[0-9]+)?|[(),]")
# Where activations are compared, with both sides of every bend that their constants may make.
_POINTS = (*np.linspace(-12, 12, 97), -1e5, -1e3, -60.0, 60.0, 1e3, 1e5)
_BENDS = (-2.0, -1.01, -0.99, -0.5, 0.5, 0.99, 1.01, 2.0)
# Numbers in spellings of the names above, which an exporter may have rounded to a narrow type.
_IDEAL = (0.5**0.5, 2**0.5, (2 / math.pi) ** 0.5, (8 / math.pi) ** 0.5, 0.044715, 1.702)

Term: TypeAlias = "tuple[str, tuple[Term, ...]] | str | float"


@dataclass(frozen=True)
class Activation:
    """An activation as its text says it; see the module's text for the words.

    Raises:
        KeyError: the text is none.
    """

    text: str

    def __post_init__(self) -> None:
        _parsed(_KNOWN.get(self.text, self.text))

    @property
    def term(self) -> Term:
        return _parsed(_KNOWN.get(self.text, self.text))

    @property
    def gated(self) -> bool:
        """Whether it is a function of two features."""
        return "b" in _TOKEN.findall(_KNOWN.get(self.text, self.text))

    def emit(self, op: OpBuilder, a: ir.Value, b: ir.Value | None) -> ir.Value:
        """The nodes that compute it."""
        return _emitted(op, self.term, {"a": a, "b": b})

    def __call__(self, a: Any, b: Any = None) -> Any:
        """The numbers it gives, float64."""
        return _computed(self.term, {"a": a, "b": b})

    def named(self, *, narrow: bool = False) -> Activation:
        """The same activation by its name, if it has one: told by its numbers, not its spelling.

        Args:
            narrow: whether its constants were written in a type narrower than float32: then they
                count as the numbers that they stand for.
        """
        constants = _constants(self.term)
        points = np.array([*_POINTS, *(c * bend for c in constants for bend in _BENDS)])
        points = np.unique(points[np.isfinite(points)])
        a, b = np.meshgrid(points, points) if self.gated else (points, None)
        term = _ideal(self.term) if narrow else self.term
        with np.errstate(all="ignore"):
            own = _computed(term, {"a": a, "b": b})
            for name, text in _KNOWN.items():
                known = Activation(text)
                if known.gated != self.gated:
                    continue
                if np.allclose(own, known(a, b), rtol=2e-6, atol=1e-9, equal_nan=True):
                    return Activation(name)
        return self

    def swapped(self) -> Activation:
        """The same function with its two features exchanged."""
        return Activation(written(_swapped(self.term)))


def written(term: Term) -> str:
    """A term as text."""
    if isinstance(term, str):
        return term
    if isinstance(term, float):
        whole = abs(term) < 1e9 and term == int(term)
        return str(int(term)) if whole else str(np.float32(term))
    word, operands = term
    return f"{word}({','.join(map(written, operands))})"


@functools.cache
def _parsed(text: str) -> Term:
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != text:
        raise KeyError(text)
    tokens.reverse()
    try:
        term = _term(tokens)
    except IndexError:
        raise KeyError(text) from None
    if tokens:
        raise KeyError(text)
    return term


def _term(tokens: list[str]) -> Term:
    token = tokens.pop()
    if token in ("a", "b"):
        return token
    if token in _KNOWN and (not tokens or tokens[-1] != "("):
        return _parsed(_KNOWN[token])
    if token not in OPERATORS:
        try:
            return float(token)
        except ValueError:
            raise KeyError(token) from None
    operands = []
    closing = "("
    for _ in range(OPERATORS[token][1]):
        if tokens.pop() != closing:
            raise KeyError(token)
        operands.append(_term(tokens))
        closing = ","
    if tokens.pop() != ")":
        raise KeyError(token)
    return token, tuple(operands)


def _swapped(term: Term) -> Term:
    if isinstance(term, tuple):
        return term[0], tuple(map(_swapped, term[1]))
    return {"a": "b", "b": "a"}.get(term, term) if isinstance(term, str) else term


def _emitted(op: OpBuilder, term: Term, given: Mapping[str, ir.Value | None]) -> ir.Value:
    if isinstance(term, str):
        value = given[term]
        assert value is not None
        return value
    assert not isinstance(term, float), "a constant alone is no activation"
    word, operands = term
    first = given["a"]
    made = [None if isinstance(each, float) else _emitted(op, each, given) for each in operands]
    like = next((each for each in reversed(made) if each is not None), first)
    values = [
        op.CastLike(op.Constant(value_float=each), like) if isinstance(each, float) else value
        for each, value in zip(operands, made, strict=True)
    ]
    if word == "float":
        return op.Cast(*values, to=ir.DataType.FLOAT.value)
    if word == "narrow":
        values.append(first)
    return getattr(op, OPERATORS[word][0])(*values)


def _computed(term: Term, given: Mapping[str, Any]) -> Any:
    if isinstance(term, str):
        return given[term]
    if isinstance(term, float):
        return np.float64(term)
    word, operands = term
    return _NUMBERS[word](*(_computed(each, given) for each in operands))


def _constants(term: Term) -> list[float]:
    """The numbers in a term that could make a bend."""
    if isinstance(term, tuple):
        return [number for each in term[1] for number in _constants(each)]
    return [term] if isinstance(term, float) else []


def _ideal(term: Term) -> Term:
    """A term with the numbers that its constants stand for."""
    if isinstance(term, tuple):
        return term[0], tuple(map(_ideal, term[1]))
    if isinstance(term, float):
        return next((each for each in _IDEAL if _stands_for(term, each)), term)
    return term


def _stands_for(number: float, exact: float) -> bool:
    narrow = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    rounded = (float(np.float64(exact).astype(kind.numpy())) for kind in narrow)
    return math.isclose(number, exact, rel_tol=1e-6) or number in rounded


_erf = np.vectorize(math.erf, otypes=[float])
_NUMBERS: Mapping[str, Any] = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
    "erf": _erf,
    "relu": lambda x: np.maximum(x, 0),
    "exp": np.exp,
    "log": np.log,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "reciprocal": np.reciprocal,
    "softplus": lambda x: np.logaddexp(x, 0),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "sign": np.sign,
    "mish": lambda x: x * np.tanh(np.logaddexp(x, 0)),
    "hardswish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "pow": np.power,
    "min": np.minimum,
    "max": np.maximum,
    "greater": np.greater,
    "less": np.less,
    "greaterorequal": np.greater_equal,
    "lessorequal": np.less_equal,
    "where": np.where,
    "float": lambda x: x,
    "narrow": lambda x: x,
}
