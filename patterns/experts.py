"""MOE001: a mixture of experts, however tokens are brought to their experts.

Replaces
    sum over j of w[t, j] * expert(i[t, j], x[t])                      (Shazeer et al., 2017)
    -> onnxgen::MoE(x, w, i, fc1, fc2 ...)

    What lies between the tokens, the router's choice and the sum is not read: weights gathered for
    each token, rows sorted by expert, a loop over the experts, or all experts on all tokens and a
    mask. Only the experts are (`analysis.experts`): which weights, which way round, with which
    biases, and what stands between the two products. The router stays as it is, up to its last
    numbers: indices [T, k] and weights [T, k]; or [T, E], where all experts are weighed.

    Weights in a stack stay where they are. Weights of experts that are initializers of their own
    are stacked when the model is written.

Looks for
    1. a TopK or ArgMax whose choice comes together again in one sum
    2. between the two products of each expert with its weights
    3. which experts a token goes to, and what they weigh
    4. one function of a product between them, the same for all experts
    5. weights of one layout, and sizes that are known

Declines
    experts: what an expert computes is no activation between two products.
        Expected: products, biases, and any elementwise function between them, alike for all
        experts.
        Change: export with experts_implementation="batched_mm" (transformers 5) or as the model's
        own loop; products alone may still become GroupedMatMul (MOE002).
    routing: it is not found which experts a token goes to, and what they weigh.
        Expected: indices [T, k] and weights [T, k] of a router, or weights [T, E] of all experts.
        Change: none yet: it is not supported; please report the model.
    layout: a size that must be known is not.
        Expected: a fixed hidden size and number of experts; all experts' weights the same way
        round.
        Change: make only batch and lengths dynamic when exporting.
    quantised: the weights are packed codes. What reads them is faster than standard operators that
        unpack them; ONNX Runtime has a kernel (`quantised_experts`).
        Expected: weights that are numbers.
        Change: --target ort, which has a kernel for them; or quantise after fusing.

Numerics
    The same products, experts of a token summed in the order of their numbers. Products with
    weights, and their sum, are of the weights' type, as they were.

Seen in
    transformers 5.23: `batched_mm` by every exporter, `grouped_mm` by its own; loops over experts
    by TorchScript and dynamo; dense experts (GPT-OSS, Llama 4).

Example
    opset 20
    (float[t,8] x)
    => (float[t,8] y)
    <float[8,5] R, float[5,6,8] W1, float[5,8,6] W2>
    {
      l = MatMul(x, R)
      p = Softmax(l)
      w, i = TopK(p, [2])
      g = Gather(W1, i)
      c = Unsqueeze(x, [1, 3])
      h4 = MatMul(g, c)
      h = Squeeze(h4, [3])
      m = Relu(h)
      g2 = Gather(W2, i)
      mc = Unsqueeze(m, [3])
      d4 = MatMul(g2, mc)
      d = Squeeze(d4, [3])
      u = Unsqueeze(w, [2])
      v_ = Mul(d, u)
      y = ReduceSum<keepdims = 0>(v_, [1])
    }
    becomes
        ...
        y = onnxgen.MoE:relu(x, w, i, W1, , W2)
"""

from __future__ import annotations

import onnx_ir as ir

from onnxgen import functions
from onnxgen.analysis.expert_features import Unread
from onnxgen.analysis.expert_routing import (
    CHOOSING,
    Routing,
    bound_of,
    closest,
    distinct,
    routings,
)
from onnxgen.analysis.experts import Mixture, mixture_of
from onnxgen.analysis.facts import Facts
from onnxgen.functions import moe
from onnxgen.functions.activation import Activation, written
from onnxgen.patterns.building import Builder
from onnxgen.patterns.expert_stacks import (
    First,
    Linear,
    Weights,
    layout_of,
    leaf_of,
    linear_of,
    order_of,
    stacked,
    stacked_biases,
)
from onnxgen.patterns.rule import Declined, Rewrite, Rule


class Experts(Rule):
    """Anchored at the TopK or ArgMax that chooses."""

    code = "MOE001"
    kind = "moe"
    anchors = CHOOSING

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        try:
            mixture = mixture_of(facts, node)
        except Unread as error:
            builder.passed(1)
            # Where MOE002 takes these products, nothing is kept any more.
            stopped = error.products or (error.node or node,)
            raise Declined(self, "experts", str(error), *stopped) from None
        if mixture is None:
            return None
        builder.passed(2)
        routing = closest(
            list(routings(facts, mixture.output, mixture.tokens, mixture.count, mixture.products))
        )
        if routing is None:
            reason = "it is not found which experts a token goes to and what they weigh"
            raise Declined(self, "routing", reason, node, mixture.output.producer())
        builder.passed(3)
        first, second = self._first(mixture, node), self._second(mixture)
        builder.passed(4)
        return self._emit(facts, builder, mixture, routing, first, second)

    def _second(self, mixture: Mixture) -> Linear:
        return linear_of(mixture.second)

    def _first(self, mixture: Mixture, node: ir.Node) -> First:
        """The activation and the first products, which must be the same function of each expert.

        Raises:
            Declined: they are not.
        """
        order = order_of(mixture.second)
        features = [mixture.first[index] for index in order]
        texts = {written(each.term) for each in features}
        if len(texts) != 1:
            raise Declined(self, "experts", "the experts have different activations", node)
        activation = Activation(texts.pop())
        kind = mixture.output.dtype
        narrow = kind is not None and kind.bitwidth < 32
        count = len(features[0].leaves)
        if count == 0 or any(len(each.leaves) != count for each in features):
            raise Declined(self, "experts", "an expert's activation reads no product", node)
        linears = [leaf_of(features, number) for number in range(count)]
        picked = {tuple(selection for _, selection in each.leaves) for each in features}
        selections = picked.pop()
        if picked:
            raise Declined(self, "experts", "the experts read different features", node)
        if count == 1:
            if selections[0] is not None:
                raise Declined(self, "experts", "an expert reads a part of its features", node)
            return First(activation.named(narrow=narrow), linears[0], None, interleaved=False)
        named, swapped = activation.named(narrow=narrow), activation.swapped().named(narrow=narrow)
        if selections == (None, None):
            if named.text == activation.text and swapped.text in moe.GATED:
                return First(swapped, linears[1], linears[0], interleaved=False)
            return First(named, linears[0], linears[1], interleaved=False)
        source = linears[0].weights[0]
        width = (source.value.shape or ())[-1 if source.turned else -2]
        layout = None if linears[0] != linears[1] else layout_of(selections, width)
        if layout is None:
            raise Declined(self, "experts", "an expert reads its features in another order", node)
        interleaved, turned = layout
        return First(swapped if turned else named, linears[0], None, interleaved=interleaved)

    def weights(
        self, builder: Builder, first: First, second: Linear, node: ir.Node | None
    ) -> Weights:
        """The experts' weights, stacked.

        Raises:
            Declined: they cannot be.
        """
        linears = first.linears(second)
        if any(each.codes for linear in linears.values() for each in linear.weights):
            raise Declined(
                self,
                "quantised",
                "its weights are quantised, and only --target ort has a kernel for that",
                node,
            )
        stacks = {at: stacked(builder, each.weights) for at, each in linears.items()}
        found = {at: each for at, each in stacks.items() if each is not None}
        turned = {at: each.weights[0].turned for at, each in linears.items()}
        if len(found) < len(linears) or turned.get(moe.FC3, turned[moe.FC1]) != turned[moe.FC1]:
            raise Declined(self, "layout", "the experts' weights have different layouts", node)
        parts = {moe.FC1: "fc1t", moe.FC2: "fc2t"}
        return Weights(found, frozenset(text for at, text in parts.items() if turned[at]))

    def _emit(
        self,
        facts: Facts,
        builder: Builder,
        mixture: Mixture,
        routing: Routing,
        first: First,
        second: Linear,
    ) -> Rewrite:
        node, width = mixture.output.producer(), (facts.shapes.of(mixture.tokens) or ())[-1]
        assert isinstance(width, int)
        x = _rows(facts, builder, mixture.tokens, width)
        weights = _rows(facts, builder, routing.weights, routing.slots)
        indices = routing.indices
        if indices is not None:
            indices = _rows(facts, builder, indices, routing.slots)
            if indices.dtype != ir.DataType.INT64:
                indices = builder.op("Cast", [indices], {"to": int(ir.DataType.INT64)})
        experts = self.weights(builder, first, second, node)
        bias1, bias2 = (stacked_biases(builder, each) for each in (first.fc1, second))
        bias3 = None if first.fc3 is None else stacked_biases(builder, first.fc3)
        if first.fc3 is not None and (bias1 is None) != (bias3 is None):
            raise Declined(self, "experts", "one of two features has a bias", node)
        if mixture.scaled and bias2 is not None:
            raise Declined(self, "experts", "weights multiply inputs of experts with a bias", node)
        bound = bound_of(facts, routing.indices)
        if bound is not None and bound > mixture.count:
            reason = f"{bound} experts are chosen from, and {mixture.count} are found"
            raise Declined(self, "routing", reason, node)
        repeats = routing.indices is not None and not distinct(facts, routing.indices)
        if repeats and mixture.scaled:
            reason = "weights multiply the inputs of experts that a token may name twice"
            raise Declined(self, "experts", reason, node)
        adds = bias1 is not None or not moe.keeps_zero(first.activation)
        if mixture.scaled and indices is None and adds:
            reason = (
                "weights of all experts multiply their inputs, and they make something of zeros"
            )
            raise Declined(self, "experts", reason, node)
        kind = experts.kind
        if x.dtype != kind and kind is not None:
            x = builder.op("Cast", [x], {"to": int(kind)})
        overload = moe.overload_of(
            first.activation.text,
            interleaved=first.interleaved,
            bias1=bias1 is not None,
            bias2=bias2 is not None,
            repeats=repeats,
            separate=first.fc3 is not None,
            dense=indices is None,
            scaled=mixture.scaled,
            **dict.fromkeys(experts.parts, True),
        )
        given = {moe.BIAS1: bias1, moe.BIAS2: bias2, moe.BIAS3: bias3, **experts.values}
        places = range(moe.FC1, max(at for at, value in given.items() if value is not None) + 1)
        (y,) = builder.ops(
            moe.NAME,
            [x, weights, indices, *map(given.get, places)],
            1,
            domain=functions.DOMAIN,
            overload=overload,
        )
        fused = y.producer()
        assert fused is not None
        if mixture.output.dtype is not None and y.dtype != mixture.output.dtype:
            y = builder.op("Cast", [y], {"to": int(mixture.output.dtype)})
        shape = facts.shapes.of(mixture.output)
        if shape is not None and len(shape) != 2:
            target = builder.target(y, shape)
            if target is None:
                raise Declined(self, "layout", "the output's size cannot be computed", node)
            y = builder.op("Reshape", [y, target])
        details: dict[str, str | int | float | bool] = {
            "experts": mixture.count,
            "slots": routing.slots if indices is not None else "all",
            "activation": first.activation.text,
        }
        choices = {} if routing.indices is None else {routing.indices: mixture.count}
        return Rewrite(
            fused,
            ((mixture.output, y),),
            details,
            choices=choices,
            repeats=repeats,
            loose=routing.indices is not None and bound is None,
        )


def _rows(facts: Facts, builder: Builder, value: ir.Value, width: int) -> ir.Value:
    """A value as [T, width]."""
    if facts.shapes.rank(value) == 2:
        shape = facts.shapes.of(value)
        if shape is not None and shape[-1] == width:
            return value
    return builder.op("Reshape", [value, builder.ints(-1, width)])
