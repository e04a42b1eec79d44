"""What `onnxgen to-paged` runs, in order.

read -> the branch that continues a cache -> normalize -> raise -> page, for two sizes of blocks
-> lower for the flavor -> stage -> compare as only paging can go wrong -> move into place
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxgen import __version__, functions
from onnxgen.analysis.layer_pictures import snapshot
from onnxgen.analysis.masks import MaskFamily
from onnxgen.analysis.paging import UnpageableError
from onnxgen.analysis.roles import Roles
from onnxgen.analysis.sampling import Sampler
from onnxgen.errors import RefusedError, UsageError
from onnxgen.expectations import NOTHING, Expectations
from onnxgen.model_io import data_files, read_model, staged
from onnxgen.passes.normalize import normalize
from onnxgen.passes.tidy import tidy
from onnxgen.passes.to_paged import page_model
from onnxgen.patterns import RULES
from onnxgen.report import files
from onnxgen.report.values import Budget, Paging, Proof, Report
from onnxgen.runtime import Runtime
from onnxgen.stages import (
    Clock,
    Progress,
    Work,
    add_checks,
    add_picture,
    check_baseline,
    continuing,
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
from onnxgen.targets.contract import Contract, write_contract
from onnxgen.targets.genai_engine import engine_config
from onnxgen.targets.genai_files import READ
from onnxgen.targets.ort.config import context_length
from onnxgen.targets.paged import PagedModel, PagedOptions, check_paged_options
from onnxgen.targets.paged_ort import CODE as PAGED_ORT
from onnxgen.targets.paged_ort import lower_paged
from onnxgen.twin import unrunnable_types
from onnxgen.verify.paged import prove_paged
from onnxgen.verify.paged_kernel import prove_operator
from onnxgen.verify.rewrites import RewriteChecker
from onnxgen.verify.tolerances import TOLERANCES

FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class PageOptions:
    """What `onnxgen to-paged` was asked for.

    Attributes:
        output: the folder to write model.onnx to.
        paged: how the model is paged.
        max_length: for the flavor "ort": the most tokens of a sequence, past and new, where the
            rotary embedding goes inside; None as for `FuseOptions`.
        check: convert nothing; say whether it could be.
        verify: run the checks; without them nothing is run and the report says unproven.
        budget: how much of them; see `onnxgen.verify.paged.prove_paged`.
        inline: expand the functions of the `onnxgen` domain.
        roles: what inputs are for, by name, where structure does not tell.
        rules: the user's own: files, or rules themselves; see `onnxgen.own_rules`.
        genai_config: write genai_config.json and the tokenizer's files beside the output too.
        force: let files of another model in the output's folder be replaced, and the input.
        expect: what the result must be; where it is not, nothing is written.
    """

    output: Path
    paged: PagedOptions = field(default_factory=PagedOptions)
    max_length: int | None = None
    check: bool = False
    verify: bool = True
    budget: Budget = "full"
    inline: bool = False
    roles: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[Any, ...] = ()
    genai_config: bool = False
    force: bool = False
    expect: Expectations = NOTHING


def to_paged(path: Path, options: PageOptions, progress: Progress) -> Report:
    """Page one model and write the result, proven unless the options say otherwise.

    Raises:
        FileError: the model cannot be read, or the result not written.
        UsageError: an option does not fit.
        RefusedError: the model cannot be paged, or no run of it can be compared; carries
            `report`, whose paging names every obstacle.
        ModelDiffersError: the result differs from the original; carries `report`.
        ExpectationError: the result is not what `options.expect` says; carries `report`.
    """
    folder = options.output
    check_paged_options(options.paged)
    if options.max_length and options.paged.flavor != "ort":
        raise UsageError("--max-length is for --flavor ort")
    _check_expectations(options)
    size = options.paged.block_size
    report = Report(input=str(path), output="", target="paged", paging=Paging(block_size=size))
    own = find_own(report, options.rules, [rule.code for rule in RULES])
    clock = Clock(report.seconds, progress)

    clock.start("read", f"reading {path.name}")
    model = read_model(path)
    warn_of_dropped(report, model)
    report.ops_before = count_ops(model)
    output = folder / "model.onnx"
    reads = [*data_files(model), *map(path.with_name, READ)]
    report.bytes_before = sizes([path, *data_files(model)])
    if folder.is_dir():
        check_output(output, path, reads, force=options.force)
    report.opset_before = model.graph.opset_imports.get("", 0)
    opset = onnx_target.opset_for(report.opset_before, None)

    with Runtime(twins=unrunnable_types(model)) as runtime:
        part, roles = continuing(model, options.roles)
        before = snapshot(part.model.graph)
        clock.start("normalize", "normalizing")
        report.warnings += normalize(part.model, opset, runtime, roles)

        clock.start("raise", "raising")
        checkers = [RewriteChecker(runtime, roles)] if options.verify else []
        sampler = Sampler(part.model.graph, roles, runtime)
        work = Work(part, roles, sampler, checkers, own=own)
        families = raise_part(report, work, runtime)

        clock.start("page", "paging")
        results = _page(report, part.model, roles, runtime, families, options)
        if options.check:
            clock.stop()
            raise_unless_expected(report, options.expect, path)
            return report
        result = results[0]
        add_picture(report, before, result.model, [*report.sites, *report.lowered])
        beside: dict[str, bytes] = {}
        if options.genai_config:  # read from our functions: before they are expanded
            make = partial(engine_config, result, roles, filename=output.name)
            beside = files_beside(report, make, path, output, force=options.force)
        if options.inline:
            for each in results:
                functions.expand(each.model)
        for each in results:
            onnx_target.finish(each.model, __version__, "paged")
        describe(report, result.model)

        made = not folder.exists()
        files.make_folder(folder)
        try:
            clock.start("write", f"writing {output}")
            with contextlib.ExitStack() as stack:
                stages = [
                    stack.enter_context(
                        staged(
                            each.model,
                            folder / name,
                            source=path,
                            force=options.force,
                            beside=extra,
                            reads=reads,
                            passing=each is not result,
                        )
                    )
                    for each, name, extra in zip(
                        results, ("model.onnx", "other-blocks.onnx"), (beside, {}), strict=True
                    )
                ]
                report.bytes_after = stages[0].bytes
                clock.start("verify", "verifying")
                if options.verify:
                    paths = [stage.path for stage in stages]
                    sides = (path, paths, results, roles, runtime, progress)
                    if options.paged.flavor == "ort":
                        assert report.paging is not None
                        report.proof, report.paging.kernel = prove_operator(*sides, options.budget)
                    else:
                        report.proof = prove_paged(*sides, options.budget)
                    add_checks(report.proof, checkers, runtime)
                else:
                    report.proof = Proof("unproven", TOLERANCES[FLOAT], reason="told not to run")
                clock.stop()
                raise_unless_good(report, path)
                raise_unless_expected(report, options.expect, path)
                stages[0].commit()
                report.output, report.beside = str(output), list(beside)
        finally:
            if made and not report.output:
                with contextlib.suppress(OSError):
                    folder.rmdir()
    return report


def _check_expectations(options: PageOptions) -> None:
    lowered = ["attention"] if options.paged.flavor == "ort" else []
    options.expect.check_kinds((rule.kind for rule in RULES), lowered)
    if options.expect.unchanged:
        raise UsageError("--expect unchanged is for fuse: a paged model is another one")
    check_baseline(options.expect, "paged")


def _page(
    report: Report,
    model: ir.Model,
    roles: Roles,
    runtime: Runtime,
    families: Mapping[str, MaskFamily],
    options: PageOptions,
) -> list[PagedModel]:
    """The model paged for the blocks that were asked for, and for others to compare with.

    Raises:
        RefusedError: something stands in the way; carries `report`.
    """
    asked, settings = options.paged.block_size, options.paged
    lowered = settings.flavor == "ort"
    if lowered:
        settings = replace(settings, kv_dtype=settings.kv_dtype or _narrowest(roles))
    sizes = (32, 16) if lowered else (4, 8)  # the operator takes 16 and more
    other = replace(settings, block_size=sizes[asked == sizes[0]])
    length = options.max_length or context_length(Path(report.input).with_name("config.json"))
    found: list[PagedModel] = []
    try:
        for each, paged in ((model.clone(), other), (model, settings)):
            sampler = Sampler(each.graph, roles, runtime)
            result = page_model(each, roles, sampler, families, paged)
            if lowered:
                result, report.lowered = lower_paged(result, runtime, length)
                tidy(each)
                functions.declare(each)
            found.insert(0, result)
    except UnpageableError as error:
        paging = report.paging
        assert paging is not None
        paging.obstacles = list(error.obstacles)
        first = error.obstacles[0]
        where = f" [{first.node}]" if first.node else ""
        more = f" (and {len(error.obstacles) - 1} more)" if len(error.obstacles) > 1 else ""
        hint = "; --flavor portable has no such limit" if first.code == PAGED_ORT else ""
        refused = RefusedError(
            f"{report.input} cannot be paged: {first.code}: {first.reason}{where}{more}{hint}"
        )
        refused.report = report
        raise refused from error
    report.paging = found[0].described()
    limit = found[0].max_length
    if limit is not None:
        write_contract(found[0].model, Contract(max_length=limit))
    found[0].write_metadata()
    report.contract = "; ".join(found[0].contract)
    if any(family.faint for family in found[0].families):
        report.warnings.append(
            "the original hides keys by adding a number that a score above it would outweigh; "
            "in the paged model they are hidden whatever their scores"
        )
    return found


def _narrowest(roles: Roles) -> ir.DataType:
    """The type of pools that com.microsoft::PagedAttention takes: the caches' own, or float16."""
    kinds = {roles.inputs[pair.past].dtype for pair in roles.pairs}
    return ir.DataType.BFLOAT16 if kinds == {ir.DataType.BFLOAT16} else ir.DataType.FLOAT16
