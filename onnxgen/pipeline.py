"""What each command runs, in order.

fuse:    read -> roles -> normalize -> raise (each rewrite checked) -> tidy
         -> stage beside the output -> verify -> move into place
verify:  the comparison alone, of any two models with the same inputs and outputs
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from onnxgen import __version__
from onnxgen.analysis.masks import MaskFamily, mask_families
from onnxgen.analysis.roles import find_roles
from onnxgen.analysis.sampling import Sampler
from onnxgen.errors import ModelDiffersError, RefusedError, UsageError
from onnxgen.model_io import read_model, staged
from onnxgen.passes.normalize import normalize
from onnxgen.passes.raise_ import raise_model
from onnxgen.passes.tidy import tidy
from onnxgen.patterns import RULES
from onnxgen.report.values import Proof, Report
from onnxgen.runtime import Runtime
from onnxgen.targets import onnx as onnx_target
from onnxgen.twin import holds_bfloat16
from onnxgen.verify.compare import TOLERANCES, verify_models
from onnxgen.verify.rewrites import RewriteChecker

Progress = Callable[[str], None]


@dataclass(frozen=True)
class FuseOptions:
    """What `onnxgen fuse` was asked for.

    Attributes:
        output: where to write; None for MODEL with .fused.onnx.
        target: the runtime to write for; "onnx" is standard operators.
        verify: run the checks; without them nothing is run and the report says unproven.
        disable: codes of rules to leave out.
        opset: version of the default domain to write; None for the target's own.
        inline: expand the functions of the `onnxgen` domain.
        roles: what inputs are for, by name, where structure does not tell.
        force: let the output replace the input.
    """

    output: Path | None = None
    target: str = "onnx"
    verify: bool = True
    disable: tuple[str, ...] = ()
    opset: int | None = None
    inline: bool = False
    roles: Mapping[str, str] = field(default_factory=dict)
    force: bool = False


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
    """
    output = options.output or path.with_name(f"{path.name.removesuffix('.onnx')}.fused.onnx")
    _check_options(options)
    report = Report(input=str(path), output="", target=options.target)
    clock = _Clock(report.seconds, progress)

    clock.start("read", f"reading {path.name}")
    model = read_model(path)
    report.ops_before = _count(model)
    report.opset_before = model.graph.opset_imports.get("", 0)
    opset = onnx_target.opset_for(report.opset_before, options.opset)
    roles = find_roles(model, options.roles)

    with Runtime(twins=holds_bfloat16(model)) as runtime:
        clock.start("normalize", "normalizing")
        report.warnings += normalize(model, opset, runtime, roles)

        clock.start("raise", "raising")
        checker = RewriteChecker(runtime, roles) if options.verify else None
        disabled = frozenset(options.disable)
        sampler = Sampler(model.graph, roles, runtime)
        report.sites = raise_model(model, roles, sampler=sampler, check=checker, disabled=disabled)
        _name_masks(report, mask_families(model.graph, sampler))
        tidy(model)
        onnx_target.finish(model, __version__)
        _describe(report, model)

        clock.start("write", f"writing {output.name}")
        with staged(model, output, source=path, force=options.force) as stage:
            clock.start("verify", "verifying")
            report.proof = (
                _prove(path, stage.path, options, runtime, checker, progress)
                if options.verify
                else Proof("unproven", TOLERANCES[ir.DataType.FLOAT], reason="told not to run")
            )
            clock.stop()
            _raise_unless_good(report, path)
            stage.commit()
            report.output = str(output)
    return report


def verify(
    original: Path, rewritten: Path, *, roles: Mapping[str, str], progress: Progress
) -> Proof:
    """Compare two models on the same inputs; see `onnxgen.verify.compare.verify_models`."""
    return verify_models(original, rewritten, roles=roles, progress=progress)


def _check_options(options: FuseOptions) -> None:
    codes = [rule.code for rule in RULES]
    for code in options.disable:
        if code not in codes:
            raise UsageError(f"--disable {code}: no such rule; rules: {', '.join(codes)}")
    if options.target != "onnx":
        raise UsageError(f"--target {options.target}: no such target; targets: onnx")


def _prove(
    original: Path,
    rewritten: Path,
    options: FuseOptions,
    runtime: Runtime,
    checker: RewriteChecker | None,
    progress: Progress,
) -> Proof:
    """The comparison of the whole models, with the figures of the rewrites' own checks."""
    proof = verify_models(
        original, rewritten, roles=options.roles, runtime=runtime, progress=progress
    )
    if checker is not None:
        proof.rewrites, proof.structures = checker.rewrites, checker.structures
        proof.rewrite_difference = checker.difference
    return proof


def _raise_unless_good(report: Report, path: Path) -> None:
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


def _name_masks(report: Report, families: Mapping[str, MaskFamily]) -> None:
    """State each attention's mask as what it means, where it was recognised."""
    for site in report.sites:
        family = families.get(site.node) if site.status == "fused" else None
        if family is not None:
            site.details["mask"] = str(family)


def _describe(report: Report, model: ir.Model) -> None:
    """Fill in what the report says of the finished model."""
    report.opset_after = model.graph.opset_imports[""]
    report.ops_after = _count(model)
    report.nodes_before = sum(report.ops_before.values())
    report.nodes_after = sum(report.ops_after.values())
    report.warnings += [
        f"{site.node}: the rewrite was undone: {site.decline.reason}"
        for site in report.sites
        if site.status == "undone" and site.decline is not None
    ]


def _count(model: ir.Model) -> dict[str, int]:
    """How many nodes of each op type there are, subgraphs and the bodies of called functions in."""
    counts: Counter[str] = Counter()
    pending = [(model.graph.all_nodes(), 0)]
    while pending:
        nodes, depth = pending.pop()
        for node in nodes:
            function = model.functions.get(node.op_identifier())
            if function is None or depth > 32:
                counts[node.op_type] += 1
            else:
                pending.append((function.all_nodes(), depth + 1))
    return dict(sorted(counts.items()))


class _Clock:
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
