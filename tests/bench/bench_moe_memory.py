"""How much memory writing a mixture of experts for `--target ort` takes, beside its size.

    python tests/bench/bench_moe_memory.py /tmp/onnxgen-bench

Makes a model of two layers whose experts lie in a sparse file, 8 GB that take no place, writes it
with `onnxgen fuse --target ort --no-verify`, and prints the most anonymous memory that the process
held (pages of mapped files are the system's to drop). Experts hold halves, which the kernel wants
in turns: every one is rewritten. Its zeros become holes again. Aim: less than 1 GB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import onnx
import onnx_ir as ir
from common import print_table
from onnx import helper

from onnxgen import functions
from onnxgen.functions import moe

OVERLOAD = "swiglu"
LAYERS, SLOTS = 2, 2


def mixture(folder: Path, experts: int, hidden: int, inner: int) -> tuple[Path, int]:
    """A model of onnxgen::MoE nodes, and the bytes of its experts."""
    nodes, tensors, size = [], [], 0
    x = "x"
    for layer in range(LAYERS):
        made = {
            "router": [hidden, experts],
            "fc1": [experts, 2 * inner, hidden],
            "fc2": [experts, hidden, inner],
        }
        for name, dims in made.items():
            tensor = onnx.TensorProto(name=f"{name}.{layer}", dims=dims, data_type=1)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            length = 4 * dims[0] * dims[1] * (dims[2] if len(dims) > 2 else 1)
            for key, value in (("location", "moe.data"), ("offset", size), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            size += length
        said = {name: f"{name}.{layer}" for name in ("logits", "p", "v", "i", "s", "w", "y", "z")}
        nodes += [
            helper.make_node("MatMul", [x, f"router.{layer}"], [said["logits"]]),
            helper.make_node("Softmax", [said["logits"]], [said["p"]]),
            helper.make_node("TopK", [said["p"], "slots"], [said["v"], said["i"]]),
            helper.make_node("ReduceSum", [said["v"], "last"], [said["s"]]),
            helper.make_node("Div", [said["v"], said["s"]], [said["w"]]),
            helper.make_node(
                moe.NAME,
                [x, said["w"], said["i"], f"fc1.{layer}", "", f"fc2.{layer}"],
                [said["y"]],
                domain=functions.DOMAIN,
                overload=OVERLOAD,
            ),
            helper.make_node("Add", [x, said["y"]], [said["z"]]),
        ]
        x = said["z"]
    tensors += [
        helper.make_tensor("slots", onnx.TensorProto.INT64, [1], [SLOTS]),
        helper.make_tensor("last", onnx.TensorProto.INT64, [1], [-1]),
    ]
    info = [helper.make_tensor_value_info(name, 1, ["t", hidden]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "moe", info[:1], info[1:], tensors)
    own = ir.node(moe.NAME, [], domain=functions.DOMAIN, overload=OVERLOAD)
    model = helper.make_model(
        graph,
        functions=functions.called([own], 24),
        opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid(functions.DOMAIN, 1)],
        ir_version=10,
    )
    path = folder / "moe.onnx"
    path.write_bytes(model.SerializeToString())
    with (folder / "moe.data").open("wb") as file:
        file.truncate(size)
    return path, size


def peak_of(command: list[str]) -> tuple[float, float, float]:
    """Run a command: GB of anonymous memory and of mapped files at most, and seconds."""
    began = time.perf_counter()
    anonymous = files = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            try:
                text = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            held = {
                line.split(":")[0]: line.split()[1] for line in text.splitlines() if "kB" in line
            }
            anonymous = max(anonymous, int(held.get("RssAnon", 0)))
            files = max(files, int(held.get("RssFile", 0)))
            time.sleep(0.005)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return anonymous / 1e6, files / 1e6, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where the model goes, and what is written")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=2560)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path, size = mixture(options.folder, options.experts, options.hidden, options.inner)
    output = options.folder / "written.onnx"
    command = [sys.executable, "-m", "onnxgen", "fuse", str(path), "-o", str(output)]
    rows = []
    for target in ("onnx", "ort"):
        for old in options.folder.glob("written*"):
            old.unlink()
        words = ["--target", target, "--no-verify", "--force"]
        anonymous, files, seconds = peak_of([*command, *words])
        kinds = {node.domain for node in onnx.load(output, load_external_data=False).graph.node}
        assert ("com.microsoft" in kinds) == (target == "ort"), kinds
        rows.append([target, *(f"{each:.2f}" for each in (size / 1e9, anonymous, files, seconds))])
    print_table(["target", "experts GB", "anonymous GB", "of files GB", "seconds"], rows)
    for each in (path, path.with_name("moe.data"), *options.folder.glob("written*")):
        each.unlink()


if __name__ == "__main__":
    main()
