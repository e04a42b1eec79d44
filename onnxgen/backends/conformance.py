"""What a backend must do, tried on a device: for the tests of whoever writes one.

    assert check_backend(MyBackend(), "NPU") == []

Small parts are compiled, loaded and run, and compared with ONNX's reference evaluator. Damaged
blobs are loaded in a process of their own, which imports the backend's class by its name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from onnxgen.backends.interface import Array, Backend, BackendError, Call, Compiled, Part, Weight

TOLERANCE = 1e-4  # of the largest value: float32, summed in any order
_SECONDS = 120.0
_PARTS = {  # in ONNX text; sizes that are pairwise distinct
    "a product": "(float[n,20] x, float[20,30] w) => (float[n,30] y) { y = MatMul(x, w) }",
    "two outputs": "(float[n,20] x, float[20,30] w) => (float[n,30] y, float[n,30] z)"
    "{ y = MatMul(x, w) z = Relu(y) }",
    "integer inputs": "(int64[n] x, float[40,30] w) => (float[n,30] y) { y = Gather(w, x) }",
    "two inputs": "(float[n,20] x, float[m,20] z, float[20,30] w) => (float[k,30] y)"
    "{ c = Concat<axis = 0>(x, z) y = MatMul(c, w) }",
}


def check_backend(backend: Backend, device: str) -> list[str]:
    """What does not hold, a sentence each; [] where the backend conforms."""
    found: list[str] = []
    for name, text in _PARTS.items():
        try:
            found += [f"{name}: {each}" for each in _of_part(backend, device, _part(text))]
        except Exception as error:  # another's code: it may raise anything
            found.append(f"{name}: it raises {type(error).__name__}: {error}")
    found += _refusals(backend, device)
    return found


def _part(text: str) -> Part:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> g {text}')
    return Part(model, len(model.graph.input) - 1, (_weight(model, 0),))


def _weight(model: onnx.ModelProto, seed: int) -> Weight:
    shape = tuple(d.dim_value for d in model.graph.input[-1].type.tensor_type.shape.dim)
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return Weight(onnx.TensorProto.FLOAT, shape, values.reshape(-1).view(np.uint8))


def _of_part(backend: Backend, device: str, part: Part) -> Iterator[str]:
    candidates = backend.compile(part, device)
    compiled = next(candidates, None)
    if compiled is None:
        yield "compile yields nothing and raises nothing"
        return
    loaded = backend.load(compiled.blob, compiled.form, device)
    call = loaded.bind([part.weights[i] for i in compiled.parameters])
    for size in (3, 5, 0, 1):
        yield from _wrong(call, part, _feeds(part, size, size), f"at length {size}")
    first = call(_feeds(part, 3, 1))
    kept = [array.copy() for array in first]
    other = call(_feeds(part, 3, 2))
    if any(not np.array_equal(a, b) for a, b in zip(first, kept, strict=True)):
        yield "the next run overwrites the outputs of the one before"
    del other
    if any(not np.array_equal(a, b) for a, b in zip(call(_feeds(part, 3, 1)), kept, strict=True)):
        yield "two runs of the same inputs differ"
    if compiled.parameters:
        changed = replace(part, weights=(_weight(part.model, 9),))
        second = loaded.bind([changed.weights[i] for i in compiled.parameters])
        yield from _wrong(second, changed, _feeds(part, 3, 4), "with other weights")
        yield from _wrong(call, part, _feeds(part, 3, 4), "after other weights were bound")
    yield from _threads(call, part)
    yield from _damage(backend, device, compiled, part)


def _threads(call: Call, part: Part) -> Iterator[str]:
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(list, _wrong(call, part, _feeds(part, 3 + seed % 2, seed), ""))
            for seed in range(40)
        ]
        if any(run.exception() is not None or run.result() for run in runs):
            yield "it is wrong when two threads run it"


def _feeds(part: Part, size: int, seed: int) -> list[Array]:
    rng = np.random.default_rng(seed)
    found: list[Array] = []
    for value in part.model.graph.input[: part.inputs]:
        shape = [d.dim_value or size for d in value.type.tensor_type.shape.dim]
        whole = value.type.tensor_type.elem_type == onnx.TensorProto.INT64
        drawn: Array = rng.integers(0, 40, shape) if whole else rng.standard_normal(shape)
        found.append(drawn if whole else drawn.astype(np.float32))
    return found


def _wrong(call: Call, part: Part, feeds: Sequence[Array], when: str) -> Iterator[str]:
    values = [*feeds, *(weight.array for weight in part.weights)]
    names = [value.name for value in part.model.graph.input]
    expected: Any = ReferenceEvaluator(part.model).run(None, dict(zip(names, values, strict=True)))
    answers = call(feeds)
    if len(answers) != len(expected):
        yield f"{len(answers)} outputs, not {len(expected)} {when}"
        return
    for index, (got, want) in enumerate(zip(answers, expected, strict=True)):
        if got.shape != want.shape or got.dtype != want.dtype:
            yield f"output {index} is {got.dtype} {got.shape}, not {want.dtype} {want.shape} {when}"
        elif want.size and not np.abs(got - want).max() <= TOLERANCE * np.abs(want).max():
            yield f"output {index} is wrong {when}"


def _refusals(backend: Backend, device: str) -> Iterator[str]:
    try:
        here = backend.identity(device)
        if why := backend.refuses(here, device):
            yield f"it refuses what it compiled itself: {why}"
        if not backend.refuses(replace(here, version=here.version + ".other"), device):
            yield "it does not refuse another version"
    except Exception as error:  # as above
        yield f"identity or refuses raises {type(error).__name__}: {error}"


# --- damage -------------------------------------------------------------------------------------


def damaged(blob: bytes) -> dict[str, bytes]:
    """The ways in which a blob is damaged, by what is said of them."""
    noise = np.random.default_rng(0).integers(0, 256, len(blob), np.uint8).tobytes()
    flipped = {
        f"with byte {i} flipped": blob[:i] + bytes([blob[i] ^ 255]) + blob[i + 1 :]
        for i in range(0, min(len(blob), 24), 4)
    }
    cut = {f"cut off after {n} bytes": blob[:n] for n in (0, 7, len(blob) // 2)}
    return {**cut, "of noise": noise, **flipped}


def _damage(backend: Backend, device: str, compiled: Compiled, part: Part) -> Iterator[str]:
    kind: Callable[..., Any] = type(backend)
    with tempfile.TemporaryDirectory(prefix="onnxgen-") as name:
        folder = Path(name)
        for index, blob in enumerate(damaged(compiled.blob).values()):
            (folder / f"{index}.blob").write_bytes(blob)
        (folder / "part.onnx").write_bytes(part.model.SerializeToString())
        words = [kind.__module__, kind.__qualname__, device, compiled.form, name]
        words.append(json.dumps([compiled.parameters, list(damaged(compiled.blob))]))
        code = "import sys; from onnxgen.backends import conformance as c; c.child(*sys.argv[1:])"
        try:
            done = subprocess.run(
                [sys.executable, "-c", code, *words],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired:
            yield f"damaged blobs keep it busy for more than {_SECONDS:.0f} s"
            return
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            yield f"a damaged blob ends the process ({done.returncode}) {last}"
        yield from done.stdout.splitlines()


def child(module: str, kind: str, device: str, form: str, folder: str, more: str) -> None:
    """Load damaged blobs, and print what is not as it should be: of the process for that."""
    import importlib

    backend: Backend = getattr(importlib.import_module(module), kind)()
    parameters, said = json.loads(more)
    model = onnx.load(Path(folder) / "part.onnx")
    part = Part(model, len(model.graph.input) - 1, (_weight(model, 0),))
    feeds = _feeds(part, 3, 1)
    for index, what in enumerate(said):
        blob = (Path(folder) / f"{index}.blob").read_bytes()
        try:
            call = backend.load(blob, form, device).bind([part.weights[i] for i in parameters])
            wrong = list(_wrong(call, part, feeds, ""))
        except BackendError:
            continue
        except Exception as error:  # as above
            print(f"a blob {what} raises {type(error).__name__}, no BackendError", flush=True)
            continue
        if wrong or "flipped" not in what:  # a byte that nothing reads does no harm
            print(f"a blob {what} is run", flush=True)
