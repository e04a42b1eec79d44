"""Ifs: those without a choice are taken; what the branches of the others read and give is kept."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx import ModelProto

from tests.graphs import assert_same_graph, assert_same_numbers, normalized, parse

SIGNATURE = "(float[b,s,12] x, bool[1] flag) => (float[b,s,12] y)"
BRANCHES = (
    "If ({condition}) <"
    " then_branch = then_graph () => (float[b,s,12] t) {{ {then} }},"
    " else_branch = else_graph () => (float[b,s,12] e) {{ {other} }}>"
)


def both(before: ModelProto) -> ModelProto:
    """The normalized model, after both were run and agreed."""
    model, _ = normalized(before)
    after = ir.to_proto(model)
    assert_same_numbers(before, after)
    return after


def branches(condition: str, then: str = "t = Relu(h)", other: str = "e = Neg(h)") -> str:
    return BRANCHES.format(condition=condition, then=then, other=other)


@pytest.mark.parametrize("opset", [13, 17, 20])
@pytest.mark.parametrize(("size", "taken"), [(12, "Relu"), (11, "Neg")])
def test_an_if_without_a_choice_is_taken(size: int, taken: str, opset: int) -> None:
    """A condition that folds to a constant, as TorchScript writes around sizes."""
    found = both(
        parse(
            f"{SIGNATURE} {{ h = Abs(x)  n = Shape(h)  k = Gather(n, 2)  c = Equal(k, {size})"
            f"  y0 = {branches('c')}  y = Exp(y0) }}",
            opset=opset,
        )
    )
    wanted = parse(
        f"{SIGNATURE} {{ h = Abs(x)  y0 = {taken}(h)  y = Exp(y0) }}",
        opset=24,
    )
    assert_same_graph(found, wanted)


def test_one_inside_another() -> None:
    inner = branches("c2", then="t = Relu(h)", other="e = Neg(h)").replace("then_graph", "tg")
    inner = inner.replace("else_graph", "eg").replace(" t)", " t2)").replace("t = R", "t2 = R")
    text = branches("c", then=f"t = {inner}")
    found = both(
        parse(
            f"{SIGNATURE} {{ h = Abs(x)  n = Shape(h)  k = Gather(n, 2)  c = Equal(k, 12)"
            f"  c2 = Equal(k, 11)  y0 = {text}  y = Exp(y0) }}"
        )
    )
    assert [node.op_type for node in found.graph.node] == ["Abs", "Neg", "Exp"]


def test_one_that_makes_an_output() -> None:
    found = both(
        parse(
            f"{SIGNATURE} {{ h = Abs(x)  n = Shape(h)  k = Gather(n, 2)  c = Equal(k, 12)"
            f"  y = {branches('c')} }}"
        )
    )
    assert [output.name for output in found.graph.output] == ["y"]
    assert "If" not in {node.op_type for node in found.graph.node}


@pytest.mark.parametrize("opset", [13, 17, 20])
def test_one_with_a_choice_reads_what_it_read(opset: int) -> None:
    """Below opset 18 the graph goes through a converter of its own."""
    found = both(
        parse(f"{SIGNATURE} {{ h = Abs(x)  y0 = {branches('flag')}  y = Exp(y0) }}", opset=opset)
    )
    assert [node.op_type for node in found.graph.node] == ["Abs", "If", "Exp"]


@pytest.mark.parametrize("opset", [17, 20])
def test_a_branch_that_passes_a_value_on(opset: int) -> None:
    """Its Identity is needed: runtimes refuse an outer value as a subgraph's output."""
    text = branches("flag", then="t = Identity(h)")
    both(parse(f"{SIGNATURE} {{ h = Abs(x)  y0 = {text}  y = Exp(y0) }}", opset=opset))
