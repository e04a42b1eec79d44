"""Outcomes for the tests of reports: real ones of every command, and one whose names are hostile."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from onnxgen.errors import OnnxgenError
from onnxgen.pipeline import FuseOptions, fuse, verify
from onnxgen.pipeline_paged import PageOptions, to_paged
from onnxgen.report.pictures import Drawing, MaskPicture, Picture, PictureNode
from onnxgen.report.values import (
    Case,
    Decline,
    Faint,
    Obstacle,
    Origin,
    Outcome,
    Paging,
    Proof,
    Report,
    Site,
)
from onnxgen.testing import load_corpus_model

HOSTILE = (
    "<script>alert(1)</script> & \"'>]]>--> | `x` [a](http://evil.example/) @all \n# h\r\t"
    "\x00\x01\x1b[31m\x7f\x85\u2028\u202e\ufffe\udc80 <img src=http://evil.example/x onerror=1>"
)


def grown(name: str, folder: Path) -> Path:
    """A model of the corpus as a file."""
    path = folder / f"{name.replace('/', '-')}.onnx"
    path.write_bytes(load_corpus_model(name).SerializeToString())
    return path


def fused(path: Path, **options: Any) -> Outcome:
    """How `onnxgen fuse` ends."""
    options = {"output": path.with_name("out.onnx"), "budget": "quick", **options}
    try:
        return Outcome("fuse", report=fuse(path, FuseOptions(**options), print))
    except OnnxgenError as error:
        return Outcome("fuse", error.exit_code, str(error), error.report)


def paged(path: Path) -> Outcome:
    """How `onnxgen to-paged` ends."""
    options = PageOptions(path.with_name("paged"), budget="quick")
    try:
        return Outcome("to-paged", report=to_paged(path, options, print))
    except OnnxgenError as error:
        return Outcome("to-paged", error.exit_code, str(error), error.report)


def compared(original: Path, rewritten: Path) -> Outcome:
    """How `onnxgen verify` ends."""
    try:
        proof = verify(original, rewritten, roles={}, budget="quick", progress=print)
    except OnnxgenError as error:
        return Outcome(
            "verify", error.exit_code, str(error), None, str(original), str(rewritten), None
        )
    code = {"proven": 0, "differs": 1}.get(proof.status, 3)
    return Outcome("verify", code, proof.reason or None, None, str(original), str(rewritten), proof)


def layered(layers: int, name: str = "model") -> Report:
    """A report of a model of so many layers, one in ten of whose attentions is kept."""
    sites = []
    for layer in range(layers):
        for kind, part in (("rms_norm", "norm"), ("rotary", "attn"), ("attention", "attn")):
            scope = f"{name}.layers.{layer}.{part}"
            bad = kind == "attention" and layer % 10 == 9
            why = Decline("ATT001", "mask-late", f"{scope} reads late", (scope,)) if bad else None
            status = "kept" if bad else "fused"
            sites.append(Site(kind, "ATT001", f"{scope}/{kind}", scope, status, why, 20))
    cases = [Case(f"case {at}", 2, 3, at, "left", 1e-6 * at, "logits") for at in range(60)]
    return Report(
        f"{name}.onnx",
        f"{name}.fused.onnx",
        "onnx",
        opset_before=18,
        opset_after=24,
        nodes_before=layers * 120,
        nodes_after=layers * 25,
        ops_before={"MatMul": layers * 9, "Mul": layers * 30},
        ops_after={"MatMul": layers * 7, "Attention": layers},
        sites=sites,
        proof=Proof("proven", 1e-4, cases),
        seconds={"read": 0.4, "verify": 71.0},
    )


def hostile() -> Outcome:
    """Whatever a model may name, named as badly as can be."""
    bad = HOSTILE
    site = Site(bad, bad, bad, bad, "fused", replaced=3, details={bad: bad})
    decline = Decline(bad, bad, bad, (bad,), expected=bad, found=bad, change=bad)
    kept = [
        dataclasses.replace(site, status=status, decline=decline) for status in ("kept", "undone")
    ]
    cases = [
        Case(bad, 1, 2, 3, bad, float("inf"), bad),
        Case(bad, 1, 2, 3, bad, 0.0, bad),
        Case(bad, 1, 2, 3, bad, skipped=bad),
        Case(bad, 1, 2, 3, bad, outside=bad),
    ]
    origin = Origin(bad, bad, bad, bad, bad, 1.0, 1, 2)
    proof = Proof(
        "differs", 1e-4, cases, reason=bad, note=bad, twins=(bad,), faint=[Faint(bad, 0.1)]
    )
    proof.origin, proof.not_run = origin, [bad]
    drawing = Drawing([PictureNode(bad, ""), PictureNode(bad, bad, (0,), bad)], 1, 2)
    report = Report(
        bad,
        bad,
        bad,
        nodes_after=1,
        ops_before={bad: 1},
        ops_after={bad: 2},
        sites=[site, *kept],
        lowered=[site, *kept],
        contract=bad,
        paging=Paging(16, bad, bad, 2, [bad], bad, 7, [bad], [bad], [Obstacle(bad, bad, bad)]),
        beside=[bad],
        proof=proof,
        warnings=[bad],
        picture=Picture(bad, drawing, drawing),
        masks=[MaskPicture(bad, (bad,), bad, (0, 1), (0, 1), ("10", "11"), bad)],
        seconds={bad: 1.0},
    )
    return Outcome("fuse", 1, bad, report)
