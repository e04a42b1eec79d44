"""The nodes around ONNX Runtime's kernels for experts: MoE, and QMoE for quantised ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.graph import CONTRIB
from onnxgen.derived import Rows
from onnxgen.functions import moe
from onnxgen.patterns.building import Builder
from onnxgen.targets.ort.routing import Routed

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
# Weights in the order in which MoE takes them.
ORDER = (moe.FC1, moe.BIAS1, moe.FC2, moe.BIAS2)


class Kernel:
    """The nodes around one com.microsoft MoE.

    Args:
        x: tokens [T, H].
        experts: fc1, its bias, fc2, its bias in the kernel's layout.
        values: the initializers that some of them are, just as they are.
        kind: the node's attributes but for its router.

    Attributes:
        shares: whether it has a router whose chosen probabilities stay as they are.
    """

    shares = True

    def __init__(
        self,
        builder: Builder,
        x: ir.Value,
        experts: Sequence[Rows | None],
        values: Mapping[Rows, ir.Value],
        kind: Mapping[str, str | int | float],
    ) -> None:
        self._builder, self._x, self._kind = builder, x, kind
        self._experts, self._values = experts, values
        self.node: ir.Node | None = None

    def folded(self, router: Routed, count: int) -> ir.Value:
        """The kernel's own router, its experts from the last to the first."""
        op, ints = self._builder.op, self._builder.ints
        logits = op(
            "Slice", [router.logits, ints(-1), ints(-count - 1), ints(-1), ints(-1)], name="turned"
        )
        logits = op("Reshape", [logits, ints(-1, count)], name="logits")
        kind = HALF if self._x.dtype == router.logits.dtype == HALF else FLOAT
        experts = [None if each is None else each.reversed() for each in self._experts]
        y = self._run(kind, self._as(logits, kind), experts, normalize=router.normalized)
        if router.factor != 1.0:
            factor = np.array(router.factor, dtype=kind.numpy())
            y = op("Mul", [y, self._builder.constant(factor)], name="scaled")
        assert self._x.dtype is not None
        return self._as(y, self._x.dtype)

    def routed_outside(self, weights: ir.Value, indices: ir.Value, count: int) -> ir.Value:
        """Weights of whatever router, [T, k], as logits."""
        op, ints, constant = self._builder.op, self._builder.ints, self._builder.constant
        weights = self._as(weights, FLOAT)
        sizes = self._sizes(weights, count)
        everyone = self._scattered(sizes, indices, weights)
        total = op("ReduceSum", [weights, ints(-1)], {"keepdims": 1}, name="total")
        zero, one = (constant(np.array(each, dtype=np.float32)) for each in (0, 1))
        some = op("Greater", [total, zero], name="any")
        logits = op("Log", [op("Where", [some, everyone, one], name="weights")], name="logits")
        y = self._run(FLOAT, logits, self._experts, normalize=True)
        assert self._x.dtype is not None
        return self._as(op("Mul", [y, total], name="weighted"), self._x.dtype)

    def chosen_outside(self, weights: ir.Value, indices: ir.Value, count: int) -> ir.Value:
        """One expert a token, [T, 1], whose input is multiplied by the weight."""
        op, x = self._builder.op, self._x
        assert x.dtype is not None
        scaled = op("Mul", [self._as(x, FLOAT), self._as(weights, FLOAT)], name="scaled")
        self._x = self._as(scaled, x.dtype)
        return self.routed_outside(self._ones(weights), indices, count)

    def _ones(self, like: ir.Value) -> ir.Value:
        op, one = self._builder.op, ir.tensor(np.ones(1, np.float32))
        return op("ConstantOfShape", [op("Shape", [like])], {"value": one}, name="ones")

    def _sizes(self, weights: ir.Value, count: int) -> ir.Value:
        """[T, E]"""
        tokens = self._builder.op("Shape", [weights], {"start": 0, "end": 1}, name="tokens")
        sizes = [tokens, self._builder.ints(count)]
        return self._builder.op("Concat", sizes, {"axis": 0}, name="sizes")

    def _scattered(self, sizes: ir.Value, indices: ir.Value, values: ir.Value) -> ir.Value:
        """Numbers of the chosen experts, [T, k], at their places among all; of one expert, added."""
        zeros = self._builder.op("ConstantOfShape", [sizes], name="weights")
        attributes = {"axis": 1, "reduction": "add"}
        return self._builder.op(
            "ScatterElements", [zeros, indices, values], attributes, name="weights"
        )

    def _run(
        self,
        kind: ir.DataType,
        logits: ir.Value,
        experts: Sequence[Rows | None],
        *,
        normalize: bool,
    ) -> ir.Value:
        made = [None if each is None else self._initializer(each) for each in experts]
        given = [None if each is None else self._as(each, kind) for each in made]
        attributes = {**self._kind, "normalize_routing_weights": int(normalize)}
        tokens = self._as(self._x, kind)
        y = self._builder.op("MoE", [tokens, logits, *given], attributes, domain=CONTRIB)
        self.node = y.producer()
        return y

    def _initializer(self, rows: Rows) -> ir.Value:
        found = self._values.get(rows)
        return self._builder.derived(rows, "onnxgen/experts") if found is None else found

    def _as(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        if value.dtype == kind:
            return value
        return self._builder.op("Cast", [value], {"to": int(kind)})


class PackedKernel(Kernel):
    """The nodes around one com.microsoft QMoE.

    Args:
        experts: fc1, its scales, its bias, fc2, its scales, its bias, fc1's zero points, fc2's.
    """

    shares = False  # without router_weights it always renormalises, whatever it is told

    def routed_outside(self, weights: ir.Value, indices: ir.Value, count: int) -> ir.Value:
        """Weights of whatever router, [T, k], none of them below zero.

        The kernel is told which experts by ones among zeros, and how much apart from that. An
        expert that is named twice counts once among the k, its weights added up: whom the kernel
        takes in the other's place weighs nothing.
        """
        weights = self._as(weights, FLOAT)
        sizes = self._sizes(weights, count)
        chosen = self._scattered(sizes, indices, self._ones(weights))
        everyone = self._scattered(sizes, indices, weights)
        y = self._run(FLOAT, chosen, self._experts, normalize=False, weights=everyone)
        assert self._x.dtype is not None
        return self._as(y, self._x.dtype)

    def _run(
        self,
        kind: ir.DataType,
        logits: ir.Value,
        experts: Sequence[Rows | None],
        *,
        normalize: bool,
        weights: ir.Value | None = None,
    ) -> ir.Value:
        made = [None if each is None else self._initializer(each) for each in experts]
        w1, s1, b1, w2, s2, b2, z1, z2 = (
            each if each is None or each.dtype == ir.DataType.UINT8 else self._as(each, kind)
            for each in made
        )
        inputs = [w1, s1, b1, w2, s2, b2, None, None, None, z1, z2, None, weights]
        while inputs[-1] is None:
            inputs.pop()
        attributes = {**self._kind, "normalize_routing_weights": int(normalize)}
        tokens = self._as(self._x, kind)
        y = self._builder.op("QMoE", [tokens, logits, *inputs], attributes, domain=CONTRIB)
        self.node = y.producer()
        return y
