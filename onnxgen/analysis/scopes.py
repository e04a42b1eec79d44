"""Where in the exported module a node was: `model.layers.3.self_attn`, as its exporter left it."""

from __future__ import annotations

import ast
from collections.abc import Iterable

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata of a node: dynamo's list of modules; of nodes that we made, the path alone."""


def scope_of(nodes: Iterable[ir.Node]) -> str:
    """The module path that these nodes have in common, those without one left out; "" for none."""
    paths = [path.split(".") for node in nodes if (path := path_of(node)) is not None]
    common: list[str] = []
    for modules in zip(*paths, strict=False):
        if len(set(modules)) > 1:
            break
        common.append(modules[0])
    return ".".join(common)


def path_of(node: ir.Node) -> str | None:
    """The module a node was in: metadata (dynamo's list of modules, or ours) or its name."""
    scopes = node.metadata_props.get(SCOPES)
    if scopes is not None:
        try:
            found = ast.literal_eval(scopes)
        except (ValueError, SyntaxError):
            return scopes
        return (str(found[-2]) if len(found) > 1 else "") if isinstance(found, list) else scopes
    if node.name and "/" in node.name.strip("/"):
        return ".".join(node.name.strip("/").split("/")[:-1])
    return None
