"""MOE001: mixtures of experts, graph before and graph after, however tokens come to experts.

Shapes: T tokens, H = 8 hidden, I = 6 inner, F = 12 both features of a gate, E experts, k = 2 slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from onnxgen.report.values import Decline
from tests.graphs import (
    Raised,
    assert_kept,
    assert_same_graph,
    assert_untouched,
    parse,
    raised,
    weight,
)

Array = np.ndarray[Any, Any]
DOMAINS = '<ir_version: 10, opset_import: ["" : 24, "onnxgen" : 1]>'
LENGTHS = ({"t": 12}, {"t": 1})
ROUTER = "l = MatMul(x, R)  p = Softmax(l)  w, i = TopK(p, [2])"
SIGMOID = (
    "l = MatMul(x, R)  p = Sigmoid(l)  v, i = TopK(p, [2])  s = ReduceSum(v, [-1])  w = Div(v, s)"
)
SWIGLU = (
    "a, b = Split<axis = -1, num_outputs = 2>(h)  s_ = Sigmoid(a)  q = Mul(a, s_)  m = Mul(q, b)"
)


def graph(weights: str, nodes: str, output: str = "float[t,8] y") -> str:
    return f"(float[t,8] x) => ({output}) <{weights}> {{ {nodes} }}"


def assert_mixture(
    before: str,
    after: str,
    overload: str,
    *,
    opset: int = 20,
    weights: Mapping[str, Array] | None = None,
) -> Raised:
    """The graph becomes `after`, by one mixture of this overload."""
    result = raised(before, opset=opset, lengths=LENGTHS)
    assert [(s.rule, s.status) for s in result.sites] == [("MOE001", "fused")], result.sites
    assert result.node("MoE").overload == overload
    assert_same_graph(result.after, parse(f"{DOMAINS} g {after}", weights=weights))
    return result


# --- weights gathered for each token --------------------------------------------------------------

STACKS = "float[8,5] R, float[5,12,8] W1, float[5,8,6] W2"
PLAIN = "float[8,5] R, float[5,6,8] W1, float[5,8,6] W2"


def batched(act: str, *, router: str = ROUTER, bias: Sequence[str] = (), end: str = "y = S") -> str:
    """Weights [t,2,N,K] of each token's experts, times its column."""
    first = "g = Gather(W1, i)  c = Unsqueeze(x, [1, 3])  h4 = MatMul(g, c)"
    second = "g2 = Gather(W2, i)  mc = Unsqueeze(m, [3])  d4 = MatMul(g2, mc)"
    if "B1" in bias:
        first += "  h3 = Squeeze(h4, [3])  gb = Gather(B1, i)  h = Add(h3, gb)"
    else:
        first += "  h = Squeeze(h4, [3])"
    if "B2" in bias:
        second += "  d3 = Squeeze(d4, [3])  gd = Gather(B2, i)  d = Add(d3, gd)"
    else:
        second += "  d = Squeeze(d4, [3])"
    total = "u = Unsqueeze(w, [2])  v_ = Mul(d, u)  S = ReduceSum<keepdims = 0>(v_, [1])"
    total = total.replace("S =", "y =") if end == "y = S" else f"{total}  {end}"
    return f"{router}  {first}  {act}  {second}  {total}"


@pytest.mark.parametrize("router", [ROUTER, SIGMOID], ids=["softmax", "sigmoid"])
def test_gathered_weights(router: str) -> None:
    assert_mixture(
        graph(STACKS, batched(SWIGLU, router=router)),
        graph(STACKS, f"{router}  y = onnxgen.MoE(x, w, i, W1, , W2)"),
        "swiglu",
    )


ACTIVATIONS = {
    "relu": "m = Relu(h)",
    "silu": "s_ = Sigmoid(h)  m = Mul(s_, h)",
    "identity": "m = Identity(h)",
    "relu2": "r = Relu(h)  m = Pow(r, 2.0)",
    "gelu": "e = Div(h, 1.4142135)  f = Erf(e)  o = Add(f, 1.0)  n = Mul(h, o)  m = Mul(n, 0.5)",
    "quickgelu": "n = Mul(h, 1.702)  s_ = Sigmoid(n)  m = Mul(h, s_)",
    "mul(a,tanh(a))": "n = Tanh(h)  m = Mul(h, n)",  # has no name
    "max(min(a,2),-1)": "m = Clip(h, -1.0, 2.0)",
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_plain_experts(name: str) -> None:
    result = raised(graph(PLAIN, batched(ACTIVATIONS[name])), lengths=LENGTHS)
    (site,) = [site for site in result.fused if site.kind == "moe"]
    assert site.details == {"experts": 5, "slots": 2, "activation": result.node("MoE").overload}
    if "(" not in name:
        assert site.details["activation"] == name


GATED = {
    "swiglu": SWIGLU,
    "swiglu_interleaved": "hp = Reshape(h, [0, 2, 6, 2])  a = Gather<axis = -1>(hp, 0)"
    "  b = Gather<axis = -1>(hp, 1)  s_ = Sigmoid(a)  q = Mul(a, s_)  m = Mul(q, b)",
    "reglu": "a, b = Split<axis = -1, num_outputs = 2>(h)  r = Relu(a)  m = Mul(b, r)",
    "bilinear": "a, b = Split<axis = -1, num_outputs = 2>(h)  m = Mul(b, a)",
    "glu": "a = Slice(h, [0], [6], [2])  b = Slice(h, [6], [12], [2])  s_ = Sigmoid(a)"
    "  m = Mul(s_, b)",
    "mul(min(max(b,-7),7),mul(a,sigmoid(a)))": "a, b = Split<axis = -1, num_outputs = 2>(h)"
    "  k = Clip(b, -7.0, 7.0)  s_ = Sigmoid(a)  q = Mul(a, s_)  m = Mul(k, q)",
}


@pytest.mark.parametrize("overload", GATED)
def test_gated_experts(overload: str) -> None:
    result = raised(graph(STACKS, batched(GATED[overload])), lengths=LENGTHS)
    assert [site.status for site in result.sites] == ["fused"]
    assert result.node("MoE").overload == overload


def test_the_gate_comes_second() -> None:
    text = batched(SWIGLU.replace("a, b =", "b, a ="))
    result = raised(graph(STACKS, text), lengths=LENGTHS)
    assert result.node("MoE").overload == "mul(mul(b,sigmoid(b)),a)"


@pytest.mark.parametrize("bias", [("B1",), ("B2",), ("B1", "B2")], ids="_".join)
def test_biases(bias: Sequence[str]) -> None:
    sizes = {"B1": "float[5,12] B1", "B2": "float[5,8] B2"}
    weights = ", ".join([STACKS, *(sizes[each] for each in bias)])
    given = [each if each in bias else "" for each in ("B1", "B2")]
    call = f"onnxgen.MoE(x, w, i, W1, {given[0]}, W2, {given[1]})".replace(", )", ")")
    assert_mixture(
        graph(weights, batched(SWIGLU, bias=bias)),
        graph(weights, f"{ROUTER}  y = {call}"),
        "_".join(["swiglu", *(each.replace("B", "bias") for each in bias)]),
    )


TURNED = "float[8,5] R, float[5,8,12] W1, float[5,6,8] W2"


def turned_rows(text: str) -> str:
    """Products from the left, with weights [t,2,K,N]."""
    for rows, product, weights in (("x", "h", "g"), ("m", "d", "g2")):
        old = f"c = Unsqueeze({rows}, [{'1, 3' if rows == 'x' else '3'}])"
        assert old in text
        text = text.replace(old, old.replace("3]", "2]"))
        names = f"({weights}, {'c' if rows == 'x' else 'mc'})"
        text = text.replace(f"MatMul{names}", f"MatMul({', '.join(names[1:-1].split(', ')[::-1])})")
        text = text.replace(
            f"{product} = Squeeze({product}4, [3])", f"{product} = Squeeze({product}4, [2])"
        )
    return text


def test_turned_weights() -> None:
    after = graph(TURNED, f"{ROUTER}  y = onnxgen.MoE(x, w, i, W1, , W2)")
    assert_mixture(graph(TURNED, turned_rows(batched(SWIGLU))), after, "swiglu_fc1t_fc2t")


def test_separate_weights() -> None:
    weights = f"{PLAIN}, float[5,6,8] W3"
    act = (
        "g3 = Gather(W3, i)  k4 = MatMul(g3, c)  k = Squeeze(k4, [3])"
        "  s_ = Sigmoid(h)  q = Mul(h, s_)  m = Mul(q, k)"
    )
    assert_mixture(
        graph(weights, batched(act)),
        graph(weights, f"{ROUTER}  y = onnxgen.MoE(x, w, i, W1, , W2, , W3)"),
        "swiglu_separate",
    )


def test_batches_of_sequences() -> None:
    before = graph(STACKS, f"x = Reshape(z, [-1, 8])  {batched(SWIGLU)}")
    before = before.replace("(float[t,8] x)", "(float[b,s,8] z)").replace(
        "y = ReduceSum<keepdims = 0>(v_, [1])",
        "f = ReduceSum<keepdims = 0>(v_, [1])  sh = Shape(z)  y = Reshape(f, sh)",
    )
    before = before.replace("(float[t,8] y)", "(float[b,s,8] y)")
    result = raised(before)
    assert [site.status for site in result.sites] == ["fused"]
    assert "ReduceSum" not in {node.op_type for node in result.after.graph.node}


def test_weights_multiply_the_input() -> None:
    """Llama 4: one expert, whose input is scaled."""
    router = "l = MatMul(x, R)  v, i = TopK(l, [1])  w = Sigmoid(v)"
    text = (
        f"{router}  g = Gather(W1, i)  xw = Mul(x, w)  c = Unsqueeze(xw, [1, 3])"
        f"  h4 = MatMul(g, c)  h = Squeeze(h4, [3])  {SWIGLU}  g2 = Gather(W2, i)"
        "  mc = Unsqueeze(m, [3])  d4 = MatMul(g2, mc)  y = Squeeze(d4, [1, 3])"
    )
    result = raised(graph(STACKS, text), lengths=LENGTHS)
    assert [site.status for site in result.sites] == ["fused"], result.sites
    assert result.node("MoE").overload in ("swiglu_scaled", "swiglu")


# --- what stays outside -----------------------------------------------------------------------------

SHARED = "c1 = MatMul(x, S1)  c2 = Relu(c1)  c3 = MatMul(c2, S2)"


@pytest.mark.parametrize("gate", ["", "sg = MatMul(x, SG)  so = Sigmoid(sg)"])
def test_a_shared_expert_stays_outside(gate: str) -> None:
    weights = f"{STACKS}, float[8,7] S1, float[7,8] S2{', float[8,1] SG' if gate else ''}"
    shared = f"{SHARED}  {gate}" + ("  c4 = Mul(so, c3)" if gate else "")
    last = "c4" if gate else "c3"
    assert_mixture(
        graph(weights, batched(SWIGLU, end=f"{shared}  y = Add(S, {last})")),
        graph(
            weights, f"{ROUTER}  S = onnxgen.MoE(x, w, i, W1, , W2)  {shared}  y = Add(S, {last})"
        ),
        "swiglu",
    )


@pytest.mark.parametrize(
    "end", ["y = Mul(S, 2.5)", "y = Add(S, x)", "z = Mul(S, 0.3)  y = Add(x, z)"]
)
def test_scaling_and_the_residual_stay_outside(end: str) -> None:
    assert_mixture(
        graph(STACKS, batched(SWIGLU, end=end)),
        graph(STACKS, f"{ROUTER}  S = onnxgen.MoE(x, w, i, W1, , W2)  {end}"),
        "swiglu",
    )


# --- other ways for tokens to come to experts -------------------------------------------------------


def joined(parts: Sequence[str], op: str = "Add") -> str:
    """Names added up one by one, into y."""
    text, before = "", parts[0]
    for number, part in enumerate(parts[1:]):
        name = "y" if number == len(parts) - 2 else f"sum{number}"
        text += f"  {name} = {op}({before}, {part})"
        before = name
    return text


def stack_of(count: int, prefix: str, shape: tuple[int, ...]) -> Array:
    return np.stack([weight(f"{prefix}{e}", shape) for e in range(count)]).astype(np.float32)


def expert(e: int, rows: str, *, gated: bool = True, bias: bool = False) -> str:
    """One expert with weights of its own, [K,N]: rows -> o{e}."""
    if gated:
        hidden = (
            f"h{e} = MatMul({rows}, U{e})  s{e} = Sigmoid(h{e})  q{e} = Mul(h{e}, s{e})"
            f"  k{e} = MatMul({rows}, V{e})  m{e} = Mul(q{e}, k{e})"
        )
    elif bias:
        hidden = f"f{e} = MatMul({rows}, U{e})  h{e} = Add(f{e}, A{e})  m{e} = Relu(h{e})"
    else:
        hidden = f"h{e} = MatMul({rows}, U{e})  m{e} = Relu(h{e})"
    if bias:
        return f"{hidden}  n{e} = MatMul(m{e}, D{e})  o{e} = Add(n{e}, C{e})"
    return f"{hidden}  o{e} = MatMul(m{e}, D{e})"


def declared(count: int, *, gated: bool = True, bias: bool = False) -> str:
    said = [f"float[8,{count}] R"]
    for e in range(count):
        said += [f"float[8,6] U{e}", f"float[6,8] D{e}"]
        said += [f"float[8,6] V{e}"] if gated else []
        said += [f"float[6] A{e}", f"float[8] C{e}"] if bias else []
    return ", ".join(said)


def looped(
    count: int,
    *,
    gated: bool = True,
    bias: bool = False,
    numbers: Sequence[int] | None = None,
    weights: Callable[[int, str], str] = lambda e, text: text,
) -> str:
    """Each expert picks its tokens by NonZero and adds to the sum."""
    text = f"{ROUTER}  shape = Shape(x)  acc0 = ConstantOfShape(shape)"
    for e in range(count):
        number = e if numbers is None else numbers[e]
        end = "y" if e == count - 1 else f"acc{e + 1}"
        text += (
            f"  z{e} = Equal(i, {number})  nz{e} = NonZero(z{e})  t{e} = Gather(nz{e}, 0)"
            f"  x{e} = Gather(x, t{e})"
            f"  {weights(e, expert(e, f'x{e}', gated=gated, bias=bias))}"
            f"  at{e} = Transpose(nz{e})  w{e} = GatherND(w, at{e})  u{e} = Unsqueeze(w{e}, [1])"
            f"  v{e} = Mul(o{e}, u{e})  p{e} = Unsqueeze(t{e}, [1])"
            f'  {end} = ScatterND<reduction = "add">(acc{e}, p{e}, v{e})'
        )
    return text


def stacked(count: int, *, gated: bool, bias: bool) -> tuple[dict[str, Array], str, str]:
    """(stacks, how they are declared, the call) of experts with weights of their own."""
    shapes = {"U": (8, 6), "A": (6,), "D": (6, 8), "C": (8,), "V": (8, 6)}
    kept = [name for name in shapes if name in "UD" + "V" * gated + "AC" * bias]
    held = {name: stack_of(count, name, shapes[name]) for name in kept}
    said = ", ".join(
        f"float[{','.join(map(str, array.shape))}] {name}" for name, array in held.items()
    )
    names = [name if name in held else "" for name in ("U", "A", "D", "C", "", "V")]
    inputs = f"x, w, i, {names[0]}, {names[1]}, {names[2]}, {names[3]}, {names[5]}"
    return held, f"float[8,{count}] R, {said}", f"onnxgen.MoE({inputs.rstrip(', ')})"


KINDS = [("relu", False, False), ("relu", False, True), ("swiglu", True, False)]


@pytest.mark.parametrize(("name", "gated", "bias"), KINDS)
def test_a_loop_over_experts(name: str, gated: bool, bias: bool) -> None:
    held, said, call = stacked(3, gated=gated, bias=bias)
    parts = ["fc1t", "fc2t", *["bias1", "bias2"] * bias, *["separate"] * gated]
    assert_mixture(
        graph(declared(3, gated=gated, bias=bias), looped(3, gated=gated, bias=bias)),
        graph(said, f"{ROUTER}  y = {call}"),
        "_".join([name, *parts]),
        weights=held,
    )


def dense(count: int, *, gated: bool, bias: bool) -> str:
    """All experts on all tokens, each weighed by its column."""
    text = (
        f"{ROUTER}  sl = Shape(l)  zeros = ConstantOfShape(sl)"
        "  full = ScatterElements<axis = 1>(zeros, i, w)"
    )
    for e in range(count):
        text += (
            f"  {expert(e, 'x', gated=gated, bias=bias)}"
            f"  c{e} = Slice(full, [{e}], [{e + 1}], [1])  v{e} = Mul(o{e}, c{e})"
        )
    return text + joined([f"v{e}" for e in range(count)])


@pytest.mark.parametrize(("name", "gated", "bias"), KINDS)
def test_all_experts_and_a_mask(name: str, gated: bool, bias: bool) -> None:
    held, said, call = stacked(3, gated=gated, bias=bias)
    parts = ["fc1t", "fc2t", *["bias1", "bias2"] * bias, *["separate"] * gated]
    assert_mixture(
        graph(declared(3, gated=gated, bias=bias), dense(3, gated=gated, bias=bias)),
        graph(said, f"{ROUTER}  y = {call}"),
        "_".join([name, *parts]),
        weights=held,
    )


BMM = (
    "sl = Shape(l)  zeros = ConstantOfShape(sl)  full = ScatterElements<axis = 1>(zeros, i, w)"
    "  x3 = Unsqueeze(x, [0])  h = MatMul(x3, W1)"
    f"  {SWIGLU}  d = MatMul(m, W2)  ft = Transpose<perm = [1, 0]>(full)"
    "  fu = Unsqueeze(ft, [2])  v_ = Mul(d, fu)  y = ReduceSum<keepdims = 0>(v_, [0])"
)


def test_one_product_over_all_experts() -> None:
    weights = "float[8,5] R, float[5,8,12] W1, float[5,6,8] W2"
    after = graph(weights, f"{ROUTER}  y = onnxgen.MoE(x, w, i, W1, , W2)")
    assert_mixture(graph(weights, f"{ROUTER}  {BMM}"), after, "swiglu_fc1t_fc2t")


def grouped(count: int, *, gated: bool, bias: bool) -> str:
    """Rows sorted by expert, cut apart, joined, and put back."""
    text = (
        f"{ROUTER}  flat = Reshape(i, [-1])  n = Shape(flat)"
        "  sorted, order = TopK<largest = 0>(flat, n)  tok = Div(order, 2)  xs = Gather(x, tok)"
        f"  hot = OneHot<axis = -1>(flat, {count}, [0, 1])"
        "  counts = ReduceSum<keepdims = 0>(hot, [0])  ends = CumSum(counts, 0)"
        "  starts = Sub(ends, counts)"
    )
    for e in range(count):
        text += (
            f"  b{e} = Slice(starts, [{e}], [{e + 1}])  e{e} = Slice(ends, [{e}], [{e + 1}])"
            f"  x{e} = Slice(xs, b{e}, e{e}, [0])  {expert(e, f'x{e}', gated=gated, bias=bias)}"
        )
    outputs = ", ".join(f"o{e}" for e in range(count))
    return text + (
        f"  all = Concat<axis = 0>({outputs})  fw = Reshape(w, [-1])  sw = Gather(fw, order)"
        "  su = Unsqueeze(sw, [1])  weighed = Mul(all, su)"
        "  so, back = TopK<largest = 0>(order, n)  put = Gather(weighed, back)"
        "  three = Reshape(put, [-1, 2, 8])  y = ReduceSum<keepdims = 0>(three, [1])"
    )


@pytest.mark.parametrize(("name", "gated", "bias"), KINDS)
def test_rows_sorted_by_expert(name: str, gated: bool, bias: bool) -> None:
    held, said, call = stacked(3, gated=gated, bias=bias)
    parts = ["fc1t", "fc2t", *["bias1", "bias2"] * bias, *["separate"] * gated]
    before = graph(declared(3, gated=gated, bias=bias), grouped(3, gated=gated, bias=bias))
    after = graph(said, f"{ROUTER}  y = {call}")
    assert_mixture(before, after, "_".join([name, *parts]), weights=held)


def test_experts_with_the_same_weights() -> None:
    """Two of three are one initializer."""
    text = looped(3, gated=False).replace("U2)", "U0)").replace("D2)", "D0)")
    weights = declared(3, gated=False).replace(", float[8,6] U2, float[6,8] D2", "")
    held = {
        name: np.stack([weight(f"{name}{e}", shape) for e in (0, 1, 0)]).astype(np.float32)
        for name, shape in (("U", (8, 6)), ("D", (6, 8)))
    }
    said = "float[8,3] R, float[3,8,6] U, float[3,6,8] D"
    after = graph(said, f"{ROUTER}  y = onnxgen.MoE(x, w, i, U, , D)")
    assert_mixture(graph(weights, text), after, "relu_fc1t_fc2t", weights=held)


# --- declines ---------------------------------------------------------------------------------------


def kept(before: str, code: str) -> Decline:
    """What MOE001 keeps, alone: MOE002 takes the products of some."""
    return assert_kept(before, "MOE001", code, lengths=LENGTHS, disabled=frozenset({"MOE002"}))


def test_experts_that_compute_something_else_are_kept() -> None:
    assert "a" in kept(graph(PLAIN, batched("m = Softmax(h)")), "experts").reason


def test_experts_with_different_activations_are_kept() -> None:
    text = looped(3, gated=False).replace("m1 = Relu(h1)", "m1 = Tanh(h1)")
    assert "different activations" in kept(graph(declared(3, gated=False), text), "experts").reason


def test_an_activation_of_a_part_of_the_features_is_kept() -> None:
    act = "m = Slice(h, [0], [6], [2])"
    kept(graph(STACKS, batched(act)), "experts")


def test_features_in_an_order_of_their_own_are_kept() -> None:
    act = "a = Slice(h, [0], [4], [2])  b = Slice(h, [4], [8], [2])  m = Mul(a, b)"
    weights = "float[8,5] R, float[5,12,8] W1, float[5,8,4] W2"
    kept(graph(weights, batched(act)), "experts")


def test_a_bias_of_one_of_two_features_is_kept() -> None:
    weights = f"{PLAIN}, float[5,6,8] W3, float[5,6] B1"
    act = (
        "g3 = Gather(W3, i)  k4 = MatMul(g3, c)  k = Squeeze(k4, [3])"
        "  s_ = Sigmoid(h)  q = Mul(h, s_)  m = Mul(q, k)"
    )
    kept(graph(weights, batched(act, bias=("B1",))), "experts")


TWICE = "f = Unsqueeze(e, [2, 3])"


def weighed_twice(router: str) -> str:
    """By one number what comes in, by another what goes out."""
    text = turned_rows(batched(SWIGLU, router=router))
    return text.replace("h4 = MatMul(c, g)", "cw = Mul(c, f)  h4 = MatMul(cw, g)")


@pytest.mark.parametrize("other", ["l2", "x"])
def test_two_weights_for_a_choice_are_kept(other: str) -> None:
    """Picked from other numbers of the same experts, or computed from the token itself."""
    weights = f"{TURNED}, float[8,{5 if other == 'l2' else 2}] R2"
    made = "e = GatherElements<axis = 1>(l2, i)" if other == "l2" else "e = Sigmoid(l2)"
    router = f"{ROUTER}  l2 = MatMul(x, R2)  {made}  {TWICE}"
    kept(graph(weights, weighed_twice(router)), "routing")


def test_weights_that_lie_in_different_ways_are_kept() -> None:
    def turned(e: int, text: str) -> str:
        return (
            text.replace(f"MatMul(x{e}, U{e})", f"Gemm<transB = 1>(x{e}, U{e})") if e == 1 else text
        )

    weights = declared(3, gated=False).replace("float[8,6] U1", "float[6,8] U1")
    result = raised(graph(weights, looped(3, gated=False, weights=turned)), lengths=LENGTHS)
    (site,) = result.sites
    if site.status == "kept":
        assert site.decline is not None
        assert site.decline.code == "layout"


def test_experts_have_the_numbers_that_indices_are_compared_with() -> None:
    """Weights of their own, written in the order 2, 0, 1."""
    text = looped(3, gated=False, numbers=(2, 0, 1))
    result = raised(graph(declared(3, gated=False), text), lengths=LENGTHS)
    assert [site.status for site in result.sites] == ["fused"]


def test_products_of_experts_that_are_none_are_grouped() -> None:
    """A Softmax between two products is no activation, but they are products of chosen matrices."""
    result = raised(graph(PLAIN, batched("m = Softmax(h)")), lengths=LENGTHS)
    assert [(site.rule, site.status) for site in result.sites] == [("MOE002", "fused")] * 2
    ops = [node.op_type for node in result.after.graph.node]
    assert ops.count("GroupedMatMul") == 2
    assert "GatherND" not in ops


# --- no mixtures ------------------------------------------------------------------------------------


def test_sampling_is_no_mixture() -> None:
    assert_untouched(
        "(float[t,8] x) => (float[t,4] y, int64[t,4] i) <float[8,11] W>"
        "{ l = MatMul(x, W)  v, i = TopK(l, [4])  y = Softmax(v) }"
    )


def test_embeddings_of_the_likeliest_are_no_mixture() -> None:
    assert_untouched(
        "(float[t,8] x) => (float[t,6] y) <float[8,11] W, float[11,8] E, float[8,6] P>"
        "{ l = MatMul(x, W)  v, i = TopK(l, [4])  w = Softmax(v)  g = Gather(E, i)"
        "  u = Unsqueeze(w, [2])  m = Mul(g, u)  s = ReduceSum<keepdims = 0>(m, [1])"
        "  y = MatMul(s, P) }"
    )


def test_rows_that_are_chosen_are_no_mixture() -> None:
    """The best boxes of an image go through two layers, weighed by how good they are."""
    assert_untouched(
        "(float[n,8] x) => (float[3,4] y) <float[8,1] W, float[8,6] U, float[6,4] D>"
        "{ l = MatMul(x, W)  f = Reshape(l, [-1])  v, i = TopK(f, [3])  g = Gather(x, i)"
        "  h = MatMul(g, U)  m = Relu(h)  o = MatMul(m, D)  s = Sigmoid(v)"
        "  u = Unsqueeze(s, [1])  y = Mul(o, u) }"
    )
