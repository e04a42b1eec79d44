"""The steps that the original and the paged model go through: who joins, what runs, who leaves.

    a prompt -> another beside a single token -> a chunk -> .. -> lengths on both sides of each edge

A program is made for a size of blocks, and crosses every edge of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """One step of the program that both models go through.

    Attributes:
        joins: sequences that come, by name: (prompt tokens, past tokens, the sequence whose
            beginning it shares or "").
        counts: how many waiting tokens of each sequence run; single ones are the likeliest next.
        leaves: sequences that go before the run.
    """

    joins: Mapping[str, tuple[int, int, str]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()


def program(
    block_size: int, edges: Sequence[int], *, sharing: bool = True, far: bool = True
) -> list[Event]:
    """What is run for a block size.

    Args:
        edges: lengths at which a mask starts to hide keys, or tables switch.
        sharing: whether one sequence takes another's block as its beginning.
        far: whether there is a prompt of 90 tokens, and pasts of some hundreds.
    """
    size = block_size
    near = [edge for edge in edges if edge <= 64]
    events = [
        Event({"a": (5, 0, "")}, {"a": 5}),
        Event({"b": (size + 1, 0, "")}, {"a": 1, "b": size + 1}),
        Event({"c": (size + 3, 0, "")}, {"c": 3, "b": 0, "a": 1}),
        Event({}, {"a": 1, "b": 1, "c": size}),
        Event({"d": (size + 4, 0, "b" if sharing else "")}, {"d": 4, "a": 1, "c": 1}),
        Event({"e": (2 * size, 0, "")}, {"b": 1, "e": 2 * size, "c": 1, "d": 1}, ("a",)),
    ]
    # z waits: it has neither new tokens nor any before.
    events.append(Event({"z": (2, 0, "")}, {"e": 1, "d": 1, "z": 0, "c": 1, "b": 1}))
    events.append(Event({}, {"e": 1, "d": 1, "z": 2, "c": 1, "b": 1}))
    if far:  # positions as users have them
        events += [
            Event({"f": (90, 0, ""), "g": (6, 150, "")}, {"f": 90, "g": 6, "d": 1}),
            Event({"h": (3, 700, "")}, {"f": 1, "g": 1, "h": 3}),
            Event({}, {"h": 1, "e": 1}, ("f", "g")),
            Event({}, {"e": 1}, ("h",)),
        ]
    for edge in near:
        events.append(Event({f"n{edge}": (edge + 2, 0, "")}, {f"n{edge}": edge + 2, "c": 1}))
        events.append(Event({}, {"c": 1, f"n{edge}": 1}))
    for edge in edges:
        past = max(edge - 2, 0)
        name = f"p{edge}"
        events.append(Event({name: (4, past, "")}, {name: 1, "d": 1}))
        events += [Event({}, {name: 1}), Event({}, {"d": 1, name: 2}), Event({}, {name: 1})]
        events.append(Event({}, {"d": 1}, (name,)))
    return events
