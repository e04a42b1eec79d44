"""Normalize: one spelling where a difference means nothing, graph before and graph after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from onnxgen.analysis.roles import find_roles
from onnxgen.errors import RefusedError
from onnxgen.model_io import read_model
from onnxgen.passes.normalize import normalize, raise_opset
from onnxgen.passes.raise_ import raise_model
from onnxgen.passes.tidy import tidy
from onnxgen.testing import corpus
from tests.graphs import assert_same_graph, assert_same_numbers, normalized, parse, runtime

SCOPES = "pkg.torch.onnx.name_scopes"


def assert_normal(before: str | onnx.ModelProto, after: str, *, opset: int = 20) -> ir.Model:
    """The graph becomes `after`, and computes the same."""
    proto = parse(before, opset=opset) if isinstance(before, str) else before
    model, _ = normalized(proto)
    found = ir.to_proto(model)
    assert_same_graph(found, parse(after, opset=24))
    assert_same_numbers(proto, found)
    assert found.opset_import[0].version == 24
    return model


# --- opsets -------------------------------------------------------------------------------------


OPSETS = (
    "(float[b,s,12] x) => (float[b,s,12] y) <float[12,12] w>"
    "{ h = MatMul(x, w)  m = ReduceMean(h, [-1])  d = Sub(h, m)  a, c = Split<axis = 2>(d, [5, 7])"
    "  j = Concat<axis = 2>(c, a)  y = Softmax<axis = -1>(j) }"
)


@pytest.mark.parametrize("opset", [13, 17, 18, 20, 23, 24])
def test_names_and_metadata_survive_the_conversion(opset: int) -> None:
    text = OPSETS
    if opset < 18:
        text = text.replace("ReduceMean(h, [-1])", "ReduceMean<axes = [-1]>(h)")
    proto = parse(text, opset=opset)
    for index, node in enumerate(proto.graph.node):
        node.name = f"/model/layers.{index}/{node.op_type}"
        node.metadata_props.add(key=SCOPES, value=f"['', 'layers.{index}', 'x']")
    before = {node.name: node.op_type for node in proto.graph.node}
    model, _ = normalized(proto)
    assert model.graph.opset_imports[""] == 24
    after = {node.name: node for node in model.graph if node.name in before}
    assert {name: node.op_type for name, node in after.items()} == before
    for index, (name, _) in enumerate(before.items()):
        assert after[name].metadata_props[SCOPES] == f"['', 'layers.{index}', 'x']"
    assert_same_numbers(proto, ir.to_proto(model))
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_a_newer_opset_stays() -> None:
    proto = parse("(float[b,4] x) => (float[b,4] y) { y = Relu(x) }", opset=25)
    model, _ = normalized(proto)
    assert model.graph.opset_imports[""] == 25


@pytest.mark.parametrize("opset", [13, 17, 20])
def test_what_cannot_be_converted_is_refused(opset: int) -> None:
    proto = parse("(float[b,4] x) => (float[b,4] y) { y = Relu(x) }", opset=opset)
    model = ir.from_proto(proto)
    with pytest.raises(RefusedError, match=f"opset {opset} cannot be converted to 99"):
        raise_opset(model, 99)


def test_an_operator_that_onnx_cannot_convert_is_refused() -> None:
    """Upsample left the standard at opset 10: no converter knows how."""
    proto = parse(
        '<ir_version: 10, opset_import: ["" : 9]> g (float[1,1,4,4] x) => (float[1,1,8,8] y)'
        '{ y = Upsample<mode = "nearest">(x, [1.0, 1.0, 2.0, 2.0]) }'
    )
    proto.graph.node[0].op_type = "NoSuchOperator"
    model = ir.from_proto(proto)
    with pytest.raises(RefusedError, match="opset 9 cannot be converted"):
        normalize(model, 24, runtime())


def test_an_operator_that_no_runtime_loads_is_not_made() -> None:
    """RandomNormal of opset 22 has no kernel: what was written would not load."""
    proto = parse("(float[3] x) => (float[3] y) { r = RandomNormal<shape = [3]>() y = Add(x, r) }")
    with pytest.raises(RefusedError, match=r"\(RandomNormal\) below opset 22 only"):
        normalize(ir.from_proto(proto), 24, runtime())


# --- functions ----------------------------------------------------------------------------------


def test_functions_are_inlined_and_names_stay() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20, "local" : 1]>
        g (float[b,s,12] x) => (float[b,s,12] y)
        { h = local.twice(x)  y = local.twice(h) }
        <domain: "local", opset_import: ["" : 20]>
        twice (a) => (c) { b = Relu(a)  c = Add(b, b) }"""
    proto = onnx.parser.parse_model(text)
    model, _ = normalized(proto)
    assert not model.functions
    assert [node.op_type for node in model.graph] == ["Relu", "Add", "Relu", "Add"]
    assert len({node.name for node in model.graph}) == 4
    assert_same_numbers(proto, ir.to_proto(model))


# --- folding ------------------------------------------------------------------------------------


def test_constants_are_folded() -> None:
    assert_normal(
        "(float[b,3] x) => (float[b,3] y)"
        "{ a = Constant<value = float[3] {1.0, 2.0, 3.0}>()  c = Mul(a, 2.0)  d = Neg(c)"
        "  y = Add(x, d) }",
        "(float[b,3] x) => (float[b,3] y) { y = Add(x, [-2.0, -4.0, -6.0]) }",
    )


def test_a_scalar_keeps_rank_0() -> None:
    model = assert_normal(
        "(float[b,3] x) => (float[b,3] y)"
        "{ a = Constant<value = float {8.0}>()  c = Sqrt(a)  d = Mul(c, c)  y = Div(x, d) }",
        "(float[b,3] x) => (float[b,3] y) { y = Div(x, 8.0) }",
    )
    (value,) = model.graph.initializers.values()
    assert value.shape is not None
    assert value.shape.rank() == 0


def test_what_depends_on_an_input_stays() -> None:
    assert_normal(
        "(float[b,3] x, float[3] z) => (float[b,3] y) { c = Mul(z, 2.0)  y = Add(x, c) }",
        "(float[b,3] x, float[3] z) => (float[b,3] y) { c = Mul(z, 2.0)  y = Add(x, c) }",
    )


def test_an_initializer_that_is_an_input_is_no_constant() -> None:
    proto = parse("(float[b,3] x, float[3] z) => (float[b,3] y) { c = Neg(z)  y = Add(x, c) }")
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(3, "f"), "z"))
    model, _ = normalized(proto)
    assert [node.op_type for node in model.graph] == ["Neg", "Add"]


def test_random_numbers_are_not_folded() -> None:
    model, _ = normalized(
        parse(
            "(float[b,3] x) => (float[b,3] y)"
            "{ r = RandomUniform<shape = [3], seed = 1.0>()  n = Neg(r)  y = Add(x, n) }",
            opset=22,
        )
    )
    assert [node.op_type for node in model.graph] == ["RandomUniform", "Neg", "Add"]


def test_a_range_is_folded() -> None:
    assert_normal(
        "(float[b,4] x) => (float[b,4] y) { r = Range(0, 4, 1)  f = Cast<to = 1>(r)  y = Add(x, f) }",
        "(float[b,4] x) => (float[b,4] y) { y = Add(x, [0.0, 1.0, 2.0, 3.0]) }",
    )


def test_nothing_large_is_made() -> None:
    model, _ = normalized(
        parse(
            "(float[b,1] x) => (float[b,n] y)"
            "{ z = ConstantOfShape<value = float[1] {1.0}>([2000000])  y = Mul(x, z) }"
        )
    )
    assert [node.op_type for node in model.graph] == ["ConstantOfShape", "Mul"]


# --- shape arithmetic ---------------------------------------------------------------------------


def test_a_reshape_says_its_target_itself() -> None:
    """TorchScript: every size is spelled out with Shape, Gather, Unsqueeze and Concat."""
    assert_normal(
        "(float[b,s,120] x) => (float[b,s,6,20] y)"
        "{ h = Neg(x)  n = Shape(h)  b0 = Gather(n, 0)  b1 = Unsqueeze(b0, [0])"
        "  m = Shape(h)  s0 = Gather(m, 1)  s1 = Unsqueeze(s0, [0])"
        "  to = Concat<axis = 0>(b1, s1, [6], [20])  y = Reshape(h, to) }",
        "(float[b,s,120] x) => (float[b,s,6,20] y) { h = Neg(x)  y = Reshape(h, [0, 0, 6, 20]) }",
    )


def test_sizes_are_read_off_the_inputs() -> None:
    assert_normal(
        "(float[b,s,12] x) => (int64[s] y)"
        "{ h = Neg(x)  t = Transpose<perm = [1, 0, 2]>(h)  n = Shape<end = 1>(t)"
        "  m = Squeeze(n, [0])  y = Range(0, m, 1) }",
        "(float[b,s,12] x) => (int64[s] y)"
        "{ n = Shape<start = 1, end = 2>(x)  m = Squeeze(n)  y = Range(0, m, 1) }",
    )


def test_two_sizes_that_are_fed_equal_are_one() -> None:
    """The new tokens' number is read off the ids wherever an exporter read it."""
    model, roles = normalized(
        parse(
            "(int64[b,s] input_ids, int64[b,s] position_ids) => (float[b,s,12] y, int64[s] z)"
            " <float[50,12] t, float[64,12] u>"
            "{ a = Gather(t, input_ids)  p = Gather(u, position_ids)  y = Add(a, p)"
            "  n = Shape<start = 1, end = 2>(position_ids)  m = Squeeze(n, [0])"
            "  z = Range(0, m, 1) }"
        )
    )
    assert roles.inputs["position_ids"].role == "positions"
    (shape,) = [node for node in model.graph if node.op_type == "Shape"]
    assert shape.inputs[0] is not None
    assert shape.inputs[0].name == "input_ids"


# --- simplify -----------------------------------------------------------------------------------

NOTHING = {
    "cast": "h = Cast<to = 1>(r)",
    "reshape": "h = Reshape(r, [0, 0, 12])",
    "expand": "h = Expand(r, [1, 1, 1])",
    "times-one": "h = Mul(r, 1.0)",
    "one-times": "h = Mul([1.0], r)",
    "divided-by-one": "h = Div(r, 1.0)",
    "transposed-in-order": "h = Transpose<perm = [0, 1, 2]>(r)",
    "one-part": "h = Concat<axis = 1>(r)",
    "whole-slice": "h = Slice(r, [0], [9223372036854775807], [1])",
    "slice-of-a-known-size": "h = Slice(r, [0], [12], [2], [1])",
    "dropout": "h = Dropout(r)",
    "dropout-told-so": "t = Cast<to = 9>(0)  h = Dropout(r, 0.5, t)",
    "identity": "h = Identity(r)",
    "twice-transposed": "a = Transpose<perm = [2, 0, 1]>(r)  h = Transpose<perm = [1, 2, 0]>(a)",
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_changes_nothing_goes(name: str) -> None:
    signature = "(float[b,s,12] x) => (float[b,s,12] y)"
    assert_normal(
        f"{signature} {{ r = Relu(x)  {NOTHING[name]}  y = Neg(h) }}",
        f"{signature} {{ r = Relu(x)  y = Neg(r) }}",
    )


SOMETHING = {
    "cast": "h0 = Cast<to = 10>(r)  h = Cast<to = 1>(h0)",
    "reshape": "h0 = Reshape(r, [0, 0, 3, 4])  h = ReduceSum<keepdims = 0>(h0, [3])",
    "expand-that-broadcasts": "h = Expand(r, [7, 1, 1, 1])",
    "times-two": "h = Mul(r, 2.0)",
    "one-divided": "h = Div(1.0, r)",
    "times-many-ones": "h = Mul(r, o)",
    "slice": "h = Slice(r, [0], [-1], [2])",
    "reversed": "h = Slice(r, [-1], [-100], [2], [-1])",
    "transposed": "h = Transpose<perm = [0, 2, 1]>(r)",
    "squeezed-elsewhere": "a = Unsqueeze(r, [1])  a0 = ReduceMax(a, [2])  h = Squeeze(a0, [2])",
}


@pytest.mark.parametrize("name", SOMETHING)
def test_what_changes_something_stays(name: str) -> None:
    proto = parse(
        "(float[b,s,12] x) => (float y) <float[1,1,1,1] o> { r = Exp(x)  "
        f"{SOMETHING[name]}  y = Neg(h) }}"
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model, _ = normalized(proto)
    assert len(list(model.graph)) == len(proto.graph.node)
    assert_same_numbers(proto, ir.to_proto(model))


def test_two_transposes_become_one() -> None:
    signature = "(float[b,s,12] x) => (float[12,b,s] y)"
    assert_normal(
        f"{signature} {{ r = Relu(x)  a = Transpose<perm = [0, 2, 1]>(r)"
        "  y = Transpose<perm = [1, 0, 2]>(a) }",
        f"{signature} {{ r = Relu(x)  y = Transpose<perm = [2, 0, 1]>(r) }}",
    )


def test_duplicates_are_merged() -> None:
    signature = "(float[b,s,12] x) => (float[b,s,12] y) <float[12,12] w>"
    assert_normal(
        f"{signature} {{ a = MatMul(x, w)  c = MatMul(x, w)  d = Exp(a)  e = Exp(c)"
        "  y = Add(d, e) }",
        f"{signature} {{ a = MatMul(x, w)  d = Exp(a)  y = Add(d, d) }}",
    )


def test_dead_nodes_go_and_outputs_stay() -> None:
    signature = "(float[b,3] x) => (float[b,3] y, float[b,3] z)"
    text = f"{signature} {{ d = Exp(x)  e = Neg(d)  y = Relu(x)  z = Relu(x) }}"
    model, _ = normalized(parse(text))
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    assert not {"Exp", "Neg"} & {node.op_type for node in model.graph}


def test_an_output_that_repeats_a_value_is_that_value() -> None:
    """Its name is the interface and stays; the node that copied goes."""
    model, _ = normalized(
        parse("(float[b,12] x) => (float[b,12] y) { r = Relu(x)  y = Cast<to = 1>(r) }")
    )
    assert [(node.op_type, node.outputs[0].name) for node in model.graph] == [("Relu", "y")]
    text = "(float[b,12] x) => (float[b,12] r, float[b,12] y) { r = Relu(x)  y = Cast<to = 1>(r) }"
    both, _ = normalized(parse(text))
    assert [output.name for output in both.graph.outputs] == ["r", "y"]
    assert [node.op_type for node in both.graph] == ["Relu", "Cast"]


def test_an_output_that_is_an_input_stays() -> None:
    proto = parse("(float[b,3] x) => (float[b,3] y, float[b,3] z) { y = Identity(x)  z = Relu(x) }")
    model, _ = normalized(proto)
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    assert_same_numbers(proto, ir.to_proto(model))


@pytest.mark.parametrize("name", ["llama/torchscript", "gpt_oss/dynamo20-batched"])
def test_twice_is_once(name: str) -> None:
    (entry,) = corpus(name)
    model, roles = normalized(entry.load())
    once = ir.to_proto(model)
    again = ir.from_proto(once)
    normalize(again, 24, runtime(), roles)
    assert_same_graph(ir.to_proto(again), once)


# --- weights ------------------------------------------------------------------------------------


class Untouchable(ir.LazyTensor):
    """A weight that must not be read."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        def read() -> Any:
            raise AssertionError(f"the weight {name!r} was read")

        super().__init__(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)


@pytest.mark.parametrize("name", ["llama/torchscript", "qwen3/dynamo20", "gpt2/transformers"])
def test_large_weights_are_never_read(name: str) -> None:
    (entry,) = corpus(name)
    model = ir.from_proto(entry.load())
    guarded = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and len(tensor.shape) == 2 and tensor.nbytes > 4096:
            value.const_value = Untouchable(value.name or "", tuple(tensor.shape.numpy()))
            guarded += 1
    assert guarded > 8
    roles = find_roles(model)
    normalize(model, 24, runtime(), roles)
    sites = raise_model(model, roles)
    tidy(model)
    assert {site.status for site in sites} == {"fused"}


def test_weights_in_a_file_of_their_own_stay_there(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    proto = parse(
        "(float[b,s,40] x) => (float[b,s,200] y) <float[40] g>"
        "{ q = Mul(x, x)  m = ReduceMean(q, [-1])  e = Add(m, 0.003)  r = Sqrt(e)  n = Div(x, r)"
        "  k = Mul(n, g)  y = MatMul(k, w) }",
        weights={"w": rng.standard_normal((40, 200)).astype("f")},
    )
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=1000)
    model = read_model(path)
    (tmp_path / "weights.bin").write_bytes(b"")  # whoever reads it now fails
    roles = find_roles(model)
    normalize(model, 24, runtime(), roles)
    (site,) = raise_model(model, roles)
    tidy(model)
    assert site.status == "fused"
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_a_dropout_whose_mask_is_an_output_stays() -> None:
    text = "(float[b,5,8] x) => (float[b,5,8] y, bool[b,5,8] k) { d, k = Dropout(x)  y = Relu(d) }"
    assert_normal(text, text)


def test_types_as_attributes_stand_in_no_ones_way() -> None:
    """onnx-ir's common subexpressions cannot compare them."""
    kind = onnx.helper.make_tensor_type_proto(1, [2])
    node = onnx.helper.make_node("Optional", [], ["q"], type=kind)
    info = onnx.helper.make_value_info("q", onnx.helper.make_optional_type_proto(kind))
    graph = onnx.helper.make_graph([node], "g", [], [info])
    imports = [onnx.helper.make_opsetid("", 20)]
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=imports, ir_version=10))
    normalize(model, 24, runtime())
    assert [node.op_type for node in model.graph] == ["Optional"]
