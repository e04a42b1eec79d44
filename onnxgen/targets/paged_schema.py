"""com.microsoft::PagedAttention as the installed ONNX Runtime has it: it changes with releases."""

from __future__ import annotations

import functools
from dataclasses import dataclass

DOMAIN, NAME = "com.microsoft", "PagedAttention"
WIDTH = 8
"""Of a head, and of half of what is rotated of it: a multiple of this."""


@dataclass(frozen=True)
class LiveSchema:
    """com.microsoft::PagedAttention as an installed ONNX Runtime has it.

    Attributes:
        version: of ONNX Runtime.
        inputs: names, in order.
        required: those of them that must be given.
        attributes: names.
    """

    version: str
    inputs: tuple[str, ...]
    required: frozenset[str]
    attributes: frozenset[str]


@functools.cache
def live_schema() -> LiveSchema | None:
    """The operator of the installed ONNX Runtime; None where it has none."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    for each in state.get_all_operator_schema():
        if each.domain == DOMAIN and each.name == NAME:
            single = [i for i in each.inputs if str(i.option).endswith("Single")]
            return LiveSchema(
                onnxruntime.__version__,
                tuple(i.name for i in each.inputs),
                frozenset(i.name for i in single),
                frozenset(each.attributes),
            )
    return None
