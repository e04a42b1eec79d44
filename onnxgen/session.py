"""A model that holds backend contexts, run by the first backend that can, else by ONNX Runtime.

    session = onnxgen.load("model.onnx", prefer=["openvino:CPU"])
    outputs = session.run(None, {"input_ids": ids})

    read -> the table (contexts.forms) -> a choice for each region (contexts.choosing)
         -> steps (contexts.steps): parts for ONNX Runtime, calls of backends

Nothing of onnx-ir is imported, and ONNX Runtime only where it runs something: what a blob saves is time.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxgen.backends.interface import BackendError
from onnxgen.contexts import forms, steps
from onnxgen.contexts.blobs import LARGEST
from onnxgen.contexts.choosing import Choice, Chooser
from onnxgen.contexts.records import FormatError
from onnxgen.contexts.trust import Given
from onnxgen.contexts.types import as_text, fits
from onnxgen.errors import UsageError
from onnxgen.reading import Opened, open_model
from onnxgen.runtime_types import NodeArg, node_args
from onnxgen.session_runtime import Array, NodesRuntime, Run, native

ORIGINAL = "original"
_logger = logging.getLogger("onnxgen.load")


class _PlanFailed(Exception):
    """What some regions were to be run by cannot be; the message is a clause about each."""

    def __init__(self, places: Sequence[Choice], what: str, cause: Exception) -> None:
        super().__init__(f"{what}: {type(cause).__name__}: {' '.join(str(cause).split())}")
        self.places = places


def load(
    path: str | os.PathLike[str],
    *,
    prefer: Sequence[str] | None = None,
    trust: Given | None = None,
    largest_blob: int = LARGEST,
    session_options: Callable[[], Any] | None = None,
    providers: Sequence[Any] | None = None,
) -> Session:
    """Load a model to run it; see docs/contexts.md.

    Each region is run by the first backend that is here and whose versions, compatibility string
    and hashes agree, else by the nodes themselves. Which, and why, is in `Session.choices` and in the log
    "onnxgen.load". Without contexts, or with none that can be used, it is ONNX Runtime's session.

    Args:
        prefer: backends that may run something, the best first, as ["openvino:CPU"]; None for all in
            the order of the file, [] for none.
        trust: sha256 of blobs that may be used, or a file that lists them; those that this user's own
            `onnxgen context add` made may always.
        largest_blob: bytes that a blob may have.
        session_options: makes the options of a session of ONNX Runtime, for what it runs; called for
            each, since a model may take several.
        providers: theirs.

    Raises:
        FileError: the model, or the list, cannot be read.
        UsageError: an argument does not fit.
        RefusedError: as of `onnxgen.reading.open_model`.
    """
    if isinstance(prefer, str):
        raise UsageError(f"prefer is several backends: [{prefer!r}]")
    # Absolute: what runs the nodes may be opened later, when the process works elsewhere.
    opened = open_model(Path(path).absolute())
    try:
        held = forms.decode(opened.proto)
    except FormatError as error:
        _logger.warning("%s: what it holds for backends cannot be read: %s", path, error)
        held = forms.Held(opened.proto)
    chooser = Chooser(opened, held, prefer, trust, largest_blob)
    unknown = [each for each in prefer or () if each not in held.table.backends]
    if unknown and held.table.regions:
        _logger.warning("%s: %s compiled nothing in it", path, ", ".join(unknown))
    runtime = NodesRuntime(opened, session_options, providers)
    return Session(opened, held, chooser, runtime)


@dataclass
class _Plan:
    """What runs the model now."""

    choices: list[Choice]
    run: Run


class Session:
    """A loaded model; runs from several threads are safe, as ONNX Runtime's are.

    Attributes:
        choices: by region, what runs it and why not another; empty for a model without contexts.
    """

    def __init__(
        self, opened: Opened, held: forms.Held, chooser: Chooser, runtime: NodesRuntime
    ) -> None:
        self._opened = opened
        self._held = held
        self._chooser = chooser
        self._runtime = runtime
        self._lock = threading.RLock()
        self._inputs = node_args(opened.proto.graph.input)
        self._outputs = node_args(opened.proto.graph.output)
        weights = {each.name for each in opened.proto.graph.initializer}
        self._needed = [each.name for each in self._inputs if each.name not in weights]
        self._own: Run | None = None
        self._plan = self._make_plan()

    @property
    def choices(self) -> list[Choice]:
        """What runs each region at this time."""
        return self._plan.choices

    @property
    def picked(self) -> dict[str, str]:
        """By region, the backend that runs it, or "original"."""
        return {
            each.region.name: each.context.backend if each.context else ORIGINAL
            for each in self.choices
        }

    def get_inputs(self) -> list[NodeArg]:
        """What is fed: name, type and shape, as ONNX Runtime says them."""
        weights = {each.name for each in self._opened.proto.graph.initializer}
        return [each for each in self._inputs if each.name not in weights]

    def get_outputs(self) -> list[NodeArg]:
        """What comes out, as the model declares it; ONNX Runtime infers sizes that it leaves open."""
        return list(self._outputs)

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: Any = None,
    ) -> list[Any]:
        """Run the model; where a backend fails, again without it.

        Args:
            output_names: which outputs; None or [] for all, in their order.
            input_feed: arrays by name.
            run_options: of ONNX Runtime, for what it runs.

        Raises:
            ValueError: an input is missing or unknown, or no output has that name.
        """
        known = {each.name for each in self._inputs}
        missing = [name for name in self._needed if name not in input_feed]
        unknown = [name for name in input_feed if name not in known]
        if missing or unknown:
            what = (
                f"the inputs {missing} are missing" if missing else f"there are no inputs {unknown}"
            )
            raise ValueError(f"{self._opened.path}: {what}")
        names = list(output_names or [each.name for each in self._outputs])
        there = {each.name for each in self._outputs}
        wrong = [name for name in names if name not in there]
        if wrong:
            raise ValueError(f"{self._opened.path}: there are no outputs {wrong}")
        self._runtime.asked.options = run_options
        found = self._run({name: native(value) for name, value in input_feed.items()})
        return [found[name] for name in names]

    def _run(self, feeds: dict[str, Any]) -> dict[str, Array]:
        plan = self._plan
        try:
            return plan.run(feeds)
        except _PlanFailed as error:
            failed = error
        with self._lock:
            own = self._plan is plan  # else another thread has made a new one meanwhile
            if own:
                self._bar(failed)
                self._plan = self._make_plan()
            after = self._plan
        try:
            return self._run(feeds)
        except Exception:
            # The nodes themselves take this feed no better: it was not the backend's fault.
            with self._lock:
                if own and self._plan is after:
                    self._unbar(failed)
                    self._plan = plan
            raise

    def _bar(self, failed: _PlanFailed) -> None:
        for each in failed.places:
            if each.context is not None:
                self._chooser.bar(each.region, each.context, str(failed))

    def _unbar(self, failed: _PlanFailed) -> None:
        for each in failed.places:
            if each.context is not None:
                self._chooser.unbar(each.region, each.context)

    def _make_plan(self) -> _Plan:
        """Choose for each region, and make what runs them; a backend that fails is passed over."""
        while True:
            choices = [self._chooser.choose(region) for region in self._held.table.regions]
            try:
                plan = _Plan(choices, self._runner(choices))
            except _PlanFailed as error:
                self._bar(error)
                continue
            for choice in choices:
                _say(self._opened.path, choice)
            return plan

    def _runner(self, choices: Sequence[Choice]) -> Run:
        chosen = [each for each in choices if each.context is not None]
        if not chosen:
            return self._original()
        others = [each.region for each in choices if each.context is None]
        proto = self._opened.proto
        try:
            defaults = self._defaults()
            found = steps.steps(proto, [each.region for each in chosen], others, self._types())
        except Exception as error:  # a file may say anything of its regions
            raise _PlanFailed(chosen, "the graph cannot be cut there", error) from error
        of_region = {each.region.name: each for each in chosen}
        runs = [
            self._call(of_region[step.region.name])
            if isinstance(step, steps.Call)
            else self._part(step, chosen)
            for step in found
        ]
        passing = {each.name for each in self._outputs}
        weights = self._chooser.weights

        def run(feeds: dict[str, Any]) -> dict[str, Array]:
            values = defaults | self._as_arrays(feeds, chosen)
            feeds = dict(values)
            for each in runs:
                values |= each(values)
            for name in passing & feeds.keys():  # an output that is an input: another array
                values[name] = np.array(feeds[name])
            for name in passing - values.keys():  # an output that is a weight
                values[name] = np.array(weights[name].array)
            return {name: values[name] for name in passing}

        return run

    def _types(self) -> dict[str, str]:
        """Types of values that steps may share."""
        graph, table = self._opened.proto.graph, self._held.table
        found = dict(table.types)
        for region in table.regions:
            found |= zip(region.inputs, region.input_types, strict=True)
            found |= zip(region.outputs, region.output_types, strict=True)
        declared = (*graph.value_info, *graph.output, *graph.input)
        found |= {each.name: text for each in declared if (text := as_text(each))}
        return found

    def _as_arrays(self, feeds: dict[str, Any], chosen: Sequence[Choice]) -> dict[str, Array]:
        """What is fed, as arrays; numbers and lists of the type that is declared."""
        kinds = {each.name: each.type.tensor_type for each in self._opened.proto.graph.input}
        found: dict[str, Array] = {}
        try:
            for name, value in feeds.items():
                found[name] = np.asarray(value)
                if not isinstance(value, np.ndarray | np.generic):
                    kind = onnx.helper.tensor_dtype_to_np_dtype(kinds[name].elem_type)
                    found[name] = found[name].astype(kind, casting="same_kind")
            return found
        except Exception as error:  # such as sequences: ONNX Runtime knows what to do with them
            raise _PlanFailed(chosen, "it takes arrays alone", error) from error

    def _defaults(self) -> dict[str, Array]:
        """Inputs that are initializers too need not be fed."""
        weights = self._chooser.weights
        free = [each.name for each in self._inputs if each.name not in self._needed]
        return {name: weights[name].array for name in free}

    def _call(self, choice: Choice) -> Run:
        """What runs a region on its backend."""
        region, context = choice.region, choice.context
        assert context is not None
        failed = "it failed"
        try:
            loaded = self._chooser.loaded(context)
            given = [self._chooser.weights[region.weights[each]] for each in context.parameters]
            bound = loaded.bind(given)
        except Exception as error:
            raise _PlanFailed([choice], failed, error) from error

        def run(values: dict[str, Array]) -> dict[str, Array]:
            try:
                arrays = [values[name] for name in region.inputs]
                for name, kind, array in zip(
                    region.inputs, region.input_types, arrays, strict=True
                ):
                    if not fits(kind, array.shape):
                        raise BackendError(f"'{name}' is {list(array.shape)}, and it takes {kind}")
                return dict(zip(region.outputs, bound(arrays), strict=True))
            except Exception as error:
                raise _PlanFailed([choice], failed, error) from error

        return run

    def _part(self, nodes: steps.Nodes, chosen: Sequence[Choice]) -> Run:
        """What runs nodes beside regions; where it cannot, the whole is run as it is."""
        failed = "the nodes around it cannot be run apart"
        try:
            part = self._runtime.part(nodes)
        except Exception as error:
            raise _PlanFailed(chosen, failed, error) from error

        def run(values: dict[str, Array]) -> dict[str, Array]:
            try:
                return part(values)
            except Exception as error:
                raise _PlanFailed(chosen, failed, error) from error

        return run

    def _original(self) -> Run:
        if self._own is None:
            self._own = self._runtime.whole([each.name for each in self._outputs])
        return self._own


def _say(path: Path, choice: Choice) -> None:
    for passed in choice.passed:
        _logger.warning(
            "%s: region '%s': %s is not used: %s",
            path,
            choice.region.name,
            passed.context.backend,
            passed.reason,
        )
    picked = choice.context.backend if choice.context else "the original nodes"
    _logger.info("%s: region '%s' is run by %s", path, choice.region.name, picked)
