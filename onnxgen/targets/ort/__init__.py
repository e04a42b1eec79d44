"""The target `ort`: what onnxruntime-genai's model builder writes by hand, from any export.

GroupQueryAttention with the rotary embedding inside, packed queries, keys and values, norms that
add the residual, experts with their router inside. Its contract says what these kernels take (`onnxgen.targets.contract`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from onnxgen.analysis.masks import MaskFamily
from onnxgen.patterns import RULES as RAISED
from onnxgen.patterns.experts import Experts as ExpertsOfNumbers
from onnxgen.patterns.quantised_experts import QuantisedExperts
from onnxgen.patterns.rule import Rule
from onnxgen.targets.contract import Contract, Padding
from onnxgen.targets.ort.attention import GroupQuery
from onnxgen.targets.ort.experts import Experts
from onnxgen.targets.ort.lengths import name_guards
from onnxgen.targets.ort.norms import SkipNorm
from onnxgen.targets.ort.packing import PackedProjections
from onnxgen.targets.ort.rotary_caches import FEWEST

__all__ = ["CODES", "KEPT", "LONGEST", "RAISING", "RULES", "Lowering", "Settings", "name_guards"]

DEFAULT_LENGTH = 32768
LONGEST = 1 << 24
"""No rotary caches are made for more positions than this: they would take gigabytes."""


@dataclass(frozen=True)
class Settings:
    """What the user may choose.

    Attributes:
        padding: which padding the model must take.
        max_length: rows of the rotary caches, the most tokens past and new; 0 for as many as the
            model's own tables hold, at most 32768.
    """

    padding: Padding = "any"
    max_length: int = 0


# Raising rules that are left out: their operator is this target's own.
KEPT = frozenset({"MSA001"})

RULES: tuple[type[Rule], ...] = (GroupQuery, PackedProjections, SkipNorm, Experts)
CODES = (*(rule.code for rule in RULES), QuantisedExperts.code)


def _raising() -> Iterator[Rule]:
    for rule in RAISED:
        if rule.code == ExpertsOfNumbers.code:
            yield QuantisedExperts(Experts())  # says more of them, so before
        yield rule


RAISING = tuple(_raising())
"""The raising rules, with those of which only these kernels make something."""


class Lowering:
    """The lowering of one model.

    Attributes:
        rules: in the order in which they are applied.
        assumed: the contract that every rewrite is checked within.
    """

    def __init__(self, settings: Settings, families: Mapping[str, MaskFamily]) -> None:
        """Prepare the rules.

        Args:
            families: what the mask of each Attention node means, by node name.
        """
        length = settings.max_length or DEFAULT_LENGTH
        self._attention = GroupQuery(settings.padding, length, families)
        self.rules: tuple[Rule, ...] = (
            self._attention,
            PackedProjections(),
            SkipNorm(),
            Experts(),
        )
        limit = None if length < FEWEST else length  # no caches are made that would end there
        self.assumed = Contract(settings.padding, limit, chunked_batches=False)

    @property
    def contract(self) -> Contract:
        """What the lowered model assumes, from what the rules did."""
        return self._attention.contract
