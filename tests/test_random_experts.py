"""Mixtures of experts that are drawn: any router, activation, layout and way to bring tokens there.

Each is fused for both targets as a user would, and has to be proven; for ONNX Runtime's it becomes
com.microsoft MoE, or is kept with a reason.

Shapes: T tokens, H hidden, I inner, E experts, k slots, K and N what a product contracts and gives.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxgen.pipeline import FuseOptions, fuse
from tests.graphs import run

Array = np.ndarray[Any, Any]
Weight = Callable[[str], str]
FORMS = ("batched", "grouped", "looped", "dense", "bmm")
ROUTERS = ("softmax, top-k", "softmax, top-k, renormalised", "top-k, softmax", "sigmoid", "biased")
PLAIN = ("relu", "silu", "relu2", "gelu", "quickgelu", "own")
GATES = ("halves", "turns", "apart")
# What becomes of them for ONNX Runtime, gated or plain.
TAKEN = {True: {"silu", "quickgelu"}, False: {"relu", "silu"}}


@dataclass(frozen=True)
class Spec:
    """A layer of experts.

    Attributes:
        gate: where the second feature is; "" where there is none.
        turned: whether weights are held [N, K] and transposed by a node.
        rest: what follows: "", "residual", "shared" or "scaled".
    """

    form: str
    router: str
    experts: int
    slots: int
    hidden: int
    inner: int
    activation: str
    gate: str
    bias: bool
    turned: bool
    rest: str


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    experts = draw(st.integers(2, 6))
    hidden = draw(st.integers(7, 12))
    return Spec(
        draw(st.sampled_from(FORMS)),
        draw(st.sampled_from(ROUTERS)),
        experts,
        draw(st.integers(1, min(3, experts))),
        hidden,
        draw(st.integers(2, 9).filter(lambda inner: inner != hidden)),
        draw(st.sampled_from(PLAIN)),
        draw(st.sampled_from(("", *GATES))),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(("", "residual", "shared", "scaled"))),
    )


class Layer:
    """The graph of a spec."""

    def __init__(self, spec: Spec, seed: int = 0) -> None:
        self.spec = spec
        self.nodes: list[onnx.NodeProto] = []
        self.held: list[onnx.TensorProto] = []
        rng = np.random.default_rng(seed)
        h, inner, e = spec.hidden, spec.inner, spec.experts
        rows = inner * (2 if spec.gate in ("halves", "turns") else 1)
        sizes = {"fc1": (h, rows), "fc2": (inner, h)}
        sizes |= {"fc3": (h, inner)} if spec.gate == "apart" else {}
        self.weights = {name: rng.standard_normal((e, *each)) / 2 for name, each in sizes.items()}
        biases = {f"{name}_bias": (e, each[1]) for name, each in sizes.items() if spec.bias}
        self.weights |= {name: rng.standard_normal(each) / 2 for name, each in biases.items()}
        self.rng = rng

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"v{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, array: Array) -> str:
        kind = np.float32 if array.dtype.kind == "f" else np.int64
        name = f"c{len(self.held)}"
        self.held.append(numpy_helper.from_array(np.array(array, kind, order="C"), name))
        return name

    def ints(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def number(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def model(self) -> onnx.ModelProto:
        spec = self.spec
        weights, indices = self.router()
        y = getattr(self, spec.form)(weights, indices)
        if spec.rest == "scaled":
            y = self.op("Mul", y, self.number(1.5))
        if spec.rest == "shared":
            shared = self.op("MatMul", "x", self.drawn(spec.hidden, 3))
            shared = self.op("MatMul", self.op("Relu", shared), self.drawn(3, spec.hidden))
            y = self.op("Add", y, shared)
        y = self.op("Add", "x", y) if spec.rest == "residual" else y
        self.nodes.append(helper.make_node("Identity", [y], ["y"]))
        shape = ["t", spec.hidden]
        x, out = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in "xy")
        graph = helper.make_graph(self.nodes, "g", [x], [out], self.held)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    def drawn(self, *shape: int) -> str:
        return self.constant(self.rng.standard_normal(shape) / 2)

    def router(self) -> tuple[str, str]:
        spec = self.spec
        logits = self.op("MatMul", "x", self.drawn(spec.hidden, spec.experts))
        slots = self.ints(spec.slots)
        if spec.router == "top-k, softmax":
            values, indices = self.op("TopK", logits, slots, outputs=2)
            return self.op("Softmax", values), indices
        p = self.op("Softmax" if spec.router.startswith("softmax") else "Sigmoid", logits)
        by = p
        if spec.router == "biased":
            by = self.op("Add", p, self.drawn(spec.experts))
        weights, indices = self.op("TopK", by, slots, outputs=2)
        if spec.router == "biased":
            weights = self.op("GatherElements", p, indices, axis=1)
        if spec.router != "softmax, top-k":
            weights = self.op("Div", weights, self.op("ReduceSum", weights, self.ints(-1)))
        return weights, indices

    # --- an expert ----------------------------------------------------------------------------------

    def expert(self, rows: str, weight: Weight) -> str:
        """rows [.., K] of one expert, or of the experts that `weight` gives."""
        first = self.linear(rows, "fc1", weight)
        second = None
        if self.spec.gate == "apart":
            second = self.linear(rows, "fc3", weight)
        elif self.spec.gate == "halves":
            first, second = self.op("Split", first, outputs=2, axis=-1, num_outputs=2)
        elif self.spec.gate == "turns":
            ends = self.ints(2**62), self.ints(-1), self.ints(2)
            first, second = (self.op("Slice", first, self.ints(at), *ends) for at in (0, 1))
        inner = self.activation(first)
        inner = inner if second is None else self.op("Mul", inner, second)
        return str(self.linear(inner, "fc2", weight))

    def linear(self, rows: str, name: str, weight: Weight) -> str:
        y = self.op("MatMul", rows, weight(name))
        return str(self.op("Add", y, weight(f"{name}_bias")) if self.spec.bias else y)

    def activation(self, a: str) -> str:
        match self.spec.activation:
            case "relu":
                found = self.op("Relu", a)
            case "silu":
                found = self.op("Mul", a, self.op("Sigmoid", a))
            case "relu2":
                found = self.op("Pow", self.op("Relu", a), self.number(2))
            case "gelu":
                e = self.op("Erf", self.op("Div", a, self.number(2**0.5)))
                half = self.op("Mul", a, self.op("Add", e, self.number(1)))
                found = self.op("Mul", half, self.number(0.5))
            case "quickgelu":
                gate = self.op("Sigmoid", self.op("Mul", self.number(1.702), a))
                found = self.op("Mul", a, gate)
            case _:
                found = self.op("Tanh", self.op("Min", a, self.number(0.7)))
        return str(found)

    def stack(self, name: str) -> str:
        """All experts' weights [E, K, N], their biases [E, N]."""
        array = self.weights[name]
        if not self.spec.turned or "bias" in name:
            return self.constant(array)
        return str(self.op("Transpose", self.constant(array.swapaxes(1, 2)), perm=[0, 2, 1]))

    def own(self, e: int) -> Weight:
        """One expert's weights, initializers of their own."""

        def weight(name: str) -> str:
            array = self.weights[name][e]
            if not self.spec.turned or "bias" in name:
                return self.constant(array)
            return str(self.op("Transpose", self.constant(array.T)))

        return weight

    # --- ways for tokens to come to experts -----------------------------------------------------------

    def batched(self, weights: str, indices: str) -> str:
        def weight(name: str) -> str:
            found = self.op("Gather", self.stack(name), indices)
            return str(self.op("Unsqueeze", found, self.ints(2)) if "bias" in name else found)

        y = self.expert(self.op("Unsqueeze", "x", self.ints(1, 2)), weight)  # [T, k, 1, H]
        y = self.op("Squeeze", y, self.ints(2))
        y = self.op("Mul", y, self.op("Unsqueeze", weights, self.ints(2)))
        return str(self.op("ReduceSum", y, self.ints(1), keepdims=0))

    def bmm(self, weights: str, indices: str) -> str:
        def weight(name: str) -> str:
            found = self.stack(name)
            return str(self.op("Unsqueeze", found, self.ints(1)) if "bias" in name else found)

        y = self.expert(self.op("Unsqueeze", "x", self.ints(0)), weight)  # [E, T, H]
        columns = self.op("Transpose", self.full(weights, indices), perm=[1, 0])
        y = self.op("Mul", y, self.op("Unsqueeze", columns, self.ints(2)))
        return str(self.op("ReduceSum", y, self.ints(0), keepdims=0))

    def full(self, weights: str, indices: str) -> str:
        """[T, E], zero where an expert was not chosen."""
        tokens = self.op("Shape", "x", start=0, end=1)
        size = self.op("Concat", tokens, self.ints(self.spec.experts), axis=0)
        zeros = self.op("ConstantOfShape", size)
        return str(self.op("ScatterElements", zeros, indices, weights, axis=1))

    def dense(self, weights: str, indices: str) -> str:
        full, y = self.full(weights, indices), ""
        for e in range(self.spec.experts):
            out = self.expert("x", self.own(e))
            column = self.op("Slice", full, self.ints(e), self.ints(e + 1), self.ints(1))
            out = self.op("Mul", out, column)
            y = self.op("Add", y, out) if y else out
        return y

    def looped(self, weights: str, indices: str) -> str:
        y = self.op("ConstantOfShape", self.op("Shape", "x"))
        for e in range(self.spec.experts):
            hit = self.op("NonZero", self.op("Equal", indices, self.constant(np.array(e))))
            tokens = self.op("Gather", hit, self.constant(np.array(0)))
            out = self.expert(self.op("Gather", "x", tokens), self.own(e))
            weight = self.op("GatherND", weights, self.op("Transpose", hit))
            out = self.op("Mul", out, self.op("Unsqueeze", weight, self.ints(1)))
            at = self.op("Unsqueeze", tokens, self.ints(1))
            y = self.op("ScatterND", y, at, out, reduction="add")
        return str(y)

    def grouped(self, weights: str, indices: str) -> str:
        spec = self.spec
        flat = self.op("Reshape", indices, self.ints(-1))
        size = self.op("Shape", flat)
        _, order = self.op("TopK", flat, size, outputs=2, largest=0)
        tokens = self.op("Div", order, self.constant(np.array(spec.slots)))
        rows = self.op("Gather", "x", tokens)
        hot = self.op("OneHot", flat, self.constant(np.array(spec.experts)), self.ints(0, 1))
        counts = self.op("ReduceSum", hot, self.ints(0), keepdims=0)
        ends = self.op("CumSum", counts, self.constant(np.array(0)))
        starts = self.op("Sub", ends, counts)
        outs = []
        for e in range(spec.experts):
            at = self.ints(e), self.ints(e + 1)
            bounds = self.op("Slice", starts, *at), self.op("Slice", ends, *at)
            own = self.op("Slice", rows, *bounds, self.ints(0))
            outs.append(self.expert(own, self.own(e)))
        y = self.op("Concat", *outs, axis=0)
        each = self.op("Gather", self.op("Reshape", weights, self.ints(-1)), order)
        y = self.op("Mul", y, self.op("Unsqueeze", each, self.ints(1)))
        _, back = self.op("TopK", order, size, outputs=2, largest=0)
        y = self.op("Gather", y, back)
        y = self.op("Reshape", y, self.ints(-1, spec.slots, spec.hidden))
        return str(self.op("ReduceSum", y, self.ints(1), keepdims=0))


def check(spec: Spec) -> None:
    """Both targets' models are proven, and compute the same for other tokens than the proof's."""
    before = Layer(spec).model()
    onnx.checker.check_model(before)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(before, path)
        for target in ("onnx", "ort"):
            output = Path(folder) / f"{target}.onnx"
            report = fuse(path, FuseOptions(output=output, target=target), lambda message: None)
            assert report.proof is not None
            assert report.proof.status == "proven"
            sites = [site for site in report.sites if site.kind == "moe"]
            assert [site.status for site in sites] == ["fused"], sites
            after = onnx.load(output)
            if target == "ort":
                (site,) = [site for site in report.lowered if site.rule == "ORT004"]
                taken = spec.activation in TAKEN[bool(spec.gate)]
                assert site.status == ("fused" if taken else "kept"), site
                assert taken or (site.decline is not None and site.decline.code == "activation")
            for tokens in (1, 2, 31):
                x = np.random.default_rng(tokens).standard_normal((tokens, spec.hidden))
                feeds = {"x": x.astype(np.float32)}
                old, new = (run(model, feeds)["y"] for model in (before, after))
                assert np.abs(old - new).max() <= 1e-5 * max(1.0, np.abs(old).max())


FIRST = Spec("batched", ROUTERS[0], 5, 2, 8, 6, "silu", "halves", False, False, "")


@pytest.mark.parametrize("form", FORMS)
def test_each_form(form: str) -> None:
    number = FORMS.index(form)
    gate = ("", *GATES)[number % 4]
    router, rest = ROUTERS[number], ("", "residual", "shared", "scaled", "")[number]
    check(Spec(form, router, 4, 2, 7, 5, "silu", gate, number % 2 == 1, number % 2 == 0, rest))


# Each takes seconds; the runs in CI draw the same ones every time.
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # shrinking would take minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(specs())
def test_drawn_layers(spec: Spec) -> None:
    check(spec)
