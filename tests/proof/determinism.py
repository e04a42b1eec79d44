"""The same input and options give the same bytes, in every process and on every Python.

Every command is run in several processes, which differ in the seed of Python's hashes, in their
folder's name, in the order of the commands and, in the long run, in the version of Python. What is
compared: exit code, words, every file written, and the report without times, memory and measured
differences.

    python -m tests.proof determinism --long
    ONNXGEN_PYTHONS=/usr/bin/python3.13:… python -m tests.proof determinism --long
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from onnxgen.testing import corpus, load_corpus_model
from tests.proof.tables import Table

HEADER = ("command", "exports", "of these written", "processes", "files", "that differ")
PYTHONS = "ONNXGEN_PYTHONS"
COMMANDS: dict[str, list[str]] = {
    "fuse": ["fuse", "model.onnx", "-o", "out/model.onnx"],
    "fuse --no-verify": ["fuse", "model.onnx", "-o", "out/model.onnx", "--no-verify"],
    "fuse --inline": ["fuse", "model.onnx", "-o", "out/model.onnx", "--inline", "--no-verify"],
    "fuse --target ort": ["fuse", "model.onnx", "-o", "out/model.onnx", "--target", "ort"],
    "to-paged": ["to-paged", "model.onnx", "-o", "out"],
    "to-paged --flavor ort": ["to-paged", "model.onnx", "-o", "out", "--flavor", "ort"],
}
SHORT = {
    "fuse": ["llama/dynamo20-fp16"],
    "fuse --no-verify": [
        "gemma2/transformers-static",
        "mixtral/torchscript-batched",
        "phi3/transformers",
    ],
    "fuse --inline": ["gpt_oss/dynamo20-dense"],
    "fuse --target ort": ["qwen3/dynamo20"],
    "to-paged --flavor ort": ["llama/torchscript"],
}
_MEASURED = {
    *("seconds", "memory", "difference", "rewrite_difference", "inner_difference", "effect"),
    *("worst", "output", "kernel"),
}
Found = dict[str, dict[str, str]]
"""By command and export: what each file holds, exit code and words among them."""


def measure(*, long: bool, jobs: int, seed: int) -> Table:
    """Some exports; the long run all of them, and on each Python that ONNXGEN_PYTHONS names."""
    exports = [entry.name for entry in corpus()]
    # What is verified takes long: each 16th export, from another one on for each command.
    some = {name: exports[start::16] for start, name in enumerate(COMMANDS)}
    wanted = {**some, "fuse --no-verify": exports} if long else SHORT
    work = [(name, each) for name, entries in wanted.items() for each in entries]
    others = [*filter(None, os.environ.get(PYTHONS, "").split(os.pathsep))]
    pythons = [sys.executable] * 2 + (others if long else [])
    seeds = [seed + number for number in range(len(pythons))]
    with ThreadPoolExecutor(max(jobs, 1)) as pool:
        found = list(pool.map(lambda each: run(work, *each), zip(pythons, seeds, strict=True)))
    rows, failures = [], []
    for name in wanted:
        mine = [f"{name} {each}" for command, each in work if command == name]
        differing = [
            f"{key}: {file}"
            for key in mine
            for file in sorted({file for each in found for file in each[key]})
            if len({each[key].get(file) for each in found}) > 1
        ]
        files = sum(len(found[0][key]) for key in mine)
        good = sum(found[0][key]["exit code"] == "0" for key in mine)
        counts = (len(mine), good, len(found), files, len(differing))
        rows.append((name, *map(str, counts)))
        failures += [f"not the same in every process: {each}" for each in differing]
    versions = sorted({_version(python) for python in pythons})
    note = f"Python {', '.join(versions)}; seeds of hashes {', '.join(map(str, seeds))}"
    said = (
        "Every command once in each process; files are what was written, the exit code and what "
        "was said, and the report without times and measured differences."
    )
    return Table("determinism", said, HEADER, rows, [note], failures)


def run(work: Sequence[tuple[str, str]], python: str, seed: int) -> Found:
    """What the commands give in a process of their own, in an order of its own."""
    with tempfile.TemporaryDirectory(prefix=f"onnxgen-{'x' * seed}") as folder:
        environment = {
            **os.environ,
            "PYTHONHASHSEED": str(seed),
            "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]),
        }
        process = subprocess.run(
            [python, "-m", "tests.proof.determinism", folder],
            input=json.dumps(list(work)[:: -1 if seed % 2 else 1]),
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            check=True,
        )
        found: Found = json.loads(process.stdout.splitlines()[-1])
        return found


def _version(python: str) -> str:
    code = "import platform; print(platform.python_version())"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def _work(folder: Path) -> None:
    """In a process: every command in a folder of its own."""
    from click.testing import CliRunner

    from onnxgen.cli import main

    found: Found = {}
    for number, (name, export) in enumerate(json.loads(sys.stdin.read())):
        place = folder / str(number)
        (place / "out").mkdir(parents=True)
        os.chdir(place)
        model = load_corpus_model(export).SerializeToString(deterministic=True)
        Path("model.onnx").write_bytes(model)
        result = CliRunner().invoke(main, [*COMMANDS[name], "--report", "report.json"])
        files = {"exit code": str(result.exit_code), "said": result.stderr}
        files["report"] = json.dumps(_unmeasured(json.loads(Path("report.json").read_bytes())))
        for path in sorted(Path("out").rglob("*")):
            files[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        found[f"{name} {export}"] = files
    print(json.dumps(found))


def _unmeasured(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unmeasured(each) for key, each in value.items() if key not in _MEASURED}
    return [_unmeasured(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
