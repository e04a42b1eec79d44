"""onnxgen::MoE: a mixture of experts, whatever routes to them.

    MoE(input, router_weights, router_indices?, fc1, fc1_bias?, fc2, fc2_bias?, fc3?, fc3_bias?,
        fc1_scales?, fc2_scales?, fc3_scales?, fc1_zeros?, fc2_zeros?, fc3_zeros?) -> output

    output[t] = sum over the slots j of  router_weights[t, j] * expert(router_indices[t, j], input[t])
    expert(e, x) = fc2[e] @ activation(fc1[e] @ x + fc1_bias[e]) + fc2_bias[e]

The router stays outside, in ordinary operators, whatever it is: all that is left of it here is
which experts a token goes to and what each of them weighs (Shazeer et al., Outrageously Large
Neural Networks, 2017).

Inputs (T tokens, H hidden size, k slots, E experts, I inner size, F = I, or 2 I where fc1 holds
both features of a gated activation)
    input [T, H], router_weights [T, k], router_indices int64 [T, k], each in [0, E).
    fc1 [E, F, H], fc1_bias [E, F], fc2 [E, H, I], fc2_bias [E, H]; fc3 [E, I, H], fc3_bias [E, I]
    make the second feature where it has weights of its own.
    input and weights are of one float type; router_weights may be wider, and then so are the
    products with them and their sum.

Overloads are the activation (`functions.activation`: a name or its text), and what else is special,
joined by "_": "interleaved" where features take turns in fc1's rows (a0 b0 a1 b1 ..., else all a,
then all b), "fc1t" and "fc2t" where fc1 and fc3, or fc2, are transposed ([E, H, F], [E, I, H]),
"bias1", "bias2", "repeats" where a token may name an expert twice, "separate" where fc3 is given,
"dense" where there are no indices and router_weights is [T, E], "scaled" where the weights multiply
the expert's input and not its output. A dense one passes over experts that weigh 0, so that a
dense and scaled one has to make 0 of 0.

Quantised weights, "q4" or "q8" by the bits of a code, are uint8 [E, N, K*bits/8] for [E, N, K], a
row's first code in its first byte's lowest bits: (code - zero point) * scale. Scales are
[E, N, blocks] of the input's type, each for K/blocks codes of a row; zero points, "zeros" where
they are given and else 2^(bits-1), are packed as the codes are, each row in whole bytes. "coarse"
is the quantiser's leave to round what is multiplied to 8 bits; the body makes no use of it.

GroupedMatMul. The proposal for the standard (onnx/onnx #8193: input [M, K], weights [G, K, N],
group_indices [M, k], bias [G, N] -> [M, k, N]) is one product of the two. MoE is
    h = GroupedMatMul(input, fc1^T, router_indices, fc1_bias)                     [T, k, F]
    d = GroupedMatMul(activation(h) as [T*k, I], fc2^T, router_indices as [T*k, 1], fc2_bias)
    output = ReduceSum(d as [T, k, H] * router_weights, over k)
and `lowered` in tests/test_moe.py writes it so. The body here groups tokens by expert instead: a
Scan over the experts hands their weights out without copying them, an If passes over experts that
nobody chose, and what is left is two Gemms for each chosen expert. No tensor of [T*k, K, N], which
an export gathers, is ever made, and weights of experts nobody chose are not read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from onnxgen.functions.activation import GATES, Activation
from onnxgen.functions.codes import emit_numbers
from onnxgen.functions.making import ints, made

NAME = "MoE"
GATED = tuple(GATES)
# Places of the inputs.
INPUT, WEIGHTS, INDICES, FC1, BIAS1, FC2, BIAS2, FC3, BIAS3 = range(9)
SCALES, ZEROS = {FC1: 9, FC2: 10, FC3: 11}, {FC1: 12, FC2: 13, FC3: 14}
BITS = {"q4": 4, "q8": 8}
_PARTS = (
    "interleaved",
    "fc1t",
    "fc2t",
    "bias1",
    "bias2",
    "repeats",
    "separate",
    "dense",
    "scaled",
    *BITS,
    "zeros",
    "coarse",
)


def overload_of(activation: str, **given: bool) -> str:
    """The overload for an activation and what is given, by the words of the module's text."""
    return "_".join([activation, *(part for part in _PARTS if given.get(part))])


def parts_of(overload: str) -> tuple[Activation, frozenset[str]]:
    """The activation of an overload, and what else is special.

    Raises:
        KeyError: there is no such overload.
    """
    text, *parts = overload.split("_")
    activation = Activation(text)
    two = {"interleaved", "separate"} & set(parts)
    if parts != [part for part in _PARTS if part in parts] or len(two) > 1:
        raise KeyError(overload)
    if (two and not activation.gated) or {"scaled", "bias2"} <= set(parts):
        raise KeyError(overload)
    if "repeats" in parts and {"scaled", "dense"} & set(parts):
        raise KeyError(overload)
    if {"scaled", "dense"} <= set(parts) and ("bias1" in parts or not keeps_zero(activation)):
        raise KeyError(overload)
    packed = [part for part in parts if part in BITS]
    turned = {"fc1t", "fc2t"} & set(parts)
    if len(packed) > 1 or (packed and turned) or ({"zeros", "coarse"} & set(parts) and not packed):
        raise KeyError(overload)
    return activation, frozenset(parts)


def keeps_zero(activation: Activation) -> bool:
    """Whether it makes 0 of 0: then experts without biases do so too."""
    with np.errstate(all="ignore"):
        return bool(activation(np.float64(0), np.float64(0)) == 0)


def bits_of(parts: frozenset[str]) -> int | None:
    """How many bits a quantised weight's codes have; None where weights are numbers."""
    return next((BITS[part] for part in parts if part in BITS), None)


def build(overload: str, opset: int) -> ir.Function:
    """One overload.

    Raises:
        KeyError: there is none of this name.
    """
    activation, parts = parts_of(overload)
    inputs = {
        "input": True,
        "router_weights": True,
        "router_indices": "dense" not in parts,
        "fc1": True,
        "fc1_bias": "bias1" in parts,
        "fc2": True,
        "fc2_bias": "bias2" in parts,
        "fc3": "separate" in parts,
        "fc3_bias": {"separate", "bias1"} <= parts,
    }
    if bits_of(parts):
        names = ("fc1", "fc2", "fc3")
        inputs |= {f"{name}_scales": inputs[name] for name in names}
        inputs |= {f"{name}_zeros": inputs[name] and "zeros" in parts for name in names}

    def body(op: OpBuilder, *given: ir.Value | None) -> list[ir.Value]:
        return [_Body(op, activation, parts, given).output()]

    return made(NAME, overload, opset, inputs, ("output",), (), body)


class _Body:
    """The nodes of one overload, from the outside in."""

    def __init__(
        self,
        op: OpBuilder,
        activation: Activation,
        parts: frozenset[str],
        given: Sequence[ir.Value | None],
    ) -> None:
        self.activation, self.parts = activation, parts
        x, weights = given[INPUT], given[WEIGHTS]
        assert x is not None
        assert weights is not None
        self.x, self.weights, self.indices = x, weights, given[INDICES]
        self.experts = {at: v for at, v in enumerate(given) if at >= FC1 and v is not None}
        self.op = op
        if self.indices is not None:
            indices = self.indices
            if "repeats" in parts:
                weights, indices = _once(op, weights, indices)
            self.chosen = op.Reshape(indices, ints(op, -1))  # [T*k]
            self.flat = op.Reshape(weights, ints(op, -1))
            self.slots = op.Squeeze(op.Shape(indices, start=1))

    def output(self) -> ir.Value:
        op = self.op
        zero = op.CastLike(op.Constant(value_float=0.0), self.weights)
        # The Reshape changes nothing: it tells ONNX Runtime the rank, which a Scan must know.
        zeros = op.Reshape(op.Expand(zero, op.Shape(self.x)), ints(op, 0, 0))
        if self.indices is None:
            turns = op.Transpose(self.weights, perm=[1, 0])
        else:
            count = op.Squeeze(op.Shape(self.experts[FC1], start=0, end=1))
            turns = op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1))
        names = ["sum", "turn", *(f"expert_{at}" for at in self.experts)]
        body = op.builder.subgraph(
            self._turn, [ir.Value(name=name) for name in names], [ir.Value(name="sum_out")]
        )
        total = op.Scan(
            zeros, turns, *self.experts.values(), body=body, num_scan_inputs=len(names) - 1
        )
        return op.CastLike(total, self.x)

    def _turn(self, op: OpBuilder, total: ir.Value, turn: ir.Value, *weights: ir.Value) -> ir.Value:
        """One expert's turn: nothing but a question where no token chose it."""
        hit = turn if self.indices is None else op.Equal(self.chosen, turn)
        rows = op.Squeeze(op.NonZero(hit), ints(op, 0))
        expert = dict(zip(self.experts, weights, strict=True))
        then = op.builder.subgraph(
            lambda op: self._added(op, total, turn, rows, expert), [], [ir.Value(name="added")]
        )
        other = op.builder.subgraph(lambda op: op.Identity(total), [], [ir.Value(name="kept")])
        chosen = op.Cast(op.Size(rows), to=ir.DataType.BOOL.value)
        return op.If(chosen, then_branch=then, else_branch=other)

    def _added(
        self,
        op: OpBuilder,
        total: ir.Value,
        turn: ir.Value,
        rows: ir.Value,
        expert: dict[int, ir.Value],
    ) -> ir.Value:
        tokens = rows if self.indices is None else op.Div(rows, self.slots)
        weighs = op.Gather(turn if self.indices is None else self.flat, rows, axis=0)
        weighs = op.Unsqueeze(weighs, ints(op, 1))
        x = op.Gather(self.x, tokens, axis=0)
        if "scaled" in self.parts:
            x = op.CastLike(op.Mul(op.CastLike(x, weighs), weighs), x)
        a, b = self._features(op, x, expert)
        inner = self.activation.emit(op, a, b)
        y = _product(
            op, inner, self._matrix(op, expert, FC2), expert.get(BIAS2), "fc2t" in self.parts
        )
        y = op.CastLike(y, weighs)
        if "scaled" not in self.parts:
            y = op.Mul(y, weighs)
        at = op.Unsqueeze(tokens, ints(op, 1))
        # Not ScatterND's own "add": ONNX Runtime's CPU has it for float32 only.
        return op.ScatterND(total, at, op.Add(op.Gather(total, tokens, axis=0), y))

    def _features(
        self, op: OpBuilder, x: ir.Value, expert: dict[int, ir.Value]
    ) -> tuple[ir.Value, ir.Value | None]:
        turned = "fc1t" in self.parts
        h = _product(op, x, self._matrix(op, expert, FC1), expert.get(BIAS1), turned)
        if not self.activation.gated:
            return h, None
        if "separate" in self.parts:
            matrix = self._matrix(op, expert, FC3)
            return h, _product(op, x, matrix, expert.get(BIAS3), turned)
        if "interleaved" in self.parts:
            end, step = ints(op, 2**62), ints(op, 2)
            a, b = (op.Slice(h, ints(op, at), end, ints(op, 1), step) for at in (0, 1))
            return a, b
        a, b = op.Split(h, axis=1, num_outputs=2, _outputs=2)
        return a, b

    def _matrix(self, op: OpBuilder, expert: dict[int, ir.Value], at: int) -> ir.Value:
        """An expert's weights, unpacked where they are quantised."""
        bits = bits_of(self.parts)
        if bits is None:
            return expert[at]
        return emit_numbers(op, expert[at], expert[SCALES[at]], expert.get(ZEROS[at]), bits)


def _once(op: OpBuilder, weights: ir.Value, indices: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Of slots that name one expert the first gets all their weights; the others name none, -1."""
    same = op.Equal(op.Unsqueeze(indices, ints(op, 2)), op.Unsqueeze(indices, ints(op, 1)))
    sums = op.MatMul(op.Unsqueeze(weights, ints(op, 1)), op.CastLike(same, weights))
    number = op.Cast(same, to=ir.DataType.INT32.value)
    earlier = op.Trilu(number, op.Constant(value_int=-1), upper=0)
    repeated = op.Cast(op.ReduceMax(earlier, ints(op, 2), keepdims=0), to=ir.DataType.BOOL.value)
    return op.Squeeze(sums, ints(op, 1)), op.Where(repeated, op.Constant(value_int=-1), indices)


def _product(
    op: OpBuilder, x: ir.Value, weight: ir.Value, bias: ir.Value | None, turned: bool
) -> ir.Value:
    operands = [x, weight] if bias is None else [x, weight, bias]
    return op.Gemm(*operands, transB=0 if turned else 1)
