"""Hostile models: five hundred of them, each ending as documented; and the judge of that, judged."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.proof import fuzz, fuzz_judge

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="waits on process handles")
FUSE = ("ends", 8)  # a case that is fused, prints text and writes no report


def test_five_hundred_hostile_models() -> None:
    table = fuzz.measure(long=False, jobs=1, seed=0)
    assert not table.failures, "\n".join(table.failures)
    assert table.rows[-1][1] == str(fuzz.SHORT)


# One case of each cause that the long run found, and that is mended.
MENDED = """
    domains 114, names 181, containers 193, metadata 194, skeletons 198, skeletons 238, external 233,
    zeros 246, flipped 268, metadata 296, surroundings 320, fields 317, types 352, subgraphs 352,
    types 410, subgraphs 446, ends 457, narrow 470, axes 494, nested 538, types 559, types 569,
    types 592, narrow 678, axes 687, narrow 700, zeros 186, zeros 260
"""


def test_what_was_mended_stays_so() -> None:
    cases = [(kind, int(number)) for kind, number in map(str.split, MENDED.split(","))]
    found = [each for each in fuzz.run(cases, 0) if each.failures]
    assert not found, found


def test_one_case_is_the_same_again(tmp_path: Path) -> None:
    from tests.proof.fuzz_cases import KINDS, make_case

    for kind in KINDS:
        assert make_case(kind, 3) == make_case(kind, 3)
        assert make_case(kind, 3).files != make_case(kind, 3, seed=1).files


def _say(*lines: str) -> int:
    print(*lines, sep="\n", file=sys.stderr)
    return 3


def _raise() -> int:
    raise ValueError("no")


def _spin() -> int:
    until = time.process_time() + 1
    while time.process_time() < until:
        pass
    return _say("Error: late")


def _hold() -> int:
    held = bytearray(1_100_000_000)
    held[::4096] = b"x" * len(held[::4096])
    return _say("Error: much")


def _leave() -> int:
    Path(".out.onnx.tmp").touch()
    return _say("Error: no")


def _orphan() -> int:
    if os.fork() == 0:
        time.sleep(60)
    return _say("Error: alone")


def _write_nonsense() -> int:
    Path("out.onnx").write_bytes(b"\xff\xff")
    return 0


@pytest.mark.parametrize(
    ("work", "failure"),
    [
        (lambda: _say("Error: onnxgen failed unexpectedly (X)"), "it failed unexpectedly"),
        (_raise, "it raised"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV) or 0, "it was killed by signal 11"),
        (_spin, "it took 1 s"),
        (_hold, "it held"),
        (_leave, "it left .out.onnx.tmp behind"),
        (lambda: _say("Error: one", "Error: two"), "it said 2 lines, not one"),
        (lambda: _say("Error: \x1b[31m"), "its sentence is too long, or holds what"),
        (lambda: _say("Error: not enough memory"), "it asked for more memory"),
        (lambda: 7, "exit code 7"),
        (_orphan, "a process was left behind"),
        (lambda: 0, "it is done, and there is no output"),
        (_write_nonsense, "the output does not load"),
    ],
)
def test_the_judge_sees_it(
    work: Callable[[], int], failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz_judge, "SECONDS", 0.5 if work is _spin else 10.0)
    found = fuzz_judge.outcome(*FUSE, 0, tmp_path / "case", instead=work)
    assert any(each.startswith(failure) for each in found.failures), found


def test_the_judge_takes_what_is_right(tmp_path: Path) -> None:
    found = fuzz_judge.outcome(*FUSE, 0, tmp_path / "case", instead=lambda: _say("Error: so it is"))
    assert found.failures == []
