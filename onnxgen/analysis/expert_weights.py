"""Products with weights that a router chooses: which weights, of which expert, which way round.

An exporter hands an expert's matrix to a MatMul in many ways: gathered for each token out of a
stack [E, N, K], cut out of it for one expert, transposed before or after, or an initializer of its
own. All of them are one thing here: a `Source` for each expert, or a whole stack, and which of its
axes is contracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.expert_codes import Quantised, dequantised, n_bits
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import FLOATS, attribute, constant, given, optional, producer
from onnxgen.analysis.view_shapes import slice_bounds

MAX_STEPS = 12


@dataclass(frozen=True)
class Source:
    """Where the weights of a product come from.

    Attributes:
        value: the initializer: [E, N, K] or [E, K, N]; [N, K] or [K, N] of one expert alone.
            Codes, where they are quantised: so as `codes` says.
        expert: the one that is cut out of a stack; None where there is no stack, or all of it.
        whole: whether the experts of a stack are chosen by numbers computed at run time, or all
            of them are multiplied with.
        turned: whether the contracted axis comes first: [K, N].
        codes: what the numbers are made of, where a quantiser packed them.
    """

    value: ir.Value
    expert: int | None
    whole: bool
    turned: bool = False
    codes: Quantised | None = None


@dataclass(frozen=True)
class Product:
    """rows @ weights, of one expert or of whichever is chosen.

    Attributes:
        node: the MatMul, Gemm or MatMulNBits.
        rows: the operand that is no weight.
        source: its weights.
        bias: what a Gemm or MatMulNBits adds.
    """

    node: ir.Node
    rows: ir.Value
    source: Source
    bias: ir.Value | None = None


def product_of(facts: Facts, node: ir.Node | None) -> Product | None:
    """The product of activations with constant weights that a node is, if it is one."""
    packed = None if node is None else n_bits(facts, node)
    if node is not None and packed is not None:
        codes = Source(packed.codes, None, whole=False, codes=packed)
        return Product(node, given(node), codes, optional(node, 5))
    if node is None or producer(node.outputs[0], "MatMul", "Gemm") is None:
        return None
    gemm = node.op_type == "Gemm"
    if gemm and (attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0):
        return None
    for index in (1, 0):
        weight, rows = given(node, index), given(node, 1 - index)
        rank = facts.shapes.rank(weight)
        if rank is None or rank < 2 or not facts.is_activation(rows):
            continue
        contracted, free = (rank - 2, rank - 1) if index == 1 else (rank - 1, rank - 2)
        if gemm and attribute(node, "transB" if index else "transA", 0):
            contracted, free = free, contracted
        if gemm and attribute(node, "transA" if index else "transB", 0):
            continue  # the rows are turned
        source = _source(facts, weight, contracted, free)
        if source is not None:
            bias = node.inputs[2] if gemm and len(node.inputs) > 2 else None
            return Product(node, rows, source, bias)
    return None


def bias_of(facts: Facts, value: ir.Value | None) -> Source | None:
    """Where a vector for each expert comes from: [E, N], or [N] of one expert alone.

    Axes of size 1 may lie between.
    """
    if value is None:
        return None
    rank = facts.shapes.rank(value)
    traced = _traced(facts, value, None if rank is None else list(range(rank)))
    if traced is None:
        return None
    source, _, expert, chosen = traced
    shape = facts.shapes.of(source) or ()
    rows = len(shape) > 1 and (expert is not None or chosen)
    long = [axis for axis, size in enumerate(shape) if size != 1 or (rows and axis == 0)]
    if len(long) == 1 and expert is None and not chosen:
        return Source(source, None, whole=False)
    if len(long) != 2 or long[0] != 0:
        return None
    return Source(source, expert, whole=expert is None)


def _source(facts: Facts, weight: ir.Value, contracted: int, free: int) -> Source | None:
    rank = facts.shapes.rank(weight)
    assert rank is not None
    traced = _traced(facts, weight, list(range(rank)))
    if traced is None:
        return None
    value, labels, expert, chosen = traced
    if contracted not in labels or free not in labels:
        return None
    axes = (labels.index(contracted), labels.index(free))
    codes = dequantised(value)
    if codes is not None:
        value = codes.codes
    match len(labels):
        case 2 if expert is None and not chosen:
            return Source(value, None, whole=False, turned=axes == (0, 1), codes=codes)
        case 3 if 0 not in axes:
            whole = chosen or (expert is None and labels[0] is not None)
            if expert is None and not whole:
                return None
            return Source(value, expert, whole=whole, turned=axes == (1, 2), codes=codes)
    return None


def _traced(
    facts: Facts, value: ir.Value, labels: list[int | None] | None
) -> tuple[ir.Value, list[int | None], int | None, bool] | None:
    """(initializer, what axis of `value` each of its axes is, expert cut out, whether chosen).

    In the place of an initializer may be what dequantises one.
    """
    expert: int | None = None
    chosen = False
    for _ in range(MAX_STEPS):
        if labels is None:
            return None
        if value.const_value is not None and not value.is_graph_input():
            if value.dtype not in FLOATS or len(value.const_value.shape) != len(labels):
                return None
            return value, labels, expert, chosen
        if dequantised(value) is not None:
            return value, labels, expert, chosen
        node = producer(value)
        if node is None or not node.inputs or node.inputs[0] is None:
            return None
        inner = facts.shapes.of(node.inputs[0])
        outer = facts.shapes.of(value)
        if inner is None or outer is None or len(outer) != len(labels):
            return None
        match node.op_type:
            case "Identity" | "Cast":
                if node.inputs[0].dtype not in FLOATS:
                    return None
            case "Transpose":
                order = attribute(node, "perm", range(len(labels))[::-1])
                placed: list[int | None] = [None] * len(labels)
                for out, axis in enumerate(order):
                    placed[axis] = labels[out]
                labels = placed
            case "Squeeze" | "Unsqueeze" | "Reshape":
                labels = _reshaped(labels, outer, inner)
            case "Split" | "Slice":
                if expert is not None or chosen:
                    return None
                expert = _cut(facts, node, value)
                if expert is None:
                    return None
            case "Gather" | "GatherND":
                if expert is not None or chosen or attribute(node, "axis", 0) != 0:
                    return None
                if attribute(node, "batch_dims", 0) != 0:
                    return None
                number = constant(node.inputs[1])
                if number is not None:
                    if number.size != 1:
                        return None
                    expert = int(number.reshape(()))
                else:
                    chosen = True
                rest = len(inner) - 1
                labels = [None, *labels[len(labels) - rest :]] if rest else None
            case _:
                return None
        value = node.inputs[0]
    return None


def _reshaped(
    labels: Sequence[int | None], outer: Sequence[object], inner: Sequence[object]
) -> list[int | None] | None:
    """Labels behind a view that adds or drops axes of size 1 only."""
    kept = [label for label, size in zip(labels, outer, strict=True) if size != 1]
    if [size for size in outer if size != 1] != [size for size in inner if size != 1]:
        return None
    queue = iter(kept)
    return [None if size == 1 else next(queue) for size in inner]


def _cut(facts: Facts, node: ir.Node, value: ir.Value) -> int | None:
    """Which one of a stack's first axis a Split or Slice takes."""
    shape = facts.shapes.of(value)
    if shape is None or shape[0] != 1:
        return None
    if node.op_type == "Split":
        sizes = [facts.shapes.of(output) for output in node.outputs]
        if attribute(node, "axis", 0) != 0 or any(s is None or s[0] != 1 for s in sizes):
            return None
        return value.index()
    bounds = slice_bounds(facts.shapes, node)
    if bounds is None or len(bounds) != 1 or bounds[0][0] != 0:
        return None
    start = bounds[0][1]
    return start if isinstance(start, int) and not isinstance(start, np.bool_) else None
