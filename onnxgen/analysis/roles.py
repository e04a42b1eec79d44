"""What every input and output of a graph is for, read from the structure around it.

    roles = find_roles(model)
    roles.named("ids")[0].bound          # rows of the embedding table
    roles.pairs[0].past, roles.pairs[0].present, roles.pairs[0].axis

Works on a graph as any exporter left it, on fused ones and on ours. An input is followed
forwards through views and arithmetic to what it is used for: rows of a table, angles, scores,
a place in a cache. An output is followed backwards to the past that it continues. Names are
asked only where two inputs are used alike, or where an input is not used at all.

The values, and the letters that stand for axes, are those of `analysis.role_values`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from onnxgen.analysis.role_axes import (
    axes_of,
    declared_shape,
    lengths_of,
    sizes_of_caches,
    without_repeated,
)
from onnxgen.analysis.role_joins import Join, find_joins
from onnxgen.analysis.role_uses import Evidence, Uses
from onnxgen.analysis.role_values import ROLES, CachePair, InputRole, OutputRole, Roles
from onnxgen.errors import UsageError

__all__ = ["ROLES", "CachePair", "InputRole", "OutputRole", "Roles", "find_roles", "write_roles"]

KEY = "onnxgen.roles"

# Asked last, the first that fits: where structure leaves several readings, or none.
_NAMES = (
    ("type_ids", r"token_?type|segment"),
    ("cache_position", r"cache_position"),
    ("positions", r"pos(ition)?"),
    ("encoder_mask", r"encoder.*mask"),
    ("mask", r"mask"),
    ("ids", r"(^|[._])ids$|input_ids|tokens?$"),
)


def find_roles(model: ir.Model, overrides: Mapping[str, str] | None = None) -> Roles:
    """What every input and output of the model is for. The model is not changed.

    Args:
        overrides: roles given by the user, by input name; they win. Next come those that a file
            we wrote says of itself.

    Raises:
        UsageError: an override names no input, or no role.
    """
    overrides = {**_written(model), **(overrides or {})}
    if model.functions:
        model = model.clone()
        InlinePass()(model)
    graph = model.graph
    inputs = [value for value in graph.inputs if value.name not in graph.initializers]
    _check(overrides, [str(value.name) for value in inputs])

    ranks = {str(value.name): len(declared_shape(value) or ()) for value in inputs}
    joins = [
        join for join in find_joins(graph) if not join.grows or join.axis < ranks.get(join.past, 0)
    ]
    uses = Uses(graph, [join.writer for join in joins if join.writer is not None])
    found = {str(value.name): uses.of(value) for value in inputs}
    roles = _structural(inputs, found, joins)
    _separate_tables(roles, found)
    _separate_masks(roles, found, uses)
    _separate_vectors(roles, inputs)
    _ask_names(roles, found)
    roles.update(overrides)

    fitting = [join for join in joins if join.axis < ranks.get(join.past, 0)]
    grown = {j.past: j for j in fitting if roles.get(j.past) in ("past", "static_past")}
    named: dict[str, InputRole] = {}
    fixed_sizes = sizes_of_caches(graph, grown)
    for value in inputs:
        name = str(value.name)
        shape = fixed_sizes.get(name) or declared_shape(value) or ()
        dtype = value.dtype or ir.DataType.UNDEFINED
        axes = axes_of(roles[name], shape, grown.get(name))
        added = bool(found[name].scores) and dtype.is_floating_point() and len(shape) > 2
        bound = max((t.rows for t in found[name].tables), default=0)
        named[name] = InputRole(name, roles[name], dtype, shape, axes, bound, added)

    capped = {name for name, join in grown.items() if join.cap is not None}
    named = without_repeated(named)
    fixed, symbols = lengths_of(named.values(), capped)
    pairs = tuple(_pair(grown[name], named[name]) for name in named if name in grown)
    copies = {join.present for join in joins if not join.grows}
    outputs = {}
    for value in graph.outputs:
        output = _output(value, pairs, copies, symbols, named)
        outputs[output.name] = output
    return Roles(named, outputs, pairs, fixed, symbols)


def write_roles(model: ir.Model, roles: Roles) -> None:
    """Leave in a model's metadata what its inputs are for: fused, some show it no more."""
    model.metadata_props[KEY] = json.dumps({each.name: each.role for each in roles.inputs.values()})


def _written(model: ir.Model) -> dict[str, str]:
    """The roles that `write_roles` left, of inputs that are still there."""
    try:
        found = json.loads(model.metadata_props[KEY])
        names = {str(value.name) for value in model.graph.inputs}
        return {n: r for n, r in found.items() if n in names and r in ROLES and r != "unknown"}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _check(overrides: Mapping[str, str], names: Sequence[str]) -> None:
    for name, role in overrides.items():
        if name not in names:
            raise UsageError(f"--role {name}={role}: no such input; inputs: {', '.join(names)}")
        if role not in ROLES:
            raise UsageError(f"--role {name}={role}: no such role; roles: {', '.join(ROLES)}")


def _structural(
    inputs: Sequence[ir.Value], found: Mapping[str, Evidence], joins: Sequence[Join]
) -> dict[str, str]:
    """The role of each input as far as its own uses tell."""
    grown = {join.past: join for join in joins if join.grows}
    copied = {join.past for join in joins if not join.grows}
    roles: dict[str, str] = {}
    for value in inputs:
        name, uses = str(value.name), found[str(value.name)]
        if name in grown:
            roles[name] = "static_past" if grown[name].static else "past"
        elif value.dtype is not None and value.dtype.is_floating_point():
            roles[name] = _float_role(value, uses)
        else:
            roles[name] = _integer_role(value, uses)
        if roles[name] == "unknown" and name in copied:
            roles[name] = "constant_like"
    main = {"ids", "embeds"} & set(roles.values())
    for name, role in roles.items():
        # Alone, projected states are an encoder's features; beside a main path, they are read.
        if role == "encoder_states" and not main:
            roles[name] = "features"
    return roles


def _integer_role(value: ir.Value, uses: Evidence) -> str:
    rank = None if value.shape is None else len(value.shape)
    if uses.branch:
        return "use_cache_branch"
    if any(table.direct for table in uses.tables):
        return "ids"  # or type_ids, or positions: separated below
    if uses.writes and rank is not None and rank < 2:
        return "cache_length" if rank == 0 or uses.apart else "cache_position"
    if uses.angles == "direct":
        return "cache_length" if rank == 0 else "positions"
    if uses.scores or uses.lengths or uses.tables or uses.angles:
        return "mask" if rank != 0 else "unknown"
    return "unknown"


def _float_role(value: ir.Value, uses: Evidence) -> str:
    rank = len(value.shape) if value.shape is not None else 0
    if uses.convolved:
        return "pixels" if rank >= 4 else "features"
    if uses.scores and not uses.normed:
        return "mask"
    if uses.attended and rank >= 3:
        return "cross_past"
    if uses.normed or (uses.added and rank == 3):
        return "embeds"
    if uses.projected:
        return "encoder_states" if rank == 3 else "features"
    return "unknown"


def _separate_tables(roles: dict[str, str], found: Mapping[str, Evidence]) -> None:
    """Tell ids, type_ids and positions apart: each indexes a table whose rows are added."""
    rivals = [name for name, role in roles.items() if role == "ids"]
    rows = {name: max(t.rows for t in found[name].tables if t.direct) for name in rivals}
    hints = {name: _hint(name) for name in rivals}
    if len(rivals) == 1 and "embeds" not in roles.values():
        return
    for name in rivals:
        if hints[name] in ("type_ids", "positions", "ids"):
            roles[name] = str(hints[name])
    open_ = [name for name in rivals if hints[name] not in ("type_ids", "positions", "ids")]
    if not open_:
        return
    # Without names: the largest table is the vocabulary, a table of a few rows the types.
    largest = max(open_, key=lambda name: rows[name])
    for name in open_:
        taken = name != largest or any(roles[n] == "ids" for n in rivals if n not in open_)
        if taken:
            roles[name] = "type_ids" if rows[name] <= 16 else "positions"


def _separate_masks(roles: dict[str, str], found: Mapping[str, Evidence], uses: Uses) -> None:
    """Tell the mask of cross-attention from the mask of self-attention.

    The first self-attention knows nothing of the encoder; every cross-attention does.
    """
    encoder = [n for n, role in roles.items() if role in ("encoder_states", "cross_past")]
    masks = [name for name, role in roles.items() if role == "mask"]
    if not encoder or not masks:
        return
    reached = uses.reach(encoder)
    for name in masks:
        scores = found[name].scores
        if scores and all(out in reached for node in scores for out in node.outputs):
            roles[name] = "encoder_mask"


def _ask_names(roles: dict[str, str], found: Mapping[str, Evidence]) -> None:
    for name, role in roles.items():
        if role == "unknown":
            hint = _hint(name)
            if hint is not None:
                roles[name] = hint
            elif not found[name].any_use and not found[name].measured:
                roles[name] = "constant_like"


def _separate_vectors(roles: dict[str, str], inputs: Sequence[ir.Value]) -> None:
    """Tell apart what has one number, or one for each sequence, from what has one for each token."""
    main = [declared_shape(v) or () for v in inputs if roles[str(v.name)] in ("ids", "embeds")]
    if not main or len(main[0]) < 2:
        return
    batch, new = main[0][:2]
    # One number for each sequence, or for each new token over a past: of what, no use tells.
    untold = [(batch,), (batch, new)] if "past" in roles.values() else [(batch,)]
    for value in inputs:
        name, shape = str(value.name), declared_shape(value) or ()
        if shape == (1,) and new != 1 and roles[name] in ("positions", "cache_position"):
            roles[name] = "cache_length"  # where the first of the new tokens stands
        elif roles[name] == "mask" and isinstance(batch, str) and shape in untold:
            roles[name] = "unknown"


def _hint(name: str) -> str | None:
    return next((role for role, words in _NAMES if re.search(words, name.lower())), None)


def _pair(join: Join, past: InputRole) -> CachePair:
    sizes = {
        letter: dim
        for letter, dim in zip(past.axes, past.shape, strict=True)
        if isinstance(dim, int)
    }
    return CachePair(
        join.past,
        join.present,
        join.axis,
        join.static,
        join.cap,
        sizes.get("K", 0),
        sizes.get("D", 0),
        join.counted,
        join.window,
    )


def _output(
    value: ir.Value,
    pairs: Sequence[CachePair],
    copies: set[str],
    symbols: Mapping[str, str],
    inputs: Mapping[str, InputRole],
) -> OutputRole:
    name, shape = str(value.name), declared_shape(value)
    blank = OutputRole(name, "other", value.dtype, shape, ("",) * len(shape or ()))
    pair = next((pair for pair in pairs if pair.present == name), None)
    if pair is not None:
        axes = tuple("T" if letter == "P" else letter for letter in inputs[pair.past].axes)
        return replace(blank, role="present", axes=axes)
    if name in copies:
        return replace(blank, role="copy")
    if shape is None:
        return blank
    axes = tuple(symbols.get(dim, "") if isinstance(dim, str) else "" for dim in shape)
    tokens = any(each.role in ("ids", "embeds") for each in inputs.values())
    if "S" in axes:
        return replace(blank, role="rows", axes=axes)
    # TorchScript names a symbol of its own for each output, and a length may be fixed.
    if tokens and len(shape) == 3:
        return replace(blank, role="rows", axes=("B", "S", ""))
    return replace(blank, axes=axes)
