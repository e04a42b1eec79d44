"""How many nodes a layer has in `--target ort`, beside what onnxruntime-genai's builder writes.

    python tests/bench/bench_nodes.py --cache /tmp/onnxgen-bench

Needs the extras `corpus` and `genai`. Small random models, exported and built with two numbers of
layers; a layer is the difference. gemma2 alternates two kinds of layers, so it grows by pairs.
Aim: at most two nodes more than the builder, from every exporter. Nothing is asserted here.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import onnx
from common import built, exported, fused, print_table

MODELS = ("llama", "qwen2", "qwen3", "phi3", "gemma2")
FORMS = ("torchscript", "dynamo20", "transformers", "dynamo23")
TARGETS = ("onnx", "ort", "ort --padding right", "ort --padding none")
# Sizes that GroupQueryAttention takes, and that every configuration can say.
DIMS = {"heads": 6, "kv_heads": 3, "head_size": 32, "hidden": 192, "inner": 112, "vocab": 131}
DIMS |= {"positions": 96, "window": 8}


def ops(path: Path) -> Counter[str]:
    """How many nodes of each op type the model has, constants aside."""
    graph = onnx.load(path, load_external_data=False).graph
    return Counter(node.op_type for node in graph.node if node.op_type != "Constant")


def of_a_layer(small: Path, large: Path, layers: int) -> tuple[float, str]:
    """Nodes a layer, and which."""
    more = ops(large)
    more.subtract(ops(small))
    said = ", ".join(f"{count / layers:g} {op}" for op, count in sorted(more.items()) if count)
    return sum(more.values()) / layers, said


def measure(folder: Path, model: str, forms: Sequence[str]) -> list[list[str]]:
    """Rows of the table for one model."""
    step = 2 if model == "gemma2" else 1
    sizes = [{**DIMS, "layers": 2}, {**DIMS, "layers": 2 + step}]
    builder, said = of_a_layer(*(built(folder, model, dims) for dims in sizes), step)
    rows = [[model, "genai builder", f"{builder:g}", "", said]]
    for form in forms:
        files = [exported(folder, model, form, dims) for dims in sizes]
        before, _ = of_a_layer(files[0], files[1], step)
        rows.append([model, f"{form}: export", f"{before:g}", f"{before - builder:+g}", ""])
        for target in TARGETS:
            count, said = of_a_layer(*(fused(path, target) for path in files), step)
            rows.append([model, f"{form}: {target}", f"{count:g}", f"{count - builder:+g}", said])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, help="folder that keeps the models")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--forms", nargs="+", default=FORMS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="onnxgen-") as temporary:
        folder = options.cache or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for model in options.models:
            print(f"{model} …", file=sys.stderr, flush=True)
            rows += measure(folder, model, options.forms)
    print_table(["model", "written by", "nodes a layer", "to the builder's", "which"], rows)


if __name__ == "__main__":
    main()
