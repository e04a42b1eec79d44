"""Caches that lie [B, P, K, D], without and with one key head, move into the node."""

from __future__ import annotations

from tests import test_attention as attention
from tests.graphs import assert_raised

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
