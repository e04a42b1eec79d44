"""What a caller says the result must be: counts of fused places, and an earlier report.

    expectations = Expectations(counts={"attention": 24}, whole=True, baseline=baseline)
    unmet = expectations.unmet(report)       # one clause each, none where all is as expected

A place counts as fused where a rule fused it, and where the exporter itself had written the
operator already: what matters to a pipeline is what the result holds, and an exporter that learns
to write Attention must not fail it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxgen.bounds import in_words
from onnxgen.errors import FileError, UsageError
from onnxgen.report.values import SCHEMA_VERSION, Report, Site
from onnxgen.words import near

WHOLE = "all"
UNCHANGED = "unchanged"
LOWERED = "lowered."  # before the kind of what a target's own rules made

GROWTH = 0.01
"""By how much the written files may outgrow the baseline's, of its size."""

GROWTH_BYTES = 4096
"""And in bytes: names and metadata of a small model come and go."""


@dataclass(frozen=True)
class Baseline:
    """What an earlier report says that must not get worse.

    Attributes:
        name: its file, as given.
        target: "onnx", "ort" or "paged".
        fused: by kind, how many places were fused; see `count_fused`.
        tolerance: what the difference was held to; infinite where nothing was run.
        bytes: of the written model and its data files; 0 where the report does not say.
    """

    name: str
    target: str
    fused: Mapping[str, int]
    tolerance: float
    bytes: int


@dataclass(frozen=True)
class Expectations:
    """What was asked for; by default nothing.

    Attributes:
        counts: by kind, how many places must be fused, no more and no fewer.
        whole: nothing may be kept or undone.
        unchanged: nothing may be left to fuse: the model is in its fused form already.
        baseline: what must not get worse.
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    whole: bool = False
    unchanged: bool = False
    baseline: Baseline | None = None

    def check_kinds(self, kinds: Iterable[str], lowered: Iterable[str]) -> None:
        """Whether there are such kinds: those of raising rules, and of a target's own.

        Raises:
            UsageError: there is none of a name that was given; says which is near.
        """
        known = list(dict.fromkeys([*kinds, *(LOWERED + kind for kind in lowered)]))
        for kind in self.counts:
            if kind not in known:
                hint = near(kind, [*known, WHOLE, UNCHANGED])
                raise UsageError(f"--expect {kind}: no such kind{hint}; kinds: {', '.join(known)}")

    def unmet(self, report: Report) -> list[str]:
        """What is not as expected, a clause each."""
        found = list(self._counts(report))
        if self.whole:
            left = _told(site for site in _sites(report) if site.status != "fused")
            found += [f"all sites were expected to be fused, and {left} are not"] if left else []
        if self.unchanged:
            left = _told(site for site in _sites(report) if site.status == "fused")
            found += (
                [f"nothing was expected to be left to fuse, and there are {left}"] if left else []
            )
        return [*found, *(_worse(report, self.baseline) if self.baseline else ())]

    def _counts(self, report: Report) -> Iterator[str]:
        fused = count_fused(report)
        for kind, expected in self.counts.items():
            if fused.get(kind, 0) != expected:
                left = _told(
                    site
                    for name, sites in (("", report.sites), (LOWERED, report.lowered))
                    for site in sites
                    if name + site.kind == kind and site.status != "fused"
                )
                said = f" ({left})" if left else ""
                yield f"{kind}={expected} was expected, and {fused.get(kind, 0)} are fused{said}"


NOTHING = Expectations()


def count_fused(report: Report) -> dict[str, int]:
    """By kind: places that are fused, by a rule or by the exporter; "lowered.attention" and the
    like are those of the target's own rules."""
    return _count(
        [(site.kind, site.status) for site in report.sites],
        [(site.kind, site.status) for site in report.lowered],
        report.already,
    )


def parse_expectations(words: Sequence[str], baseline: Baseline | None = None) -> Expectations:
    """`KIND=N`, "all" and "unchanged", one or several in a word, separated by commas.

    Raises:
        UsageError: a word is none of these, or a kind has two counts.
    """
    counts: dict[str, int] = {}
    flags: set[str] = set()
    for word in (part.strip() for each in words for part in each.split(",")):
        kind, equals, number = word.partition("=")
        if word in (WHOLE, UNCHANGED):
            flags.add(word)
        elif not (kind and equals and number.isascii() and number.isdigit()):
            hint = "" if equals else near(word, [WHOLE, UNCHANGED])
            raise UsageError(
                f"--expect {word or repr(word)} is none of KIND=N, {WHOLE} and {UNCHANGED}{hint}"
            )
        elif counts.setdefault(kind, int(number)) != int(number):
            raise UsageError(f"--expect gives {kind} two counts, {counts[kind]} and {int(number)}")
    return Expectations(counts, WHOLE in flags, UNCHANGED in flags, baseline)


def read_baseline(path: Path, command: str) -> Baseline:
    """An earlier JSON report of the same command.

    Raises:
        FileError: it cannot be read, or is no JSON report of onnxgen that this version knows.
        UsageError: it is the report of another command, or of a run that failed.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is no JSON report of onnxgen") from error
    if not isinstance(document, dict) or not {"schema", "onnxgen", "command"} <= document.keys():
        raise FileError(f"{path} is no JSON report of onnxgen")
    if document["schema"] != SCHEMA_VERSION:
        raise FileError(
            f"{path} is a report of schema {document['schema']}, and this onnxgen knows "
            f"{SCHEMA_VERSION}"
        )
    if "models" in document:
        raise UsageError(f"{path} is the report of several models: a baseline is that of one")
    if document["command"] != command:
        raise UsageError(f"{path} is a report of {document['command']}, not of {command}")
    if document.get("exit_code") != 0:
        raise UsageError(f"{path} is the report of a run that failed: it is no baseline")
    try:
        return _baseline(str(path), document["report"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"{path} is a damaged report of onnxgen") from error


def _baseline(name: str, report: Mapping[str, Any]) -> Baseline:
    fused = _count(
        [(str(site["kind"]), site["status"]) for site in report["sites"]],
        [(str(site["kind"]), site["status"]) for site in report["lowered"]],
        {str(kind): int(count) for kind, count in report.get("already", {}).items()},
    )
    proof = report["proof"]
    ran = proof is not None and proof["status"] == "proven"
    return Baseline(
        name,
        str(report["target"]),
        fused,
        float(proof["tolerance"]) if ran else math.inf,
        int(report.get("bytes_after", 0)),
    )


def _count(
    sites: Iterable[tuple[str, str]],
    lowered: Iterable[tuple[str, str]],
    already: Mapping[str, int],
) -> dict[str, int]:
    counts = Counter(already)
    counts.update(kind for kind, status in sites if status == "fused")
    counts.update(LOWERED + kind for kind, status in lowered if status == "fused")
    return dict(counts)


def _worse(report: Report, baseline: Baseline) -> Iterator[str]:
    """What is worse than in the baseline, a clause each."""
    fused = count_fused(report)
    for kind, before in baseline.fused.items():
        if fused.get(kind, 0) < before:
            yield f"{fused.get(kind, 0)} {kind} are fused, and {before} were in {baseline.name}"
    worst = report.proof.worst if report.proof is not None else None
    if worst is not None and worst.difference > baseline.tolerance:
        yield (
            f"the largest difference is {worst.difference:.1e}, over the "
            f"{baseline.tolerance:.0e} of {baseline.name}"
        )
    grown = report.bytes_after - baseline.bytes
    if baseline.bytes and grown > GROWTH * baseline.bytes + GROWTH_BYTES:
        now, before_ = in_words(report.bytes_after), in_words(baseline.bytes)
        yield (
            f"the written files grew by {in_words(grown)} to {now}, and were {before_} "
            f"in {baseline.name}"
        )


def _sites(report: Report) -> Iterator[Site]:
    yield from report.sites
    yield from report.lowered


def _told(sites: Iterable[Site]) -> str:
    """Sites by kind and reason: "2 attention (kept: ATT001 no-value-product), 1 rotary (fused)"."""
    counts: Counter[tuple[str, str]] = Counter()
    for site in sites:
        why = site.decline
        said = f"{site.status}: {why.rule} {why.code}" if why is not None else ""
        counts[site.kind, said or ("" if site.status == "fused" else site.status)] += 1
    return ", ".join(
        f"{count} {kind} ({said})" if said else f"{count} {kind}"
        for (kind, said), count in counts.items()
    )
