"""The proof on the page: cases with their differences on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Iterator

from onnxgen.bounds import in_words
from onnxgen.report.page import Html, bar, code, details, pill, section, table, tag
from onnxgen.report.values import Case, Proof
from onnxgen.report.words import capital, many, number
from onnxgen.words import time_in_words

LOWEST = 1e-9
"""Left end of the scale, in standard deviations."""


def proof_section(proof: Proof | None) -> Html:
    """What was run, and how far apart the models were."""
    if proof is None:
        return Html("")
    facts = [tag("li", said) for said in _facts(proof)]
    parts: list[object] = [tag("ul", *facts, class_="plain")] if facts else []
    shown = [case for case in proof.cases if not case.skipped]
    skipped = [case for case in proof.cases if case.skipped]
    if shown:
        high = _top(proof)
        rows = [_row(case, proof, high) for case in shown]
        head = ("Case", "Batch", "New", "Past", "Padding", "", "Difference", "Output")
        parts.append(table(head, rows, numbers=(1, 2, 3, 6)))
        limit = f"The line is the tolerance, {number(proof.tolerance)}; the scale is logarithmic."
        parts.append(tag("div", limit, class_="key"))
    if skipped:
        told = table(("Case", "Why"), [(case.name, capital(case.skipped)) for case in skipped])
        parts.append(details(f"{many(len(skipped), 'case')} skipped", told))
    if not parts:
        parts.append(tag("p", capital(proof.reason or "nothing was run")))
    note = "Differences are in standard deviations of the original's output." if shown else ""
    return section("Proof", *parts, note=note)


def _row(case: Case, proof: Proof, high: float) -> tuple[object, ...]:
    lengths = (case.batch, case.new, case.past, case.padding)
    if case.outside:
        return (case.name, *lengths, pill("outside the contract", "odd"), "", capital(case.outside))
    good = case.difference <= proof.tolerance
    drawn = bar(
        _place(case.difference, high),
        tone="good" if good else "bad",
        mark=_place(proof.tolerance, high),
    )
    figure = number(case.difference) if good else pill(number(case.difference), "bad")
    return (case.name, *lengths, drawn, figure, code(case.output))


def _top(proof: Proof) -> float:
    finite = [case.difference for case in proof.cases if math.isfinite(case.difference)]
    return max(100 * proof.tolerance, *finite, LOWEST * 10)


def _place(difference: float, high: float) -> float:
    if not math.isfinite(difference):
        return 1.0
    if difference <= LOWEST:
        return 0.0
    return math.log(difference / LOWEST) / math.log(high / LOWEST)


def _facts(proof: Proof) -> Iterator[str]:
    if proof.rewrites:
        yield (
            f"{many(proof.rewrites, 'rewrite')} checked in place, "
            f"{many(proof.structures, 'distinct structure')}, largest difference "
            f"{number(proof.rewrite_difference)}."
        )
    if proof.inner:
        yield (
            f"{many(proof.inner, 'value')} inside both models compared, largest difference "
            f"{number(proof.inner_difference)}."
        )
    if proof.layers:
        yield f"{proof.layers_run} of {many(proof.layers, 'part')} run, one of each kind."
    if proof.origin is not None:
        yield f"{capital(str(proof.origin))}."
    if proof.twins:
        yield f"Compared as float32 twins of {' and '.join(proof.twins)}."
    if proof.note:
        yield f"{capital(proof.note)}."
    for each in proof.faint:
        yield (
            f"The outputs hardly depend on the {each.what} ({number(each.effect)}): they show "
            "little of it, and the values inside were compared too."
        )
    for missing in proof.not_run:
        yield f"Not run: {missing}."
    if proof.seconds:
        memory = f" in at most {in_words(proof.memory)} of memory" if proof.memory else ""
        yield f"ONNX Runtime ran {time_in_words(proof.seconds)}{memory}."
