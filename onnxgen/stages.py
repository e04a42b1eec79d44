"""What several commands do alike: raise a model, describe it, refuse what is not good."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxgen import functions
from onnxgen.analysis.layer_pictures import Snapshot, layer_picture, snapshot
from onnxgen.analysis.mask_pictures import mask_pictures
from onnxgen.analysis.masks import MaskFamily, mask_families
from onnxgen.analysis.roles import Roles, find_roles
from onnxgen.analysis.sampling import Sampler
from onnxgen.errors import ExpectationError, ModelDiffersError, RefusedError, UsageError
from onnxgen.expectations import Expectations
from onnxgen.model_io import DROPPED
from onnxgen.own_rules import OwnRules, find_rules
from onnxgen.passes.merged import Part, split_branches
from onnxgen.passes.missed import missed
from onnxgen.passes.normalize import settle
from onnxgen.passes.raise_ import raise_model
from onnxgen.passes.rewriting import REPLACED, NearMiss
from onnxgen.passes.tidy import tidy
from onnxgen.patterns import RULES
from onnxgen.patterns.foreign import OwnRule
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
        own: the user's.
    """

    part: Part
    roles: Roles
    sampler: Sampler
    checkers: Sequence[RewriteChecker]
    disabled: frozenset[str] = frozenset()
    rules: Sequence[Rule] = RULES
    own: OwnRules = field(default_factory=OwnRules)

    @property
    def checker(self) -> RewriteChecker | None:
        return self.checkers[-1] if self.checkers else None


def raise_part(report: Report, work: Work, runtime: Runtime) -> dict[str, MaskFamily]:
    """Raise, with the user's rules before and after; says what each attention's mask means, by
    node name.
    """
    model, before = work.part.model, work.own.at("before")
    sites: list[Site] = []
    if before:
        sites += _raise(report, replace(work, rules=before))
    if any(site.status == "fused" for site in sites):
        report.warnings += settle(model, runtime, work.roles)
        work = replace(work, sampler=Sampler(model.graph, work.roles, runtime))
    near: list[NearMiss] = []
    sites += _raise(report, work, near)
    sites += missed(model.graph, work.roles, sites, near, work.rules, work.disabled)
    families = mask_families(model.graph, work.sampler)
    for site in sites:
        family = families.get(site.node) if site.status == "fused" else None
        if family is not None:
            site.details["mask"] = str(family)
    _count_already(report, model, sites)
    report.masks += mask_pictures(model.graph, families, work.sampler)
    tidy(model)
    after = work.own.at("after")
    if after:
        sites += _raise(report, replace(work, rules=after))
        tidy(model)
    if work.part.branch:
        taken = work.part.branch.removesuffix("_branch")
        for site in sites:
            site.details["branch"] = f"{work.part.switch}, {taken}"
    report.sites += sites
    return families


def _raise(report: Report, work: Work, near: list[NearMiss] | None = None) -> list[Site]:
    sites = raise_model(
        work.part.model,
        work.roles,
        sampler=work.sampler,
        check=work.checker,
        disabled=work.disabled,
        rules=work.rules,
        near=near,
    )
    for rule in work.rules:
        if isinstance(rule, OwnRule) and rule.code not in work.disabled:
            report.near_misses += rule.misses
    return sites


def add_picture(report: Report, before: Snapshot, model: ir.Model, sites: Sequence[Site]) -> None:
    """Draw one layer of a model, or of the first branch in which something was fused."""
    if report.picture is None:
        report.picture = layer_picture(before, snapshot(model.graph, REPLACED), sites)


def find_own(
    report: Report,
    given: Sequence[Any],
    taken: Sequence[str],
    disabled: frozenset[str] = frozenset(),
) -> OwnRules:
    """The user's rules, which the report then names; see `find_rules`."""
    own = find_rules(given, taken)
    report.own_rules = {r.code: r.origin.name for r in own.rules if r.code not in disabled}
    report.warnings += own.warnings
    return own


# By operator, the kind of site that becomes it.
_KINDS = {
    ("", "Attention"): "attention",
    ("onnxgen", "SinkAttention"): "attention",
    ("", "RMSNormalization"): "rms_norm",
    ("", "LayerNormalization"): "layer_norm",
    ("", "RotaryEmbedding"): "rotary",
    ("", "TensorScatter"): "cache",
    ("", "Gelu"): "activation",
    ("onnxgen", "MoE"): "moe",
    ("com.microsoft", "MoE"): "moe",
    ("com.microsoft", "QMoE"): "moe",
    ("onnxgen", "GroupedMatMul"): "grouped_matmul",
}


def _count_already(report: Report, model: ir.Model, sites: Sequence[Site]) -> None:
    """Count what the exporter itself wrote in the operators that sites become."""
    looked_at = {site.node for site in sites}
    for node in model.graph.all_nodes():
        kind = _KINDS.get((node.domain, node.op_type))
        if kind is not None and node.name not in looked_at:
            report.already[kind] = report.already.get(kind, 0) + 1


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


def check_baseline(expect: Expectations, target: str) -> None:
    """Whether like is compared with like.

    Raises:
        UsageError: the baseline was made for another target.
    """
    baseline = expect.baseline
    if baseline is not None and baseline.target != target:
        raise UsageError(
            f"--baseline {baseline.name} is of a model for the target {baseline.target}, "
            f"and this one is for {target}"
        )


def raise_unless_expected(report: Report, expect: Expectations, path: Path) -> None:
    """What is right, but not what the caller said it must be, is not written either.

    Raises:
        ExpectationError: with the report as `report`.
    """
    unmet = expect.unmet(report)
    if unmet:
        error = ExpectationError(f"{path}: {'; '.join(unmet)}; nothing was written")
        error.report = report
        raise error


def warn_of_dropped(report: Report, model: ir.Model) -> None:
    """Say what the model that was read held for backends: it was compiled for other nodes."""
    if dropped := model.meta.get(DROPPED):
        report.warnings.append(
            f"what {', '.join(dropped)} compiled is dropped: it is for the nodes as they were; "
            "onnxgen context add compiles the new ones"
        )


def sizes(paths: Iterable[Path]) -> int:
    """Bytes of files together."""
    return sum(path.stat().st_size for path in paths)


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
        self.progress = progress
        self._current: tuple[str, float] | None = None

    def start(self, stage: str, message: str) -> None:
        self.stop()
        self.progress(message)
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
