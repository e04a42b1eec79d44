"""Einsum of two tensors becomes a MatMul between views.

    bshd,bthd->bhst    Transpose(a) @ Transpose(b)
    bkgsd,bktd->bkgst  a @ Transpose(Unsqueeze(b))
    bsd,dhk->bshk      Reshape(a @ Reshape(b))

Its letters are of four kinds: in both operands and the result (axes of the batch), in both but not
in the result (summed over), or in one operand and the result (rows and columns). The rows keep
their axes; columns, and what is summed over, are merged. It computes the same sums: ONNX Runtime's
kernel for Einsum does this itself, but shows no rule where the product is.

Left alone: one operand or three, a letter twice in an operand, a letter of one operand that is
summed over by itself, nothing summed over, sizes that are broadcast.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxgen.analysis.facts import sizes_in_use
from onnxgen.analysis.graph import attribute
from onnxgen.analysis.roles import Roles
from onnxgen.analysis.shape_rules import einsum_terms
from onnxgen.analysis.shapes import Shapes
from onnxgen.analysis.symbols import Dim, product
from onnxgen.patterns.building import Builder


def lower_einsums(model: ir.Model, roles: Roles | None) -> None:
    """Rewrite the Einsum nodes of the main graph that are one product of matrices, in place."""
    graph = model.graph
    found = [node for node in graph if node.op_type == "Einsum" and node.domain == ""]
    if not found:
        return
    shapes = Shapes(graph, sizes_in_use(roles))
    builder = Builder(graph, shapes)
    for node in found:
        made = _product(builder, node)
        if made is None:
            builder.drop()
            continue
        nodes = builder.take()
        for each in nodes:
            each.metadata_props.update(node.metadata_props)
            each.name = builder.unique(f"{node.name}/{each.op_type}") if node.name else each.name
        graph.insert_before(node, nodes)
        old = node.outputs[0]
        if old.is_graph_output():
            old.name, made.name = builder.unique(f"{old.name}:replaced"), old.name
        old.replace_all_uses_with(made, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _product(builder: Builder, node: ir.Node) -> ir.Value | None:
    """The value that a node computes, by a MatMul; None where it is none."""
    shapes = builder.shapes
    values = [value for value in node.inputs if value is not None]
    sizes = [shapes.of(value) for value in values]
    if len(values) != 2 or sizes[0] is None or sizes[1] is None:
        return None
    spelled = einsum_terms(attribute(node, "equation"), [len(sizes[0]), len(sizes[1])])
    if spelled is None:
        return None
    (a, b), result = spelled
    size: dict[str, Dim] = {}
    for letters, dims in ((a, sizes[0]), (b, sizes[1])):
        for letter, dim in zip(letters, dims, strict=True):
            if not shapes.same(size.setdefault(letter, dim), dim):
                return None
    if any(len(set(letters)) != len(letters) for letters in (a, b, result)):
        return None
    if not (set(a) ^ set(b)) <= set(result) <= set(a + b):
        return None  # a letter of one operand alone is summed over
    summed = [letter for letter in a if letter in b and letter not in result]
    if not summed or not result:
        return None
    if result[-1] in a and result[-1] not in b:  # the columns are the second operand's
        a, b, values = b, a, values[::-1]
    batch = [letter for letter in result if letter in a and letter in b]
    rows = [letter for letter in result if letter in a and letter not in b]
    own = [letter for letter in a if letter in rows]
    if list(a) == [*batch, *own, *summed]:
        rows = own  # probabilities: the result is turned, not they
    columns = [letter for letter in result if letter in b and letter not in a]
    left = _transposed(builder, values[0], a, [*batch, *rows, *summed])
    right = _transposed(builder, values[1], b, [*batch, *summed, *columns])
    total = product(size[letter] for letter in summed)
    width = product(size[letter] for letter in columns)
    lead = [size[letter] for letter in (*batch, *rows)]
    if not rows:
        lead.append(1)
    ones: list[Dim] = [1] * (max(len(rows), 1) - 1) if batch else []
    wide = _reshaped(builder, left, [*lead, total])
    high = _reshaped(builder, right, [*(size[x] for x in batch), *ones, total, width])
    if wide is None or high is None:
        return None
    made = builder.op("MatMul", [wide, high])
    order = [*batch, *rows, *columns]
    shaped = _reshaped(builder, made, [size[letter] for letter in order])
    return None if shaped is None else _transposed(builder, shaped, "".join(order), list(result))


def _transposed(builder: Builder, value: ir.Value, letters: str, wanted: list[str]) -> ir.Value:
    order = [letters.index(letter) for letter in wanted]
    if order == sorted(order):
        return value
    return builder.op("Transpose", [value], {"perm": order})


def _reshaped(builder: Builder, value: ir.Value, sizes: list[Dim]) -> ir.Value | None:
    if builder.shapes.same_shape(builder.shapes.of(value), sizes):
        return value
    target = builder.target(value, sizes)
    return None if target is None else builder.op("Reshape", [value, target])
