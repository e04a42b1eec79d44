"""Which expert a product belongs to, where its weights do not say it.

A loop over experts compares the router's indices with a number, or takes a row of their one-hot
form, to find an expert's tokens or what they weigh: that number is the expert's, whatever the order
in which an exporter wrote the experts down.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxgen.analysis.expert_routing import CHOOSING
from onnxgen.analysis.expert_weights import Product
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import attribute, given, producer, scalar

MAX_NODES = 40
MAX_STEPS = 8


def number_of(facts: Facts, product: Product) -> int | None:
    """The number that the choice of a product's rows, or of their weights, is compared with."""
    found: set[int] = set()
    for value in (*_selecting(product.rows), *_weighing(facts, product.node.outputs[0])):
        found |= _compared(value)
    return found.pop() if len(found) == 1 else None


def _selecting(rows: ir.Value) -> Iterator[ir.Value]:
    """What chooses rows on the way to a product, back through everything that is done to them."""
    for _ in range(MAX_STEPS * 3):
        node = producer(rows)
        if node is None or not node.inputs or node.inputs[0] is None:
            return
        if node.op_type in ("Gather", "GatherND"):
            yield given(node, 1)
        rows = given(node)


def _weighing(facts: Facts, value: ir.Value) -> Iterator[ir.Value]:
    """What a product's result is multiplied by."""
    for _ in range(MAX_STEPS):
        users = {use.node for use in value.uses()}
        if len(users) != 1 or not facts.known(node := users.pop()):
            return
        if node.op_type == "Mul":
            yield from (v for v in node.inputs if v is not None and v is not value)
        value = node.outputs[0]


def _compared(value: ir.Value) -> set[int]:
    """Numbers that indices are compared with on the way to a value, as far as the router."""
    found: set[int] = set()
    pending, seen = [value], {value}
    while pending and len(seen) < MAX_NODES:
        node = producer(pending.pop())
        if node is None or node.op_type in CHOOSING:
            continue
        numbers = [scalar(v) for v in node.inputs]
        if node.op_type == "Equal":
            found |= {int(number) for number in numbers if number is not None}
        if node.op_type == "Gather" and attribute(node, "axis", 0) == 0 and _one_hot(node):
            found |= {int(number) for number in numbers[1:] if number is not None}
        for each in node.inputs:
            if each is not None and each not in seen and each.const_value is None:
                seen.add(each)
                pending.append(each)
    return found


def _one_hot(node: ir.Node) -> bool:
    """Whether what a node takes a row of is the one-hot form of indices, its axes moved."""
    for _ in range(MAX_STEPS):
        inner = producer(given(node), "OneHot", "Transpose", "Cast", "Equal", "Identity")
        if inner is None:
            return False
        if inner.op_type in ("OneHot", "Equal"):
            return True
        node = inner
    return False
