"""Shapes and contents that are inferred are what ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from onnxgen.analysis.facts import sizes_in_use
from onnxgen.analysis.roles import find_roles
from onnxgen.analysis.shapes import Shapes
from onnxgen.analysis.symbols import Dim, atom, evaluate
from onnxgen.errors import RefusedError
from onnxgen.passes.normalize import raise_opset, set_dtypes
from onnxgen.testing import CorpusEntry, corpus
from tests.graphs import facts_of, feeds_of, parse, run

ENTRIES = corpus()


def as_exported(entry: CorpusEntry) -> ir.Model:
    """At the opset of the rules, but with all shape arithmetic that the exporter wrote."""
    model = ir.from_proto(entry.load())
    if model.functions:
        common.InlinePass()(model)
        model.functions.clear()
    common.TopologicalSortPass()(model)
    common.NameFixPass()(model)
    raise_opset(model, 24)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    set_dtypes(model)
    return model


def values_of(model: ir.Model) -> Iterator[ir.Value]:
    for node in model.graph:
        yield from (output for output in node.outputs if output.name)


def computed(model: ir.Model, feeds: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Every value of the main graph, as ONNX Runtime computes it."""
    proto = ir.to_proto(model)
    known = {each.name for each in proto.graph.output}
    for value in values_of(model):
        if value.name not in known:
            proto.graph.output.add(name=value.name)
    return run(proto, feeds)


def bound(feeds: dict[str, Any]) -> dict[str, int]:
    return {
        f"{name}[{axis}]": size
        for name, array in feeds.items()
        for axis, size in enumerate(array.shape)
    }


def assert_right(
    shapes: Shapes,
    model: ir.Model,
    feeds: dict[str, Any],
    actual: dict[str, np.ndarray[Any, Any]],
) -> tuple[int, int]:
    """Every shape and content that can be evaluated is right; how many of each there were."""
    binding = bound(feeds)
    known = contents = 0
    for value in values_of(model):
        array, shape = actual[value.name or ""], shapes.of(value)
        where = f"{value.name} of {value.producer()}"
        if shape is not None:
            assert len(shape) == array.ndim, (where, shape)
            for form in (shape, tuple(map(shapes.resolve, shape))):
                for size, dim in zip(array.shape, form, strict=True):
                    number = evaluate(dim, binding)
                    assert number in (None, size), (where, form, array.shape)
            known += all(evaluate(shapes.resolve(d), binding) is not None for d in shape)
        content = shapes.content(value)
        if content is not None:
            assert content.shape == array.shape, (where, content, array)
            for element, number in zip(content.flat, array.flat, strict=True):
                found = evaluate(element, binding)
                assert found is None or found == number, (where, content, array)
            contents += 1
    return known, contents


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_corpus_has_the_shapes_that_are_inferred(entry: CorpusEntry) -> None:
    roles = find_roles(ir.from_proto(entry.stored))
    model = as_exported(entry)
    total = sum(1 for _ in values_of(model))
    batch, new, past = max(entry.info["runs"], key=sum)
    feeds: dict[str, Any] = entry.feeds(batch, new, past)
    actual = computed(model, feeds)
    for assumed in (None, sizes_in_use(roles)):
        known, _ = assert_right(Shapes(model.graph, assumed), model, feeds, actual)
    # How many rows a loop over experts finds for each of them nobody knows.
    least = 0.55 if "looped" in entry.form else 0.7
    assert known >= least * total, f"{known} of {total} shapes are known"


# --- one operator at a time ---------------------------------------------------------------------


CASES = {
    "(float[b,s,12] x) => (float y) { y = Reshape(x, [0, -1, 3, 4]) }": "b s 3 4",
    "(float[b,s,12] x) => (float y) { y = Reshape(x, [-1, 6]) }": "2*b*s 6",
    "(float[b,s,12] x) => (float y) { y = Reshape<allowzero = 1>(x, [-1, 12]) }": "b*s 12",
    "(float[b,s,12] x) => (float y) { y = Flatten<axis = 2>(x) }": "b*s 12",
    "(float[b,s,12] x) => (float y) { y = Flatten<axis = 0>(x) }": "1 12*b*s",
    "(float[b,1,12] x) => (float y) { y = Expand(x, [3, 1]) }": "b 3 12",
    "(float[b,s,12] x) => (float y) { y = Tile(x, [1, 3, 2]) }": "b 3*s 24",
    "(float[b,s,12] x) => (float y) { y = Transpose(x) }": "12 s b",
    "(float[b,s,12] x) => (float y) { y = Unsqueeze(x, [0, -1]) }": "1 b s 12 1",
    "(float[b,1,12] x) => (float y) { y = Squeeze(x, [1]) }": "b 12",
    "(float[b,s,12] x) => (float y) { y = Concat<axis = 1>(x, x) }": "b 2*s 12",
    "(float[b,s,12] x) => (float y) { a, y = Split<axis = -1, num_outputs = 2>(x) }": "b s 6",
    "(float[b,s,12] x) => (float y) { a, y = Split<axis = 2>(x, [5, 7]) }": "b s 7",
    "(float[b,s,12] x) => (float y) { y = Slice(x, [2], [9], [2], [3]) }": "b s 3",
    "(float[b,s,12] x) => (float y) { y = Slice(x, [-5], [100], [2]) }": "b s 5",
    "(float[b,s,12] x) => (float y) { y = Slice(x, [0], [3], [1]) }": "b min(3,s) 12",
    "(float[b,s,12] x) => (float y) { y = Slice(x, [-3], [2147483647], [1]) }": "b min(3,s) 12",
    "(float[b,s,12] x) => (float y) { y = Slice(x, [0], [-1], [1]) }": "b max(0,s-1) 12",
    "(float[b,s,12] x, int64[n,3] i) => (float y) { y = Gather<axis = 2>(x, i) }": "b s n 3",
    "(float[b,s,12] x) => (float y) { y = Gather<axis = -1>(x, 4) }": "b s",
    "(float[b,s,12] x) => (float y) <float[12,7] w> { y = MatMul(x, w) }": "b s 7",
    "(float[b,s,12] x, float[12] v) => (float y) { y = MatMul(x, v) }": "b s",
    "(float[12] v, float[b,12,s] x) => (float y) { y = MatMul(v, x) }": "b s",
    "(float[s,12] x) => (float y) <float[7,12] w> { y = Gemm<transB = 1>(x, w) }": "s 7",
    "(float[s,1] x, float[1,n] z) => (float y) { y = CastLike(x, z) }": "s 1",
    "(float[b,s,26] x) => (float y) <uint8[7,2,8] w, float[14] scale>"
    "{ y = com.microsoft.MatMulNBits<K = 26, N = 7, bits = 4, block_size = 16>(x, w, scale) }": "b s 7",
    "(float[b,s,12] x) => (float y) { y = ReduceMean<keepdims = 0>(x, [1]) }": "b 12",
    "(float[b,s,12] x) => (float y) { y = ReduceSum(x, [-1, 0]) }": "1 s 1",
    "(float[b,s,12] x) => (float y) { y = ReduceMax<keepdims = 0>(x) }": "",
    "(float[b,s,12] x) => (int64 y) { y = Shape<start = 1>(x) }": "2",
    "(float[b,s,12] x) => (float y) { y, i = TopK<axis = 1>(x, [1]) }": "b 1 12",
    "(float[b,s,12] x) => (float y) { n = Shape(x)  y = ConstantOfShape(n) }": "b s 12",
    "(float[b,s,12] x) => (int64 y) { n = Shape<start = 1, end = 2>(x)  m = Squeeze(n)"
    "  y = Range(0, m, 1) }": "s",
    "(float[b,s,12] x) => (int64 y) { n = Shape<start = 1, end = 2>(x)  m = Squeeze(n)"
    "  y = Range(3, m, 2) }": "max(0,(s-2)/2)",
    "(float[b,s,12] x) => (float y) { y = Range(0.5, 6.0, 1.0) }": "6",
    "(float[b,s,12] x) => (int64 y) { y = Range(90, -10, -1) }": "100",
    "(float[b,s,12] x, float[b,12,n] z) => (float y)"
    '{ y = Einsum<equation = "bsd,bdn->nsb">(x, z) }': "n s b",
    "(float[b,s,12] x, float[s,1] z) => (float y) { y = Add(x, z) }": "b s 12",
    "(float[b,12,9] x) => (float y) <float[7,12,3] w>"
    "{ y = Conv<strides = [2], pads = [1, 1]>(x, w) }": "b 7 5",
    "(float[b,s,12] x) => (float y) { y = Pad(x, [0, 2, -1, 0, 3, 5]) }": "b s+5 16",
    "(float[b,s,12] x) => (float y) { n = Shape<start = 1, end = 2>(x)  m = Sub([20], n)"
    "  p = Concat<axis = 0>([0], m)  y = Pad(x, p, , [1]) }": "b 20 12",
    "(float[b,6,s,20] q, float[b,3,t,20] k, float[b,3,t,10] v) => (float y)"
    "{ y = Attention(q, k, v) }": "b 6 s 10",
    "(float[b,s,120] q, float[b,t,60] k, float[b,t,30] v) => (float y)"
    "{ y = Attention<q_num_heads = 6, kv_num_heads = 3>(q, k, v) }": "b s 60",
}


@pytest.mark.parametrize("text", CASES)
def test_an_operator(text: str) -> None:
    opset = 23 if "Attention" in text else 20
    model = ir.from_proto(parse(text, opset=opset))
    set_dtypes(model)
    shapes = Shapes(model.graph)
    for lengths in ({"b": 2, "s": 5, "t": 7, "n": 4}, {"b": 3, "s": 1, "t": 4, "n": 2}):
        feeds = feeds_of(ir.to_proto(model), lengths)
        known, _ = assert_right(shapes, model, feeds, computed(model, feeds))
        assert known == sum(1 for _ in values_of(model))
        wanted = [
            int(eval(part, {}, {**lengths, "min": min, "max": max})) for part in CASES[text].split()
        ]
        y = model.graph.outputs[0]
        assert [evaluate(dim, bound(feeds)) for dim in shapes.of(y) or ()] == wanted


CONTENTS = {
    "n = Shape(x)  y = Gather(n, [1, 0])": "s b",
    "n = Shape(x)  m = Gather(n, 1)  y = Add(m, 3)": "s+3",
    "n = Shape(x)  y = Slice(n, [-2], [9])": "s 12",
    "n = Shape<end = 1>(x)  y = Concat<axis = 0>(n, [3, -1])": "b 3 -1",
    "n = Shape(x)  y = Slice(n, [-1], [-9223372036854775807], [0], [-1])": "12 s b",
    "n = Shape(x)  y = Slice(n, [2], [0], [0], [-1])": "12 s",
    "n = Shape(x)  y = ScatterElements<axis = 0>(n, [2, 0], [7, 5])": "5 s 7",
    "n = Size(x)  y = Div(n, 12)": "b*s",
    "n = Shape<end = 1>(x)  m = Cast<to = 6>(n)  y = Cast<to = 7>(m)": "b",
    "n = Shape(x)  e = Equal(n, [-1, -1, -1])  y = Where(e, [1, 1, 1], n)": "b s 12",
    "n = Shape<end = 2>(x)  y = ReduceProd<keepdims = 0>(n)": "b*s",
    "n = Shape<end = 2>(x)  y = Max(n, [1, 3])": "b max(s,3)",
    "n = Shape<end = 2>(x)  y = Mod(n, [2, 2])": "b%2 s%2",
    "n = Shape<end = 2>(x)  u = Unsqueeze(n, [0])  t = Transpose<perm = [1, 0]>(u)"
    "  y = Reshape(t, [2])": "b s",
    "n = Shape<end = 2>(x)  m = Neg(n)  y = Sub([9, 9], m)": "9+b 9+s",
    "y = Range(2, 11, 3)": "2 5 8",
    "y = ConstantOfShape<value = int64[1] {7}>([3])": "7 7 7",
    "n = Shape<end = 1>(x)  y = Expand(n, [3])": "b b b",
    "n = Shape<end = 1>(x)  m = Mul(n, 6)  y = Div(m, 3)": "2*b",
    "n = Shape<end = 2>(x)  y = Min(n, [64, 1])": "min(b,64) min(s,1)",
}


@pytest.mark.parametrize("body", CONTENTS)
def test_a_content(body: str) -> None:
    model = ir.from_proto(parse(f"(float[b,s,12] x) => (int64 y) {{ {body}  z = Relu(x) }}"))
    set_dtypes(model)
    shapes = Shapes(model.graph)
    y = model.graph.outputs[0]
    for b, s in ((2, 5), (3, 1)):
        feeds = feeds_of(ir.to_proto(model), {"b": b, "s": s})
        assert_right(shapes, model, feeds, computed(model, feeds))
        content = shapes.content(y)
        assert content is not None
        wanted = [
            eval(part, {}, {"b": b, "s": s, "min": min, "max": max})
            for part in CONTENTS[body].split()
        ]
        assert [evaluate(e, bound(feeds)) for e in content.flat] == wanted


def test_what_is_not_known_stays_unknown() -> None:
    facts, values = facts_of(
        "(float[b,s,12] x, int64[2] to, int64[n] many) => (float[u,v] y, float[u,v] z)"
        "{ y = Reshape(x, to)  z0 = Reshape(x, many)  z = Relu(z0) }"
    )
    assert facts.shapes.rank(values["y"]) == 2
    assert facts.shapes.of(values["z0"]) is None
    y = facts.shapes.of(values["y"])
    assert y is not None
    assert evaluate(y[0], {"x[0]": 2, "x[1]": 5}) is None
    assert not facts.shapes.same(y[0], y[1])


def test_a_reshape_of_something_unknown_keeps_sizes_that_are_unknown() -> None:
    """0 keeps a size; of a tensor whose shape is unknown the size is unknown, not 0."""
    facts, values = facts_of(
        "(float[m,s,120] z, bool[m] k) => (float[u,6,s,20] y)"
        "{ x = Compress<axis = 0>(z, k)  y = Reshape(x, [0, 0, 6, 20]) }"
    )
    shape = facts.shapes.of(values["y"])
    assert shape is not None
    assert shape[0] != 0
    assert shape[1] != 0


def test_sizes_that_an_operator_needs_equal_are_merged() -> None:
    facts, values = facts_of(
        "(float[b,s,12] x, float[c,p,12] u) => (float y) { y = Concat<axis = 1>(x, u) }"
    )
    shapes = facts.shapes
    x, u, y = (shapes.of(values[name]) for name in "xuy")
    assert x is not None
    assert u is not None
    assert y is not None
    assert x[0] != u[0]
    assert shapes.same(x[0], u[0])
    assert not shapes.same(x[1], u[1])
    assert shapes.same(y[1], u[1] + x[1])


def test_broadcasting_merges_nothing() -> None:
    """One of the two may be 1."""
    facts, values = facts_of("(float[b,12] x, float[c,12] u) => (float y) { y = Add(x, u) }")
    x, u = (facts.shapes.of(values[name]) for name in "xu")
    assert x is not None
    assert u is not None
    assert not facts.shapes.same(x[0], u[0])


def test_assumptions_are_taken_only_when_given() -> None:
    text = "(float[b,s,12] x, float[c,s,12] u) => (float y) { y = Add(x, u) }"
    model = ir.from_proto(parse(text))
    one: dict[str, Dim] = {"u[0]": atom("x[0]"), "u[1]": 5}
    plain, assumed = Shapes(model.graph), Shapes(model.graph, one)
    u = model.graph.inputs[1]
    assert str(plain.of(u)) == "(u[0], u[1], 12)"
    assert str(assumed.of(u)) == "(x[0], 5, 12)"


@pytest.mark.parametrize(
    "body",
    [
        "y = Transpose <perm = [0, 5]> (x)",
        "y = Softmax <axis = 2> (x)",
        "y = Concat <axis = -3> (x, x)",
        "a = Constant <value_ints = [1, 1]> () y = Unsqueeze (x, a)",
        "a = Constant <value_ints = [0, 1]> () b = Constant <value_ints = [2]> () y = Slice (x, a, b)",
        "w = Constant <value = float[2, 1] {1.0, 2.0}> () y = MatMul (x, w)",
        "n = Constant <value_ints = [-3, 4]> () y = ConstantOfShape (n)",
    ],
)
def test_a_node_that_cannot_take_its_inputs_is_refused(body: str) -> None:
    model = ir.from_proto(parse(f"(float[b, 4] x) => (float y) {{ {body} }}"))
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    with pytest.raises(RefusedError, match=r"cannot take inputs of the shapes \[x\[0\], 4\]|\[2\]"):
        Shapes(model.graph)


def test_a_shape_as_long_as_no_shape_is_not_made() -> None:
    """A target of 2^40 sizes: unknown, where it is not refused, and no list of them is made."""
    model = ir.from_proto(
        parse("(float[b] x, int64[1099511627776] n) => (float[] y) { y = Expand (x, n) }")
    )
    assert Shapes(model.graph).of(model.graph.outputs[0]) is None


def test_arithmetic_that_leaves_int64_is_not_followed() -> None:
    body = "n = Constant <value_ints = [9223372036854775807]> () y = Add (n, n)"
    model = ir.from_proto(parse(f"(float[b] x) => (int64 y) {{ {body} }}"))
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    assert Shapes(model.graph).content(model.graph.outputs[0]) is None


def test_a_foreign_operator_is_no_standard_one_by_its_name() -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["": 20, "my.domain": 1]>
        g (float[B, 6] x) => (float[B, N] y) {
            z = my.domain.Add (x, x)
            y = Identity (z)
        }
        """
    )
    graph = ir.from_proto(model).graph
    shapes = Shapes(graph)
    (z,) = [node.outputs[0] for node in graph if node.domain == "my.domain"]
    assert shapes.of(z) is None
