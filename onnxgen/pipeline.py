"""What each command runs, in order.

fuse:    read -> for each branch of a merged model, if it is one:
             roles -> normalize -> raise -> lower for the target (each rewrite checked) -> tidy
         -> stage beside the output -> verify -> move into place
         explain and --check stop before staging: nothing is written
to_paged: in `onnxgen.pipeline_paged`, which is as long again
verify:  the comparison alone, of any two models with the same inputs and outputs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxgen import __version__, functions
from onnxgen.analysis.layer_pictures import snapshot
from onnxgen.analysis.masks import MaskFamily
from onnxgen.analysis.roles import Roles, find_roles, write_roles
from onnxgen.analysis.sampling import Sampler
from onnxgen.errors import RefusedError, UsageError
from onnxgen.expectations import NOTHING, Expectations
from onnxgen.model_io import data_files, read_model, staged
from onnxgen.own_rules import OwnRules
from onnxgen.passes.lower import lower_model
from onnxgen.passes.merged import join_branches, split_branches
from onnxgen.passes.normalize import normalize
from onnxgen.passes.tidy import tidy
from onnxgen.patterns import RULES
from onnxgen.places import default_output
from onnxgen.report.values import Budget, Proof, Report
from onnxgen.runtime import Runtime
from onnxgen.stages import (
    Clock,
    Progress,
    Work,
    add_checks,
    add_picture,
    check_baseline,
    count_ops,
    describe,
    files_beside,
    find_own,
    raise_part,
    raise_unless_expected,
    raise_unless_good,
    sizes,
    warn_of_dropped,
)
from onnxgen.staging import check_output
from onnxgen.targets import onnx as onnx_target
from onnxgen.targets import ort as ort_target
from onnxgen.targets.contract import Contract, Padding, read_contract, write_contract
from onnxgen.targets.genai import genai_config
from onnxgen.targets.genai_files import READ
from onnxgen.targets.ort.config import context_length
from onnxgen.targets.paged import KEY as PAGED
from onnxgen.twin import unrunnable_types
from onnxgen.verify.compare import verify_models
from onnxgen.verify.rewrites import RewriteChecker
from onnxgen.verify.tolerances import TOLERANCES

FLOAT = ir.DataType.FLOAT
_CODES = [*(rule.code for rule in RULES), *ort_target.CODES]


@dataclass(frozen=True)
class FuseOptions:
    """What `onnxgen fuse` was asked for.

    Attributes:
        output: where to write; None for MODEL with .fused.onnx.
        target: what to write for: "onnx", standard operators; "ort", ONNX Runtime's own.
        padding: for "ort": the padding that the model must take, "any", "right" or "none".
        max_length: for "ort": the most tokens, past and new; None for what config.json beside
            the model says, else what its own tables hold, at most 32768.
        verify: run the checks; without them nothing is run and the report says unproven.
        budget: how much of them; see `onnxgen.verify.compare.verify_models`.
        disable: codes of rules to leave out.
        rules: the user's own: files, or rules themselves; see `onnxgen.own_rules`.
        opset: version of the default domain to write; None for the target's own.
        inline: expand the functions of the `onnxgen` domain.
        roles: what inputs are for, by name, where structure does not tell.
        force: let the output replace the input.
        genai_config: write genai_config.json and the tokenizer's files beside the output too.
        expect: what the result must be; where it is not, nothing is written.
        check: write nothing, and compare no whole models; say what would be fused.
    """

    output: Path | None = None
    target: str = "onnx"
    padding: Padding = "any"
    max_length: int | None = None
    verify: bool = True
    budget: Budget = "full"
    disable: tuple[str, ...] = ()
    rules: tuple[Any, ...] = ()
    opset: int | None = None
    inline: bool = False
    roles: Mapping[str, str] = field(default_factory=dict)
    force: bool = False
    genai_config: bool = False
    expect: Expectations = NOTHING
    check: bool = False

    @property
    def disabled(self) -> frozenset[str]:
        """Codes of rules that are left out, the target's own too."""
        kept = ort_target.KEPT if self.target == "ort" else frozenset()
        return frozenset(self.disable) | kept


def fuse(path: Path, options: FuseOptions, progress: Progress) -> Report:
    """Fuse one model and write the result, proven unless the options say otherwise.

    Args:
        path: the model as exported.
        progress: told what is being done.

    Raises:
        FileError: the model cannot be read, or the result not written.
        UsageError: an option does not fit.
        RefusedError: the model cannot be converted, or no run of it can be compared; carries
            `report` where there is one.
        ModelDiffersError: the result differs from the original; carries `report`.
        ExpectationError: the result is not what `options.expect` says; carries `report`.
    """
    output = options.output or default_output(path)
    report = Report(input=str(path), output="", target=options.target)
    own_rules = find_own(report, options.rules, _CODES, options.disabled)
    _check_options(options, own_rules)
    clock = Clock(report.seconds, progress)

    clock.start("read", f"reading {path.name}")
    model = read_model(path)
    warn_of_dropped(report, model)
    if PAGED in model.metadata_props:
        raise RefusedError(f"{path} is a paged model, of which nothing is left to fuse")
    reads = [*data_files(model), *map(path.with_name, READ)]
    if not options.check:
        check_output(output, path, reads, force=options.force)
    report.bytes_before = sizes([path, *data_files(model)])
    report.ops_before = count_ops(model)
    report.opset_before = model.graph.opset_imports.get("", 0)
    roles = find_roles(model, options.roles)
    with Runtime(twins=unrunnable_types(model)) as runtime:
        model, contract, checkers = _rewrite(
            report, path, model, roles, options, own_rules, runtime, clock
        )
        if options.inline:
            functions.expand(model)
        write_contract(model, contract)
        report.contract = str(contract) if options.target == "ort" else ""
        write_roles(model, roles)
        onnx_target.finish(model, __version__, options.target)
        describe(report, model)
        if options.check:
            report.proof = Proof("unproven", TOLERANCES[FLOAT], reason="--check only looks")
            add_checks(report.proof, checkers, runtime)
            clock.stop()
            raise_unless_expected(report, options.expect, path)
            return report

        beside: dict[str, bytes] = {}
        if options.genai_config:
            length = read_contract(model).max_length
            make = partial(genai_config, model, roles, filename=output.name, max_length=length)
            beside = files_beside(report, make, path, output, force=options.force)
        clock.start("write", f"writing {output.name}")
        with staged(
            model, output, source=path, force=options.force, beside=beside, reads=reads
        ) as stage:
            report.bytes_after = stage.bytes
            clock.start("verify", "verifying")
            report.proof = (
                _prove(path, stage.path, options, runtime, checkers, progress)
                if options.verify
                else Proof("unproven", TOLERANCES[FLOAT], reason="told not to run")
            )
            clock.stop()
            raise_unless_good(report, path)
            raise_unless_expected(report, options.expect, path)
            stage.commit()
            report.output, report.beside = str(output), list(beside)
    return report


def verify(
    original: Path,
    rewritten: Path,
    *,
    roles: Mapping[str, str],
    budget: Budget = "full",
    progress: Progress,
) -> Proof:
    """Compare two models on the same inputs; see `onnxgen.verify.compare.verify_models`."""
    return verify_models(original, rewritten, roles=roles, budget=budget, progress=progress)


def _rewrite(
    report: Report,
    path: Path,
    model: ir.Model,
    roles: Roles,
    options: FuseOptions,
    own_rules: OwnRules,
    runtime: Runtime,
    clock: Clock,
) -> tuple[ir.Model, Contract, list[RewriteChecker]]:
    """Normalize, raise and lower each branch of a model, and say in the report what happened.

    Returns:
        The model for the target, what it assumes, and the checkers with their figures.
    """
    opset = onnx_target.opset_for(report.opset_before, options.opset)
    contract = Contract()
    checkers: list[RewriteChecker] = []
    parts = split_branches(model)
    for part in parts:
        own = find_roles(part.model, options.roles) if part.branch else roles
        before, known = snapshot(part.model.graph), len(report.sites)
        clock.start("normalize", "normalizing")
        report.warnings += normalize(part.model, opset, runtime, own)

        clock.start("raise", "raising")
        checkers += [RewriteChecker(runtime, own)] if options.verify else []
        sampler = Sampler(part.model.graph, own, runtime)
        rules = ort_target.RAISING if options.target == "ort" else RULES
        work = Work(part, own, sampler, checkers, options.disabled, rules, own_rules)
        families = raise_part(report, work, runtime)
        if options.target == "ort":
            clock.start("lower", "lowering")
            settings = _settings(path, options)
            contract = contract.both(_lower(report, work, settings, families))
        add_picture(report, before, part.model, [*report.sites[known:], *report.lowered])
    return join_branches(parts), contract, checkers


def _check_options(options: FuseOptions, own: OwnRules) -> None:
    codes = [*_CODES, *own.codes]
    for code in options.disable:
        if code not in codes:
            raise UsageError(f"--disable {code}: no such rule; rules: {', '.join(codes)}")
    if options.target not in ("onnx", "ort"):
        raise UsageError(f"--target {options.target}: no such target; targets: onnx, ort")
    if options.target != "ort" and (options.padding != "any" or options.max_length):
        raise UsageError("--padding and --max-length are for --target ort")
    lowered = [rule.kind for rule in ort_target.RULES] if options.target == "ort" else []
    options.expect.check_kinds((rule.kind for rule in RULES), lowered)
    if options.expect.unchanged and options.target != "onnx":
        raise UsageError("--expect unchanged is for --target onnx: others always start anew")
    check_baseline(options.expect, options.target)
    if (options.max_length or 0) > ort_target.LONGEST:
        raise UsageError(
            f"--max-length {options.max_length}: rotary tables of so many positions fit in no "
            f"memory; the most is {ort_target.LONGEST}"
        )


def _settings(path: Path, options: FuseOptions) -> ort_target.Settings:
    """What was asked for, with the length that config.json beside the model states."""
    told = context_length(path.with_name("config.json"))
    length = options.max_length or (told if told <= ort_target.LONGEST else 0)
    return ort_target.Settings(options.padding, length)


def _lower(
    report: Report,
    work: Work,
    settings: ort_target.Settings,
    families: Mapping[str, MaskFamily],
) -> Contract:
    """Lower for ONNX Runtime; returns what the result assumes."""
    model = work.part.model
    lowering = ort_target.Lowering(settings, families)
    if work.checker is not None:
        work.checker.within(lowering.assumed)
    report.lowered += lower_model(
        model,
        lowering.rules,
        work.roles,
        sampler=work.sampler,
        check=work.checker,
        disabled=work.disabled,
    )
    tidy(model)
    ort_target.name_guards(model.graph)
    return lowering.contract


def _prove(
    original: Path,
    rewritten: Path,
    options: FuseOptions,
    runtime: Runtime,
    checkers: Sequence[RewriteChecker],
    progress: Progress,
) -> Proof:
    """The comparison of the whole models, with the figures of the rewrites' own checks."""
    proof = verify_models(
        original,
        rewritten,
        roles=options.roles,
        budget=options.budget,
        runtime=runtime,
        progress=progress,
    )
    add_checks(proof, checkers, runtime)
    return proof
