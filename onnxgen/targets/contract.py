"""What a lowered model assumes of its inputs. Outside it the model fails; it never answers wrongly.

The contract stands in the model's metadata as JSON and in the report; `onnxgen verify` reads it
there, compares inside it, and demands a failure (or the right answer) outside.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from onnxgen.analysis.feeds import RunShape

KEY = "onnxgen.contract"
Padding = Literal["any", "right", "none"]


@dataclass(frozen=True)
class Contract:
    """Which runs a model takes.

    Attributes:
        padding: "any"; "right": none but behind a prompt's tokens; "none".
        max_length: the most tokens, past and new (T); None where nothing limits them.
        chunked_batches: whether several new tokens over a past are taken for batches above one.
    """

    padding: Padding = "any"
    max_length: int | None = None
    chunked_batches: bool = True

    def refuses(self, shape: RunShape) -> str:
        """Why a run is outside the contract, as one sentence; "" where it is inside."""
        padded = shape.padding if any(shape.pads) else "none"
        if padded != "none" and self.padding == "none":
            return "the model was written for inputs without padding"
        if self.padding == "right" and (
            padded in ("left", "holes") or (padded == "right" and shape.past)
        ):
            return "the model was written for padding behind a prompt's tokens only"
        if self.max_length is not None and shape.total > self.max_length:
            return f"the model was written for at most {self.max_length} tokens"
        if not self.chunked_batches and shape.batch > 1 and shape.new > 1 and shape.past:
            return "several new tokens over a past are taken for one sequence only"
        return ""

    def both(self, other: Contract) -> Contract:
        """What is inside this contract and inside another."""
        strictest = ("any", "right", "none")
        lengths = [each.max_length for each in (self, other) if each.max_length is not None]
        return Contract(
            max(self.padding, other.padding, key=strictest.index),
            min(lengths, default=None),
            self.chunked_batches and other.chunked_batches,
        )

    def __str__(self) -> str:
        said = [f"padding {self.padding}"]
        if self.max_length is not None:
            said.append(f"at most {self.max_length} tokens")
        if not self.chunked_batches:
            said.append("several new tokens over a past for one sequence only")
        return ", ".join(said)


def write_contract(model: ir.Model, contract: Contract) -> None:
    """Put the contract into a model's metadata; the empty one leaves no trace."""
    model.metadata_props.pop(KEY, None)
    if contract != Contract():
        model.metadata_props[KEY] = json.dumps(dataclasses.asdict(contract))


def read_contract(model: ir.Model) -> Contract:
    """The contract in a model's metadata; the empty one where there is none, or none that we know."""
    try:
        found = json.loads(model.metadata_props[KEY])
        return Contract(**found)
    except (KeyError, TypeError, ValueError, RecursionError):
        return Contract()
