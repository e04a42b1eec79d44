"""How fast the written models run, beside the export itself and what other tools make of it.

    python tests/bench/bench_targets.py --cache /tmp/onnxgen-bench
    python tests/bench/bench_targets.py --cache /tmp/onnxgen-bench --model bert --forms dynamo20

Needs the extra `corpus` for the exports, and onnxruntime-genai for its builder's model (both take
minutes once and are kept in the folder of --cache); a tool that is not installed has no rows. Six
layers of the shape of a 0.5B model (qwen2.5-0.5B, but for a vocabulary of 32,000), random weights,
the same in every file, fp32. Everything is run by `session.run` on the same values, in turns; a
figure is the fastest run: its processor time for one thread, which other load hardly changes, and
the clock on the wall for more. Every model is loaded several times, because where its weights come
to lie in memory makes up to a tenth of a decoding step. "shared" is a model as onnxruntime-genai
runs it: bound once, past and present in one buffer, nothing copied.

Ratios are to the export measured in the same turns: below 1.00 is faster. In brackets: to the
fastest of what other tools made, run alike. The last column is the largest difference of the first
output, in standard deviations of the export's. Nothing is asserted here: machines differ.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from common import built, exported, fused, print_table

from onnxgen.testing import CORPUS, make_feeds

DECODER = {"layers": 6, "heads": 14, "kv_heads": 2, "head_size": 64, "hidden": 896}
DECODER |= {"inner": 4864, "vocab": 32000, "positions": 4096}
ENCODER = {"layers": 6, "heads": 12, "head_size": 64, "hidden": 768, "inner": 3072}
ENCODER |= {"vocab": 32000, "positions": 512, "window": 128}

SMALL = ("bert", "distilbert", "modernbert", "vit", "clip_vision", "t5_encoder", "t5_decoder")
SMALL += ("whisper_encoder", "whisper_decoder", "gpt2", "opt", "bloom")

# (batch, new, past)
CASES = {
    "decoder": {
        "decode at 128": (1, 1, 128),
        "decode at 2,048": (1, 1, 2048),
        "decode 8 x 512": (8, 1, 512),
        "prefill 256": (1, 256, 0),
    },
    "encoder": {"1 x 128": (1, 128, 0), "8 x 128": (8, 128, 0)},
    "cross": {"decode at 128": (1, 1, 128), "decode 8 x 128": (8, 1, 128)},
    "vision": {"1 image": (1, 1, 0), "8 images": (8, 1, 0)},
    "audio": {"1": (1, 1, 0), "8": (8, 1, 0)},
}
TARGETS = ["onnx", "ort", "ort --padding right", "ort --padding none"]
EXPORTERS = ("torchscript", "dynamo20", "transformers", "dynamo23")

Feeds = Mapping[str, np.ndarray[Any, Any]]


@dataclass
class Candidate:
    """A model file to measure.

    Attributes:
        name: what the row is called.
        path: the model.
        kind: "export", "ours" or "other".
        new: what it takes as new tokens; None for any number.
        shared: past and present are bound to one buffer.
        session: while it is being measured.
    """

    name: str
    path: Path
    kind: str
    new: int | None = None
    shared: bool = False
    session: Any = None
    times: dict[str, list[float]] = field(default_factory=dict)
    differences: list[float] = field(default_factory=list)

    def open(self, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(
            str(self.path), options, providers=["CPUExecutionProvider"]
        )

    def takes(self, new: int) -> bool:
        return self.new in (None, new) and not (self.shared and new > 1)


def candidates(
    folder: Path, model: str, form: str, dims: Mapping[str, int], targets: Sequence[str]
) -> list[Candidate]:
    """The export and what onnxgen makes of it; fused anew at each run."""
    path = exported(folder, model, form, dims)
    found = [Candidate(f"{form}: export", path, "export")]
    for target in targets:
        out = fused(path, target)
        found.append(Candidate(f"{form}: {target}", out, "ours"))
        if target.startswith("ort"):
            found.append(Candidate(f"{form}: {target}, shared", out, "ours", shared=True))
    return found


def others(folder: Path, model: str, kind: str, dims: Mapping[str, int]) -> list[Candidate]:
    """What other tools make of the same weights."""
    found: list[Candidate] = []
    for mods, new in (("", None), ("-decode", 1)):
        if kind == "decoder" or not mods:
            name = "transformers ort_fusions" + (", one token" if new else "")
            path = exported(folder, model, f"transformers-ortfused{mods}", dims)
            found.append(Candidate(name, path, "other", new))
    try:
        version("onnxruntime-genai")
    except ModuleNotFoundError:
        return found
    if kind == "decoder":
        path = built(folder, model, dims)
        found.append(Candidate("genai builder", path, "other"))
        found.append(Candidate("genai builder, shared", path, "other", shared=True))
    return found


def feeds_for(candidate: Candidate, info: Mapping[str, Any], feeds: Feeds) -> Feeds:
    """The same values under the candidate's names."""
    by_role: dict[str, list[str]] = {}
    for name, entry in info["inputs"].items():
        by_role.setdefault(entry["role"], []).append(name)
    own = candidate.session.get_modelmeta().custom_metadata_map.get(CORPUS)
    roles = {} if own is None else {n: e["role"] for n, e in json.loads(own)["inputs"].items()}
    counts: dict[str, int] = {}
    given = {}
    for value in candidate.session.get_inputs():
        role = roles.get(value.name) or _role(value.name)
        index = counts[role] = counts.get(role, -1) + 1
        given[value.name] = feeds[by_role[role][index]]
    if not roles:  # the builder's: all keys, then all values, each in order of its number
        for value in candidate.session.get_inputs():
            number = re.search(r"\.(\d+)\.", value.name)
            if number:
                given[value.name] = feeds[by_role[_role(value.name)][int(number[1])]]
    return given


def _role(name: str) -> str:
    """The role of an input of onnxruntime-genai's builder."""
    plain = {"input_ids": "ids", "attention_mask": "mask", "position_ids": "positions"}
    return plain.get(name) or ("past_key" if name.endswith("key") else "past_value")


def runner(candidate: Candidate, feeds: Feeds) -> Callable[[], np.ndarray[Any, Any]]:
    """A call that runs the candidate once and returns its first output."""
    session = candidate.session
    if not candidate.shared:
        return lambda: session.run(None, feeds)[0]
    total = max(v.shape[1] for v in feeds.values() if v.ndim == 2)
    binding = session.io_binding()
    outputs = [value.name for value in session.get_outputs()]
    pasts = [name for name in feeds if feeds[name].ndim == 4]
    for name in feeds:
        if name not in pasts:
            binding.bind_cpu_input(name, feeds[name])
    for past, present in zip(_in_order(pasts), _in_order(outputs[1:]), strict=True):
        batch, heads, length, size = feeds[past].shape
        buffer = np.zeros((batch, heads, total, size), feeds[past].dtype)
        buffer[:, :, :length] = feeds[past]
        value = onnxruntime.OrtValue.ortvalue_from_numpy(buffer)
        binding.bind_ortvalue_input(past, value)
        binding.bind_ortvalue_output(present, value)
    binding.bind_output(outputs[0])

    def run() -> np.ndarray[Any, Any]:
        session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()

    return run


def _in_order(names: Iterable[str]) -> list[str]:
    """Cache names: keys, then values, by layer."""

    def place(name: str) -> tuple[bool, int]:
        number = re.search(r"\.(\d+)\.", name)
        return "value" in name.rsplit(".", 1)[-1], int(number[1]) if number else 0

    return sorted(names, key=place)


def measure(
    found: Sequence[Candidate],
    info: Mapping[str, Any],
    cases: Mapping[str, Any],
    seconds: float,
    clock: Callable[[], float],
) -> None:
    """Run all of them in turns, and keep every time."""
    for case, (batch, new, past) in cases.items():
        feeds = make_feeds(info, batch, new, past)
        runs: dict[str, Callable[[], np.ndarray[Any, Any]]] = {}
        reference: np.ndarray[Any, Any] | None = None
        for candidate in found:
            if not candidate.takes(new):
                continue
            try:
                run = runner(candidate, feeds_for(candidate, info, feeds))
                first = np.array(run())
            except Exception as error:
                words = " ".join(str(error).split())[:200]
                print(f"{candidate.name}, {case}: {words}", file=sys.stderr)
                continue
            if reference is None:
                reference = first
            spread = float(reference.std())
            # A model may give the last row alone.
            same = reference[:, -first.shape[1] :] if first.ndim == 3 else reference
            candidate.differences.append(float(np.abs(first - same).max()) / spread)
            runs[candidate.name] = run
            candidate.times.setdefault(case, [])
        by_name = {candidate.name: candidate for candidate in found}
        order = list(runs)
        end = time.perf_counter() + seconds
        turn = 0
        while time.perf_counter() < end or turn < 5:
            turn += 1
            order = order[1:] + order[:1]  # no one always runs behind the same other
            for name in order:
                start = clock()
                runs[name]()
                by_name[name].times[case].append(clock() - start)


def report(found: Sequence[Candidate], cases: Iterable[str]) -> None:
    """One table: ratios to the export of the same turns, and the export's milliseconds."""
    cases = list(cases)
    base = next(c for c in found if c.kind == "export")
    rows = []
    for candidate in found:
        cells = []
        for case in cases:
            if case not in candidate.times:
                cells.append("-")
                continue
            fastest = min(candidate.times[case])
            rivals = [
                min(c.times[case])
                for c in found
                if c.kind == "other" and c.shared == candidate.shared and case in c.times
            ]
            best = min(rivals, default=0.0)
            if candidate is base:
                cells.append(f"{fastest * 1e3:.2f} ms")
            else:
                cells.append(f"{fastest / min(base.times[case]):.2f}")
            if candidate.kind == "ours" and best:
                cells[-1] += f" ({fastest / best:.2f})"
        difference = f"{max(candidate.differences):.1e}" if candidate.differences else "-"
        rows.append([candidate.name, *cells, difference])
    print_table(["model", *cases, "difference"], rows)


def bench(folder: Path, form: str, options: argparse.Namespace) -> None:
    """Measure one form of the model, and print its tables."""
    dims = ENCODER if options.model in SMALL else DECODER
    found = candidates(folder, options.model, form, dims, options.targets)
    proto = onnx.load(found[0].path, load_external_data=False)
    info = json.loads(next(p.value for p in proto.metadata_props if p.key == CORPUS))
    del proto
    if not options.no_others:
        found += others(folder, options.model, info["kind"], dims)
    cases = CASES[info["kind"]]
    for threads in options.threads:
        clock = time.thread_time if threads == 1 else time.perf_counter
        for candidate in found:
            candidate.times, candidate.differences = {}, []
        for repeat in range(options.repeats):
            base, *rest = found
            turn = repeat * len(rest) // options.repeats
            order = [base, *rest[turn:], *rest[:turn]]
            for candidate in order:
                candidate.open(threads)
            measure(order, info, cases, options.seconds / options.repeats, clock)
            for candidate in order:
                candidate.session = None
            gc.collect()
        print(f"{options.model}, {form}, {threads} thread{'s' if threads > 1 else ''}\n")
        report(found, cases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, help="folder that keeps the models")
    parser.add_argument("--model", default="qwen2", help="a model of the corpus")
    parser.add_argument("--forms", nargs="+", default=list(EXPORTERS))
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="words of --target")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=15, help="for each case")
    parser.add_argument("--repeats", type=int, default=3, help="loads of each model")
    parser.add_argument("--no-others", action="store_true")
    options = parser.parse_args()
    packages = ["onnxruntime", "onnx", "torch", "transformers"]
    print(f"{os.cpu_count()} cores, {platform.machine()}; ", end="")
    print(", ".join(f"{name} {version(name)}" for name in packages) + "\n")
    with tempfile.TemporaryDirectory(prefix="onnxgen-") as temporary:
        folder = options.cache or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for form in options.forms:
            bench(folder, form, options)


if __name__ == "__main__":
    main()
