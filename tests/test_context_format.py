"""docs/contexts.md is right: a reader written from it alone agrees, and its example is what comes out."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper

import onnxgen
from onnxgen.contexts.canonical import canonical_text
from onnxgen.contexts.cutting import cut_out
from onnxgen.contexts.forms import Encoding, encode
from onnxgen.contexts.sides import side_files
from onnxgen.testing import load_corpus_model
from tests import independent_reader
from tests.context_graphs import corpus_file, held_with

PAGE = Path(__file__).parent.parent / "docs" / "contexts.md"
FORMS: tuple[Encoding, ...] = ("function", "metadata")
EXPORTS = (
    "llama/dynamo20-bf16",
    "llama/dynamo20-static",
    "bert/dynamo20",
    "gpt2/torchscript",
    "mixtral/torchscript-looped",
    "nemotron_h/torchscript-looped",
    "whisper_decoder/dynamo20",
    "qwen3/builder",
)


@pytest.mark.parametrize("export", EXPORTS)
def test_the_independent_reader_agrees(export: str, tmp_path: Path) -> None:
    assert_reader_agrees(corpus_file(export, tmp_path), tmp_path)


def test_it_agrees_on_functions_that_call_functions(tmp_path: Path) -> None:
    path = tmp_path / "fused.onnx"
    original = load_corpus_model("mixtral/dynamo20-batched")
    onnxgen.fuse(original, no_verify=True).save(path)
    assert any(each.domain == "onnxgen" for each in onnx.load(path).functions)
    assert_reader_agrees(path, tmp_path)


def test_it_agrees_on_every_kind_of_attribute(tmp_path: Path) -> None:
    path = tmp_path / "kinds.onnx"
    onnx.save(every_kind(), path)
    assert_reader_agrees(path, tmp_path, count=1)


def assert_reader_agrees(path: Path, folder: Path, count: int = 3) -> None:
    """Both forms, blobs inside and beside, are read as onnxgen wrote them."""
    before = onnx.load(path)
    cuts = [len(before.graph.node) * index // count for index in range(count + 1)]
    for form in FORMS:
        held = held_with(path, list(itertools.pairwise(cuts)))
        contents = {name: each.raw_data for name, each in held.blobs.items()}
        written = folder / f"with.{form}.onnx"
        beside = form == "metadata"
        with side_files(folder, f"with.{form}", contents) as (tensors, made):
            if beside:
                held.blobs = tensors
                made.clear()
            table = held.table
            proto = encode(held, form)
        del proto.graph.initializer[:]  # those that were left in the file
        proto.graph.initializer.extend(before.graph.initializer)
        onnx.save(proto, written)

        found = independent_reader.read(written)
        assert found.encoding == form
        assert found.blobs == contents
        assert all(hashlib.sha256(each).hexdigest() == name for name, each in contents.items())
        assert found.types == table.types
        assert without_value_info(found.original) == without_value_info(before)
        assert sorted_value_info(found.original) == sorted_value_info(before)
        for region, ours in zip(found.regions, table.regions, strict=True):
            assert region.record["region"] == ours.name
            assert region.nodes == list(ours.nodes)
            assert tuple(region.inputs) == ours.inputs
            assert tuple(region.weights) == ours.weights
            assert tuple(region.outputs) == ours.outputs
            assert found.text(region) == canonical_text(cut_out(before, ours))
            assert found.subgraph_sha256(region) == ours.subgraph
            assert found.subgraph_sha256(region) == region.record["subgraph_sha256"]
            assert found.weights_sha256(region) == ours.weights_sha256
            assert found.weights_sha256(region) == region.record["weights_sha256"]
            (context,) = region.contexts
            assert context["blob"]["sha256"] in found.blobs
            assert context["parameters"] == list(ours.contexts[0].parameters)


def without_value_info(model: onnx.ModelProto) -> onnx.ModelProto:
    found = onnx.ModelProto()
    found.CopyFrom(model)
    del found.graph.value_info[:]
    return found


def sorted_value_info(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    return sorted(model.graph.value_info, key=lambda value: value.name)


def test_the_example_of_the_page_is_what_comes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = PAGE.read_text("utf-8").split("## An example", 1)[1].split("\n## ", 1)[0]
    make, show = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (expected,) = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
    assert "`onnxgen context add tiny.onnx --backend ort:cpu`" in section
    monkeypatch.chdir(tmp_path)
    exec(make, {})
    onnxgen.add_contexts("tiny.onnx", ["ort:cpu"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(show, {})
    assert printed.getvalue() == expected
    text, digest, weights = expected.rsplit("\n", 3)[:3]
    assert hashlib.sha256(f"{text}\n".encode()).hexdigest() == digest
    found = independent_reader.read(tmp_path / "tiny.context.onnx")
    (region,) = found.regions
    assert found.text(region) == f"{text}\n"
    assert found.weights_sha256(region) == weights


@pytest.mark.parametrize("words", re.findall(r"\]\((#[\w-]+)\)", PAGE.read_text("utf-8")))
def test_links_within_the_page_lead_somewhere(words: str) -> None:
    titles = re.findall(r"^#+ (.*)$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert words[1:] in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in titles}


def test_the_commands_of_the_page_are_there() -> None:
    reference = (PAGE.parent.parent / "cli.md").read_text("utf-8")
    used = set(re.findall(r"onnxgen context ([a-z]+)", PAGE.read_text("utf-8")))
    assert used == {"add", "list", "check", "strip", "convert", "export"}
    assert all(f"onnxgen context {each}" in reference for each in used)


# --- a model of every kind ----------------------------------------------------------------------


def every_kind() -> onnx.ModelProto:
    """Nodes of a domain that nobody knows, with every attribute that ONNX has, and functions."""
    tensors = [
        helper.make_tensor("a", T.FLOAT, [2], [0.5, -0.0]),
        helper.make_tensor("b", T.STRING, [3], [b"", b"x,y", b"\n"]),
        helper.make_tensor("c", T.BFLOAT16, [3], [1.5, 2.0, 3.0]),
        helper.make_tensor("d", T.INT4, [3], [1, -2, 3]),
        helper.make_tensor("e", T.FLOAT16, [1], [0.25]),
        helper.make_tensor("f", T.UINT64, [1], [2**63 + 1]),
        helper.make_tensor("g", T.BOOL, [2], [True, False]),
        helper.make_tensor("h", T.FLOAT8E4M3FN, [2], [1.0, 0.5]),
        helper.make_tensor("j", T.COMPLEX64, [1], [1 + 2j]),
        helper.make_tensor("k", T.INT8, [2], [-1, 7]),
        helper.make_tensor("l", T.DOUBLE, [0], []),
        onnx.numpy_helper.from_array(np.arange(6, dtype=np.int16).reshape(2, 3), "m"),
    ]
    sparse = onnx.SparseTensorProto(values=tensors[0], dims=[5])
    sparse.indices.CopyFrom(helper.make_tensor("n", T.INT64, [2], [1, 4]))
    floats = helper.make_tensor_type_proto(T.FLOAT, ["n", None, 3])
    kinds = [
        floats,
        helper.make_tensor_type_proto(T.INT64, None),
        helper.make_sequence_type_proto(floats),
        helper.make_optional_type_proto(helper.make_sequence_type_proto(floats)),
        helper.make_map_type_proto(T.STRING, floats),
        helper.make_sparse_tensor_type_proto(T.DOUBLE, [4]),
        onnx.TypeProto(opaque_type=onnx.TypeProto.Opaque(domain="d", name="o")),
    ]
    attributes = {
        "float": 0.1,
        "int": -(2**63),
        "string": b"\xff'",
        "floats": [float("inf"), 1e-45],
        "ints": [1, 2],
        "strings": [b"a", b"", b"','"],
        "tensors": tensors,
        "graph": inner("graph", kinds),
        "graphs": [inner("first", kinds[:1]), inner("second", [])],
        "sparse_tensor": sparse,
        "sparse_tensors": [sparse, sparse],
        "type_proto": kinds[3],
        "type_protos": kinds,
        "empty": helper.make_attribute("empty", [], attr_type=onnx.AttributeProto.INTS),
    }
    nodes = [helper.make_node("Many", ["x", "", "w"], ["a", "", "b"], domain="odd.domain")]
    for name, value in attributes.items():
        known = isinstance(value, onnx.AttributeProto)
        nodes[0].attribute.append(value if known else helper.make_attribute(name, value))
    for number, tensor in enumerate(tensors):
        nodes.append(helper.make_node("Constant", [], [f"c{number}"], value=tensor))
    nodes.append(helper.make_node("Calls", ["b", "s"], ["y"], domain="ours", k=3))
    nodes[-1].overload = "one"
    calls = helper.make_function(
        "ours",
        "Calls",
        ["p", "q"],
        ["r"],
        [
            helper.make_node("Calls", ["p"], ["t"], domain="ours", overload="two"),
            helper.make_node("Odd", ["t", "q"], ["r"], domain="odd.domain"),
        ],
        [helper.make_opsetid("ai.onnx", 21), helper.make_opsetid("odd.domain", 2)],
        ["k", "j"],
        [
            helper.make_attribute("z", 1.5),
            helper.make_attribute("g", inner("default", [], outer="")),
        ],
        overload="one",
    )
    calls.opset_import.append(helper.make_opsetid("ours", 1))
    reference = calls.node[1].attribute.add(name="k", ref_attr_name="k")
    reference.type = onnx.AttributeProto.INT
    other = helper.make_function(
        "ours",
        "Calls",
        ["p"],
        ["p"],
        [],
        [helper.make_opsetid("", 21)],
        overload="two",
    )
    graph = helper.make_graph(
        nodes,
        "every",
        [helper.make_tensor_value_info("x", T.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", T.FLOAT, ["n", 3])],
        [
            helper.make_tensor("w", T.INT4, [5], [1, 2, 3, 4, -5]),
            helper.make_tensor("s", T.STRING, [2], [b"one", b"two"]),
        ],
    )
    opsets = [("odd.domain", 2), ("ai.onnx", 21), ("ours", 1), ("unused", 3)]
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(*each) for each in opsets],
        functions=[calls, other],
        ir_version=10,
    )


def inner(name: str, kinds: list[onnx.TypeProto], outer: str = "x") -> onnx.GraphProto:
    """A graph within a node that reads `outer`, has a default, and values of these types."""
    return onnx.GraphProto(
        name=name,
        input=[helper.make_value_info(f"in{i}", kind) for i, kind in enumerate(kinds)]
        + [onnx.ValueInfoProto(name="free")],
        initializer=[
            helper.make_tensor("own", T.INT64, [1], [4]),
            helper.make_tensor("free", T.INT64, [1], [5]),
        ],
        node=[helper.make_node("Odd", [outer, "own", "free"], ["out"], domain="odd.domain")],
        output=[helper.make_tensor_value_info("out", T.FLOAT, None)],
    )
