"""Which regions of a model are compiled, and what is known of the values between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import onnx
import onnx_ir as ir

from onnxgen.analysis.feeds import RunShape, make_feeds, nearest_shape
from onnxgen.analysis.regions import find_regions
from onnxgen.analysis.roles import Roles
from onnxgen.contexts.forms import Held
from onnxgen.contexts.regions import outlined
from onnxgen.contexts.values import Region
from onnxgen.errors import RefusedError
from onnxgen.reading import Opened
from onnxgen.verify.paged_again import Array, empty_pools, is_paged, paged_feeds


def chosen_regions(
    opened: Opened, model: ir.Model, held: Held, which: str
) -> tuple[list[Region], list[Region]]:
    """The regions that are to be compiled, and others that are there and stay as they are."""
    there = {region.nodes: region for region in held.table.regions}
    places = find_regions(model, which)
    if not places:
        raise RefusedError(
            f"{opened.path}: --region {which} finds nothing that can be compiled: "
            "texts, sequences and random numbers are not given to backends"
        )
    found = [
        replace(
            outlined(opened.proto, place.name, place.nodes),
            contexts=there[place.nodes].contexts if place.nodes in there else (),
        )
        for place in places
    ]
    asked = {place.nodes for place in places}
    others = [r for r in held.table.regions if r.nodes not in asked and r.contexts]
    taken = {position for region in others for position in region.nodes}
    names = {region.name for region in others}
    for region in found:
        if taken.intersection(region.nodes) or region.name in names:
            by = ", ".join(dict.fromkeys(c.backend for each in others for c in each.contexts))
            raise RefusedError(
                f"{opened.path}: region '{region.name}' overlaps with one that {by} compiled; "
                "`onnxgen context strip` takes that out"
            )
        if not region.outputs:
            raise RefusedError(f"{opened.path}: nothing reads what region '{region.name}' makes")
    return found, others


def shared_values(proto: onnx.ModelProto, regions: Sequence[Region]) -> list[str]:
    """Names of values that may pass between regions and nodes."""
    inside = {position for region in regions for position in region.nodes}
    names = dict.fromkeys(
        name
        for position, node in enumerate(proto.graph.node)
        if position not in inside
        for name in node.output
        if name
    )
    names |= dict.fromkeys(each for r in regions for each in (*r.inputs, *r.outputs))
    return list(names)


def undeclared(
    proto: onnx.ModelProto, types: Mapping[str, str], regions: Sequence[Region]
) -> dict[str, str]:
    """Types that neither the graph nor a region says."""
    said = {each.name for each in (*proto.graph.value_info, *proto.graph.output)}
    said |= {each for region in regions for each in (*region.inputs, *region.outputs)}
    return {name: kind for name, kind in types.items() if name not in said}


def some_feeds(model: ir.Model, roles: Roles) -> Iterator[dict[str, Array]]:
    """What a few runs of different lengths are fed."""
    if is_paged(model):
        pools = empty_pools(model)
        yield from ({**pools, **feeds} for _, feeds in islice(paged_feeds(model), 1, 4))
        return
    lengths = (RunShape(2, 5, 7), RunShape(3, 4, 9), RunShape(1, 6))
    for shape in dict.fromkeys(nearest_shape(roles, each) for each in lengths):
        if shape is not None:
            yield make_feeds(roles, shape, np.random.default_rng(0))
