"""ONNX Runtime's child process: it is bounded, is given no code but its own, and is not believed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, parser

from onnxgen import bounds, messages
from onnxgen.bounds import Bounds
from onnxgen.errors import UsageError
from onnxgen.runtime import Runtime, RuntimeFailure, SpentError
from onnxgen.verify.compare import verify_models
from tests.graphs import parse

DOUBLED = "(float[n] x) => (float[n] y) { y = Add(x, x) }"
ONE = np.array(1, np.float32)


def endless(rounds: int = 1 << 60) -> bytes:
    """A loop of 2^60 rounds."""
    body = parser.parse_graph(
        "body (int64 i, bool c, float a) => (bool d, float b) { d = Identity(c) b = Add(a, a) }"
    )
    count = helper.make_tensor("rounds", TensorProto.INT64, [], [rounds])
    node = helper.make_node("Loop", ["rounds", "", "x"], ["y"], body=body)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in "xy")
    graph = helper.make_graph([node], "endless", [x], [y], [count])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def greedy(size: int) -> bytes:
    """Makes floats of `size` bytes."""
    model = parse(
        f"(float[] x) => (float[] y) <int64[1] s = {{{size // 4}}}>"
        "{ e = Expand(x, s)  f = Neg(e)  y = ReduceMax<keepdims = 0>(f) }"
    )
    return bytes(model.SerializeToString())


def doubled() -> bytes:
    return bytes(parse(DOUBLED).SerializeToString())


def test_a_run_without_end_is_ended_and_nothing_is_run_after_it() -> None:
    with Runtime(threads=1) as runtime:
        session = runtime.load(endless())
        runtime.bounds = Bounds(timeout=0.2)
        with pytest.raises(RuntimeFailure, match=r"took more than 0\.2 s during run"):
            runtime.run(session, {"x": ONE})
        runtime.bounds = Bounds()
        with pytest.raises(SpentError, match=r"0\.2 s during run; nothing more was run"):
            runtime.run(session, {"x": ONE})
        with pytest.raises(SpentError):
            runtime.load(doubled())
        assert runtime.seconds >= 0.2


def test_all_runs_together_have_a_bound_that_blames_no_model() -> None:
    with Runtime(threads=1) as runtime:
        session = runtime.load(endless())
        runtime.bounds = Bounds(time=runtime.seconds + 0.2)
        with pytest.raises(SpentError, match="s in all, which are spent"):
            runtime.run(session, {"x": ONE})
        with pytest.raises(SpentError):
            runtime.load(doubled())


@pytest.mark.parametrize("late", [(True, True), (True, False), (False, True)])
def test_what_takes_too_long_is_not_proven(late: tuple[bool, bool]) -> None:
    models = [endless(1 << 60 if each else 3) for each in late]
    with Runtime(bounds=Bounds(timeout=3), threads=1) as runtime:
        proof = verify_models(*models, runtime=runtime)
    assert proof.status == ("unverifiable" if late[0] else "differs")
    assert "took more than 3 s during run" in proof.reason


def test_no_model_is_blamed_where_the_time_of_all_ends_within_it() -> None:
    with Runtime(bounds=Bounds(time=3), threads=1) as runtime:
        proof = verify_models(endless(3), endless(), runtime=runtime)
    assert (proof.status, "which are spent" in proof.reason) == ("unverifiable", True)


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="the system does not say what a process has"
)


@needs_proc
def test_a_run_that_needs_too_much_memory_is_ended_and_the_next_model_runs() -> None:
    with Runtime(bounds=Bounds(memory=1_000_000_000), threads=1) as runtime:
        session = runtime.load(greedy(4_000_000_000))
        with pytest.raises(RuntimeFailure, match=r"needed more than 1\.0 GB of memory during run"):
            runtime.run(session, {"x": ONE})
        assert runtime.memory > 1_000_000_000
        other = runtime.load(doubled())
        assert runtime.run(other, {"x": np.ones(2, np.float32)})["y"].tolist() == [2, 2]


@needs_proc
@pytest.mark.parametrize("which", [(True, True), (False, True)])
def test_what_needs_too_much_memory_is_not_proven(which: tuple[bool, bool]) -> None:
    models = [greedy(2_000_000_000 if each else 8) for each in which]
    with Runtime(bounds=Bounds(memory=700_000_000), threads=1) as runtime:
        proof = verify_models(*models, runtime=runtime)
    assert proof.status == ("unverifiable" if which[0] else "differs")
    assert "needed more than 700 MB of memory" in proof.reason


@needs_proc
def test_mapped_weights_are_not_memory(tmp_path: Path) -> None:
    with open(tmp_path / "w.bin", "wb") as file:
        file.truncate(1 << 31)
    onnx.save(external("w.bin", 1 << 29), tmp_path / "m.onnx")
    with Runtime(bounds=Bounds(memory=1_000_000_000), threads=1) as runtime:
        session = runtime.load(tmp_path / "m.onnx")
        assert runtime.run(session, {"i": np.array([0, 7])})["y"].tolist() == [0, 0]
        assert 0 < runtime.memory < 500_000_000


def test_bounds_are_told_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Bounds().memory == int(bounds.SHARE * bounds.machine_memory())
    for name, text in (("MEMORY", "1.5GB"), ("TIMEOUT", "7"), ("TIME", "0.5")):
        monkeypatch.setenv(f"ONNXGEN_{name}", text)
    assert Bounds() == Bounds(timeout=7, time=0.5, memory=1_500_000_000)
    for name, text in (("MEMORY", "much"), ("TIMEOUT", "0"), ("TIME", "-1"), ("MEMORY", "0")):
        with monkeypatch.context() as patch:
            patch.setenv(f"ONNXGEN_{name}", text)
            with pytest.raises(UsageError, match=f"ONNXGEN_{name} is '{text}'"):
                Bounds()


@pytest.mark.parametrize("place", ["cwd", "path"])
def test_no_code_is_loaded_from_where_the_user_works(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numpy", "onnx", "onnxruntime", "ml_dtypes", "json"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "" if place == "cwd" else os.pathsep.join([".", ""]))
    with Runtime(threads=1) as runtime:
        runtime.load(doubled())
    if place == "cwd":
        command = [sys.executable, "-m", "onnxgen", "fuse", "missing.onnx"]
        root = str(Path(bounds.__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": root}
        # Python itself reads json and the like from the current folder before it runs anything.
        (tmp_path / "json.py").unlink()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (done.returncode, "does not exist" in done.stderr) == (4, True)
    assert not (tmp_path / "ran").exists()


def test_a_model_brings_no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ONNX Runtime would read them from a model where the environment says so."""
    model = onnx.ModelProto.FromString(doubled())
    options = '{"session_options": {"enable_profiling": 1, "graph_optimization_level": 77}}'
    helper.set_model_props(model, {"ort_config": options})
    monkeypatch.setenv("ORT_LOAD_CONFIG_FROM_MODEL", "1")
    with Runtime(threads=1) as runtime:
        session = runtime.load(model.SerializeToString())
        assert runtime.run(session, {"x": np.ones(1, np.float32)})["y"].tolist() == [2]


def custom_op() -> onnx.ModelProto:
    model = single("Op", domain="evil", library="evil.so")
    helper.set_model_props(model, {"custom_op_library": "evil.so", "ep_library": "evil.so"})
    return model


def context() -> onnx.ModelProto:
    return single(
        "EPContext",
        domain="com.microsoft",
        main_context=1,
        embed_mode=0,
        ep_cache_context="evil.so",
        source="TensorrtExecutionProvider",
    )


def single(op: str, *, domain: str, **attributes: object) -> onnx.ModelProto:
    node = helper.make_node(op, ["x"], ["y"], domain=domain, **attributes)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = helper.make_graph([node], "g", [x], [y])
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(domain, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def external(location: str, size: int) -> onnx.ModelProto:
    """Reads what it is asked for of a weight in a file."""
    weight = TensorProto(name="w", data_type=1, dims=[size], data_location=1)
    weight.external_data.add(key="location", value=location)
    node = helper.make_node("Gather", ["w", "i"], ["y"])
    i = helper.make_tensor_value_info("i", TensorProto.INT64, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])
    graph = helper.make_graph([node], "g", [i], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.skipif(not os.access("/proc/self/maps", os.R_OK), reason="needs /proc")
@pytest.mark.parametrize("name", ["custom op", "context", "absolute", "above"])
def test_a_model_loads_no_library_and_opens_no_file_elsewhere(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    canary = tmp_path / "canary.bin"
    canary.write_bytes(bytes(8))
    (folder / "evil.so").write_bytes(b"not a library, and not asked")
    model = {
        "custom op": custom_op,
        "context": context,
        "absolute": lambda: external(str(canary), 2),
        "above": lambda: external("../canary.bin", 2),
    }[name]()
    onnx.save(model, folder / "m.onnx")
    before = {path: _read_at(path) for path in (canary, folder / "evil.so")}
    canary.read_bytes()
    if canary.stat().st_atime_ns == before[canary]:
        pytest.skip("this file system does not say when a file was read")
    assert _read_at(canary) == before[canary]
    with Runtime(threads=1) as runtime:
        for given, where in ((folder / "m.onnx", None), (model.SerializeToString(), folder)):
            with pytest.raises(RuntimeFailure):
                runtime.load(given, folder=where)
        with pytest.raises(RuntimeFailure):
            runtime.load(model.SerializeToString())
    assert {path: _read_at(path) for path in before} == before


def _read_at(path: Path) -> int:
    """When a file was last read; set back first, so that any reading shows."""
    status = path.stat()
    if status.st_atime_ns > status.st_mtime_ns - 10**12:
        os.utime(path, ns=(status.st_mtime_ns - 10**13, status.st_mtime_ns))
    return path.stat().st_atime_ns


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 16,
        messages._SIZES.pack(4, 0) + b"nope",
        messages._SIZES.pack(2, 0) + b"[]",
        messages._SIZES.pack(2, 4) + b"[]",
        messages._SIZES.pack(28, 8) + b'[{},["y"],[["float32",1e9]]]' + bytes(8),
        messages._SIZES.pack(26, 8) + b'[{},["y"],[["float32",9]]]' + bytes(8),
        messages._SIZES.pack(26, 8) + b'[{},["y"],[["float32",1]]]' + bytes(8),
        messages._SIZES.pack(27, 8) + b'[{},["y"],[["float32",-2]]]' + bytes(8),
        messages._SIZES.pack(25, 8) + b'[{},["y"],[["object",1]]]' + bytes(8),
        messages._SIZES.pack(5000, 0) + b"[" * 5000,
        b"\x80\x05cposix\nsystem\n(S'true'\ntR.",
    ],
)
def test_what_is_no_answer_is_a_failure(said: bytes) -> None:
    """Whatever a model made of the runtime's process."""
    read, write = os.pipe()
    os.write(write, said)
    os.close(write)
    with pytest.raises((EOFError, messages.MessageError)):
        messages.receive(read, most=1000)
    os.close(read)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype=np.float16).reshape(2, 3).T,
        np.array(True),
        np.zeros((0, 3), np.int64),
        np.array(5, ">i4"),
        np.array([["a", "ü\n"], ["", "\udcff"]], object),
        [np.ones(2), np.array(["x"], object)],
        {"a": np.float32(1), "b": np.float32(2)},
        None,
    ],
)
def test_a_message_arrives_as_it_was_sent(value: Any) -> None:
    read, write = os.pipe()
    messages.send(write, {"id": 1, "names": ["a", "\n"]}, {"value": value, "more": np.ones(3)})
    fields, arrays = messages.receive(read)
    assert fields == {"id": 1, "names": ["a", "\n"]}
    assert np.array_equal(arrays["more"], np.ones(3))
    np.testing.assert_equal(arrays["value"], value)
    if isinstance(value, np.ndarray):
        assert arrays["value"].shape == value.shape
        assert arrays["value"].dtype == value.dtype.newbyteorder("=")
        assert arrays["value"].flags.writeable
    with pytest.raises(messages.MessageError, match="an array of objects"):
        messages.send(write, {}, {"value": np.array([object()])})


def test_the_process_ends_with_the_tool(tmp_path: Path) -> None:
    """Killed, the tool cannot end a run; nobody waits for it any more."""
    (tmp_path / "endless.onnx").write_bytes(endless())
    code = (
        "import os, sys, signal, threading, pathlib, numpy as np\n"
        "from onnxgen.runtime import Runtime\n"
        "runtime = Runtime(threads=1)\n"
        "session = runtime.load(pathlib.Path('endless.onnx').read_bytes())\n"
        "print(runtime._start().process.pid, flush=True)\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "runtime.run(session, {'x': np.array(1, np.float32)})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(bounds.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(done.stdout)
    for _ in range(600):
        if not _runs(child):
            return
        time.sleep(0.1)
    pytest.fail("it runs on")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    try:  # a zombie that nobody waits for is no run
        return ") Z" not in Path(f"/proc/{process}/stat").read_text("utf-8")
    except OSError:
        return True


@pytest.mark.parametrize("optimize", [False, True])
def test_a_dequantized_weight_is_what_it_says(optimize: bool) -> None:
    """Optimised, ONNX Runtime would quantize the activations too, and be off by percents."""
    weights = np.random.default_rng(0).integers(-127, 128, (26, 8)).astype(np.int8)
    model = parse(
        "(float[n,26] x) => (float[n,8] y) <int8[26,8] w, float[8] s>"
        "{ f = DequantizeLinear<axis = 1>(w, s)  y = MatMul(x, f) }",
        weights={"w": weights, "s": np.full(8, 0.01, np.float32)},
    )
    x = np.random.default_rng(1).standard_normal((3, 26)).astype(np.float32)
    with Runtime(threads=1) as runtime:
        session = runtime.load(model.SerializeToString(), optimize=optimize)
        y = runtime.run(session, {"x": x})["y"]
    np.testing.assert_allclose(y, x @ (weights * np.float32(0.01)), rtol=1e-5, atol=1e-5)
