"""How much memory verification by layers takes, beside the size of the model.

    python tests/bench/bench_verify.py /tmp/onnxgen-bench                 # 16 GB of real weights
    python tests/bench/bench_verify.py /tmp/onnxgen-bench --layers 4      # less

Writes a decoder whose weights are random numbers, fuses it with `--verify layers`, and prints the
most anonymous memory that the processes held together (pages of mapped files are the system's to
drop). Aim: less than 4 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from common import print_table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from onnxgen.bounds import anonymous_memory
from tests.large_decoder import Sizes, write_decoder


def family(process: int) -> list[int]:
    """A process and those that it started."""
    found = [process]
    for task in Path(f"/proc/{process}/task").iterdir():
        found += [
            each for child in (task / "children").read_text().split() for each in family(int(child))
        ]
    return found


def peak_of(command: list[str]) -> tuple[float, float]:
    """Run a command: GB of anonymous memory at most, its children's too, and seconds."""
    began, most = time.perf_counter(), 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            try:
                most = max(most, sum(map(anonymous_memory, family(process.pid))))
            except OSError:
                continue
            time.sleep(0.01)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return most / 1e9, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--verify", nargs="+", default=["layers"])
    options = parser.parse_args()
    folder = options.folder / "large"
    folder.mkdir(parents=True)
    sizes = Sizes(options.layers, options.hidden, 2 * options.hidden, 32, 8, 32000)
    try:
        path = write_decoder(folder, sizes)
        report = folder / "report.json"
        rows = []
        for budget in options.verify:
            words = ["--verify", budget, "--report", str(report)]
            anonymous, seconds = peak_of(
                [sys.executable, "-m", "onnxgen", "fuse", str(path), *words]
            )
            proof = json.loads(report.read_text("utf-8"))["report"]["proof"]
            parts = f"{proof['layers_run']} of {proof['layers']}" if proof["layers"] else "all"
            worst = f"{proof['worst']['difference']:.1e}"
            figures = (sizes.bytes / 1e9, anonymous, seconds)
            rows.append(
                [budget, *(f"{each:.2f}" for each in figures), parts, proof["status"], worst]
            )
        header = [
            "--verify",
            "weights GB",
            "anonymous GB",
            "seconds",
            "parts run",
            "status",
            "difference",
        ]
        print_table(header, rows)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
