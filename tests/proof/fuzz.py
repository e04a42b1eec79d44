"""Hostile models, by the thousand: each ends as documented, in time, in memory, in one sentence.

python -m tests.proof fuzz                 # 500 cases of all kinds
python -m tests.proof fuzz --long          # 20,000
python -m tests.proof.fuzz cycles 17       # one case: its command, files and outcome
python -m tests.proof.fuzz cycles 17 --keep DIR
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.proof.fork_server import Outcome, Server
from tests.proof.tables import Table

SHORT, LONG = 500, 20_000
SHOWN = 40  # failures that are listed


def measure(*, long: bool, jobs: int, seed: int) -> Table:
    """Run the cases, as many of each kind, on `jobs` servers."""
    from tests.proof.fuzz_cases import KINDS

    count = LONG if long else SHORT
    cases = [(list(KINDS)[at % len(KINDS)], at // len(KINDS)) for at in range(count)]
    shares = [cases[at::jobs] for at in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        found = [
            each for part in pool.map(lambda share: list(run(share, seed)), shares) for each in part
        ]
    return table(found, seed)


def run(cases: Iterable[tuple[str, int]], seed: int) -> Iterator[Outcome]:
    """The outcomes of cases, each of a kind and a number, on a server of their own."""
    with Server() as server:
        for kind, number in cases:
            found = server.run(kind, number, seed)
            if found.failures:
                print(f"{kind} {number}: {'; '.join(found.failures)}", file=sys.stderr, flush=True)
            yield found


def table(outcomes: list[Outcome], seed: int) -> Table:
    """Outcomes by kind."""
    rows = []
    for kind in [*dict.fromkeys(each.kind for each in outcomes), "all"]:
        some = [each for each in outcomes if kind in (each.kind, "all")]
        codes = [sum(each.status == code for each in some) for code in (0, 1, 2, 3, 4)]
        slowest, most = max(each.seconds for each in some), max(each.peak for each in some)
        failed = sum(bool(each.failures) for each in some)
        figures = [len(some), *codes, f"{slowest:.1f}", f"{most / 1e6:.0f}", failed]
        rows.append([kind, *map(str, figures)])
    return Table(
        name="fuzz",
        said=(
            f"{len(outcomes)} damaged models, drawn with seed {seed}, through fuse, to-paged and "
            "verify: how each command ended, the most processor time one took (at most 10 s), and "
            "the most memory a process of it held, shared libraries included (at most 1 GB)."
        ),
        header=["kind", "cases", "done", "differs", "usage", "refused", "file error", "slowest, s", "most, MB", "failures"],
        rows=rows,
        notes=[
            "A failure is a traceback, an undocumented exit code, other than one sentence, a "
            "signal, anything left behind, a report that is no JSON, or an output that does not "
            "load where the input does (onnx, its checker, ONNX Runtime).",
        ],
        failures=[
            f"{each.kind} {each.number}: {'; '.join(each.failures)} | {each.said[:200]}"
            for each in outcomes
            if each.failures
        ][:SHOWN],
    )  # fmt: skip


def main() -> None:
    from tests.proof import fuzz_judge
    from tests.proof.fuzz_cases import KINDS, make_case

    parser = argparse.ArgumentParser(description="Run one case again.")
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("number", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write its files into this folder")
    options = parser.parse_args()
    case = make_case(options.kind, options.number, options.seed)
    print("onnxgen", *case.words)
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        for name, content in case.files.items():
            (options.keep / name).write_bytes(content)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "case"
        found = fuzz_judge.outcome(options.kind, options.number, options.seed, folder)
        print((folder / "scratch" / "stdout").read_text("utf-8", "replace"))
        print((folder / "scratch" / "stderr").read_text("utf-8", "replace"))
    print(
        f"exit {found.status}, {found.seconds:.2f} s, {found.peak / 1e6:.0f} MB",
        *found.failures,
        sep="\n",
    )
    sys.exit(bool(found.failures))


if __name__ == "__main__":
    main()
