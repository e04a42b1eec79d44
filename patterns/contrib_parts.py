"""What the rules for ONNX Runtime's attentions share: heads split and merged, masks joined.

Shapes: B batch, S new tokens, T total, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rule import number


def scalar(builder: Builder, number: int) -> ir.Value:
    """A constant int64 of no axes."""
    return builder.constant(np.array(number, dtype=np.int64))


def number_like(builder: Builder, number: float, dtype: ir.DataType) -> ir.Value:
    """A constant of no axes and a float type."""
    return builder.constant(np.array(number).astype(dtype.numpy()))


def split_heads(facts: Facts, builder: Builder, value: ir.Value, heads: int) -> ir.Value | None:
    """[B, S, H*D] as [B, H, S, D]; a tensor of four axes as it is. None where D is unknown."""
    shape = facts.shapes.of(value)
    if shape is not None and len(shape) == 4:
        return value
    if shape is None or len(shape) != 3 or not isinstance(shape[2], int) or shape[2] % heads:
        return None
    target = builder.ints(0, 0, heads, shape[2] // heads)
    return builder.op("Transpose", [builder.op("Reshape", [value, target])], {"perm": [0, 2, 1, 3]})


def merged_heads(facts: Facts, builder: Builder, value: ir.Value) -> ir.Value | None:
    """[B, H, S, D] as [B, S, H*D]; None where a size is unknown."""
    shape = facts.shapes.of(value)
    if shape is None or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        return None
    rows = builder.op("Transpose", [value], {"perm": [0, 2, 1, 3]})
    return builder.op("Reshape", [rows, builder.ints(0, 0, shape[1] * shape[3])])


def split_last(builder: Builder, value: ir.Value, sizes: Sequence[int]) -> list[ir.Value]:
    """The parts of a tensor's last axis."""
    return list(builder.ops("Split", [value, builder.ints(*sizes)], len(sizes), {"axis": -1}))


def steps(builder: Builder, length: ir.Value) -> ir.Value:
    """int64 [N]: 0, 1, 2 ... for a length N given as int64 [1]."""
    stop = builder.op("Squeeze", [length])
    return builder.op("Range", [scalar(builder, 0), stop, scalar(builder, 1)])


@dataclass(frozen=True)
class Attended:
    """An Attention with its cache inside.

    Attributes:
        node: the operator.
        y: [B, S, H*D].
        present_key, present_value: [B, H, T, D].
        details: for the report.
    """

    node: ir.Node
    y: ir.Value
    present_key: ir.Value
    present_value: ir.Value
    details: dict[str, str | int | float | bool]


def attended(
    facts: Facts,
    builder: Builder,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    mask: tuple[ir.Value | None, bool],
    pasts: tuple[ir.Value | None, ir.Value | None],
    scale: float,
) -> Attended:
    """Attention of [B, H, S, D] operands, whose sizes of heads are known.

    Args:
        mask: the mask, and whether is_causal says the rest.
        pasts: both or none.
        scale: 0 for the root of 1 / D.
    """
    shape = facts.shapes.of(q)
    assert shape is not None
    assert isinstance(shape[3], int)
    scale = scale or shape[3] ** -0.5
    attributes: dict[str, int | float] = {"scale": scale}
    if mask[1]:
        attributes["is_causal"] = 1
    if pasts[0] is None:
        y, key, value = builder.op("Attention", [q, k, v, mask[0]], attributes), k, v
    else:
        y, key, value = builder.ops("Attention", [q, k, v, mask[0], *pasts], 3, attributes)
    node, merged = y.producer(), merged_heads(facts, builder, y)
    assert node is not None
    assert merged is not None
    details: dict[str, str | int | float | bool] = {
        "heads": number(shape[1]),
        "kv_heads": number(shape[1]),
        "head_size": shape[3],
        "scale": scale,
        "cache": "none" if pasts[0] is None else "concatenated",
        "mask": "none" if mask[0] is None else "explicit",
    }
    return Attended(node, merged, key, value, details)
