"""Wherever a blob cannot be used, or fails, the nodes themselves answer; and it is said why."""

from __future__ import annotations

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxgen
from onnxgen.backends.interface import BackendError, Identity
from onnxgen.contexts.forms import KEY, Encoding
from tests.fake_backend import Fake, answers, assert_equal, use_fakes, with_regions
from tests.test_session import REGIONS, TEXT, X, saved

rng = np.random.default_rng(9)
WEIGHTS = {
    "w": rng.standard_normal((6, 5)).astype(np.float32),
    "v": rng.standard_normal((5, 4)).astype(np.float32),
}
ALL = {"all": [0, 1, 2, 3]}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    return use_fakes(monkeypatch)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return saved(TEXT, tmp_path, **WEIGHTS)


def reasons(session: onnxgen.Session) -> dict[str, list[str]]:
    """By region."""
    return {each.region.name: [p.reason for p in each.passed] for each in session.choices}


@pytest.mark.parametrize("error", [BackendError("so it is"), RuntimeError("so it is"), KeyError()])
@pytest.mark.parametrize("fails", ["identity", "refuses", "load", "bind"])
def test_what_fails_when_it_is_loaded(
    plain: Path, fakes: dict[str, Fake], fails: str, error: Exception
) -> None:
    path = with_regions(plain, REGIONS, ["fake:CPU"])
    fakes["fake"].fails, fakes["fake"].error = fails, error
    session = onnxgen.load(path)
    assert session.picked == dict.fromkeys(REGIONS, "original")
    wanted = str(error) if str(error) else "KeyError"
    assert all(wanted in found[0] for found in reasons(session).values())
    assert_equal(session.run(None, {"x": X}), answers(plain, {"x": X}))
    assert fakes["fake"].runs == 0


@pytest.mark.parametrize("error", [BackendError("so it is"), RuntimeError("so it is")])
@pytest.mark.parametrize("run", [1, 3])
def test_what_fails_when_it_is_run(
    plain: Path,
    fakes: dict[str, Fake],
    run: int,
    error: Exception,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = with_regions(plain, ALL, ["fake:CPU"])
    fakes["fake"].fails, fakes["fake"].error = f"run {run}", error
    session = onnxgen.load(path)
    for number in range(1, 6):
        feeds = {"x": X * number}
        with caplog.at_level(logging.INFO, "onnxgen.load"):
            caplog.clear()
            assert_equal(session.run(None, feeds), answers(plain, feeds))
        failed = number >= run
        assert session.picked == {"all": "original" if failed else "fake:CPU"}
        said = [record.message for record in caplog.records]
        assert bool(said) == (number == run)
        if said:
            assert f"fake:CPU is not used: it failed: {type(error).__name__}: so it is" in said[0]
            assert "region 'all' is run by the original nodes" in said[1]
    assert fakes["fake"].runs == run


def test_too_many_outputs_are_no_answer(plain: Path, fakes: dict[str, Fake]) -> None:
    fakes["fake"].fails = "outputs"
    session = onnxgen.load(with_regions(plain, ALL, ["fake:CPU"]))
    assert_equal(session.run(None, {"x": X}), answers(plain, {"x": X}))
    assert session.picked == {"all": "original"}


@pytest.mark.parametrize("fails", ["load", "bind", "run 1"])
def test_the_next_backend_takes_over(plain: Path, fakes: dict[str, Fake], fails: str) -> None:
    path = with_regions(plain, ALL, ["fake:CPU", "other:CPU"])
    fakes["fake"].fails = fails
    session = onnxgen.load(path)
    assert_equal(session.run(None, {"x": X}), answers(plain, {"x": X}))
    assert session.picked == {"all": "other:CPU"}
    assert fakes["other"].runs == 1


@pytest.mark.parametrize("encoding", ["function", "metadata"])
@pytest.mark.parametrize("fails", ["load", "bind", "run 1"])
def test_one_region_falls_back_and_another_does_not(
    plain: Path, fakes: dict[str, Fake], fails: str, encoding: Encoding
) -> None:
    backends = {"first": ["fake:CPU"], "second": ["other:CPU"]}
    path = with_regions(plain, REGIONS, backends, encoding)
    for bad, good, name in (("fake", "second", "other"), ("other", "first", "fake")):
        fakes[bad].fails, fakes[name].fails = fails, ""
        fakes[bad].runs = fakes[name].runs = 0
        session = onnxgen.load(path)
        for _ in range(3):
            assert_equal(session.run(None, {"x": X}), answers(plain, {"x": X}))
        assert session.picked[good] == f"{name}:CPU"
        assert sorted(session.picked.values()) == sorted(["original", f"{name}:CPU"])
        assert fakes[name].runs >= 3


@pytest.mark.parametrize("prefer", [None, ["fake:CPU"], []])
@pytest.mark.parametrize(
    "wrong", [X.astype(np.float64), X[0], X[:, :5], X.reshape(1, 3, 6), np.array(["a"])]
)
@pytest.mark.parametrize("regions", [ALL, REGIONS, {"second": [2, 3]}])
def test_a_wrong_feed_is_the_users_fault(
    plain: Path,
    fakes: dict[str, Fake],
    wrong: Any,
    prefer: list[str] | None,
    regions: dict[str, list[int]],
) -> None:
    session = onnxgen.load(with_regions(plain, regions, ["fake:CPU"]), prefer=prefer)
    before = session.picked
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        answers(plain, {"x": wrong})
    with pytest.raises(type(theirs.value)) as ours:
        session.run(None, {"x": wrong})
    assert str(ours.value) == str(theirs.value)
    assert session.picked == before
    runs = fakes["fake"].runs
    assert_equal(session.run(None, {"x": X}), answers(plain, {"x": X}))
    assert fakes["fake"].runs - runs == (len(regions) if prefer != [] else 0)


def test_threads_in_the_middle_of_a_failure(plain: Path, fakes: dict[str, Fake]) -> None:
    fakes["fake"].fails = "run 11"
    session = onnxgen.load(with_regions(plain, ALL, ["fake:CPU", "other:CPU"]))

    def ask(number: int) -> list[Any] | None:
        if number % 5:
            return session.run(None, {"x": X * number})
        with pytest.raises(Exception):  # noqa: B017, PT011
            session.run(None, {"x": X[:, :5]})
        return None

    with ThreadPoolExecutor(8) as pool:
        for number, found in enumerate(pool.map(ask, range(60))):
            if found is not None:
                assert_equal(found, answers(plain, {"x": X * number}))
    assert session.picked["all"] in ("fake:CPU", "other:CPU")


def test_a_wrong_feed_does_not_bring_back_what_failed_meanwhile(
    plain: Path, fakes: dict[str, Fake]
) -> None:
    session = onnxgen.load(with_regions(plain, ALL, ["fake:CPU", "other:CPU"]))
    entered, failed = threading.Event(), threading.Event()

    def wait() -> None:
        fakes["fake"].hook = lambda: None  # the next run is that of this thread
        entered.set()
        assert failed.wait(60)

    fakes["fake"].hook, fakes["fake"].fails = wait, "run 1"
    with ThreadPoolExecutor(1) as pool:
        wrong = pool.submit(session.run, None, {"x": X.astype(np.float64)})
        assert entered.wait(60)
        assert_equal(session.run(None, {"x": X}), answers(plain, {"x": X}))
        assert session.picked == {"all": "other:CPU"}
        failed.set()
        assert "double" in str(wrong.exception())
    assert session.picked == {"all": "other:CPU"}


@pytest.mark.parametrize("encoding", ["function", "metadata"])
def test_a_value_between_of_no_known_type(
    tmp_path: Path, fakes: dict[str, Fake], encoding: Encoding
) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
        g (float[n,6] x) => (float[n,6] y) { a = Relu(x)  z = Neg(x)  b = Exp(a)  y = Add(b, z) }"""
    plain = saved(text, tmp_path)
    path = with_regions(plain, {"r": [2]}, ["fake:CPU"], encoding)
    assert onnxgen.load(path).picked == {"r": "fake:CPU"}
    model = onnx.load(path)
    [header] = [each for each in model.metadata_props if each.key == KEY]
    table = json.loads(header.value)
    assert table.pop("types")
    header.value = json.dumps(table)
    onnx.save(model, path)
    session = onnxgen.load(path)
    assert session.picked == {"r": "original"}
    assert "the type of 'z'" in reasons(session)["r"][0]
    assert_equal(session.run(None, {"x": X}), answers(plain, {"x": X}))


@pytest.mark.parametrize(
    ("here", "said"),
    [
        (Identity("Fake", "1.1", "a device", "", "x=1"), "it was compiled by Fake 1.0, and 1.1"),
        (Identity("Fake", "1.0", "a device", "", "x=2"), "it was compiled for 'x=1', and this"),
        (Identity("Fake", "1.0", "another", "7", "x=1"), ""),
    ],
)
def test_versions_and_strings_must_agree(
    plain: Path, fakes: dict[str, Fake], here: Identity, said: str
) -> None:
    path = with_regions(plain, ALL, ["fake:CPU"])
    fakes["fake"].here = here
    session = onnxgen.load(path)
    assert session.picked == {"all": "original" if said else "fake:CPU"}
    assert not said or said in reasons(session)["all"][0]
    assert fakes["fake"].loads == (not said)
    assert_equal(session.run(None, {"x": X}), answers(plain, {"x": X}))


@pytest.mark.parametrize("backend", ["nobody:CPU", "fake:GPU", "fake", ":", ""])
def test_a_backend_that_is_not_here(plain: Path, fakes: dict[str, Fake], backend: str) -> None:
    session = onnxgen.load(with_regions(plain, ALL, [backend]))
    assert session.picked == {"all": "original"}
    assert reasons(session)["all"][0]
    assert_equal(session.run(None, {"x": X}), answers(plain, {"x": X}))
    assert fakes["fake"].runs == 0
