"""One case of a comparison: both models on the same inputs, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxgen.analysis.feeds import RunShape, make_feeds
from onnxgen.analysis.roles import Roles
from onnxgen.report.values import Case
from onnxgen.runtime import RuntimeFailure, SpentError
from onnxgen.targets.contract import Contract
from onnxgen.verify.cases import Run, feeds_of
from onnxgen.verify.difference import NotANumberError, output_difference
from onnxgen.verify.side import Side

Array = npt.NDArray[Any]


@dataclass
class Step:
    """One run of a case: its lengths, and what each side is fed."""

    shape: RunShape
    feeds: tuple[dict[str, Array], dict[str, Array]]

    def __lt__(self, other: Step) -> bool:
        """Whether it is plainer: without padding, shorter."""
        return self._size < other._size

    @property
    def _size(self) -> tuple[bool, int]:
        return self.shape.padding != "none", self.shape.batch * self.shape.total


class Comparison:
    """Runs cases on both models.

    Attributes:
        failures: ONNX Runtime's words where only the rewritten model failed, by case name.
        apart: of the runs on which outputs were further apart than the tolerance, the plainest.
    """

    def __init__(
        self,
        roles: Roles,
        original: Side,
        rewritten: Side,
        contract: Contract,
        tolerance: float,
    ) -> None:
        self.contract = contract
        self.roles = roles
        self.original = original
        self.rewritten = rewritten
        self.tolerance = tolerance
        self.failures: dict[str, str] = {}
        self.apart: Step | None = None

    def case(self, run: Run) -> Case:
        """Compare the two models on one case."""
        shape = run.shape
        case = Case(run.name, shape.batch, shape.new, shape.past, shape.padding)
        if run.skipped:
            return replace(case, skipped=run.skipped)
        feeds = feeds_of(self.roles, run)
        step: Step | None = Step(shape, (feeds, feeds))
        worst, where = 0.0, ""
        for number in range(run.steps + 1):
            assert step is not None
            try:
                wanted = self.original.run(step.feeds[0])
            except RuntimeFailure as error:
                return replace(case, skipped=f"the original fails: {error}")
            try:
                got = self.rewritten.run(step.feeds[1])
            except SpentError as error:
                return replace(case, skipped=str(error))
            except RuntimeFailure as error:
                outside = self.contract.refuses(step.shape)
                if outside:
                    return replace(case, outside=outside)
                self.failures[run.name] = str(error)
                return replace(case, difference=math.inf)
            try:
                difference, name = self._worst(step.shape, wanted, got)
            except NotANumberError as error:
                return replace(case, skipped=f"the original computes NaN in output {error}")
            if not where or difference > worst:
                worst, where = difference, name
            if difference > self.tolerance and (self.apart is None or step < self.apart):
                self.apart = step
            if number < run.steps:
                step = self._next(step, wanted, got, number)
                if step is None:
                    return replace(case, skipped="the outputs do not tell the next token")
        return replace(case, difference=worst, output=where)

    def _worst(
        self, shape: RunShape, wanted: dict[str, Array], got: dict[str, Array]
    ) -> tuple[float, str]:
        worst, where = -1.0, ""
        for name, output in self.roles.outputs.items():
            try:
                difference = output_difference(self.roles, output, shape, wanted[name], got[name])
            except NotANumberError as error:
                raise NotANumberError(repr(name)) from error
            if difference > worst:
                worst, where = difference, name
        return max(worst, 0.0), where

    def _next(
        self, step: Step, wanted: dict[str, Array], got: dict[str, Array], number: int
    ) -> Step | None:
        """The likeliest next token for both sides, over the cache that each made itself."""
        last = step.shape
        shape = RunShape(last.batch, 1, last.total, last.padding, last.pads, last.encoder)
        fresh = make_feeds(self.roles, shape, np.random.default_rng(number + 1))
        for each in self.roles.named("ids"):
            rows = [o for o in self.roles.outputs.values() if o.role == "rows"]
            logits = next((wanted[o.name] for o in rows if wanted[o.name].ndim == 3), None)
            if logits is None or logits.shape[-1] < 2:
                return None
            best = logits[:, -1].astype(np.float64).argmax(-1) % (each.bound or logits.shape[-1])
            fresh[each.name] = np.broadcast_to(best[:, None], fresh[each.name].shape).astype(
                fresh[each.name].dtype
            )
        sides = []
        for outputs in (wanted, got):
            feeds = dict(fresh)
            feeds.update({pair.past: outputs[pair.present] for pair in self.roles.pairs})
            sides.append(feeds)
        return Step(shape, (sides[0], sides[1]))
