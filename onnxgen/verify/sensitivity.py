"""What a model's outputs depend on: the original runs twice, with one thing changed.

A model whose outputs hardly move when its past, its positions or its mask change would hide a
mistake in any of them: weights as they are initialised, or at zero, make such models.

Shapes: B batch, S new tokens, P past.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxgen.analysis.feeds import RunShape, make_feeds, nearest_shape
from onnxgen.analysis.roles import Roles
from onnxgen.report.values import Faint
from onnxgen.runtime import RuntimeFailure
from onnxgen.verify.difference import NotANumberError, scaled_difference
from onnxgen.verify.side import Side

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

LITTLE = 10
"""Tolerances: what moves the outputs by less is hardly seen in them. A tenth of it could be wrong."""


def faint_inputs(side: Side, roles: Roles, tolerance: float) -> list[Faint]:
    """What the outputs of a loaded model hardly depend on; what cannot be tried is left out."""
    found = []
    for what, given, changed in _trials(roles):
        try:
            effect = _effect(roles, side.run(given), side.run(changed))
        except (RuntimeFailure, NotANumberError):
            continue
        if effect is not None and effect < LITTLE * tolerance:
            found.append(Faint(what, effect))
    return found


def _trials(roles: Roles) -> Iterator[tuple[str, Feeds, Feeds]]:
    """(what is changed, a run's inputs, the changed ones)."""
    shape = nearest_shape(roles, RunShape(1, 3, 7))
    if shape is None:
        return
    given = make_feeds(roles, shape, np.random.default_rng(0))
    other = make_feeds(roles, shape, np.random.default_rng(1))
    if shape.past:
        pasts = {pair.past: other[pair.past] for pair in roles.pairs}
        yield "past", given, {**given, **pasts}
    moved = _moved(roles, shape, given)
    if moved:
        yield "positions", given, {**given, **moved}
    padded = nearest_shape(roles, RunShape(1, 3, 7, padding="left", pads=(3,)))
    if padded is not None and padded.padding != "none" and roles.named("mask"):
        # Only the mask is changed: positions stay, or what is counted would move too.
        feeds = make_feeds(roles, padded, np.random.default_rng(0))
        masks = {each.name: feeds[each.name] for each in roles.named("mask")}
        base = make_feeds(roles, _unpadded(padded), np.random.default_rng(0))
        yield "mask", base, {**base, **masks}


def _moved(roles: Roles, shape: RunShape, given: Feeds) -> Feeds:
    """Other positions for the tokens: those that are fed, else the tokens in another order."""
    positions = roles.named("positions")
    if positions:
        found = {}
        for each in positions:
            rows = 2 * given[each.name] + 1
            found[each.name] = rows % each.bound if each.bound else rows
        return found
    tokens = [*roles.named("ids"), *roles.named("embeds")][:1]
    found = {}
    for each in tokens:
        if "S" in each.axes and shape.new > 2:
            axis = each.axes.index("S")
            order = [*range(shape.new - 2, -1, -1), shape.new - 1]
            found[each.name] = np.take(given[each.name], order, axis)
    return found


def _unpadded(shape: RunShape) -> RunShape:
    return RunShape(shape.batch, shape.new, shape.past, encoder=shape.encoder, spare=shape.spare)


def _effect(roles: Roles, before: Feeds, after: Feeds) -> float | None:
    """How far the rows of the last token moved; None where no output has rows of tokens."""
    effects = []
    for name, output in roles.outputs.items():
        if output.role in ("present", "copy") or not isinstance(before[name], np.ndarray):
            continue
        if before[name].shape != after[name].shape:
            continue
        moved = after[name]
        if "S" in output.axes and len(output.axes) == moved.ndim:
            last = [slice(None)] * moved.ndim
            last[output.axes.index("S")] = slice(-1, None)
            moved = before[name].copy()
            moved[tuple(last)] = after[name][tuple(last)]
        if np.issubdtype(moved.dtype, np.floating):
            effects.append(scaled_difference(before[name], moved))
    return max(effects, default=None)
