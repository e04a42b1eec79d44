"""What these tests found wrong: each fails until it is mended."""

from __future__ import annotations

from tests import test_attention as attention
from tests.graphs import assert_raised
from tests.test_normalize import assert_normal

BPKD = attention.SIGNATURE.replace("[b,3,p,20]", "[b,p,K,20]").replace("[b,3,t,20]", "[b,t,K,20]")
JOINED = (
    "present_k = Concat<axis = 1>(past_k, k3)  present_v = Concat<axis = 1>(past_v, v3)"
    "  kc = Transpose<perm = [0, 2, 1, 3]>(present_k)"
    "  vc = Transpose<perm = [0, 2, 1, 3]>(present_v)"
)


def test_a_head_for_each_and_heads_behind_the_sequence() -> None:
    """Declined as a cycle: the Transpose of the old present that was made on the way, and that
    nothing reads once the cache is inside, still counts as read by the rewrite."""
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
    """An axis of size 1 is reshaped away instead of transposed, so the cache is not seen."""
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


def test_unsqueezed_and_squeezed_is_nothing() -> None:
    """`passes/simplify.py` says so in its table, and has no rule for it."""
    signature = "(float[b,s,12] x) => (float[b,s,12] y)"
    assert_normal(
        f"{signature} {{ r = Relu(x)  a = Unsqueeze(r, [1])  h = Squeeze(a, [1])  y = Neg(h) }}",
        f"{signature} {{ r = Relu(x)  y = Neg(r) }}",
    )
