"""Positions and lengths are told by what they say, however they are spelled."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from onnxgen.analysis.positions import Lengths, Meaning
from onnxgen.analysis.roles import find_roles
from onnxgen.analysis.sampling import Sampler
from tests.graphs import parse, runtime

COUNT = "n = Shape<start = 1, end = 2>(ids)  p = Shape<start = 2, end = 3>(past)  t = Add(n, p)"
RANGE = f"{COUNT}  ps = Squeeze(p)  ts = Squeeze(t)  at = Range(ps, ts, 1)"


def told(nodes: str, name: str = "y") -> Meaning | None:
    model = parse(
        "(int64[b,s] ids, int64[b,u] attention_mask, int64[b,s] position_ids, float[b,2,p,8] past)"
        " => (float[b,2,v,8] present, float[b,s,16] z) <float[37,16] table>"
        "{ x = Gather(table, ids)  x5 = Reshape(x, [0, 0, 2, 8])"
        "  x4 = Transpose<perm = [0, 2, 1, 3]>(x5)  present = Concat<axis = 2>(past, x4)"
        f"  w = Cast<to = 1>(position_ids)  a = Unsqueeze(w, [2])  cs = Cos(a)  z = Mul(x, cs) {nodes} }}"
    )
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    value = next(v for node in graph.graph for v in node.outputs if v.name == name)
    sampler = Sampler(graph.graph, find_roles(graph), runtime())
    return Lengths(sampler).meaning(value)


@pytest.mark.parametrize(
    ("nodes", "meaning"),
    [
        (f"{RANGE}  y = Unsqueeze(at, [0])", Meaning("position", 1, 0.0, (1, None))),
        (f"{RANGE}  y = Add(at, 2)", Meaning("position", 0, 2.0, (None,))),
        (
            "m = CumSum(attention_mask, 1)  k = Sub(m, 1)  n = Shape<start = 1, end = 2>(ids)"
            "  from = Neg(n)  y = Slice(k, from, [9223372036854775807], [1])",
            Meaning("position", 1, 0.0, (None, None)),
        ),
        (
            "f = Cast<to = 1>(position_ids)  y = Unsqueeze(f, [1])",
            Meaning("position", 2, 0.0, (None, 1, None)),
        ),
        (f"{COUNT}  y = Identity(t)", Meaning("total", None, 0.0, (1,))),
        (
            "m = ReduceMax<keepdims = 0>(position_ids)  y = Identity(m)",
            Meaning("total", None, -1.0, ()),
        ),
        (f"{COUNT}  y = Squeeze(n)", Meaning("new", None, 0.0, ())),
        ("y = Shape<start = 0, end = 1>(attention_mask)", Meaning("batch", None, 0.0, (1,))),
    ],
    ids=["range", "offset", "mask", "rank 3", "total", "longest", "new", "batch"],
)
def test_what_a_value_says(nodes: str, meaning: Meaning) -> None:
    assert told(nodes) == meaning


@pytest.mark.parametrize(
    "nodes",
    [
        f"{COUNT}  y = Identity(p)",
        f"{RANGE}  y = Mul(at, 2)",
        "y = Neg(position_ids)",
        "y = Identity(attention_mask)",
        "y = Min(position_ids, 1023)",
        f"{RANGE}  y = Min(at, 30000)",
        f"{COUNT}  y = Max(t, 512)",
    ],
    ids=["past", "doubled", "backwards", "mask", "clamped", "clamped far", "floor"],
)
def test_what_says_none_of_it(nodes: str) -> None:
    assert told(nodes) is None
