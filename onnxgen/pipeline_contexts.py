"""What `onnxgen context` runs, in order.

add:      read -> the regions -> each compiled by each backend -> written into the model, beside the
          output -> run by each backend and compared with the original -> moved into place, trusted
list:     read -> the table
check:    read -> the table -> what would run each region here, and why not another
strip:    read -> without the objects of one backend, or of all -> moved into place
convert:  read -> the other form of the same table -> moved into place
export:   in `onnxgen.pipeline_export`
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from onnxgen.analysis.roles import find_roles
from onnxgen.compiling import CompiledBy
from onnxgen.context_files import BlobPlace, describe, written
from onnxgen.context_regions import chosen_regions, shared_values, some_feeds, undeclared
from onnxgen.context_types import types_of
from onnxgen.contexts.choosing import Chooser
from onnxgen.contexts.forms import Encoding, Held, decode, decode_file, holds_contexts
from onnxgen.contexts.order import put_in_order
from onnxgen.contexts.records import FormatError
from onnxgen.contexts.regions import described
from onnxgen.contexts.trust import Given, trust
from onnxgen.contexts.weights import Weights
from onnxgen.errors import FileError, ModelDiffersError, RefusedError, UsageError
from onnxgen.model_io import as_model, data_files
from onnxgen.places import stem
from onnxgen.reading import Opened, open_model
from onnxgen.report import contexts as report
from onnxgen.report.values import Budget
from onnxgen.runtime import Picking, Runtime
from onnxgen.stages import Clock, Progress, sizes
from onnxgen.staging import check_output, termination_raises
from onnxgen.twin import unrunnable_types
from onnxgen.verify.compare import verify_models
from onnxgen.verify.paged_again import is_paged, prove_again


@dataclass(frozen=True)
class AddOptions:
    """What `onnxgen context add` was asked for.

    Attributes:
        backends: that compile, as `openvino:CPU`.
        output: where to write; None for MODEL with .context.onnx.
        region: "all", "attention", or a regular expression; see `analysis.regions`.
        encoding: the form; None for that of the model, or "metadata", in which ONNX Runtime
            optimises the nodes as it would without.
        blob: where the blobs go: into the model, or each into a file beside it.
        verify, budget, roles: as of `pipeline.FuseOptions`.
        force: let the output replace the input.
    """

    backends: tuple[str, ...]
    output: Path | None = None
    region: str = "all"
    encoding: Encoding | None = None
    blob: BlobPlace = "inline"
    verify: bool = True
    budget: Budget = "full"
    roles: Mapping[str, str] = field(default_factory=dict)
    force: bool = False


def add(path: Path, options: AddOptions, progress: Progress) -> report.Contexts:
    """Have backends compile regions of a model, and put what they made into it.

    Raises:
        FileError: the model cannot be read, or the result not written.
        UsageError: an option does not fit.
        RefusedError: a backend is not here or cannot compile it, or nothing can be compared.
        ModelDiffersError: run by a backend, it differs from the original, however compiled; carries
            no report.
    """
    if not options.backends:
        raise UsageError("--backend is missing: name one, such as openvino:CPU")
    if options.budget == "layers":
        raise UsageError("--verify layers cuts a model down, and a blob cannot be cut")
    output = options.output or path.with_name(f"{stem(path)}.context.onnx")
    said = report.Contexts(str(path))
    clock = Clock(said.seconds, progress)
    clock.start("read", f"reading {path.name}")
    opened, held = decode_file(path)
    with contextlib.suppress(ValueError):  # a circle, as `as_model` says
        put_in_order(opened.proto.graph)
    model = as_model(replace(opened, proto=copy.deepcopy(opened.proto)))
    reads = data_files(model)
    check_output(output, path, reads, force=options.force)
    said.bytes_before = sizes([path, *reads])
    if options.verify and unrunnable_types(model):
        raise RefusedError(
            f"{path} computes in a type that ONNX Runtime's CPU does not run, such as bfloat16: what "
            "a backend makes of it cannot be compared with it"
        )
    roles = find_roles(model, options.roles)
    encoding: Encoding = options.encoding or held.encoding or "metadata"
    backends = list(dict.fromkeys(options.backends))

    # Compilers leave files of their own behind too, where they are ended in their midst.
    with termination_raises(), Runtime(twins=unrunnable_types(model)) as runtime:
        clock.start("regions", "choosing regions")
        held.table.regions = [each.without(*backends) for each in held.table.regions]
        regions, others = chosen_regions(opened, model, held, options.region)
        names = shared_values(opened.proto, [*regions, *others])
        types = types_of(path, opened.proto, names, some_feeds(model, roles), runtime)
        weights = Weights(opened)
        regions = [described(opened.proto, each, types, weights) for each in regions]
        held.table.types |= undeclared(opened.proto, types, [*regions, *others])
        compilers = [CompiledBy(backend, opened) for backend in backends]
        wrong: CompiledBy | None = None
        while wrong is None or wrong.next_way():
            clock.start("compile", "compiling")
            made = [compiler.contexts(regions, progress) for compiler in compilers]
            contents = {name: data for each in compilers for name, data in each.blobs.items()}
            new = [
                replace(region, contexts=(*region.contexts, *contexts))
                for region, *contexts in zip(regions, *made, strict=True)
            ]
            held.table.regions = sorted([*new, *others], key=lambda region: region.nodes)
            clock.start("write", f"writing {output.name}")
            with written(
                opened, held, contents, output, encoding, blob=options.blob, force=options.force
            ) as stage:
                said.bytes_after = stage.bytes
                sides = (path, stage.path, compilers, options, said, runtime, clock)
                wrong = _prove(*sides, paged=is_paged(model))
                if wrong is None:
                    # First: where that fails, nothing is written.
                    for each in compilers:
                        trust(each.blobs, f"{each.backend} for {output.absolute()}")
                    stage.commit()
                    break
        if wrong is not None:
            reason = said.proofs[wrong.backend].reason
            raise ModelDiffersError(f"{path}: run by {wrong.backend} it differs: {reason}")
    clock.stop()
    if not options.verify:
        said.warnings.append("unproven: told not to run")
    said.output = str(output)
    held.encoding = encoding
    describe(said, opened, held)
    return said


def listed(path: Path) -> report.Contexts:
    """What a model holds.

    Raises:
        FileError: the model, or its table, cannot be read.
    """
    said = report.Contexts(str(path))
    opened, held = decode_file(path)
    describe(said, opened, held)
    return said


def check(path: Path, prefer: Sequence[str] | None, trusted: Given | None) -> report.Contexts:
    """What would run each region here, and why not another; blobs are loaded, nothing is run.

    Raises:
        FileError: the model, its table, or a list of trusted blobs cannot be read.
        UsageError: `prefer` names a backend that compiled nothing in it.
    """
    said = report.Contexts(str(path))
    opened, held = decode_file(path)
    chooser = Chooser(opened, held, prefer, trusted)
    there = held.table.backends
    unknown = next((each for each in prefer or () if each not in there), None)
    if unknown is not None and there:
        raise UsageError(f"--prefer {unknown}: {path} holds what {', '.join(there)} compiled")
    describe(said, opened, held)
    found: dict[tuple[str, str], tuple[bool, str]] = {}
    for region in held.table.regions:
        picked = chooser.choose(region).context
        for context in region.contexts:
            reason = chooser.objection(region, context)
            if not reason and prefer is not None and context.backend not in prefer:
                reason = "it could, and was not asked for"
            elif not reason and context is not picked and picked is not None:
                reason = f"it could, and {picked.backend} comes first"
            found[region.name, context.backend] = (context is picked, reason)
    said.held = [
        replace(each, picked=picked, reason=reason)
        for each in said.held
        for picked, reason in [found[each.region, each.backend]]
    ]
    return said


def strip(
    path: Path, backend: str | None, output: Path | None, *, force: bool, progress: Progress
) -> report.Contexts:
    """Take out what one backend compiled, or all; the graph is the original one then.

    Raises:
        FileError: the model cannot be read, or the result not written.
        UsageError: nothing of that backend is there.
    """
    opened = open_model(path)
    if not holds_contexts(opened.proto):
        raise RefusedError(f"{path} holds nothing for backends")
    try:
        held = decode(opened.proto)
    except FormatError as error:
        if backend is not None:
            raise FileError(
                f"{path}: what it holds for backends cannot be read: {error}"
            ) from error
        if holds_contexts(opened.proto):
            raise FileError(f"{path}: what it holds cannot be taken out: {error}") from error
        held = Held(opened.proto, encoding="function")
    there = held.table.backends
    if backend is not None and backend not in there:
        raise UsageError(f"--backend {backend}: {path} holds only what {', '.join(there)} compiled")
    gone = there if backend is None else [backend]
    held.table.regions = [each.without(*gone) for each in held.table.regions]
    ending = "original" if backend is None or there == [backend] else "stripped"
    place = output or path.with_name(f"{stem(path)}.{ending}.onnx")
    said = _rewritten(path, opened, held, held.encoding or "function", place, force, progress)
    said.dropped = gone
    return said


def convert(
    path: Path, encoding: Encoding, output: Path | None, *, force: bool, progress: Progress
) -> report.Contexts:
    """Write the same table in the other form.

    Raises:
        FileError: the model cannot be read, or the result not written.
        UsageError: it holds nothing.
    """
    opened, held = decode_file(path)
    if not held.table.regions:
        raise RefusedError(f"{path} holds nothing for backends")
    place = output or path.with_name(f"{stem(path)}.{encoding}.onnx")
    return _rewritten(path, opened, held, encoding, place, force, progress)


def _rewritten(
    path: Path,
    opened: Opened,
    held: Held,
    encoding: Encoding,
    output: Path,
    force: bool,
    progress: Progress,
) -> report.Contexts:
    """Write a model whose table was changed, but nothing that is computed."""
    said = report.Contexts(str(path))
    clock = Clock(said.seconds, progress)
    clock.start("write", f"writing {output.name}")
    said.bytes_before = sizes([path, *opened.beside])
    with written(opened, held, {}, output, encoding, force=force) as stage:
        said.bytes_after = stage.bytes
        stage.commit()
    clock.stop()
    said.output = str(output)
    held.encoding = encoding if any(each.contexts for each in held.table.regions) else ""
    describe(said, opened, held)
    return said


def _prove(
    path: Path,
    staged: Path,
    compilers: Sequence[CompiledBy],
    options: AddOptions,
    said: report.Contexts,
    runtime: Runtime,
    clock: Clock,
    *,
    paged: bool,
) -> CompiledBy | None:
    """Run the model by each backend, as it was written, and compare it with the original.

    Returns:
        The first backend that is wrong.

    Raises:
        RefusedError: nothing could be compared.
    """
    if not options.verify:
        return None
    for compiler in compilers:
        clock.start("verify", f"verifying {compiler.backend}")
        picking = Picking(compiler.backend, tuple(compiler.blobs))
        if paged:
            proof = prove_again(path, staged, picking, runtime, clock.progress)
        else:
            proof = verify_models(
                path,
                staged,
                roles=options.roles,
                budget=options.budget,
                picking=picking,
                runtime=runtime,
                progress=clock.progress,
            )
        said.proofs[compiler.backend] = proof
        if proof.status == "differs":
            return compiler
        if proof.status != "proven":
            raise RefusedError(
                f"{path}: that {compiler.backend} computes the same cannot be shown: {proof.reason}"
            )
    return None
