"""Reading is safe, and writing leaves all or nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxgen import staging
from onnxgen.errors import FileError, OnnxgenError, RefusedError, UsageError
from onnxgen.model_io import data_files, read_model, staged
from onnxgen.runtime import Runtime
from onnxgen.serializer import Serializer

ROWS, COLUMNS = 96, 160  # 61,440 bytes in fp32
WEIGHT = np.arange(ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS) / 1000
FEEDS = {"x": np.linspace(-1, 1, 2 * ROWS, dtype=np.float32).reshape(2, ROWS)}
EXPECTED = FEEDS["x"] @ WEIGHT + 3


def external(
    name: str, dims: list[int], location: str, offset: int | None, length: int | None
) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def model_of(weight: TensorProto, opset: int = 20) -> onnx.ModelProto:
    """y = x @ w + b, with a small embedded bias."""
    bias = numpy_helper.from_array(np.full(COLUMNS, 3, np.float32), "b")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])],
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", ROWS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", COLUMNS])],
        [weight, bias],
    )
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def write_embedded(folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model_of(numpy_helper.from_array(WEIGHT, "w")).SerializeToString())
    return path


def write_external(
    folder: Path,
    location: str = "model.onnx.data",
    offset: int | None = 64,
    length: int | None = WEIGHT.nbytes,
) -> Path:
    (folder / "model.onnx.data").write_bytes(bytes(64) + WEIGHT.tobytes())
    path = folder / "model.onnx"
    weight = external("w", [ROWS, COLUMNS], location, offset, length)
    path.write_bytes(model_of(weight).SerializeToString())
    return path


def write_cache(folder: Path) -> Path:
    """Hugging Face's cache: model and data are links into one folder of blobs."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "4f2a" / "onnx"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    model = write_external(blobs)
    model.rename(blobs / "aaaa")
    (blobs / "model.onnx.data").rename(blobs / "bbbb")
    (snapshot / "model.onnx").symlink_to("../../../blobs/aaaa")
    (snapshot / "model.onnx.data").symlink_to("../../../blobs/bbbb")
    return snapshot / "model.onnx"


def weight_of(model: ir.Model, name: str = "w") -> ir.TensorProtocol:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor


def check_runs(path: Path, expected: np.ndarray = EXPECTED) -> None:
    with Runtime() as runtime:
        outputs = runtime.run(runtime.load(path), FEEDS)
    np.testing.assert_allclose(outputs["y"], expected, rtol=1e-4, atol=1e-4)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- reading ---------------------------------------------------------------------------


def test_embedded_weights_are_views_of_the_file(tmp_path: Path) -> None:
    model = read_model(write_embedded(tmp_path))
    assert not data_files(model)
    array = weight_of(model).numpy()
    assert not array.flags.owndata
    np.testing.assert_array_equal(array, WEIGHT)


def test_external_weights_stay_external(tmp_path: Path) -> None:
    model = read_model(write_external(tmp_path))
    assert data_files(model)
    tensor = weight_of(model)
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.location == "model.onnx.data"
    np.testing.assert_array_equal(tensor.numpy(), WEIGHT)


def test_offset_and_length_may_be_left_out(tmp_path: Path) -> None:
    path = write_external(tmp_path, offset=None, length=None)
    (tmp_path / "model.onnx.data").write_bytes(WEIGHT.tobytes())
    np.testing.assert_array_equal(weight_of(read_model(path)).numpy(), WEIGHT)


@pytest.mark.parametrize("dtype", [d for d in ir.DataType if d.name not in ("UNDEFINED", "STRING")])
def test_every_type_reads_as_the_library_reads_it(tmp_path: Path, dtype: ir.DataType) -> None:
    raw = np.random.default_rng(7).integers(0, 2, 48 * 1024 * dtype.bitwidth // 8, np.uint8)
    tensor = TensorProto(name="w", data_type=int(dtype), dims=[48, 1024], raw_data=raw.tobytes())
    path = tmp_path / "model.onnx"
    path.write_bytes(model_of(tensor).SerializeToString())
    np.testing.assert_array_equal(
        weight_of(read_model(path)).numpy(), ir.from_proto(tensor).numpy()
    )


def test_a_relative_path_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_external(tmp_path)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(weight_of(read_model(Path("model.onnx"))).numpy(), WEIGHT)


def test_a_hugging_face_cache_reads(tmp_path: Path) -> None:
    model = read_model(write_cache(tmp_path))
    np.testing.assert_array_equal(weight_of(model).numpy(), WEIGHT)


def test_a_linked_model_finds_its_data_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    write_external(tmp_path / "real")
    (tmp_path / "link.onnx").symlink_to("real/model.onnx")
    np.testing.assert_array_equal(weight_of(read_model(tmp_path / "link.onnx")).numpy(), WEIGHT)


def refused(path: Path, *words: str, error: type[OnnxgenError] = FileError) -> None:
    with pytest.raises(error) as caught:
        read_model(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_files_that_are_no_models(tmp_path: Path) -> None:
    refused(tmp_path / "gone.onnx", "does not exist")
    refused(tmp_path, "is a folder")
    (tmp_path / "empty.onnx").touch()
    refused(tmp_path / "empty.onnx", "is empty")
    (tmp_path / "dangling.onnx").symlink_to("nowhere.onnx")
    refused(tmp_path / "dangling.onnx", "is a link to nowhere.onnx, which is missing")
    (tmp_path / "circle.onnx").symlink_to("circle.onnx")
    refused(tmp_path / "circle.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")
    refused(tmp_path / "pipe.onnx", "not a regular file")
    (tmp_path / "text.onnx").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(tmp_path / "text.onnx", "damaged")
    (tmp_path / "other.onnx").write_bytes(onnx.ModelProto(ir_version=10).SerializeToString())
    refused(tmp_path / "other.onnx", "no graph")


def test_models_that_compute_nothing(tmp_path: Path) -> None:
    proto = model_of(numpy_helper.from_array(WEIGHT, "w"))
    path = tmp_path / "model.onnx"
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    del bare.opset_import[:]
    path.write_bytes(bare.SerializeToString())
    refused(path, "no opset")
    del proto.graph.output[:]
    path.write_bytes(proto.SerializeToString())
    refused(path, "no outputs")


def test_truncation_anywhere_is_noticed(tmp_path: Path) -> None:
    whole = write_embedded(tmp_path).read_bytes()
    path = tmp_path / "cut.onnx"
    for size in (1, 2, 9, 40, 400, len(whole) // 2, len(whole) - 200, len(whole) - 7):
        path.write_bytes(whole[:size])
        refused(path)
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "is truncated", "bytes are missing")


def test_damage_never_ends_in_a_traceback(tmp_path: Path) -> None:
    whole = write_embedded(tmp_path).read_bytes()
    interesting = [*range(64), *range(len(whole) - 800, len(whole))]
    path = tmp_path / "damaged.onnx"
    for index in interesting:
        damaged = bytearray(whole)
        damaged[index] ^= 0x5A
        path.write_bytes(damaged)
        with contextlib.suppress(OnnxgenError):
            read_model(path)


@pytest.mark.parametrize("opset", [0, 10_000])
def test_an_unknown_opset(tmp_path: Path, opset: int) -> None:
    path = tmp_path / "model.onnx"
    proto = model_of(numpy_helper.from_array(WEIGHT, "w"), opset)
    path.write_bytes(proto.SerializeToString())
    refused(path, f"opset {opset}", onnx.__version__)


def test_names_that_nothing_makes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    proto = model_of(numpy_helper.from_array(WEIGHT, "w"))
    path = tmp_path / "model.onnx"
    proto.graph.node[1].input[0] = "lost"
    path.write_bytes(proto.SerializeToString())
    refused(path, "Add", "'lost'")
    proto.graph.node[1].input[0] = "p"
    proto.graph.output[0].name = "lost"
    path.write_bytes(proto.SerializeToString())
    refused(path, "nothing makes its output 'lost'")
    assert caplog.text == ""


def test_nodes_in_any_order_and_of_outer_graphs(tmp_path: Path) -> None:
    proto = model_of(numpy_helper.from_array(WEIGHT, "w"))
    late = proto.graph.node[0]
    proto.graph.node.append(late)
    del proto.graph.node[0]
    outer = helper.make_node("Identity", ["y"], ["o"])
    branch = helper.make_graph(
        [outer], "branch", [], [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)]
    )
    flag = helper.make_tensor("flag", TensorProto.BOOL, [], [True])
    proto.graph.initializer.append(flag)
    proto.graph.node.append(
        helper.make_node("If", ["flag"], ["i"], then_branch=branch, else_branch=branch)
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    assert [node.op_type for node in read_model(path).graph] == ["MatMul", "Add", "If"]


def test_embedded_data_of_the_wrong_length(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(WEIGHT, "w")
    weight.dims[0] -= 1
    path = tmp_path / "model.onnx"
    path.write_bytes(model_of(weight).SerializeToString())
    refused(path, "'w'", "61440", "60800")


def test_a_tensor_without_its_data(tmp_path: Path) -> None:
    """What `onnx` leaves of a model whose weights were stripped; the input is to blame for it."""
    empty = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[ROWS, COLUMNS])
    path = tmp_path / "model.onnx"
    path.write_bytes(model_of(empty).SerializeToString())
    refused(path, "is damaged", "'w'", "holds 0 values", "15360")
    empty.raw_data = b""
    path.write_bytes(model_of(empty).SerializeToString())
    refused(path, "is damaged", "'w'", "holds 0 bytes", "61440")


def test_sparse_initializers_are_refused(tmp_path: Path) -> None:
    proto = model_of(numpy_helper.from_array(WEIGHT, "w"))
    sparse = proto.graph.sparse_initializer.add()
    sparse.values.CopyFrom(helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0]))
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    refused(path, "sparse", error=RefusedError)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"location": "/etc/passwd"}, ["/etc/passwd", "outside the model's folder"]),
        ({"location": "../secret.data"}, ["../secret.data", "outside the model's folder"]),
        ({"location": "a/../../secret.data"}, ["outside the model's folder"]),
        ({"location": "gone.data"}, ["gone.data is missing"]),
        ({"location": ""}, ["'w'", "where its data is"]),
        ({"location": "."}, ["not a regular file"]),
        ({"offset": 65}, ["model.onnx.data is truncated", "'w'", "61505", "61504"]),
        ({"offset": -4}, ["'w'", "-4"]),
        ({"length": WEIGHT.nbytes - 4}, ["'w'", "61436", "61440"]),
    ],
)
def test_unsafe_or_broken_references(
    tmp_path: Path, change: dict[str, object], words: list[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.data").write_bytes(bytes(100_000))
    refused(write_external(folder, **change), *words)


def test_external_tensors_are_checked_in_subgraphs_and_functions(tmp_path: Path) -> None:
    stolen = external("s", [4], "../secret.data", 0, 16)
    constant = helper.make_node("Constant", [], ["c"], value=stolen)
    branch = helper.make_graph(
        [constant], "branch", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [4])]
    )
    holders = {
        "subgraph": helper.make_node("If", ["x"], ["i"], then_branch=branch, else_branch=branch),
        "node": constant,
    }
    path = tmp_path / "model.onnx"
    for node in holders.values():
        proto = model_of(numpy_helper.from_array(WEIGHT, "w"))
        proto.graph.node.append(node)
        path.write_bytes(proto.SerializeToString())
        refused(path, "../secret.data")
    proto = model_of(numpy_helper.from_array(WEIGHT, "w"))
    function = helper.make_function("local", "f", [], ["c"], [constant], proto.opset_import)
    proto.functions.append(function)
    path.write_bytes(proto.SerializeToString())
    refused(path, "../secret.data")


def test_links_that_lead_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = write_external(folder)
    data = folder / "model.onnx.data"
    data.rename(tmp_path / "elsewhere.data")
    data.symlink_to(tmp_path / "elsewhere.data")
    refused(path, "model.onnx.data links to", "elsewhere.data")
    data.unlink()
    data.symlink_to("/etc/passwd")
    refused(path, "/etc/passwd")


def test_a_hard_linked_data_file(tmp_path: Path) -> None:
    path = write_external(tmp_path)
    (tmp_path / "second").hardlink_to(tmp_path / "model.onnx.data")
    refused(path, "hard-linked from 2 places", "copy")


# --- writing ---------------------------------------------------------------------------


def commit(model: ir.Model, output: Path, source: Path, force: bool = False) -> None:
    with staged(model, output, source=source, force=force) as stage:
        assert not output.exists() or output.samefile(source) or stage.path != output
        check_runs(stage.path)
        stage.commit()


def test_embedded_stays_embedded(tmp_path: Path) -> None:
    source = write_embedded(tmp_path)
    output = tmp_path / "model.fused.onnx"
    commit(read_model(source), output, source)
    assert sorted(contents(tmp_path)) == ["model.fused.onnx", "model.onnx"]
    written, original = onnx.load(output), onnx.load(source)
    assert [t.name for t in written.graph.initializer] == ["w", "b"]
    assert written.graph.initializer == original.graph.initializer
    assert written.graph.node == original.graph.node


def test_leaving_without_commit_removes_everything(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    source = write_external(tmp_path)
    model = read_model(source)
    with staged(model, folder / "out.onnx", source=source, force=False) as stage:
        check_runs(stage.path)
        assert len(contents(folder)) == 2
    assert contents(folder) == {}
    with (
        pytest.raises(KeyError),
        staged(model, folder / "out.onnx", source=source, force=False),
    ):
        raise KeyError
    assert contents(folder) == {}


def test_unchanged_data_is_referenced_in_the_same_folder(tmp_path: Path) -> None:
    source = write_external(tmp_path)
    output = tmp_path / "model.fused.onnx"
    commit(read_model(source), output, source)
    assert sorted(contents(tmp_path)) == ["model.fused.onnx", "model.onnx", "model.onnx.data"]
    assert data_files(read_model(output))
    check_runs(output)


def test_data_is_copied_to_another_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    source = write_external(tmp_path)
    model = read_model(source)
    commit(model, folder / "model.fused.onnx", source)
    (data,) = folder.glob("*.data")
    assert re.fullmatch(r"model\.fused\.[0-9a-f]{12}\.data", data.name)
    assert hashlib.sha256(data.read_bytes()).hexdigest().startswith(data.name.split(".")[2])
    assert weight_of(model).base_dir == str(tmp_path)
    (tmp_path / "model.onnx.data").unlink()
    check_runs(folder / "model.fused.onnx")


def test_a_cached_model_is_copied_and_the_cache_left_alone(tmp_path: Path) -> None:
    source = write_cache(tmp_path)
    before = contents(tmp_path / "blobs")
    output = source.with_suffix(".fused.onnx")
    commit(read_model(source), output, source)
    check_runs(output)
    commit(read_model(source), source, source, force=True)
    assert not source.is_symlink()
    check_runs(source)
    assert contents(tmp_path / "blobs") == before


def test_new_tensors_join_external_data(tmp_path: Path) -> None:
    source = write_external(tmp_path)
    model = read_model(source)
    table = np.full((64, 512), 2, np.float32)
    model.graph.initializers["b"].const_value = ir.Tensor(table[0, :COLUMNS], name="b")
    for name, array in (("table", table), ("small", table[0])):
        value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
        model.graph.register_initializer(value)
    output = tmp_path / "model.fused.onnx"
    with staged(model, output, source=source, force=False) as stage:
        check_runs(stage.path, EXPECTED - 1)
        stage.commit()
    written = read_model(output)
    places = {
        name: getattr(value.const_value, "location", "embedded")
        for name, value in written.graph.initializers.items()
    }
    (data,) = tmp_path.glob("model.fused.*.data")
    assert places == {
        "w": "model.onnx.data",
        "b": "embedded",
        "table": data.name,
        "small": "embedded",
    }
    np.testing.assert_array_equal(weight_of(written, "table").numpy(), table)
    assert data.stat().st_size == table.nbytes


def test_embedded_weights_move_out_above_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_embedded(tmp_path)
    monkeypatch.setattr(staging, "MAX_FILE", 20_000)
    output = tmp_path / "model.fused.onnx"
    commit(read_model(source), output, source)
    written = read_model(output)
    assert isinstance(weight_of(written), ir.ExternalTensor)
    assert not isinstance(weight_of(written, "b"), ir.ExternalTensor)
    check_runs(output)
    monkeypatch.setattr(staging, "MAX_FILE", 100)
    with pytest.raises(FileError, match="2 GB"):
        commit(read_model(source), tmp_path / "more.onnx", source)
    assert not list(tmp_path.glob("*more*"))


def test_equal_tensors_are_written_once(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    source = write_external(tmp_path)
    model = read_model(source)
    model.graph.register_initializer(ir.Value(name="tied", const_value=weight_of(model)))
    weight_of(model).name = "w"
    with staged(model, folder / "out.onnx", source=source, force=False) as stage:
        assert stage.data is not None
        assert stage.data.stat().st_size == WEIGHT.nbytes


def test_external_constants_are_relocated(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    source = write_external(tmp_path)
    proto = onnx.load(source, load_external_data=False)
    proto.graph.node[0].input[1] = "c"
    weight = proto.graph.initializer[0]
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=weight))
    del proto.graph.initializer[0]
    source.write_bytes(proto.SerializeToString())
    model = read_model(source)
    commit(model, folder / "out.onnx", source)
    assert len(list(folder.glob("*.data"))) == 1
    (constant,) = (node for node in model.graph if node.op_type == "Constant")
    assert constant.attributes["value"].value.base_dir == str(tmp_path)


def test_the_bytes_do_not_depend_on_the_run(tmp_path: Path) -> None:
    source = write_external(tmp_path)
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        commit(read_model(source), tmp_path / name / "model.fused.onnx", source)
        written.append(contents(tmp_path / name))
    assert written[0] == written[1]


def test_writing_again_reuses_the_data(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    source = write_external(tmp_path)
    output = folder / "out.onnx"
    commit(read_model(source), output, source)
    first = contents(folder)
    with staged(read_model(source), output, source=source, force=False):
        pass  # not committed: what was there stays
    assert contents(folder) == first
    commit(read_model(source), output, source)
    assert contents(folder) == first
    (data,) = folder.glob("*.data")
    data.write_bytes(b"broken")
    commit(read_model(source), output, source)
    check_runs(output)
    assert data.read_bytes() == b"broken"


def test_the_input_is_replaced_only_by_force(tmp_path: Path) -> None:
    source = write_external(tmp_path)
    link = tmp_path / "link.onnx"
    link.symlink_to(source)
    model = read_model(source)
    before = contents(tmp_path)
    for output in (source, link):
        with (
            pytest.raises(UsageError, match="needs --force"),
            staged(model, output, source=source, force=False),
        ):
            pass
    data = tmp_path / "model.onnx.data"
    with (
        pytest.raises(UsageError, match="holds the input's weights"),
        staged(model, data, source=source, force=True),
    ):
        pass
    assert contents(tmp_path) == before
    commit(model, source, source, force=True)
    check_runs(source)


def test_files_that_were_read_are_kept(tmp_path: Path) -> None:
    """Data that the model no longer refers to as well, and what lies beside it."""
    source = write_external(tmp_path)
    model = read_model(source)
    read = tmp_path / "model.onnx.data"
    model.graph.initializers["w"].const_value = ir.tensor(WEIGHT, name="w")
    for output, beside in ((read, {}), (tmp_path / "out.onnx", {read.name: b"{}"})):
        with (
            pytest.raises(UsageError, match=read.name),
            staged(
                model,
                output,
                source=source,
                force=True,
                beside=beside,
                reads=data_files(read_model(source)),
            ),
        ):
            pass
    with (
        pytest.raises(UsageError, match=r"out\.json"),
        staged(model, tmp_path / "out.json", source=source, force=True, beside={"out.json": b""}),
    ):
        pass


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    source = write_embedded(tmp_path)
    fifo, link = tmp_path / "fifo.onnx", tmp_path / "link.onnx"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    for output in (fifo, link):
        with (
            pytest.raises(FileError, match="not a regular file"),
            staged(read_model(source), output, source=source, force=True),
        ):
            pass
    with (
        pytest.raises(FileError, match="not a regular file"),
        staged(
            read_model(source),
            tmp_path / "o.onnx",
            source=source,
            force=True,
            beside={"fifo.onnx": b""},
        ),
    ):
        pass
    assert fifo.is_fifo()
    assert link.is_symlink()


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    source = write_embedded(tmp_path)
    model = read_model(source)
    for output, words in (
        (tmp_path / "gone" / "out.onnx", "no folder"),
        (source / "out.onnx", "no folder"),
        (tmp_path, "it is a folder"),
        (Path("/proc/out.onnx"), "cannot be written"),
    ):
        with (
            pytest.raises(FileError, match=words),
            staged(model, output, source=source, force=False),
        ):
            pass


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for write in (write_embedded, write_external):
        source = write(tmp_path)
        before = contents(tmp_path)
        result = run_python(
            """
            import resource, sys
            from pathlib import Path
            from onnxgen.model_io import read_model, staged
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            source, output = Path(sys.argv[1]), Path(sys.argv[2])
            with staged(read_model(source), output, source=source, force=False) as stage:
                stage.commit()
            """,
            source,
            folder / "out.onnx",
        )
        assert "onnxgen.errors.FileError" in result.stderr
        assert "cannot be written: File too large" in result.stderr
        assert contents(tmp_path) == before


KILLED = """
    import signal, sys, time
    from pathlib import Path
    from onnxgen import data_file, staging
    from onnxgen.model_io import read_model, staged
    # As in a shell's foreground, however the tests were started.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    def halt(*_):
        print("now", flush=True)
        time.sleep(60)
    if sys.argv[3] == "mid-write":
        staging.sync = data_file.sync = halt
    source, output = Path(sys.argv[1]), Path(sys.argv[2])
    with staged(read_model(source), output, source=source, force=False) as stage:
        halt()
        stage.commit()
"""


@pytest.mark.parametrize("moment", ["mid-write", "staged"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_half_model(
    tmp_path: Path, moment: str, number: signal.Signals
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    source = write_external(tmp_path)
    output = folder / "out.onnx"
    output.write_text("what was there")
    before = contents(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(source), str(output), moment],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.send_signal(number)
    assert process.wait(30) != 0
    process.stdout.close()
    after = contents(tmp_path)
    if number == signal.SIGKILL:  # nobody can clean up then; the names say what the rest is
        after = {name: digest for name, digest in after.items() if name in before}
    assert after == before


def test_staging_works_outside_the_main_thread(tmp_path: Path) -> None:
    source = write_embedded(tmp_path)
    model = read_model(source)
    thread = threading.Thread(target=commit, args=(model, tmp_path / "out.onnx", source))
    thread.start()
    thread.join()
    check_runs(tmp_path / "out.onnx")


MEASURED = """
    import resource, sys, time
    from pathlib import Path
    from onnxgen.model_io import read_model, staged
    source, output = Path(sys.argv[1]), Path(sys.argv[2])
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with staged(read_model(source), output, source=source, force=False) as stage:
        stage.commit()
    unit = 1 if sys.platform == "darwin" else 1024
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)
"""


def measured(source: Path, output: Path) -> int:
    """Bytes of memory that reading and writing the model took."""
    result = run_python(MEASURED, source, output)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def test_more_than_two_gigabytes_are_neither_copied_nor_read(tmp_path: Path) -> None:
    dims = [1 << 15, 25_000]
    size = 4 * dims[0] * dims[1]
    with (tmp_path / "big.data").open("wb") as file:
        file.truncate(size)  # sparse: 3.3 GB that take no disk
    source = tmp_path / "model.onnx"
    source.write_bytes(model_of(external("w", dims, "big.data", 0, size)).SerializeToString())
    output = tmp_path / "model.fused.onnx"
    start = time.perf_counter()
    assert measured(source, output) < 50e6
    assert time.perf_counter() - start < 60
    assert sorted(contents_names(tmp_path)) == ["big.data", "model.fused.onnx", "model.onnx"]
    assert output.stat().st_size < 10_000


def contents_names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_embedded_weights_take_no_memory(tmp_path: Path) -> None:
    part = numpy_helper.from_array(np.ones((1024, 4096), np.float32), "w")  # 17 MB
    proto = model_of(part)
    for index in range(15):
        part.name = f"w{index}"
        proto.graph.initializer.append(part)
    source = tmp_path / "model.onnx"
    source.write_bytes(proto.SerializeToString())
    assert source.stat().st_size > 250e6
    # One tensor at a time; mapped pages of the file itself may count as well.
    assert measured(source, tmp_path / "out.onnx") < 330e6
    check = read_model(tmp_path / "out.onnx")
    assert float(weight_of(check, "w14").numpy().sum()) == 1024 * 4096


def test_the_wire_format_round_trips(tmp_path: Path) -> None:
    proto = model_of(numpy_helper.from_array(WEIGHT, "w"))
    proto.graph.initializer.append(helper.make_tensor("s", TensorProto.STRING, [1], [b"text"]))
    proto.metadata_props.add(key="k", value="v")
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.initializer[0].ClearField("raw_data")
    serializer = Serializer(copy, {0: ir.Tensor(WEIGHT, name="w")})
    path = tmp_path / "m.onnx"
    with path.open("wb") as file:
        serializer.write(file)
    assert path.stat().st_size == serializer.size
    assert onnx.load(path) == proto
