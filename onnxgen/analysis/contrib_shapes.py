"""Output shapes and element types of ONNX Runtime's own operators (domain com.microsoft).

Shapes: B batch, S new tokens, P past, T total, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from onnxgen.analysis.graph import attribute, optional
from onnxgen.analysis.symbols import Dim, floor_divide, maximum

if TYPE_CHECKING:
    from onnxgen.analysis.shapes import Shape, Shapes


def output_dtypes(node: ir.Node) -> list[ir.DataType | None]:
    """Element types: those of the file, else the input that the operator's type follows."""
    index = _TYPED_BY.get(node.op_type, 0)
    value = optional(node, index)
    first = None if value is None else value.dtype
    fixed = _TYPES.get(node.op_type, {})
    return [output.dtype or fixed.get(i, first) for i, output in enumerate(node.outputs)]


# The input whose element type the outputs have, where it is not the first.
_TYPED_BY = {"EmbedLayerNormalization": 2, "GatherBlockQuantized": 2, "DequantizeLinear": 1}
# Outputs whose element type is always the same.
_TYPES: dict[str, dict[int, ir.DataType]] = {
    "EmbedLayerNormalization": {1: ir.DataType.INT32},
    "SkipLayerNormalization": {1: ir.DataType.FLOAT, 2: ir.DataType.FLOAT},
    "SkipSimplifiedLayerNormalization": {1: ir.DataType.FLOAT, 2: ir.DataType.FLOAT},
}


def _skip_norm(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    x = shapes.of(node.inputs[0])
    rows = None if x is None else (*x[:-1], 1)
    return [x, rows, rows, x]


def _embed_norm(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    ids, table = shapes.of(node.inputs[0]), shapes.of(node.inputs[2])
    if ids is None or table is None:
        return [None]
    embedded = (*ids, table[-1])
    return [embedded, ids[:1], embedded]


def _matmul_n_bits(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    x, columns = shapes.of(node.inputs[0]), attribute(node, "N")
    return [None if x is None else (*x[:-1], columns)]


def _fused_matmul(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    a, b = shapes.of(node.inputs[0]), shapes.of(node.inputs[1])
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return [None]
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        return [None]
    rows = a[-1] if attribute(node, "transA", 0) else a[-2]
    columns = b[-2] if attribute(node, "transB", 0) else b[-1]
    batch = a[:-2] if len(a) >= len(b) else b[:-2]
    return [(*batch, rows, columns)] if min(len(a), len(b)) == 2 or a[:-2] == b[:-2] else [None]


def _gather_quantized(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    data, indices, scales = (shapes.of(value) for value in node.inputs[:3])
    if data is None or indices is None or scales is None or attribute(node, "gather_axis", 0):
        return [None]
    block = attribute(node, "block_size", 128)
    return [(*indices, *data[1:-1], scales[-1] * block)]


def _group_query(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    """y [B,S,H*D] and buffers [B,K,max(P,T),D]."""
    q, past, past_value = (shapes.of(optional(node, index)) for index in (0, 3, 4))
    heads, kv_heads = attribute(node, "num_heads"), attribute(node, "kv_num_heads")
    if q is None or len(q) != 3:
        return [None]
    packed = optional(node, 1) is None
    size = floor_divide(q[2], heads + 2 * kv_heads if packed else heads)
    length: Dim = q[1]
    if past is not None and past_value is not None:
        for cache in (past, past_value):
            size = shapes.merge(cache[3], size)
            shapes.merge(cache[0], q[0])
        total = shapes.content(node.inputs[6])
        length = shapes.unknown("dim") if total is None else maximum(past[2], total.flat[0])
    present = (q[0], kv_heads, length, size)
    return [(q[0], q[1], size * heads), present, present]


def _multi_head(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    """y [B,S,H*D] and presents [B,H,T,D]."""
    q, k, v = (shapes.of(optional(node, index)) for index in range(3))
    heads = attribute(node, "num_heads")
    if q is None:
        return [None]
    if len(q) == 5:
        size = q[4]
        return [(q[0], q[1], heads * size), *[(q[0], heads, q[1], size)] * 2]
    if k is not None and len(k) == 5:
        return [q, *[(q[0], heads, k[1], k[4])] * 2]
    if k is None or v is None:
        return [None]
    k_size, v_size = (
        side[3] if len(side) == 4 else floor_divide(side[2], heads) for side in (k, v)
    )
    past = shapes.of(optional(node, 6))
    new = k[2] if len(k) == 4 else k[1]
    total = new if past is None else past[2] + new
    return [
        (q[0], q[1], v_size * heads),
        (q[0], heads, total, k_size),
        (q[0], heads, total, v_size),
    ]


def _packed_attention(shapes: Shapes, node: ir.Node) -> Sequence[Shape | None]:
    """y [B,S,H*D] and present [2,B,H,T,D]."""
    x, weights = shapes.of(node.inputs[0]), shapes.of(node.inputs[1])
    heads, sizes = attribute(node, "num_heads"), attribute(node, "qkv_hidden_sizes")
    if x is None or weights is None:
        return [None]
    width = sizes[2] if sizes else floor_divide(weights[1], 3)
    past = shapes.of(optional(node, 4))
    total = x[1] if past is None else past[3] + x[1]
    return [(*x[:2], width), (2, x[0], heads, total, floor_divide(width, heads))]


RULES: dict[str, Callable[[Shapes, ir.Node], Sequence[Shape | None]]] = {
    "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_norm,
    "EmbedLayerNormalization": _embed_norm,
    "MatMulNBits": _matmul_n_bits,
    "FusedMatMul": _fused_matmul,
    "TransposeMatMul": _fused_matmul,
    "GatherBlockQuantized": _gather_quantized,
    "GroupQueryAttention": _group_query,
    "MultiHeadAttention": _multi_head,
    "Attention": _packed_attention,
}
