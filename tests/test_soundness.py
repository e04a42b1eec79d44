"""What a file may hold and still be no model: each refused when it is read, in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper, parser

from onnxgen.errors import LONGEST, FileError, OnnxgenError
from onnxgen.model_io import read_model

HEAD = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1, "my" : 1]>'


def graph(body: str, ins: str = "float[b, 4] x") -> onnx.ModelProto:
    return parser.parse_model(f"{HEAD} g ({ins}) => (float[b, 4] y) {{ {body} }}")


def refused(tmp_path: Path, model: onnx.ModelProto) -> str:
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FileError) as caught:
        read_model(path)
    assert str(caught.value).startswith(f"{path} is no valid ONNX model: ")
    return str(caught.value).removeprefix(f"{path} is no valid ONNX model: ")


def function(name: str, calls: Sequence[str], opset: int = 20) -> onnx.FunctionProto:
    values = ["a", *(f"v{at}" for at in range(len(calls))), "z"]
    nodes = [
        helper.make_node(op, [values[at]], [values[at + 1]], domain="my")
        for at, op in enumerate(calls)
    ]
    nodes.append(helper.make_node("Relu", [values[-2]], ["z"]))
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("my", 1)]
    return helper.make_function("my", name, ["a"], ["z"], nodes, imports)


def calling(*functions: onnx.FunctionProto) -> onnx.ModelProto:
    model = graph("y = my.F0 (x)")
    model.functions.extend(functions)
    return model


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = Relu (b) b = Relu (a) y = Add (x, a)", "nodes of its graph wait for each other"),
        ("y = Add (x)", "node '' (Add) has 1 inputs and needs 2"),
        ("y = Relu (x, x)", "node '' (Relu) has 2 inputs, not 0 to 1"),
        ("y = Add (, x)", "node '' (Add) is not given its input 'A'"),
        ("y, z = Relu (x)", "node '' (Relu) has 2 outputs, not 1 to 1"),
        (
            "y = Concat <axis = [1]> (x)",
            "node '' (Concat) has the attribute 'axis' as INTS, not INT",
        ),
        ("y = Concat (x)", "node '' (Concat) needs the attribute 'axis'"),
        (
            "y = Relu <axis = 1> (x)",
            "node '' (Relu) has the attribute 'axis', which is none of its",
        ),
        ("y = Cast <to = 99> (x)", "node '' (Cast) names the unknown type 99 as its 'to'"),
        ("y = Constant ()", "node '' (Constant) has 0 values, not one"),
        ("y = com.microsoft.FusedMatMul (x)", "node '' (FusedMatMul) has 1 inputs and needs 2"),
        (
            "y = com.microsoft.FusedMatMul <transA = 1.5> (x, x)",
            "node '' (FusedMatMul) has the attribute 'transA' as FLOAT, not INT",
        ),
        (
            "y = com.microsoft.MultiHeadAttention (x)",
            "node '' (MultiHeadAttention) needs the attribute 'num_heads'",
        ),
    ],
)
def test_nodes_that_no_runtime_runs(tmp_path: Path, body: str, reason: str) -> None:
    model = graph(body)
    for node in model.graph.node:
        node.name = ""
    assert refused(tmp_path, model).startswith(reason)


def test_bodies_that_do_not_fit_their_node(tmp_path: Path) -> None:
    model = graph("y = If (c) <then_branch = t () => (float[b, 4] q) { q = Abs (x) }, else_branch = e () => (float[b, 4] z) { z = Relu (x) }>", "float[b, 4] x, bool c")  # fmt: skip
    del model.graph.node[0].attribute[0].g.output[:]
    reason = refused(tmp_path, model)
    assert "has a graph of 0 inputs and 0 outputs, not 0 and 1" in reason
    given = "y = If (c) <then_branch = t () => (float[b, 4] x) {}, else_branch = e () => (float[b, 4] z) { z = Relu (x) }>"
    assert "'x', an output of" in refused(tmp_path, graph(given, "float[b, 4] x, bool c"))


def test_operators_of_ours_that_are_none(tmp_path: Path) -> None:
    model = graph("y = onnxgen.MoE (x)")
    model.opset_import.add(domain="onnxgen", version=1)
    assert "calls the function 'MoE:' of the domain 'onnxgen', and there is none" in refused(
        tmp_path, model
    )


def test_counts_of_nothing(tmp_path: Path) -> None:
    model = graph("y = com.microsoft.MultiHeadAttention <num_heads = 0> (x)")
    assert "has 0 as its num_heads" in refused(tmp_path, model)
    short = graph("y = SimplifiedLayerNormalization (x)")
    assert "has 1 inputs and needs 2" in refused(tmp_path, short)


def test_a_device_without_a_name(tmp_path: Path) -> None:
    model = graph("y = Relu (x)")
    model.ir_version = 11
    model.graph.node[0].device_configurations.add(pipeline_stage=1)
    assert "is for a device configuration without a name" in refused(tmp_path, model)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda m: m.graph.node[0].attribute.add(name="t", type=4).t.ClearField("dims"),
            "has no type",
        ),
        (lambda m: m.graph.input.add().CopyFrom(m.graph.input[0]), "two of its inputs are called"),
    ],
)
def test_damaged_files(
    tmp_path: Path, damage: Callable[[onnx.ModelProto], None], reason: str
) -> None:
    model = graph("y = Relu (x)")
    damage(model)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FileError, match=reason):
        read_model(path)


def test_text_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = graph("y = Relu (x)")
    model.graph.node[0].name = "qqqq"
    path.write_bytes(model.SerializeToString().replace(b"qqqq", b"q\xe0qq"))
    with pytest.raises(FileError, match=r"the name of its Node is .* which is no UTF-8"):
        read_model(path)


def test_a_parameter_outside_of_a_function(tmp_path: Path) -> None:
    model = graph("y = LeakyRelu (x)")
    model.graph.node[0].attribute.add(name="alpha", type=1, ref_attr_name="slope")
    assert "takes its alpha from a parameter 'slope', and there is none" in refused(tmp_path, model)


def test_a_body_that_reads_what_is_made_later(tmp_path: Path) -> None:
    model = graph("y = If (c) <then_branch = t () => (float[b, 4] q) {}, else_branch = e () => (float[b, 4] x) {}> q = Relu (x)", "float[b, 4] x, bool c")  # fmt: skip
    assert "'q', an output of" in refused(tmp_path, model)


def test_functions_that_call_themselves(tmp_path: Path) -> None:
    assert refused(tmp_path, calling(function("F0", ["F0"]))).startswith("its function 'F0' calls")
    ring = calling(function("F0", ["F1"]), function("F1", ["F2"]), function("F2", ["F0"]))
    assert "calls itself, or one that calls it" in refused(tmp_path, ring)


def test_a_tower_of_functions_is_not_built(tmp_path: Path) -> None:
    """Forty functions, each calling the next one twice: 2^40 nodes from 120."""
    tower = [function(f"F{at}", [f"F{at + 1}"] * 2) for at in range(40)]
    model = calling(*tower, function("F40", []))
    assert "its functions expand to" in refused(tmp_path, model)


def test_functions_too_deep(tmp_path: Path) -> None:
    chain = [function(f"F{at}", [f"F{at + 1}"]) for at in range(200)]
    assert "more than 100 deep" in refused(tmp_path, calling(*chain, function("F200", [])))


def test_functions_of_another_opset(tmp_path: Path) -> None:
    reason = refused(tmp_path, calling(function("F0", [], opset=18)))
    assert reason == (
        "its function 'F0' needs version 18 of the domain 'ai.onnx', and the model version 20; "
        "they cannot be joined"
    )


def test_a_call_that_leaves_outputs_out(tmp_path: Path) -> None:
    """The last outputs of a function need not be taken; inlining wants all of them."""
    two = function("F0", [])
    two.output.append("v")
    two.node.append(helper.make_node("Neg", ["z"], ["v"]))
    path = tmp_path / "model.onnx"
    path.write_bytes(calling(two).SerializeToString())
    (call,) = read_model(path).graph
    assert len(call.outputs) == 2
    two.input.append("b")
    model = calling(two)
    model.graph.node[0].input.extend(["x", "x"])
    assert "has 3 inputs and 1 outputs, and the function that it calls 2 and 2" in refused(
        tmp_path, model
    )


def test_operators_before_their_time_and_of_nobody(tmp_path: Path) -> None:
    """Files that runtimes take stay readable: what nobody knows, nobody checks."""
    path = tmp_path / "model.onnx"
    for body in ("y = RMSNormalization (x, x)", "y = my.Own <a = 1> ()", "y = Unheard (x, x, x)"):
        path.write_bytes(graph(body).SerializeToString())
        assert len(read_model(path).graph) == 1


def test_negative_sizes_of_a_tensor(tmp_path: Path) -> None:
    model = graph("y = Add (x, w)")
    model.graph.initializer.append(TensorProto(name="w", dims=[1, -4], data_type=1))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FileError, match=r"tensor 'w' has the shape \[1, -4\]"):
        read_model(path)


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31m\x00", "\u202e", "x" * 70_000])
def test_sentences_stay_sentences(name: str) -> None:
    said = str(OnnxgenError(f"node {name} is odd"))
    assert said.isprintable()
    assert len(said) <= LONGEST + 3
