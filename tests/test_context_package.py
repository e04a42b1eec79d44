"""Model packages: what is written, and what ONNX Runtime's own reader makes of it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from onnxgen.backends.interface import Identity, Weight
from onnxgen.contexts.package import CPU, Variant, safe_name, write_package
from onnxgen.errors import FileError, RefusedError, UsageError

OTHER = "OtherExecutionProvider"
Array = np.ndarray[Any, Any]

needs_reader = pytest.mark.skipif(
    not hasattr(ort, "ModelPackage"), reason="ONNX Runtime reads packages from 1.32 on"
)


def weight_of(array: Array) -> Weight:
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return Weight(kind, array.shape, np.frombuffer(array.tobytes(), np.uint8))


def model_of(scale: float = 1.0, blob: bytes = b"") -> onnx.ModelProto:
    """x [n, 40] @ w [40, 56] * s; the weights are without content, as a reader leaves them."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["y"]),
            helper.make_node("Mul", ["y", "s"], ["z"]),
            helper.make_node("Mul", ["z", "own"], ["out"], doc_string=blob.hex()),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 40])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 56])],
        [
            TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[40, 56]),
            TensorProto(name="s", data_type=TensorProto.FLOAT, dims=[]),
            onnx.numpy_helper.from_array(np.array(scale, np.float32), "own"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


rng = np.random.default_rng(8)
VALUES = {
    "w": rng.standard_normal((40, 56), np.float32),
    "s": np.array(3, np.float32),
}
WEIGHTS = {name: weight_of(array) for name, array in VALUES.items()}
X = rng.standard_normal((5, 40), np.float32)
EXPECTED = X @ VALUES["w"] * 3
ORIGINAL = Variant("original", model_of())
MADE = Identity("Other", "7.1", "a device", "driver 3", "fits=1")
COMPILED = Variant("other", model_of(2), OTHER, "fits=1", {"mode": "exact"}, {}, MADE)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    write_package(tmp_path / "p", "model", [COMPILED, ORIGINAL], WEIGHTS)
    return tmp_path / "p"


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def component_of(package: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((package / "model/component.json").read_text())
    return found


def run(package: Path) -> tuple[str, Array]:
    """The variant that ONNX Runtime selects for the CPU, and what it computes."""
    context = ort.ModelPackageContext(str(package))
    options = ort.ModelPackageOptions(ort.SessionOptions())
    selected = context.select_component("model", options)
    session = selected.create_session()
    return selected.get_selected_variant_name(), session.run(None, {"x": X})[0]


def test_the_layout(package: Path) -> None:
    files = files_of(package)
    data = hashlib.sha256(VALUES["w"].tobytes()).hexdigest()
    asset = hashlib.sha256(f"{data}  weights.data\n".encode()).hexdigest()
    assert list(files) == [
        "manifest.json",
        "model/component.json",
        "model/original/model.onnx",
        "model/other/model.onnx",
        f"shared_assets/sha256-{asset}/weights.data",
    ]
    manifest = json.loads(files["manifest.json"])
    assert manifest["components"] == {"model": "model"}
    session_options = {"session.model_external_initializers_file_folder_path": f"sha256:{asset}"}
    variants = component_of(package)["variants"]
    assert variants["other"] == {
        "variant_directory": "other",
        "ep": OTHER,
        "compatibility_string": "fits=1",
        "executor_info": {
            "ort": {
                "model_file": "model.onnx",
                "session_options": session_options,
                "provider_options": {"mode": "exact"},
            }
        },
        "additional_metadata": {
            "source": "Other",
            "version": "7.1",
            "device": "a device",
            "driver": "driver 3",
        },
    }


def test_the_original_is_there_for_every_provider_after_what_was_compiled(package: Path) -> None:
    variants = component_of(package)["variants"]
    assert list(variants) == ["other", f"original-{OTHER}", "original"]
    for name, provider in ((f"original-{OTHER}", OTHER), ("original", CPU)):
        assert variants[name]["ep"] == provider
        assert variants[name]["variant_directory"] == "original"
        assert "compatibility_string" not in variants[name]
        given = variants[name]["executor_info"]["ort"].get("provider_options")
        assert given == ({"mode": "exact"} if provider == OTHER else None)


def test_weights_are_there_once(tmp_path: Path) -> None:
    big = {"w": weight_of(rng.standard_normal((40, 5600), np.float32)), "s": WEIGHTS["s"]}
    blob = rng.bytes(4000)

    def wide(scale: float = 1, blob: bytes = b"") -> onnx.ModelProto:
        model = model_of(scale, blob)
        model.graph.initializer[0].dims[1] = 5600
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5600
        return model

    variants = [Variant(f"v{n}", wide(n, blob), OTHER) for n in range(3)]
    write_package(tmp_path / "p", "model", [*variants, Variant("original", wide())], big)
    size = sum(map(len, files_of(tmp_path / "p").values()))
    original = wide().ByteSize() + big["w"].data.nbytes + 4
    blobs = 3 * 2 * len(blob)  # in hexadecimal here
    assert size <= (original + blobs) * 1.01


def test_one_place_in_memory_is_one_in_the_file(tmp_path: Path) -> None:
    model = model_of()
    model.graph.initializer.append(
        TensorProto(name="tied", data_type=TensorProto.FLOAT, dims=[40, 56])
    )
    weights = WEIGHTS | {"tied": WEIGHTS["w"]}
    write_package(tmp_path / "p", "model", [Variant("original", model)], weights)
    (data,) = (tmp_path / "p").rglob("weights.data")
    assert data.stat().st_size == VALUES["w"].nbytes


def test_the_same_bytes_again(tmp_path: Path, package: Path) -> None:
    write_package(tmp_path / "again", "model", [COMPILED, ORIGINAL], WEIGHTS)
    assert files_of(tmp_path / "again") == files_of(package)


def test_a_folder_that_holds_something_is_refused(tmp_path: Path, package: Path) -> None:
    before = files_of(package)
    with pytest.raises(FileError, match="the folder is not empty"):
        write_package(package, "model", [ORIGINAL], WEIGHTS)
    assert files_of(package) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="it is not a folder"):
        write_package(tmp_path / "file", "model", [ORIGINAL], WEIGHTS)
    with pytest.raises(FileError, match="there is no folder"):
        write_package(tmp_path / "none" / "p", "model", [ORIGINAL], WEIGHTS)


def test_an_empty_folder_is_taken(tmp_path: Path, package: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_package(tmp_path / "empty", "model", [COMPILED, ORIGINAL], WEIGHTS)
    assert files_of(tmp_path / "empty") == files_of(package)


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    broken = model_of()
    tensor = broken.graph.initializer[2]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="elsewhere")
    with pytest.raises(RefusedError, match="'own' lies in another file"):
        write_package(tmp_path / "p", "model", [ORIGINAL, Variant("b", broken, OTHER)], WEIGHTS)
    assert not list(tmp_path.iterdir())


def test_a_tensor_in_another_file_is_seen_within_nested_graphs(tmp_path: Path) -> None:
    model = model_of()
    inner = onnx.numpy_helper.from_array(np.zeros(3, np.float32), "w")  # named as a weight is
    inner.ClearField("raw_data")
    inner.data_location = TensorProto.EXTERNAL
    inner.external_data.add(key="location", value="weights.data")
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=inner))
    with pytest.raises(RefusedError, match="'w' lies in another file"):
        write_package(tmp_path / "p", "model", [Variant("original", model)], WEIGHTS)


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from onnxgen.contexts.new_folder import new_folder\n"
        f"with new_folder(Path({str(tmp_path / 'p')!r})) as folder:\n"
        "    (folder / 'file').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".p.")
    an_hour_ago = time.time() - 3600
    os.utime(left, (an_hour_ago, an_hour_ago))
    write_package(tmp_path / "p", "model", [ORIGINAL], WEIGHTS)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_names_that_are_no_folders_are_refused(tmp_path: Path) -> None:
    for name in ("../up", "", ".", "a/b", "shared_assets"):
        with pytest.raises(UsageError, match="cannot be the name of a folder"):
            write_package(tmp_path / "p", name, [ORIGINAL], WEIGHTS)
    with pytest.raises(UsageError, match="would be called 'original'"):
        write_package(tmp_path / "p", "model", [ORIGINAL, ORIGINAL], WEIGHTS)
    assert safe_name("openvino:CPU") == "openvino-CPU"
    assert safe_name("../..") == "model"


def test_a_variant_for_one_kind_of_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="CPU provider takes a variant on any"):
        write_package(tmp_path / "p", "model", [Variant("a", model_of(), CPU, "x")], WEIGHTS)


@needs_reader
def test_onnx_runtime_reads_selects_and_runs(package: Path) -> None:
    opened = ort.ModelPackage.open(str(package), strict_unknown_fields=True)
    opened.close()
    name, found = run(package)
    assert name == "original"
    np.testing.assert_allclose(found, EXPECTED, rtol=1e-5, atol=1e-5)
    context = ort.ModelPackageContext(str(package))
    assert context.get_variant_names("model") == ["other", f"original-{OTHER}", "original"]
    (asset,) = (package / "shared_assets").iterdir()
    uri = ort.ModelPackage.compute_directory_hash(str(asset))
    assert uri == asset.name.replace("-", ":")


@needs_reader
def test_of_two_for_a_provider_the_first_is_taken(tmp_path: Path) -> None:
    twice = Variant("twice", model_of(2), CPU)
    write_package(tmp_path / "p", "model", [ORIGINAL, twice], WEIGHTS)
    name, found = run(tmp_path / "p")
    assert name == "twice"
    np.testing.assert_allclose(found, 2 * EXPECTED, rtol=1e-5, atol=1e-5)


@needs_reader
def test_a_damaged_package_is_not_the_same(package: Path) -> None:
    (data,) = package.rglob("weights.data")
    content = bytearray(data.read_bytes())
    content[3] ^= 0x40
    data.write_bytes(content)
    uri = ort.ModelPackage.compute_directory_hash(str(data.parent))
    assert uri != data.parent.name.replace("-", ":")  # ONNX Runtime itself does not look
    assert not np.allclose(run(package)[1], EXPECTED)
    data.unlink()
    with pytest.raises(Exception, match=r"weights\.data"):
        run(package)


@pytest.fixture(scope="module")
def openvino() -> Iterator[Any]:
    """OpenVINO's execution provider for the CPU, where its plugin is installed."""
    plugin = pytest.importorskip("onnxruntime_ep_openvino")
    if not hasattr(ort, "ModelPackage"):
        pytest.skip("ONNX Runtime reads packages from 1.32 on")
    ort.register_execution_provider_library("onnxgen.test", plugin.get_library_path())
    name = "OpenVINOExecutionProvider"
    yield next(each for each in ort.get_ep_devices() if each.ep_name == name)
    ort.unregister_execution_provider_library("onnxgen.test")


def compatibility_of(device: Any, folder: Path) -> str:
    """What the provider writes into a model that it compiles."""
    options = ort.SessionOptions()
    options.add_provider_for_devices([device], {})
    model = model_of()
    for tensor in model.graph.initializer[:2]:
        tensor.raw_data = VALUES[tensor.name].tobytes()
    onnx.save(model, folder / "model.onnx")
    compiler = ort.ModelCompiler(
        options, str(folder / "model.onnx"), embed_compiled_data_into_model=True
    )
    compiler.compile_to_file(str(folder / "compiled.onnx"))
    props = onnx.load(folder / "compiled.onnx").metadata_props
    (found,) = (each.value for each in props if each.key.startswith("ep_compatibility_info."))
    return str(found)


def test_a_provider_takes_what_fits_and_else_the_original(tmp_path: Path, openvino: Any) -> None:
    fits = compatibility_of(openvino, tmp_path)
    for compatibility, expected in ((fits, "mine"), (fits.replace("20", "19"), "original-")):
        package = tmp_path / expected
        mine = Variant("mine", model_of(2), openvino.ep_name, compatibility)
        write_package(package, "model", [mine, ORIGINAL], WEIGHTS)
        options = ort.SessionOptions()
        options.add_provider_for_devices([openvino], {})
        context = ort.ModelPackageContext(str(package))
        selected = context.select_component("model", ort.ModelPackageOptions(options))
        assert selected.get_selected_variant_name().startswith(expected)
        found = selected.create_session().run(None, {"x": X})[0]
        scale = 2 if expected == "mine" else 1
        assert np.abs(found - scale * EXPECTED).max() < 0.05 * np.abs(scale * EXPECTED).max()
        assert run(package)[0] == "original"
