"""What these tests found wrong: each fails until it is mended."""

from __future__ import annotations

import onnx_ir as ir

from onnxgen.analysis.roles import find_roles
from tests import test_attention as attention
from tests.graphs import assert_raised, facts_of, parse


def test_a_float_input_of_four_axes_has_roles() -> None:
    """`find_roles` raises ValueError: three letters for an input of four axes."""
    model = ir.from_proto(
        parse(
            "(float[b,s,6,20] x) => (float[b,6,s,20] y)"
            "{ q = Mul(x, x)  m = ReduceMean(q, [-1])  r = Sqrt(m)  n = Div(x, r)"
            "  y = Transpose<perm = [0, 2, 1, 3]>(n) }"
        )
    )
    assert len(find_roles(model).inputs["x"].axes) == 4


def test_a_reshape_of_something_unknown_keeps_sizes() -> None:
    """0 keeps the size; of a tensor whose shape is unknown the size is unknown, not 0."""
    facts, values = facts_of(
        "(float[m,s,120] z, bool[m] k) => (float[u,6,s,20] y)"
        "{ x = Compress<axis = 0>(z, k)  y = Reshape(x, [0, 0, 6, 20]) }"
    )
    shape = facts.shapes.of(values["y"])
    assert shape is not None
    assert shape[0] != 0
    assert shape[1] != 0


def test_an_additive_mask_that_is_fed_is_a_mask() -> None:
    """A float input [B, 1, S, T] counts as an activation, so ATT001 declines with `scores`."""
    text = attention.block(
        signature=attention.SIGNATURE.replace("int64[b,t] attention_mask", "float[b,1,s,t] bias"),
        keep="",
        masked="s2 = Add(s1, bias)",
    )
    assert_raised(text, None, "ATT001")


def test_a_mask_that_is_read_for_its_length_has_its_role() -> None:
    """Its role is `unknown`, its length is drawn freely, and the rewrite is undone for that."""
    assert_raised(attention.block(masked="s2 = Where(causal, s1, -inf)"), None, "ATT001")
