"""A reader of the format of docs/contexts.md, written from that page alone: nothing of onnxgen is used.

    found = read(Path("model.context.onnx"))
    found.original, found.blobs                     # the model as it was; bytes by sha256
    for region in found.regions:
        found.text(region), found.subgraph_sha256(region), found.weights_sha256(region)

It is for trying the page, not for use: it reads everything into memory and trusts what it reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from tests.independent_text import bytes_of, canonical_lines, elements

DOMAIN = "onnxgen.backend"


@dataclass
class Region:
    """A record of the table, the names of its values and the positions of its nodes."""

    record: dict[str, Any]
    inputs: list[str]
    weights: list[str]
    outputs: list[str]
    nodes: list[int]

    @property
    def contexts(self) -> list[dict[str, Any]]:
        """Contexts, with their parameters as positions."""
        return [
            {**each, "parameters": spans(each["parameters"])} for each in self.record["contexts"]
        ]


@dataclass
class Found:
    """What a file holds."""

    original: onnx.ModelProto
    encoding: str
    regions: list[Region]
    types: dict[str, str]
    blobs: dict[str, bytes]
    folder: Path

    def text(self, region: Region) -> str:
        """The canonical text of a region."""
        nodes = [self.original.graph.node[at] for at in region.nodes]
        inputs = dict(zip(region.inputs, region.record["input_types"], strict=True))
        outputs = dict(zip(region.outputs, region.record["output_types"], strict=True))
        lines = canonical_lines(self.original, nodes, inputs, region.weights, outputs)
        return "".join(f"{line}\n" for line in lines)

    def subgraph_sha256(self, region: Region) -> str:
        """Of the canonical text."""
        return hashlib.sha256(self.text(region).encode()).hexdigest()

    def weights_sha256(self, region: Region) -> str:
        """Of the contents of its weights."""
        tensors = {each.name: each for each in self.original.graph.initializer}
        lines = ""
        for name in region.weights:
            tensor = tensors[name]
            digest = hashlib.sha256(bytes_of(tensor, self.folder)).hexdigest()
            lines += f"{elements(tensor.data_type, tensor.dims)} {digest}\n"
        return hashlib.sha256(lines.encode()).hexdigest()


# --- the file -----------------------------------------------------------------------------------


def read(path: Path) -> Found:
    """Read a model file of either form."""
    model = onnx.load(path, load_external_data=False)
    header = json.loads(_take(model.metadata_props, "onnxgen.contexts") or "null")
    assert header["version"] == 1
    own = {each.name: each for each in model.functions if each.domain == DOMAIN}
    blobs = {
        name.removeprefix("Blob_"): bytes_of(function.node[0].attribute[0].t, path.parent)
        for name, function in own.items()
        if name.startswith("Blob_")
    }
    scopes = [_take(node.metadata_props, "onnxgen.context") for node in model.graph.node]
    if header["encoding"] == "function":
        regions = _inline(model, own, header["order"])
    else:
        regions = []
        for record in header["regions"]:
            nodes = [at for at, scope in enumerate(scopes) if scope == record["region"]]
            values = (record["inputs"], record["weights"], record["outputs"])
            regions.append(Region(record, *values, nodes))
    functions = [each for each in model.functions if each.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend(functions)
    opsets = [each for each in model.opset_import if each.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    model.ir_version = header.get("ir_version", model.ir_version)
    regions.sort(key=lambda region: region.nodes)
    return Found(model, header["encoding"], regions, header.get("types", {}), blobs, path.parent)


def _inline(
    model: onnx.ModelProto, own: Mapping[str, onnx.FunctionProto], order: str
) -> list[Region]:
    """The function form: nodes come back in the place of calls, and then to their old positions."""
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    regions = []
    for node in graph.node:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        body = own[node.op_type]
        record = json.loads(_take(body.metadata_props, "onnxgen.contexts") or "null")
        assert (body.input, body.output) == (node.input, node.output)  # this reader renames nothing
        count = record["inputs"]
        given = list(node.input)
        at = list(range(len(nodes), len(nodes) + len(body.node)))
        regions.append(Region(record, given[:count], given[count:], list(node.output), at))
        nodes += body.node
        graph.value_info.extend(body.value_info)
    places = spans(order)
    del graph.node[:]
    graph.node.extend(
        node for _, node in sorted(zip(places, nodes, strict=True), key=lambda pair: pair[0])
    )
    for region in regions:
        region.nodes = sorted(places[at] for at in region.nodes)
    return regions


def spans(text: str) -> list[int]:
    """`0-2,5` is 0, 1, 2, 5."""
    found: list[int] = []
    for each in text.split(",") if text else []:
        first, _, last = each.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def _take(properties: Any, key: str) -> str | None:
    for index, each in enumerate(properties):
        if each.key == key:
            del properties[index]
            return str(each.value)
    return None
