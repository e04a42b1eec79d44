"""Every rule has a page, and every page is true: its example holds, and each reason has a graph."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from onnxgen.cli import main
from onnxgen.patterns.pages import ENGINE, SECTIONS, page_of, read_page
from onnxgen.patterns.rule import Rule
from onnxgen.rules import PAGING, all_pages, all_rules, reference
from tests.rule_pages import applied, example, misses, shown

ROOT = Path(__file__).parents[1]
MISSES = list(misses())
# Reasons whose graphs are made by code: the test that meets each.
ELSEWHERE = {
    "ROT001": ("test_rotary.py", {"table-layout"}),
    "ROT001 ": ("test_rotary_tables.py", {"element-type"}),
    "MOE001": ("test_quantised_experts.py", {"quantised"}),
    "MOE003": (
        "test_quantised_experts.py",
        {"packing", "bits", "blocks", "layout", "accuracy", "activation", "router"},
    ),
}
# The kernel is asked before MOE003 makes what ORT004 lowers, so that MOE003 gives these reasons;
# and what reaches it has indices, and weights that are initializers.
NEVER_ALONE = {
    ("ORT004", "accuracy"),
    ("ORT004", "blocks"),
    ("ORT004", "layout"),
    ("MOE003", "form"),
    ("MOE003", "weights"),
    ("MOE002", "layout"),  # a guard: no graph is known whose size is known and cannot be computed
}
NOTHING_TO_SHOW = {"MSA004": "it rewrites nothing", "MOE003": "it needs packed weights"}


@pytest.mark.parametrize("rule", all_rules(), ids=lambda rule: rule.code)
def test_a_page_has_every_section(rule: type[Rule]) -> None:
    page = page_of(rule, rule.code)
    text = sys.modules[rule.__module__].__doc__ or ""
    assert text.startswith(f"{rule.code}: ")
    for section in SECTIONS:
        assert page.sections[section].strip(), section
    assert page.steps
    assert ("Example" in page.sections) != (rule.code in NOTHING_TO_SHOW)
    for reason in page.reasons.values():
        assert reason.when, reason
        assert reason.expected, reason
        assert reason.change, reason


def test_codes_are_unique() -> None:
    codes = [rule.code for rule in all_rules()]
    assert len(set(codes)) == len(codes)
    assert not set(codes) & set(ENGINE)


@pytest.mark.parametrize("rule", all_rules(), ids=lambda rule: rule.code)
def test_no_reason_is_given_that_the_page_does_not_have(rule: type[Rule]) -> None:
    """Every code in a `Declined(self, "code", ...)` of a rule's file."""
    tree = ast.parse(Path(str(sys.modules[rule.__module__].__file__)).read_text())
    given = {
        call.args[1].value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and getattr(call.func, "id", "") == "Declined"
        and isinstance(call.args[1], ast.Constant)
    }
    assert given <= set(page_of(rule, rule.code).reasons)


@pytest.mark.parametrize("rule", all_rules(), ids=lambda rule: rule.code)
def test_the_example_holds(rule: type[Rule]) -> None:
    found = example(rule)
    if found is None:
        assert rule.code in NOTHING_TO_SHOW
        return
    graph, opset, after = found
    assert shown(rule.code, graph, opset) == after, "python -m tests.rule_pages --write"


@pytest.mark.parametrize(
    ("rule", "code", "graph", "opset"), MISSES, ids=[f"{each[0]}-{each[1]}" for each in MISSES]
)
def test_a_graph_that_a_rule_declines(rule: str, code: str, graph: str, opset: int) -> None:
    sites, _ = applied(rule, graph, opset)
    declined = [site.decline for site in sites if site.decline is not None]
    (found,) = [each for each in declined if each.code == code]
    page = next(page for page in all_pages() if page.code == rule)
    assert (*found.reached, *found.ahead) == page.steps
    assert found.expected == page.reasons[code].expected
    assert found.change == page.reasons[code].change
    assert found.found, "the node that stopped it"
    assert found.reason


def test_every_reason_has_such_a_graph() -> None:
    stored = {(rule, code) for rule, code, _, _ in MISSES}
    made = {(rule.strip(), code) for rule, (_, codes) in ELSEWHERE.items() for code in codes}
    wanted = {(page.code, code) for page in all_pages() for code in page.reasons}
    without = {pair for pair in wanted - stored - made - NEVER_ALONE if pair[0] != PAGING}
    assert not without
    assert stored <= wanted
    assert not stored & made


@pytest.mark.parametrize("rule", ELSEWHERE)
def test_graphs_that_code_makes_are_where_they_are_said_to_be(rule: str) -> None:
    file, codes = ELSEWHERE[rule]
    text = (ROOT / "tests" / file).read_text()
    for code in codes:
        assert f'"{code}"' in text


def test_the_reference_is_fresh() -> None:
    assert (ROOT / "docs" / "rules.md").read_text() == reference(), (
        "python -m onnxgen.rules > docs/rules.md"
    )


def test_a_page_is_read_as_it_is_written() -> None:
    page = read_page(
        "ABC001: a thing.\n\nReplaces\n    x\n      y\n\nLooks for\n    1. one\n       more\n    2. two\n"
        "\nDeclines\n    a-b: when it\n        is so.\n        Expected: this\n        and that.\n"
        "        Change: none.\n    c: other.\n",
        "ABC001",
    )
    assert (page.title, page.steps) == ("a thing", ("one more", "two"))
    assert page.sections["Replaces"] == "x\n  y"
    reason = page.reasons["a-b"]
    assert (reason.when, reason.expected, reason.change) == (
        "when it is so.",
        "this and that.",
        "none.",
    )
    assert page.reasons["c"].expected == ""


# --- the command --------------------------------------------------------------------------------------


def test_all_rules_are_listed_a_line_each() -> None:
    result = CliRunner().invoke(main, ["rules"])
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [page.code for page in all_pages()]
    assert all(len(line) < 110 for line in lines)


@pytest.mark.parametrize("code", [page.code for page in all_pages()])
def test_a_page_is_printed_whole(code: str) -> None:
    result = CliRunner().invoke(main, ["rules", code.lower()])
    assert result.exit_code == 0
    page = next(page for page in all_pages() if page.code == code)
    for heading in page.sections:
        assert f"\n{heading}\n" in result.stdout


def test_a_code_of_an_obstacle_is_explained_too() -> None:
    result = CliRunner().invoke(main, ["rules", "PAG004"])
    assert "expected" in result.stdout
    document = json.loads(CliRunner().invoke(main, ["rules", "att001", "--json"]).stdout)
    assert document["rules"][0]["reasons"]["scores"]["expected"]


def test_a_code_that_is_not_there() -> None:
    result = CliRunner().invoke(main, ["rules", "RMS01"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "Error: RMS01: no such rule; did you mean RMS001?\n"
