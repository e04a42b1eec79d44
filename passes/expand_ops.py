"""How each of ONNX Runtime's other spellings is said in standard operators; see `passes.expand`.

An expansion takes a builder and the node, and returns a value for each of the node's outputs,
None for one without a standard form.

Shapes: B batch, S new tokens, H heads, D head size, R rotary dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.graph import attribute, given, optional
from onnxgen.patterns.building import Builder

Expansion = Callable[[Builder, ir.Node], "Sequence[ir.Value | None]"]

# What the operators' schemas say where an attribute is not given.
_NORM_EPSILON, _SKIP_EPSILON = 1e-5, 1e-12
_QUICK = 1.702


class KeptError(Exception):
    """A node keeps its spelling; the message says why."""


def _simplified_norm(builder: Builder, node: ir.Node) -> Sequence[ir.Value | None]:
    x, weight = given(node), given(node, 1)
    attributes = {
        "axis": attribute(node, "axis", -1),
        "epsilon": attribute(node, "epsilon", _NORM_EPSILON),
        "stash_type": attribute(node, "stash_type", 1),
    }
    return [_rms(builder, x, weight, attributes)]


def _skip_simplified_norm(builder: Builder, node: ir.Node) -> Sequence[ir.Value | None]:
    """(input, skip, weight, bias?) -> norm, mean, deviation, sum."""
    total = _sum(builder, given(node), given(node, 1), optional(node, 3))
    epsilon = attribute(node, "epsilon", _SKIP_EPSILON)
    y = _rms(builder, total, given(node, 2), {"axis": -1, "epsilon": epsilon})
    return [y, None, None, total]


def _skip_norm(builder: Builder, node: ir.Node) -> Sequence[ir.Value | None]:
    """(input, skip, weight, beta?, bias?) -> norm, mean, deviation, sum."""
    total = _sum(builder, given(node), given(node, 1), optional(node, 4))
    attributes = {"axis": -1, "epsilon": attribute(node, "epsilon", _SKIP_EPSILON)}
    inputs = [total, given(node, 2), optional(node, 3)]
    return [builder.op("LayerNormalization", inputs, attributes), None, None, total]


def _embed_norm(builder: Builder, node: ir.Node) -> Sequence[ir.Value | None]:
    """(ids, types?, words, positions, type table?, weight, beta, mask?, position_ids?)."""
    op = builder.op
    ids, types, words, table, type_table = (optional(node, index) for index in range(5))
    weight, beta, mask, places = (optional(node, index) for index in range(5, 9))
    assert ids is not None
    if places is None:
        length = op("Shape", [ids], {"start": 1, "end": 2})
        places = _steps(builder, length)
    total = op("Add", [op("Gather", [words, ids]), op("Gather", [table, places])])
    if types is not None:
        total = op("Add", [total, op("Gather", [type_table, types])])
    attributes = {"axis": -1, "epsilon": attribute(node, "epsilon", _SKIP_EPSILON)}
    y = op("LayerNormalization", [total, weight, beta], attributes)
    one = builder.constant(np.array(1, dtype=np.int32))
    if mask is not None:
        whole = op("Cast", [mask], {"to": int(ir.DataType.INT32)})
        seen = op("Cast", [op("Equal", [whole, one])], {"to": int(ir.DataType.INT32)})
        counted = op("ReduceSum", [seen, builder.ints(1)], {"keepdims": 0})
    else:
        batch = op("Shape", [ids], {"start": 0, "end": 1})
        zero = ir.tensor(np.zeros(1, dtype=np.int32))
        counted = op("ConstantOfShape", [batch], {"value": zero})
    return [y, counted, total]


def _gelu(approximate: str) -> Expansion:
    def expand(builder: Builder, node: ir.Node) -> Sequence[ir.Value | None]:
        """(x, bias?)."""
        x = _sum(builder, given(node), optional(node, 1))
        return [builder.op("Gelu", [x], {"approximate": approximate})]

    return expand


def _quick_gelu(builder: Builder, node: ir.Node) -> Sequence[ir.Value | None]:
    x, alpha = given(node), attribute(node, "alpha", _QUICK)
    scaled = _times(builder, x, alpha)
    return [builder.op("Mul", [x, builder.op("Sigmoid", [scaled])])]


def _bias_add(builder: Builder, node: ir.Node) -> Sequence[ir.Value | None]:
    return [_sum(builder, given(node), given(node, 1), given(node, 2))]


def _fused_matmul(builder: Builder, node: ir.Node) -> Sequence[ir.Value | None]:
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        raise KeptError("its batch axes are transposed")
    sides = []
    for index, name in enumerate(("transA", "transB")):
        side = given(node, index)
        if attribute(node, name, 0):
            rank = builder.shapes.rank(side)
            if rank is None or rank < 2:
                raise KeptError("the rank of what it transposes is not known")
            order = [*range(rank - 2), rank - 1, rank - 2]
            side = builder.op("Transpose", [side], {"perm": order})
        sides.append(side)
    return [_times(builder, builder.op("MatMul", sides), attribute(node, "alpha", 1.0))]


def _fused_gemm(builder: Builder, node: ir.Node) -> Sequence[ir.Value | None]:
    names = ("alpha", "beta", "transA", "transB")
    y = builder.op("Gemm", list(node.inputs), _given(node, *names))
    parameters = [
        attribute(node, f"activation_{name}")
        for name in ("alpha", "beta", "gamma")
        if attribute(node, f"activation_{name}") is not None
    ]
    return [_activated(builder, y, attribute(node, "activation", ""), parameters)]


def _fused_conv(builder: Builder, node: ir.Node) -> Sequence[ir.Value | None]:
    """(x, weight, bias?, added?)."""
    names = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    y = builder.op("Conv", list(node.inputs[:3]), _given(node, *names))
    y = _sum(builder, y, optional(node, 3))
    parameters = list(attribute(node, "activation_params", []))
    return [_activated(builder, y, attribute(node, "activation", ""), parameters)]


def _rotary(builder: Builder, node: ir.Node) -> Sequence[ir.Value | None]:
    """(x [B,S,H*D] or [B,H,S,D], position_ids [1] or [B,S], cos [M,R/2], sin [M,R/2])."""
    x, positions, cos, sin = (given(node, index) for index in range(4))
    shape, table = builder.shapes.of(x), builder.shapes.of(cos)
    rank = builder.shapes.rank(positions)
    if attribute(node, "is_packed_batching", 0):
        raise KeptError("its batch is packed")
    if attribute(node, "scale", 1.0) != 1.0:
        raise KeptError("it scales the positions")
    if shape is None or table is None or rank is None or not isinstance(table[1], int):
        raise KeptError("the shapes of its inputs are not known")
    turned, heads = 2 * table[1], int(attribute(node, "num_heads", 0))
    attributes = {"interleaved": int(attribute(node, "interleaved", 0))}
    size = shape[-1]
    if len(shape) == 3:
        if heads and not attribute(node, "rotary_embedding_dim", 0):
            size = heads * turned
        if not isinstance(size, int):
            raise KeptError("the size of its heads is not known")
        heads = heads or size // turned
        size //= heads
        attributes["num_heads"] = heads
    if size != turned:
        if len(shape) == 4 and isinstance(shape[1], int):
            attributes["num_heads"] = heads or shape[1]
        attributes["rotary_embedding_dim"] = turned
    if rank == 1:  # the first position of every row
        sizes = [builder.op("Shape", [x], {"start": a, "end": a + 1}) for a in (0, len(shape) - 2)]
        rows = builder.op("Add", [positions, _steps(builder, sizes[1])])
        target = builder.op("Concat", sizes, {"axis": 0})
        positions = builder.op("Expand", [rows, target])
    return [builder.op("RotaryEmbedding", [x, cos, sin, positions], attributes)]


def _rms(
    builder: Builder, x: ir.Value, weight: ir.Value, attributes: Mapping[str, Any]
) -> ir.Value:
    if weight.dtype != x.dtype:
        raise KeptError("its weight has another element type than its input")
    return builder.op("RMSNormalization", [x, weight], dict(attributes))


def _sum(builder: Builder, *values: ir.Value | None) -> ir.Value:
    first, *others = [value for value in values if value is not None]
    for each in others:
        first = builder.op("Add", [first, each])
    return first


def _times(builder: Builder, x: ir.Value, factor: float) -> ir.Value:
    if factor == 1.0:
        return x
    if x.dtype is None:
        raise KeptError("its element type is not known")
    return builder.op("Mul", [x, builder.constant(np.array(factor).astype(x.dtype.numpy()))])


def _steps(builder: Builder, length: ir.Value) -> ir.Value:
    """int64 [N]: 0, 1, 2 ... for a length N given as int64 [1]."""
    zero, one = (builder.constant(np.array(n, dtype=np.int64)) for n in (0, 1))
    return builder.op("Range", [zero, builder.op("Squeeze", [length]), one])


def _given(node: ir.Node, *names: str) -> dict[str, Any]:
    return {name: found.value for name in names if (found := node.attributes.get(name)) is not None}


# Activations inside Gemm and Conv, with the attributes their parameters are.
_ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
    "Softplus": (),
    "Softsign": (),
    "LeakyRelu": ("alpha",),
    "Elu": ("alpha",),
    "ThresholdedRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
}


def _activated(builder: Builder, y: ir.Value, name: str, parameters: Sequence[float]) -> ir.Value:
    if not name:
        return y
    if name == "Clip" and len(parameters) == 2 and y.dtype is not None:
        kind = y.dtype.numpy()
        bounds = [builder.constant(np.array(number).astype(kind)) for number in parameters]
        return builder.op("Clip", [y, *bounds])
    names = _ACTIVATIONS.get(name)
    if names is None or len(names) > len(parameters):
        raise KeptError(f"the activation {name} is not known")
    return builder.op(name, [y], dict(zip(names, map(float, parameters), strict=False)))


EXPANSIONS: Mapping[str, Expansion] = {
    "SimplifiedLayerNormalization": _simplified_norm,
    "SkipSimplifiedLayerNormalization": _skip_simplified_norm,
    "SkipLayerNormalization": _skip_norm,
    "EmbedLayerNormalization": _embed_norm,
    "BiasGelu": _gelu("none"),
    "Gelu": _gelu("none"),
    "FastGelu": _gelu("tanh"),
    "QuickGelu": _quick_gelu,
    "BiasAdd": _bias_add,
    "FusedMatMul": _fused_matmul,
    "TransposeMatMul": _fused_matmul,
    "FusedGemm": _fused_gemm,
    "FusedConv": _fused_conv,
    "RotaryEmbedding": _rotary,
}

# ONNX Runtime has these in the default domain, where the standard does not know them.
DEFAULT_DOMAIN: Mapping[str, Expansion] = {"SimplifiedLayerNormalization": _simplified_norm}
