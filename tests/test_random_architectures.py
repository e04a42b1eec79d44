"""Attention models that no exporter wrote: each is fused or declined with a reason, none differs.

    pytest tests/test_random_architectures.py                       # as in CI
    ONNXGEN_EXAMPLES=50000 ONNXGEN_SEED=1 pytest tests/test_random_architectures.py -n 2

A model is drawn from what decoders and encoders differ in, and in what exporters spell differently:
see `tests.random_spec`.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxgen import pipeline
from onnxgen.pipeline import FuseOptions, fuse
from onnxgen.report.values import Report, Site
from tests.leftovers import leftovers
from tests.random_models import build
from tests.random_runs import Shared, check_drawn
from tests.random_spec import CHOICES, WINDOW, Spec, fitted, not_claimed

SHARDS = 8  # each a test of its own, so that they can run side by side
EXAMPLES = 2000


@pytest.fixture(autouse=True)
def one_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "Runtime", Shared)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_what_is_drawn_is_fused_or_declined_and_never_differs(shard: int) -> None:
    check_drawn(check, shard, SHARDS, EXAMPLES)


def alone() -> Iterator[Spec]:
    """Every choice on its own, and where it depends on another with that."""
    for name, values in CHOICES.items():
        for value in dict.fromkeys(values):
            given = {"groups": 3, "rotary": "halves", "mask": "causal", name: value}
            yield fitted(Spec(**given))


# Found by longer runs.
FOUND = [
    Spec(dtype="bfloat16", mask="relative", padding=True, masking="add-1e4"),
    Spec(layout="merged", mask="relative", cache="BKPD", second="shared"),
    Spec(groups=3, layout="merged", key="early", softmax="float", mask="relative", declared=False),
]


@pytest.mark.parametrize("spec", dict.fromkeys([*alone(), *FOUND]), ids=repr)
def test_each_choice_alone(spec: Spec) -> None:
    check(spec)


def check(spec: Spec) -> None:
    """Fuse the model of a spec; nothing differs, nothing is undone, what is claimed is fused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(build(spec).SerializeToString())
        report = fuse(path, FuseOptions(), lambda message: None)
        left = leftovers(onnx.load(report.output))
    assert report.proof is not None
    assert ("bfloat16" in report.proof.twins) == (spec.dtype == "bfloat16")
    assert report.proof.status == "proven"
    for site in report.sites:
        assert site.status != "undone", site  # a rule made something wrong, or not checkable
        assert site.status == "fused" or (site.decline is not None and site.decline.reason)
    attention = [site for site in report.sites if site.kind == "attention"]
    assert len(attention) == 1 + (spec.second != "none"), "one Softmax, one answer"
    why_not = not_claimed(spec)
    assert why_not or {site.status for site in attention} == {"fused"}, attention
    for number, site in enumerate(attention):
        if site.status == "fused":
            assert_told(spec, site, first=number == 0)
    fused = sum(site.status == "fused" for site in attention)
    assert report.ops_after.get("Attention", 0) == fused
    assert report.ops_after.get("Softmax", 0) == len(attention) - fused
    assert left == +Counter(attention=len(attention) - fused), "no rule was asked"
    assert_parts(spec, report)


def assert_told(spec: Spec, site: Site, first: bool) -> None:
    """The report says what the spec says."""
    told = site.details
    kv_heads = spec.heads if spec.turns else spec.kv_heads  # they stay repeated
    sizes = (spec.heads, kv_heads, spec.size)
    assert (told["heads"], told["kv_heads"], told["head_size"]) == sizes
    wanted = 1.0 if spec.scale == "none" else 1 / math.sqrt(spec.size)
    rounding = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 1e-2}[spec.dtype]
    assert np.isclose(float(told["scale"]), wanted, rtol=rounding)
    if spec.cache == "none" or (not first and spec.second != "shared"):
        assert told["cache"] == "none"
    elif spec.turns:
        assert told["cache"] == "outside"
    else:
        assert told["cache"] == ("concatenated" if first else "shared")
    # -1e4 beside slopes is not far enough for every length to tell what is hidden.
    blurred = spec.mask == "alibi" and spec.masking == "add-1e4"
    if (first or spec.second == "shared") and not blurred:
        assert told["mask"] == family(spec)


def family(spec: Spec) -> str:
    """The name of a spec's mask in the report."""
    if spec.mask in ("relative", "fed"):  # what is fed for each row may be anything
        return "general"
    kind = {"none": "full", "causal": "causal", "alibi": "causal"}
    name = kind.get(spec.mask, f"{spec.mask} {WINDOW}")
    name = f"{name}, key padding" if spec.padding else name
    return f"{name}, alibi" if spec.mask == "alibi" else name


def assert_parts(spec: Spec, report: Report) -> None:
    """Norms and rotations are the operators, whatever became of the attention."""
    layers = 1 + (spec.second != "none")
    turned = 0 if spec.rotary == "none" else 2 + (spec.second == "shared")
    heads = (2 + (spec.second == "shared")) * spec.head_norm
    norms = {"RMSNormalization": heads, "LayerNormalization": 0, "RotaryEmbedding": turned}
    if spec.norm != "none":
        kind = "RMSNormalization" if spec.norm.startswith("rms") else "LayerNormalization"
        norms[kind] += layers
    assert {op: report.ops_after.get(op, 0) for op in norms} == norms
