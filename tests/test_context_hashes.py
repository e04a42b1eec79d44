"""One text for one meaning, however it is spelled, and another for any other: as docs/contexts.md says.

A meaning is a tree of tuples. It is drawn, spelled as a model with names and an order drawn too, and the
model's canonical text is compared with that of others.
"""

from __future__ import annotations

import random
from typing import Any

import onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto as A
from onnx import TensorProto as T
from onnx import helper

from onnxgen.contexts.canonical import canonical_text
from onnxgen.contexts.cutting import cut_out
from onnxgen.contexts.values import Region
from tests import independent_text

# --- meanings -----------------------------------------------------------------------------------

TYPES = ("FLOAT[?,2]", "FLOAT[2,2]", "FLOAT[]", "FLOAT", "INT64[1]")
TEXTS = (b"", b"a", b",", b"','", b"\n")
FLOATS = ("0.0", "-0.0", "1.5")
refs = st.integers(-1, 2)  # which value is read: none, or one of those known, counted from the end
few = {"max_size": 2}


def tuples(members: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(members, **few).map(tuple)


tensors = st.one_of(
    st.tuples(st.just("FLOAT"), tuples(st.sampled_from(FLOATS))),
    st.tuples(st.just("STRING"), tuples(st.sampled_from(TEXTS))),
    st.tuples(st.just("INT32"), tuples(st.integers(0, 1))),
    st.tuples(st.just("INT4"), tuples(st.integers(0, 1))),
)
leaves = st.one_of(
    st.tuples(st.just("int"), st.integers(0, 1)),
    st.tuples(st.just("float"), st.sampled_from(FLOATS)),
    st.tuples(st.just("string"), st.sampled_from(TEXTS)),
    st.tuples(st.just("ints"), tuples(st.integers(0, 1))),
    st.tuples(st.just("floats"), tuples(st.sampled_from(FLOATS))),
    st.tuples(st.just("strings"), tuples(st.sampled_from(TEXTS))),
    st.tuples(st.just("tensor"), tensors),
    st.tuples(st.just("tensors"), tuples(tensors)),
)


def nodes_of(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    key = st.tuples(st.sampled_from(["", "d"]), st.sampled_from("AB"), st.sampled_from(["", "o"]))
    attributes = st.dictionaries(st.sampled_from(["a", "b", "a,b"]), values, **few)
    made = st.lists(st.booleans(), min_size=1, max_size=2).map(tuple)
    sorted_items = attributes.map(lambda each: tuple(sorted(each.items())))
    return tuples(st.tuples(key, tuples(refs), sorted_items, made))


def graphs_of(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Types of inputs, initializers, nodes, and which value comes out as what."""
    kinds = tuples(st.sampled_from(["", *TYPES]))
    out = st.tuples(st.integers(0, 1), st.sampled_from(["", *TYPES]))
    return st.tuples(st.just("graph"), kinds, tuples(tensors), nodes_of(values), out)


nodes = nodes_of(st.one_of(leaves, graphs_of(leaves)))
functions = st.tuples(
    tuples(st.sampled_from(["p", "q", "p,q"])).map(lambda x: tuple(set(x))), nodes
)
meanings = st.tuples(
    st.sampled_from([20, 21]),
    tuples(st.sampled_from(TYPES)),
    tuples(st.sampled_from(TYPES[1:3])),
    nodes,
    st.sampled_from(TYPES),
    functions,
)


def normal(meaning: Any) -> Any:
    """Without what the region does not use: a function that nobody calls."""
    *rest, (parameters, body) = meaning
    if not any(calls(node) for node in meaning[3]):
        return (*rest, None)
    return (*rest, (tuple(sorted(parameters)), body))


def calls(node: Any) -> bool:
    key, _, attributes, _ = node
    inner = (each for _, value in attributes if value[0] == "graph" for each in value[3])
    return key == ("d", "A", "") or any(map(calls, inner))


# --- spellings ----------------------------------------------------------------------------------


class Spelling:
    """A model for a meaning; all that means nothing is drawn."""

    def __init__(self, seed: int) -> None:
        self.drawn = random.Random(seed)
        self.made = 0

    def name(self) -> str:
        self.made += 1
        return f"{self.drawn.choice(['v', 'i', 'w', '-', 'a,', ')(', ' '])}{self.made}"

    def region(self, meaning: Any) -> tuple[onnx.ModelProto, Region]:
        opset, inputs, weights, nodes, result, (parameters, body) = meaning
        first = helper.make_node("First", [], [self.name()], self.name())
        known = [self.name() for _ in (*inputs, *weights)]
        given, held = known[: len(inputs)], known[len(inputs) :]
        known = [*known, first.output[0]]
        made = [first, *self.nodes(nodes, known)]
        graph = onnx.GraphProto(name=self.name(), node=made, doc_string=self.name())
        for name, kind in zip(held, weights, strict=True):
            sizes = [] if kind == "FLOAT[]" else [2, 2]
            graph.initializer.add(name=name, data_type=T.FLOAT, dims=sizes, raw_data=b"any")
        imports = [helper.make_opsetid(self.standard(), opset), helper.make_opsetid("d", 1)]
        imports.append(helper.make_opsetid("unused", self.drawn.randrange(9)))
        self.drawn.shuffle(imports)
        entry = self.name()
        function = helper.make_function(
            "d",
            "A",
            [entry],
            [],
            self.nodes(body, [entry]),
            [helper.make_opsetid(self.standard(), 20), helper.make_opsetid("d", 1)],
            self.drawn.sample(parameters, len(parameters)),
        )
        model = helper.make_model(graph, opset_imports=imports, functions=[function])
        types = (tuple(inputs), (result,))
        where = tuple(range(len(made)))
        outputs = (known[-1],)
        return model, Region("r", where, tuple(given), tuple(held), outputs, *types, "", "")

    def standard(self) -> str:
        return self.drawn.choice(["", "ai.onnx"])

    def nodes(self, nodes: Any, known: list[str]) -> list[onnx.NodeProto]:
        return [self.node(each, known) for each in nodes]

    def node(self, meaning: Any, known: list[str]) -> onnx.NodeProto:
        (domain, op_type, overload), inputs, attributes, made = meaning
        node = onnx.NodeProto(op_type=op_type, overload=overload, domain=domain or self.standard())
        node.name, node.doc_string = self.name(), self.name()
        node.metadata_props.add(key="k", value=self.name())
        node.input.extend("" if at < 0 else known[-1 - at % len(known)] for at in inputs)
        for name, value in self.drawn.sample(attributes, len(attributes)):
            node.attribute.append(self.attribute(name, value, list(known)))
        node.output.extend(self.name() if each else "" for each in made)
        known += [each for each in node.output if each]
        return node

    def attribute(self, name: str, meaning: Any, known: list[str]) -> onnx.AttributeProto:
        kind, *value = meaning
        found = A(name=name, type=A.AttributeType.Value(kind.upper()), doc_string=self.name())
        match kind:
            case "int":
                found.i = value[0]
            case "float":
                found.f = float(value[0])
            case "string":
                found.s = value[0]
            case "ints" | "strings":
                getattr(found, kind).extend(value[0])
            case "floats":
                found.floats.extend(map(float, value[0]))
            case "tensor":
                found.t.CopyFrom(self.tensor(value[0]))
            case "tensors":
                found.tensors.extend(map(self.tensor, value[0]))
            case "graph":
                found.g.CopyFrom(self.graph(value, known))
        return found

    def tensor(self, meaning: Any) -> onnx.TensorProto:
        kind, values = meaning
        number = T.DataType.Value(kind)
        values = list(map(float, values)) if kind == "FLOAT" else list(values)
        found = helper.make_tensor(self.name(), number, [len(values)], values)
        if kind != "STRING" and self.drawn.random() < 0.5:  # the same values, in raw bytes
            found = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(found), self.name())
        found.doc_string = self.name()
        return found

    def graph(self, meaning: Any, known: list[str]) -> onnx.GraphProto:
        kinds, tensors, nodes, (result, kind) = meaning
        graph = onnx.GraphProto(name=self.name())
        for each in kinds:
            known.append(self.name())
            graph.input.append(self.value(known[-1], each))
        for each in tensors:
            tensor = self.tensor(each)
            known.append(tensor.name)
            graph.initializer.append(tensor)
        graph.node.extend(self.nodes(nodes, known))
        graph.output.append(self.value(known[-1 - result % len(known)], kind))
        graph.value_info.append(self.value(self.name(), "FLOAT"))
        return graph

    def value(self, name: str, kind: str) -> onnx.ValueInfoProto:
        found = onnx.ValueInfoProto(name=name, doc_string=self.name())
        if kind:
            element, _, sizes = kind.partition("[")
            dims = [self.name() if d == "?" else int(d) for d in sizes[:-1].split(",") if d]
            number = T.DataType.Value(element)
            found.type.CopyFrom(helper.make_tensor_type_proto(number, dims if sizes else None))
        return found


def text_of(meaning: Any, seed: int) -> str:
    model, region = Spelling(seed).region(meaning)
    text = canonical_text(cut_out(model, region))
    lines = independent_text.canonical_lines(
        model,
        model.graph.node,
        dict(zip(region.inputs, region.input_types, strict=True)),
        region.weights,
        dict(zip(region.outputs, region.output_types, strict=True)),
    )
    assert text == "".join(f"{line}\n" for line in lines)
    return text


@settings(max_examples=250, deadline=None)
@given(meanings, st.integers(0, 2**32), st.integers(0, 2**32))
def test_a_spelling_changes_nothing(meaning: Any, one: int, other: int) -> None:
    assert text_of(meaning, one) == text_of(meaning, other)


@settings(max_examples=250, deadline=None)
@given(meanings, meanings, st.integers(0, 5), st.integers(0, 2**32))
def test_another_meaning_is_another_text(one: Any, other: Any, field: int, seed: int) -> None:
    mixed = (*one[:field], other[field], *one[field + 1 :])  # alike but for one field
    same = text_of(one, seed) == text_of(mixed, seed + 1)
    assert same == (meant(one) == meant(mixed))


def meant(meaning: Any) -> Any:
    """A meaning in which each read says what it reads, rather than how far back that is."""
    return numbered(normal(meaning))


def numbered(meaning: Any) -> Any:
    opset, inputs, weights, nodes, result, function = meaning
    known = list(range(len(inputs) + len(weights) + 1))
    return (
        opset,
        inputs,
        weights,
        _numbered(nodes, known),
        result,
        function and (function[0], _numbered(function[1], [0])),
    )


def _numbered(nodes: Any, known: list[int]) -> Any:
    found = []
    for key, inputs, attributes, made in nodes:
        reads = tuple(-1 if at < 0 else known[-1 - at % len(known)] for at in inputs)
        inner = []
        for name, value in attributes:
            if value[0] == "graph":
                _, kinds, tensors, body, (result, kind) = value
                around = [*known, *(len(known) + i for i in range(len(kinds) + len(tensors)))]
                body = _numbered(body, around)
                value = (kinds, tensors, body, around[-1 - result % len(around)], kind)
            inner.append((name, value))
        found.append((key, reads, tuple(inner), made))
        known += [len(known) + i for i in range(sum(made))]
    return tuple(found)
