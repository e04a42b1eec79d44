"""Pages: what a rule's file says of it, read off the file's docstring.

The docstring is the one source of `onnxgen rules`, of the reference in `docs/` and `cli.md`, and of
what `onnxgen explain` says of a decline. Its first line is `CODE: title.`; sections follow, each a
line without indent and a block that is indented:

    Replaces     what stands there, and the operator that says the same
    Looks for    `1. ...`: what has to hold, in the order in which the rule asks
    Declines     `code: when.`, and below it `Expected: ...` and `Change: ...`: what would have been
                 taken, and what a user can do about it
    Numerics     what may differ, and by how much
    Seen in      exporters and versions that write it
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

SECTIONS = ("Replaces", "Looks for", "Declines", "Numerics", "Seen in")
_ENTRY = re.compile(r"([a-z][a-z0-9-]*|[A-Z]{3}\d{3}): (.*)")
_STEP = re.compile(r"\d+\. (.*)")


@dataclass(frozen=True)
class Reason:
    """Why a rule may decline.

    Attributes:
        code: a stable slug, such as "epsilon-place".
        when: what was met.
        expected: what the rule would have taken.
        change: what the user can do: an option, an exporter's setting, or that nothing helps.
    """

    code: str
    when: str
    expected: str = ""
    change: str = ""


@dataclass(frozen=True)
class Page:
    """What is said of one rule.

    Attributes:
        code: the rule's code, such as "ATT001".
        title: what is rewritten, in one line.
        sections: text by heading, without indent; those of `SECTIONS` and any others.
        steps: what the rule looks for, in order.
        reasons: why it may decline, by code.
    """

    code: str
    title: str
    sections: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[str, ...] = ()
    reasons: Mapping[str, Reason] = field(default_factory=dict)


# What the engine says of any rule's rewrite.
ENGINE = {
    reason.code: reason
    for reason in (
        Reason(
            "cycle",
            "an input of the fused node needs its output",
            "inputs that are computed without what is replaced",
            "none: the graph itself mixes the two",
        ),
        Reason(
            "check-failed",
            "the rewrite was run beside what it replaces, and differed or failed",
            "equal results on ONNX Runtime, within the tolerance",
            "please report it with the model: a rewrite that differs is a defect of onnxgen; "
            "--disable CODE leaves the rule out",
        ),
    )
}


def page_of(rule: type, code: str) -> Page:
    """The page of a rule: of the file that its class is in."""
    return read_page(sys.modules[rule.__module__].__doc__ or "", code)


def reason_of(rule: type, code: str) -> Reason:
    """What is said of one of a rule's reasons, by its own page, a base class's, or the engine's."""
    for each in rule.__mro__:
        found = page_of(each, "").reasons.get(code)
        if found is not None:
            return found
    return ENGINE.get(code, Reason(code, ""))


@cache
def read_page(text: str, code: str) -> Page:
    """A docstring as a page; what it leaves out is empty."""
    title, _, body = text.strip().partition("\n")
    sections = dict(_sections(body))
    return Page(
        code,
        title.removeprefix(f"{code}: ").removesuffix("."),
        sections,
        tuple(_steps(sections.get("Looks for", ""))),
        {reason.code: reason for reason in _reasons(sections.get("Declines", ""))},
    )


def _sections(body: str) -> Iterator[tuple[str, str]]:
    """Headings, which are not indented, and the blocks below them."""
    heading, lines = "", list[str]()
    for line in [*body.splitlines(), "end"]:
        if not line or line.startswith("    "):
            lines.append(line[4:])
            continue
        if heading:
            yield heading, "\n".join(lines).strip("\n")
        heading, lines = line.strip(), []


def _steps(text: str) -> Iterator[str]:
    yield from (_STEP.sub(r"\1", " ".join(entry)) for entry in _blocks(text, _STEP))


def _reasons(text: str) -> Iterator[Reason]:
    for entry in _blocks(text, _ENTRY):
        parts = {"when": ""}
        at = "when"
        for line in entry:
            for word in ("Expected", "Change"):
                if line.startswith(f"{word}: "):
                    at, line = word.lower(), line.removeprefix(f"{word}: ")
            parts[at] = f"{parts.get(at, '')} {line}".strip()
        found = _ENTRY.match(parts.pop("when"))
        assert found is not None
        yield Reason(found[1], found[2], **parts)


def _blocks(text: str, start: re.Pattern[str]) -> Iterator[list[str]]:
    """Entries that begin where a line without indent matches; all their lines, stripped."""
    entry: list[str] = []
    for line in text.splitlines():
        if start.match(line):
            if entry:
                yield entry
            entry = [line.strip()]
        elif entry and line.startswith(" "):
            entry.append(line.strip())
        elif entry and line.strip():
            yield entry
            entry = []
    if entry:
        yield entry
