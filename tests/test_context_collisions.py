"""Subgraphs that differ have hashes that differ: pairs that a careless text would make one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import AttributeProto as A
from onnx import TensorProto as T
from onnx import helper

from onnxgen.contexts.canonical import subgraph_sha256
from onnxgen.contexts.cutting import cut_out, part_of
from onnxgen.contexts.values import Region
from onnxgen.contexts.weights import Weights
from onnxgen.errors import RefusedError
from onnxgen.reading import open_model
from tests.context_graphs import region_of


def sha256_of(model: onnx.ModelProto, kind: str = "FLOAT[?]", out: str = "FLOAT[?]") -> str:
    nodes = tuple(range(len(model.graph.node)))
    region = Region(
        "r", nodes, ("x",), (), (model.graph.node[-1].output[0],), (kind,), (out,), "", ""
    )
    return subgraph_sha256(cut_out(model, region))


def model_of(*attributes: onnx.AttributeProto, inputs: tuple[str, ...] = ("x",)) -> onnx.ModelProto:
    node = helper.make_node("Some", inputs, ["y"], domain="ours")
    node.attribute.extend(attributes)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ours", 1)]
    return helper.make_model(onnx.GraphProto(node=[node]), opset_imports=opsets)


def graph_with(**parts: Any) -> onnx.AttributeProto:
    return helper.make_attribute("g", onnx.GraphProto(**parts))


def strings(*texts: bytes) -> onnx.TensorProto:
    return helper.make_tensor("s", T.STRING, [len(texts)], texts)


def typed(kind: onnx.TypeProto) -> onnx.AttributeProto:
    value = helper.make_value_info("v", kind)
    return graph_with(input=[value], output=[onnx.ValueInfoProto(name="v")])


TENSOR = helper.make_tensor_type_proto(T.FLOAT, [3])
NONE = helper.make_attribute("l", [], attr_type=A.STRINGS)
SEVERAL = {
    "no input": model_of(inputs=()),
    "one that is absent": model_of(inputs=("",)),
    "one": model_of(),
    "one, and one that is absent": model_of(inputs=("x", "")),
    "no text": model_of(NONE),
    "one empty text": model_of(helper.make_attribute("l", [b""])),
    "texts": model_of(helper.make_attribute("t", strings(b"a", b"b"))),
    "texts, cut elsewhere": model_of(helper.make_attribute("t", strings(b"ab", b""))),
    "a value of three": model_of(typed(TENSOR)),
    "a value of four": model_of(typed(helper.make_tensor_type_proto(T.FLOAT, [4]))),
    "a sequence": model_of(typed(helper.make_sequence_type_proto(TENSOR))),
    "a tensor": model_of(helper.make_attribute("t", strings(b"a"))),
    "tensors": model_of(helper.make_attribute("t", [strings(b"a")])),
    "zero": model_of(helper.make_attribute("f", 0.0)),
    "minus zero": model_of(helper.make_attribute("f", -0.0)),
}


def test_no_two_of_these_have_one_hash() -> None:
    found = {name: sha256_of(model) for name, model in SEVERAL.items()}
    found |= {
        "types": sha256_of(model_of(), "FLOAT[?,?]"),
        "out": sha256_of(model_of(), out="FLOAT"),
    }
    assert len(set(found.values())) == len(found)


def test_an_opset_counts_under_either_name_of_its_domain() -> None:
    found = set()
    for version in (20, 21):
        for written in ("", "ai.onnx"):
            for imported in ("", "ai.onnx"):
                node = helper.make_node("Relu", ["x"], ["y"], domain=written)
                model = helper.make_model(onnx.GraphProto(node=[node]))
                model.opset_import[0].CopyFrom(helper.make_opsetid(imported, version))
                found.add((version, sha256_of(model)))
    assert len(found) == 2


def test_a_default_of_an_inner_input_is_no_value_of_its_own() -> None:
    found = set()
    for name in "vw":
        tensor = helper.make_tensor(name, T.FLOAT, [1], [1])
        inner = graph_with(
            input=[helper.make_value_info("v", TENSOR)],
            initializer=[tensor],
            node=[helper.make_node("Some", [name], ["o"], domain="ours")],
            output=[onnx.ValueInfoProto(name="o")],
        )
        found.add(sha256_of(model_of(inner)))
    assert len(found) == 2


def test_the_order_of_nodes_counts() -> None:
    model = model_of()
    model.graph.node.insert(0, helper.make_node("Neg", ["x"], ["a"]))
    first = sha256_of(model)
    model.graph.node.insert(2, model.graph.node[0])
    del model.graph.node[0]
    model.graph.node.append(helper.make_node("Some", ["y", "a"], ["end"], domain="ours"))
    two = sha256_of(model)
    model.graph.node.insert(0, model.graph.node[1])
    del model.graph.node[2]
    assert len({first, two, sha256_of(model)}) == 3


def test_texts_as_weights_are_hashed_and_not_given_to_backends(tmp_path: Path) -> None:
    found = set()
    for text in (b"one", b"two"):
        node = helper.make_node("StringConcat", ["x", "s"], ["y"])
        value = helper.make_tensor_value_info
        ends = ([value("x", T.STRING, [1])], [value("y", T.STRING, [1])], [strings(text)])
        graph = helper.make_graph([node], "g", *ends)
        path = tmp_path / "m.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
        opened = open_model(path)
        region = region_of(opened, "r", [0])
        found.add(Weights(opened).sha256(region.weights))
        with pytest.raises(RefusedError, match="holds texts"):
            part_of(opened, region)
    assert len(found) == 2


def external(**more: Any) -> onnx.TensorProto:
    found = onnx.TensorProto(data_type=T.FLOAT, dims=[1], data_location=T.EXTERNAL, **more)
    found.external_data.add(key="location", value="else.where")
    return found


REFUSED = {
    "an attribute without a type": model_of(A(name="a", i=1)),
    "a tensor elsewhere": model_of(A(name="a", type=A.TENSOR, t=external())),
    "tensors elsewhere": model_of(A(name="a", type=A.TENSORS, tensors=[external()])),
    "sparse elsewhere": model_of(
        A(
            name="a",
            type=A.SPARSE_TENSOR,
            sparse_tensor=onnx.SparseTensorProto(values=external(), indices=external()),
        )
    ),
    "sparse initializers": model_of(
        graph_with(sparse_initializer=[onnx.SparseTensorProto(dims=[1])])
    ),
    "a type that nobody knows": model_of(
        A(name="a", type=A.TENSOR, t=onnx.TensorProto(data_type=99))
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_text_is_refused(name: str) -> None:
    with pytest.raises(RefusedError):
        sha256_of(REFUSED[name])


def test_a_function_that_is_there_twice_is_refused() -> None:
    model = model_of()
    for op_type in ("Relu", "Neg"):
        body = [helper.make_node(op_type, ["p"], ["q"])]
        made = helper.make_function(
            "ours", "Some", ["p"], ["q"], body, [helper.make_opsetid("", 20)]
        )
        model.functions.append(made)
    with pytest.raises(RefusedError, match="two functions"):
        sha256_of(model)
    del model.functions[1]
    sha256_of(model)
