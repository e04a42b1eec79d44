"""How far the proof can be trusted, measured: the checker is checked, and what it reads is hostile.

    python -m tests.proof                    # all, in minutes: what CI runs too
    python -m tests.proof fuzz --long        # one measurement, the long run behind PROOF.md
    python -m tests.proof --long --write     # tests/proof/PROOF.md

Exits with 1 where something is that must not be.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from tests.proof import tables

MEASUREMENTS = ("mutants", "fuzz", "files", "determinism")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", choices=[[], *MEASUREMENTS], help="all unless named")
    parser.add_argument("--long", action="store_true", help="the long run behind PROOF.md")
    parser.add_argument("--write", action="store_true", help="write PROOF.md")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = []
    for name in options.names or MEASUREMENTS:
        module = importlib.import_module(f"tests.proof.{name}")
        table = module.measure(long=options.long, jobs=options.jobs, seed=options.seed)
        print(table, flush=True)
        found.append(table)
    if options.write:
        tables.write(found)
    failures = [f"{table.name}: {line}" for table in found for line in table.failures]
    for line in failures:
        print(f"Failure: {line}", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
