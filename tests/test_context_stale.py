"""What makes a context stale, and what does not, as the tables of docs/contexts.md say; by running it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
import pytest
from onnx import TensorProto as T
from onnx import helper

import onnxgen
from onnxgen.contexts.choosing import Chooser
from onnxgen.contexts.forms import Encoding, decode_file, encode, strip
from onnxgen.contexts.order import is_sorted
from onnxgen.reading import open_model
from tests.context_graphs import held_with, invented, region_of

X = np.array([[1.0, -2.0], [3.0, 0.5]], np.float32)
FORMS: tuple[Encoding, ...] = ("function", "metadata")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models are, and which blobs are trusted."""
    return tmp_path_factory.mktemp("stale")


@pytest.fixture
def folder(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, and this user's."""
    monkeypatch.setenv("ONNXGEN_CONFIG", str(shared / "config"))
    monkeypatch.setenv("ONNXGEN_CACHE", str(shared / "cache"))
    return shared


# --- a file that somebody changes ---------------------------------------------------------------


def model_with_a_region(folder: Path, form: Encoding) -> onnx.ModelProto:
    """Compiled by ONNX Runtime: h, a, b, d and c, which reads z; before it stands p, behind it y."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20, "ours": 1]>
        g (float[n,2] x, float[3] z) => (float[n,3] y)
        <float[2,3] w = {0, 1, 2, 3, 4, 5}, float[3] k = {1, 2, 3}> {
            p = Neg(x)
            h = MatMul(p, w)
            a = LeakyRelu<alpha = 0.5>(h)
            b = Add(a, k)
            d = Sub(b, z)
            c = ours.twice(d)
            y = Exp(c)
        }
        <domain: "ours", opset_import: ["": 20]>
        twice (v) => (r) { r = Add(v, v) }"""
    )
    for node in model.graph.node:
        inside = node.output[0] in "habcd"
        node.name = f"/{'inside' if inside else 'outside'}/{node.output[0]}"
    path, output = folder / "m.onnx", folder / f"m.{form}.onnx"
    if output.exists():
        return onnx.load(output)
    onnx.save(model, path)
    onnxgen.add_contexts(path, ["ort:cpu"], region="inside", encoding=form, output=output)
    return onnx.load(output)


def region_nodes(model: onnx.ModelProto) -> Any:
    bodies = [f.node for f in model.functions if f.name.startswith("Region_")]
    return bodies[0] if bodies else model.graph.node


def node_of(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    nodes = [*region_nodes(model), *model.graph.node]
    return next(node for node in nodes if node.op_type == op_type)


def weight_of(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(each for each in model.graph.initializer if each.name == name)


def rename_values(model: onnx.ModelProto) -> None:
    nodes = [
        *model.graph.node,
        *(n for f in model.functions if f.name[:3] == "Reg" for n in f.node),
    ]
    regions = [f for f in model.functions if f.name.startswith("Region_")]
    for held in (*(n.input for n in nodes), *(n.output for n in nodes)):
        held[:] = [each if each in "xyzw" else f"new_{each}" for each in held]
    for function in regions:
        for held in (function.input, function.output):
            held[:] = [each if each in "xyzw" else f"new_{each}" for each in held]
    for value in (*model.graph.value_info, weight_of(model, "k")):
        value.name = f"new_{value.name}"
    entry = next(each for each in model.metadata_props if each.key == "onnxgen.contexts")
    for name in "kpc":  # the metadata form has names in its table: whoever renames must know
        entry.value = entry.value.replace(f'"{name}"', f'"new_{name}"')


def rename_nodes(model: onnx.ModelProto) -> None:
    for node in (*model.graph.node, *region_nodes(model)):
        node.name = f"other{node.name}"
        node.doc_string = "words"


def sort_attributes_and_others(model: onnx.ModelProto) -> None:
    node_of(model, "LeakyRelu").attribute[0].doc_string = "words"
    for held in (model.graph.initializer, model.functions, model.opset_import):
        kept = list(reversed([copy.deepcopy(each) for each in held]))
        del held[:]
        held.extend(kept)
    model.metadata_props.add(key="somebody's", value="own")
    model.producer_name = "somebody"


def infer_shapes(model: onnx.ModelProto) -> None:
    model.CopyFrom(onnx.shape_inference.infer_shapes(model))


def type_weights(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        made = helper.make_tensor(tensor.name, T.FLOAT, values.shape, values.flatten().tolist())
        tensor.CopyFrom(made)


def change_outside(model: onnx.ModelProto) -> None:
    node_of(model, "Exp").op_type = "Abs"


def insert_outside(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Abs", ["x"], ["abs"]))
    next(n for n in model.graph.node if n.op_type == "Neg").input[0] = "abs"


def change_attribute(model: onnx.ModelProto) -> None:
    node_of(model, "LeakyRelu").attribute[0].f = 0.25


def change_operator(model: onnx.ModelProto) -> None:
    node_of(model, "LeakyRelu").op_type = "Elu"


def swap_inputs(model: onnx.ModelProto) -> None:
    node = node_of(model, "Add")
    node.input[:] = reversed(node.input)


def change_opset(model: onnx.ModelProto) -> None:
    for each in (model, *model.functions):
        for opset in each.opset_import:
            if not opset.domain:
                opset.version = 21


def declare_input(model: onnx.ModelProto) -> None:
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "any"


def change_function(model: onnx.ModelProto) -> None:
    next(f for f in model.functions if f.name == "twice").node[0].op_type = "Mul"


def change_weight(model: onnx.ModelProto) -> None:
    values = onnx.numpy_helper.to_array(weight_of(model, "w")) + 1
    weight_of(model, "w").CopyFrom(onnx.numpy_helper.from_array(values, "w"))


def feed_weight(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("k", T.FLOAT, [3]))


def fold_input(model: onnx.ModelProto) -> None:
    del model.graph.node[0]
    model.graph.initializer.append(onnx.numpy_helper.from_array(-X, "p"))


def inline(model: onnx.ModelProto) -> None:
    model.CopyFrom(onnx.inliner.inline_local_functions(model))


def drop_metadata(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]


def expose(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("a", T.FLOAT, None))


def copy_scope(model: onnx.ModelProto) -> None:
    model.graph.node[-1].metadata_props.extend(node_of(model, "Add").metadata_props)


def insert_between(model: onnx.ModelProto) -> None:
    model.graph.node.insert(3, helper.make_node("Neg", ["x"], ["unused"]))


KEPT = (
    rename_values,
    rename_nodes,
    sort_attributes_and_others,
    infer_shapes,
    type_weights,
    change_outside,
    insert_outside,
)
STALE = (
    change_attribute,
    change_operator,
    declare_input,
    swap_inputs,
    change_opset,
    change_function,
    change_weight,
    feed_weight,
    fold_input,
    drop_metadata,
)
IN_METADATA = {insert_between: True, expose: False, copy_scope: False}
CASES = [
    *((each, form, True) for each in KEPT for form in FORMS),
    *((each, form, False) for each in STALE for form in FORMS),
    *((each, "metadata", kept) for each, kept in IN_METADATA.items()),
    (inline, "function", False),
]


@pytest.mark.parametrize(("change", "form", "kept"), CASES)
def test_after_a_change_the_file_runs_as_its_nodes_say(
    change: Callable[[onnx.ModelProto], None],
    form: Encoding,
    kept: bool,
    folder: Path,
    tmp_path: Path,
) -> None:
    model = model_with_a_region(folder, form)
    change(model)
    path = tmp_path / "changed.onnx"
    onnx.save(model, path)
    session = onnxgen.load(path)
    assert ("ort:cpu" in session.picked.values()) == kept
    reasons = [each.reason for choice in session.choices for each in choice.passed]
    assert not any("trusted" in each for each in reasons)
    feeds = {"x": X, "z": np.array([4, 5, 6], np.float32)}
    expected = ort.InferenceSession(path).run(None, feeds)
    for one, other in zip(session.run(None, feeds), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    if change is feed_weight:
        fed = {**feeds, "k": np.zeros(3, np.float32)}
        (one,) = session.run(None, fed)
        (other,) = ort.InferenceSession(path).run(None, fed)
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_nodes_that_were_moved_come_back_in_an_order_that_runs(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["": 20]>
            g (float[n] x) => (float[n] y, float[n] z, float[n] k) {
                a = Relu(x)
                z = Neg(a)
                e = Exp(x)
                y = Add(a, e)
                k = Sqrt(x)
            }"""
        ),
        path,
    )
    held = held_with(path, [])
    context, blob = invented(b"b")
    held.blobs = {context.blob.sha256: blob}
    region = region_of(open_model(path), "first", [0, 3])
    held.table.regions = [replace(region, contexts=(context,))]
    model = encode(held, "function")
    assert [node.op_type for node in model.graph.node] == ["Exp", "Region_0", "Neg", "Sqrt"]
    model.graph.node.insert(0, model.graph.node[3])
    del model.graph.node[4]
    strip(model)
    assert len(model.graph.node) == 5
    assert is_sorted(model.graph.node)
    onnx.checker.check_model(model)


def test_a_type_that_nobody_knows_is_a_reason_and_no_failure(folder: Path, tmp_path: Path) -> None:
    model = model_with_a_region(folder, "function")
    weight_of(model, "k").data_type = 99
    path = tmp_path / "changed.onnx"
    onnx.save(model, path)
    opened, held = decode_file(path)
    (region,) = held.table.regions
    choice = Chooser(opened, held).choose(region)
    assert choice.context is None
    assert "its nodes have changed" in choice.passed[0].reason


def test_types_between_parts_that_are_no_longer_true(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]>
        g (float[n,2] x) => (float[n,m] y) <float[2,3] w = {0, 1, 2, 3, 4, 5}> {
            t = Concat<axis = 1>(x, x)
            c = MatMul(x, w)
            y = Concat<axis = 1>(c, t)
        }"""
    )
    for node, name in zip(model.graph.node, ("/out/t", "/inside/c", "/out/y"), strict=True):
        node.name = name
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    onnxgen.add_contexts(path, ["ort:cpu"], region="inside")
    changed = onnx.load(tmp_path / "m.context.onnx")
    node_of(changed, "Concat").input.append("x")
    onnx.save(changed, path)
    session = onnxgen.load(path)
    assert "ort:cpu" in session.picked.values()
    (found,) = session.run(None, {"x": X})
    (expected,) = ort.InferenceSession(path).run(None, {"x": X})
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert "ort:cpu" not in session.picked.values()
    assert "cannot be run apart" in session.choices[0].passed[0].reason

    node_of(changed, "Concat").op_type = "Equal"  # of other types, which no session takes
    del node_of(changed, "Equal").attribute[:], node_of(changed, "Equal").input[2:]
    model.graph.node[0].CopyFrom(node_of(changed, "Equal"))
    changed.graph.node[-1].input[:] = ["c", "f"]
    changed.graph.node.insert(2, helper.make_node("Cast", ["t"], ["f"], to=T.FLOAT))
    onnx.save(changed, path)
    session = onnxgen.load(path)
    (found,) = session.run(None, {"x": X})
    (expected,) = ort.InferenceSession(path).run(None, {"x": X})
    np.testing.assert_allclose(found, expected, rtol=1e-6)
