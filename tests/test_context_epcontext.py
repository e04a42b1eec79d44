"""EPContext models: what is in them, what they compute, and what OpenVINO's provider makes of them."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, parser
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from onnxgen.backends.interface import Identity, Weight
from onnxgen.contexts.epcontext import CompiledRegion, compatibility_of, epcontext_model
from onnxgen.contexts.openvino_bin import PROVIDER, PROVIDER_OPTIONS, compatibility, contained
from onnxgen.contexts.package import Variant, write_package
from onnxgen.errors import RefusedError

STUB = "StubExecutionProvider"
MADE = Identity("Stub", "2026.4.1-22982", "a device")
Array = np.ndarray[Any, Any]
rng = np.random.default_rng(18)

# Two layers of one form: h = Relu(x @ w + b) + x. What is not compiled stands around them.
MAIN = parser.parse_model(
    '<ir_version: 10, opset_import: ["" : 21]>'
    "main (float[n, 48] x) => (float[n, 48] y, float[48, 48] twice) {"
    "  a = Abs(x)"
    "  m = MatMul(a, W)  s = Add(m, B)  r = Relu(s)  h = Add(r, a)"
    "  c = Cos(h)"
    "  m2 = MatMul(c, W2)  s2 = Add(m2, B2)  r2 = Relu(s2)  h2 = Add(r2, c)"
    "  y = Neg(h2)  twice = Add(W, W)"
    "}"
)
PART = parser.parse_model(
    '<ir_version: 10, opset_import: ["" : 21]>'
    "region (float[?, 48] i0, float[48, 48] w0, float[48] w1) => (float[?, 48] v3) {"
    "  v0 = MatMul(i0, w0)  v1 = Add(v0, w1)  v2 = Relu(v1)  v3 = Add(v2, i0)"
    "}"
)
VALUES: dict[str, Array] = {
    name: rng.standard_normal(shape).astype(np.float32)
    for name, shape in {"W": (48, 48), "B": (48,), "W2": (48, 48), "B2": (48,)}.items()
}
for _name, _value in VALUES.items():
    MAIN.graph.initializer.append(onnx.numpy_helper.from_array(_value, _name))
X = rng.standard_normal((7, 48)).astype(np.float32)


class EPContext(OpRun):
    """A provider for the reference evaluator: its blob is the part itself."""

    op_domain = "com.microsoft"

    def _run(self, *inputs: Array, ep_cache_context: str, **_: Any) -> tuple[Array, ...]:
        part = onnx.ModelProto.FromString(bytes.fromhex(ep_cache_context))
        names = [each.name for each in part.graph.input]
        found = ReferenceEvaluator(part).run(None, dict(zip(names, inputs, strict=True)))
        return tuple(np.asarray(each) for each in found)


def copy(model: onnx.ModelProto) -> onnx.ModelProto:
    found = onnx.ModelProto()
    found.CopyFrom(model)
    return found


def inside(part: onnx.ModelProto, values: Mapping[str, Array]) -> onnx.ModelProto:
    """The part with weights as initializers."""
    found = copy(part)
    for name, value in values.items():
        (given,) = (each for each in found.graph.input if each.name == name)
        found.graph.input.remove(given)
        found.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return found


def stub_blob(part: onnx.ModelProto, **changed: Any) -> bytes:
    """An EPContext model as ModelCompiler writes one."""
    attributes = {
        "main_context": 1,
        "embed_mode": 1,
        "ep_cache_context": part.SerializeToString().hex(),
        "source": STUB,
        "partition_name": "p",
    }
    node = helper.make_node(
        "EPContext",
        [each.name for each in part.graph.input],
        [each.name for each in part.graph.output],
        name="context",
        domain="com.microsoft",
        **(attributes | changed),
    )
    graph = helper.make_graph([node], "g", list(part.graph.input), list(part.graph.output))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    helper.set_model_props(model, {f"ep_compatibility_info.{STUB}": "fits=1", "other": "no"})
    return bytes(model.SerializeToString())


FIRST = CompiledRegion(
    nodes=(1, 2, 3, 4),
    inputs=("a",),
    weights=("W", "B"),
    outputs=("h",),
    model=PART,
    blob=stub_blob(PART),
    form="onnx",
    provider=STUB,
    identity=MADE,
    parameters=(0, 1),
)
SECOND = replace(FIRST, nodes=(6, 7, 8, 9), inputs=("c",), weights=("W2", "B2"), outputs=("h2",))


def reference(model: onnx.ModelProto, feeds: Mapping[str, Array] | None = None) -> list[Array]:
    """What a model computes; an input with a default is given it."""
    found = ReferenceEvaluator(model, new_ops=[EPContext]).run(None, dict(feeds or {"x": X}))
    return [np.asarray(each) for each in found]


def given(model: onnx.ModelProto) -> list[str]:
    """The inputs that must be given."""
    defaults = {each.name for each in model.graph.initializer}
    return [each.name for each in model.graph.input if each.name not in defaults]


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def assert_right(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(without_contexts(model))
    assert given(model) == ["x"]
    assert list(model.graph.output) == list(MAIN.graph.output)
    for found, expected in zip(reference(model), reference(MAIN), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def without_contexts(model: onnx.ModelProto) -> onnx.ModelProto:
    """For the checker, which knows no EPContext: everything else must be in order."""
    found = copy(model)
    domain = found.opset_import.add()
    domain.domain, domain.version = "stub", 1
    for node in found.graph.node:
        if node.op_type == "EPContext":
            node.domain = "stub"
    return found


def test_a_region_becomes_what_was_compiled() -> None:
    before = MAIN.SerializeToString()
    model = epcontext_model(MAIN, [FIRST])
    assert MAIN.SerializeToString() == before
    assert_right(model)
    assert ops(model).count("MatMul") == 1
    (node,) = (each for each in model.graph.node if each.op_type == "EPContext")
    assert list(node.input) == ["i0", "w0", "w1"]  # as they were compiled
    assert list(node.output) == ["v3"]
    assert compatibility_of(model, STUB) == "fits=1"
    assert [each.key for each in model.metadata_props] == [f"ep_compatibility_info.{STUB}"]


def test_regions_share_one_graph() -> None:
    model = epcontext_model(MAIN, [FIRST, SECOND])
    assert_right(model)
    first, second = (each for each in model.graph.node if each.op_type == "EPContext")
    assert list(first.input) == ["i0", "w0", "w1"]
    assert not {*first.input, *first.output} & {*second.input, *second.output}
    assert first.name != second.name


def test_only_what_is_read_is_kept() -> None:
    part = inside(PART, {"w0": VALUES["W"]})
    model = epcontext_model(MAIN, [replace(FIRST, blob=stub_blob(part), parameters=(1,))])
    assert_right(model)
    names = {each.name for each in model.graph.initializer}
    assert names == {"W", "B", "W2", "B2", "as_it_is_1", "as_it_is_2"}  # another node reads W
    part = inside(PART, {"w0": VALUES["W2"], "w1": VALUES["B2"]})
    model = epcontext_model(MAIN, [replace(SECOND, blob=stub_blob(part), parameters=())])
    assert_right(model)
    assert {each.name for each in model.graph.initializer} == {"W", "B", "as_it_is_2"}
    assert [each.name for each in model.graph.input] == ["x", "as_it_is_2"]


def test_inputs_with_defaults_stay() -> None:
    main = copy(MAIN)
    main.graph.input.append(helper.make_tensor_value_info("B", TensorProto.FLOAT, [48]))
    part = inside(PART, {"w0": VALUES["W"], "w1": VALUES["B"]})
    model = epcontext_model(main, [replace(FIRST, blob=stub_blob(part), parameters=())])
    assert "B" in {each.name for each in model.graph.initializer}
    assert [each.name for each in model.graph.input][:2] == ["x", "B"]


def test_types_of_outputs_are_declared() -> None:
    part = copy(PART)
    part.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "n"  # the model has another n
    model = epcontext_model(MAIN, [replace(FIRST, model=part)])
    (found,) = (each for each in model.graph.value_info if each.name == "v3")
    assert found.type.tensor_type.elem_type == TensorProto.FLOAT
    dims = found.type.tensor_type.shape.dim
    assert [dim.WhichOneof("value") for dim in dims] == [None, "dim_value"]


def test_ranks_need_not_be_known() -> None:
    part = copy(PART)
    for value in (part.graph.input[0], part.graph.output[0]):
        value.type.tensor_type.ClearField("shape")
    assert_right(epcontext_model(MAIN, [replace(FIRST, model=part, blob=stub_blob(part))]))


def test_values_of_the_model_keep_their_names() -> None:
    """A name of the part that the model has too: another is found, unless it must be that one."""
    main = copy(MAIN)
    for node in main.graph.node:
        for names in (node.input, node.output):
            names[:] = ["i0" if name == "c" else name for name in names]
    for found, expected in zip(
        reference(epcontext_model(main, [FIRST])), reference(MAIN), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RefusedError, match="has a value called 'i0'"):
        epcontext_model(main, [replace(FIRST, provider=PROVIDER)])


def test_a_weight_that_has_the_name_already_is_led_there_too() -> None:
    main = copy(MAIN)
    main.graph.initializer[1].name = main.graph.node[2].input[1] = "w1"
    region = replace(FIRST, weights=("W", "w1"))
    model = epcontext_model(main, [region])
    (node,) = (each for each in model.graph.node if each.op_type == "EPContext")
    assert not set(node.input) & {each.name for each in model.graph.initializer}
    with pytest.raises(RefusedError, match="has a value called 'w1'"):
        epcontext_model(main, [replace(region, provider=PROVIDER)])


def test_graphs_within_nodes_read_what_was_compiled() -> None:
    """A region moves behind what it waits for; what reads of it, within graphs too, behind it."""
    main = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]>'
        "main (float[n, 48] x, bool yes) => (float[n, 48] y, float[n, 48] h) {"
        "  p = Abs(x)"
        "  q = If(yes) <then_branch = a () => (float[n, 48] t) { t = Sin(p) },"
        "    else_branch = b () => (float[n, 48] e) { e = Cos(p) }>"
        "  k = Neg(x)"
        "  h = Mul(k, x)"
        "  y = Add(q, k)"
        "}"
    )
    part = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]>'
        "region (float[?, 48] i0, float[?, 48] i1) => (float[?, 48] v0, float[?, 48] v1)"
        "{ v0 = Abs(i0)  v1 = Mul(i1, i0) }"
    )
    region = replace(
        FIRST,
        nodes=(0, 3),
        inputs=("x", "k"),
        weights=(),
        outputs=("p", "h"),
        model=part,
        blob=stub_blob(part),
        parameters=(),
    )
    model = epcontext_model(main, [region])
    feeds = {"x": X, "yes": np.array(True)}
    for found, expected in zip(reference(model, feeds), reference(main, feeds), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_joined_is_refused() -> None:
    def refused(blob: bytes) -> str:
        with pytest.raises(RefusedError) as caught:
            epcontext_model(MAIN, [replace(FIRST, blob=blob)])
        return str(caught.value)

    assert "is no ONNX model" in refused(b"\xff\xff\xff")
    assert "holds no EPContext node" in refused(PART.SerializeToString())
    assert "lies in another file" in refused(stub_blob(PART, embed_mode=0))
    assert "other inputs or outputs" in refused(stub_blob(inside(PART, {"w1": VALUES["B"]})))
    mixed = onnx.ModelProto.FromString(stub_blob(PART))
    mixed.opset_import[0].version = 20
    epcontext_model(MAIN, [replace(FIRST, blob=mixed.SerializeToString())])  # none of its operators
    mixed.graph.node[0].output[0] = "before"
    mixed.graph.node.append(helper.make_node("Relu", ["before"], ["v3"]))
    assert "needs version 20 of the operators" in refused(mixed.SerializeToString())
    outside = onnx.ModelProto.FromString(stub_blob(PART))
    tensor = TensorProto(name="t", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="elsewhere")
    outside.graph.initializer.append(tensor)
    assert "'t' of a blob lies in another file" in refused(outside.SerializeToString())
    regions = [replace(each, provider=PROVIDER) for each in (FIRST, SECOND)]
    with pytest.raises(RefusedError, match="one compiled region a model"):
        epcontext_model(MAIN, regions)
    elsewhere = onnx.ModelProto.FromString(FIRST.blob)
    elsewhere.metadata_props[0].value = "fits=2"
    with pytest.raises(RefusedError, match="machines of different kinds"):
        epcontext_model(MAIN, [FIRST, replace(SECOND, blob=elsewhere.SerializeToString())])


def test_the_same_bytes_again() -> None:
    first, second = (epcontext_model(MAIN, [FIRST, SECOND]) for _ in range(2))
    assert first.SerializeToString() == second.SerializeToString()


# --- OpenVINO -----------------------------------------------------------------------------------


def test_the_container_of_openvinos_provider() -> None:
    blob = rng.bytes(70_001)
    found = contained("region0", blob)
    magic, version, size, start, length = struct.unpack_from("<8s4Q", found)
    assert (magic, version, size, start) == (b"OVEP_BIN", 1, 40, 40)
    document = found[start : start + length]
    assert struct.unpack_from("<i", document) == (length,)
    at = document.index(b"\x12data_offset\0") + len(b"\x12data_offset\0")
    (offset,) = struct.unpack_from("<q", document, at)
    at = document.index(b"\x12size\0") + len(b"\x12size\0")
    (count,) = struct.unpack_from("<q", document, at)
    assert found[offset : offset + count] == blob
    assert offset % 65536 == len(found) % 65536 == 0


def test_what_a_blob_needs_is_read_from_it() -> None:
    needs = b"meta=1.0;ov=2026.4.1;isa=Intel AVX 10.1"
    blob = b"RR_UPCVO" + struct.pack("<IQ", 1, len(needs)) + needs + b"rest"
    assert json.loads(compatibility(blob))["ov_compat_string"] == needs.decode()
    for damaged in (blob[:30], b"x" + blob, b"", blob[:12] + b"\xff" * 8 + blob[20:]):
        with pytest.raises(RefusedError, match="is damaged"):
            compatibility(damaged)


@pytest.fixture(scope="module")
def device() -> Iterator[Any]:
    """OpenVINO's execution provider for the CPU, where its plugin is installed."""
    plugin = pytest.importorskip("onnxruntime_ep_openvino")
    ort.register_execution_provider_library("onnxgen.epcontext", plugin.get_library_path())
    yield next(each for each in ort.get_ep_devices() if each.ep_name == PROVIDER)
    ort.unregister_execution_provider_library("onnxgen.epcontext")


def options_for(device: Any) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.add_provider_for_devices([device], PROVIDER_OPTIONS)
    return options


def run(model: onnx.ModelProto, device: Any) -> Array:
    session = ort.InferenceSession(model.SerializeToString(), options_for(device))
    assert [each.name for each in session.get_inputs()] == ["x"]
    found: Array = session.run(["y"], {"x": X})[0]
    return found


def expected() -> Array:
    found: Array = ort.InferenceSession(MAIN.SerializeToString()).run(["y"], {"x": X})[0]
    return found


@pytest.mark.parametrize("weights", ["given", "inside", "one of each"])
def test_openvinos_provider_runs_what_the_compile_api_wrote(
    device: Any, tmp_path: Path, weights: str
) -> None:
    values = {"w0": VALUES["W"], "w1": VALUES["B"]}
    kept = {"given": (0, 1), "inside": (), "one of each": (0,)}[weights]
    part = inside(PART, {f"w{i}": values[f"w{i}"] for i in range(2) if i not in kept})
    onnx.save(part, tmp_path / "part.onnx")
    compiler = ort.ModelCompiler(
        options_for(device), str(tmp_path / "part.onnx"), embed_compiled_data_into_model=True
    )
    compiler.compile_to_file(str(tmp_path / "compiled.onnx"))
    blob = (tmp_path / "compiled.onnx").read_bytes()
    region = replace(FIRST, blob=blob, provider=PROVIDER, parameters=kept)
    model = epcontext_model(MAIN, [region])
    np.testing.assert_allclose(run(model, device), expected(), rtol=1e-4, atol=1e-4)
    assert "ov_compat_string" in compatibility_of(model, PROVIDER)


def test_openvinos_provider_is_given_what_is_constant(
    device: Any, exported: CompiledRegion
) -> None:
    """What enters the region follows from no input here; ONNX Runtime would fold it."""
    main = copy(MAIN)
    main.graph.node[0].CopyFrom(helper.make_node("Abs", ["W"], ["a"]))
    main.graph.node[5].CopyFrom(helper.make_node("Add", ["h", "x"], ["c"]))
    main.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 48
    session = ort.InferenceSession(
        epcontext_model(main, [exported]).SerializeToString(), options_for(device)
    )
    feeds = {"x": np.ones((48, 48), np.float32)}
    right = ort.InferenceSession(main.SerializeToString()).run(None, feeds)
    for found, each in zip(session.run(None, feeds), right, strict=True):
        np.testing.assert_allclose(found, each, rtol=1e-4, atol=1e-4)


EXPORT = (
    "import sys, openvino as ov\n"
    "core = ov.Core()\n"
    "compiled = core.compile_model(core.read_model(sys.argv[1]), 'CPU',"
    " {'INFERENCE_PRECISION_HINT': 'f32'})\n"
    "blob = compiled.export_model()\n"
    "open(sys.argv[2], 'wb').write(blob if isinstance(blob, bytes) else blob.getvalue())\n"
)


@pytest.fixture(scope="module")
def exported(device: Any, tmp_path_factory: pytest.TempPathFactory) -> CompiledRegion:
    """What OpenVINO itself exports, in a process of its own: the plugin has another copy of it."""
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("exported")
    onnx.save(PART, folder / "part.onnx")
    arguments = [sys.executable, "-c", EXPORT, "part.onnx", "part.blob"]
    subprocess.run(arguments, cwd=folder, check=True, env=dict(os.environ))
    blob = (folder / "part.blob").read_bytes()
    return replace(FIRST, blob=blob, form="openvino", provider=PROVIDER)


def test_openvinos_provider_runs_what_openvino_exported(
    device: Any, exported: CompiledRegion
) -> None:
    model = epcontext_model(MAIN, [exported])
    np.testing.assert_allclose(run(model, device), expected(), rtol=1e-4, atol=1e-4)


def test_a_damaged_blob_is_an_error(device: Any, exported: CompiledRegion) -> None:
    blob = exported.blob
    model = epcontext_model(MAIN, [replace(exported, blob=blob[:40] + bytes(60) + blob[100:])])
    with pytest.raises(Exception, match="OpenVINO"):
        run(model, device)


def test_a_package_with_it_falls_back(
    device: Any, exported: CompiledRegion, tmp_path: Path
) -> None:
    if not hasattr(ort, "ModelPackage"):
        pytest.skip("ONNX Runtime reads packages from 1.32 on")
    context = epcontext_model(MAIN, [exported])
    fits = compatibility_of(context, PROVIDER)
    weights = {
        name: Weight(TensorProto.FLOAT, value.shape, np.frombuffer(value.tobytes(), np.uint8))
        for name, value in VALUES.items()
    }
    for text, selected in (
        (fits, "openvino-CPU"),
        (fits.replace("ov=2026", "ov=2025"), "original"),
    ):
        package = tmp_path / selected
        variant = Variant("openvino-CPU", context, PROVIDER, text, PROVIDER_OPTIONS)
        write_package(package, "model", [variant, Variant("original", MAIN)], weights)
        found = ort.ModelPackageContext(str(package)).select_component(
            "model", ort.ModelPackageOptions(options_for(device))
        )
        assert found.get_selected_variant_name().startswith(selected)
        session = found.create_session()
        assert session.get_providers()[0] == PROVIDER
        result = session.run(["y"], {"x": X})[0]
        np.testing.assert_allclose(result, expected(), rtol=1e-4, atol=1e-4)
