"""Cache names as onnxruntime-genai asks for them: one text for all layers, with %d for the number.

    template = name_templates([Cache("past.0.key", "past.0.value", "out.0.key", "out.0.value"), ..])
    template.past_key                        # "past.%d.key"

The runtime makes the names with snprintf, counts layers by the inputs that begin and end like the
template of the keys, and gives the four names of a layer the same number.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

LONGEST = 63  # characters of a name that the runtime composes


class Cache(NamedTuple):
    """What one layer's cache is called, or the template of all."""

    past_key: str
    past_value: str
    present_key: str
    present_value: str


def name_templates(caches: Sequence[Cache], inputs: Collection[str]) -> Cache | str:
    """The four templates; why the names fit none, as one sentence.

    Args:
        caches: of each layer, in any order; at least one.
        inputs: the names of all the model's inputs.
    """
    for name in (name for cache in caches for name in cache):
        if "%" in name:
            return f"'{name}' holds a %"
        if len(name) > LONGEST:
            return f"'{name}' is longer than {LONGEST} characters"
    found = [_templates(names) for names in zip(*caches, strict=True)]
    for names, options in zip(zip(*caches, strict=True), found, strict=True):
        if not options:
            return f"'{names[0]}' … '{names[-1]}' are not one name with a number for each layer"
    for key, numbers in found[0].items():
        others = [_with_numbers(options, numbers) for options in found[1:]]
        if not all(others) or len(set(numbers)) < len(numbers):
            continue
        if _counted(key, inputs) == {cache.past_key for cache in caches}:
            return Cache(key, *others)
    first = ", ".join(f"'{name}'" for name in caches[0])
    return f"the names of one layer's cache, {first}, do not bear one number that is the layer's"


def _templates(names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Each template that gives these names, and the numbers that it does it with."""
    options: dict[str, tuple[int, ...]] = {}
    for match in re.finditer(r"\d+", names[0]):
        before, after = names[0][: match.start()], names[0][match.end() :]
        middles = [_between(name, before, after) for name in names]
        if all(middle is not None for middle in middles):
            options[f"{before}%d{after}"] = tuple(int(str(middle)) for middle in middles)
    return options


def _between(name: str, before: str, after: str) -> str | None:
    """The number between two texts, as %d writes it."""
    if not (name.startswith(before) and name.endswith(after)):
        return None
    middle = name[len(before) : len(name) - len(after)]
    return middle if re.fullmatch(r"0|[1-9]\d*", middle) else None


def _with_numbers(options: dict[str, tuple[int, ...]], numbers: tuple[int, ...]) -> str:
    return next((text for text, found in options.items() if found == numbers), "")


def _counted(template: str, inputs: Collection[str]) -> set[str]:
    """The inputs that the runtime takes for keys: those that begin and end like the template."""
    before, after = template.split("%d")
    return {
        name
        for name in inputs
        if len(name) > len(before) + len(after) and name.startswith(before) and name.endswith(after)
    }
