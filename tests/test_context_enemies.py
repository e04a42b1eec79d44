"""Files, feeds and folders that mean no good, or that nobody thought of: never a wrong answer, never a crash."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import onnxgen
from onnxgen.cli import main
from onnxgen.contexts import weights as contexts_weights
from onnxgen.contexts.forms import KEY, decode
from onnxgen.contexts.places import cache_folder, config_folder
from onnxgen.contexts.records import FormatError
from onnxgen.contexts.trust import trust, trusted
from onnxgen.errors import FileError
from tests.fake_backend import Fake, answers, assert_equal, use_fakes, with_regions
from tests.test_session import X, saved
from tests.test_session_fallbacks import reasons

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
RELU = HEAD + "g (float[n,6] x) => (float[n,6] y) { y = Relu(x) }"
MATMUL = HEAD + "g (float[n,6] x) => (float[n,300] y) { y = MatMul(x, w) }"
rng = np.random.default_rng(11)
W = rng.standard_normal((6, 300)).astype(np.float32)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    return use_fakes(monkeypatch)


def run(*words: Any) -> Any:
    """`onnxgen context`, with what it says."""
    result = CliRunner().invoke(main, ["context", *map(str, words)])
    assert "this is a bug" not in result.stderr, result.stderr
    return result


# --- weights ------------------------------------------------------------------------------------


def test_a_weight_of_nothing_in_an_empty_file(tmp_path: Path, fakes: dict[str, Fake]) -> None:
    text = HEAD + "g (float[n,6] x) => (float[m,6] y) { y = Concat<axis = 0>(x, w) }"
    path = saved(text, tmp_path, w=np.zeros((0, 6), np.float32))
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, size_threshold=0, location="m.data")
    assert (tmp_path / "m.data").stat().st_size == 0
    session = onnxgen.load(with_regions(path, {"all": [0]}, ["fake:CPU"]))
    assert_equal(session.run(None, {"x": X}), [X])
    assert session.picked == {"all": "fake:CPU"}


@pytest.mark.parametrize(
    ("kind", "weight"),
    [
        ("string", onnx.helper.make_tensor("s", onnx.TensorProto.STRING, [2], ["abcdefgh", "ü"])),
        ("bfloat16", onnx.numpy_helper.from_array(np.ones(2, ml_dtypes.bfloat16), "s")),
        ("int4", onnx.helper.make_tensor("s", onnx.TensorProto.INT4, [2], [1, -2])),
        ("bool", onnx.numpy_helper.from_array(np.array([True, False]), "s")),
    ],
)
def test_defaults_of_every_type(
    kind: str, weight: onnx.TensorProto, tmp_path: Path, fakes: dict[str, Fake]
) -> None:
    text = (
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[n,6] x, {kind}[2] s) '
        f"=> (float[n,6] y, int64[1] t) {{ y = Relu(x)  t = Shape(s) }}"
    )
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(weight)
    onnx.save(model, tmp_path / "m.onnx")
    session = onnxgen.load(with_regions(tmp_path / "m.onnx", {"r": [0]}, ["fake:CPU"]))
    assert_equal(session.run(None, {"x": X}), answers(tmp_path / "m.onnx", {"x": X}))


@pytest.mark.parametrize("content", ["5", "[1]", "null", '{"digests": 3}', "{}", "{", "\0"])
def test_a_cache_that_holds_nonsense(
    content: str, tmp_path: Path, fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts_weights, "_SETTLED", -1.0)
    monkeypatch.setattr(contexts_weights, "_SMALL", 0)
    path = with_regions(saved(MATMUL, tmp_path, w=W), {"all": [0]}, ["fake:CPU"])
    assert onnxgen.load(path).picked == {"all": "fake:CPU"}
    found = next(
        each for each in (cache_folder() / "weights").iterdir() if str(path) in each.read_text()
    )
    kept = json.loads(found.read_text())
    if "digests" in content:
        content = json.dumps(kept | json.loads(content))
    elif content == "{}":
        content = json.dumps({"file": kept["file"]})
    found.write_text(content)
    assert onnxgen.load(path).picked == {"all": "fake:CPU"}


def test_a_weight_that_is_changed_through_a_mapping(
    tmp_path: Path, fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system notices the first write to a page, and the next when the page was on the disk."""
    monkeypatch.setattr(contexts_weights, "_SETTLED", -1.0)
    monkeypatch.setattr(contexts_weights, "_SMALL", 0)
    path = with_regions(saved(MATMUL, tmp_path, w=W), {"all": [0]}, ["fake:CPU"])
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.data")
    mapped = np.memmap(tmp_path / "m.data", np.float32, "r+")
    mapped[0] = mapped[0]
    mapped.flush()
    before = (tmp_path / "m.data").stat().st_mtime_ns
    time.sleep(0.02)  # a tick of the file system's clock
    mapped[0] = mapped[0]
    if (tmp_path / "m.data").stat().st_mtime_ns == before:
        pytest.skip("this file system never notices")
    assert onnxgen.load(path).picked == {"all": "fake:CPU"}
    time.sleep(0.02)
    mapped[0] += 1
    session = onnxgen.load(path)
    assert "its weights have changed" in reasons(session)["all"][0]
    assert_equal(session.run(None, {"x": X}), answers(path, {"x": X}))


def test_two_weights_of_one_size_in_one_file(
    tmp_path: Path, fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts_weights, "_SETTLED", -1.0)
    monkeypatch.setattr(contexts_weights, "_SMALL", 0)
    text = HEAD + "g (float[n,6] x) => (float[n,6] y) { h = MatMul(x, w)  y = MatMul(h, v) }"
    w, v = (rng.standard_normal((6, 6)).astype(np.float32) for _ in range(2))
    path = with_regions(saved(text, tmp_path, w=w, v=v), {"all": [0, 1]}, ["fake:CPU"])
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, size_threshold=0, location="m.data")
    for _ in range(2):
        assert onnxgen.load(path).picked == {"all": "fake:CPU"}
    one, other = onnx.load(path, load_external_data=False).graph.initializer
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[1].value = other.external_data[1].value
    model.graph.initializer[1].external_data[1].value = one.external_data[1].value
    onnx.save(model, path)
    session = onnxgen.load(path)
    assert "its weights have changed" in reasons(session)["all"][0]
    assert_equal(session.run(None, {"x": X}), answers(path, {"x": X}))


def test_a_file_whose_time_was_put_back(
    tmp_path: Path, fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts_weights, "_SETTLED", -1.0)
    monkeypatch.setattr(contexts_weights, "_SMALL", 0)
    path = with_regions(saved(MATMUL, tmp_path, w=W), {"all": [0]}, ["fake:CPU"])
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.data")
    data = tmp_path / "m.data"
    status = data.stat()
    assert onnxgen.load(path).picked == {"all": "fake:CPU"}
    time.sleep(0.02)  # a tick of the file system's clock
    with data.open("r+b") as file:
        file.write(b"\0\0\0\0")
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert data.stat().st_mtime_ns == status.st_mtime_ns
    session = onnxgen.load(path)
    assert "its weights have changed" in reasons(session)["all"][0]
    assert_equal(session.run(None, {"x": X}), answers(path, {"x": X}))


def test_a_default_of_a_function_that_was_changed(tmp_path: Path, fakes: dict[str, Fake]) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20, "d" : 1]>
        g (float[n,6] x) => (float[n,6] y) { y = d.leaky(x) }
        <domain: "d", opset_import: ["" : 20]>
        leaky <alpha: float = 0.5> (a) => (b) { b = LeakyRelu<alpha: float = @alpha>(a) }"""
    path = with_regions(saved(text, tmp_path), {"all": [0]}, ["fake:CPU"])
    assert onnxgen.load(path).picked == {"all": "fake:CPU"}
    model = onnx.load(path)
    function = next(each for each in model.functions if each.domain == "d")
    function.attribute_proto[0].f = 0.25
    onnx.save(model, path)
    session = onnxgen.load(path)
    assert "its nodes have changed" in reasons(session)["all"][0]
    assert_equal(session.run(None, {"x": X}), [np.where(X < 0, X * 0.25, X).astype(np.float32)])


# --- who runs it --------------------------------------------------------------------------------


def test_the_nodes_answer_wherever_the_process_works(
    tmp_path: Path, fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = with_regions(saved(MATMUL, tmp_path, w=W), {"all": [0]}, ["fake:CPU"])
    monkeypatch.chdir(tmp_path)
    session = onnxgen.load(path.name)
    monkeypatch.chdir("/")
    fakes["fake"].fails = "run 1"
    assert_equal(session.run(None, {"x": X}), answers(path, {"x": X}))


@pytest.mark.parametrize("regions", [{"r": [0]}, {"r": [0], "s": [1]}])
@pytest.mark.parametrize("how", ["model", "data", "gone"])
def test_another_model_under_its_name_never_answers(
    how: str, regions: dict[str, list[int]], tmp_path: Path, fakes: dict[str, Fake]
) -> None:
    text = HEAD + "g (float[n,6] x) => (float[n,300] y) { h = MatMul(x, w)  y = Relu(h) }"

    backends = {"r": ["fake:CPU"], "s": ["other:CPU"]}
    path = with_regions(saved(text, tmp_path, w=W), regions, backends)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.data")
    session = onnxgen.load(path)
    first = session.run(None, {"x": X})
    if how == "data":
        (tmp_path / "new").write_bytes((2 * W).tobytes())
        os.replace(tmp_path / "new", tmp_path / "m.data")
    elif how == "model":
        (tmp_path / "new").write_bytes(path.read_bytes())
        os.replace(tmp_path / "new", path)
    else:
        path.unlink()
    assert_equal(session.run(None, {"x": X}), first)
    fakes["fake"].fails = f"run {fakes['fake'].runs + 1}"
    with pytest.raises(FileError, match="has changed since it was loaded"):
        session.run(None, {"x": X})


def test_feeds_that_are_no_arrays(tmp_path: Path, fakes: dict[str, Fake]) -> None:
    path = saved(RELU, tmp_path)
    session = onnxgen.load(with_regions(path, {"all": [0]}, ["fake:CPU"]))
    kept = X.copy()
    for feed in (X.tolist(), X[::2], X[:, ::-1], np.asfortranarray(X), [[1, 2, 3, 4, 5, 6]]):
        wanted = np.maximum(np.asarray(feed, np.float32), 0)
        assert_equal(session.run(None, {"x": feed}), [wanted])
    for each in (session, onnxgen.load(path)):
        assert_equal(each.run(None, {"x": X.astype(">f4")}), answers(path, {"x": X}))
    assert session.picked == {"all": "fake:CPU"}
    assert_equal([X], [kept])


def test_a_backend_is_given_no_shape_that_it_was_not_compiled_for(
    tmp_path: Path, fakes: dict[str, Fake]
) -> None:
    session = onnxgen.load(with_regions(saved(RELU, tmp_path), {"all": [0]}, ["fake:CPU"]))
    for wrong in (X[:, :5], X[0], X[None]):
        with pytest.raises(Exception):  # noqa: B017, PT011
            session.run(None, {"x": wrong})
    assert fakes["fake"].runs == 0


def test_a_model_without_contexts_takes_what_onnx_runtime_takes(tmp_path: Path) -> None:
    text = HEAD + "g (seq(float[n,6]) x) => (float[m,6] y) { y = ConcatFromSequence<axis = 0>(x) }"
    session = onnxgen.load(saved(text, tmp_path))
    assert_equal(session.run(None, {"x": [X, X[:1]]}), [np.concatenate([X, X[:1]])])


def test_what_cannot_be_compared_is_not_used(
    tmp_path: Path, fakes: dict[str, Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = with_regions(saved(MATMUL, tmp_path, w=W), {"all": [0]}, ["fake:CPU"])

    def fails(*_: Any) -> str:
        raise OSError("it went away")

    monkeypatch.setattr(contexts_weights.Weights, "sha256", fails)
    session = onnxgen.load(path)
    assert "OSError: it went away" in reasons(session)["all"][0]
    assert_equal(session.run(None, {"x": X}), answers(path, {"x": X}))


# --- tables -------------------------------------------------------------------------------------


def edited(path: Path, change: Callable[[str], str]) -> Path:
    """The model with each of its tables changed."""
    model = onnx.load(path)
    for owner in (model, *model.functions):
        for entry in owner.metadata_props:
            if entry.key == KEY:
                entry.value = change(entry.value)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"region":"all"', '"region":"\\ud800"'),
        ('"region":"all"', '"region":"\\u001b[2J"'),
        ('"backend":"fake:CPU"', '"backend":"\\u001b]0;x\\u0007:CPU"'),
        ('"version":"1.0"', '"version":"\\n\\nOK"'),
        ('"device":"a device"', '"device":"\\u009b2J"'),
        ('"compatibility":"x=1"', '"compatibility":"\\udfff"'),
        ('"types":{', '"types":{"\\ud800":"FLOAT",'),
        ('"inputs":["x"]', '"inputs":["\\ud800"]'),
        ('"bytes":', '"bytes":1' + "0" * 400),
        ('"bytes":', '"bytes":-'),
        ('"parameters":"0"', '"parameters":"0-999999999"'),
        ('"parameters":"0"', '"parameters":"0,0"'),
        ('"parameters":"0"', '"parameters":NaN'),
        ('"contexts":', '"deep":' + "[" * 100000 + "]" * 100000 + ',"contexts":'),
    ],
)
def test_a_table_that_says_what_cannot_be(
    old: str, new: str, tmp_path: Path, fakes: dict[str, Fake]
) -> None:
    plain = saved(MATMUL, tmp_path, w=W)
    path = with_regions(plain, {"all": [0]}, ["fake:CPU"], "metadata")
    before = path.read_bytes()
    edited(path, lambda table: table.replace(old, new))
    assert path.read_bytes() != before
    for command in (["list"], ["check"], ["convert", "--to", "function"]):
        result = run(command[0], path, *command[1:])
        assert result.exit_code == 4, result.output
        assert result.stderr.count("\n") == 1
        assert all(each.isprintable() or each == "\n" for each in result.output)
    session = onnxgen.load(path)
    assert session.picked == {}
    assert_equal(session.run(None, {"x": X}), answers(plain, {"x": X}))
    assert run("strip", path, "-o", tmp_path / "s.onnx").exit_code == 0


def test_functions_that_call_one_another_again_and_again(
    tmp_path: Path, fakes: dict[str, Fake]
) -> None:
    path = with_regions(saved(RELU, tmp_path), {"all": [0]}, ["fake:CPU"])
    model = onnx.load(path)
    body = next(each for each in model.functions if each.name.startswith("Region_"))
    for number in range(2000):
        body.node.append(onnx.helper.make_node("Neg", ["x"], [f"d{number}"]))
        call = model.graph.node.add()
        call.CopyFrom(model.graph.node[0])
        call.output[:] = [f"y{number}"]
    with pytest.raises(FormatError, match="again and again"):
        decode(model)


def test_a_call_that_somebody_moved_into_a_branch(tmp_path: Path, fakes: dict[str, Fake]) -> None:
    text = HEAD + "g (float[n,6] x, bool c) => (float[n,6] y) { h = Neg(x)  y = Relu(h) }"
    path = with_regions(saved(text, tmp_path), {"r": [1]}, ["fake:CPU"])
    model = onnx.load(path)
    call = next(node for node in model.graph.node if node.op_type == "Region_0")
    branches = {}
    for name in ("then_branch", "else_branch"):
        node = onnx.NodeProto()
        node.CopyFrom(call)
        node.output[:] = [name]
        made = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        branches[name] = onnx.helper.make_graph([node], name, [], [made])
    call.CopyFrom(onnx.helper.make_node("If", ["c"], ["y"], **branches))
    onnx.save(model, path)
    feeds = {"x": X, "c": np.array(True)}
    wanted = answers(path, feeds)
    session = onnxgen.load(path)
    assert_equal(session.run(None, feeds), wanted)
    assert session.picked == {}
    result = run("strip", path, "-o", tmp_path / "s.onnx")
    assert (result.exit_code, result.stderr.count("\n")) == (4, 1)
    assert "is called where no region can be" in result.stderr
    assert not (tmp_path / "s.onnx").exists()
    assert CliRunner().invoke(main, ["fuse", str(path)]).exit_code == 0
    assert_equal(answers(tmp_path / "m.function.fused.onnx", feeds), wanted)


def test_an_output_never_replaces_a_blob_beside_the_model(tmp_path: Path) -> None:
    saved(MATMUL, tmp_path, w=W)
    added = run("add", tmp_path / "m.onnx", "--backend", "ort:cpu", "--blob", "file")
    assert added.exit_code == 0, added.output
    path, [blob] = tmp_path / "m.context.onnx", tmp_path.glob("*.blob")
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    for words in (
        ["context", "add", path, "--backend", "ort:cpu", "-o", blob],
        ["context", "strip", path, "-o", blob],
        ["context", "convert", path, "--to", "metadata", "-o", blob],
        ["fuse", path, "-o", blob],
    ):
        result = CliRunner().invoke(main, [*map(str, words)])
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
        assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


END = "os.kill(os.getpid(), signal.SIGTERM)"
FULL = "exec('raise OSError(28, \\'No space left on device\\')')"


@pytest.mark.parametrize(
    ("where", "what", "code"),
    [
        ("contexts.sides.sync", END, 143),
        ("context_files.encode", END, 143),
        ("backends.ort_cpu._read", END, 143),
        ("contexts.sides.sync", FULL, 4),
        ("backends.ort_cpu._read", FULL, 4),
    ],
)
def test_a_run_that_is_ended_or_finds_no_room_leaves_nothing(
    where: str, what: str, code: int, tmp_path: Path
) -> None:
    saved(MATMUL, tmp_path, w=W)
    (tmp_path / "temporary").mkdir()
    module, _, name = f"onnxgen.{where}".rpartition(".")
    words = ["context", "add", str(tmp_path / "m.onnx"), "--backend", "ort:cpu", "--blob", "file"]
    program = f"""
import os, signal, {module}
from onnxgen.cli import main
{module}.{name} = lambda *_, **__: {what}
main({words!r})"""
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert result.stderr.count("\n") == (code == 4)
    assert {each.name for each in tmp_path.iterdir()} == {"m.onnx", "temporary"}
    assert not list((tmp_path / "temporary").glob("onnxgen*"))


# --- trust --------------------------------------------------------------------------------------

ONE, TWO = "1" * 64, "2" * 64


def test_a_list_that_somebody_edited_goes_on(tmp_path: Path) -> None:
    trust([ONE], "first")
    path = config_folder() / "trusted"
    path.write_text(ONE)  # an editor that writes no newline at the end
    trust([TWO, ONE], "a name that is no text: \udcff")
    assert trusted() == {ONE, TWO}
    assert len(path.read_text().splitlines()) == 2


def _open(path: Path) -> None:
    path.chmod(0o622)


def _open_folder(path: Path) -> None:
    path.parent.chmod(0o777)


def _linked(path: Path) -> None:
    path.with_name("other").hardlink_to(path)


def _pointed(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


def _binary(path: Path) -> None:
    path.write_bytes(b"\xff\xfe" * 100)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir(0o700)


@pytest.mark.parametrize("spoil", [_open, _open_folder, _linked, _pointed, _binary, _fifo, _folder])
def test_a_list_that_others_may_have_written_is_not_believed(
    spoil: Callable[[Path], None], tmp_path: Path, fakes: dict[str, Fake]
) -> None:
    path = with_regions(saved(RELU, tmp_path), {"all": [0]}, ["fake:CPU"])
    assert onnxgen.load(path).picked == {"all": "fake:CPU"}
    spoil(config_folder() / "trusted")
    session = onnxgen.load(path)
    assert "is not trusted" in reasons(session)["all"][0]
    assert fakes["fake"].loads == 1
    if spoil in (_fifo, _folder, _pointed):
        with pytest.raises(FileError, match="cannot be written"):
            trust([ONE], "more")


@pytest.mark.parametrize("spoil", [_binary, _fifo, _folder])
def test_a_list_that_is_given_and_is_none(
    spoil: Callable[[Path], None], tmp_path: Path, fakes: dict[str, Fake]
) -> None:
    path = with_regions(saved(RELU, tmp_path), {"all": [0]}, ["fake:CPU"])
    given = tmp_path / "list"
    given.write_text(ONE)
    assert run("check", path, "--trust", given).exit_code == 0
    spoil(given)
    for words in (["--trust", given], ["--trust", "/dev/zero"]):
        result = run("check", path, *words)
        assert (result.exit_code, result.stderr.count("\n")) == (4, 1), result.output


def test_without_a_place_for_trust_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(RELU, tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("ONNXGEN_CONFIG", str(tmp_path / "file" / "config"))
    result = run("add", tmp_path / "m.onnx", "--backend", "ort:cpu", "--blob", "file")
    assert (result.exit_code, result.stderr.count("\n")) == (4, 1), result.output
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "m.onnx"]


def test_an_export_gives_no_strange_blob_to_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    from onnxgen import pipeline_export

    saved(MATMUL, tmp_path, w=W)
    path = tmp_path / "m.context.onnx"
    assert run("add", tmp_path / "m.onnx", "--backend", "openvino:CPU").exit_code == 0
    monkeypatch.setenv("ONNXGEN_CONFIG", str(tmp_path / "nobody"))

    def ran(*_: Any) -> None:
        raise AssertionError("it was run")

    monkeypatch.setattr(pipeline_export, "_prove", ran)
    for words in (["--package", tmp_path / "p"], ["--epcontext", "--backend", "openvino:CPU"]):
        result = run("export", path, *words)
        assert result.exit_code == 0, result.output
        assert "is not trusted" in " ".join(result.stdout.split())


def test_the_list_and_the_cache_are_the_users_alone(tmp_path: Path) -> None:
    trust([ONE], "first")
    for path in (config_folder(), config_folder() / "trusted"):
        assert not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
