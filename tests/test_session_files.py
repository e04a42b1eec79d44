"""Files whose blobs, weights, nodes or tables are not what was compiled: the nodes themselves answer."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxgen
from onnxgen.contexts.forms import KEY, Encoding
from tests.fake_backend import HERE, Fake, answers, assert_equal, use_fakes, with_regions
from tests.test_session import TEXT, X, saved
from tests.test_session_fallbacks import ALL, WEIGHTS, reasons

rng = np.random.default_rng(10)
LARGE = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[n,6] x) => (float[n,300] y) { h = MatMul(x, w)  y = Tanh(h) }"""


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    return use_fakes(monkeypatch)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return saved(TEXT, tmp_path, **WEIGHTS)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("encoding", ["function", "metadata"])
def test_a_blob_that_is_too_large(
    plain: Path, fakes: dict[str, Fake], encoding: Encoding, beside: bool
) -> None:
    path = with_regions(plain, ALL, ["fake:CPU"], encoding, beside=beside)
    [choice] = onnxgen.load(path).choices
    assert choice.context is not None
    size = choice.context.blob.size
    assert onnxgen.load(path, largest_blob=size).picked == {"all": "fake:CPU"}
    session = onnxgen.load(path, largest_blob=size - 1)
    assert f"has {size} bytes, more than {size - 1}" in reasons(session)["all"][0]
    assert fakes["fake"].loads == 2
    assert_equal(session.run(None, {"x": X}), answers(plain, {"x": X}))


def _outside(side: Path) -> None:
    folder = side.parent.parent / "outside"
    folder.mkdir(exist_ok=True)
    os.replace(side, folder / side.name)
    side.symlink_to(folder / side.name)


def _flipped(side: Path) -> None:
    data = bytearray(side.read_bytes())
    data[len(data) // 2] ^= 1
    side.write_bytes(data)


def _folder(side: Path) -> None:
    side.unlink()
    side.mkdir()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Path.unlink, "is missing"),
        (lambda side: os.truncate(side, 10), "truncated"),
        (lambda side: os.truncate(side, 0), "truncated"),
        (_flipped, "damaged: the sha256 differs"),
        (_outside, "outside"),
        (_folder, "not a regular file"),
        (lambda side: side.with_name("twice").hardlink_to(side), "hard-linked"),
        (lambda side: None, ""),
    ],
)
def test_a_blob_beside_the_model(
    tmp_path: Path, fakes: dict[str, Fake], change: Callable[[Path], None], said: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    plain = saved(TEXT, folder, **WEIGHTS)
    path = with_regions(plain, ALL, ["fake:CPU"], beside=True)
    [side] = folder.glob("*.blob")
    change(side)
    session = onnxgen.load(path)
    assert session.picked == {"all": "original" if said else "fake:CPU"}
    assert not said or said in reasons(session)["all"][0]
    assert_equal(session.run(None, {"x": X}), answers(plain, {"x": X}))
    assert fakes["fake"].loads == (not said)


@pytest.mark.parametrize("encoding", ["function", "metadata"])
def test_a_weight_that_was_changed_in_the_file(
    tmp_path: Path, fakes: dict[str, Fake], encoding: Encoding
) -> None:
    w = rng.standard_normal((6, 300)).astype(np.float32)
    path = with_regions(saved(LARGE, tmp_path, w=w), {"all": [0, 1]}, ["fake:CPU"], encoding)
    before = onnxgen.load(path).run(None, {"x": X})
    data = path.read_bytes()
    assert data.count(w.tobytes()) == 1
    path.write_bytes(data.replace(w.tobytes(), (w * 2).tobytes()))
    session = onnxgen.load(path)
    assert session.picked == {"all": "original"}
    assert reasons(session)["all"] == ["its weights have changed: their sha256 differs"]
    (tmp_path / "other").mkdir()
    wanted = answers(saved(LARGE, tmp_path / "other", w=w * 2), {"x": X})
    assert_equal(session.run(None, {"x": X}), wanted)
    assert np.abs(wanted[0] - before[0]).max() > 0.1


@pytest.mark.parametrize("encoding", ["function", "metadata"])
def test_nodes_that_were_changed(
    tmp_path: Path, plain: Path, fakes: dict[str, Fake], encoding: Encoding
) -> None:
    path = with_regions(plain, ALL, ["fake:CPU"], encoding)
    model, changed = onnx.load(path), onnx.load(plain)
    for proto in (model, changed):
        bodies = [proto.graph.node, *(each.node for each in proto.functions)]
        for node in itertools.chain(*bodies):
            if node.op_type == "Tanh":
                node.op_type = "Exp"
    onnx.save(model, path)
    onnx.save(changed, plain)
    session = onnxgen.load(path)
    assert session.picked == {"all": "original"}
    assert "its nodes have changed" in reasons(session)["all"][0]
    assert_equal(session.run(None, {"x": X}), answers(plain, {"x": X}))


VALUES: list[Any] = [None, -1, 0, 7, 10**30, 1.5, True, "", "x", "0-99999999", [], {}, ["x"]]
VALUES += ["FLOAT16[?,?]", "FLOAT[9,9]", "FLOAT[99999999999999999999]", "INT64", "0" * 64]


@pytest.mark.parametrize("encoding", ["function", "metadata"])
def test_whatever_the_table_says_the_answer_is_right(
    plain: Path, fakes: dict[str, Fake], encoding: Encoding
) -> None:
    path = with_regions(plain, {"a": [0], "c": [2, 3]}, ["fake:CPU"], encoding)
    wanted = answers(plain, {"x": X})
    whole = onnx.load(path)
    tables = [whole, *whole.functions]
    tried = 0
    for number, table in enumerate(tables):
        for entry in table.metadata_props:
            if entry.key == KEY:
                for text in _damaged(entry.value):
                    model = copy.deepcopy(whole)
                    place = [model, *model.functions][number]
                    [each] = [each for each in place.metadata_props if each.key == KEY]
                    each.value = text
                    onnx.save(model, path)
                    assert_equal(onnxgen.load(path).run(None, {"x": X}), wanted)
                    tried += 1
    assert tried > 400
    assert fakes["fake"].runs > 0


def _damaged(text: str) -> Iterator[str]:
    """A table in which one value at a time is another, or is missing; and no tables."""
    yield from ("", "{", "[]", "{}", "null", text[:-9], "[" * 100_000)

    def places(value: Any) -> Iterator[tuple[Any, Any]]:
        keys = value if isinstance(value, dict) else range(len(value))
        for key in list(keys):
            yield value, key
            if isinstance(value[key], dict | list):
                yield from places(value[key])

    whole = json.loads(text)
    for holder, key in places(whole):
        kept = holder[key]
        for value in VALUES:
            holder[key] = value
            yield json.dumps(whole)
        holder[key] = kept


def test_hashes_are_of_the_bytes(plain: Path, fakes: dict[str, Fake]) -> None:
    """What a test above calls damaged is so for no other reason."""
    [choice] = onnxgen.load(with_regions(plain, ALL, ["fake:CPU"], beside=True)).choices
    [side] = plain.parent.glob("*.blob")
    assert choice.context is not None
    assert choice.context.identity == HERE
    assert choice.context.blob.sha256 == hashlib.sha256(side.read_bytes()).hexdigest()
    assert fakes["fake"].loads == 1
