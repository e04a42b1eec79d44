"""A model that holds contexts, in both forms: nothing is lost, whichever way it is turned."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

from onnxgen.contexts.forms import Encoding, Held, decode, encode, holds_contexts, strip
from onnxgen.contexts.records import FormatError
from onnxgen.contexts.values import DOMAIN
from onnxgen.reading import open_model
from tests.context_graphs import corpus_file, held_with, invented, region_of

EXPORTS = (
    "llama/dynamo20",
    "bert/dynamo20",
    "mixtral/torchscript-batched",
    "whisper_decoder/dynamo20",
)
FORMS: tuple[Encoding, ...] = ("function", "metadata")


def halves(path: Path, count: int = 3) -> Held:
    total = len(onnx.load(path).graph.node)
    cuts = [total * index // count for index in range(count + 1)]
    return held_with(path, list(itertools.pairwise(cuts)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("export", EXPORTS)
def test_what_was_added_can_be_taken_out_again(export: str, form: Encoding, tmp_path: Path) -> None:
    path = corpus_file(export, tmp_path)
    held = halves(path)
    before, table, blobs = copy.deepcopy(held.proto), copy.deepcopy(held.table), dict(held.blobs)
    proto = encode(held, form)
    assert holds_contexts(proto)
    assert proto != before
    again = decode(copy.deepcopy(proto))
    assert again.table == table
    assert again.encoding == form
    assert {name: each.raw_data for name, each in again.blobs.items()} == {
        name: each.raw_data for name, each in blobs.items()
    }
    assert_equal(again.proto, before)
    assert not holds_contexts(again.proto)


@pytest.mark.parametrize("export", EXPORTS)
def test_a_form_converted_twice_is_the_same_file(export: str, tmp_path: Path) -> None:
    held = halves(corpus_file(export, tmp_path))
    first = copy.deepcopy(encode(held, "function"))
    there = encode(decode(copy.deepcopy(first)), "metadata")
    back = encode(decode(copy.deepcopy(there)), "function")
    assert back.SerializeToString(deterministic=True) == first.SerializeToString(deterministic=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("export", EXPORTS)
def test_onnx_and_its_runtime_take_both_forms(export: str, form: Encoding, tmp_path: Path) -> None:
    path = corpus_file(export, tmp_path)
    proto = with_weights(encode(halves(path), form), path)
    onnx.checker.check_model(proto)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options)
    assert [each.name for each in session.get_outputs()] == [o.name for o in proto.graph.output]


def test_regions_that_take_turns_are_called_in_an_order_that_runs(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(TURNS, path)
    held = held_with(path, [])
    context, blob = invented(b"b")
    opened = open_model(path)
    first = region_of(opened, "first", [0, 3])
    held.table.regions = [replace(first, contexts=(context,))]
    held.blobs = {context.blob.sha256: blob}
    proto = encode(held, "function")
    assert [node.op_type for node in proto.graph.node] == ["Exp", "Region_0", "Neg"]
    assert decode(proto).proto == TURNS


# Neg reads what the region makes, Add of the region reads Exp.
TURNS = onnx.parser.parse_model(
    """<ir_version: 10, opset_import: ["" : 20]>
    g (float[n] x) => (float[n] y, float[n] z) {
        a = Relu(x)
        z = Neg(a)
        e = Exp(x)
        y = Add(a, e)
    }"""
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "table", ["", "[]", "{", '{"version":2}', "null", '{"version":1,"encoding":"x"}']
)
def test_a_damaged_table_is_said_and_the_graph_comes_back(
    table: str, form: Encoding, tmp_path: Path
) -> None:
    path = corpus_file("llama/dynamo20", tmp_path)
    before = onnx.load(path)
    proto = encode(halves(path), form)
    next(each for each in proto.metadata_props if each.key == "onnxgen.contexts").value = table
    with pytest.raises(FormatError):
        decode(proto)
    assert not any(each.domain == DOMAIN for each in proto.functions)
    onnx.checker.check_model(with_weights(proto, path))
    assert sorted(n.name for n in proto.graph.node) == sorted(n.name for n in before.graph.node)


def test_a_function_called_twice_comes_back_under_names_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(TURNS, path)
    proto = encode(held_with(path, [(0, 4)]), "function")
    second = copy.deepcopy(proto.graph.node[0])
    second.output[:] = ["again_z", "again_y"]
    second.name = "again"
    proto.graph.node.append(second)
    assert strip(proto) == ["somebody"]  # two regions of one name are no table
    made = [name for node in proto.graph.node for name in node.output]
    assert len(made) == len(set(made)) == 8
    onnx.checker.check_model(proto)


def with_weights(proto: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The model with the contents of its weights, which stay in the file when it is opened."""
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(onnx.load(path).graph.initializer)
    return proto


def assert_equal(model: onnx.ModelProto, other: onnx.ModelProto) -> None:
    """All but the order of what is declared of values within is the same."""
    for each in (model, other):
        infos = sorted(each.graph.value_info, key=lambda value: value.name)
        del each.graph.value_info[:]
        each.graph.value_info.extend(infos)
    assert model == other
