"""Which parts of a model are given to backends, and that each can be run in one piece."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx
import onnx_ir as ir
import pytest

from onnxgen.analysis.regions import find_regions
from onnxgen.analysis.scopes import SCOPES
from onnxgen.errors import UsageError
from tests.regions import model_of, places_of

# --- everything ---------------------------------------------------------------------------------


def test_all_is_every_node_in_one_piece() -> None:
    model = model_of(
        "(float[b,4] x) => (float[b,4] y, float[b,4] z, float k) <float[4,4] w>"
        "{ a = MatMul(x, w)  c = Constant<value = float {2.0}>()  y = Mul(a, c)  z = Exp(x)"
        "  d = Constant<value = float {3.0}>()  k = Neg(d) }"
    )
    assert places_of(model, "all") == {"all": "a c y z d k"}


def test_a_graph_without_nodes_has_no_place() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["": 20]> g (float[2] x) => (float[2] x) {}'
        )
    )
    assert find_regions(model, "all") == []
    assert find_regions(model, "attention") == []
    with pytest.raises(UsageError, match="none has one, nor a name"):
        find_regions(model, "layers")


def test_what_is_constant_alone_is_given_to_nobody() -> None:
    model = model_of(
        "(float[2] x) => (float[2] y, float y2)"
        "{ c = Constant<value = float {2.0}>()  y2 = Exp(c)  y = RandomNormalLike(x) }"
    )
    assert places_of(model, "all") == {}


def test_random_numbers_are_drawn_by_the_runtime() -> None:
    model = model_of(
        "(float[b,4] x) => (float[b,4] y)"
        "{ a = Exp(x)  noise = RandomNormalLike(a)  y = Add(a, noise) }"
    )
    assert places_of(model, "all") == {"all#1": "a", "all#2": "y"}


def test_random_numbers_within_a_function_or_a_branch() -> None:
    text = """<ir_version: 10, opset_import: ["": 20, "own": 1]>
        g (float[b,4] x, bool t) => (float[b,4] y) {
          a = Exp(x)
          n = own.noise(a)
          i = If(t) <
            then_branch = g1 () => (float[b,4] p) { p = RandomUniformLike(a) },
            else_branch = g2 () => (float[b,4] q) { q = Neg(a) }>
          s = Add(n, i)
          y = Sub(s, a)
        }
        <domain: "own", opset_import: ["": 20]> noise (u) => (v) { v = RandomNormalLike(u) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert places_of(model, "all") == {"all#1": "a", "all#2": "s y"}


def test_sequences_and_strings_stay_outside() -> None:
    model = model_of(
        "(float[b,4] x, string[b] s) => (float[b,8] y, string[b] t)"
        "{ a = Exp(x)  l = SequenceConstruct(a, a)  j = ConcatFromSequence<axis = 1>(l)"
        "  k = Identity(j)  y = Add(k, k)  t = Identity(s) }"
    )
    assert places_of(model, "all") == {"all#1": "a", "all#2": "k y"}


# --- module paths -------------------------------------------------------------------------------

CHAIN = (
    "(float[b,4] x) => (float[b,4] e) { a = Exp(x) m = Neg(a) c = Abs(m) d = Sin(c) e = Cos(d) }"
)


def test_a_place_for_every_path_up_to_the_match() -> None:
    model = model_of(
        CHAIN, {"m.layers.0.attn": "a", "m.layers.0.mlp": "m", "m.layers.1.mlp": "c d"}
    )
    assert places_of(model, r"layers\.\d+") == {"m.layers.0": "a m", "m.layers.1": "c d"}
    assert places_of(model, "mlp") == {"m.layers.0.mlp": "m", "m.layers.1.mlp": "c d"}
    assert places_of(model, "^m") == {"m": "a m c d"}


def test_a_number_counts_as_a_whole() -> None:
    model = model_of(CHAIN, {"layers.1": "a", "layers.10": "c", "layers.11": "d"})
    expected = {"layers.1": "a", "layers.10": "c", "layers.11": "d"}
    assert places_of(model, r"layers\.1") == places_of(model, r"layers\.\d") == expected


def test_names_where_there_are_no_paths() -> None:
    model = model_of(CHAIN)
    for node, name in zip(model.graph, ("L0_a", "L0_b", "L1_a", "/m/L1/Sin", "out"), strict=True):
        node.name = name
    assert places_of(model, r"L\d") == {"L0": "a m", "L1": "c", "m.L1": "d"}


def test_dynamo_paths_are_those_of_modules() -> None:
    model = model_of(CHAIN)
    for node in model.graph:
        node.metadata_props[SCOPES] = "['', 'm', 'm.layers.3', 'node_exp']"
    assert places_of(model, r"layers\.\d+") == {"m.layers.3": "a m c d e"}
    with pytest.raises(UsageError):
        find_regions(model, "node_exp")


@pytest.mark.parametrize(
    ("which", "said"),
    [
        ("layers(", "'layers(' is no regular expression: "),
        (
            "experts",
            "'experts' is found in no node's module path, which are such as 'm.layers.0', ",
        ),
        ("x*", "'x*' is found in no node's module path"),  # nothing was found, everywhere
        ("", "'' is found in no node's module path"),
    ],
)
def test_what_cannot_be_looked_for(which: str, said: str) -> None:
    model = model_of(CHAIN, {"m.layers.0": "a m", "m.layers.1": "c d"})
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        find_regions(model, which)
    assert "\n" not in str(caught.value)


# --- one piece ----------------------------------------------------------------------------------


def test_what_lies_between_is_taken_in() -> None:
    model = model_of(CHAIN, {"p": "a d"})
    assert places_of(model, "p") == {"p": "a m c d"}


def test_what_another_place_reads_is_not_taken_in() -> None:
    text = (
        "(float[b,4] x) => (float[b,4] d, float[b,4] o)"
        "{ a = Exp(x) m = Neg(a) c = Abs(m) d = Add(c, a) o = Sin(m) }"
    )
    assert places_of(model_of(text, {"p": "a d", "q": "c"}), "p|q") == {
        "p#1": "a",
        "q": "c",
        "p#2": "d",
    }
    assert places_of(model_of(text, {"p": "a d", "q": "o"}), "p|q") == {
        "p#1": "a",
        "p#2": "d",
        "q": "o",
    }
    assert places_of(model_of(text, {"p": "a d"}), "p|q") == {"p": "a m c d"}


def test_what_no_backend_can_do_is_not_taken_in() -> None:
    model = model_of(
        "(float[b,4] x) => (float[b,4] y) { a = Exp(x) r = RandomNormalLike(a) y = Add(a, r) }",
        {"p": "a y"},
    )
    assert places_of(model, "p") == {"p#1": "a", "p#2": "y"}


def test_places_that_wait_for_one_another_are_cut() -> None:
    model = model_of(
        "(float[b,4] x, float[b,4] z) => (float[b,4] a3, float[b,4] b2)"
        "{ a1 = Exp(x) b1 = Sin(z) a2 = Add(b1, x) b2 = Add(a1, z) a3 = Neg(a2) }",
        {"p": "a1 a2 a3", "q": "b1 b2"},
    )
    assert places_of(model, "p|q") == {"p#1": "a1", "q": "b1 b2", "p#2": "a2 a3"}


def test_what_is_its_own_hindrance_is_cut_and_no_other() -> None:
    model = model_of(
        "(float[b,4] x) => (float[b,4] r0, float[b,4] h2)"
        "{ r0 = Exp(x) h1 = Sin(x) r1 = Neg(h1) h2 = Abs(r1) }",
        {"r": "r0 r1", "h": "h1 h2"},
    )
    assert places_of(model, "r|h") == {"r": "r0 r1", "h#1": "h1", "h#2": "h2"}


def test_three_places_that_wait_in_a_ring() -> None:
    model = model_of(
        "(float[b,4] x) => (float[b,4] a2, float[b,4] b2, float[b,4] c2)"
        "{ a1 = Exp(x) b1 = Sin(x) c1 = Cos(x) a2 = Neg(c1) b2 = Neg(a1) c2 = Neg(b1) }",
        {"p": "a1 a2", "q": "b1 b2", "r": "c1 c2"},
    )
    assert places_of(model, "[pqr]") == {
        "p#1": "a1",
        "q": "b1 b2",
        "r": "c1 c2",
        "p#2": "a2",
    }


def test_names_of_pieces_are_nobody_elses() -> None:
    model = model_of(
        "(float[b,4] x) => (float[b,4] y){ a = Exp(x) r = RandomNormalLike(a) y = Add(a, r) }",
        {"p": "a y"},
    )
    next(iter(model.graph)).metadata_props[SCOPES] = "p"
    more = ir.node("Neg", [model.graph.inputs[0]], metadata_props={SCOPES: "p#1"})
    more.outputs[0].name, more.outputs[0].type = "n", ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(more)
    model.graph.outputs.append(more.outputs[0])
    assert places_of(model, r"p(#\d)?") == {"p#1#": "a", "p#2": "y", "p#1": "n"}


def test_what_a_branch_captures_is_an_input() -> None:
    def branching(paths: Mapping[str, str]) -> ir.Model:
        return model_of(
            "(float[b,4] x, bool t) => (float[b,4] y) {"
            "  a = Exp(x)"
            "  i = If<then_branch = g1 () => (float[b,4] p) { p = Neg(a) },"
            "         else_branch = g2 () => (float[b,4] q) { q = Abs(a) }>(t)"
            "  y = Sin(i) }",
            paths,
        )

    assert places_of(branching({"p": "a y"}), "p|q") == {"p": "a i y"}
    assert places_of(branching({"p": "a y", "q": "i"}), "p|q") == {"p#1": "a", "q": "i", "p#2": "y"}


def test_constants_go_where_they_alone_are_read() -> None:
    text = (
        "(float[b,4] x) => (float[b,4] y, float[b,4] z) {"
        "  one = Constant<value = float {1.0}>()  two = Constant<value = float {2.0}>()"
        "  four = Mul(two, two)  both = Constant<value = float {3.0}>()"
        "  a = Add(x, one)  y = Mul(a, both)  b = Sub(x, four)  z = Mul(b, both) }"
    )
    model = model_of(text, {"p": "a y both four", "q": "b z one"})
    assert places_of(model, "p|q") == {"p": "one a y", "q": "two four b z"}


def test_what_nobody_reads_is_dropped() -> None:
    model = model_of(
        "(float[b,4] x) => (float[b,4] y)"
        "{ c = Constant<value = float {1.0}>()  d = Neg(x)  e = Add(d, c)  y = Exp(x) }",
        {"dead": "d e", "live": "y"},
    )
    assert places_of(model, "dead|live") == {"live": "y"}
    assert places_of(model, "dead") == {}


def test_nodes_in_any_order() -> None:
    model = model_of(CHAIN, {"p": "a c", "q": "d e"})
    nodes = list(model.graph)
    model.graph.remove(nodes)
    model.graph.extend(reversed(nodes))
    assert places_of(model, "p|q") == {"q": "e d", "p": "c m a"}
