"""Einsum becomes a MatMul between views, and computes what it computed."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from onnxgen.analysis.shape_rules import einsum_terms
from tests.graphs import assert_same_numbers, normalized, parse

SIZES = {"b": 2, "s": 5, "t": 7, "h": 6, "k": 3, "g": 2, "d": 4, "e": 9}
PRODUCTS = [
    "bhsd,bhtd->bhst",
    "bshd,bthd->bhst",
    "bkgsd,bktd->bkgst",
    "bskgd,btkd->bkgst",
    "bthd,bshd->bhst",  # the keys first
    "bhst,bthd->bshd",
    "bkgst,btkd->bskgd",
    "bhst,bhtd->bhsd",
    "bsd,dhe->bshe",  # a projection to heads
    "bshd,hde->bse",  # and one from heads
    "sd,td->st",
    "d,sd->s",
    "bsd,d->bs",
    "...sd,...td->...st",
    "...d,de->...e",
    "b s d, b t d -> b s t",
    "bhsd,bhsd->bhs",
]
ALONE = [
    "bsd->bds",
    "s,d->sd",  # nothing is summed over
    "bse,btd->bst",  # letters that are summed over in one operand
    "bss,bsd->bd",  # a diagonal
    "bsd,btd",  # implicit
]


def model_of(equation: str) -> onnx.ModelProto:
    operands = equation.replace(" ", "").split("->")[0].split(",")
    spelled = [each.replace("...", "bh") for each in operands]
    fixed = "hkgde" if "t" in equation.split("->")[-1] else "hkgdet"  # sums are over one length
    shapes = [",".join(str(SIZES[x]) if x in fixed else x for x in each) for each in spelled]
    inputs = ", ".join(f"float[{shape}] x{index}" for index, shape in enumerate(shapes))
    names = ", ".join(f"x{index}" for index in range(len(operands)))
    return parse(f'({inputs}) => (float y) {{ y = Einsum<equation = "{equation}">({names}) }}')


def after(equation: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    before = model_of(equation)
    del before.graph.output[0].type.tensor_type.shape.dim[:]
    before.graph.output[0].type.tensor_type.ClearField("shape")
    model, _ = normalized(before)
    return before, ir.to_proto(model)


@pytest.mark.parametrize("equation", PRODUCTS)
def test_products(equation: str) -> None:
    before, found = after(equation)
    ops = [node.op_type for node in found.graph.node]
    assert "Einsum" not in ops
    assert ops.count("MatMul") == 1
    assert_same_numbers(before, found, [{"b": 2, "s": 5, "t": 7}, {"b": 1, "s": 1, "t": 3}])


@pytest.mark.parametrize("equation", ALONE)
def test_what_is_left_alone(equation: str) -> None:
    _, found = after(equation)
    assert [node.op_type for node in found.graph.node] == ["Einsum"]


def test_attention_shows_its_scores_without_a_detour() -> None:
    _, found = after("bkgsd,bktd->bkgst")
    ops = [node.op_type for node in found.graph.node]
    assert "Reshape" in ops  # of the keys, to [B, K, 1, D, T]
    assert [node.op_type for node in found.graph.node if "y" in node.output] == ["MatMul"]


def test_names_and_metadata_stay() -> None:
    before = model_of("bshd,bthd->bhst")
    before.graph.node[0].name = "/layers.0/attn/Einsum"
    before.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['layers']")
    model, _ = normalized(before)
    for node in model.graph:
        assert (node.name or "").startswith("/layers.0/attn/Einsum/")
        assert node.metadata_props["pkg.torch.onnx.name_scopes"] == "['layers']"


def test_ellipses() -> None:
    assert einsum_terms("...sd,td->...st", [4, 2]) == (["01sd", "td"], "01st")
    assert einsum_terms("...sd,...td->...st", [4, 3]) == (["01sd", "1td"], "01st")
    assert einsum_terms("sd,td->st", [3, 2]) is None
    assert einsum_terms("sd,td", [2, 2]) is None
