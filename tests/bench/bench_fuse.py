"""How long `onnxgen fuse` takes as models grow, beside onnxscript's fusions on the same file.

    python tests/bench/bench_fuse.py --cache /tmp/onnxgen-bench

Needs the extra `corpus` for the exports (minutes; kept in the folder of --cache, where the next run
finds them) and nothing but Linux or macOS otherwise. Every run is a process of its own, timed from
its start to its end, imports included. "work" is what is left without imports and start-up: the
seconds of the report. Peak memory counts the largest process of a run. Part of the work is the same
for every size, so growth also stands as the cost of a further node: linear where that stays equal.

Aims: `onnxgen fuse --no-verify` below 3 s at 32 layers on two cores, and work that grows no faster
than the nodes. Nothing is asserted here: machines differ, and so does what else they are doing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Nothing heavy: a child's peak memory is at least that of the process it was started from.
from common import exported, print_table

# A script around one function of onnxscript; it writes how long that took, loading and saving in.
ONNXSCRIPT = """
import json, sys, time
import onnx_ir as ir
{imports}
start = time.perf_counter()
model = ir.load(sys.argv[1])
nodes = sum(1 for _ in model.graph.all_nodes())
{work}
ir.save(model, sys.argv[2])
seconds = time.perf_counter() - start
after = sum(1 for _ in model.graph.all_nodes())
with open(sys.argv[3], "w") as file:
    json.dump({{"work": seconds, "nodes": [nodes, after], "note": note}}, file)
"""
FUSIONS = ONNXSCRIPT.format(
    imports="from onnxscript.rewriter.ort_fusions import optimize_for_ort",
    work="model, counts = optimize_for_ort(model)\n"
    "note = ', '.join(f'{v} {k}' for k, v in counts.items() if v)",
)
OPTIMIZE = ONNXSCRIPT.format(
    imports="from onnxscript.optimizer import optimize",
    work="optimize(model)\nnote = 'folding and clean-up only'",
)


@dataclass(frozen=True)
class Measured:
    """What the runs of one command gave, in seconds and bytes."""

    name: str
    layers: int
    walls: tuple[float, ...]
    works: tuple[float, ...]
    peak: int
    nodes: tuple[int, int]
    note: str = ""
    stages: Mapping[str, float] | None = None

    @property
    def wall(self) -> float:
        """The fastest run."""
        return min(self.walls)

    @property
    def work(self) -> float:
        """The fastest run's work, imports and start-up left out."""
        return min(self.works)


def run(command: Sequence[str]) -> tuple[float, int]:
    """Run a command to its end: seconds of wall clock, and the peak memory in bytes."""
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            text = said.read().decode(errors="replace")
            sys.exit(f"{text}\n{' '.join(command[:4])} … ended with {process.returncode}")
    return wall, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_onnxgen(path: Path, layers: int, runs: int, *, verify: bool) -> Measured:
    """`onnxgen fuse` on a file, several times."""
    name = "onnxgen fuse" if verify else "onnxgen fuse --no-verify"
    walls, works, peaks, reports = [], [], [], []
    for _ in range(runs):
        with tempfile.TemporaryDirectory(prefix="onnxgen-") as folder:
            out, report = Path(folder) / "fused.onnx", Path(folder) / "report.json"
            command = [sys.executable, "-m", "onnxgen", "fuse", str(path), "-o", str(out)]
            command += ["--report", str(report), *([] if verify else ["--no-verify"])]
            wall, peak = run(command)
            reports.append(json.loads(report.read_text("utf-8"))["report"])
        walls.append(wall)
        peaks.append(peak)
        works.append(sum(reports[-1]["seconds"].values()))
    best = reports[works.index(min(works))]
    nodes = (best["nodes_before"], best["nodes_after"])
    note = ", ".join(f"{count['fused']} {kind}" for kind, count in best["summary"].items())
    if verify:
        note += f"; {best['proof']['status']}, {len(best['proof']['cases'])} cases"
    return Measured(
        name, layers, tuple(walls), tuple(works), max(peaks), nodes, note, best["seconds"]
    )


def measure_script(name: str, source: str, path: Path, layers: int, runs: int) -> Measured:
    """One of onnxscript's functions on a file, several times."""
    walls, works, peaks = [], [], []
    said: dict[str, Any] = {}
    for _ in range(runs):
        with tempfile.TemporaryDirectory(prefix="onnxgen-") as folder:
            out, report = Path(folder) / "out.onnx", Path(folder) / "report.json"
            wall, peak = run([sys.executable, "-c", source, str(path), str(out), str(report)])
            said = json.loads(report.read_text("utf-8"))
        walls.append(wall)
        peaks.append(peak)
        works.append(said["work"])
    before, after = said["nodes"]
    return Measured(
        name, layers, tuple(walls), tuple(works), max(peaks), (before, after), said["note"]
    )


def print_growth(measured: Sequence[Measured]) -> None:
    """How the work grows with the layers."""
    stages = list(measured[-1].stages or {})
    header = ["layers", "nodes", "wall min", "wall median", "work min", "µs/node", "peak MB"]
    rows = []
    for each in measured:
        seconds = each.stages or {}
        rows.append(
            [
                str(each.layers),
                f"{each.nodes[0]:,} → {each.nodes[1]:,}",
                f"{each.wall:.2f} s",
                f"{statistics.median(each.walls):.2f} s",
                f"{each.work:.2f} s",
                f"{each.work / each.nodes[0] * 1e6:.0f}",
                f"{each.peak / 1e6:.0f}",
                *(f"{seconds.get(stage, 0.0):.2f}" for stage in stages),
            ]
        )
    print_table([*header, *stages], rows)
    steps = list(itertools.pairwise(measured))
    if len(measured) > 2:
        steps.append((measured[0], measured[-1]))
    for first, each in steps:
        more = each.nodes[0] - first.nodes[0]
        print(
            f"{first.layers} → {each.layers} layers: "
            f"{each.nodes[0] / first.nodes[0]:.2f}x the nodes, "
            f"{each.work / first.work:.2f}x the work, "
            f"{(each.work - first.work) / more * 1e6:.0f} µs a further node"
        )
    print()


def print_comparison(measured: Sequence[Measured]) -> None:
    """The tools on one file, and how much longer each takes than the first."""
    first = measured[0]
    header = [
        "tool",
        "runs",
        "wall min",
        "work min",
        "wall ratio",
        "work ratio",
        "peak MB",
        "nodes",
        "what",
    ]
    print_table(
        header,
        [
            [
                each.name,
                str(len(each.walls)),
                f"{each.wall:.2f} s",
                f"{each.work:.2f} s",
                f"{each.wall / first.wall:.1f}",
                f"{each.work / first.work:.1f}",
                f"{each.peak / 1e6:.0f}",
                f"{each.nodes[0]:,} → {each.nodes[1]:,}",
                each.note,
            ]
            for each in measured
        ],
    )


def bench(folder: Path, layers: Sequence[int], runs: int, *, others: bool) -> None:
    """Measure everything, and print it."""
    files = {count: exported(folder, "qwen3", "dynamo20", {"layers": count}) for count in layers}
    packages = ["onnxgen", "onnx", "onnx-ir", "onnxscript", "onnxruntime"]
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}")
    print(", ".join(f"{name} {version(name)}" for name in packages) + "\n")

    print(f"onnxgen fuse --no-verify, {runs} runs each\n")
    growth = [measure_onnxgen(files[count], count, runs, verify=False) for count in layers]
    print_growth(growth)

    largest = layers[-1]
    path = files[largest]
    print(f"{largest} layers\n")
    compared = [growth[-1], measure_onnxgen(path, largest, runs, verify=True)]
    if others:
        scripts = {"onnxscript optimize": OPTIMIZE, "onnxscript optimize_for_ort": FUSIONS}
        compared += [
            measure_script(name, source, path, largest, 1) for name, source in scripts.items()
        ]
    print_comparison(compared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, help="folder that keeps the exports")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--runs", type=int, default=3, help="of onnxgen; onnxscript runs once")
    parser.add_argument("--no-others", action="store_true", help="onnxgen alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="onnxgen-") as temporary:
        folder = options.cache or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench(folder, sorted(options.layers), options.runs, others=not options.no_others)


if __name__ == "__main__":
    main()
