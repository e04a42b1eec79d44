"""Whether a rewritten model computes what the original computes: both run on the same inputs.

    proof = verify_models(Path("model.onnx"), Path("model.fused.onnx"))
    proof.status, proof.reason

    the cases of the plan, every output       -> they differ: where that starts   (bisection)
                                              -> they agree: the values inside    (landmarks),
    and what the outputs hardly depend on     (sensitivity)

With the budget "layers" the two models are first cut down to one layer of each kind (`layers`).

Shapes: B batch, S new tokens, P past tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.edges import find_edges
from onnxgen.analysis.feeds import RunShape, make_feeds, nearest_shape
from onnxgen.analysis.roles import Roles, find_roles
from onnxgen.report.values import Budget, Case, Proof
from onnxgen.runtime import Picking, Runtime, RuntimeFailure, SpentError
from onnxgen.targets.contract import read_contract
from onnxgen.twin import twin_types, unrunnable_types
from onnxgen.verify.bisection import find_origin
from onnxgen.verify.cases import Run, again, plan
from onnxgen.verify.comparison import Comparison
from onnxgen.verify.difference import is_close_call
from onnxgen.verify.interface import mismatch
from onnxgen.verify.landmarks import Landmark, apart, find_landmarks
from onnxgen.verify.layers import shorten
from onnxgen.verify.opened import Source, read
from onnxgen.verify.precision import NOTE, rounds_activations
from onnxgen.verify.sensitivity import faint_inputs
from onnxgen.verify.side import Side
from onnxgen.verify.tolerances import INNER, names_of, tolerance

_INNER_SHAPES = (RunShape(1, 5), RunShape(1, 3, 7), RunShape(2, 5, padding="left"))


def verify_models(
    original: Source,
    rewritten: Source,
    *,
    roles: Mapping[str, str] | None = None,
    edges: Sequence[int] = (),
    budget: Budget = "full",
    picking: Picking | None = None,
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

    Where the outputs agree the values inside that both models name alike are compared too, held
    to ten tolerances: a model whose outputs hardly depend on one of them would hide a mistake.

    Args:
        original, rewritten: paths, or serialized models.
        roles: roles of inputs given by the user, by name; see `analysis.roles.ROLES`.
        edges: total lengths at which behaviour may switch (windows, a rotary's
            original_max_position); the graph's own comparisons are searched for more.
        budget: "quick", a few cases; "full"; "layers", every case on the models cut down to one
            layer of each kind.
        picking: the rewritten model holds backend contexts, and this backend is to run it all;
            values inside cannot be looked at then.
        runtime: where to run; by default a child process of its own.
        progress: told what is about to run.

    Returns:
        "proven", "differs" (with output, case, difference, and where it starts) or
        "unverifiable" (nothing could be run, or values inside differ that no output shows).

    Raises:
        FileError: a path, or the bytes, cannot be read as a model.
        UsageError: `roles` names no input or no role.
    """
    if runtime is None:
        with Runtime() as own:
            proof = verify_models(
                original,
                rewritten,
                roles=roles,
                edges=edges,
                budget=budget,
                picking=picking,
                runtime=own,
                progress=progress,
            )
            proof.seconds, proof.memory = own.seconds, own.memory
            return proof
    model, other = read(original), read(rewritten)
    runtime.twins = frozenset() if picking else twin_types(model, other)
    proof = Proof("unverifiable", tolerance(model, runtime), twins=names_of(runtime.twins))
    proof.budget = budget
    wrong = mismatch(model, other)
    if wrong:
        proof.status, proof.reason = "differs", wrong
        return proof
    found = find_roles(model, roles)
    if budget == "layers":
        progress("cutting the models down to one layer of each kind")
        short = shorten(original, rewritten, found)
        original, rewritten = short.original, short.rewritten
        model, other = read(original), read(rewritten)
        there = {value.name for value in model.graph.inputs}
        found = find_roles(model, {n: r for n, r in (roles or {}).items() if n in there})
        proof.layers, proof.layers_run = short.layers, short.kept
    packed = budget != "layers"  # copies of the weights would take the memory that is to be saved
    pair = _Pair(runtime, original, rewritten, model, other, found, packed, picking)
    if rounds_activations(model):
        proof.note = NOTE
    comparison, runs = _compare(pair, proof, [*edges], progress)
    if comparison is None:
        return proof
    try:
        why = "" if comparison.failures else _fails_as_it_is(comparison, model, runs)
    except SpentError as error:
        proof.reason = str(error)
        return proof
    if why:
        proof.status, proof.reason = "differs", f"the rewritten model fails as it is: {why}"
        return proof
    _conclude(proof, comparison.failures)
    if picking is not None:
        proof.not_run.append("values inside, which a blob does not show")
        return proof
    progress("looking at values inside")
    _look_inside(pair, proof, comparison)
    return proof


@dataclass(frozen=True)
class _Pair:
    """The two models: where they are, and what they are. The roles are the original's."""

    runtime: Runtime
    original: Source
    rewritten: Source
    model: ir.Model
    other: ir.Model
    roles: Roles
    packed: bool
    picking: Picking | None

    def sides(self, inner: Sequence[str] = ()) -> tuple[Side, Side]:
        # The original is what its nodes say; the rewritten one runs as it will for a user. Both
        # optimised by the runtime could be one and the same graph in the end, right or wrong.
        make = partial(
            Side,
            self.runtime,
            full=rounds_activations(self.model),
            inner=inner,
            packed=self.packed,
        )
        return make(self.original, as_written=True), make(
            self.rewritten, as_written=False, picking=self.picking
        )


def _compare(
    pair: _Pair, proof: Proof, edges: list[int], progress: Callable[[str], None]
) -> tuple[Comparison | None, list[Run]]:
    """Run the plan's cases into the proof; None where a model does not load, which it then says."""
    own_edges, unrun = find_edges(pair.model, pair.roles)
    contract = read_contract(pair.other)
    quick = proof.budget == "quick"
    runs = plan(pair.roles, [*edges, *own_edges], contract.max_length, quick=quick)
    sides = pair.sides()
    try:
        sides[0].load()
    except RuntimeFailure as error:
        proof.reason = f"ONNX Runtime cannot load the original: {error}"
        return None, runs
    try:
        sides[1].load()
    except SpentError as error:
        proof.reason = str(error)
        return None, runs
    except RuntimeFailure as error:
        sides[0].unload()
        proof.status = "differs"
        proof.reason = f"ONNX Runtime cannot load the rewritten model: {error}"
        return None, runs
    comparison = Comparison(pair.roles, *sides, contract, proof.tolerance)
    try:
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
            if comparison.apart is not None:
                break
        if comparison.apart is None and not comparison.failures:
            proof.faint = faint_inputs(sides[0], pair.roles, proof.tolerance)
    finally:
        for side in sides:
            side.unload()
    if quick:
        proof.not_run.append(
            "lengths at which behaviour may switch, and greedy steps (--verify quick)"
        )
    elif far := [edge for edge in unrun if edge not in edges]:
        name = "lengths around " + ", ".join(map(str, far))
        note = "not run: too many lengths to try, or too long ones"
        proof.cases.append(Case(name, 1, 1, 0, "none", skipped=note))
    return comparison, runs


def _look_inside(pair: _Pair, proof: Proof, comparison: Comparison) -> None:
    """Compare the values inside: of models that differ, to say where that starts."""
    step = comparison.apart
    if proof.status != "proven" and step is None:
        return
    landmarks = find_landmarks(pair.model, pair.other, pair.roles)
    sides = pair.sides([each.name for each in landmarks])
    try:
        for side in sides:
            side.load()
        if step is not None:
            feeds = step.feeds[0]
            proof.origin = find_origin(landmarks, sides, step.shape, feeds, proof.tolerance)
            proof.reason += f"; {proof.origin}" if proof.origin is not None else ""
            return
        _compare_inside(pair, proof, landmarks, sides)
    except RuntimeFailure as error:  # what the outputs say stands
        proof.not_run.append(f"values inside: {error}")
    finally:
        for side in sides:
            side.unload()


def _compare_inside(
    pair: _Pair, proof: Proof, landmarks: Sequence[Landmark], sides: tuple[Side, Side]
) -> None:
    """Compare the landmarks on a few runs; one that is too far apart makes the proof unverifiable.

    Raises:
        RuntimeFailure: none of the runs can be made.
    """
    contract = read_contract(pair.other)
    shapes = dict.fromkeys(nearest_shape(pair.roles, shape) for shape in _INNER_SHAPES)
    limit = INNER * proof.tolerance
    failure: RuntimeFailure | None = None
    for shape in shapes:
        if shape is None or contract.refuses(shape):
            continue
        feeds = make_feeds(pair.roles, shape, np.random.default_rng(0))
        try:
            before, after = (side.run(feeds) for side in sides)
        except RuntimeFailure as error:  # the original takes no such run
            failure = error
            continue
        found = apart(landmarks, shape, before, after)
        proof.inner = max(proof.inner, len(found))
        worst = max((difference for _, difference in found), default=0.0)
        proof.inner_difference = max(proof.inner_difference, worst)
        if worst > limit:
            proof.origin = find_origin(landmarks, sides, shape, feeds, limit)
            proof.status = "unverifiable"
            proof.reason = (
                f"the outputs agree and hardly depend on what differs inside: {proof.origin}"
            )
            return
    if failure is not None and not proof.inner:
        raise failure


def _fails_as_it_is(comparison: Comparison, model: ir.Model, runs: Sequence[Run]) -> str:
    """Why a model that was compared by its twin cannot be run itself; "" where it can, or need not."""
    runtime, twins = comparison.original.runtime, comparison.original.runtime.twins
    runtime.twins = unrunnable_types(model)
    if runtime.twins == twins:
        return ""
    sides = (comparison.original, comparison.rewritten)
    own = Comparison(comparison.roles, *sides, comparison.contract, math.inf)  # that it runs
    try:
        for side in sides:
            side.load()
        for run in runs:
            if not run.steps and own.case(run).compared:
                break
        return next(iter(own.failures.values()), "")
    except SpentError:
        raise
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
