"""ROT002: a RotaryEmbedding whose tables have one row, made to run for a batch."""

from __future__ import annotations

import numpy as np
import pytest

from onnxgen import pipeline
from onnxgen.testing import corpus
from tests.graphs import assert_kept, assert_untouched, raised, run

SIGNATURE = "(float[b,s,120] h) => (float[b,6,s,20] y) <float[120] weight>"
HEADS = "g = RMSNormalization(h, weight)  r4 = Reshape(g, [0, 0, 6, 20])  x = Transpose<perm = [0, 2, 1, 3]>(r4)  "
COUNTED = (
    f"{HEADS}n = Shape<start = 2, end = 3>(x)  m = Squeeze(n)  r = Range(0, m, 1)  f = Cast<to = 1>(r)"
    "  u = Unsqueeze(f, [0, 2])"
    "  a = Mul(u, [1.0, 0.63, 0.4, 0.25, 0.158, 0.1, 0.063, 0.04, 0.025, 0.0158])"
    "  c = Cos(a)  s = Sin(a)"
)


def rows_alone(before: object, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """What a model gives for each row of a batch alone, put together."""
    count = len(next(iter(feeds.values())))
    rows = [
        next(iter(run(before, {k: v[i : i + 1] for k, v in feeds.items()}).values()))
        for i in range(count)
    ]
    return np.concatenate(rows)


def test_tables_of_one_row() -> None:
    result = assert_raised_one(f"{SIGNATURE} {{ {COUNTED}  y = RotaryEmbedding(x, c, s) }}")
    assert result.sites[0].details == {"repaired": "tables of batch 1 are expanded"}
    x = np.random.default_rng(0).standard_normal((3, 5, 120)).astype(np.float32)
    with pytest.raises(Exception, match="RotaryEmbedding"):
        run(result.before, {"h": x})
    assert np.array_equal(run(result.after, {"h": x})["y"], rows_alone(result.before, {"h": x}))


def test_positions_of_one_row() -> None:
    text = (
        "(float[b,s,120] h, int64[1,s] position_ids) => (float[b,6,s,20] y)"
        " <float[120] weight, float[64,10] c, float[64,10] n>"
        f"{{ {HEADS} y = RotaryEmbedding(x, c, n, position_ids) }}"
    )
    result = assert_raised_one(text)
    x = np.random.default_rng(0).standard_normal((3, 5, 120)).astype(np.float32)
    positions = np.arange(2, 7)[None]
    found = run(result.after, {"h": x, "position_ids": positions})["y"]
    wanted = [
        run(result.before, {"h": x[i : i + 1], "position_ids": positions})["y"] for i in range(3)
    ]
    assert np.array_equal(found, np.concatenate(wanted))


def assert_raised_one(text: str):
    """Only sequences of batch 1 are compared by `raised`: the original takes no other."""
    result = raised(text, opset=23, lengths=({"b": 1, "s": 5}, {"b": 1, "s": 3}))
    assert [(site.rule, site.status) for site in result.sites] == [("ROT002", "fused")]
    return result


def test_tables_of_every_row_are_left() -> None:
    assert_untouched(
        "(float[b,6,s,20] x, float[b,s,10] c, float[b,s,10] n) => (float[b,6,s,20] y)"
        "{ y = RotaryEmbedding(x, c, n) }",
        opset=23,
    )


def test_one_sequence_is_left() -> None:
    text = f"{SIGNATURE} {{ {COUNTED}  y = RotaryEmbedding(x, c, s) }}"
    assert_untouched(text.replace("float[b,s,120] h", "float[1,s,120] h"), opset=23)


def test_modernbert_runs_for_a_batch(tmp_path) -> None:
    """As dynamo writes it at opset 23: rejected for a batch of two, right for each row after."""
    import onnx

    (entry,) = corpus("modernbert/dynamo23")
    path, output = tmp_path / "m.onnx", tmp_path / "fused.onnx"
    before = entry.load()
    path.write_bytes(before.SerializeToString())
    report = pipeline.fuse(path, pipeline.FuseOptions(output=output), lambda text: None)
    assert [site.rule for site in report.sites] == ["ROT002"] * 4
    ids = np.random.default_rng(0).integers(5, 100, (2, 9))
    mask = np.ones((2, 9), np.int64)
    mask[1, 6:] = 0
    feeds = {"input_ids": ids, "attention_mask": mask}
    with pytest.raises(Exception, match="RotaryEmbedding"):
        run(before, feeds)
    (found,) = run(onnx.load(output), feeds).values()
    wanted = rows_alone(before, feeds)
    seen = mask.astype(bool)
    assert np.abs(found[seen] - wanted[seen]).max() < 1e-5


def test_a_batch_that_cannot_be_computed() -> None:
    assert_kept(
        "(float[b,6,s,20] z, int64[1] rows, float[1,s,10] c, float[1,s,10] n)"
        " => (float[u,6,s,20] y)"
        "{ k = Add(rows, 1)  x = Slice(z, [0], k, [0])  y = RotaryEmbedding(x, c, n) }",
        "ROT002",
        "batch-unknown",
        opset=23,
        lengths=({"b": 1, "s": 5},),
    )
