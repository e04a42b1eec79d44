"""Every kind of report of every command: well-formed, whole, and safe whatever names hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import html5lib
import jsonschema
import pytest
from click.testing import CliRunner

from onnxgen.cli import main
from onnxgen.errors import UsageError
from onnxgen.report import as_json, files, html, junit, markdown, schema
from onnxgen.report.render import STARTS, check_ending, render
from onnxgen.report.values import Outcome
from tests.reports import compared, fused, grown, hostile, layered, paged

SCHEMA = Path(schema.__file__).with_name("report.schema.json")
XHTML = "{http://www.w3.org/1999/xhtml}"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """One of every command, and of failures."""
    folder = tmp_path_factory.mktemp("reports")
    plain, moe = grown("llama/torchscript", folder), grown("qwen3_moe/dynamo20-batched", folder)
    encoder = grown("bert/torchscript", folder)
    broken = folder / "broken.onnx"
    broken.write_bytes(b"no model")
    return {
        "fuse": fused(plain),
        "ort": fused(moe, target="ort"),
        "unproven": fused(encoder, verify=False),
        "paged": paged(plain),
        "unpageable": paged(encoder),
        "verify": compared(plain, plain),
        "differs": compared(plain, moe),
        "broken": fused(broken),
        "many": Outcome("fuse", report=layered(100)),
        "hostile": hostile(),
    }


def test_the_outcomes_are_what_their_names_say(outcomes: dict[str, Outcome]) -> None:
    ends = {name: outcome.exit_code for name, outcome in outcomes.items()}
    assert [name for name, code in ends.items() if code == 0] == [
        *("fuse", "ort", "unproven", "paged", "verify", "many")
    ]
    assert outcomes["broken"].report is None or not outcomes["broken"].report.sites
    assert outcomes["unpageable"].report.paging.obstacles


def test_the_schema_is_what_the_classes_say() -> None:
    assert SCHEMA.read_text() == schema.dumps()  # python -m onnxgen.report.schema > …
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA.read_text()))


def test_json_follows_the_schema(outcomes: dict[str, Outcome]) -> None:
    strict = jsonschema.Draft202012Validator(schema.build(strict=True))
    for outcome in outcomes.values():
        strict.validate(json.loads(as_json.render(outcome)))
    document = json.loads(as_json.render(outcomes["fuse"]))
    document["report"]["sites"][0]["status"] = "perhaps"
    assert not strict.is_valid(document)


@pytest.mark.parametrize("ending", STARTS)
def test_each_kind_is_known_by_its_start(
    ending: str, outcomes: dict[str, Outcome], tmp_path: Path
) -> None:
    for name, outcome in outcomes.items():
        path = tmp_path / f"{name}{ending.upper()}"
        text = render(outcome, path)
        assert text.startswith(STARTS[ending])
        files.write_text(path, text)
        files.check_writable(path)
    path.write_text(f" {text}")
    with pytest.raises(UsageError, match="no report of onnxgen"):
        files.check_writable(path)


def test_an_unknown_ending_is_refused_before_the_work(tmp_path: Path) -> None:
    words = ["fuse", str(tmp_path / "missing.onnx"), "--report", str(tmp_path / "report.txt")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert ".json, .html, .xml and .md" in result.output
    with pytest.raises(UsageError):
        check_ending(Path("json"))


@pytest.mark.parametrize("ending", STARTS)
def test_failures_are_reported_too(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"report{ending}"
    result = CliRunner().invoke(
        main, ["fuse", str(tmp_path / "missing.onnx"), "--report", str(file)]
    )
    assert result.exit_code == 4
    assert "does not exist" in file.read_text()


def test_pages_are_valid_and_load_nothing(outcomes: dict[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        text = html.render(outcome)
        assert len(text.encode()) < 2_000_000, name
        tree = html5lib.HTMLParser(strict=True).parse(text)  # raises where it is not valid
        for element in tree.iter():
            assert element.tag not in (f"{XHTML}script", f"{XHTML}img", f"{XHTML}iframe")
            for key, value in element.attrib.items():
                assert not str(key).startswith("on")
                if key in ("src", "href", "srcset", "data", "action"):
                    assert value == "data:,", name
        style = tree.find(f".//{XHTML}style").text
        assert not re.search(r"url\(|@import", style)


def test_a_page_shows_what_was_done(outcomes: dict[str, Outcome]) -> None:
    tree = html5lib.parse(html.render(outcomes["fuse"]), namespaceHTMLElements=False)
    heads = [heading.text for heading in tree.iter("h2")]
    assert heads == ["Sites", "Operators", "One layer", "Masks", "Proof", "Time"]
    picture = outcomes["fuse"].report.picture
    labels = [text.text for text in tree.iter("{http://www.w3.org/2000/svg}text")]
    for drawing in (picture.before, picture.after):
        assert {n.op for n in drawing.nodes if n.op and len(n.op) < 22} <= set(labels)
    words = "".join(tree.itertext())
    assert "m.model.layers.1" in words
    assert "Causal, key padding" in words
    assert "prefill of 5" in words


def test_a_page_says_what_failed(outcomes: dict[str, Outcome]) -> None:
    for name in ("differs", "broken", "unpageable"):
        page = html5lib.parse(html.render(outcomes[name]), namespaceHTMLElements=False)
        words = " ".join("".join(page.itertext()).split())
        assert " ".join((outcomes[name].error or "").split())[:60] in words, name
    assert "PAG" in words  # what stands in the way


def structure(document: ET.Element) -> None:
    """The rules of Jenkins' junit-10.xsd that our documents use."""
    assert document.tag == "testsuites"
    for suite in document:
        assert suite.tag == "testsuite"
        assert {"name", "tests", "failures", "errors", "skipped"} <= set(suite.attrib)
        children = [child.tag for child in suite]
        assert children == ["properties"] * ("properties" in children) + ["testcase"] * int(
            suite.get("tests")
        )
        names = [(case.get("classname"), case.get("name")) for case in suite.iter("testcase")]
        assert len(set(names)) == len(names), "readers merge test cases of one name"
        for case in suite.iter("testcase"):
            float(case.get("time"))
            assert {child.tag for child in case} <= {"skipped", "error", "failure", "system-out"}
            assert len(case) <= 1
        for key, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.get(key)) == len(suite.findall(f"testcase/{tag}"))
    for key in ("tests", "failures", "errors"):
        assert int(document.get(key)) == sum(int(suite.get(key)) for suite in document)


def test_junit_is_as_ci_systems_read_it(outcomes: dict[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        document = ET.fromstring(junit.render(outcome).encode())
        structure(document)
        wrong = int(document.get("failures")) + int(document.get("errors"))
        assert bool(wrong) == bool(outcome.exit_code), name
    document = ET.fromstring(junit.render(outcomes["hostile"]).encode())
    kinds = {suite.get("name"): suite for suite in document}
    assert len(kinds["onnxgen.sites"].findall("testcase/skipped")) == 1  # kept
    assert len(kinds["onnxgen.sites"].findall("testcase/failure")) == 1  # undone
    assert len(kinds["onnxgen.proof"].findall("testcase/failure")) == 1  # differs
    assert len(kinds["onnxgen.proof"].findall("testcase/skipped")) == 1


def test_markdown_is_short_and_cannot_be_broken(outcomes: dict[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        text = markdown.render(outcome)
        assert len(text) < 20_000 or name == "hostile"
        tables = [line for line in text.splitlines() if line.startswith("|")]
        for line in tables:
            assert line.endswith("|")
        assert text.count("<details>") == text.count("</details>")
        tags = set(re.findall(r"<(/?\w+)", text))
        assert tags <= {*("code", "/code", "details", "/details", "summary", "/summary")}
        assert "http://" not in text
        assert "@all" not in text
        assert text.count("<!--") == 1
    lines = markdown.render(outcomes["hostile"]).splitlines()
    block: list[int] = []
    for line in [*lines, ""]:
        if line.startswith("|"):
            block.append(line.count("|"))
        else:
            assert len(set(block)) <= 1, "a name broke a table"
            block = []


def test_markdown_says_what_was_done(outcomes: dict[str, Outcome]) -> None:
    text = markdown.render(outcomes["fuse"])
    assert "— proven" in text.splitlines()[1]
    assert "| ✅ Attention | 2 | 2 | 0 | 0 |" in text
    assert "does not" in markdown.render(outcomes["broken"]) or "❌" in markdown.render(
        outcomes["broken"]
    )


def test_a_hundred_layers_are_told_apart_and_stay_small(outcomes: dict[str, Outcome]) -> None:
    page = html.render(outcomes["many"])
    assert len(page) < 200_000
    assert "model.layers.99" in page
    assert page.count("reads late") <= 10
