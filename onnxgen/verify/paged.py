"""Whether a paged model computes what the contiguous original does, on what paging is about.

    the original: each sequence alone, as far as it takes them   prefill, chunks, single tokens
    the paged model: the sequences together                      one ragged run a step

Prompts and single tokens run side by side; a sequence may have no new token; blocks are shuffled
and shared by a common beginning; sequences leave and others take their blocks; lengths cross every
edge of a block and of a window. Every slot that is nobody's holds NaN. After each step the scores,
the likeliest tokens and every cache are compared, and whatever was not to be written must be the
same bytes.

Shapes: B sequences, S new tokens, P past, T both, K key heads, D head size, N tokens of a run,
V scores, NB blocks of BS slots.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxgen.analysis.edges import find_edges, integer
from onnxgen.analysis.feeds import RunShape, make_feeds, nearest_shape
from onnxgen.analysis.roles import Roles
from onnxgen.report.values import Budget, Proof
from onnxgen.runtime import Runtime, RuntimeFailure, SpentError
from onnxgen.targets.paged import PagedModel
from onnxgen.twin import FLOAT16, Types, has_choices, holds, twin_types
from onnxgen.verify.cases import too_large
from onnxgen.verify.difference import is_close_call
from onnxgen.verify.landmarks import find_landmarks
from onnxgen.verify.opened import Source, read
from onnxgen.verify.paged_pairs import PagedPairs
from onnxgen.verify.paged_program import program
from onnxgen.verify.paged_steps import compare_steps
from onnxgen.verify.precision import NOTE, rounds_activations
from onnxgen.verify.sensitivity import faint_inputs
from onnxgen.verify.side import Side
from onnxgen.verify.tolerances import INNER, TOLERANCES, compute_type, names_of

Array = npt.NDArray[Any]
_MOST_SPECIAL = 4
_FEW = 8  # steps in which the values inside are compared
_SEEDS = (3, 4, 5)
"""Of a program's tokens; all but the first where a difference came near the tolerance."""


def prove_paged(
    original: Source,
    written: Sequence[Source],
    results: Sequence[PagedModel],
    roles: Roles,
    runtime: Runtime,
    progress: Callable[[str], None] = lambda message: None,
    budget: Budget = "full",
) -> Proof:
    """Compare the original with what it was paged to, for each size of blocks.

    The tolerance is that of the original's weights, or of the pools where these are narrower. Then
    a model that chooses experts is compared as float32 twins: rounding may choose others. As it is,
    it has to run.

    Args:
        original: as `read_model` takes it.
        written: where each of `results` lies.
        roles: of the original, as it was paged.
        budget: "quick", only for the size of blocks that was asked for, without edges; "full";
            "layers", all, of the models cut down to one layer of each kind.

    Returns:
        "proven", "differs" (with step, sequence and tensor) or "unverifiable".
    """
    sides = PagedPairs([original] * len(written), written, results, roles)
    if budget == "quick":
        sides = sides.first()
    elif budget == "layers":
        progress("cutting the models down to one layer of each kind")
        sides = sides.shortened()
    roles = sides.roles
    model = read(sides.originals[0])
    kinds = {compute_type(model), *(pool.dtype for pool in results[0].pools)}
    twins = twin_types(model)
    # Pools narrower than all that the original computes would let rounding choose experts.
    wide = _narrow_pools(model, results[0]) if has_choices(model) else frozenset()
    tolerance = max(TOLERANCES.get(ir.DataType.FLOAT if k in twins else k, 0.0) for k in kinds)
    proof = Proof("unverifiable", tolerance, twins=names_of(twins | wide), budget=budget)
    proof.layers, proof.layers_run = sides.layers, sides.layers_run
    near, _ = find_edges(model, roles)
    lengths = [family.size for family in results[0].families if family.size]
    edges = dict.fromkeys([*lengths, *near])
    plan = _Plan(
        [] if budget == "quick" else [e for e in edges if not too_large(roles, e)],
        _special_tokens(model, roles),
        rounds_activations(model),
    )
    if plan.full:
        proof.note = NOTE
    if budget == "quick":
        left = "other sizes of blocks, and lengths at which behaviour may switch"
        proof.not_run.append(f"{left} (--verify quick)")
    runtime.twins = twins | wide
    _compare(sides, runtime, plan, proof, progress)
    if wide and proof.status == "proven":
        runtime.twins = twins
        own = Proof("unverifiable", sys.float_info.max)  # only that it runs, and is finite
        _compare(sides, runtime, plan, own, progress)
        if own.status != "proven":
            proof.status, proof.reason = "differs", f"with its pools as they are, {own.reason}"
    if proof.status == "proven":
        progress("looking at values inside")
        _look_inside(sides, runtime, plan, proof)
    return proof


def _look_inside(sides: PagedPairs, runtime: Runtime, plan: _Plan, proof: Proof) -> None:
    """Compare the values inside that have a row for each token, where the outputs agree."""
    original, path, result = sides.originals[0], sides.written[0], sides.results[0]
    roles, packed = sides.roles, proof.budget != "layers"
    shape = nearest_shape(roles, RunShape(1, 5, 3))
    if shape is None:
        return
    written = read(path)
    landmarks = find_landmarks(read(original), written, roles)
    cut = set() if result.options.logits == "all" else _behind_the_cut(written, result)
    names = [each.name for each in landmarks if each.name not in {*roles.outputs, *cut}]
    make = partial(Side, runtime, full=plan.full, packed=packed)
    first = make(original, as_written=True, inner=names)
    try:
        first.load()
        proof.faint = faint_inputs(first, roles, proof.tolerance)
        found = first.run(make_feeds(roles, shape, np.random.default_rng(0)), names or None)
        rows = [n for n in names if np.ndim(found[n]) == 3 and found[n].shape[:2] == (1, shape.new)]
        second = make(path, as_written=False, inner=rows)
        second.load()
    except RuntimeFailure as error:  # what the outputs say stands
        first.unload()
        proof.not_run.append(f"values inside: {error}")
        return
    own = Proof("unverifiable", INNER * proof.tolerance)
    wide = replace(result, rows=(*result.rows, *((name, name) for name in rows)))
    events = program(result.options.block_size, (), sharing=not result.switches, far=False)
    compare_steps(first, second, roles, wide, events[:_FEW], own, special=plan.special)
    for side in (first, second):
        side.unload()
    proof.inner = len(rows)
    proof.inner_difference = own.worst.difference if own.worst is not None else 0.0
    if own.status == "differs":
        proof.status = "unverifiable"
        proof.reason = f"the outputs agree and hardly depend on what differs inside: {own.reason}"


def _behind_the_cut(written: ir.Model, result: PagedModel) -> set[str]:
    """Values that have no row for each token, since only some rows of logits are answered: those
    from the projection that makes them to the output.
    """
    outputs = {value.name: value for value in written.graph.outputs}
    names: set[str] = set()
    for _, name in result.rows:
        pending = [outputs[name]] if name in outputs else []
        while pending:
            value = pending.pop()
            node = value.producer()
            if node is None or value.name in names:
                continue
            names.add(value.name or "")
            if node.op_type not in _PROJECTIONS:
                pending += [each for each in node.inputs if each is not None]
    return names


_PROJECTIONS = frozenset({"MatMul", "Gemm", "MatMulNBits", "Conv", "Gather", "GatherND"})


@dataclass(frozen=True)
class _Plan:
    """What a program is made of: edges, special tokens, and whether rounding is left out."""

    edges: Sequence[int]
    special: Sequence[int]
    full: bool


def _narrow_pools(model: ir.Model, result: PagedModel) -> Types:
    """float16, where pools are of it and nothing in the original is."""
    narrow = any(pool.dtype == ir.DataType.FLOAT16 for pool in result.pools)
    return FLOAT16 if narrow and not holds(model, FLOAT16) else frozenset()


def _compare(
    sides: PagedPairs,
    runtime: Runtime,
    plan: _Plan,
    proof: Proof,
    progress: Callable[[str], None],
) -> None:
    """Load both, for each size of blocks, and go through its program; the proof takes what comes."""
    packed = proof.budget != "layers"
    first: Side | None = None
    for original, path, result in zip(sides.originals, sides.written, sides.results, strict=True):
        if first is None or first.source is not original:
            first = Side(runtime, original, as_written=True, full=plan.full, packed=packed)
            try:
                first.load()
            except RuntimeFailure as error:
                proof.reason = f"ONNX Runtime cannot load the original: {error}"
                return
        second = Side(runtime, path, as_written=False, full=plan.full, packed=packed)
        try:
            second.load()
        except SpentError as error:
            proof.reason = str(error)
            return
        except RuntimeFailure as error:
            proof.status = "differs"
            proof.reason = f"ONNX Runtime cannot load the paged model: {error}"
            return
        events = program(result.options.block_size, plan.edges, sharing=not result.switches)
        seen = len(proof.cases)
        for seed in _SEEDS:
            compare_steps(
                *(first, second, sides.roles, result, events, proof),
                special=plan.special,
                seed=seed,
                progress=progress,
            )
            near = (is_close_call(each.difference, proof.tolerance) for each in proof.cases[seen:])
            if proof.reason or not any(near):
                break
        second.unload()
        if proof.reason:
            return
    if first is not None:
        first.unload()
    if any(case.compared for case in proof.cases):
        proof.status = "proven"
    else:
        proof.reason = f"no step could be run: {proof.cases[0].skipped}"


def _special_tokens(model: ir.Model, roles: Roles) -> list[int]:
    """Tokens that something is equal to somewhere: a few random ones would hardly be among them."""
    bounds = [each.bound for each in roles.named("ids")]
    numbers = (
        integer(value, floats=False)
        for node in model.graph.all_nodes()
        if node.op_type == "Equal"
        for value in node.inputs
    )
    found = {n for n in numbers if n is not None and bounds and 0 < n < bounds[0]}
    return sorted(found)[-_MOST_SPECIAL:]
