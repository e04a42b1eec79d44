"""A blob is data from a stranger: it is used only when its hash is in a list that is the user's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxgen
from onnxgen.contexts.places import config_folder
from onnxgen.contexts.trust import trust, trusted
from onnxgen.errors import FileError, UsageError
from tests.fake_backend import Fake, answers, assert_equal, use_fakes, with_regions
from tests.test_session import TEXT, X, saved

ONE, TWO = "1f" * 32, "a0" * 32


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    return use_fakes(monkeypatch)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    weights = {name: np.ones(shape, np.float32) for name, shape in (("w", (6, 5)), ("v", (5, 4)))}
    return saved(TEXT, tmp_path, **weights)


def test_a_strangers_blob_is_not_even_read(plain: Path, fakes: dict[str, Fake]) -> None:
    path = with_regions(plain, {"all": [0, 1, 2, 3]}, ["fake:CPU"], trusted=False)
    session = onnxgen.load(path)
    [choice] = session.choices
    assert choice.context is None
    [passed] = choice.passed
    sha256 = passed.context.blob.sha256
    assert passed.reason == f"its blob {sha256[:12]}… is not trusted (see --trust, trust=)"
    assert_equal(session.run(None, {"x": X}), answers(plain, {"x": X}))
    assert fakes["fake"].loads == 0

    for given in ([ONE], {ONE: TWO}, iter([TWO]), []):
        assert onnxgen.load(path, trust=given).picked == {"all": "original"}
    listed = plain.with_name("mine")
    listed.write_text(f"# what I compiled\n{sha256}  model.onnx\n")
    given_list: list[Any] = [[sha256], [ONE, sha256.upper()], {sha256}, listed, str(listed)]
    for given in given_list:
        session = onnxgen.load(path, trust=given)
        assert session.picked == {"all": "fake:CPU"}
        assert_equal(session.run(None, {"x": X}), answers(plain, {"x": X}))
    assert fakes["fake"].loads == len(given_list)
    assert onnxgen.load(path).picked == {"all": "original"}  # for that time only


@pytest.mark.parametrize(
    ("text", "hashes"),
    [
        ("", set()),
        ("\n  \n# nothing\n   # nor here\n", set()),
        (f"{ONE}", {ONE}),
        (f"{ONE}  ./model.blob\n\n{TWO} *other.blob\n", {ONE, TWO}),
        (f"  {ONE.upper()}\tby me\r\n", {ONE}),
        (f"{ONE}\n{ONE}\n", {ONE}),
    ],
)
def test_a_list_is_a_file(tmp_path: Path, text: str, hashes: set[str]) -> None:
    path = tmp_path / "list"
    path.write_text(text)
    assert trusted(path) == hashes
    assert trusted(str(path)) == hashes


@pytest.mark.parametrize("word", ["x", ONE[:-1], ONE + "0", "g" * 64, f"sha256:{ONE}", f"{ONE},"])
def test_what_is_no_hash_is_said(tmp_path: Path, word: str) -> None:
    path = tmp_path / "list"
    path.write_text(f"{TWO}\n{word} here\n")
    with pytest.raises(UsageError, match="no sha256"):
        trusted(path)
    with pytest.raises(UsageError, match="no sha256"):
        trusted([TWO, word])


def test_a_list_that_cannot_be_read(tmp_path: Path) -> None:
    binary, long = tmp_path / "binary", tmp_path / "long"
    binary.write_bytes(b"\xff\xfe\x00")
    with long.open("wb") as file:
        file.truncate(1 << 25)
    for path in (tmp_path / "absent", tmp_path, binary, long):
        with pytest.raises(FileError, match=path.name):
            trusted(path)


def test_what_this_user_added_is_remembered() -> None:
    assert trusted() == frozenset()
    trust([ONE], "a note\nof two lines")
    trust([ONE, TWO], "again")
    assert trusted() == {ONE, TWO}
    assert trusted(["0" * 64]) == {ONE, TWO, "0" * 64}
    path = config_folder() / "trusted"
    assert path.read_text().splitlines() == [f"{ONE}  a note of two lines", f"{TWO}  again"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_a_list_that_others_may_write_is_not_believed(
    mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    trust([ONE], "")
    (config_folder() / "trusted").chmod(mode)
    assert trusted() == frozenset()
    assert "not believed" in caplog.text
    (config_folder() / "trusted").chmod(0o644)
    assert trusted() == {ONE}


def test_a_list_that_is_a_link_is_not_believed(tmp_path: Path) -> None:
    trust([ONE], "")
    path = config_folder() / "trusted"
    os.replace(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert trusted() == frozenset()
    with pytest.raises(FileError, match="cannot be written"):
        trust([TWO], "")
    path.unlink()
    path.mkdir()
    assert trusted() == frozenset()


def test_a_damaged_list_of_ones_own_trusts_nothing(caplog: pytest.LogCaptureFixture) -> None:
    trust([ONE], "")
    with (config_folder() / "trusted").open("a") as file:
        file.write("garbage\n")
    assert trusted() == frozenset()
    assert "no sha256" in caplog.text
