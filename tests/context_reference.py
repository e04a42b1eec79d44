"""What a model computes, by ONNX Runtime, and how far others are from it, on the rows of real tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxgen.analysis.feeds import RunShape
from onnxgen.analysis.roles import Roles, find_roles
from onnxgen.model_io import read_model
from onnxgen.runtime import Runtime, RuntimeFailure
from onnxgen.twin import Types, unrunnable_types
from onnxgen.verify.cases import feeds_of, plan
from onnxgen.verify.difference import NotANumberError, output_difference


@dataclass
class Reference:
    """What a file computes, by ONNX Runtime, on some feeds.

    Attributes:
        roles: of its inputs and outputs.
        shapes, feeds, outputs: of each run that it can do.
        twins: types that ONNX Runtime has no kernels for: then its float32 twin was run.
    """

    roles: Roles
    twins: Types
    shapes: list[RunShape] = field(default_factory=list)
    feeds: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path) -> Reference:
        model = read_model(path)
        made = cls(find_roles(model), unrunnable_types(model))
        with Runtime(twins=made.twins) as runtime:
            try:
                session = runtime.load(path, optimize=True)
            except RuntimeFailure:
                return made
            for run in plan(made.roles, quick=True):
                feeds = feeds_of(made.roles, run)
                try:
                    found = runtime.run(session, feeds)
                    made.difference(found, found, run.shape)  # NaN is nothing to compare with
                except (RuntimeFailure, NotANumberError):
                    continue
                made.shapes.append(run.shape)
                made.feeds.append(feeds)
                made.outputs.append(found)
        return made

    def worst(self, outputs: Sequence[Mapping[str, Any]]) -> float:
        pairs = zip(self.outputs, outputs, self.shapes, strict=True)
        return max(self.difference(one, other, shape) for one, other, shape in pairs)

    def difference(
        self, one: Mapping[str, Any], other: Mapping[str, Any], shape: RunShape
    ) -> float:
        return max(
            output_difference(
                self.roles,
                each,
                shape,
                one[each.name],
                other[each.name].astype(one[each.name].dtype),
            )
            for each in self.roles.outputs.values()
        )
