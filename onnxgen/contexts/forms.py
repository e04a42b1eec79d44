"""How a file spells what it holds for backends: two forms of one table, see docs/contexts.md.

    held = decode(proto)                 # the original graph, the table, the blobs, by their hashes
    encode(held, "metadata")             # the other form of the same

function:  the nodes of a region are the body of a model-local function `onnxgen.backend::Region_0`;
           the graph calls it, and passes the initializers in. The function's metadata tell of it.
metadata:  nodes stay where they are and name their region in their metadata; the model's metadata
           hold the table.

In both a blob is the value of a Constant in a function that nobody calls, so that every runtime
passes over it, and its bytes are as they are, in the file or in one beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import onnx

from onnxgen.contexts.cutting import every_node, graphs_of
from onnxgen.contexts.inlining import Taken, inlined
from onnxgen.contexts.order import collapsed, is_sorted
from onnxgen.contexts.records import (
    FormatError,
    dumped,
    parsed,
    read_region,
    read_types,
    write_region,
)
from onnxgen.contexts.spans import as_spans, from_spans
from onnxgen.contexts.values import DOMAIN, VERSION, Region, Table
from onnxgen.errors import FileError
from onnxgen.reading import BLOB, Opened, open_model

Encoding = Literal["function", "metadata"]
KEY = "onnxgen.contexts"  # of the model's metadata, and of a region's function
SCOPE = "onnxgen.context"  # of a node's metadata: its region
_REGION, _BLOB = "Region_", "Blob_"
_IR_VERSION = 10  # the first whose nodes and functions have metadata


@dataclass
class Held:
    """A model, and what it holds for backends.

    Attributes:
        proto: the model as it was before anything was added.
        table: what is added.
        blobs: the bytes of each blob as a tensor, UINT8 [size], in the file or beside it, by sha256.
        encoding: the form that it was read from; "" where the file holds nothing.
    """

    proto: onnx.ModelProto
    table: Table = field(default_factory=Table)
    blobs: dict[str, onnx.TensorProto] = field(default_factory=dict)
    encoding: Encoding | Literal[""] = ""


def holds_contexts(proto: onnx.ModelProto) -> bool:
    """Whether there is anything of ours in a model, whole or damaged."""
    keys = {each.key for each in proto.metadata_props}
    return KEY in keys or any(each.domain == DOMAIN for each in proto.functions)


def decode(proto: onnx.ModelProto) -> Held:
    """Take what a model holds for backends out of it.

    Returns:
        The model as it was, in `proto` itself, and the table.

    Raises:
        FormatError: the table cannot be read; `proto` is then as `strip` leaves it.
    """
    header = _pop(proto.metadata_props, KEY)
    blobs = {name: tensor for name, tensor in map(_blob, proto.functions) if tensor is not None}
    records = {
        each.name: record
        for each in proto.functions
        if each.domain == DOMAIN and (record := _pop(each.metadata_props, KEY)) is not None
    }
    scopes = [_pop(node.metadata_props, SCOPE) for node in proto.graph.node]
    if header is None:
        if _strip(proto, ""):
            raise FormatError("its table is missing")
        return Held(proto)
    try:
        top = parsed(header)
    except FormatError:
        _strip(proto, "")
        raise
    taken = _strip(proto, top.get("order", ""))
    if top.get("version") != VERSION or top["version"] is True:
        raise FormatError(f"its table is of version {top.get('version')!r}, and {VERSION} is known")
    before = top.get("ir_version")
    if isinstance(before, int) and 3 <= before < _IR_VERSION:
        proto.ir_version = before
    encoding = top.get("encoding")
    if encoding == "function":
        regions = [_called(each, records) for each in taken]
    elif encoding == "metadata":
        regions = _scoped(top.get("regions"), scopes)
    else:
        raise FormatError(f"its table is of the unknown form {encoding!r}")
    _check(proto, regions)
    regions.sort(key=lambda region: region.nodes)
    return Held(proto, Table(regions, read_types(top.get("types", {}))), blobs, encoding)


def decode_file(path: Path) -> tuple[Opened, Held]:
    """A model file and what it holds, as `decode` says.

    Raises:
        FileError: the model, or its table, cannot be read.
    """
    opened = open_model(path)
    try:
        return opened, decode(opened.proto)
    except FormatError as error:
        raise FileError(
            f"{path}: what it holds for backends cannot be read: {error}; "
            "`onnxgen context strip` gives the model without it"
        ) from error


def strip(proto: onnx.ModelProto) -> list[str]:
    """Take out everything that is ours, however damaged; functions stay that more than regions call.

    Returns:
        The backends that had compiled something; ["somebody"] where the table cannot be read.
    """
    try:
        return decode(proto).table.backends
    except FormatError:
        return ["somebody"]


def encode(held: Held, encoding: Encoding) -> onnx.ModelProto:
    """Put the table into the model, in one of the two forms; `held.proto` becomes that model."""
    proto, table = held.proto, held.table
    if encoding not in get_args(Encoding):
        raise ValueError(encoding)
    regions = [region for region in table.regions if region.contexts]
    top: dict[str, Any] = {"version": VERSION, "encoding": encoding}
    if proto.ir_version < _IR_VERSION:
        top["ir_version"] = proto.ir_version
        proto.ir_version = _IR_VERSION
    if table.types:
        top["types"] = table.types
    if encoding == "function":
        top["order"] = as_spans(_call(proto, regions))
    else:
        for region in regions:
            for position in region.nodes:
                proto.graph.node[position].metadata_props.add(key=SCOPE, value=region.name)
        top["regions"] = [write_region(region, names=True) for region in regions]
    needed = dict.fromkeys(each.blob.sha256 for region in regions for each in region.contexts)
    for name in needed:
        proto.functions.append(_holder(name, held.blobs[name], proto))
    if needed:
        proto.opset_import.add(domain=DOMAIN, version=1)
        proto.metadata_props.add(key=KEY, value=dumped(top))
    held.encoding = encoding if needed else ""
    return proto


def _call(proto: onnx.ModelProto, regions: Sequence[Region]) -> list[int]:
    """Put each region's nodes into a function, and a call where they were.

    Returns:
        Positions in the original graph of the nodes in their new order, those of regions where the
        calls are.
    """
    graph = proto.graph
    order = collapsed(graph.node, [region.nodes for region in regions])
    nodes = list(graph.node)
    opsets = list(proto.opset_import)
    infos = {each.name: each for each in graph.value_info}
    hidden: set[str] = set()
    new: list[onnx.NodeProto] = []
    positions: list[int] = []
    for kind, number in order:
        if kind == "node":
            new.append(nodes[number])
            positions.append(number)
            continue
        region = regions[number]
        positions += region.nodes
        name = f"{_REGION}{number}"
        function = onnx.FunctionProto(
            name=name,
            domain=DOMAIN,
            input=[*region.inputs, *region.weights],
            output=region.outputs,
            opset_import=opsets,
            node=[nodes[position] for position in region.nodes],
        )
        inner = {each for node in function.node for each in node.output} - set(region.outputs)
        function.value_info.extend(infos[each] for each in infos if each in inner)
        hidden |= inner
        function.metadata_props.add(key=KEY, value=dumped(write_region(region, names=False)))
        proto.functions.append(function)
        call = onnx.NodeProto(name=region.name, domain=DOMAIN, op_type=name)
        call.input.extend(function.input)
        call.output.extend(function.output)
        new.append(call)
    del graph.node[:]
    graph.node.extend(new)
    kept = [each for each in graph.value_info if each.name not in hidden]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    return positions


def _strip(proto: onnx.ModelProto, order: str) -> list[Taken]:
    """Inline calls of regions, and drop the functions and the domain; nodes in their old order."""
    own = [each for each in proto.functions if each.domain == DOMAIN]
    bodies = {each.name: each for each in own if each.name.startswith(_REGION)}
    _check_calls(proto, own, bodies)
    nodes, taken, infos = inlined(proto.graph, bodies)
    places = from_spans(order, len(nodes))
    if places is not None:
        where = {place: index for index, place in enumerate(places)}
        sorted_nodes = [nodes[where[index]] for index in range(len(nodes))]
        if is_sorted(sorted_nodes):  # else somebody has moved nodes since
            nodes = sorted_nodes
            for each in taken:
                each.positions = sorted(places[index] for index in each.positions)
    if own:
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        proto.graph.value_info.extend(infos)
        others = [each for each in proto.functions if each.domain != DOMAIN]
        del proto.functions[:]
        proto.functions.extend(others)
    opsets = [each for each in proto.opset_import if each.domain != DOMAIN]
    del proto.opset_import[:]
    proto.opset_import.extend(opsets)
    return taken


def _check_calls(
    proto: onnx.ModelProto,
    own: Sequence[onnx.FunctionProto],
    bodies: Mapping[str, onnx.FunctionProto],
) -> None:
    """Calls can be replaced by what they call; where not, nothing is taken out: the model still runs."""
    names = {each.name for each in own}
    if not names:
        return
    calls = Counter(node.op_type for node in proto.graph.node if node.domain == DOMAIN)
    size = sum(len(bodies[each].node) * count for each, count in calls.items() if each in bodies)
    if size > 2 * sum(len(each.node) for each in own):
        raise FormatError("its functions are called again and again")
    within = (g.node for n in proto.graph.node for a in n.attribute for g in graphs_of(a))
    places = [*within, *(each.node for each in proto.functions)]
    inner = {node.op_type for each in places for node in every_node(each) if node.domain == DOMAIN}
    strange = (names & inner) | (names & calls.keys()) - bodies.keys()
    if strange:
        raise FormatError(f"its function '{min(strange)}' is called where no region can be")


def _called(taken: Taken, records: Mapping[str, str]) -> Region:
    """The region whose nodes were taken out of a function."""
    record = records.get(taken.function)
    if record is None:
        raise FormatError(f"its function '{taken.function}' says nothing of itself")
    region = read_region(parsed(record), taken.inputs, taken.outputs)
    return replace(region, nodes=tuple(taken.positions))


def _scoped(records: object, scopes: Sequence[str | None]) -> list[Region]:
    """The regions of the table, with the nodes that name them."""
    if not isinstance(records, list):
        raise FormatError("its table has no list of regions")
    nodes: dict[str, list[int]] = {}
    for position, scope in enumerate(scopes):
        if scope is not None:
            nodes.setdefault(scope, []).append(position)
    regions = [read_region(record) for record in records]
    return [replace(region, nodes=tuple(nodes.get(region.name, ()))) for region in regions]


def _check(proto: onnx.ModelProto, regions: Sequence[Region]) -> None:
    """What the table says of values is so in the graph."""
    weights = {each.name for each in proto.graph.initializer}
    names = Counter(region.name for region in regions)
    for region in regions:
        if names[region.name] > 1:
            raise FormatError(f"two regions are called '{region.name}'")
        if not region.nodes:
            raise FormatError(f"no node is of its region '{region.name}'")
        missing = next((name for name in region.weights if name not in weights), None)
        if missing is not None:
            raise FormatError(f"the weight '{missing}' of '{region.name}' is no initializer")


def _blob(function: onnx.FunctionProto) -> tuple[str, onnx.TensorProto | None]:
    """The hash and the tensor of a function that holds a blob; None of any other."""
    name = function.name.removeprefix(_BLOB)
    if function.domain != DOMAIN or name == function.name or len(function.node) != 1:
        return "", None
    values = [each.t for each in function.node[0].attribute if each.name == "value"]
    return name, (values[0] if values else None)


def _holder(name: str, tensor: onnx.TensorProto, proto: onnx.ModelProto) -> onnx.FunctionProto:
    """The function that holds a blob."""
    value = onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, t=tensor)
    value.t.name = BLOB + name
    constant = onnx.NodeProto(op_type="Constant", output=["blob"], attribute=[value])
    opsets = [each for each in proto.opset_import if each.domain in ("", "ai.onnx")]
    return onnx.FunctionProto(
        name=_BLOB + name, domain=DOMAIN, output=["blob"], node=[constant], opset_import=opsets
    )


def _pop(properties: Any, key: str) -> str | None:
    """Take an entry out of metadata."""
    found: str | None = None
    kept: Iterable[onnx.StringStringEntryProto] = [each for each in properties if each.key != key]
    if len(list(kept)) != len(properties):
        found = next(each.value for each in properties if each.key == key)
        del properties[:]
        properties.extend(kept)
    return found
