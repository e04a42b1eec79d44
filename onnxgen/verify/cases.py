"""Which runs two models are compared on.

`plan` takes what the graph allows of: prefill, several new tokens over a past, one new token;
batches of one, two and three; no, left and right padding; and lengths on both sides of every
edge, where a window starts to hide keys or a rotary switches its frequencies.

Shapes: B batch, S new tokens, P past, T = P + S.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxgen.analysis.edges import LONGEST
from onnxgen.analysis.feeds import (
    RunShape,
    forced_shape,
    make_feeds,
    misfit,
    nearest_shape,
    too_much,
)
from onnxgen.analysis.roles import Roles

Array = npt.NDArray[Any]
MOST_BYTES = 1 << 29
"""No run is fed caches larger than this."""

_LONGEST_PREFILL = 1024


@dataclass(frozen=True)
class Run:
    """One run of both models, or, with a reason, one that is not made.

    Attributes:
        name: what it is about.
        shape: its lengths.
        steps: greedy steps that follow, each model on its own cache.
        skipped: why it is not run, else "".
        seed: of what is fed; another for every run, since the tokens of one are few.
        instead: made only where the original fails on the run before, in its place.
        scale: of the caches that are fed.
    """

    name: str
    shape: RunShape
    steps: int = 0
    skipped: str = ""
    seed: int = 0
    instead: bool = False
    scale: float = 1.0


def plan(
    roles: Roles, edges: Iterable[int] = (), longest: int | None = None, *, quick: bool = False
) -> list[Run]:
    """The runs that the graph's fixed lengths allow, those with greedy steps last.

    Of the runs with steps one is enough: the first that the original can do.

    Args:
        edges: total lengths at which behaviour may switch.
        longest: the most tokens, past and new, where a model says how many it takes.
        quick: a handful: no lengths around edges, no greedy steps.
    """
    shapes = [*_QUICK] if quick else [*_SHAPES, *_last(roles, longest)]
    if not {"S", "P", "T"} & {letter for each in roles.inputs.values() for letter in each.axes}:
        # An image or audio encoder: only the batch varies, and where it is free the length.
        free = any(
            not letter and not isinstance(dim, int)
            for each in roles.inputs.values()
            for dim, letter in zip(each.shape, each.axes, strict=True)
        )
        lengths = (7, 400) if free else (7,)
        shapes = [RunShape(batch, encoder=length) for length in lengths for batch in (1, 2, 3)]
    if roles.counted:
        shapes += _COUNTED
    runs = _fitting(roles, [Run("", shape) for shape in shapes])
    runs += _fitting(roles, [] if quick else _edge_runs(roles, edges))
    chains: list[Run] = []
    if not quick and roles.pairs and (roles.named("ids") or roles.named("embeds")):
        caps = [pair.cap for pair in roles.pairs if pair.cap is not None]
        full = [RunShape(2, 3, max(caps) + 2, "left")] if caps else []
        chains = _fitting(roles, [Run("", shape, 3) for shape in (*_CHAINS, *full)])
    tokens = {"S", "P", "T"} & {letter for each in roles.inputs.values() for letter in each.axes}
    seen: set[tuple[RunShape, int]] = set()
    kept: list[Run] = []
    for group in (
        *([run] for run in runs),
        *(_far(roles) if tokens and not quick else ()),
        *([c] for c in chains),
    ):
        for number, run in enumerate(group):
            key = (run.shape, run.steps)
            if key in seen:
                break
            seen.add(key)
            name = run.name or _name(roles, run)
            kept.append(replace(run, name=name, seed=len(kept), instead=number > 0))
    return kept


def _far(roles: Roles) -> list[list[Run]]:
    """Of each group, the first that the original can do is run."""
    return [_fitting(roles, [Run("", shape) for shape in shapes]) for shapes in _FAR]


def feeds_of(roles: Roles, run: Run) -> dict[str, Array]:
    """What a run is fed."""
    feeds = make_feeds(roles, run.shape, np.random.default_rng(run.seed))
    for each in roles.named("past") if run.scale != 1 else ():
        if each.dtype.is_floating_point():
            feeds[each.name] = (feeds[each.name] * run.scale).astype(feeds[each.name].dtype)
    return feeds


def again(runs: Sequence[Run]) -> list[Run]:
    """The runs without steps on other values, where a difference came near the tolerance."""
    return [
        replace(run, name=f"{run.name}, other values {turn}", seed=run.seed + 1000 * turn, scale=by)
        for turn, by in enumerate(_SCALES, 1)
        for run in runs
        if not run.steps and not run.skipped
    ]


_SCALES = (1.0, 3.0, 0.3)
_SHAPES = (
    RunShape(1, 5),
    RunShape(2, 4),
    RunShape(2, 5, padding="left"),
    RunShape(2, 5, padding="right"),
    RunShape(3, 6, padding="left", pads=(3, 0, 1), encoder=5),
    RunShape(3, 6, padding="right", pads=(0, 4, 1), encoder=5),
    RunShape(1, 3, 7),
    RunShape(2, 3, 5),
    RunShape(2, 3, 7, padding="left"),
    RunShape(1, 4, 6, padding="left"),  # all that some kernels take over a past
    RunShape(2, 4, 2, padding="left", pads=(4, 1)),  # longer than the past
    RunShape(2, 4, 7, padding="right"),
    RunShape(1, 4, 7, padding="right", pads=(1,)),
    RunShape(1, 5, padding="left", pads=(1,)),
    RunShape(1, 1),
    RunShape(1, 1, 7),
    RunShape(2, 1, 8),
    RunShape(2, 1, 8, padding="left", encoder=5),
    RunShape(3, 1, 9, padding="left", pads=(0, 5, 8)),
    RunShape(2, 1, 7, padding="right"),
    RunShape(1, 1, 7, padding="right", pads=(1,)),
)
# Prompts and pasts as users have them: tables have a row for every position, and frequencies that
# turn hardly at all among the first.
_FAR = (
    (RunShape(1, 130), RunShape(1, 90), RunShape(1, 40)),
    (RunShape(2, 33, padding="left", pads=(20, 0)),),
    (RunShape(2, 33, padding="right", pads=(0, 17)),),
    (RunShape(1, 4, 61),),
    (
        RunShape(2, 1, 250, padding="left", pads=(0, 90)),
        RunShape(2, 1, 85, padding="left", pads=(0, 30)),
    ),
    (RunShape(2, 1, 777), RunShape(2, 1, 90)),
)
_QUICK = (
    RunShape(1, 5),
    RunShape(2, 5, padding="left"),
    RunShape(2, 5, padding="right"),
    RunShape(1, 3, 7),
    RunShape(2, 1, 8, padding="left", encoder=5),
)
# Caches with places to spare, and rows of very different lengths.
_COUNTED = (
    RunShape(2, 5, spare=4),
    RunShape(2, 5, padding="right", spare=1),
    RunShape(1, 3, 7, spare=5),
    RunShape(1, 3, 7, padding="right"),
    RunShape(3, 1, 9, padding="right", pads=(0, 5, 8)),
    RunShape(3, 1, 9, padding="right", pads=(2, 0, 7), spare=3),
)
# Greedy steps start from the first of these that the original can run.
_CHAINS = (
    RunShape(2, 5, padding="left"),
    RunShape(2, 5),
    RunShape(1, 5),
    RunShape(2, 1, 7, padding="left"),
    RunShape(2, 1, 7),
    RunShape(1, 1, 7),
    RunShape(1, 3, 7),
)


def _last(roles: Roles, longest: int | None) -> list[RunShape]:
    """Runs that end on the last place there is, and behind it."""
    if longest is None or longest < 8 or not roles.pairs or too_large(roles, longest):
        return []
    return [RunShape(1, 1, longest - 1), RunShape(1, 3, longest - 3), RunShape(1, 1, longest)]


def _edge_runs(roles: Roles, edges: Iterable[int]) -> list[Run]:
    runs: list[Run] = []
    for edge in sorted(set(edges)):
        if roles.pairs:
            shapes = [
                RunShape(1, 1, edge - 1),
                RunShape(1, 1, edge),
                RunShape(1, 4, max(edge - 2, 0)),
                RunShape(2, 3, edge + 1, padding="left", pads=(2, 0)),
                RunShape(2, 3, edge + 1),
            ]
            if edge <= 64:
                shapes.append(RunShape(1, edge + 1))
        elif roles.named("ids") or roles.named("embeds"):
            shapes = [RunShape(1, edge), RunShape(1, edge + 1)]
        else:
            continue
        reason = too_large(roles, edge)
        if reason:
            runs.append(Run(f"lengths around {edge}", shapes[-1], skipped=reason))
            continue
        runs += [Run("", shape) for shape in shapes]
    return runs


def too_large(roles: Roles, edge: int) -> str:
    longest = LONGEST if roles.pairs else _LONGEST_PREFILL
    if edge > longest:
        return f"not run: longer than {longest} tokens"
    size = 0
    for pair in roles.pairs:
        past = roles.inputs[pair.past]
        sizes = {"B": 2, "P": min(edge + 1, pair.cap or edge + 1)}
        item = past.dtype.itemsize
        for dim, letter in zip(past.shape, past.axes, strict=True):
            item *= dim if isinstance(dim, int) else sizes.get(letter, 1)
        size += int(item)
    if size > MOST_BYTES:
        return f"not run: its caches take {size >> 20} MiB"
    return ""


def _fitting(roles: Roles, runs: Sequence[Run]) -> list[Run]:
    """The runs as the graph's fixed lengths force them; those that cannot be are left out, and
    those that are too large for us say so.
    """
    kept: list[Run] = []
    for run in runs:
        if run.skipped:
            kept.append(run)
            continue
        shape = forced_shape(roles, run.shape)
        # A static cache that is too short for a run is run as far as it goes.
        cut = roles.static_room is not None and (shape is None or _stuck(roles, shape))
        if cut and (shape is None or run.steps):
            shape = nearest_shape(roles, run.shape, 4 if run.steps else 0)
        if shape is None:
            reason = misfit(roles, run.shape)
            if reason and reason == too_much(roles, run.shape):  # that alone
                kept.append(replace(run, skipped=f"not run: {reason}"))
            continue
        if run.steps and ((shape.new != run.shape.new and not cut) or _stuck(roles, shape)):
            continue
        kept.append(replace(run, shape=shape))
    return kept


def _stuck(roles: Roles, shape: RunShape) -> bool:
    """True where the graph takes no single token after this run."""
    one = RunShape(shape.batch, 1, shape.total + 3, encoder=shape.encoder)
    return bool(misfit(roles, one))


def _name(roles: Roles, run: Run) -> str:
    shape = run.shape
    tokens = {"S", "P", "T"} & {letter for each in roles.inputs.values() for letter in each.axes}
    if not tokens:
        name = f"batch {shape.batch}"
        return name if shape.encoder == 7 else f"{name}, length {shape.encoder}"
    if not roles.pairs:
        name = "1 token" if shape.new == 1 else f"{shape.new} tokens"
    elif shape.past == 0:
        name = f"prefill of {shape.new}"
    elif shape.new == 1:
        name = f"decode over past {shape.past}"
    else:
        name = f"{shape.new} tokens over past {shape.past}"
    if run.steps:
        name = f"{run.steps} greedy steps after {name}"
    if shape.batch > 1:
        name += f", batch {shape.batch}"
    if shape.padding != "none":
        name += f", {shape.padding} padding {'/'.join(map(str, shape.pads))}"
    if shape.spare:
        name += f", {shape.spare} places to spare"
    return name
