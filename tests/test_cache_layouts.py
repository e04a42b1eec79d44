"""Caches in every layout move into the node, or attention says that they lie outside."""

from __future__ import annotations

import pytest

from tests import test_attention as attention
from tests.graphs import Raised, assert_raised, raised

BPKD = attention.SIGNATURE.replace("[b,3,p,20]", "[b,p,K,20]").replace("[b,3,t,20]", "[b,t,K,20]")
JOINED = (
    "present_k = Concat<axis = 1>(past_k, k3)  present_v = Concat<axis = 1>(past_v, v3)"
    "  kc = Transpose<perm = [0, 2, 1, 3]>(present_k)"
    "  vc = Transpose<perm = [0, 2, 1, 3]>(present_v)"
)


def test_a_head_for_each_and_heads_behind_the_sequence() -> None:
    """The Transpose of the old present that is made on the way is given up, and is no cycle."""
    result = assert_raised(
        attention.block(
            signature=BPKD.replace("K", "6").replace("50,60]", "50,120]"),
            projected=attention.PROJECTED.replace("[0, 0, 3, 20]", "[0, 0, 6, 20]"),
            cached=JOINED,
            repeated="kr = Identity(kc)  vr = Identity(vc)",
        ),
        None,
        "ATT001",
    )
    assert result.sites[0].details["cache"] == "concatenated"


def test_one_key_head_behind_the_sequence() -> None:
    """An axis of size 1 is transposed like any other, so that the cache is seen behind it."""
    result = assert_raised(
        attention.block(
            signature=BPKD.replace("K", "1").replace("50,60]", "50,20]"),
            projected=attention.PROJECTED.replace("[0, 0, 3, 20]", "[0, 0, 1, 20]"),
            cached=JOINED,
            repeated="kr = Identity(kc)  vr = Identity(vc)",
        ),
        None,
        "ATT001",
    )
    assert result.sites[0].details["cache"] == "concatenated"


def cache(result: Raised) -> str:
    (site,) = [site for site in result.sites if site.kind == "attention"]
    assert site.status == "fused", site.decline
    return str(site.details["cache"])


def test_keys_that_lie_transposed() -> None:
    """[B, K, D, P]: as the product with the queries takes them."""
    signature = attention.SIGNATURE.replace("[b,3,p,20] past_k", "[b,3,20,p] past_k")
    result = assert_raised(
        attention.block(
            signature=signature.replace("[b,3,t,20] present_k", "[b,3,20,t] present_k"),
            projected=attention.PROJECTED.replace(
                "k = Transpose<perm = [0, 2, 1, 3]>(k3)", "k = Transpose<perm = [0, 2, 3, 1]>(k3)"
            ),
            cached=attention.CACHED.replace(
                "present_k = Concat<axis = 2>", "present_k = Concat<axis = 3>"
            ),
            repeated=attention.REPEATED.replace(
                "kr = Reshape(ke, [0, 6, -1, 20])", "kt = Reshape(ke, [0, 6, 20, -1])"
            ),
            scaled="s0 = MatMul(q, kt)  s1 = Mul(s0, 0.2236068)",
        ),
        None,
        "ATT001",
    )
    assert cache(result) == "concatenated"


STACKED = (
    "(int64[b,s] ids, int64[b,t] attention_mask, float[2,b,3,p,20] past)"
    f" => (float[b,s,50] y, float[2,b,3,t,20] present) {attention.WEIGHTS}"
)
TOGETHER = (
    "kc = Concat<axis = 2>(pk, k)  vc = Concat<axis = 2>(pv, v)  ku0 = Unsqueeze(kc, [0])"
    "  vu0 = Unsqueeze(vc, [0])"
)


def test_keys_and_values_stacked_in_one_tensor() -> None:
    """[2, B, K, P, D] for a layer, as gpt2's first exports were."""
    cached = (
        "pk = Gather<axis = 0>(past, 0)  pv = Gather<axis = 0>(past, 1)"
        f"  {TOGETHER}  present = Concat<axis = 0>(ku0, vu0)"
    )
    result = assert_raised(attention.block(signature=STACKED, cached=cached), None, "ATT001")
    assert cache(result) == "concatenated"
    assert result.count("Concat") == 1  # of the two presents


def test_every_layer_in_one_tensor() -> None:
    """[L, 2, B, K, P, D]."""
    signature = STACKED.replace("[2,b", "[1,2,b")
    cached = (
        "layer = Gather<axis = 0>(past, 0)  p0, p1 = Split<axis = 0, num_outputs = 2>(layer)"
        f"  pk = Squeeze(p0, [0])  pv = Squeeze(p1, [0])  {TOGETHER}"
        "  both = Concat<axis = 0>(ku0, vu0)  present = Unsqueeze(both, [0])"
    )
    result = assert_raised(attention.block(signature=signature, cached=cached), None, "ATT001")
    assert cache(result) == "concatenated"


def test_keys_and_values_side_by_side_stay_outside() -> None:
    """[B, K, P, 2 D] is neither a past key nor a past value."""
    signature = (
        "(int64[b,s] ids, int64[b,t] attention_mask, float[b,3,p,40] past)"
        f" => (float[b,s,50] y, float[b,3,t,40] present) {attention.WEIGHTS}"
    )
    cached = (
        "kv = Concat<axis = 3>(k, v)  present = Concat<axis = 2>(past, kv)"
        "  kc, vc = Split<axis = 3, num_outputs = 2>(present)"
    )
    result = assert_raised(attention.block(signature=signature, cached=cached), None, "ATT001")
    assert cache(result) == "outside"


CODED = attention.SIGNATURE.replace("float[b,3,p,20]", "int8[b,3,p,20]").replace(
    "<float[37,50] table", "<int8 zero, float[37,50] table"
)


def test_a_quantized_cache_stays_as_it_is() -> None:
    """Old and new rows are joined as int8; keys and values are given to the node in full."""
    cached = (
        "kq = QuantizeLinear(k, 0.05, zero)  vq = QuantizeLinear(v, 0.05, zero)"
        "  present_k = Concat<axis = 2>(past_k, kq)  present_v = Concat<axis = 2>(past_v, vq)"
        "  kc = DequantizeLinear(present_k, 0.05, zero)"
        "  vc = DequantizeLinear(present_v, 0.05, zero)"
    )
    signature = CODED.replace("float[b,3,t,20]", "int8[b,3,t,20]")
    result = assert_raised(attention.block(signature=signature, cached=cached), None, "ATT001")
    assert cache(result) == "outside"
    assert result.count("QuantizeLinear") == 2


def test_a_cache_that_is_dequantized_first_moves_into_the_node() -> None:
    cached = (
        "dk = DequantizeLinear(past_k, 0.05, zero)  dv = DequantizeLinear(past_v, 0.05, zero)"
        "  present_k = Concat<axis = 2>(dk, k)  present_v = Concat<axis = 2>(dv, v)"
        "  kc = Identity(present_k)  vc = Identity(present_v)"
    )
    result = assert_raised(attention.block(signature=CODED, cached=cached), None, "ATT001")
    assert cache(result) == "concatenated"


def test_a_cache_of_another_type_stays_outside() -> None:
    """The operator's past has the type of its keys."""
    signature = attention.SIGNATURE.replace("float[b,3,", "float16[b,3,")
    cached = (
        "kh = Cast<to = 10>(k)  vh = Cast<to = 10>(v)  present_k = Concat<axis = 2>(past_k, kh)"
        "  present_v = Concat<axis = 2>(past_v, vh)  kc = Cast<to = 1>(present_k)"
        "  vc = Cast<to = 1>(present_v)"
    )
    result = assert_raised(attention.block(signature=signature, cached=cached), None, "ATT001")
    assert cache(result) == "outside"


def test_no_cache_is_none() -> None:
    signature = attention.SIGNATURE.replace(", float[b,3,p,20] past_k, float[b,3,p,20] past_v", "")
    signature = signature.replace("int64[b,t]", "int64[b,s]")
    cached = "kc = Identity(k)  vc = Identity(v)"
    signature = signature.replace(", float[b,3,t,20] present_k, float[b,3,t,20] present_v", "")
    result = assert_raised(attention.block(signature=signature, cached=cached), None, "ATT001")
    assert cache(result) == "none"


# --- layers that share a cache -----------------------------------------------------------------------

AGAIN = (
    "qp2 = MatMul(y1, wq2)  q32 = Reshape(qp2, [0, 0, 6, 20])"
    "  q2 = Transpose<perm = [0, 2, 1, 3]>(q32)  z0 = MatMul(q2, kt)  z1 = Mul(z0, 0.2236068)"
    "  z2 = Where(keep, z1, -inf)  z3 = Softmax<axis = -1>(z2)  z4 = MatMul(z3, vr)"
    "  z5 = Transpose<perm = [0, 2, 1, 3]>(z4)  z6 = Reshape(z5, [0, 0, 120])"
    "  z7 = MatMul(z6, wo2)  y = Add(y1, z7)"
)


@pytest.mark.parametrize("repeats", ["shared", "its own"])
def test_layers_that_share_a_cache(repeats: str) -> None:
    """The first layer takes it inside; the others read its present, under the same mask."""
    again = AGAIN
    if repeats == "its own":
        own = (
            "ku2 = Unsqueeze(kc, [2])  ke2 = Expand(ku2, [1, 1, 2, 1, 1])"
            "  kr2 = Reshape(ke2, [0, 6, -1, 20])  kt2 = Transpose<perm = [0, 1, 3, 2]>(kr2)  "
        )
        again = own + AGAIN.replace("MatMul(q2, kt)", "MatMul(q2, kt2)")
    signature = attention.SIGNATURE.replace("wo>", "wo, float[50,120] wq2, float[120,50] wo2>")
    values = f"{attention.VALUES.replace('y = MatMul', 'y1 = MatMul')}  {again}"
    text = attention.block(signature=signature, values=values)
    result = raised(text)
    assert [(site.status, site.details["cache"]) for site in result.sites] == [
        ("fused", "concatenated"),
        ("fused", "shared"),
    ]
    first, second = [node for node in result.after.graph.node if node.op_type == "Attention"]
    assert list(first.input[4:]) == ["past_k", "past_v"]
    assert list(first.output[1:]) == list(second.input[1:3]) == ["present_k", "present_v"]
    assert len(second.input) == 4
    assert len(second.output) == 1
