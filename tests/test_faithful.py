"""Models that are fed what no proof feeds: the result answers as the original does, or fails."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxgen import pipeline
from onnxgen.report.values import Report
from onnxgen.runtime import RuntimeFailure
from tests.graphs import parse, runtime

LENGTHS = (
    "sh = Shape(pk)  np = Gather(sh, 2)  si = Shape(ids)  ns = Gather(si, 1)  tt = Add(np, ns)"
    "  rk = Range(0, tt, 1)  r0 = Range(0, ns, 1)  rq = Add(r0, np)  ru = Unsqueeze(rq, [1])"
    "  ca = LessOrEqual(rk, ru)  "
)
PADDED = "mb = Cast<to = 9>(mask)  mu = Unsqueeze(mb, [1, 2])  keep = And(ca, mu)  "
LOWEST = "m = Where(keep, 0.0, -3.4028235e38)  s2 = Add(s1, m)"


def decoder(
    masked: str, inputs: str = "int64[b,t] mask, ", keys: str = "pk, kr"
) -> onnx.ModelProto:
    """One attention with a cache and no rotary embedding; `masked` leads from s1 to s2."""
    return parse(
        f"(int64[b,s] ids, {inputs}float[b,2,p,8] pk, float[b,2,p,8] pv)"
        " => (float[b,s,24] y, float[b,2,t,8] k, float[b,2,t,8] v)"
        " <float[50,24] table, float[24,16] wq, float[24,16] wk, float[24,16] wv, float[16,24] wo>"
        " { x = Gather(table, ids)  q0 = MatMul(x, wq)  k0 = MatMul(x, wk)  v0 = MatMul(x, wv)"
        " q4 = Reshape(q0, [0, 0, 2, 8])  k4 = Reshape(k0, [0, 0, 2, 8])"
        " v4 = Reshape(v0, [0, 0, 2, 8])  qr = Transpose<perm = [0, 2, 1, 3]>(q4)"
        " kr = Transpose<perm = [0, 2, 1, 3]>(k4)  vr = Transpose<perm = [0, 2, 1, 3]>(v4)"
        f" k = Concat<axis = 2>({keys})  v = Concat<axis = 2>({keys.replace('k', 'v')})"
        f" kt = Transpose<perm = [0, 1, 3, 2]>(k)  s0 = MatMul(qr, kt)  s1 = Mul(s0, 0.35355338)"
        f" {LENGTHS} {masked}  pr = Softmax<axis = -1>(s2)  at = MatMul(pr, v)"
        " ah = Transpose<perm = [0, 2, 1, 3]>(at)  ao = Reshape(ah, [0, 0, 16])"
        " y = MatMul(ao, wo) }"
    )


def feeds(batch: int, new: int, past: int, **more: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    made: dict[str, Any] = {"ids": rng.integers(0, 50, (batch, new))}
    for name in ("pk", "pv"):
        made[name] = rng.standard_normal((batch, 2, past, 8)).astype(np.float32)
    return made | {name: np.array(value) for name, value in more.items()}


def both(
    folder: Path, model: onnx.ModelProto, fed: Mapping[str, Any], **options: Any
) -> tuple[Any, Any, Report]:
    """`y` of the original and of the result, None where that fails."""
    path, output = folder / "model.onnx", folder / "result.onnx"
    path.write_bytes(model.SerializeToString())
    report = pipeline.fuse(path, pipeline.FuseOptions(output=output, **options), lambda _: None)
    sessions = [runtime().load(path, optimize=False), runtime().load(output)]
    try:
        old = runtime().run(sessions[0], fed)["y"]
        return old, runtime().run(sessions[1], fed)["y"], report
    except RuntimeFailure as failure:
        if "contract: " not in str(failure):
            raise
        return old, None, report
    finally:
        for session in sessions:
            runtime().unload(session)


def assert_faithful(old: Any, new: Any) -> None:
    assert new is None or np.abs(old - new).max() <= 1e-4 * old.std()


ONES = np.ones((1, 7), np.int64)
POSITIONS = "pu = Unsqueeze(position_ids, [1, 3])  keep = LessOrEqual(rk, pu)  "
STARTED = "ps = Add(r0, start)  pu = Unsqueeze(ps, [1])  keep = LessOrEqual(rk, pu)  "
UNUSUAL = {
    "positions with a gap": (
        POSITIONS + LOWEST,
        "int64[b,s] position_ids, ",
        {"position_ids": [[2, 3, 6]]},
    ),
    "a start before the past": (STARTED + LOWEST, "int64[1] start, ", {"start": [2]}),
    "a mask of more than zeros and ones": (
        PADDED.replace("Cast<to = 9>(mask)", "Equal(mask, 1)") + LOWEST,
        "int64[b,t] mask, ",
        {"mask": [[1, 2, 1, 1, 1, 1, 1]]},
    ),
    "a prefix": (
        "pf = Less(rk, prefix)  co = Or(ca, pf)  " + PADDED.replace("And(ca", "And(co") + LOWEST,
        "int64[b,t] mask, int64 prefix, ",
        {"mask": ONES, "prefix": 6},
    ),
    "scores beyond a faint mask": (
        PADDED + "m = Where(keep, 0.0, -10000.0)  s2 = Add(s1, m)",
        "int64[b,t] mask, ",
        {"mask": [[0, 0, 1, 1, 1, 1, 1]], "pk": 1e5},
    ),
}


@pytest.mark.parametrize("padding", ["any", "right", "none"])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_inputs_of_a_lowered_model(name: str, padding: str, tmp_path: Path) -> None:
    masked, inputs, more = UNUSUAL[name]
    fed = feeds(1, 3, 4, **{key: value for key, value in more.items() if key != "pk"})
    fed["pk"] = (fed["pk"] * more.get("pk", 1.0)).astype(np.float32)
    options = {"target": "ort", "padding": padding}
    old, new, report = both(tmp_path, decoder(masked, inputs), fed, **options)
    assert any(site.status == "fused" for site in report.lowered)
    assert_faithful(old, new)


FAR = {"mask": [[0, 0, 1, 1, 1, 1, 1]]}
REPLACED = "s2 = Where(keep, s1, -10000.0)"
MULTIPLIED = (
    "kf = Cast<to = 1>(keep)  sk = Mul(s1, kf)  om = Sub(1.0, kf)  lo = Mul(om, 10000.0)"
    "  s2 = Sub(sk, lo)"
)


@pytest.mark.parametrize("masked", [REPLACED, MULTIPLIED])
def test_a_number_that_replaces_scores_hides_the_largest(masked: str, tmp_path: Path) -> None:
    fed = feeds(1, 3, 4, **FAR)
    fed["pk"][:, :, :2] *= 1e5  # those that are hidden
    old, new, report = both(tmp_path, decoder(PADDED + masked), fed)
    assert [site.status for site in report.sites] == ["fused"]
    assert_faithful(old, new)


@pytest.mark.parametrize("masked", [REPLACED, MULTIPLIED, "s2 = Where(keep, s1, -3.4028235e38)"])
def test_rows_whose_scores_are_all_replaced_are_uniform(masked: str, tmp_path: Path) -> None:
    """Also where two conditions hide the same keys."""
    twice = "s8 = Where(ca, s1, -10000.0)  " + masked.replace("s1", "s8")
    for index, text in enumerate((masked, twice)):
        folder = tmp_path / str(index)
        folder.mkdir()
        fed = feeds(1, 1, 6, mask=np.zeros((1, 7), np.int64))
        old, new, report = both(folder, decoder(PADDED + text), fed)
        assert [site.status for site in report.sites] == ["fused"]
        assert new is not None
        assert_faithful(old, new)


HIDDEN = PADDED.replace("Cast<to = 9>(mask)", "Equal(mask, 0)") + LOWEST


@pytest.mark.parametrize(("masked", "keys"), [(PADDED + LOWEST, "kr, pk"), (HIDDEN, "pk, kr")])
def test_what_only_the_whole_model_showed_is_undone(masked: str, keys: str, tmp_path: Path) -> None:
    """A past that is empty where an operator takes none; rows of real tokens that see nothing."""
    old, new, report = both(tmp_path, decoder(masked, keys=keys), feeds(1, 3, 4, mask=ONES))
    assert [site.status for site in report.sites if site.kind == "attention"] == ["undone"]
    caches = [site for site in report.sites if site.kind == "cache"]
    assert {site.decline.code for site in caches if site.decline} == {"cache-outside"}
    assert_faithful(old, new)


def test_a_cache_that_nobody_reads_joined_stays_outside(tmp_path: Path) -> None:
    """The presents hold the keys doubled: what attends gives no present of its own."""
    model = decoder(PADDED + LOWEST)
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name in ("k", "v"):
                node.output[index] = f"all_{name}"
        for index, name in enumerate(node.input):
            if name in ("k", "v"):
                node.input[index] = f"all_{name}"
    for name in ("k", "v"):
        double = onnx.helper.make_node("Add", [f"{name}r", f"{name}r"], [f"{name}d"])
        joined = onnx.helper.make_node("Concat", [f"p{name}", f"{name}d"], [name], axis=2)
        model.graph.node.extend([double, joined])
    old, new, report = both(tmp_path, model, feeds(1, 3, 4, mask=ONES))
    (site,) = (site for site in report.sites if site.kind == "attention")
    assert (site.status, site.details["cache"]) == ("fused", "outside")
    assert [site.kind for site in report.sites if site.status == "kept"] == ["cache"] * 2
    assert_faithful(old, new)
