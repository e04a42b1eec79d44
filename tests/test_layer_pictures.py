"""Pictures: the layer that is drawn, what went into what, and what masks show."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxgen.report.layers import layers_of
from onnxgen.report.values import Site
from tests.reports import fused, grown


def site(kind: str, scope: str) -> Site:
    return Site(kind, "ATT001", scope, scope, "fused")


def test_a_layer_is_the_counted_module_with_most_kinds() -> None:
    scopes = ("m.layers.1.attn", "m.layers.1.norm", "m.layers.1.experts.7.act", "m.norm")
    sites = [site(kind, scope) for kind, scope in zip("abcb", scopes, strict=True)]
    assert layers_of(sites) == ["m.layers.1"] * 3 + [""]


def test_without_paths_attentions_count_the_layers() -> None:
    sites = [site(kind, "") for kind in ("norm", "attention", "norm", "attention", "norm")]
    assert layers_of(sites) == ["part 1", "part 1", "part 2", "part 2", ""]
    assert layers_of(sites[:2]) == ["", ""]


@pytest.mark.parametrize("name", ["llama/torchscript", "mixtral/dynamo20-looped"])
def test_one_layer_is_drawn_and_sites_name_what_went_in(name: str, tmp_path: Path) -> None:
    report = fused(grown(name, tmp_path), verify=False).report
    picture = report.picture
    made = {node.site for node in picture.after.nodes if node.site}
    assert made == {s.node for s in report.sites if s.scope.startswith(f"{picture.layer}.")}
    assert made == {node.site for node in picture.before.nodes if node.site}
    assert not any(node.gone for node in picture.after.nodes)
    for drawing in (picture.before, picture.after):
        for at, node in enumerate(drawing.nodes):
            assert all(source < at for source in node.reads)


def test_masks_show_what_their_families_say(tmp_path: Path) -> None:
    masks = fused(grown("mistral/dynamo20", tmp_path), verify=False).report.masks
    window = next(mask for mask in masks if mask.family.startswith("window"))
    size = int(window.family.split(",")[0].split()[1])
    for query, row in zip(window.queries, window.rows, strict=True):
        seen = {key for key, cell in zip(window.keys, row, strict=True) if cell == "1"}
        assert seen == {key for key in window.keys if query - size < key <= query}
