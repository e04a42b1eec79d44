"""A command's outcome as JUnit XML, as GitLab, Jenkins and GitHub's reporters read it.

A suite ``sites``, a test case a place that a rule looked at: fused passes, kept is skipped with
the reason, undone fails. A suite ``proof``, a test case a case: one that differs by more than the
tolerance fails, one that was not run is skipped. A suite ``command``, whose one test case is an
error where the command failed. Nothing in it depends on the clock but the times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from xml.etree import ElementTree as ET

from onnxgen.errors import one_line
from onnxgen.report.layers import layers_of
from onnxgen.report.render import STARTS
from onnxgen.report.values import Case, Outcome, Proof, Report, Site
from onnxgen.report.words import kind_name, number, verdict

START = STARTS[".xml"]


def render(outcome: Outcome) -> str:
    """The document as text; characters that XML cannot hold are spelled out."""
    total = sum(outcome.report.seconds.values()) if outcome.report is not None else 0.0
    suites = [_command(outcome, total)]
    if outcome.report is not None:
        suites += _sites(outcome.report)
    if outcome.proof is not None:
        suites.append(_proof(outcome.proof))
    root = _element("testsuites", {"name": f"onnxgen {outcome.command}", **_sums(suites)})
    root.extend(suites)
    ET.indent(root)
    return f"{START}{ET.tostring(root, encoding='unicode')}\n"


def _command(outcome: Outcome, seconds: float) -> ET.Element:
    word, _ = verdict(outcome)
    name = f"onnxgen {outcome.command} {outcome.model}".strip()
    case = _case(name, "onnxgen", seconds)
    if outcome.exit_code:
        said = outcome.error or word
        # Exit status 1 and 5 are findings; the others say that it could not do its work.
        kind = "failure" if outcome.exit_code in (1, 5) else "error"
        words = {"message": said, "type": f"exit status {outcome.exit_code}"}
        case.append(_element(kind, words, said))
    return _suite("command", [case], {"outcome": word, "exit status": str(outcome.exit_code)})


def _sites(report: Report) -> list[ET.Element]:
    suites = []
    for name, sites in (("sites", report.sites), ("lowered", report.lowered)):
        cases = [_site(s, layer) for s, layer in zip(sites, layers_of(sites), strict=True)]
        if cases:
            suites.append(_suite(name, _unlike(cases), {"model": report.input}))
    return suites


def _site(site: Site, layer: str) -> ET.Element:
    where = ".".join(filter(None, ["onnxgen", site.kind, layer]))
    case = _case(f"{kind_name(site.kind)} {site.node or site.scope}", where)
    if site.status != "fused":
        decline = site.decline
        told = f"{decline.rule} {decline.code}: {decline.reason}" if decline else "no reason given"
        if site.status == "kept":
            case.append(_element("skipped", {"message": told}))
        else:
            case.append(_element("failure", {"message": told, "type": "undone"}, told))
    return case


def _proof(proof: Proof) -> ET.Element:
    said = {"status": proof.status, "tolerance": number(proof.tolerance), "reason": proof.reason}
    cases = [_compared(case, proof) for case in proof.cases]
    if not cases:
        case = _case("comparison with the original", "onnxgen.proof")
        told = proof.reason or "nothing was run"
        if proof.status == "unproven":
            case.append(_element("skipped", {"message": told}))
        elif proof.status != "proven":
            case.append(_element("error", {"message": told, "type": proof.status}, told))
        cases = [case]
    return _suite("proof", _unlike(cases), said)


def _compared(case: Case, proof: Proof) -> ET.Element:
    element = _case(case.name, "onnxgen.proof")
    if case.skipped:
        element.append(_element("skipped", {"message": case.skipped}))
    elif case.outside:
        element.append(_element("system-out", {}, f"fails as it must: {case.outside}"))
    elif not case.difference <= proof.tolerance:
        told = (
            f"output {case.output} differs by {number(case.difference)} standard deviations; "
            f"{number(proof.tolerance)} are allowed"
        )
        element.append(_element("failure", {"message": told, "type": "differs"}, told))
    else:
        told = f"difference {number(case.difference)} standard deviations, output {case.output}"
        element.append(_element("system-out", {}, told))
    return element


def _case(name: str, where: str, seconds: float = 0.0) -> ET.Element:
    return _element("testcase", {"name": name, "classname": where, "time": f"{seconds:.3f}"})


def _unlike(cases: list[ET.Element]) -> list[ET.Element]:
    """Readers tell test cases apart by class and name: of equal ones the later are numbered."""
    met: dict[tuple[str, str], int] = {}
    for case in cases:
        key = (case.get("classname", ""), case.get("name", ""))
        met[key] = met.get(key, 0) + 1
        if met[key] > 1:
            case.set("name", f"{key[1]} ({met[key]})")
    return cases


def _suite(name: str, cases: list[ET.Element], facts: Mapping[str, str]) -> ET.Element:
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": str(sum(case.find("error") is not None for case in cases)),
        "skipped": str(sum(case.find("skipped") is not None for case in cases)),
        "time": f"{sum(float(case.get('time', '0')) for case in cases):.3f}",
    }
    suite = _element("testsuite", {"name": f"onnxgen.{name}", **counts})
    properties = _element("properties", {})
    for key, value in facts.items():
        if value:
            properties.append(_element("property", {"name": key, "value": value}))
    if len(properties):
        suite.append(properties)
    suite.extend(cases)
    return suite


def _sums(suites: Iterable[ET.Element]) -> dict[str, str]:
    suites = list(suites)
    sums = {
        key: str(sum(int(suite.get(key, "0")) for suite in suites))
        for key in ("tests", "failures", "errors", "skipped")
    }
    return {**sums, "time": f"{sum(float(suite.get('time', '0')) for suite in suites):.3f}"}


def _element(name: str, words: Mapping[str, str], text: str = "") -> ET.Element:
    element = ET.Element(name, {key: one_line(value) for key, value in words.items()})
    element.text = one_line(text) or None
    return element
