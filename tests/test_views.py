"""Chains of views are one map of axes: as einops would write it, and as numpy computes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxgen.analysis.symbols import evaluate
from onnxgen.analysis.views import View
from tests.graphs import facts_of, run

Array = np.ndarray[Any, Any]
INPUTS = "(float[b,s,120] x, float[b,3,t,20] k) => (float[u,v] y)"


def view_of(body: str, of: str = "y") -> View:
    facts, values = facts_of(f"{INPUTS} {{ {body} }}")
    view = facts.views.of(values[of])
    assert view is not None
    return view


def written(view: View) -> str:
    """Axes as `axis:stride*size`, x for a repeat, - for an axis of size 1."""
    return " ".join(
        "("
        + " ".join(f"{'x' if d.axis is None else d.axis}:{d.stride}*{d.size}" for d in axis)
        + ")"
        if len(axis) != 1
        else f"{'x' if axis[0].axis is None else axis[0].axis}:{axis[0].stride}*{axis[0].size}"
        for axis in view.axes
    )


CASES = {
    # b s (h d) -> b h s d
    "h = Reshape(x, [0, 0, 6, 20])  y = Transpose<perm = [0, 2, 1, 3]>(h)": (
        "0:1*x[0] 2:20*6 1:1*x[1] 2:1*20"
    ),
    # and back: b h s d -> b s (h d)
    "h = Reshape(x, [0, 0, 6, 20])  t = Transpose<perm = [0, 2, 1, 3]>(h)"
    "  b = Transpose<perm = [0, 2, 1, 3]>(t)  y = Reshape(b, [0, 0, 120])": (
        "0:1*x[0] 1:1*x[1] 2:1*120"
    ),
    # b k t d -> b (k g) t d
    "u = Unsqueeze(k, [2])  e = Expand(u, [1, 1, 2, 1, 1])  y = Reshape(e, [0, 6, -1, 20])": (
        "0:1*k[0] (1:1*3 x:1*2) 2:1*k[2] 3:1*20"
    ),
    "u = Unsqueeze(k, [2])  e = Tile(u, [1, 1, 2, 1, 1])  y = Reshape(e, [0, 6, -1, 20])": (
        "0:1*k[0] (1:1*3 x:1*2) 2:1*k[2] 3:1*20"
    ),
    "y = Gather<axis = 1>(k, [0, 0, 1, 1, 2, 2])": "0:1*k[0] (1:1*3 x:1*2) 2:1*k[2] 3:1*20",
    # b k t d -> b (g k) t d
    "y = Tile(k, [1, 2, 1, 1])": "0:1*k[0] (x:1*2 1:1*3) 2:1*k[2] 3:1*20",
    "y = Concat<axis = 1>(k, k, k)": "0:1*k[0] (x:1*3 1:1*3) 2:1*k[2] 3:1*20",
    # a detour over a flattened tensor: b k t d -> (b k) t d -> (b k) d t -> b k d t
    "t0 = Shape<start = 2, end = 3>(k)  f = Concat<axis = 0>([-1], t0, [20])  m = Reshape(k, f)"
    "  w = Transpose<perm = [0, 2, 1]>(m)  b0 = Shape<end = 2>(k)"
    "  g = Concat<axis = 0>(b0, [20], t0)  y = Reshape(w, g)": "0:1*k[0] 1:1*3 3:1*20 2:1*k[2]",
    # two halves of an axis, swapped in place: no view, since a Concat computes
    "y = Reshape(x, [0, 0, 2, 3, 20])": "0:1*x[0] 1:1*x[1] 2:60*2 2:20*3 2:1*20",
    # an axis of size 1 has no digits
    "y = Unsqueeze(k, [1])": "0:1*k[0] () 1:1*3 2:1*k[2] 3:1*20",
    # flattened
    "y = Flatten<axis = 2>(x)": "(0:1*x[0] 1:1*x[1]) 2:1*120",
}


@pytest.mark.parametrize("body", CASES)
def test_maps(body: str) -> None:
    view = view_of(body)
    assert view.source.name in ("x", "k")
    assert written(view) == CASES[body]
    assert view.scale == 1.0


def test_factors_on_the_way_are_collected() -> None:
    view = view_of(
        "a = Mul(k, 0.5)  t = Transpose<perm = [0, 1, 3, 2]>(a)  y0 = Div(t, 4.0)  y = Mul(3.0, y0)"
    )
    assert view.source.name == "k"
    assert view.scale == pytest.approx(0.375)


@pytest.mark.parametrize(
    ("body", "source"),
    [
        ("r = Relu(k)  y = Transpose<perm = [0, 2, 1, 3]>(r)", "r"),
        ("y = Gather<axis = 1>(k, [2, 1, 0])", "y"),
        ("y = Gather<axis = 1>(k, [0, 1])", "y"),
        ("y = Slice(k, [0], [2], [1])", "y"),
        ("r = Relu(k)  y = Concat<axis = 1>(k, r)", "y"),
        ("a, y = Split<axis = -1, num_outputs = 2>(k)", "y"),
        # across axes whose sizes do not divide
        ("y = Reshape(k, [0, 5, 12, -1])", "y"),
    ],
)
def test_what_computes_or_cannot_be_said_is_a_source(body: str, source: str) -> None:
    assert view_of(body).source.name == source


def test_the_chain_leads_back_to_the_source() -> None:
    facts, values = facts_of(
        f"{INPUTS} {{ a = Unsqueeze(k, [2])  e = Expand(a, [1, 1, 2, 1, 1])"
        "  y = Reshape(e, [0, 6, -1, 20]) }"
    )
    names = [each.name for each in facts.views.chain(values["y"])]
    assert names == ["y", "e", "a", "k"]


# --- a random chain, against numpy --------------------------------------------------------------


def by_arithmetic(view: View, source: Array) -> Array:
    """The view's elements, each index computed from the digits."""
    sizes = [
        int(np.prod([evaluate(d.size, {}) or 0 for d in axis], initial=1)) for axis in view.axes
    ]
    result = np.empty(sizes, source.dtype)
    for index in np.ndindex(*sizes):
        at = [0] * source.ndim
        for place, axis in zip(index, view.axes, strict=True):
            rest = place
            for digit in reversed(axis):
                rest, part = divmod(rest, evaluate(digit.size, {}) or 1)
                if digit.axis is not None:
                    at[digit.axis] += part * (evaluate(digit.stride, {}) or 0)
        result[index] = source[tuple(at)]
    return result * np.float32(view.scale)


@st.composite
def chains(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[str, list[int]]]]:
    """A shape, and steps: what a chain does to it."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)))
    now, steps = list(shape), []
    for _ in range(draw(st.integers(1, 6))):
        kinds = ["Transpose", "Unsqueeze", "Merge", "Split", "Expand", "Tile", "Squeeze", "Repeat"]
        kind = draw(st.sampled_from(kinds))
        rank = len(now)
        if kind == "Transpose":
            order = draw(st.permutations(range(rank)))
            now = [now[axis] for axis in order]
            steps.append((kind, list(order)))
        elif kind == "Unsqueeze" and rank < 6:
            axis = draw(st.integers(0, rank))
            now.insert(axis, 1)
            steps.append((kind, [axis]))
        elif kind == "Squeeze" and 1 in now and rank > 1:
            axis = now.index(1)
            del now[axis]
            steps.append((kind, [axis]))
        elif kind == "Merge" and rank > 1:
            axis = draw(st.integers(0, rank - 2))
            now[axis : axis + 2] = [now[axis] * now[axis + 1]]
            steps.append(("Reshape", list(now)))
        elif kind == "Split":
            axis = draw(st.integers(0, rank - 1))
            factor = draw(st.sampled_from([f for f in (2, 3, 4, 6) if now[axis] % f == 0] or [1]))
            now[axis : axis + 1] = [now[axis] // factor, factor]
            steps.append(("Reshape", list(now)))
        elif kind == "Expand" and 1 in now and np.prod(now) < 200:
            axis = now.index(1)
            target = [1] * rank
            target[axis] = now[axis] = draw(st.sampled_from([2, 3, 5]))
            steps.append((kind, target))
        elif kind == "Tile" and np.prod(now) < 200:
            repeats = [1] * rank
            axis = draw(st.integers(0, rank - 1))
            repeats[axis] = 2
            now[axis] *= 2
            steps.append((kind, repeats))
        elif kind == "Repeat" and np.prod(now) < 200:
            axis = draw(st.integers(0, rank - 1))
            indices = [i // 2 for i in range(2 * now[axis])]
            now[axis] *= 2
            steps.append(("Gather", [axis, *indices]))
    return shape, steps


def chain_model(shape: tuple[int, ...], steps: list[tuple[str, list[int]]]) -> onnx.ModelProto:
    graph = onnx.GraphProto(name="g")
    graph.input.append(helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape))
    last = "x"
    for number, (kind, given_numbers) in enumerate(steps):
        name = f"v{number}"
        numbers = given_numbers
        attributes: dict[str, Any] = {}
        if kind == "Transpose":
            node = helper.make_node(kind, [last], [name], perm=numbers)
        else:
            if kind == "Gather":
                attributes["axis"], numbers = numbers[0], numbers[1:]
            graph.initializer.append(numpy_helper.from_array(np.array(numbers), f"n{number}"))
            node = helper.make_node(kind, [last, f"n{number}"], [name], **attributes)
        graph.node.append(node)
        last = name
    rank_free = helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None)
    graph.output.append(rank_free)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


@settings(max_examples=120, deadline=None, derandomize=True)
@given(chains())
def test_a_random_chain_is_its_map(
    chain: tuple[tuple[int, ...], list[tuple[str, list[int]]]],
) -> None:
    shape, steps = chain
    if not steps:
        return
    model = chain_model(shape, steps)
    facts, values = facts_of(model)
    last = model.graph.output[0].name
    source = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    wanted = run(model, {"x": source})[last]
    view = facts.views.of(values[last])
    assert view is not None
    if view.source.name == "x":
        np.testing.assert_array_equal(by_arithmetic(view, source), wanted)
    else:  # it starts further down: from there on it must hold as well
        cut = onnx.ModelProto()
        cut.CopyFrom(model)
        cut.graph.output.append(
            helper.make_tensor_value_info(view.source.name or "", onnx.TensorProto.FLOAT, None)
        )
        start = (
            wanted if view.source.name == last else run(cut, {"x": source})[view.source.name or ""]
        )
        np.testing.assert_array_equal(by_arithmetic(view, start), wanted)


def test_most_chains_are_seen_through_to_their_source() -> None:
    model = chain_model(
        (2, 12, 3),
        [
            ("Reshape", [2, 4, 3, 3]),
            ("Transpose", [0, 2, 1, 3]),
            ("Reshape", [2, 12, 3]),
            ("Tile", [1, 2, 1]),
            ("Unsqueeze", [0]),
            ("Expand", [3, 1, 1, 1]),
        ],
    )
    facts, values = facts_of(model)
    view = facts.views.of(values["v5"])
    assert view is not None
    assert view.source.name == "x"
