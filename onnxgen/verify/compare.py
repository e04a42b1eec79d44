"""Whether a rewritten model computes what the original computes: both run on the same inputs.

    proof = verify_models(Path("model.onnx"), Path("model.fused.onnx"))
    proof.status, proof.reason

Shapes: B batch, S new tokens, P past tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnxgen.analysis.feeds import RunShape, make_feeds
from onnxgen.analysis.roles import Roles, find_roles
from onnxgen.errors import FileError
from onnxgen.model_io import read_model
from onnxgen.report.values import Case, Proof
from onnxgen.runtime import Runtime, RuntimeFailure
from onnxgen.targets.contract import Contract, read_contract
from onnxgen.twin import twin_types, unrunnable_types
from onnxgen.verify.cases import Run, again, feeds_of, find_edges, plan
from onnxgen.verify.difference import NotANumberError, is_close_call, output_difference
from onnxgen.verify.precision import NOTE, rounds_activations
from onnxgen.verify.side import Side, Source

Array = npt.NDArray[Any]

TOLERANCES: Mapping[ir.DataType, float] = {
    ir.DataType.DOUBLE: 1e-4,
    ir.DataType.FLOAT: 1e-4,
    ir.DataType.FLOAT16: 1e-2,
    ir.DataType.BFLOAT16: 1e-4,  # run as float32 twins
}
"""Largest allowed difference, over the original output's standard deviation."""


def verify_models(
    original: Source,
    rewritten: Source,
    *,
    roles: Mapping[str, str] | None = None,
    edges: Sequence[int] = (),
    runtime: Runtime | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Proof:
    """Run both models as a user would and compare every output on the rows of real tokens.

    The tolerance follows the type that most of the original's floating point weights have,
    whatever the outputs have: a float16 model with float32 logits is held to 1e-2. Models that
    hold bfloat16, and float16 ones that choose experts, are compared as float32 twins
    (`onnxgen.twin`); the latter must run as they are, too. A case on
    which the original itself fails is skipped and says so; one on which only the rewritten
    model fails counts as different. Outside the contract that stands in the rewritten model's
    metadata it must fail, or answer as the original does.

    Args:
        original, rewritten: paths, or serialized models.
        roles: roles of inputs given by the user, by name; see `analysis.roles.ROLES`.
        edges: total lengths at which behaviour may switch (windows, a rotary's
            original_max_position); the graph's own comparisons are searched for more.
        runtime: where to run; by default a child process of its own.
        progress: told what is about to run.

    Returns:
        "proven", "differs" (with output, case and difference) or "unverifiable" (nothing could
        be run).

    Raises:
        FileError: a path, or the bytes, cannot be read as a model.
        UsageError: `roles` names no input or no role.
    """
    if runtime is None:
        with Runtime() as own:
            return verify_models(
                original, rewritten, roles=roles, edges=edges, runtime=own, progress=progress
            )
    model, other = _read(original), _read(rewritten)
    runtime.twins = twin_types(model, other)
    proof = Proof("unverifiable", tolerance(model, runtime), twins=names_of(runtime.twins))
    mismatch = _mismatch(model, other)
    if mismatch:
        proof.status, proof.reason = "differs", mismatch
        return proof
    found = find_roles(model, roles)
    own_edges, unrun = find_edges(model, found)
    # The original is what its nodes say; the rewritten one runs as it will for a user. Both
    # optimised by the runtime could be one and the same graph in the end, right or wrong.
    sides = (
        Side(runtime, original, as_written=True, full=rounds_activations(model)),
        Side(runtime, rewritten, as_written=False, full=rounds_activations(model)),
    )
    if sides[0].full:
        proof.note = NOTE
    try:
        sides[0].load()
    except RuntimeFailure as error:
        proof.reason = f"ONNX Runtime cannot load the original: {error}"
        return proof
    try:
        sides[1].load()
    except RuntimeFailure as error:
        sides[0].unload()
        proof.status = "differs"
        proof.reason = f"ONNX Runtime cannot load the rewritten model: {error}"
        return proof
    try:
        comparison = _Comparison(found, *sides, read_contract(other))
        runs = plan(found, [*edges, *own_edges], comparison.contract.max_length)
        for number, run in enumerate(runs, 1):
            if run.instead and not proof.cases[-1].skipped:
                continue
            progress(f"comparing {number}/{len(runs)}: {run.name}")
            case = comparison.case(run)
            if run.steps and case.compared:
                proof.cases.append(case)
                break
            if run.instead:
                proof.cases.pop()
            if not run.steps or run is runs[-1]:
                proof.cases.append(case)
        close = proof.worst is not None and is_close_call(proof.worst.difference, proof.tolerance)
        for run in again(runs) if close else ():
            progress(f"comparing again, the difference is near the tolerance: {run.name}")
            proof.cases.append(comparison.case(run))
            if proof.cases[-1].compared and proof.cases[-1].difference > proof.tolerance:
                break
    finally:
        for side in sides:
            side.unload()
    if not comparison.failures and (why := _fails_as_it_is(comparison, model, runs)):
        proof.status, proof.reason = "differs", f"the rewritten model fails as it is: {why}"
        return proof
    far = [edge for edge in unrun if edge not in edges]
    if far:
        name = "lengths around " + ", ".join(map(str, far))
        note = "not run: too many lengths to try, or too long ones"
        proof.cases.append(Case(name, 1, 1, 0, "none", skipped=note))
    _conclude(proof, comparison.failures)
    return proof


def _fails_as_it_is(comparison: _Comparison, model: ir.Model, runs: Sequence[Run]) -> str:
    """Why a model that was compared by its twin cannot be run itself; "" where it can, or need not."""
    runtime, twins = comparison.original.runtime, comparison.original.runtime.twins
    runtime.twins = unrunnable_types(model)
    if runtime.twins == twins:
        return ""
    sides = (comparison.original, comparison.rewritten)
    try:
        for side in sides:
            side.load()
        for run in runs:
            if not run.steps and comparison.case(run).compared:
                break
        return next(iter(comparison.failures.values()), "")
    except RuntimeFailure as error:
        return str(error)
    finally:
        for side in sides:
            side.unload()
        runtime.twins = twins


def _conclude(proof: Proof, failures: Mapping[str, str]) -> None:
    worst = proof.worst
    if worst is None:
        reasons = [case.skipped for case in proof.cases]
        proof.reason = "the original runs on none of the cases" + (
            f": {reasons[0]}" if reasons else ""
        )
    elif worst.difference <= proof.tolerance:
        proof.status = "proven"
    else:
        proof.status = "differs"
        failure = failures.get(worst.name)
        if failure:
            proof.reason = f"the rewritten model fails in the case {worst.name!r}: {failure}"
        elif math.isinf(worst.difference):
            proof.reason = (
                f"output {worst.output!r} differs in shape, type or in which values are finite "
                f"in the case {worst.name!r}"
            )
        else:
            proof.reason = (
                f"output {worst.output!r} differs by {worst.difference:.2g} standard deviations "
                f"in the case {worst.name!r}; at most {proof.tolerance:g} is allowed"
            )


@dataclass
class _Step:
    """One run of a case: its lengths, and what each side is fed."""

    shape: RunShape
    feeds: tuple[dict[str, Array], dict[str, Array]]


class _Comparison:
    """Runs cases on both models.

    Attributes:
        failures: ONNX Runtime's words where only the rewritten model failed, by case name.
    """

    def __init__(self, roles: Roles, original: Side, rewritten: Side, contract: Contract) -> None:
        self.contract = contract
        self.roles = roles
        self.original = original
        self.rewritten = rewritten
        self.failures: dict[str, str] = {}

    def case(self, run: Run) -> Case:
        """Compare the two models on one case."""
        shape = run.shape
        case = Case(run.name, shape.batch, shape.new, shape.past, shape.padding)
        if run.skipped:
            return replace(case, skipped=run.skipped)
        feeds = feeds_of(self.roles, run)
        step: _Step | None = _Step(shape, (feeds, feeds))
        worst, where = 0.0, ""
        for number in range(run.steps + 1):
            assert step is not None
            try:
                wanted = self.original.run(step.feeds[0])
            except RuntimeFailure as error:
                return replace(case, skipped=f"the original fails: {error}")
            try:
                got = self.rewritten.run(step.feeds[1])
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
        self, step: _Step, wanted: dict[str, Array], got: dict[str, Array], number: int
    ) -> _Step | None:
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
        return _Step(shape, (sides[0], sides[1]))


def _read(source: Source) -> ir.Model:
    if isinstance(source, Path):
        return read_model(source)
    try:
        return ir.serde.deserialize_model(onnx.ModelProto.FromString(source))
    except Exception as error:  # protobuf's DecodeError has no public base class
        raise FileError("the serialized model is no ONNX model or is damaged") from error


def _mismatch(original: ir.Model, rewritten: ir.Model) -> str:
    """How the two models' inputs or outputs differ, as one sentence; "" where they agree."""
    for kind in ("input", "output"):
        both = [
            [v for v in getattr(m.graph, f"{kind}s") if v.name not in m.graph.initializers]
            for m in (original, rewritten)
        ]
        names = [[str(v.name) for v in values] for values in both]
        for name in names[0]:
            if name not in names[1]:
                return f"the rewritten model has no {kind} {name!r}"
        for name in names[1]:
            if name not in names[0]:
                return f"the rewritten model has {kind} {name!r}, which the original has not"
        if names[0] != names[1]:
            return f"the {kind}s stand in another order: {', '.join(names[1])}"
        for a, b in zip(*both, strict=True):
            if a.dtype is not None and b.dtype is not None and a.dtype != b.dtype:
                return f"{kind} {a.name!r} was {a.dtype.name} and is {b.dtype.name}"
            if a.shape is not None and b.shape is not None and len(a.shape) != len(b.shape):
                return f"{kind} {a.name!r} had {len(a.shape)} dims and has {len(b.shape)}"
    return ""


def tolerance(model: ir.Model, runtime: Runtime) -> float:
    """The largest allowed difference for a model, as the runtime runs it."""
    kind = compute_type(model)
    return TOLERANCES[ir.DataType.BFLOAT16 if kind in runtime.twins else kind]


def names_of(types: Iterable[ir.DataType]) -> tuple[str, ...]:
    """Types in words, for the report."""
    return tuple(sorted(each.name.lower() for each in types))


def compute_type(model: ir.Model) -> ir.DataType:
    """The floating point type that most weights have; where there are none, the inputs'."""
    counts: dict[ir.DataType, int] = {}

    def count(tensor: ir.TensorProtocol | None) -> None:
        if tensor is not None and tensor.dtype in TOLERANCES:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + int(tensor.size)

    for value in model.graph.initializers.values():
        count(value.const_value)
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for node in (node for graph in graphs for node in graph.all_nodes()):
        attribute = node.attributes.get("value") if node.op_type == "Constant" else None
        if attribute is not None and attribute.type == ir.AttributeType.TENSOR:
            count(attribute.as_tensor())
    for value in model.graph.inputs:
        if not counts and value.dtype is not None and value.dtype in TOLERANCES:
            return value.dtype
    return max(counts, key=lambda dtype: counts[dtype], default=ir.DataType.FLOAT)
