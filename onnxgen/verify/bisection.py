"""Where two models that differ start to: the first landmark that is apart, its layer, its rewrite.

Both models run once more on inputs on which they differed, with the values inside that both have
under one name answered too (`onnxgen.verify.landmarks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy.typing as npt

from onnxgen.analysis.feeds import RunShape
from onnxgen.analysis.graph import ancestors
from onnxgen.analysis.scopes import scope_of
from onnxgen.patterns.rule import RULE
from onnxgen.report.values import Origin
from onnxgen.runtime import RuntimeFailure
from onnxgen.verify.landmarks import Landmark, apart
from onnxgen.verify.side import Side

Array = npt.NDArray[Any]
_AT_ONCE = 64  # values answered by one run: all of a large model's would take much memory


def find_origin(
    landmarks: Sequence[Landmark],
    sides: tuple[Side, Side],
    shape: RunShape,
    feeds: Mapping[str, Array],
    tolerance: float,
) -> Origin | None:
    """The first value that is further apart than the tolerance; None where none is, or none runs.

    Args:
        landmarks: in the order of the original.
        sides: the original and the rewritten model, whose inner values the landmarks are; loaded.
        shape, feeds: a run on which the two differ.
    """
    try:
        for found in _runs(landmarks, sides, shape, feeds):
            for landmark, difference in found:
                if difference > tolerance:
                    return _origin(landmark, landmarks, difference)
    except RuntimeFailure:
        return None
    return None


def _runs(
    landmarks: Sequence[Landmark],
    sides: tuple[Side, Side],
    shape: RunShape,
    feeds: Mapping[str, Array],
) -> Iterator[list[tuple[Landmark, float]]]:
    for start in range(0, len(landmarks), _AT_ONCE):
        some = landmarks[start : start + _AT_ONCE]
        names = [each.name for each in some]
        before, after = (side.run(feeds, names) for side in sides)
        yield apart(some, shape, before, after)


def _origin(landmark: Landmark, landmarks: Sequence[Landmark], difference: float) -> Origin:
    """What the value is, and which rewrite lies between it and the landmarks before it."""
    stop = frozenset(each.after for each in landmarks if each is not landmark)
    nodes = list(ancestors([landmark.after], stop))
    made = next((node for node in nodes if RULE in node.metadata_props), None)
    node = made or landmark.after.producer()
    return Origin(
        value=landmark.name,
        layer=landmark.layer or scope_of(nodes),
        node="" if node is None else node.name or "",
        op="" if node is None else node.op_type,
        rule="" if made is None else made.metadata_props[RULE],
        difference=difference,
        place=landmarks.index(landmark) + 1,
        places=len(landmarks),
    )
