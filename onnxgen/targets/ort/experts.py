"""ORT004: onnxgen::MoE becomes com.microsoft MoE, its router inside where the kernel has it.

Replaces
    MoE(x, w, i, ...), w and i of a router as in `routing`
    -> com.microsoft MoE(x, logits from the last expert to the first, ...) * factor
    MoE(x, w, i, ...), any other router whose weights are never below zero
    -> com.microsoft MoE(x, Log(W), ...) * ReduceSum(w), W = w scattered to [T, E]
    MoE(x, w, i, ...) of one expert a token, w multiplying its input
    -> com.microsoft MoE(x * w, Log(W), ...), W = 1 scattered to [T, E]
    the same of quantised weights (`packed_experts`)
    -> com.microsoft QMoE, its router inside where that renormalises; any other router outside:
       QMoE(x, 1 scattered to [T, E], ..., router_weights = w scattered to [T, E])

    Weights are brought into the kernel's layout when the model is written, one expert at a time:
    [E, 2I, H] with the features of a gate in turns, or [E, I, H]; [E, H, I].

    Of equal probabilities the kernel takes the expert with the larger index, TopK the one with
    the smaller: with its own router the kernel is given experts and logits from the last to the
    first. Logits are turned and not the router's weights, so that they are the same to the last
    bit. Any other router's choice is made outside: the softmax of Log(W) is W over its row's sum,
    and where W is zero nobody sees which expert the kernel takes. A row of nothing but zeros is
    given ones, and multiplied by zero. Numbers are scattered by addition, as the base operator
    lets an expert be named twice.

Looks for
    1. onnxgen::MoE with indices
    2. an activation that the kernel has
    3. weights that are initializers of a type that the kernel takes
    4. a number of chosen experts that is fixed
    5. a router that the kernel has, or weights that are never below zero

Declines
    activation: the kernel has silu, relu, identity, gelu with tanh, and (max(min(b, L), -L) + beta)
        * min(a, L) * sigmoid(alpha * min(a, L)).
        Expected: one of these.
        Change: none: --target onnx has any activation.
    form: no indices, or weights of several experts that multiply the input.
        Expected: indices and weights [T, k].
        Change: none: --target onnx has these forms.
    weights: they are computed, or of a type that the kernel does not take.
        Expected: initializers of float32 or float16, as the input is.
        Change: export without casts of the experts' weights.
    router: indices that may be no expert's or are not int64, weights that may be below zero, or
        whose number of slots is not fixed. (QMoE too is wrong where its router_weights are below
        zero.)
        Expected: a fixed k, and weights that are probabilities.
        Change: export with k as a constant.
    accuracy: 8 bits in blocks: the CPU kernel rounds what it multiplies to 8 bits, told to or not.
        Expected: 4 bits in blocks, or 8 bits with a scale a row.
        Change: quantise to 4 bits, or to 8 with a scale a row.
    blocks: blocks of different sizes in fc1 and fc2, or of a size that the kernel has not.
        Expected: one size, at least 16, a power of 2.
        Change: quantise with one block_size of 16, 32, 64, 128 or 256.
    layout: zero points of 4 bits, one a row: two rows would share a byte.
        Expected: zero points in blocks, or none.
        Change: quantise in blocks, or symmetrically.

Numerics
    The same products. Probabilities of logits that differ by less than float32 tells apart count
    as equal, as they may in the original's own Softmax. Float16 is computed in float32.

Seen in
    every mixture of experts, after raising.

Example
    opset 24
    <ir_version: 10, opset_import: ["" : 24, "onnxgen" : 1]> g
    (float[t,8] x)
    => (float[t,8] y)
    <float[8,5] R, float[5,6,8] W1, float[5,8,6] W2>
    {
      l = MatMul(x, R)
      p = Softmax(l)
      w, i = TopK(p, [2])
      y = onnxgen.MoE:relu(x, w, i, W1, , W2)
    }
    becomes
        ...
        turned = Slice(l, [-1], [-6], [-1], [-1])
        logits = Reshape(turned, [-1,  5])
        y = com.microsoft.MoE<activation_type = relu, k = 2, normalize_routing_weights = 0>(x,
            logits, experts, , experts_2)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxgen import derived, functions
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.signs import nonnegative
from onnxgen.derived import Rows
from onnxgen.functions import moe
from onnxgen.functions.activation import Activation
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rule import Declined, Rewrite, Rule
from onnxgen.targets.ort.expert_kernels import FLOAT, HALF, ORDER, Kernel, PackedKernel
from onnxgen.targets.ort.packed_experts import Unfit, packed
from onnxgen.targets.ort.routing import routed

_PLAIN = {"silu": "silu", "relu": "relu", "identity": "identity", "gelutanh": "gelu"}


@dataclass(frozen=True)
class _Swiglu:
    """(max(min(b, L), -L) + beta) * min(a, L) * sigmoid(alpha * min(a, L)); L may be infinite.

    Attributes:
        swapped: whether it is the activation's second feature that is the gate a.
    """

    alpha: float
    beta: float
    limit: float
    swapped: bool

    def attributes(self) -> dict[str, float]:
        found = {"activation_alpha": self.alpha, "activation_beta": self.beta}
        return found if np.isinf(self.limit) else {**found, "swiglu_limit": self.limit}


class Experts(Rule):
    """Anchored at onnxgen::MoE."""

    code = "ORT004"
    kind = "experts"
    anchors = frozenset({moe.NAME})

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        if node.domain != functions.DOMAIN:
            return None
        activation, parts = moe.parts_of(node.overload)
        if "dense" in parts:
            raise Declined(self, "form", "every expert has a weight for every token", node)
        builder.passed(1)
        gate, kind = self._activation(activation, node)
        builder.passed(2)
        given = [*node.inputs, *[None] * (moe.ZEROS[moe.FC3] + 1 - len(node.inputs))]
        x, weights, indices = given[: moe.FC1]
        assert x is not None
        assert weights is not None
        assert indices is not None
        rows = {at: self._weight(given[at], x, node) for at in range(moe.FC1, len(given))}
        builder.passed(3)
        values = {each: value for at, each in rows.items() if each and (value := given[at])}
        arranged, bits = _arranged(rows, parts, gate), moe.bits_of(parts)
        fc1 = arranged[moe.FC1]
        assert fc1 is not None
        count = fc1.shape[0]
        slots = (facts.shapes.of(weights) or (None,))[-1]
        if not isinstance(slots, int) or not 0 < slots <= count:
            raise Declined(self, "router", f"{slots} of {count} experts are chosen", node)
        builder.passed(4)
        kind = {**kind, "k": slots}
        if bits is None:
            kernel = Kernel(builder, x, [arranged[at] for at in ORDER], values, kind)
        else:
            kernel = self._packed(builder, x, arranged, values, kind, parts, node)
        scaled = "scaled" in parts
        router = None if scaled else routed(facts, weights, indices, count)
        outside = (
            router is None
            or router.logits.dtype not in (FLOAT, HALF)
            or not (router.normalized or kernel.shares)
        )
        if router is not None and not outside:
            y = kernel.folded(router, count)
        elif indices.dtype != ir.DataType.INT64:
            raise Declined(self, "router", f"its indices are {indices.dtype}", node)
        elif scaled and slots > 1:
            raise Declined(self, "form", "weights of several experts multiply the input", node)
        elif scaled:
            y = kernel.chosen_outside(weights, indices, count)
        elif nonnegative(weights):
            y = kernel.routed_outside(weights, indices, count)
        else:
            reason = f"its weights {weights.name!r} may be below zero, and the kernel's are not"
            raise Declined(self, "router", reason, node)
        assert kernel.node is not None
        return Rewrite(
            kernel.node,
            ((node.outputs[0], y),),
            {
                "experts": count,
                "activation": str(kind["activation_type"]),
                "router": "outside" if outside else "inside",
            },
            choices={indices: count} if outside else {},
            nonnegative=frozenset({weights} if outside and not scaled else ()),
        )

    def _activation(
        self, activation: Activation, node: ir.Node
    ) -> tuple[_Swiglu | None, dict[str, str | int | float]]:
        """The gated activation, if it is one, and how the kernel is told the activation."""
        if activation.gated:
            gate = _swiglu(activation)
            if gate is not None:
                return gate, {"activation_type": "swiglu", "swiglu_fusion": 1, **gate.attributes()}
        else:
            name = _PLAIN.get(activation.named().text)
            if name is not None:
                return None, {"activation_type": name}
        text = activation.named().text
        raise Declined(self, "activation", f"the CPU kernel has no activation {text!r}", node)

    def _packed(
        self,
        builder: Builder,
        x: ir.Value,
        arranged: Mapping[int, Rows | None],
        values: Mapping[Rows, ir.Value],
        kind: Mapping[str, str | int | float],
        parts: frozenset[str],
        node: ir.Node,
    ) -> Kernel:
        bits = moe.bits_of(parts)
        assert bits is not None
        try:
            experts, told = packed(arranged, bits)
        except Unfit as error:
            raise Declined(self, error.code, str(error), node) from None
        if "coarse" in parts:
            told |= {"accuracy_level": 4}
        return PackedKernel(builder, x, experts, values, {**kind, **told})

    def _weight(self, value: ir.Value | None, x: ir.Value, node: ir.Node) -> Rows | None:
        if value is None:
            return None
        if value.const_value is None or value.is_graph_input():
            raise Declined(self, "weights", f"{value.name!r} is computed", node)
        if value.dtype == ir.DataType.UINT8:
            return derived.whole(value.const_value)
        if value.dtype != x.dtype or value.dtype not in (FLOAT, HALF):
            kinds = f"{value.name!r} is {value.dtype} and the input {x.dtype}"
            raise Declined(self, "weights", kinds, node)
        return derived.whole(value.const_value)


def _swiglu(activation: Activation) -> _Swiglu | None:
    """The kernel's gated activation that this one is, told by its numbers; None for any other."""
    for each, swapped in ((activation, False), (activation.swapped(), True)):
        found = _fitted(each, swapped)
        if found is not None and _is(each, found):
            return found
    return None


def _fitted(activation: Activation, swapped: bool) -> _Swiglu | None:
    """The only constants that it can be."""
    small, far = 2.0**-8, 2.0**40
    with np.errstate(all="ignore"):
        at_zero = float(activation(small, 0.0))
        gate = (float(activation(small, small)) - at_zero) / small  # min(a, L) * sigmoid(...)
        if not 0 < gate < small:
            return None
        alpha = -float(np.log(small / gate - 1)) / small
        beta = at_zero / gate
        limit = float(activation(small, far)) / gate - beta
        if not np.isfinite([alpha, beta, limit]).all() or limit <= small:
            return None
    constants = [float(f"{each:.7g}") for each in (alpha, beta, limit)]
    return _Swiglu(constants[0], constants[1], np.inf if limit > far / 2 else constants[2], swapped)


def _is(activation: Activation, found: _Swiglu) -> bool:
    grid = np.concatenate([np.linspace(-12, 12, 97), [-60.0, 60.0, -1e3, 1e3, -1e5, 1e5]])
    if np.isfinite(found.limit):
        grid = np.concatenate([grid, found.limit * np.array([-1.01, -0.99, 0.99, 1.01])])
    a, b = np.meshgrid(grid, grid)
    with np.errstate(all="ignore"):
        gate = np.minimum(a, found.limit)
        wanted = gate / (1 + np.exp(-found.alpha * gate))
        wanted = wanted * (np.clip(b, -found.limit, found.limit) + found.beta)
        own = activation(a, b)
    return bool(np.allclose(own, wanted, rtol=2e-6, atol=1e-12))


def _arranged(
    rows: Mapping[int, Rows | None], parts: frozenset[str], gate: _Swiglu | None
) -> dict[int, Rows | None]:
    """What the base operator is given as the kernels have it, fc3 joined to fc1."""

    def features(first: int, second: int) -> Rows | None:
        one, other = rows[first], rows[second]
        if one is None:
            return None
        if first == moe.FC1 and "fc1t" in parts:
            one, other = one.transposed(), None if other is None else other.transposed()
        if other is not None:
            one = derived.joined([one, other], axis=1)
        if gate is not None and "interleaved" not in parts:
            one = one.interleaved()
        return one.exchanged() if gate is not None and gate.swapped else one

    fc2 = rows[moe.FC2]
    assert fc2 is not None
    pairs = {moe.FC1: moe.FC3, moe.BIAS1: moe.BIAS3}
    pairs |= {each[moe.FC1]: each[moe.FC3] for each in (moe.SCALES, moe.ZEROS)}
    return {
        **{first: features(first, second) for first, second in pairs.items()},
        **{at: rows[at] for at in (moe.BIAS2, moe.SCALES[moe.FC2], moe.ZEROS[moe.FC2])},
        moe.FC2: fc2.transposed() if "fc2t" in parts else fc2,
    }
