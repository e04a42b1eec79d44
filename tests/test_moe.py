"""onnxgen::MoE: its body against numpy, against GroupedMatMul, written, read and expanded."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx_ir import serde
from onnxscript import OpBuilder

from onnxgen import functions
from onnxgen.functions import moe
from onnxgen.functions.activation import NAMES, OPERATORS, Activation, Term, written
from onnxgen.functions.making import ints, made
from onnxgen.passes.tidy import tidy
from onnxgen.pipeline import FuseOptions, fuse
from tests.graphs import run

Array = np.ndarray[Any, Any]
H, INNER, E, K = 10, 6, 5, 2
INPUTS = (
    *("input", "router_weights", "router_indices", "fc1", "fc1_bias", "fc2", "fc2_bias"),
    *("fc3", "fc3_bias"),
)
CLAMPED = "mul(add(max(min(b,7),-7),1),mul(min(a,7),sigmoid(mul(1.702,min(a,7)))))"


def overloads() -> list[str]:
    """Every combination of what is special, for an activation of one feature and of two."""
    found = []
    for activation, halves in (("silu", ("",)), ("swiglu", ("", "interleaved", "separate"))):
        names = ("fc1t", "fc2t", "bias1", "bias2", "dense", "scaled")
        for half, *flags in itertools.product(halves, *[(False, True)] * len(names)):
            given = dict(zip(names, flags, strict=True)) | {half: True}
            zeros = not (given["dense"] and given["bias1"])
            if not given["scaled"] or (zeros and not given["bias2"]):
                found.append(moe.overload_of(activation, **given))
    return found


OVERLOADS = overloads()
SOME = [
    *("silu_dense", "swiglu", "swiglu_bias1_bias2_separate", "swiglu_interleaved_fc1t_bias1"),
    *("swiglu_fc1t_fc2t_dense_scaled", "swiglu_scaled", f"{CLAMPED}_interleaved_bias1_bias2"),
]


def feeds_for(
    overload: str, tokens: int, kind: type = np.float32, weights: type | None = None, seed: int = 0
) -> dict[str, Array]:
    """Inputs by name; the last expert is chosen by nobody."""
    activation, parts = moe.parts_of(overload)
    rng = np.random.default_rng(seed)
    rows = 2 * INNER if activation.gated and "separate" not in parts else INNER

    def drawn(*shape: int, turned: bool = False) -> Array:
        array = rng.standard_normal(shape).astype(kind) / 3
        return np.ascontiguousarray(array.swapaxes(1, 2)) if turned else array

    feeds = {"input": 3 * drawn(tokens, H)}
    if "dense" in parts:
        feeds["router_weights"] = np.abs(drawn(tokens, E)) * (rng.random((tokens, E)) < 0.5)
        feeds["router_weights"][:, -1] = 0
    else:
        feeds["router_weights"] = np.abs(drawn(tokens, K))
        order = np.argsort(rng.random((tokens, E - 1)), axis=1)
        feeds["router_indices"] = order[:, :K].astype(np.int64)
    feeds["router_weights"] = feeds["router_weights"].astype(weights or kind)
    feeds["fc1"] = drawn(E, rows, H, turned="fc1t" in parts)
    feeds["fc2"] = drawn(E, H, INNER, turned="fc2t" in parts)
    if "bias1" in parts:
        feeds["fc1_bias"] = drawn(E, rows)
    if "bias2" in parts:
        feeds["fc2_bias"] = drawn(E, H)
    if "separate" in parts:
        feeds["fc3"] = drawn(E, INNER, H, turned="fc1t" in parts)
        if "bias1" in parts:
            feeds["fc3_bias"] = drawn(E, INNER)
    return feeds


def model_of(
    overload: str,
    feeds: Mapping[str, Array],
    op_type: str = moe.NAME,
    function: onnx.FunctionProto | None = None,
) -> onnx.ModelProto:
    """A model of one call, of inputs like these, weights too."""
    names = [name if name in feeds else "" for name in INPUTS]
    while not names[-1]:
        names.pop()
    node = helper.make_node(op_type, names, ["y"], domain=functions.DOMAIN, overload=overload)

    def info(name: str, array: Array, first: str = "") -> onnx.ValueInfoProto:
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        sizes = [first or array.shape[0], *array.shape[1:]]
        return helper.make_tensor_value_info(name, kind, sizes)

    inputs = [info(name, feeds[name], "" if "fc" in name else "t") for name in names if name]
    graph = helper.make_graph([node], "g", inputs, [info("y", feeds["input"], "t")])
    imports = [helper.make_opsetid("", 24), helper.make_opsetid(functions.DOMAIN, 1)]
    own = ir.node(moe.NAME, [], domain=functions.DOMAIN, overload=overload)
    called = [function] if function is not None else functions.called([own], 24)
    return helper.make_model(graph, functions=called, opset_imports=imports, ir_version=10)


def expected(overload: str, feeds: Mapping[str, Array]) -> Array:
    """The definition, token by token, in float64."""
    activation, parts = moe.parts_of(overload)
    held = {name: array.astype(np.float64) for name, array in feeds.items()}
    for name in ("fc1", "fc3") if "fc1t" in parts else ():
        if name in held:
            held[name] = held[name].swapaxes(1, 2)
    if "fc2t" in parts:
        held["fc2"] = held["fc2"].swapaxes(1, 2)
    x, y = held["input"], np.zeros(feeds["input"].shape)
    for t, weights in enumerate(held["router_weights"]):
        chosen = range(E) if "dense" in parts else feeds["router_indices"][t]
        for e, weight in zip(chosen, weights, strict=True):
            row = x[t] * weight if "scaled" in parts else x[t]
            h = held["fc1"][e] @ row + held.get("fc1_bias", np.zeros((E, 1)))[e]
            if "separate" in parts:
                inner = activation(h, held["fc3"][e] @ row + held.get("fc3_bias", np.zeros(E))[e])
            elif "interleaved" in parts:
                inner = activation(h[0::2], h[1::2])
            else:
                inner = activation(h[:INNER], h[INNER:]) if activation.gated else activation(h)
            out = held["fc2"][e] @ inner + held.get("fc2_bias", np.zeros((E, 1)))[e]
            y[t] += out if "scaled" in parts else weight * out
    return y


def assert_alike(found: Array, wanted: Array, tolerance: float) -> None:
    assert found.shape == wanted.shape
    limit = tolerance * max(np.abs(wanted).max(initial=0.0), 1.0)
    assert np.abs(found.astype(np.float64) - wanted).max(initial=0.0) <= limit


# --- the body -----------------------------------------------------------------------------------


@pytest.mark.parametrize("overload", [*OVERLOADS, f"{CLAMPED}_interleaved_fc1t_bias1_bias2"])
def test_every_overload_computes_its_definition(overload: str) -> None:
    model = model_of(overload, feeds_for(overload, 1))
    onnx.checker.check_model(model)
    for tokens in (0, 1, 9):
        feeds = feeds_for(overload, tokens)
        assert_alike(run(model, feeds)["y"], expected(overload, feeds), 1e-6)


@pytest.mark.parametrize("activation", [*NAMES, *moe.GATED])
def test_every_activation(activation: str) -> None:
    feeds = feeds_for(activation, 9)
    assert_alike(run(model_of(activation, feeds), feeds)["y"], expected(activation, feeds), 1e-6)


@pytest.mark.parametrize("overload", SOME)
def test_float16_and_weights_that_are_wider(overload: str) -> None:
    for weights, tolerance in ((np.float16, 6e-3), (np.float32, 4e-3)):
        feeds = feeds_for(overload, 9, np.float16, weights)
        y = run(model_of(overload, feeds), feeds)["y"]
        assert y.dtype == np.float16
        assert_alike(y, expected(overload, feeds), tolerance)


@pytest.mark.parametrize("overload", SOME)
def test_weights_of_experts_that_nobody_chose_are_not_read(overload: str) -> None:
    feeds = feeds_for(overload, 9)
    for name in feeds:
        if name.startswith("fc"):
            feeds[name][-1] = np.nan
    y = run(model_of(overload, feeds), feeds)["y"]
    assert np.isfinite(y).all()
    feeds |= {name: np.nan_to_num(feeds[name]) for name in feeds}
    assert_alike(y, expected(overload, feeds), 1e-6)


@pytest.mark.parametrize("overload", ["swiglu_repeats", "relu_bias1_bias2_repeats"])
def test_an_expert_may_be_named_twice(overload: str) -> None:
    feeds = feeds_for(overload, 4)
    feeds["router_indices"][:3, 1] = feeds["router_indices"][:3, 0]
    assert_alike(run(model_of(overload, feeds), feeds)["y"], expected(overload, feeds), 1e-6)


@pytest.mark.parametrize(
    "name",
    [
        *("swash", "silu_interleaved", "silu_separate", "swiglu_bias2_bias1", "swiglu_fc3"),
        *("swiglu_interleaved_separate", "swiglu_bias2_scaled", "silu_", ""),
        # Experts that weigh nothing would add something.
        *("silu_bias1_dense_scaled", "add(a,1)_dense_scaled"),
        *("silu_repeats_dense", "silu_repeats_scaled"),
    ],
)
def test_overloads_that_are_not(name: str) -> None:
    with pytest.raises(KeyError):
        moe.build(name, 24)


# --- GroupedMatMul ------------------------------------------------------------------------------


def grouped_matmul(
    op: OpBuilder, x: ir.Value, weights: ir.Value, indices: ir.Value, bias: ir.Value | None
) -> ir.Value:
    """The proposal's: [M, K], [G, K, N], [M, k] and [G, N] -> [M, k, N], in operators there are."""
    rows = op.Unsqueeze(x, ints(op, 1, 2))
    y = op.Squeeze(op.MatMul(rows, op.Gather(weights, indices, axis=0)), ints(op, 2))
    return y if bias is None else op.Add(y, op.Gather(bias, indices, axis=0))


def lowered(overload: str) -> onnx.FunctionProto:
    """The same mixture, as the text of `onnxgen.functions.moe` writes it with GroupedMatMul."""
    activation, parts = moe.parts_of(overload)

    def body(op: OpBuilder, *inputs: ir.Value | None) -> list[ir.Value]:
        x, weights, indices, fc1, bias1, fc2, bias2, fc3, bias3 = inputs
        assert x is not None
        assert weights is not None
        assert fc1 is not None
        assert fc2 is not None
        if indices is None:
            everyone = op.Range(ints_scalar(op, 0), ints_scalar(op, E), ints_scalar(op, 1))
            indices = op.Expand(everyone, op.Shape(weights))
        one = op.Reshape(indices, ints(op, -1, 1))  # [T*k, 1]

        def turned(value: ir.Value, part: str) -> ir.Value:
            return value if part in parts else op.Transpose(value, perm=[0, 2, 1])

        def first(weight: ir.Value, bias: ir.Value | None) -> ir.Value:
            kernel = turned(weight, "fc1t")
            if "scaled" not in parts:
                assert indices is not None
                h = grouped_matmul(op, x, kernel, indices, bias)  # [T, k, F]
            else:
                scaled = op.Mul(op.Unsqueeze(x, ints(op, 1)), op.Unsqueeze(weights, ints(op, 2)))
                rows = op.Reshape(scaled, ints(op, -1, H))
                h = grouped_matmul(op, rows, kernel, one, bias)
            return op.Reshape(h, op.Concat(ints(op, -1), op.Shape(h, start=2), axis=0))

        a, b = first(fc1, bias1), None
        if fc3 is not None:
            b = first(fc3, bias3)
        elif "interleaved" in parts:
            pairs = op.Reshape(a, ints(op, 0, -1, 2))
            a, b = (op.Gather(pairs, ints_scalar(op, each), axis=2) for each in (0, 1))
        elif activation.gated:
            a, b = op.Split(a, axis=1, num_outputs=2, _outputs=2)
        d = grouped_matmul(op, activation.emit(op, a, b), turned(fc2, "fc2t"), one, bias2)
        d = op.Reshape(d, op.Concat(op.Shape(weights), ints(op, H), axis=0))  # [T, k, H]
        if "scaled" not in parts:
            d = op.Mul(d, op.Unsqueeze(weights, ints(op, 2)))
        return [op.ReduceSum(d, ints(op, 1), keepdims=0)]

    names = feeds_for(overload, 1)
    slots = {name: name in names for name in INPUTS}
    function = made("Lowered", overload, 24, slots, ("output",), (), body)
    return serde.serialize_function(function)


def ints_scalar(op: OpBuilder, number: int) -> ir.Value:
    return op.Constant(value_int=number)


@pytest.mark.parametrize("overload", sorted({*SOME, *OVERLOADS[::5]}))
def test_it_is_two_grouped_products(overload: str) -> None:
    for tokens in (1, 9):
        feeds = feeds_for(overload, tokens, seed=tokens)
        other = model_of(overload, feeds, "Lowered", lowered(overload))
        onnx.checker.check_model(other)
        y = run(other, feeds)["y"]
        assert_alike(y, expected(overload, feeds), 1e-6)
        assert_alike(run(model_of(overload, feeds), feeds)["y"], y, 1e-6)


# --- in files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("overload", [*OVERLOADS, *SOME])
def test_a_body_is_known_again(overload: str, tmp_path: Path) -> None:
    """Of a file, whatever was tidied in it."""
    model = ir.from_proto(model_of(overload, feeds_for(overload, 1)))
    tidy(model)
    onnx.save(ir.to_proto(model), tmp_path / "model.onnx")
    again = ir.load(tmp_path / "model.onnx")
    (function,) = again.functions.values()
    assert functions.is_ours(function)


def test_a_body_is_known_by_what_it_computes() -> None:
    (proto,) = model_of("swiglu", feeds_for("swiglu", 1)).functions

    def known(proto: onnx.FunctionProto) -> bool:
        return functions.is_ours(serde.deserialize_function(proto))

    def branch(proto: onnx.FunctionProto) -> onnx.GraphProto:
        (scan,) = [node for node in proto.node if node.op_type == "Scan"]
        (turn,) = [each.g for each in scan.attribute if each.name == "body"]
        (choice,) = [node for node in turn.node if node.op_type == "If"]
        (graph,) = [each.g for each in choice.attribute if each.name == "then_branch"]
        return graph

    moved = onnx.FunctionProto.FromString(proto.SerializeToString())
    constants = [node for node in moved.node if not node.input]
    rest = [node for node in moved.node if node.input]
    assert len(constants) > 1
    del moved.node[:]
    moved.node.extend([*reversed(constants), *rest])
    moved.node.add(op_type="Identity", input=["input"], output=["nobody reads it"])
    assert known(moved)

    for op_type, other in (("Gather", "GatherElements"), ("Sigmoid", "Tanh"), ("Mul", "Add")):
        changed = onnx.FunctionProto.FromString(proto.SerializeToString())
        next(n for n in branch(changed).node if n.op_type == op_type).op_type = other
        assert not known(changed)
    swapped = onnx.FunctionProto.FromString(proto.SerializeToString())
    split = next(n for n in branch(swapped).node if n.op_type == "Split")
    first, second = split.output
    split.output[:] = [second, first]
    assert not known(swapped)
    defaults = onnx.FunctionProto.FromString(proto.SerializeToString())
    defaults.attribute_proto.append(helper.make_attribute("scale", 2.0))
    assert not known(defaults)


@pytest.mark.parametrize("inline", [False, True])
def test_a_file_with_it_is_fused_again(inline: bool, tmp_path: Path) -> None:
    feeds = feeds_for("swiglu_bias1_bias2", 9)
    model = model_of("swiglu_bias1_bias2", feeds)
    weights = [name for name in feeds if name.startswith("fc")]
    for name in weights:
        model.graph.initializer.append(numpy_helper.from_array(feeds[name], name))
    kept = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    path, output = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(model, path)
    options = FuseOptions(output=output, inline=inline, verify=False)
    fuse(path, options, lambda message: None)
    again = onnx.load(output)
    assert [each.name for each in again.functions] == ([] if inline else [moe.NAME])
    assert any(node.op_type == "Scan" for node in again.graph.node) == inline
    fed = {name: array for name, array in feeds.items() if name not in weights}
    assert (run(again, fed)["y"] == run(model, fed)["y"]).all()


# --- activations --------------------------------------------------------------------------------

NUMBERS = st.floats(-100, 100, width=32, allow_subnormal=False).map(lambda x: float(x) + 0.0)
TESTS = ("greater", "less", "greaterorequal", "lessorequal")
WORDS = [word for word in OPERATORS if word not in (*TESTS, "where", "float", "narrow")]


def _extended(inner: st.SearchStrategy[Term]) -> st.SearchStrategy[Term]:
    tests = st.tuples(st.sampled_from(TESTS), st.tuples(inner, inner))
    plain = st.sampled_from(WORDS).flatmap(
        lambda word: st.tuples(st.just(word), st.tuples(*[inner] * OPERATORS[word][1]))
    )
    return plain | st.tuples(st.just("where"), st.tuples(tests, inner, inner))


TERMS = st.recursive(st.sampled_from(["a", "b"]) | NUMBERS, _extended, max_leaves=12)


@settings(max_examples=80, deadline=None)
@given(TERMS)
def test_an_activation_is_read_as_it_was_written(term: Term) -> None:
    text = written(term)
    again = Activation(text)
    assert written(again.term) == text
    a, b = np.random.default_rng(0).standard_normal((2, 50)) * 4
    with np.errstate(all="ignore"):
        found, wanted = again(a, b), _numbers(again.term, a, b)
        assert np.allclose(found, wanted, rtol=1e-6, atol=1e-6, equal_nan=True)
        there = again.swapped()
        assert np.array_equal(there.swapped()(a, b), found, equal_nan=True)
        assert np.array_equal(there(b, a), found, equal_nan=True)


def _numbers(term: Term, a: Array, b: Array) -> Any:
    """What a term's operators compute, by the standard's own definitions."""
    counter = itertools.count()
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def emit(term: Term) -> str:
        if isinstance(term, str):
            return term
        name = f"v{next(counter)}"
        if isinstance(term, float):
            constants.append(numpy_helper.from_array(np.array([term]), name))
            return name
        word, operands = term
        nodes.append(helper.make_node(OPERATORS[word][0], [*map(emit, operands)], [name]))
        return name

    result = emit(term)
    nodes.append(helper.make_node("Identity", [result], ["y"]))
    kind = onnx.TensorProto.DOUBLE
    infos = [helper.make_tensor_value_info(name, kind, [len(a)]) for name in "ab"]
    y = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph(nodes, "g", infos, [y], constants)
    imports = [helper.make_opsetid("", 24)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return onnx.reference.ReferenceEvaluator(model).run(None, {"a": a, "b": b})[0]


@pytest.mark.parametrize("text", ["", "a b", "mul(a)", "mul(a,b,a)", "swish", "mul(a,b", "A", "a)"])
def test_what_is_no_activation(text: str) -> None:
    with pytest.raises(KeyError):
        Activation(text)


SPELLINGS = {
    "relu": ["max(a,0)", "where(greater(a,0),a,0)", "mul(a,greaterorequal(a,0))"],
    "relu2": ["pow(relu(a),2)", "mul(relu(a),a)"],
    "silu": [
        "div(a,add(1,exp(neg(a))))",
        "mul(sigmoid(a),a)",
        "mul(0.5,mul(a,add(1,tanh(div(a,2)))))",
    ],
    "gelu": [
        "mul(a,mul(0.5,add(erf(div(a,1.4142135)),1)))",
        "div(mul(a,add(1,erf(mul(a,0.70703125)))),2)",
    ],
    "gelutanh": ["mul(a,sigmoid(mul(1.5957691,add(a,mul(0.044715,pow(a,3))))))"],
    "quickgelu": ["mul(a,sigmoid(mul(a,1.7020000219345093)))", "mul(sigmoid(mul(1.703125,a)),a)"],
    "swiglu": ["mul(b,mul(a,sigmoid(a)))", "div(mul(a,b),add(1,exp(neg(a))))"],
    "geglu": ["mul(b,mul(a,mul(0.5,add(erf(div(a,1.4142135)),1))))"],
    "glu": ["mul(b,sigmoid(a))", "div(b,add(1,exp(neg(a))))"],
    "reglu": ["mul(max(a,0),b)"],
    "bilinear": ["mul(b,a)"],
    "identity": ["mul(a,1)", "sub(a,0)"],
}


@pytest.mark.parametrize(
    ("name", "text"), [(n, t) for n, texts in SPELLINGS.items() for t in texts]
)
def test_a_name_is_found_whatever_the_spelling(name: str, text: str) -> None:
    assert Activation(text).named(narrow=True).text == name
    if name in moe.GATED:
        swapped = Activation(text).swapped()
        assert (swapped.named(narrow=True).text == name) == (name == "bilinear")
        assert swapped.swapped().named(narrow=True).text == name


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*NAMES, *moe.GATED]),
    st.sampled_from(["1", "1.001", "1.02", "0.9", "2"]),
    st.sampled_from(
        [
            "{}",
            "add({},0.004)",
            "min({},7)",
            "max({},-0.1)",
            "min({},20000)",
            "max(min({},65504),-65504)",
        ]
    ),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_another_function_gets_no_name(
    name: str, factor: str, form: str, inside: bool, seed: int
) -> None:
    """Whatever is named is that function, near zero and far from it."""
    text = written(Activation(name).term)
    x = form.format(f"mul({factor},a)")
    text = (
        "".join(x if each == "a" else each for each in _words(text))
        if inside
        else form.format(f"mul({factor},{text})")
    )
    found = Activation(text).named()
    if found.text == text:
        return
    rng = np.random.default_rng(seed)
    a = rng.standard_normal(400) * 10.0 ** rng.integers(-2, 7, 400)
    b = rng.standard_normal(400) * 10.0 ** rng.integers(-2, 3, 400)
    with np.errstate(all="ignore"):
        own, other = Activation(text)(a, b), found(a, b)
    assert np.allclose(own, other, rtol=4e-3, atol=4e-3 * np.maximum(1, np.abs(b)).max())


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9.-]+|[(),]", text)
