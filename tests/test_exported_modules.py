"""Torch modules in many styles, by both exporters: fused or declined with a reason, none differs.

pytest -m slow tests/test_exported_modules.py          # needs the extra corpus
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import onnx
import pytest

from onnxgen.pipeline import FuseOptions, fuse
from tests.leftovers import leftovers

torch = pytest.importorskip("torch")
modules = pytest.importorskip("tests.exported_modules")

pytestmark = pytest.mark.slow
EXPORTERS = ("torchscript", "dynamo", "dynamo23")
# What an exporter cannot write: torch's own limits, not ours.
UNEXPORTABLE = {
    ("torchscript", "grouped"): "enable_gqa",
    ("torchscript", "complex-turned"): "aten::polar",
    ("torchscript", "normed"): "aten::rms_norm",
}
# Exports whose sizes are those they were traced with, whatever is asked for.
FIXED = {("torchscript", "multihead")}
# What is declined, and rightly so.
DECLINED = {"static": "its positions may say any place of the cache"}


def exported(name: str, exporter: str) -> onnx.ModelProto:
    """The module as an exporter writes it, with free batch and lengths.

    Raises:
        Exception: whatever torch raises where it cannot.
    """
    case = modules.MODULES[name]()
    inputs = tuple(case.inputs.values())
    names = {"input_names": list(case.inputs), "output_names": list(case.outputs)}
    fixed = (exporter, name) in FIXED
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if exporter == "torchscript":
            buffer = io.BytesIO()
            torch.onnx.export(
                case.module,
                inputs,
                buffer,
                dynamo=False,
                opset_version=17,
                dynamic_axes={} if fixed else case.free | {"y": {0: "b", 1: "s"}},
                **names,
            )
            return onnx.load_from_string(buffer.getvalue())
        free = torch.export.Dim.DYNAMIC
        shapes = tuple(dict.fromkeys(axes, free) for axes in case.free.values())
        # A module that takes `*rest` has one entry for all of it.
        if "attend" in vars(type(case.module)):
            shapes = (shapes[0], shapes[1:]) if shapes[1:] else shapes
        program = torch.onnx.export(
            case.module,
            inputs,
            dynamo=True,
            verbose=False,
            dynamic_shapes=shapes,
            opset_version=23 if exporter == "dynamo23" else 20,
            **names,
        )
        proto: onnx.ModelProto = program.model_proto
        return proto


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", modules.MODULES)
def test_a_module_is_fused_or_declined_and_never_differs(
    name: str, exporter: str, tmp_path: Path
) -> None:
    if (exporter, name) in UNEXPORTABLE:
        with pytest.raises(Exception, match=UNEXPORTABLE[exporter, name]):
            exported(name, exporter)
        return
    path = tmp_path / "model.onnx"
    path.write_bytes(exported(name, exporter).SerializeToString())
    report = fuse(path, FuseOptions(), lambda message: None)
    assert report.proof is not None
    assert report.proof.status == "proven"
    for site in report.sites:
        assert site.status != "undone", site
        assert site.status == "fused" or (site.decline is not None and site.decline.reason)
    fused = onnx.load(report.output)
    pasts = [value.name for value in fused.graph.input if value.name.startswith("past_")]
    left = leftovers(fused, pasts)
    kept = [site.kind for site in report.sites if site.status == "kept"]
    assert left["attention"] == kept.count("attention"), "no rule was asked"
    assert sum("Attention" in node.op_type for node in fused.graph.node) == 1
    if name not in DECLINED:
        assert not kept, report.sites
        assert not left
