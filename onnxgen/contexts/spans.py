"""Positions as text, `0-5,9,6-8`, in any order."""

from __future__ import annotations

import re
from collections.abc import Sequence


def as_spans(positions: Sequence[int]) -> str:
    """The text; runs that ascend by one are written as their first and last."""
    spans: list[list[int]] = []
    for position in positions:
        if spans and spans[-1][1] + 1 == position:
            spans[-1][1] = position
        else:
            spans.append([position, position])
    return ",".join(f"{first}-{last}" if first != last else str(first) for first, last in spans)


def from_spans(text: object, count: int) -> list[int] | None:
    """The positions, if they are each of 0 to `count` - 1 once; else None."""
    found = parsed_spans(text, count)
    return found if found is not None and sorted(found) == list(range(count)) else None


def parsed_spans(text: object, count: int) -> list[int] | None:
    """The positions, all below `count`; None where the text is none of ours."""
    if not isinstance(text, str):
        return None
    found: list[int] = []
    for span in filter(None, text.split(",")):
        parts = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", span, re.ASCII)
        if parts is None:
            return None
        first, last = int(parts[1]), int(parts[2] or parts[1])
        if last < first or last >= count or len(found) + last - first >= count:
            return None
        found += range(first, last + 1)
    return found
