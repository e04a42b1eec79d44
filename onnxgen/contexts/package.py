"""A model package of ONNX Runtime: one folder, the same model for several execution providers.

    DIR/manifest.json                           the components, here one
    DIR/<component>/component.json              its variants, in the order in which they are tried
    DIR/<component>/<variant>/model.onnx        a variant's graph, with what was compiled for it
    DIR/shared_assets/sha256-<hex>/weights.data every weight, once, for all variants

ONNX Runtime looks only at variants of the first provider that a session names. Of those it rejects
the ones whose compatibility string the provider does not take, and prefers one that the provider
calls optimal to one that names no string. It never goes on to another provider. So that there is a
fallback all the same, the original is listed once more for each provider that a variant names.

The weights lie outside of the variants' folders, where a model's file may not reach. What brings
them together is a session option that each variant carries, and which ONNX Runtime sets itself when
it opens a package. Only JSON is written here: no version of ONNX Runtime is needed for that.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
import onnx

from onnxgen.backends.interface import Identity, Weight
from onnxgen.contexts.new_folder import new_folder
from onnxgen.errors import FileError, RefusedError, UsageError
from onnxgen.scratch import create, sync
from onnxgen.staging import MAX_FILE, MOVABLE
from onnxgen.wire import tensors_of

CPU = "CPUExecutionProvider"
SCHEMA = "1.0"  # of manifest.json; ONNX Runtime 1.32 takes 1.*
MODEL = "model.onnx"
WEIGHTS = "weights.data"
FOLDER_OPTION = "session.model_external_initializers_file_folder_path"
_ALIGNMENT = 64  # bytes, of each weight in the file
_CHUNK = 1 << 24
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class Contents(Protocol):
    """Contents of initializers by name."""

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> Weight: ...


@dataclass(frozen=True)
class Variant:
    """One form of the model in a package.

    Attributes:
        name: of its folder too, see `safe_name`.
        model: every initializer whose name is in `weights` may be without content; all its other
            tensors must have theirs inside.
        provider: the execution provider it was compiled for; "" for the original, which any can run.
        compatibility: what the provider is asked about before it is given the model; where it is "",
            the variant is taken wherever the provider is, and there is no fallback to the original.
        provider_options, session_options: what ONNX Runtime sets when it makes the session; the
            original is given what the first variant for the same provider is, so that it computes
            no less exactly.
        made_by: who compiled it, written down for people to read.
    """

    name: str
    model: onnx.ModelProto
    provider: str = ""
    compatibility: str = ""
    provider_options: Mapping[str, str] = field(default_factory=dict)
    session_options: Mapping[str, str] = field(default_factory=dict)
    made_by: Identity | None = None


def safe_name(text: str) -> str:
    """A text as the name of a folder in a package: `openvino:CPU` gives `openvino-CPU`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip(".-") or "model"


def write_package(
    folder: Path, component: str, variants: Sequence[Variant], weights: Contents
) -> None:
    """Write a package; it is there complete or not at all, and the same bytes for the same values.

    Args:
        folder: where; it must not be there, or be empty.
        component: what the model is called in the package, see `safe_name`.
        variants: in the order in which they are preferred; those of equal rank to a provider are
            taken in this order.
        weights: the contents of the initializers that variants name; those of 1 KiB and more go to
            the shared file, each once however many variants name it.

    Raises:
        UsageError: a name cannot be that of a folder, or two variants have one name.
        RefusedError: a tensor's content is in neither place; or a variant for the CPU provider has a
            compatibility string, which that provider does not look at: any machine would take it.
        FileError: `folder` is not empty, or cannot be written; or a variant's file takes over 2 GB.
    """
    _check(component, variants)
    with new_folder(folder) as root, ExitStack() as stack:
        assets = root / "shared_assets"
        assets.mkdir()
        file = _WeightsFile(stack.enter_context(create(assets / WEIGHTS, [])), assets)
        for variant in variants:
            place = root / component / variant.name
            place.mkdir(parents=True)
            _write(place / MODEL, _with_weights(variant, weights, file), folder)
        asset = file.finish()
        if not asset:
            assets.rmdir()
        body = {"component_name": component, "variants": dict(_entries(variants, asset))}
        _write_json(root / component / "component.json", body)
        _write_json(
            root / "manifest.json",
            {"schema_version": SCHEMA, "layout": "portable", "components": {component: component}},
        )


def _check(component: str, variants: Sequence[Variant]) -> None:
    for name in (component, *(variant.name for variant in variants)):
        if not _NAME.fullmatch(name) or name in ("shared_assets", "manifest.json"):
            raise UsageError(f"{name!r} cannot be the name of a folder in a model package")
    names = [name for name, _ in _entries(variants, "")]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two variants of the model package would be called {name!r}")
    for variant in variants:
        if variant.provider == CPU and variant.compatibility:
            raise RefusedError(
                f"variant {variant.name!r} cannot be in a model package: it was compiled for one kind "
                "of CPU, and ONNX Runtime's CPU provider takes a variant on any"
            )


def _entries(variants: Sequence[Variant], asset: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The variants of component.json; the original once for each provider, from one folder."""
    options = {each.provider: each.provider_options for each in reversed(variants) if each.provider}
    for variant in variants:
        if variant.provider:
            yield variant.name, _entry(variant, asset)
    for variant in variants:
        if not variant.provider:
            others = dict.fromkeys(each.provider for each in variants if each.provider)
            for provider in dict.fromkeys((*others, CPU)):
                name = variant.name if provider == CPU else f"{variant.name}-{safe_name(provider)}"
                given = variant.provider_options or options.get(provider, {})
                here = replace(variant, provider=provider, provider_options=given)
                yield name, _entry(here, asset)


def _entry(variant: Variant, asset: str) -> dict[str, Any]:
    executor: dict[str, Any] = {"model_file": MODEL}
    options = dict(variant.session_options) | ({FOLDER_OPTION: asset} if asset else {})
    if options:
        executor["session_options"] = options
    if variant.provider_options:
        executor["provider_options"] = dict(variant.provider_options)
    entry: dict[str, Any] = {"variant_directory": variant.name, "ep": variant.provider}
    if variant.compatibility:
        entry["compatibility_string"] = variant.compatibility
    entry["executor_info"] = {"ort": executor}
    if variant.made_by is not None:
        made = variant.made_by
        entry["additional_metadata"] = {
            "source": made.source,
            "version": made.version,
            "device": made.device,
            "driver": made.driver,
        }
    return entry


def _with_weights(variant: Variant, weights: Contents, file: _WeightsFile) -> onnx.ModelProto:
    """The variant's model: large weights refer to the shared file, small ones have their content."""
    model = onnx.ModelProto()
    model.CopyFrom(variant.model)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.STRING or tensor.name not in weights:
            _check_inside(tensor)
            continue
        weight = weights[tensor.name]
        if (weight.dtype, weight.shape) != (tensor.data_type, tuple(tensor.dims)):
            raise ValueError(f"'{tensor.name}' of variant {variant.name!r} is another tensor")
        _clear(tensor)
        if weight.data.nbytes < MOVABLE:
            tensor.raw_data = weight.data.tobytes()
            continue
        offset, length = file.add(tensor.name, weight)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    for tensor in islice(tensors_of(model), len(model.graph.initializer), None):
        _check_inside(tensor)
    return model


def _check_inside(tensor: onnx.TensorProto) -> None:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise RefusedError(
            f"the tensor '{tensor.name}' lies in another file, and is not among the weights that a "
            "model package shares"
        )


def _clear(tensor: onnx.TensorProto) -> None:
    kept = {"name", "data_type", "dims", "doc_string", "metadata_props"}
    for descriptor, _ in tensor.ListFields():
        if descriptor.name not in kept:
            tensor.ClearField(descriptor.name)


class _WeightsFile:
    """The weights of all variants, one behind the other: each name once, and each place in memory."""

    def __init__(self, file: BinaryIO, assets: Path) -> None:
        self._file, self._assets = file, assets
        self._hash = hashlib.sha256()
        self._size = 0
        self._offsets: dict[str, int] = {}
        self._places: dict[tuple[int, int], int] = {}
        self._kept: list[Weight] = []  # an address means something while its owner lives

    def add(self, name: str, weight: Weight) -> tuple[int, int]:
        """Offset and length of a weight's bytes."""
        data = weight.data
        if name not in self._offsets:
            place = (data.ctypes.data, data.nbytes)
            if place not in self._places:
                self._places[place] = self._append(data)
                self._kept.append(weight)
            self._offsets[name] = self._places[place]
        return self._offsets[name], data.nbytes

    def finish(self) -> str:
        """Move the file to where its hash says, and return what refers to it; "" without weights."""
        sync(self._file)
        if not self._places:
            (self._assets / WEIGHTS).unlink()
            return ""
        # A shared asset is a folder; its hash is that of a list of its files, as sha256sum prints.
        listed = f"{self._hash.hexdigest()}  {WEIGHTS}\n"
        digest = hashlib.sha256(listed.encode()).hexdigest()
        place = self._assets / f"sha256-{digest}"
        place.mkdir()
        (self._assets / WEIGHTS).rename(place / WEIGHTS)
        return f"sha256:{digest}"

    def _append(self, data: npt.NDArray[np.uint8]) -> int:
        padding = bytes(-self._size % _ALIGNMENT)
        start = self._size + len(padding)
        chunks = (data[each : each + _CHUNK].data for each in range(0, data.nbytes, _CHUNK))
        for chunk in chain([memoryview(padding)], chunks):
            self._file.write(chunk)
            self._hash.update(chunk)
        self._size = start + data.nbytes
        return start


def _write(path: Path, model: onnx.ModelProto, folder: Path) -> None:
    if model.ByteSize() > MAX_FILE:
        raise FileError(f"{folder} cannot be written: {path.parent.name}/{MODEL} takes over 2 GB")
    with create(path, []) as file:
        file.write(model.SerializeToString(deterministic=True))
        sync(file)


def _write_json(path: Path, content: object) -> None:
    with create(path, []) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
        sync(file)
