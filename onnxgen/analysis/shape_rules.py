"""How each operator's output shapes follow from its inputs'; `view_shapes` has those of views.

An operator that is not here keeps the shape the file declares for it: less is known, nothing
is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxgen.analysis import contrib_shapes, view_shapes
from onnxgen.analysis.graph import CONTRIB, attribute, names, scalar
from onnxgen.analysis.symbols import Dim, broadcast, floor_divide, maximum, never_negative
from onnxgen.analysis.view_shapes import axes_of, broadcast_shapes, shape_of_content

if TYPE_CHECKING:
    from onnxgen.analysis.shapes import Shape, Shapes

ELEMENTWISE = names(
    """
    Abs Acos Add And Asin Atan BitShift BitwiseAnd BitwiseNot BitwiseOr Cast CastLike Ceil
    Celu Clip Cos Cosh CumSum Div Dropout Elu Equal Erf Exp Floor Gelu Greater
    GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log
    LogSoftmax Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu
    Sigmoid Sign Sin Sinh Softmax Softplus Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Trilu
    Where Xor QuickGelu BiasGelu FastGelu
    """
)
# The shape of the first input, whatever else comes in.
LIKE_FIRST = names(
    """
    CastLike CumSum Dropout LayerNormalization RMSNormalization SimplifiedLayerNormalization
    GroupNormalization InstanceNormalization BatchNormalization RotaryEmbedding ScatterND
    ScatterElements TensorScatter Softmax LogSoftmax Trilu Clip DequantizeLinear
    QuantizeLinear MoE QMoE
    """
)


# Operators whose `axis` is one of their first input's.
ALONG = names(
    """
    ArgMax ArgMin Concat Gather GatherElements Hardmax LayerNormalization LogSoftmax
    RMSNormalization ScatterElements SimplifiedLayerNormalization Softmax Split TensorScatter TopK
    """
)


def output_shapes(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None] | None:
    if node.op_type in ALONG and "axis" in node.attributes:
        axis, rank = node.attributes["axis"].as_int(), shapes.rank(node.inputs[0])
        if rank is not None and not -max(rank, 1) <= axis < max(rank, 1):
            raise IndexError(f"there is no axis {axis}")
    contrib = contrib_shapes.RULES.get(node.op_type) if node.domain == CONTRIB else None
    rule = contrib or _SHAPE_RULES.get(node.op_type)
    if rule is not None:
        return rule(shapes, node)
    if node.op_type in LIKE_FIRST:
        return [shapes.of(node.inputs[0])]
    if node.op_type in ELEMENTWISE:
        return [broadcast_shapes([shapes.of(value) for value in node.inputs if value is not None])]
    return None


def _matmul(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    a, b = shapes.of(node.inputs[0]), shapes.of(node.inputs[1])
    if a is None or b is None or len(a) < 1 or len(b) < 1:
        return [None]
    if len(a) == 1 or len(b) == 1:
        return [(*a[:-1], *b[:-2]) if len(b) == 1 else (*b[:-2], b[-1])]
    shapes.merge(a[-1], b[-2])
    batch = broadcast_shapes([a[:-2], b[:-2]])
    return [None if batch is None else (*batch, a[-2], b[-1])]


def _last(shapes: Shapes, node: ir.Node, size: int) -> Shape | None:
    """The first input's shape with another size of its last axis."""
    source = shapes.of(node.inputs[0])
    return None if not source else (*source[:-1], size)


def _gemm(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    a, b = shapes.of(node.inputs[0]), shapes.of(node.inputs[1])
    if a is None or b is None:
        return [None]
    rows = a[1] if attribute(node, "transA", 0) else a[0]
    return [(rows, b[0] if attribute(node, "transB", 0) else b[1])]


def _conv(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    x, weight = shapes.of(node.inputs[0]), shapes.of(node.inputs[1])
    if x is None or weight is None or attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        return [None]
    spatial = len(x) - 2
    pads = attribute(node, "pads", [0] * 2 * spatial)
    strides = attribute(node, "strides", [1] * spatial)
    dilations = attribute(node, "dilations", [1] * spatial)
    sizes: list[Dim] = []
    for axis in range(spatial):
        reach = dilations[axis] * (weight[2 + axis] - 1) + 1
        room = x[2 + axis] + (pads[axis] + pads[axis + spatial]) - reach
        sizes.append(floor_divide(room, strides[axis]) + 1)
    return [(x[0], weight[0], *sizes)]


def _reduce(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    source, axes = shapes.of(node.inputs[0]), axes_of(shapes, node)
    if source is None or axes is None:
        return [None]
    if not axes and attribute(node, "noop_with_empty_axes", 0):
        return [source]
    gone = {axis % len(source) for axis in axes} if axes else set(range(len(source)))
    if attribute(node, "keepdims", 1):
        return [tuple(1 if axis in gone else size for axis, size in enumerate(source))]
    return [tuple(size for axis, size in enumerate(source) if axis not in gone)]


def _arg(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    source = shapes.of(node.inputs[0])
    if source is None:
        return [None]
    axis = attribute(node, "axis", 0) % len(source)
    kept = (1,) if attribute(node, "keepdims", 1) else ()
    return [(*source[:axis], *kept, *source[axis + 1 :])]


def _non_zero(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    rank = shapes.rank(node.inputs[0])
    return [None if rank is None else (rank, shapes.unknown("found"))]


def _one_hot(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    indices, depth = shapes.of(node.inputs[0]), scalar(node.inputs[1])
    if indices is None:
        return [None]
    axis = attribute(node, "axis", -1) % (len(indices) + 1)
    size = shapes.unknown("depth") if depth is None else int(depth)
    return [(*indices[:axis], size, *indices[axis:])]


def _grouped_matmul(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    weights, indices = shapes.of(node.inputs[1]), shapes.of(node.inputs[2])
    if weights is None or indices is None:
        return [None]
    return [(*indices, weights[1 if "turned" in node.overload else 2])]


def _range(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    numbers = [scalar(value) for value in node.inputs]
    known = [number for number in numbers if number is not None]
    if len(known) == 3 and known[2]:
        start, limit, step = known
        return [(max(0, int(np.ceil((limit - start) / step))),)]
    ends = [shapes.content(value) for value in node.inputs]
    if any(end is None or end.size != 1 for end in ends):
        return [(shapes.unknown("dim"),)]
    start, limit, step = (end.flat[0] for end in ends if end is not None)
    if not isinstance(step, (int, np.integer)) or step < 1:
        return [(shapes.unknown("dim"),)]
    length = limit - start if step == 1 else floor_divide(limit - start + step - 1, step)
    return [(length if never_negative(length) else maximum(0, length),)]


def _constant_of_shape(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    target = shape_of_content(shapes, node, 0)
    return [None if target is None else tuple(target)]


def einsum_terms(equation: str, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """The letters of the operands and of the result, an ellipsis spelled out; None where implicit."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    if not arrow or len(operands) != len(ranks):
        return None
    hidden = [
        rank - len(each.replace("...", "")) for each, rank in zip(operands, ranks, strict=True)
    ]
    most = max(hidden)
    if min(hidden) < 0 or any(n and "..." not in o for n, o in zip(hidden, operands, strict=True)):
        return None
    spare = [str(axis) for axis in range(most)]  # no letters: none of the equation's
    spelled = [
        each.replace("...", "".join(spare[most - count :]))
        for each, count in zip(operands, hidden, strict=True)
    ]
    return spelled, result.replace("...", "".join(spare))


def _einsum(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    operands = [shapes.of(value) for value in node.inputs]
    known = [shape for shape in operands if shape is not None]
    if len(known) != len(operands):
        return [None]
    spelled = einsum_terms(attribute(node, "equation"), list(map(len, known)))
    if spelled is None:
        return [None]
    sizes: dict[str, Dim] = {}
    for letters, shape in zip(spelled[0], known, strict=True):
        for letter, size in zip(letters, shape, strict=True):
            sizes[letter] = broadcast(sizes.get(letter, 1), size)
    return [tuple(sizes[letter] for letter in spelled[1])]


def _shape(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    rank = shapes.rank(node.inputs[0])
    if rank is None:
        return [(shapes.unknown("rank"),)]
    return [(len(range(*slice(attribute(node, "start"), attribute(node, "end")).indices(rank))),)]


def _top_k(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    source, count = shapes.of(node.inputs[0]), shapes.content(node.inputs[1])
    if source is None:
        return [None, None]
    axis = attribute(node, "axis", -1) % len(source)
    size = shapes.unknown("dim") if count is None else count.flat[0]
    result = (*source[:axis], size, *source[axis + 1 :])
    return [result, result]


def _attention(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    q, k, v = (shapes.of(value) for value in node.inputs[:3])
    if q is None or k is None or v is None:
        return [None]
    past = shapes.of(node.inputs[4]) if len(node.inputs) > 4 else None
    past_value = shapes.of(node.inputs[5]) if len(node.inputs) > 5 else None
    if len(q) == 4:
        kv_heads, new, k_size, v_size = k[1], k[2], k[3], v[3]
        result = (*q[:3], v_size)
    else:
        heads, kv_heads = attribute(node, "q_num_heads"), attribute(node, "kv_num_heads")
        new, k_size, v_size = (
            k[1],
            floor_divide(k[2], kv_heads),
            floor_divide(v[2], kv_heads),
        )
        result = (*q[:2], v_size * heads)
    total = new + past[2] if past else new
    key = (q[0], kv_heads, total, past[3] if past else k_size)
    value = (q[0], kv_heads, total, past_value[3] if past_value else v_size)
    return [result, key, value]


_SHAPE_RULES: dict[str, Callable[[Shapes, ir.Node], Sequence[Shape | None]]] = {
    **view_shapes.RULES,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "FusedGemm": _gemm,
    "Conv": _conv,
    "FusedConv": _conv,
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "Einsum": _einsum,
    "MatMulNBits": lambda shapes, node: [_last(shapes, node, attribute(node, "N"))],
    "Shape": _shape,
    "Size": lambda shapes, node: [()],
    "TopK": _top_k,
    "ArgMax": _arg,
    "ArgMin": _arg,
    "NonZero": _non_zero,
    "GroupedMatMul": _grouped_matmul,
    "OneHot": _one_hot,
    "Attention": _attention,
    "SinkAttention": _attention,
    **dict.fromkeys(
        names(
            """
            ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare
            ReduceLogSum ReduceLogSumExp
            """
        ),
        _reduce,
    ),
}
