"""The check of each rewrite: a rule that is broken on purpose is undone, and the graph unchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx
import onnx_ir as ir
import pytest

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.sampling import Sampler
from onnxgen.passes.rewriting import Rewriter
from onnxgen.passes.tidy import tidy
from onnxgen.patterns.attention import SoftmaxAttention
from onnxgen.patterns.building import Builder
from onnxgen.patterns.layer_norm import LayerNorm
from onnxgen.patterns.rms_norm import RMSNorm
from onnxgen.patterns.rotary import Rotary
from onnxgen.patterns.rule import Rewrite, Rule
from onnxgen.report.values import Site
from onnxgen.testing import corpus
from onnxgen.verify.rewrites import RewriteChecker
from tests.graphs import assert_same_graph, normalized, parse, runtime

NORM = (
    "(float[b,s,40] x) => (float[b,s,40] y) <float[40] w>"
    "{ q = Mul(x, x)  m = ReduceMean(q, [-1])  e = Add(m, 0.003)  r = Sqrt(e)  n = Div(x, r)"
    "  y = Mul(n, w) }"
)
LAYER = (
    "(float[b,s,40] x) => (float[b,s,40] y) <float[40] w, float[40] c>"
    "{ m = ReduceMean(x, [-1])  d = Sub(x, m)  q = Mul(d, d)  v = ReduceMean(q, [-1])"
    "  e = Add(v, 0.003)  r = Sqrt(e)  n = Div(d, r)  k = Mul(n, w)  y = Add(k, c) }"
)


def exported(name: str) -> onnx.ModelProto:
    (entry,) = corpus(name)
    return entry.load()


def broken(rule: type[Rule], change: Callable[[ir.Node], None]) -> Rule:
    """The rule, with something wrong about every node it makes in place of a site."""

    class Broken(rule):
        def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
            rewrite: Rewrite | None = super().rewrite(facts, builder, node)
            if rewrite is not None:
                change(rewrite.node)
            return rewrite

    return Broken()


def scaled(name: str, factor: float) -> Callable[[ir.Node], None]:
    def change(node: ir.Node) -> None:
        number = node.attributes[name].value * factor
        node.attributes[name] = ir.AttrFloat32(name, number)

    return change


def flipped(node: ir.Node) -> None:
    other = 1 - node.attributes["interleaved"].value
    node.attributes["interleaved"] = ir.AttrInt64("interleaved", other)


def swapped(first: int, second: int) -> Callable[[ir.Node], None]:
    def change(node: ir.Node) -> None:
        a, b = node.inputs[first], node.inputs[second]
        node.replace_input_with(first, b)
        node.replace_input_with(second, a)

    return change


def dropped(index: int) -> Callable[[ir.Node], None]:
    return lambda node: node.replace_input_with(index, None)


def other_axis(node: ir.Node) -> None:
    node.attributes["axis"] = ir.AttrInt64("axis", -2)


def causal(node: ir.Node) -> None:
    node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)


def capped(node: ir.Node) -> None:
    node.attributes["softcap"] = ir.AttrFloat32("softcap", 5.0)


def raised(proto: onnx.ModelProto, *rules: Rule) -> tuple[ir.Model, list[Site], RewriteChecker]:
    model, roles = normalized(proto)
    checker = RewriteChecker(runtime(), roles)
    rewriter = Rewriter(model, roles, Sampler(model.graph, roles, runtime()), checker)
    for rule in rules:
        rewriter.apply(rule)
    return model, rewriter.sites, checker


MUTATIONS: dict[str, tuple[str, type[Rule], Callable[[ir.Node], None]]] = {
    "rms-epsilon": (NORM, RMSNorm, scaled("epsilon", 1.5)),
    "rms-axis": (NORM.replace("40]", "3]").replace("b,s,3", "b,3,3"), RMSNorm, other_axis),
    "layer-epsilon": (LAYER, LayerNorm, scaled("epsilon", 2.0)),
    "layer-bias-dropped": (LAYER, LayerNorm, dropped(2)),
    "layer-weight-for-bias": (LAYER, LayerNorm, swapped(1, 2)),
    "rotary-interleaved": ("llama/dynamo20", Rotary, flipped),
    "rotary-cos-for-sin": ("llama/dynamo20", Rotary, swapped(1, 2)),
    "rotary-interleaved-torchscript": ("qwen3/torchscript", Rotary, flipped),
    "rotary-partial": ("gpt_neox/dynamo20", Rotary, swapped(1, 2)),
    "attention-scale": ("llama/dynamo20", SoftmaxAttention, scaled("scale", 1.01)),
    "attention-mask-dropped": ("llama/dynamo20", SoftmaxAttention, dropped(3)),
    "attention-window-dropped": ("mistral/dynamo20", SoftmaxAttention, dropped(3)),
    "attention-keys-for-values": ("llama/dynamo20", SoftmaxAttention, swapped(1, 2)),
    "attention-pasts-swapped": ("llama/dynamo20", SoftmaxAttention, swapped(4, 5)),
    "attention-capped": ("llama/dynamo20", SoftmaxAttention, capped),
    "attention-scale-torchscript": ("qwen2/torchscript", SoftmaxAttention, scaled("scale", 0.99)),
    "attention-scale-decode": ("llama/dynamo20-decode", SoftmaxAttention, scaled("scale", 1.01)),
    "attention-scale-static": (
        "llama/transformers-static",
        SoftmaxAttention,
        scaled("scale", 1.01),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_rule_is_undone(name: str) -> None:
    source, rule, change = MUTATIONS[name]
    proto = parse(source) if source.startswith("(") else exported(source)
    model, sites, checker = raised(proto, broken(rule, change))
    assert sites
    for site in sites:
        assert (site.status, site.rule) == ("undone", rule.code)
        assert site.decline is not None
        assert site.decline.code == "check-failed"
        assert "differs" in site.decline.reason or "fail" in site.decline.reason
    assert checker.rewrites == len(sites)
    plain, _ = normalized(proto)
    tidy(model)
    tidy(plain)
    assert_same_graph(ir.to_proto(model), ir.to_proto(plain))


@pytest.mark.parametrize("name", ["rms-epsilon", "layer-epsilon", "attention-scale"])
def test_unbroken_it_passes(name: str) -> None:
    source, rule, _ = MUTATIONS[name]
    proto = parse(source) if source.startswith("(") else exported(source)
    _, sites, checker = raised(proto, rule())
    assert {site.status for site in sites} == {"fused"}
    assert 0 <= checker.difference < 1e-5


def test_a_present_that_is_wrong_is_seen() -> None:
    """The output is right and what is stored for later is not."""

    class Stale(SoftmaxAttention):
        def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
            rewrite = super().rewrite(facts, builder, node)
            if rewrite is None:
                return None
            (y, keys, values) = rewrite.outputs
            swapped_keys = (keys[0], values[1])
            return Rewrite(rewrite.node, (y, swapped_keys, values), rewrite.details, rewrite.mask)

    _, sites, _ = raised(exported("llama/dynamo20"), Stale())
    assert {site.status for site in sites} == {"undone"}


def test_equal_structures_are_run_once() -> None:
    _, sites, checker = raised(exported("llama/dynamo20"), RMSNorm(), Rotary(), SoftmaxAttention())
    assert checker.rewrites == len(sites) == 11
    assert 0 < checker.structures < checker.rewrites


def test_many_equal_layers_cost_one_run() -> None:
    norms = "  ".join(
        f"q{i} = Mul(x{i}, x{i})  m{i} = ReduceMean(q{i}, [-1])  e{i} = Add(m{i}, 0.003)"
        f"  r{i} = Sqrt(e{i})  n{i} = Div(x{i}, r{i})  k{i} = Mul(n{i}, w{i})"
        f"  x{i + 1} = MatMul(k{i}, d{i})"
        for i in range(6)
    )
    weights = ", ".join(f"float[300] w{i}, float[300,300] d{i}" for i in range(6))
    text = f"(float[b,s,300] x0) => (float[b,s,300] x6) <{weights}> {{ {norms} }}"
    _, sites, checker = raised(parse(text), RMSNorm())
    assert [site.status for site in sites] == ["fused"] * 6
    assert (checker.rewrites, checker.structures) == (6, 1)


def test_another_epsilon_is_another_structure() -> None:
    norms = "  ".join(
        f"q{i} = Mul(x{i}, x{i})  m{i} = ReduceMean(q{i}, [-1])  e{i} = Add(m{i}, 0.00{i + 1})"
        f"  r{i} = Sqrt(e{i})  n{i} = Div(x{i}, r{i})  x{i + 1} = Mul(n{i}, w{i})"
        for i in range(3)
    )
    text = f"(float[b,s,300] x0) => (float[b,s,300] x3) <float[300] w0, float[300] w1, float[300] w2> {{ {norms} }}"
    _, sites, checker = raised(parse(text), RMSNorm())
    assert [site.status for site in sites] == ["fused"] * 3
    assert (checker.rewrites, checker.structures) == (3, 3)


def test_one_broken_site_leaves_the_others() -> None:
    """Only the first layer's rewrite is wrong."""
    seen: list[ir.Node] = []

    def once(node: ir.Node) -> None:
        seen.append(node)
        if len(seen) == 1:
            scaled("scale", 1.01)(node)

    model, sites, _ = raised(exported("llama/dynamo20"), broken(SoftmaxAttention, once))
    assert sorted(site.status for site in sites) == ["fused", "undone"]
    ops = [node.op_type for node in model.graph]
    assert (ops.count("Softmax"), ops.count("Attention")) == (1, 1)


def test_without_a_check_nothing_is_undone() -> None:
    model, roles = normalized(parse(NORM))
    rewriter = Rewriter(model, roles)
    rewriter.apply(broken(RMSNorm, scaled("epsilon", 1.5)))
    assert [site.status for site in rewriter.sites] == ["fused"]


def test_the_check_is_shown_what_is_replaced() -> None:
    model, roles = normalized(parse(NORM))
    shown: list[tuple[str, str, int]] = []

    def check(facts: Facts, rewrite: Rewrite, nodes: Sequence[ir.Node]) -> str | None:
        shown.append((rewrite.outputs[0][0].name or "", rewrite.node.op_type, len(nodes)))
        return "no"

    rewriter = Rewriter(model, roles, None, check)
    rewriter.apply(RMSNorm())
    assert shown == [("y", "RMSNormalization", 1)]
    (site,) = rewriter.sites
    assert site.decline is not None
    assert (site.status, site.decline.reason) == ("undone", "no")


def test_a_node_that_does_not_run_is_undone() -> None:
    def unheard(node: ir.Node) -> None:
        node.attributes["stash_type"] = ir.AttrInt64("stash_type", 99)
        node.replace_input_with(1, node.inputs[0])

    _, sites, _ = raised(parse(NORM), broken(RMSNorm, unheard))
    assert [site.status for site in sites] == ["undone"]
