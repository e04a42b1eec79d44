"""A command's outcome as JSON: documented, versioned, valid.

Every document holds:

- ``schema``: 1; it grows only when a key changes its meaning or goes.
- ``onnxgen``: the version that wrote it.
- ``command``: "fuse", "to-paged", "verify", "explain" or "inspect".
- ``exit_code``: what the command ended with (see README.md).
- ``error``: the sentence the command ended with, null where it succeeded.

``fuse`` and ``to-paged`` add ``report``: the fields of `onnxgen.report.values.Report`, sites, proof and cases
nested, and two that are derived from them: ``summary``, by kind of site how many were found,
fused, kept and undone, and in the proof ``worst``, the case with the largest difference. It is
null where the command failed before there was anything to report.

``explain`` adds ``report``, of what `fuse` would do, and ``places``: the sites that were asked for,
each with its ``decline``, which says how far the nearest rule got (``reached``, ``ahead``), where
it stopped (``nodes``, ``found``), what it ``expected`` and what would ``change`` it.

``inspect`` adds ``model``: the fields of `onnxgen.report.inspection.Inspection`.

``context add``, ``list``, ``check``, ``strip`` and ``convert`` add ``contexts``: the fields of
`onnxgen.report.contexts.Contexts`.

``fuse`` of several models has ``models`` instead: a document like this one for each, in the order
in which they were given. ``exit_code`` is the gravest of theirs, ``error`` null.

``verify`` adds ``original``, ``rewritten`` and ``proof``.

``report.schema.json``, beside this file, says the same for programs; it is written from the
classes, see `onnxgen.report.schema`. Numbers that JSON cannot say are the strings "Infinity", "-Infinity" and "NaN".
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from onnxgen import __version__
from onnxgen.report.contexts import Contexts
from onnxgen.report.inspection import Inspection
from onnxgen.report.render import STARTS
from onnxgen.report.values import SCHEMA_VERSION, Outcome, Proof, Report, Site

START = STARTS[".json"]
"""What every document of ours begins with, as `dumps` writes it."""


def render(outcome: Outcome) -> str:
    """The outcome of any command as text."""
    return dumps(document_of(outcome))


def document_of(outcome: Outcome) -> dict[str, Any]:
    """The outcome of any command, see above."""
    code, error = outcome.exit_code, outcome.error
    if outcome.command == "verify":
        models = outcome.original, outcome.rewritten
        return verify_document(*models, outcome.compared, code, error)
    return report_document(outcome.command, outcome.report, code, error)


def report_document(
    command: str, report: Report | None, exit_code: int, error: str | None
) -> dict[str, Any]:
    """The outcome of `onnxgen fuse` or `onnxgen to-paged`."""
    document = _header(command, exit_code, error)
    document["report"] = None
    if report is not None:
        document["report"] = {
            **dataclasses.asdict(report),
            "summary": summary(report.sites),
            "proof": _proof(report.proof),
        }
    return document


def explain_document(
    report: Report | None, places: Sequence[Site], exit_code: int, error: str | None
) -> dict[str, Any]:
    """The outcome of `onnxgen explain`."""
    document = report_document("explain", report, exit_code, error)
    return {**document, "places": [dataclasses.asdict(site) for site in places]}


def inspect_document(found: Inspection | None, exit_code: int, error: str | None) -> dict[str, Any]:
    """The outcome of `onnxgen inspect`."""
    model = None if found is None else dataclasses.asdict(found)
    return {**_header("inspect", exit_code, error), "model": model}


def context_document(
    command: str, said: Contexts | None, exit_code: int, error: str | None
) -> dict[str, Any]:
    """The outcome of `onnxgen context …`."""
    contexts = None
    if said is not None:
        proofs = {backend: _proof(proof) for backend, proof in said.proofs.items()}
        contexts = {**dataclasses.asdict(said), "proofs": proofs}
    return {**_header(command, exit_code, error), "contexts": contexts}


def models_document(
    command: str, documents: Sequence[Mapping[str, Any]], exit_code: int
) -> dict[str, Any]:
    """The outcome of one command for several models."""
    return {**_header(command, exit_code, None), "models": list(documents)}


def verify_document(
    original: str, rewritten: str, proof: Proof | None, exit_code: int, error: str | None
) -> dict[str, Any]:
    """The outcome of `onnxgen verify`."""
    return {
        **_header("verify", exit_code, error),
        "original": original,
        "rewritten": rewritten,
        "proof": _proof(proof),
    }


def summary(sites: list[Site]) -> dict[str, dict[str, int]]:
    """By kind, in the order met: how many sites were found, fused, kept and undone."""
    counts: dict[str, dict[str, int]] = {}
    for site in sites:
        count = counts.setdefault(site.kind, {"found": 0, "fused": 0, "kept": 0, "undone": 0})
        count["found"] += 1
        count[site.status] += 1
    return counts


def dumps(document: Mapping[str, Any]) -> str:
    """The document as text, valid JSON whatever numbers it holds."""
    return json.dumps(_plain(document), indent=2, allow_nan=False) + "\n"


def _header(command: str, exit_code: int, error: str | None) -> dict[str, Any]:
    return {
        "schema": SCHEMA_VERSION,
        "onnxgen": __version__,
        "command": command,
        "exit_code": exit_code,
        "error": error,
    }


def _proof(proof: Proof | None) -> dict[str, Any] | None:
    if proof is None:
        return None
    worst = proof.worst
    return {
        **dataclasses.asdict(proof),
        "worst": None if worst is None else dataclasses.asdict(worst),
    }


def _plain(value: Any) -> Any:
    """Only what JSON knows: NumPy scalars as numbers, tuples as lists, no NaN."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "item"):  # a NumPy scalar
        return _plain(value.item())
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return value
    return str(value)
