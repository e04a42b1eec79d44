"""onnxgen::GroupedMatMul: each row times the matrices that it chooses out of a stack.

    GroupedMatMul(input, weights, group_indices, bias?) -> output

    output[m, j] = input[m] @ weights[group_indices[m, j]] + bias[group_indices[m, j]]

The operator that is proposed for the standard (onnx/onnx #8193), input for input: a mixture of
attention (JetMoE, Shen et al., 2024) projects its queries by it, and any mixture of experts whose
experts are more than `functions.moe` says is made of two.

Inputs (M rows, k slots, G groups)
    input [M, K], weights [G, K, N], bias [G, N]: one float type. group_indices int64 [M, k], each in
    [0, G). output [M, k, N].

Overloads: "turned" where weights are [G, N, K], "bias", joined by "_".

The body is MoE's: a Scan over the groups hands their matrices out without copying them, an If
passes over those that nobody chose, and what is left is one Gemm for each group.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder

from onnxgen.functions.making import ints, made

NAME = "GroupedMatMul"
INPUT, WEIGHTS, INDICES, BIAS = range(4)
_PARTS = ("turned", "bias")


def overload_of(**given: bool) -> str:
    """The overload for what is given, by the words of the module's text."""
    return "_".join(part for part in _PARTS if given.get(part))


def build(overload: str, opset: int) -> ir.Function:
    """One overload.

    Raises:
        KeyError: there is none of this name.
    """
    parts = overload.split("_") if overload else []
    if parts != [part for part in _PARTS if part in parts]:
        raise KeyError(overload)

    def body(
        op: OpBuilder, x: ir.Value, weights: ir.Value, indices: ir.Value, bias: ir.Value | None
    ) -> list[ir.Value]:
        chosen = op.Reshape(indices, ints(op, -1))  # [M*k]
        slots = op.Squeeze(op.Shape(indices, start=1))
        axis = 1 if "turned" in parts else 2
        width = op.Shape(weights, start=axis, end=axis + 1)
        size = op.Concat(op.Shape(chosen), width, axis=0)
        # The Reshape changes nothing: it tells ONNX Runtime the rank, which a Scan must know.
        zero = op.CastLike(op.Constant(value_float=0.0), x)
        rows = op.Reshape(op.Expand(zero, size), ints(op, 0, 0))
        count = op.Squeeze(op.Shape(weights, start=0, end=1))
        groups = op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1))

        def turn(op: OpBuilder, rows: ir.Value, group: ir.Value, *given: ir.Value) -> ir.Value:
            hit = op.Squeeze(op.NonZero(op.Equal(chosen, group)), ints(op, 0))

            def put(op: OpBuilder) -> ir.Value:
                own = op.Gather(x, op.Div(hit, slots), axis=0)
                y = op.Gemm(own, *given, transB=int("turned" in parts))
                return op.ScatterND(rows, op.Unsqueeze(hit, ints(op, 1)), y)

            then = op.builder.subgraph(put, [], [ir.Value(name="put")])
            other = op.builder.subgraph(lambda op: op.Identity(rows), [], [ir.Value(name="kept")])
            some = op.Cast(op.Size(hit), to=ir.DataType.BOOL.value)
            return op.If(some, then_branch=then, else_branch=other)

        stacks = [weights, *([] if bias is None else [bias])]
        names = ["rows", "group", *(f"of_group_{at}" for at in range(len(stacks)))]
        scan = op.builder.subgraph(
            turn, [ir.Value(name=name) for name in names], [ir.Value(name="rows_out")]
        )
        rows = op.Scan(rows, groups, *stacks, body=scan, num_scan_inputs=len(names) - 1)
        return [op.Reshape(rows, op.Concat(op.Shape(indices), width, axis=0))]

    inputs = {"input": True, "weights": True, "group_indices": True, "bias": "bias" in parts}
    return made(NAME, overload, opset, inputs, ("output",), (), body)
