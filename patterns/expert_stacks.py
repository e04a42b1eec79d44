"""The weights of all experts as what a rule emits: stacks, and which features lie where in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxgen import derived
from onnxgen.analysis.expert_features import Biased, Features, Selection
from onnxgen.analysis.expert_weights import Source
from onnxgen.functions import moe
from onnxgen.functions.activation import Activation
from onnxgen.patterns.building import Builder


@dataclass(frozen=True)
class Linear:
    """The weights of one product for every expert, in the order of the experts' numbers."""

    weights: tuple[Source, ...]
    biases: tuple[Source | None, ...]


@dataclass(frozen=True)
class First:
    """What the first products are: the activation, and the weights of its features."""

    activation: Activation
    fc1: Linear
    fc3: Linear | None
    interleaved: bool

    def linears(self, second: Linear) -> dict[int, Linear]:
        """All products, by the places of their weights."""
        found = {moe.FC1: self.fc1, moe.FC2: second}
        return found if self.fc3 is None else {**found, moe.FC3: self.fc3}


@dataclass(frozen=True)
class Weights:
    """The base operator's inputs from fc1 on, by their places, and the parts of its overload."""

    values: Mapping[int, ir.Value]
    parts: frozenset[str]

    @property
    def kind(self) -> ir.DataType | None:
        """The type that the experts compute in."""
        return self.values.get(moe.SCALES[moe.FC1], self.values[moe.FC1]).dtype


def order_of(second: Sequence[Biased]) -> list[int]:
    """The places of the experts' products, in the order of the experts' numbers."""
    sources = [each.products[0].source for each in second]
    numbers = [source.expert for source in sources]
    if all(number is not None for number in numbers):
        return sorted(range(len(numbers)), key=lambda index: numbers[index] or 0)
    return list(range(len(sources)))


def linear_of(products: Sequence[Biased]) -> Linear:
    order = order_of(products)
    return Linear(
        tuple(products[index].products[0].source for index in order),
        tuple(products[index].biases[0] for index in order),
    )


def leaf_of(features: Sequence[Features], number: int) -> Linear:
    """The products that the experts' activations read as one of their features."""
    found = [each.leaves[number][0] for each in features]
    if len(found[0].products) > 1:  # joined rows of all experts, the same for each of them
        one = found[0]
        return linear_of(
            [Biased((p,), (b,)) for p, b in zip(one.products, one.biases, strict=True)]
        )
    return Linear(
        tuple(each.products[0].source for each in found), tuple(each.biases[0] for each in found)
    )


def layout_of(
    selections: Sequence[Selection | None], width: int | ir.SymbolicDim
) -> tuple[bool, bool] | None:
    """(whether they take turns, whether the second comes first) for two halves of the features."""
    ordered = sorted((each for each in selections if each is not None), key=lambda each: each.start)
    if len(ordered) != 2:
        return None
    a, b = ordered
    if a.count + b.count != width:
        return None
    turned = selections[0] is not a
    if (a.start, a.step, b.start, b.step, a.count) == (0, 2, 1, 2, b.count):
        return True, turned
    if (a.start, a.step, b.start, b.step, b.count) == (0, 1, a.count, 1, a.count):
        return False, turned
    return None


def stacked(builder: Builder, sources: Sequence[Source]) -> ir.Value | None:
    """All experts' weights as one initializer; None where they lie in different ways."""
    first = sources[0]
    if any(each.turned != first.turned for each in sources):
        return None
    return stack_of(sources) or _joined(builder, sources)


def stacked_biases(builder: Builder, linear: Linear) -> ir.Value | None:
    given = [each for each in linear.biases if each is not None]
    if len(given) != len(linear.biases):
        return None
    made = stack_of(given) or _joined(builder, given)
    tensor = None if made is None else made.const_value
    if tensor is None or tensor.shape.rank() == 2:
        return made
    experts, *sizes = tensor.shape.numpy()
    rows = derived.whole(tensor).reshaped(tensor.size // experts)
    return builder.derived(rows, "onnxgen/experts") if max(sizes) > 1 else None


def stack_of(sources: Sequence[Source]) -> ir.Value | None:
    """The stack that these are all the experts of, in order."""
    value = sources[0].value
    if sources[0].whole and len(sources) == 1:
        return value
    assert value.const_value is not None
    numbers = [each.expert for each in sources]
    if any(each.value is not value for each in sources) or value.const_value.shape[0] != len(
        sources
    ):
        whole = all(each.whole and each.value is value for each in sources)
        return value if whole else None
    return value if numbers == list(range(len(sources))) or sources[0].whole else None


def _joined(builder: Builder, sources: Sequence[Source]) -> ir.Value | None:
    if any(each.expert is not None or each.whole for each in sources):
        return None
    tensors = [each.value.const_value for each in sources]
    given = [each for each in tensors if each is not None]
    if len({(tuple(each.shape.numpy()), each.dtype) for each in given}) != 1:
        return None
    return builder.derived(derived.stacked(given), "onnxgen/experts")
