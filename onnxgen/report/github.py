"""A report as GitHub Actions shows it: workflow commands, and Markdown for the run's summary.

A workflow command is a line such as ``::warning title=onnxgen::2 attention kept``. What a model's
author can choose, such as names, is escaped in both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from onnxgen.errors import one_line
from onnxgen.report.as_json import summary
from onnxgen.report.values import Proof, Report, Site

MOST = 5
"""Warnings of one model: GitHub shows ten of a step."""


def command(level: str, message: str, **properties: str) -> str:
    """One workflow command.

    Args:
        level: "error", "warning" or "notice".
        properties: such as title and file; empty ones are left out.
    """
    said = ",".join(f"{key}={_property(text)}" for key, text in properties.items() if text)
    return f"::{level}{' ' if said else ''}{said}::{_data(message)}"


def annotated(value: Report | Proof, workspace: str = "") -> Iterator[str]:
    """What was kept or undone, grouped, and warnings, as warnings; the outcome as a notice.

    Args:
        workspace: the folder of the checkout; a model in it is named as its file.
    """
    if isinstance(value, Proof):
        if value.status == "proven":
            yield command("notice", _proof(value), title="onnxgen verify")
        return
    properties = {"title": "onnxgen", "file": _inside(value.input, workspace)}
    warnings = [*_not_fused(value), *value.warnings]
    for warning in warnings[:MOST]:
        yield command("warning", one_line(f"{value.input}: {warning}"), **properties)
    if len(warnings) > MOST:
        more = f"{value.input}: and {len(warnings) - MOST} more; the report has all"
        yield command("warning", one_line(more), **properties)
    if value.output:
        counts = summary(value.sites)
        fused = ", ".join(f"{count['fused']} {kind}" for kind, count in counts.items())
        said = f"{value.input}: {fused or 'nothing'} fused. {_proof(value.proof)}"
        yield command("notice", one_line(said), **properties)


def _not_fused(report: Report) -> list[str]:
    """One line for each kind and reason."""
    groups: dict[tuple[str, str, str, str], list[Site]] = {}
    for site in (*report.sites, *report.lowered):
        if site.status != "fused":
            why = site.decline
            key = (site.status, site.kind, why.rule if why else site.rule, why.code if why else "")
            groups.setdefault(key, []).append(site)
    said = []
    for (status, kind, rule, code), sites in groups.items():
        first = sites[0]
        reason = first.decline.reason if first.decline else "no reason was given"
        where = first.scope or first.node
        more = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
        said.append(
            f"{len(sites)} {kind} {status}: {' '.join(filter(None, [rule, code]))}: {reason} "
            f"[{where}{more}]"
        )
    return said


def _proof(proof: Proof | None) -> str:
    if proof is None or proof.status != "proven":
        status = "Unproven" if proof is None else proof.status.capitalize()
        return f"{status}: {proof.reason}" if proof is not None and proof.reason else status
    cases = sum(case.compared for case in proof.cases)
    worst = proof.worst
    said = f"Proven by {cases} cases"
    return said if worst is None else f"{said}, largest difference {worst.difference:.1e}"


def _inside(path: str, workspace: str) -> str:
    """A path relative to the checkout, "" where it lies elsewhere."""
    if not workspace:
        return ""
    real = Path(os.path.realpath(path))
    root = Path(os.path.realpath(workspace))
    return real.relative_to(root).as_posix() if real.is_relative_to(root) else ""


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
