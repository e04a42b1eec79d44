"""What several commands do alike: raise a model, describe it, refuse what is not good."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxgen import functions
from onnxgen.analysis.layer_pictures import Snapshot, layer_picture, snapshot
from onnxgen.analysis.mask_pictures import mask_pictures
from onnxgen.analysis.masks import MaskFamily, mask_families
from onnxgen.analysis.roles import Roles, find_roles
from onnxgen.analysis.sampling import Sampler
from onnxgen.errors import ModelDiffersError, RefusedError
from onnxgen.passes.merged import Part, split_branches
from onnxgen.passes.raise_ import raise_model
from onnxgen.passes.rewriting import REPLACED
from onnxgen.passes.tidy import tidy
from onnxgen.patterns import RULES
from onnxgen.patterns.rule import Rule
from onnxgen.report.values import Proof, Report, Site
from onnxgen.runtime import Runtime
from onnxgen.targets.genai import Said
from onnxgen.targets.genai_files import CONFIG, READ, genai_files
from onnxgen.verify.rewrites import RewriteChecker

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """A model, or one branch of it, and what its rewriting needs.

    Attributes:
        checkers: the last one is its own; none where nothing is checked.
        disabled: codes of rules to leave out.
        rules: the raising ones, in the order in which they are applied.
    """

    part: Part
    roles: Roles
    sampler: Sampler
    checkers: Sequence[RewriteChecker]
    disabled: frozenset[str] = frozenset()
    rules: Sequence[Rule] = RULES

    @property
    def checker(self) -> RewriteChecker | None:
        return self.checkers[-1] if self.checkers else None


def raise_part(report: Report, work: Work) -> dict[str, MaskFamily]:
    """Raise, and say what each attention's mask means; returns that by node name."""
    model = work.part.model
    sites = raise_model(
        model,
        work.roles,
        sampler=work.sampler,
        check=work.checker,
        disabled=work.disabled,
        rules=work.rules,
    )
    families = mask_families(model.graph, work.sampler)
    for site in sites:
        family = families.get(site.node) if site.status == "fused" else None
        if family is not None:
            site.details["mask"] = str(family)
        if work.part.branch:
            taken = work.part.branch.removesuffix("_branch")
            site.details["branch"] = f"{work.part.switch}, {taken}"
    report.sites += sites
    report.masks += mask_pictures(model.graph, families, work.sampler)
    tidy(model)
    return families


def add_picture(report: Report, before: Snapshot, model: ir.Model, sites: Sequence[Site]) -> None:
    """Draw one layer of a model, or of the first branch in which something was fused."""
    if report.picture is None:
        report.picture = layer_picture(before, snapshot(model.graph, REPLACED), sites)


def add_checks(proof: Proof, checkers: Sequence[RewriteChecker], runtime: Runtime) -> None:
    """The figures of the rewrites' own checks, and of all that was run, go into a proof."""
    proof.seconds, proof.memory = runtime.seconds, runtime.memory
    if checkers:
        proof.rewrites = sum(checker.rewrites for checker in checkers)
        proof.structures = sum(checker.structures for checker in checkers)
        proof.rewrite_difference = max(checker.difference for checker in checkers)


def continuing(model: ir.Model, given: Mapping[str, str]) -> tuple[Part, Roles]:
    """The part of a model that continues a cache: itself, or one branch of a merged one."""
    parts = split_branches(model)
    found = [(part, find_roles(part.model, given)) for part in parts]
    return next(((part, roles) for part, roles in found if roles.pairs), found[0])


def raise_unless_good(report: Report, path: Path) -> None:
    """Nothing that is wrong, or cannot be shown to be right, is written.

    Raises:
        ModelDiffersError, RefusedError: with the report as `report`.
    """
    proof = report.proof
    if proof is None or proof.status in ("proven", "unproven"):
        return
    kind = ModelDiffersError if proof.status == "differs" else RefusedError
    error = kind(f"{path}: {proof.reason}; nothing was written")
    error.report = report
    raise error


def describe(report: Report, model: ir.Model) -> None:
    """Fill in what the report says of the finished model."""
    report.opset_after = model.graph.opset_imports[""]
    report.ops_after = count_ops(model)
    report.nodes_before = sum(report.ops_before.values())
    report.nodes_after = sum(report.ops_after.values())
    undone: dict[str, list[str]] = {}
    for site in (*report.sites, *report.lowered):
        if site.status == "undone" and site.decline is not None:
            undone.setdefault(site.decline.reason, []).append(site.node)
    for reason, nodes in undone.items():
        more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        report.warnings.append(f"{nodes[0]}{more}: the rewrite was undone: {reason}")


def count_ops(model: ir.Model) -> dict[str, int]:
    """How many nodes of each op type there are, subgraphs and bodies of called functions in.

    Functions of ours count as operators.
    """
    counts: Counter[str] = Counter()
    pending = [(model.graph.all_nodes(), 0)]
    while pending:
        nodes, depth = pending.pop()
        for node in nodes:
            function = model.functions.get(node.op_identifier())
            if function is None or functions.is_ours(function) or depth > 32:
                counts[node.op_type] += 1
            else:
                pending.append((function.all_nodes(), depth + 1))
    return dict(sorted(counts.items()))


class Clock:
    """Wall time by stage; starting one ends the one before."""

    def __init__(self, seconds: dict[str, float], progress: Progress) -> None:
        self._seconds = seconds
        self._progress = progress
        self._current: tuple[str, float] | None = None

    def start(self, stage: str, message: str) -> None:
        self.stop()
        self._progress(message)
        self._current = (stage, time.perf_counter())

    def stop(self) -> None:
        if self._current is not None:
            stage, since = self._current
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - since
            self._current = None


def files_beside(
    report: Report,
    make: Callable[[Said], Mapping[str, Any]],
    path: Path,
    output: Path,
    *,
    force: bool,
) -> dict[str, bytes]:
    """What is written beside the model for onnxruntime-genai, by name; see `genai_files`."""
    files = genai_files(make, path, output, force=force)
    if "eos_token_id" not in json.loads(files[CONFIG])["model"]:
        there = [name for name in READ[:2] if path.with_name(name).exists()]
        said = f"{' and '.join(there) or 'no config.json'} beside {path.name}"
        why = f"{said} {'give' if len(there) > 1 else 'gives'} no eos_token_id that is a number"
        why = why if there else f"there is {said}"
        report.warnings.append(f"{CONFIG} does not say which token ends a text: {why}")
    return files
