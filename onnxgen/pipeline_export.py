"""What `onnxgen context export` runs: what a model holds for backends, in ONNX Runtime's own forms.

package:    read -> each backend's blobs -> a variant for each, and the original -> a new folder
epcontext:  read -> one backend's blobs -> the graph with EPContext nodes -> moved into place

Blobs are checked against their hashes and copied. What is written is run and compared with the
original where its execution provider is installed; where it is not, that is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir

from onnxgen.backends import ort_compile
from onnxgen.backends.interface import BackendError
from onnxgen.context_files import describe
from onnxgen.contexts import openvino_bin
from onnxgen.contexts.blobs import BlobError, read_blob
from onnxgen.contexts.cutting import cut_out
from onnxgen.contexts.epcontext import CompiledRegion, compatibility_of, epcontext_model
from onnxgen.contexts.forms import Held, decode_file
from onnxgen.contexts.package import Variant, safe_name, write_package
from onnxgen.contexts.trust import Given, trusted
from onnxgen.contexts.values import Context
from onnxgen.contexts.weights import Weights
from onnxgen.errors import FileError, ModelDiffersError, RefusedError, UsageError
from onnxgen.model_io import as_model, staged
from onnxgen.places import stem
from onnxgen.reading import Opened
from onnxgen.report import contexts as report
from onnxgen.runtime import Picking
from onnxgen.stages import Clock, Progress, sizes
from onnxgen.verify.compare import verify_models


def package(
    path: Path,
    folder: Path,
    backends: Sequence[str],
    progress: Progress,
    trust: Given | None = None,
) -> report.Contexts:
    """Write a model package of ONNX Runtime; see `contexts.package`.

    Args:
        backends: whose objects go in; none for all that can.
        trust: blobs that may be run beside this user's own; what is not trusted is written unproven.

    Raises:
        FileError: the model or a blob cannot be read, or the folder not written.
        UsageError: a backend compiled nothing in it.
        RefusedError: a backend that was asked for cannot be in a package, or none can; or nothing
            could be compared.
        ModelDiffersError: run by a provider that is here, it computes something else.
    """
    said = report.Contexts(str(path))
    clock = Clock(said.seconds, progress)
    clock.start("read", f"reading {path.name}")
    opened, held = decode_file(path)
    describe(said, opened, held)
    said.bytes_before = sizes([path, *opened.beside])
    variants: list[Variant] = []
    backend_of: dict[str, str] = {}
    for backend in backends or held.table.backends:
        try:
            variants.append(_variant(opened, held, backend))
            backend_of[variants[-1].name] = backend
        except RefusedError as error:
            if backends:
                raise
            said.warnings.append(f"left out: {error}")
    said.held = [each for each in said.held if each.backend in backend_of.values()]
    if not variants:
        raise RefusedError(f"{path} holds nothing that a package can: {'; '.join(said.warnings)}")
    for variant in variants:
        if strange := _strange(held, backend_of[variant.name], trust):
            said.warnings.append(f"unproven: {strange}")
            continue
        _prove(path, opened, variant.model, variant.provider, folder, said, clock)
    clock.start("write", f"writing {folder}")
    original = Variant("original", opened.proto)
    write_package(folder, "model", [*variants, original], Weights(opened))
    clock.stop()
    said.output = str(folder)
    said.bytes_after = sizes(each for each in folder.rglob("*") if each.is_file())
    return said


def epcontext(
    path: Path,
    backend: str,
    output: Path | None,
    *,
    force: bool,
    progress: Progress,
    trust: Given | None = None,
) -> report.Contexts:
    """Write the model for one execution provider, its regions as EPContext nodes; no fallback is in it.

    Raises:
        FileError: the model or a blob cannot be read, or the result not written.
        UsageError: the backend compiled nothing in it.
        RefusedError: there is no EPContext form of what it compiled, or nothing could be compared.
        ModelDiffersError: run by the provider, which is here, it computes something else.
    """
    said = report.Contexts(str(path))
    clock = Clock(said.seconds, progress)
    clock.start("read", f"reading {path.name}")
    opened, held = decode_file(path)
    describe(said, opened, held)
    said.bytes_before = sizes([path, *opened.beside])
    model, provider = _epcontext(opened, held, backend)
    said.held = [each for each in said.held if each.backend == backend]
    place = output or path.with_name(f"{stem(path)}.epcontext.onnx")
    if strange := _strange(held, backend, trust):
        said.warnings.append(f"unproven: {strange}")
    else:
        _prove(path, opened, model, provider, place, said, clock)
    clock.start("write", f"writing {place.name}")
    written = _as_written(opened, model)
    with staged(written, place, source=path, force=force, reads=opened.beside) as stage:
        said.bytes_after = stage.bytes
        stage.commit()
    clock.stop()
    said.output = str(place)
    return said


def _prove(
    path: Path,
    opened: Opened,
    model: onnx.ModelProto,
    provider: str,
    place: Path,
    said: report.Contexts,
    clock: Clock,
) -> None:
    """Run a model by its provider, where that is installed, and compare it with the original.

    Raises:
        ModelDiffersError: it computes something else.
        RefusedError: nothing could be compared.
    """
    try:
        ort_compile.identity(provider)
    except BackendError as error:
        said.warnings.append(f"unproven: {error}")
        return
    clock.start("verify", f"verifying with {provider}")
    beside = place.with_name(f"{place.name}.{safe_name(provider)}.onnx")
    with staged(
        _as_written(opened, model), beside, source=path, force=False, passing=True
    ) as stage:
        picking = Picking(provider=provider)
        proof = verify_models(path, stage.path, picking=picking, progress=clock.progress)
    said.proofs[provider] = proof
    if proof.status == "differs":
        raise ModelDiffersError(f"{path}: run by {provider} it differs: {proof.reason}")
    if proof.status != "proven":
        raise RefusedError(
            f"{path}: that {provider} computes the same cannot be shown: {proof.reason}"
        )


def _strange(held: Held, backend: str, trust: Given | None) -> str:
    """Which blob of a backend no driver is given here, as a clause; "" where none is such."""
    known = trusted(trust)
    blobs = (
        context.blob.sha256
        for region in held.table.regions
        for context in region.contexts
        if context.backend == backend
    )
    first = next((each for each in blobs if each not in known), None)
    return f"the blob {first[:12]}… of {backend} is not trusted" if first is not None else ""


def _as_written(opened: Opened, model: onnx.ModelProto) -> ir.Model:
    """A model of a provider's, with those of the original's weights that it still reads."""
    there = {each.name for each in model.graph.initializer}
    cut = tuple(each for each in opened.weights if each.name in there)
    proto = onnx.ModelProto()
    proto.CopyFrom(model)
    return as_model(replace(opened, proto=proto, weights=cut))


def _variant(opened: Opened, held: Held, backend: str) -> Variant:
    """A backend's objects as a variant of a package."""
    model, provider = _epcontext(opened, held, backend)
    options = openvino_bin.PROVIDER_OPTIONS if provider == openvino_bin.PROVIDER else {}
    made_by = next(
        c.identity for r in held.table.regions for c in r.contexts if c.backend == backend
    )
    compatibility = compatibility_of(model, provider)
    return Variant(safe_name(backend), model, provider, compatibility, options, made_by=made_by)


def _epcontext(opened: Opened, held: Held, backend: str) -> tuple[onnx.ModelProto, str]:
    """The model with one backend's regions as EPContext nodes, and the provider that runs it."""
    if backend not in held.table.backends:
        there = ", ".join(held.table.backends) or "nobody"
        raise UsageError(f"--backend {backend}: {opened.path} holds what {there} compiled")
    provider = _provider(opened.path, backend)
    regions = [
        CompiledRegion(
            region.nodes,
            region.inputs,
            region.weights,
            region.outputs,
            cut_out(opened.proto, region),
            _blob(opened, held, context),
            context.form,
            provider,
            context.identity,
            context.parameters,
        )
        for region in held.table.regions
        for context in region.contexts
        if context.backend == backend
    ]
    return epcontext_model(opened.proto, regions), provider


def _provider(path: Path, backend: str) -> str:
    """The execution provider that runs a backend's blobs."""
    name, _, device = backend.partition(":")
    if backend == "openvino:CPU":
        return openvino_bin.PROVIDER
    if name == "ort" and device != "cpu":
        return device
    why = "no execution provider is known that runs what it compiles"
    if backend == "ort:cpu":
        why = "ONNX Runtime's CPU looks at no compatibility string, and any machine would take it"
    raise RefusedError(f"{path}: what {backend} compiled cannot be exported: {why}")


def _blob(opened: Opened, held: Held, context: Context) -> bytes:
    try:
        return read_blob(opened, held, context.blob)
    except BlobError as error:
        raise FileError(f"{opened.path}: {context.backend}: {error}") from error
