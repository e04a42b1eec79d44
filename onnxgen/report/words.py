"""How things are said to a person, in whatever kind of report: names, counts, times, sizes."""

from __future__ import annotations

import math

from onnxgen.report.values import Outcome

TIMES = "\N{MULTIPLICATION SIGN}"

NAMES = {
    "attention": "attention",
    "rms_norm": "RMS norm",
    "layer_norm": "layer norm",
    "rotary": "rotary embedding",
    "projection": "projections of queries, keys and values",
    "norm": "norms with their residual",
    "cache": "cache write",
    "activation": "activation",
    "unattended": "rows that see nothing",
    "moe": "mixture of experts",
    "grouped_matmul": "products with chosen matrices",
    "experts": "experts in the runtime's kernel",
}
"""Kinds of sites."""


def kind_name(kind: str) -> str:
    """What sites of a kind are called; those of users' rules as these say."""
    return NAMES.get(kind, kind)


def many(count: int, noun: str, nouns: str = "") -> str:
    """ "1 case", "2 cases", "1,204 cases"; "2 places are", where nouns are "places are"."""
    return f"{count} {noun}" if count == 1 else f"{count:,} {nouns or f'{noun}s'}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def change(before: float, after: float) -> str:
    """ "+2 %", "±0 %", with a true minus where it is less; "" where nothing was before."""
    if not before:
        return ""
    percent = round(100 * (after - before) / before)
    sign = "\N{MINUS SIGN}" if percent < 0 else "+" if percent > 0 else "±"
    return f"{sign}{abs(percent):,} %"


def number(value: float) -> str:
    """A difference: "3.2e-06", "0", "∞"."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞"
    return f"{value:.1e}" if value else "0"


EXITS = {
    0: "done",
    1: "the result differs",
    2: "the command's words do not fit together",
    3: "refused, or not verifiable",
    4: "a file cannot be read or written",
    5: "an expectation was not met",
}


def verdict(outcome: Outcome) -> tuple[str, str]:
    """One word for how a command ended, and its tone: "good", "bad" or "odd"."""
    if outcome.exit_code == 1:
        return "Differs", "bad"
    if outcome.exit_code:
        return {5: "Not as expected"}.get(outcome.exit_code, "Failed"), "bad"
    proof = outcome.proof
    if proof is None:
        return "Done", "odd"
    return {"proven": ("Proven", "good")}.get(proof.status, (capital(proof.status), "odd"))
