"""How long a model of 32 layers takes from the start of a process to its first output.

    python tests/bench/bench_contexts.py /tmp/onnxgen-bench
    python tests/bench/bench_contexts.py /tmp/onnxgen-bench --layers 8 --runs 3

Writes a decoder of random weights, fuses it, lets OpenVINO and ONNX Runtime compile it, all of it in
one region and each layer in one (`--region layers`), and then starts Python anew for each way to run
it, in turns: ONNX Runtime, OpenVINO compiling, and the loader with each blob. A figure is the fastest
of the runs, from the start of the process to the first output, its past empty; ratios are to OpenVINO's
compiling in the same turns, above 1.00 is faster. "again" is a second run of the loaded model. Memory is
what the process held at most: anonymous memory, and all that was resident, mapped files too. Nothing is
asserted here: machines differ. Needs the extra `openvino`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from common import print_table, quietly

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

TOKENS = 8
LAYERS = r"layers\.\d+"
BACKENDS = ("openvino:CPU", "ort:cpu")


def child(way: str, path: str) -> None:
    """Load a model and run it twice; prints seconds of the second run and kilobytes."""
    began = float(os.environ["BENCH_BEGAN"])
    import numpy as np

    def fed(name: str, shape: list[object]) -> np.ndarray:
        if name == "position_ids":
            return np.arange(TOKENS)[None]
        if name == "input_ids":
            return np.arange(TOKENS)[None] * 7
        if name == "attention_mask":
            return np.ones((1, TOKENS), np.int64)
        return np.zeros((1, shape[1], 0, shape[3]), np.float32)

    if way == "compile":
        import openvino as ov

        model = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        shapes = {
            each.get_any_name(): [
                d.get_length() if d.is_static else None for d in each.partial_shape
            ]
            for each in model.inputs
        }
        feeds = {name: fed(name, shape) for name, shape in shapes.items()}
        request = model.create_infer_request()

        def run() -> object:
            return request.infer(feeds)

    else:
        if way == "ort":
            import onnxruntime as ort

            session = ort.InferenceSession(path)
        else:
            from onnxgen.session import load

            session = load(path, prefer=[way])
            assert set(session.picked.values()) == {way}, session.choices
        feeds = {each.name: fed(each.name, each.shape) for each in session.get_inputs()}

        def run() -> object:
            return session.run(None, feeds)

    run()
    first = time.time() - began
    began = time.time()
    run()
    again = time.time() - began
    status = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in status if len(line.split()) > 1}
    print(first, again, found["RssAnon"], found["VmHWM"])


def measure(way: str, path: Path) -> tuple[float, ...]:
    """Seconds to the first output and of the second, and kilobytes, of a process of its own."""
    environment = {**os.environ, "BENCH_BEGAN": repr(time.time())}
    command = [sys.executable, __file__, "--child", way, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{way} {path.name}: {done.stderr[-800:]}")
    return tuple(map(float, done.stdout.split()[-4:]))


def written(folder: Path, layers: int, hidden: int, *, verify: bool) -> dict[str, Path]:
    """The models: as exported, fused, and with contexts of both kinds of regions."""
    from tests.large_decoder import Sizes, write_decoder

    sizes = Sizes(layers, hidden, 11 * hidden // 4, hidden // 64, hidden // 128, 32000)
    exported = write_decoder(folder, sizes)
    fused = folder / "fused.onnx"
    words = [] if verify else ["--no-verify"]
    run = [sys.executable, "-m", "onnxgen"]
    quietly(
        [*run, "fuse", exported, "-o", fused, "--verify", "layers" if verify else "full", *words]
    )
    found = {"exported": exported, "fused": fused}
    backends = [word for backend in BACKENDS for word in ("--backend", backend)]
    quick = ["--verify", "quick"] if verify else ["--no-verify"]
    for name, region in (("all", "all"), ("layers", LAYERS)):
        found[name] = folder / f"{name}.onnx"
        more = ["--region", region, "-o", found[name], *quick]
        quietly([*run, "context", "add", fused, *backends, *more])
    return found


def size_of(path: Path) -> str:
    data = path.with_name("model.data").stat().st_size
    return f"{(path.stat().st_size + data) / 1e6:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where the models go")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-verify", action="store_true", help="do not prove the models first")
    parser.add_argument("--keep", action="store_true", help="leave the models in the folder")
    options = parser.parse_args()
    folder = options.folder / "contexts"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"ONNXGEN_CONFIG": str(folder / "config"), "ONNXGEN_CACHE": str(folder / "cache")}
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent.parent)
    try:
        models = written(folder, options.layers, options.hidden, verify=not options.no_verify)
        ways = [
            ("ONNX Runtime, as exported", "ort", "exported"),
            ("ONNX Runtime, fused", "ort", "fused"),
            ("OpenVINO compiles, as exported", "compile", "exported"),
            ("OpenVINO compiles, fused", "compile", "fused"),
            ("loader, OpenVINO's blob, all in one", "openvino:CPU", "all"),
            ("loader, OpenVINO's blob, by layer", "openvino:CPU", "layers"),
            ("loader, ONNX Runtime's blob, all in one", "ort:cpu", "all"),
            ("loader, ONNX Runtime's blob, by layer", "ort:cpu", "layers"),
        ]
        time.sleep(2.5)  # files that changed just now are hashed at every load
        first = {name: measure(way, models[model])[0] for name, way, model in ways}
        runs: dict[str, list[tuple[float, ...]]] = {name: [] for name, _, _ in ways}
        for _ in range(options.runs):
            for name, way, model in ways:
                runs[name].append(measure(way, models[model]))
        best = {
            name: [min(column) for column in zip(*each, strict=True)] for name, each in runs.items()
        }
        compiling = best["OpenVINO compiles, fused"][0]
        rows = [
            [
                name,
                f"{best[name][0]:.2f}",
                f"{compiling / best[name][0]:.2f}",
                f"{first[name]:.2f}",
                f"{best[name][1] * 1e3:.0f}",
                f"{best[name][2] / 1e3:.0f}",
                f"{best[name][3] / 1e3:.0f}",
                size_of(models[model]),
            ]
            for name, _, model in ways
        ]
        header = ["way", "first output s", "ratio", "very first s", "again ms", "anonymous MB"]
        print_table([*header, "resident MB", "files MB"], rows)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3])
    else:
        main()
