"""--expect, --baseline and --check: exit code 5, one sentence, and nothing written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result

from onnxgen import testing
from onnxgen.cli import main
from onnxgen.errors import FileError, UsageError
from onnxgen.expectations import (
    GROWTH,
    GROWTH_BYTES,
    Baseline,
    Expectations,
    count_fused,
    parse_expectations,
    read_baseline,
)
from onnxgen.report import as_json
from onnxgen.report.values import Case, Decline, Proof, Report, Site


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo decoder, fused, with its report; do not change them."""
    folder = tmp_path_factory.mktemp("demo")
    model = testing.write_demo_model(folder)
    result = run("fuse", model, "--verify", "quick", "--report", folder / "base.json")
    assert result.exit_code == 0, result.stderr
    return model


def report(*sites: Site, **fields: object) -> Report:
    return Report("m.onnx", "", "onnx", sites=list(sites), **fields)  # type: ignore[arg-type]


def site(kind: str, status: str = "fused") -> Site:
    decline = None
    if status != "fused":
        decline = Decline("ATT001", "no-value-product", "nothing multiplies it", ("n",))
    return Site(kind, "ATT001", "n", "layers.0", status, decline)  # type: ignore[arg-type]


def test_words_become_expectations() -> None:
    found = parse_expectations(["attention=24, moe=0", "all"])
    assert found == Expectations({"attention": 24, "moe": 0}, whole=True)
    assert parse_expectations(["unchanged"]).unchanged
    assert parse_expectations([]).unmet(report(site("attention", "kept"))) == []


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("attention", "--expect attention is none of KIND=N, all and unchanged"),
        ("unchangd", "did you mean unchanged?"),
        ("attention=", "none of KIND=N"),
        ("attention=-1", "none of KIND=N"),
        ("attention=²", "none of KIND=N"),
        ("attention=2,", "--expect '' is none of"),
        ("attention=2,attention=3", "--expect gives attention two counts, 2 and 3"),
    ],
)
def test_words_that_are_none(word: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_expectations([word])
    assert said in str(caught.value)


def test_counts_say_what_was_expected_and_found() -> None:
    found = report(site("attention"), site("attention", "kept"), already={"layer_norm": 3})
    assert parse_expectations(["attention=1,layer_norm=3,moe=0"]).unmet(found) == []
    assert parse_expectations(["attention=2,layer_norm=2"]).unmet(found) == [
        "attention=2 was expected, and 1 are fused (1 attention (kept: ATT001 no-value-product))",
        "layer_norm=2 was expected, and 3 are fused",
    ]


def test_those_of_a_target_are_counted_apart() -> None:
    found = report(site("attention"), lowered=[site("attention"), site("projection", "undone")])
    assert count_fused(found) == {"attention": 1, "lowered.attention": 1}
    assert parse_expectations(["lowered.attention=1,attention=1"]).unmet(found) == []
    assert len(parse_expectations(["all"]).unmet(found)) == 1


def test_all_is_nothing_kept_and_unchanged_is_nothing_fused() -> None:
    fused, kept = report(site("rotary")), report(site("rotary", "kept"), site("cache", "undone"))
    whole, unchanged = parse_expectations(["all"]), parse_expectations(["unchanged"])
    assert whole.unmet(fused) == unchanged.unmet(kept) == []
    assert unchanged.unmet(fused) == [
        "nothing was expected to be left to fuse, and there are 1 rotary"
    ]
    (said,) = whole.unmet(kept)
    assert "1 rotary (kept: ATT001 no-value-product), 1 cache (undone" in said


def proven(difference: float) -> Proof:
    return Proof("proven", 1e-2, [Case("prefill", 1, 4, 0, "none", difference)])


BEFORE = Baseline("base.json", "onnx", {"attention": 2}, 1e-4, 1_000_000)


def test_no_worse_than_a_baseline() -> None:
    most = 1_000_000 * (1 + GROWTH) + GROWTH_BYTES
    good = report(site("attention"), site("attention"), bytes_after=int(most), proof=proven(1e-4))
    assert Expectations(baseline=BEFORE).unmet(good) == []
    grown = dataclasses.replace(good, bytes_after=int(most) + 1)
    assert Expectations(baseline=BEFORE).unmet(grown) == [
        "the written files grew by 14.1 kB to 1.01 MB, and were 1 MB in base.json"
    ]
    worse = report(site("attention"), bytes_after=9_000_000, proof=proven(4e-3))
    assert Expectations(baseline=BEFORE).unmet(worse) == [
        "1 attention are fused, and 2 were in base.json",
        "the largest difference is 4.0e-03, over the 1e-04 of base.json",
        "the written files grew by 8 MB to 9 MB, and were 1 MB in base.json",
    ]


def test_what_the_exporter_learns_to_write_is_no_less() -> None:
    now = report(already={"attention": 2}, bytes_after=1)
    assert Expectations(baseline=BEFORE).unmet(now) == []


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    before = report(site("attention"), already={"cache": 1}, bytes_after=5, proof=proven(0.0))
    path.write_text(as_json.dumps(as_json.report_document("fuse", before, 0, None)))
    counts = {"attention": 1, "cache": 1}
    assert read_baseline(path, "fuse") == Baseline(str(path), "onnx", counts, 1e-2, 5)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"schema": 99}, FileError, "schema 99, and this onnxgen knows 1"),
        ({"command": "to-paged"}, UsageError, "a report of to-paged, not of fuse"),
        ({"exit_code": 5}, UsageError, "a run that failed"),
        ({"models": []}, UsageError, "several models"),
        ({"report": None}, FileError, "damaged"),
        ({"report": {"sites": 3}}, FileError, "damaged"),
        (None, FileError, "no JSON report of onnxgen"),
    ],
)
def test_baselines_that_are_none(
    change: dict[str, object] | None, kind: type[Exception], said: str, tmp_path: Path
) -> None:
    document = as_json.report_document("fuse", report(), 0, None)
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**document, **change} if change is not None else ["no"]))
    with pytest.raises(kind, match=said):
        read_baseline(path, "fuse")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"<html>"])
def test_baselines_that_are_no_json(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match="no JSON report of onnxgen"):
        read_baseline(path, "fuse")


def test_what_is_met_is_written(demo: Path, tmp_path: Path) -> None:
    out, base = tmp_path / "o.onnx", demo.with_name("base.json")
    fused = json.loads(base.read_text())["report"]["summary"]["attention"]["fused"]
    words = ("--expect", f"attention={fused},moe=0", "--expect", "all", "--baseline", base)
    result = run("fuse", demo, "-o", out, "--verify", "quick", *words)
    assert result.exit_code == 0, result.stderr
    assert out.exists()


def test_what_is_not_met_is_not_written_but_reported(demo: Path, tmp_path: Path) -> None:
    out, written = tmp_path / "o.onnx", tmp_path / "r.json"
    result = run(
        *("fuse", demo, "-o", out, "--verify", "quick", "--report", written),
        *("--disable", "ATT001", "--expect", "attention=99"),
        *("--baseline", demo.with_name("base.json")),
    )
    assert result.exit_code == 5
    assert result.stderr.count("\n") == 1
    assert (
        f"Error: {demo}: attention=99 was expected, and 0 are fused (2 attention" in result.stderr
    )
    assert "attention are fused, and" in result.stderr  # the baseline's, in the same sentence
    assert result.stderr.endswith("nothing was written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    document = json.loads(written.read_text())
    assert document["exit_code"] == 5
    assert document["error"] in result.stderr
    assert document["report"]["proof"]["status"] == "proven"
    assert document["report"]["output"] == ""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--expect", "atention=2"), 2, "no such kind; did you mean attention?; kinds: attention"),
        (("--expect", "lowered.attention=2"), 2, "no such kind"),
        (("--target", "ort", "--expect", "unchanged"), 2, "for --target onnx"),
        (("--target", "ort", "--baseline", "BASE"), 2, "for the target onnx, and this one is for"),
        (("--baseline", "gone.json"), 4, "gone.json cannot be read"),
        (("--baseline", "BASE", "--report", "BASE"), 2, "another file of this command"),
    ],
)
def test_what_cannot_be_expected(
    words: tuple[str, ...], code: int, said: str, demo: Path, tmp_path: Path
) -> None:
    base = str(demo.with_name("base.json"))
    result = run("fuse", demo, "-o", tmp_path / "o", *(base if w == "BASE" else w for w in words))
    assert (result.exit_code, said in result.stderr) == (code, True), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_check_writes_nothing_and_says_what_is_left(demo: Path, tmp_path: Path) -> None:
    before = sorted(demo.parent.iterdir())
    result = run("fuse", demo, "--check")
    assert result.exit_code == 0, result.stderr
    assert "Nothing was written" in result.stdout
    assert "Unproven: --check only looks" in result.stdout
    assert sorted(demo.parent.iterdir()) == before
    left = run("fuse", demo, "--check", "--expect", "unchanged")
    assert left.exit_code == 5
    assert "left to fuse, and there are " in left.stderr
    fused = run("fuse", demo.with_name("demo.fused.onnx"), "--check", "--expect", "unchanged")
    assert fused.exit_code == 0, fused.stderr


@pytest.mark.parametrize("name", ["llama/dynamo23", "bert/dynamo20"])
def test_the_exporters_own_operators_count(name: str, tmp_path: Path) -> None:
    """The fused model, whose operators are all there already, counts as the export does."""
    model, out, first = (tmp_path / each for each in ("m.onnx", "o.onnx", "1.json"))
    onnx.save(testing.load_corpus_model(name), model)
    assert run("fuse", model, "-o", out, "--verify", "quick", "--report", first).exit_code == 0
    before = json.loads(first.read_text())["report"]
    assert before["already"]
    counts = dict(before["already"])
    for kind, count in before["summary"].items():
        counts[kind] = counts.get(kind, 0) + count["fused"]
    words = ",".join(f"{kind}={count}" for kind, count in counts.items())
    for path in (model, out):
        result = run("fuse", path, "--check", "--expect", words, "--baseline", first)
        assert result.exit_code == 0, result.stderr


def test_paged_models_too(demo: Path, tmp_path: Path) -> None:
    words = ("to-paged", demo, "-o", tmp_path / "p", "--verify", "quick")
    result = run(*words, "--expect", "attention=7")
    assert result.exit_code == 5
    assert "attention=7 was expected, and" in result.stderr
    assert not (tmp_path / "p").exists()
    base = tmp_path / "base.json"
    result = run(*words, "--expect", "all", "--report", base)
    assert result.exit_code == 0, result.stderr
    assert json.loads(base.read_text())["report"]["bytes_after"] > 0
    assert run(*words, "--baseline", base).exit_code == 0
    assert run(*words, "--expect", "unchanged").exit_code == 2
    assert run("fuse", demo, "--baseline", base).exit_code == 2
