"""What a ramp says of an integer tensor is what ONNX Runtime computes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxgen.analysis.ramps import Ramp, ramp_of
from tests.graphs import facts_of, parse, run

# The slopes, the start, and the terms by name with their factors.
CASES = {
    "y = Add(row, at)": ((1,), 0, {"at": 1}),
    "y = Sub(at, row)": ((-1,), 0, {"at": 1}),
    "a = Add(row, 3)  b = Add(a, at)  y = Sub(b, at)": ((1,), 3, {}),
    "y = Range(at, end, 2)": ((2,), 0, {"at": 1}),
    "u = Unsqueeze(row, [1])  w = Unsqueeze(col, [0])  y = Add(u, w)": ((1, 1), 0, {}),
    "u = Unsqueeze(row, [1])  e = Expand(u, [1, 7])  y = Transpose<perm = [1, 0]>(e)": (
        (0, 1),
        0,
        {},
    ),
    "a = Unsqueeze(at, [0])  e = Add(a, len)  y = Slice([4, 7, 10, 13, 16, 19, 22], a, e, [0])": (
        (3,),
        4,
        {"at": 3},
    ),
    "y = Gather([5, 6, 7, 8, 9, 10, 11], row)": ((1,), 5, {}),
    "y = Gather([5, 4, 3, 2, 1, 0, -1], at)": ((), 5, {"at": -1}),
    "c = Cast<to = 6>(row)  y = Cast<to = 7>(c)": ((1,), 0, {}),
    # What does not count is a term of itself.
    "y = Gather([0, 2, 1, 5, 4, 3, 6], row)": ((0,), 0, {"y": 1}),
    "y = Mul(row, row)": ((0,), 0, {"y": 1}),
    # Either of two sizes may be 1, and be repeated.
    "y = Add(row, some)": ((0,), 0, {"y": 1}),
    "y = Add(row, [1, 1, 1, 1])": ((0,), 0, {"y": 1}),
    "u = Unsqueeze(row, [1])  y = Add(u, each)": ((0, 0), 0, {"y": 1}),
    "y = Gather(some, 0)": ((), 0, {"y": 1}),
    "y = Concat<axis = 0>(row, row)": ((0,), 0, {"y": 1}),
    "u = Reshape(row, [2, -1])  y = Identity(u)": ((0, 0), 0, {"u": 1}),
}


def model_of(body: str) -> str:
    return (
        "(float[s] x, float[p] z, int64 at, int64[s,p] each, int64[p] some) => (int64 y)"
        "{ len = Shape(x)  n = Squeeze(len)  row = Range(0, n, 1)  wide = Shape(z)"
        f"  m = Squeeze(wide)  col = Range(0, m, 1)  twice = Add(n, n)  end = Add(at, twice)  {body} }}"
    )


def value(ramp: Ramp, shape: tuple[int, ...], known: dict[str, np.ndarray]) -> np.ndarray:
    total = np.full(shape, ramp.start)
    for slope, index in zip(ramp.slopes, np.indices(shape), strict=True):
        total += slope * index
    for term in ramp.terms:
        array = known[term.source.name or ""]
        target = [1] * len(shape)
        for own, axis in enumerate(term.axes):
            if axis is not None:
                target[axis] = array.shape[own]
        total += term.factor * array.reshape(target)
    return total


@pytest.mark.parametrize("body", CASES)
def test_a_ramp(body: str) -> None:
    proto = parse(model_of(body))
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    facts, values = facts_of(proto)
    ramp = ramp_of(facts, values["y"])
    assert ramp is not None
    named = {term.source.name: term.factor for term in ramp.terms}
    assert (ramp.slopes, ramp.start, named) == CASES[body]
    for name in {term.source.name for term in ramp.terms} - {"y", "at", "each"}:
        proto.graph.output.add(name=name)
    feeds = {
        "x": np.zeros(4, np.float32),
        "z": np.zeros(4, np.float32),
        "at": np.array(2),
        "each": np.arange(16).reshape(4, 4) ** 2,
        "some": np.array([3, 1, 4, 1]),
    }
    got = {**feeds, **run(proto, feeds)}
    np.testing.assert_array_equal(value(ramp, got["y"].shape, got), got["y"])


def test_floats_count_nothing() -> None:
    facts, values = facts_of("(float[s] x) => (float[s] y) { y = Relu(x) }")
    assert ramp_of(facts, values["y"]) is None
    assert isinstance(values["y"], ir.Value)
