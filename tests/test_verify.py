"""A check that cannot fail is no check: every mutation here must be seen, and by the right case."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from onnxgen.analysis.edges import find_edges
from onnxgen.analysis.feeds import RunShape
from onnxgen.analysis.roles import OutputRole, Roles, find_roles
from onnxgen.errors import FileError, UsageError
from onnxgen.model_io import read_model
from onnxgen.report.values import Case, Proof
from onnxgen.runtime import Runtime
from onnxgen.testing import corpus
from onnxgen.verify.cases import again, plan
from onnxgen.verify.compare import verify_models
from onnxgen.verify.difference import NotANumberError, is_close_call, output_difference
from tests.large_decoder import Sizes, write_decoder

Model = onnx.ModelProto


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime(threads=1) as runtime:
        yield runtime


def exported(name: str) -> Model:
    (entry,) = corpus(name)
    return entry.load()


def differing(proof: Proof) -> list[Case]:
    return [case for case in proof.cases if case.difference > proof.tolerance]


# Mutations: each changes one thing that a wrong rewrite could change.


def between(
    model: Model, name: str, op: str, constant: float | int, node: int | None = None
) -> None:
    """Put `op(value, constant)` between a value and its consumers (or one of them)."""
    graph = model.graph
    known = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info)}
    dtype = helper.tensor_dtype_to_np_dtype(known.get(name, onnx.TensorProto.FLOAT))
    graph.initializer.append(numpy_helper.from_array(np.array(constant, dtype), "by"))
    consumers = [graph.node[node]] if node is not None else list(graph.node)
    for consumer in consumers:
        for index, each in enumerate(consumer.input):
            if each == name and consumer.op_type != "Shape":
                consumer.input[index] = "changed"
    first = min(i for i, n in enumerate(graph.node) if "changed" in n.input)
    graph.node.insert(first, helper.make_node(op, [name, "by"], ["changed"]))


def softmaxes(model: Model) -> list[int]:
    return [i for i, node in enumerate(model.graph.node) if node.op_type == "Softmax"]


def wrong_scale(model: Model) -> None:
    at = softmaxes(model)[1]
    between(model, model.graph.node[at].input[0], "Mul", 1.01, at)


def no_mask(model: Model) -> None:
    """One layer's scores go to its Softmax without the mask."""
    at = softmaxes(model)[1]
    softmax = model.graph.node[at]
    add = next(node for node in model.graph.node if softmax.input[0] in node.output)
    assert add.op_type == "Add"
    softmax.input[0] = add.input[0]


def padding_seen(model: Model) -> None:
    between(model, "attention_mask", "Max", 1)


def positions_off_by_one(model: Model) -> None:
    between(model, "position_ids", "Add", 1)


def layers_swapped(model: Model) -> None:
    names = {"past_key_values.0.key": "past_key_values.1.key"}
    names |= {there: here for here, there in names.items()}
    for node in model.graph.node:
        if node.op_type == "Concat" and node.input[0] in names:
            node.input[0] = names[node.input[0]]


def presents_swapped(model: Model) -> None:
    names = {"present.0.value": "present.1.value", "present.1.value": "present.0.value"}
    for node in model.graph.node:
        for part in (node.input, node.output):
            for index, each in enumerate(part):
                part[index] = names.get(each, each)
    # The nodes stand in another layer's place now.
    ordered = ir.from_proto(model)
    ordered.graph.sort()
    model.CopyFrom(ir.to_proto(ordered))


def wrong_epsilon(model: Model) -> None:
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.size == 1 and values.dtype == np.float32 and 0 < values.ravel()[0] < 1e-4:
            tensor.CopyFrom(numpy_helper.from_array(np.full_like(values, 1e-3), tensor.name))


def no_bias(model: Model) -> None:
    tensor = next(t for t in model.graph.initializer if t.name.endswith("1.self_attn.k_proj.bias"))
    zeros = np.zeros_like(numpy_helper.to_array(tensor))
    tensor.CopyFrom(numpy_helper.from_array(zeros, tensor.name))


def window_of(size: int) -> Callable[[Model], None]:
    def mutate(model: Model) -> None:
        nodes = model.graph.node
        greater = next(node for node in nodes if node.op_type == "Greater")
        first = next(node for node in nodes if node.output[0] == greater.input[1])
        array = numpy_helper.from_array(np.array(size), "window")
        model.graph.initializer.append(array)
        first.input[1] = "window"

    return mutate


def new_keys_off(model: Model) -> None:
    """Only what is stored of the last layer's new keys is wrong: no logits of this run change."""
    graph = model.graph
    join = next(node for node in graph.node if node.output[0] == "present.1.key")
    stored = copy.deepcopy(join)
    join.output[0] = "joined"
    for node in graph.node:
        for index, each in enumerate(node.input):
            if each == "present.1.key":
                node.input[index] = "joined"
    graph.initializer.append(numpy_helper.from_array(np.array(1.001, np.float32), "by"))
    scaled = helper.make_node("Mul", [stored.input[1], "by"], ["off"])
    stored.input[1], stored.name = "off", "stored"
    graph.node.extend([scaled, stored])


def position_table_off(model: Model) -> None:
    between(model, "position_ids", "Add", 1)


MUTATIONS = [
    ("llama/dynamo20", wrong_scale, ""),
    ("llama/dynamo20", no_mask, ""),
    ("llama/torchscript", no_mask, ""),
    ("llama/dynamo20", padding_seen, "padding"),
    ("llama/torchscript-decode", padding_seen, "padding"),
    ("llama/dynamo20-prefill", padding_seen, "padding"),
    ("llama/dynamo20", positions_off_by_one, ""),
    ("llama/dynamo20-decode", positions_off_by_one, ""),
    ("llama/dynamo20", layers_swapped, "past|greedy"),
    ("llama/dynamo20", presents_swapped, ""),
    ("llama/dynamo20", wrong_epsilon, ""),
    ("llama/dynamo20", new_keys_off, ""),
    ("qwen2/dynamo20", no_bias, ""),
    ("mistral/dynamo20", window_of(7), ""),
    ("mistral/dynamo20", window_of(5), ""),
    ("gpt2/dynamo20", position_table_off, ""),
    ("bert/dynamo20", padding_seen, "padding"),
]


@pytest.mark.parametrize(
    ("name", "mutate", "only"),
    MUTATIONS,
    ids=[f"{name}-{getattr(mutate, '__name__', '')}" for name, mutate, _ in MUTATIONS],
)
def test_a_mutation_is_seen(
    runtime: Runtime, name: str, mutate: Callable[[Model], None], only: str
) -> None:
    original = exported(name)
    mutated = copy.deepcopy(original)
    mutate(mutated)
    assert mutated != original
    proof = verify_models(
        original.SerializeToString(), mutated.SerializeToString(), runtime=runtime
    )
    assert proof.status == "differs"
    worst = proof.worst
    assert worst is not None
    assert worst.output
    assert worst.output in proof.reason
    assert worst.name in proof.reason
    assert f"{proof.tolerance:g}" in proof.reason
    assert all(re.search(only, case.name) for case in differing(proof))


def test_a_wrong_window_is_seen_only_beyond_it(runtime: Runtime) -> None:
    original = exported("mistral/dynamo20")
    mutated = copy.deepcopy(original)
    window_of(7)(mutated)
    proof = verify_models(
        original.SerializeToString(), mutated.SerializeToString(), runtime=runtime
    )
    single = [case for case in differing(proof) if "greedy" not in case.name]
    shortest = min(case.past + case.new for case in single)
    assert shortest == 7


@pytest.mark.parametrize(
    "name",
    [
        "llama/dynamo18",
        "llama/torchscript-fp16",
        "llama/transformers",
        "llama/transformers-static",
        "qwen3/torchscript-eager",
        "qwen3/transformers-decode",
        "mistral/torchscript-cropped",
        "mistral/dynamo20-cropped",
        "gpt2/transformers",
        "t5_decoder/torchscript",
        "whisper_encoder/dynamo20",
        "vit/torchscript",
    ],
)
def test_a_model_equals_itself(runtime: Runtime, name: str) -> None:
    model = exported(name).SerializeToString()
    proof = verify_models(model, model, runtime=runtime)
    assert proof.status == "proven"
    assert proof.reason == ""
    ran = [case for case in proof.cases if not case.skipped]
    assert len(ran) >= 3
    # One side runs as written, the other as the runtime optimises it: noise, no more (T5 does not
    # scale its scores: 2.4e-5 among 130 tokens).
    assert all(case.difference < proof.tolerance / 4 for case in ran if "fp16" not in name)
    assert proof.tolerance == (1e-2 if "fp16" in name else 1e-4)


@pytest.mark.parametrize(
    ("one", "other", "noise"),
    [
        ("llama/dynamo20", "llama/torchscript", 2e-5),
        ("llama/dynamo20-decode", "llama/torchscript-decode", 2e-5),
        ("llama/dynamo20-fp16", "llama/torchscript-fp16", 8e-3),
        ("gemma2/dynamo20-cropped", "gemma2/torchscript-cropped", 2e-5),
        ("bert/dynamo20", "bert/torchscript", 2e-5),
        ("whisper_decoder/dynamo20", "whisper_decoder/torchscript", 2e-5),
    ],
)
def test_two_exports_of_one_model_are_equal_but_for_noise(
    runtime: Runtime, one: str, other: str, noise: float
) -> None:
    first, second = (exported(name).SerializeToString() for name in (one, other))
    proof = verify_models(first, second, runtime=runtime)
    assert proof.status == "proven"
    assert proof.worst is not None
    assert 0 < proof.worst.difference < noise
    assert not [case for case in proof.cases if case.skipped]


def test_every_kind_of_run_is_made(runtime: Runtime) -> None:
    model = exported("mistral/dynamo20").SerializeToString()
    told: list[str] = []
    proof = verify_models(model, model, edges=[11], runtime=runtime, progress=told.append)
    cases = [case for case in proof.cases if not case.skipped]
    assert {case.batch for case in cases} == {1, 2, 3}
    assert {case.padding for case in cases} == {"none", "left", "right"}
    kinds = {(case.past > 0, case.new > 1, case.padding) for case in cases}
    for padding in ("none", "left", "right"):
        assert {(False, True, padding), (True, True, padding), (True, False, padding)} <= kinds
    totals = {case.past + case.new for case in cases}
    assert {6, 7, 11, 12} <= totals, "both sides of the window and of the given edge"
    assert any("greedy" in case.name for case in cases)
    assert len({case.name for case in proof.cases}) == len(proof.cases)
    assert len([each for each in told if each.startswith("comparing ")]) == len(cases)
    assert told[0].startswith("comparing 1/")


def test_an_edge_out_of_reach_is_noted(runtime: Runtime) -> None:
    model = exported("llama/dynamo20").SerializeToString()
    proof = verify_models(model, model, edges=[131072], runtime=runtime)
    assert proof.status == "proven"
    (far,) = [case for case in proof.cases if case.skipped]
    assert far.name == "lengths around 131072"
    assert "8192" in far.skipped


def test_edges_are_found_in_the_graph() -> None:
    for name in ("mistral/dynamo20", "mistral/torchscript", "mistral/transformers"):
        model = ir.from_proto(exported(name))
        assert 6 in find_edges(model, find_roles(model))[0], name
    model = ir.from_proto(exported("mistral/torchscript-cropped"))
    assert 6 in find_edges(model, find_roles(model))[0]


def test_greedy_steps_see_what_single_runs_cannot() -> None:
    model = ir.from_proto(exported("llama/dynamo20"))
    chains = [run for run in plan(find_roles(model)) if run.steps]
    assert chains
    assert chains[0].shape.padding == "left"


# Models that do not load, do not run, or are not of one kind.

LINE = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (int64[b,s] ids, float[b,p,8] old) => (float[b,s,8] y, float[b,t,8] new)
    { rows = Gather(table, ids)  eights = Constant<value = float[8] {1,2,3,4,5,6,7,8}>()
      y = Mul(rows, eights)  more = Identity(rows)  new = Concat<axis = 1>(old, more) }"""
FIVE = LINE.replace("y = Mul(rows, eights)", "m = Mul(rows, eights) y = Reshape(m, to)")


def line(text: str = LINE, dtype: int = onnx.TensorProto.FLOAT) -> bytes:
    model = onnx.parser.parse_model(text)
    numbers = np.random.default_rng(0).standard_normal((40, 8))
    table = numbers.astype(helper.tensor_dtype_to_np_dtype(dtype))
    for name, values in {"table": table, "to": np.array([-1, 5, 8])}.items():
        if any(name in node.input for node in model.graph.node):
            model.graph.initializer.append(numpy_helper.from_array(values, name))
    return bytes(model.SerializeToString())


def test_a_rewrite_that_does_not_load_differs(runtime: Runtime) -> None:
    broken = line(LINE.replace("Mul(rows, eights)", "NoSuchOp(rows, eights)"))
    proof = verify_models(line(), broken, runtime=runtime)
    assert proof.status == "differs"
    assert "cannot load the rewritten model" in proof.reason
    assert "NoSuchOp" in proof.reason
    assert not proof.cases


def test_a_rewrite_that_crashes_the_runtime_differs_and_the_next_check_runs(
    runtime: Runtime,
) -> None:
    crashing = onnx.load_from_string(line())
    node = next(n for n in crashing.graph.node if n.op_type == "Mul")
    node.op_type, node.input[:] = "LayerNormalization", ["rows", "eights", ""]
    proof = verify_models(line(), crashing.SerializeToString(), runtime=runtime)
    assert proof.status == "differs"
    assert verify_models(line(), line(), runtime=runtime).status == "proven"


def test_a_rewrite_that_fails_on_a_case_differs_there(runtime: Runtime) -> None:
    # The new rows are written as if there were always five.
    proof = verify_models(line(), line(FIVE), runtime=runtime)
    assert proof.status == "differs"
    assert proof.worst is not None
    assert math.isinf(proof.worst.difference)
    assert proof.worst.name in proof.reason
    assert "the rewritten model fails" in proof.reason


def test_an_original_that_fails_on_a_case_skips_it(runtime: Runtime) -> None:
    same = line(FIVE)
    proof = verify_models(same, same, runtime=runtime)
    assert proof.status == "proven"
    skipped = [case for case in proof.cases if case.skipped]
    assert skipped
    assert all(case.skipped.startswith("the original fails: ") for case in skipped)


def test_an_original_that_never_runs_is_unverifiable(runtime: Runtime) -> None:
    broken = line(LINE.replace("Mul(rows, eights)", "NoSuchOp(rows, eights)"))
    proof = verify_models(broken, broken, runtime=runtime)
    assert proof.status == "unverifiable"
    assert "cannot load the original" in proof.reason


def test_bfloat16_is_compared_on_float32_twins(runtime: Runtime) -> None:
    text = LINE.replace("float[8] {", "bfloat16[8] {")
    for each in ("float[b,p,8]", "float[b,s,8]", "float[b,t,8]"):
        text = text.replace(each, f"b{each}".replace("float", "float16", 1))
    # The text holds the bits of a bfloat16: 16448 is 3.
    text = text.replace("{1,2,3,4,5,6,7,8}", "{16256,16384,16448,16512,16544,16576,16608,16640}")
    model = line(text, onnx.TensorProto.BFLOAT16)
    proof = verify_models(model, model, runtime=runtime)
    assert (proof.status, proof.twins, proof.tolerance) == ("proven", ("bfloat16",), 1e-4)
    other = line(text.replace("16448", "16449"), onnx.TensorProto.BFLOAT16)
    proof = verify_models(model, other, runtime=runtime)
    assert (proof.status, proof.twins) == ("differs", ("bfloat16",))
    assert not verify_models(line(), line(), runtime=runtime).twins


@pytest.mark.parametrize("kind", [onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16])
@pytest.mark.parametrize("name", ["gpt2/dynamo20", "mixtral/dynamo20-batched"])
def test_a_rounding_that_only_the_rewritten_model_does_is_seen(
    runtime: Runtime, name: str, kind: int
) -> None:
    original = exported(name)
    rounded = copy.deepcopy(original)
    nodes = rounded.graph.node
    at = next(i for i, n in enumerate(nodes) if n.output[0] == rounded.graph.output[0].name)
    between = [("Cast", nodes[at].input[0], "narrow", kind), ("Cast", "narrow", "wide", 1)]
    nodes[at].input[0] = "wide"
    for op, given, made, to in reversed(between):
        nodes.insert(at, helper.make_node(op, [given], [made], to=to))
    proof = verify_models(
        original.SerializeToString(), rounded.SerializeToString(), runtime=runtime
    )
    assert (proof.status, proof.twins) == ("differs", ())


def test_tables_are_read_far_behind(runtime: Runtime) -> None:
    """A position that no short run comes to."""
    original = exported("gpt2/dynamo20")
    wrong = copy.deepcopy(original)
    table = next(t for t in wrong.graph.initializer if t.name.endswith("wpe.weight"))
    values = numpy_helper.to_array(table).copy()
    values[63] = values[0]
    table.CopyFrom(numpy_helper.from_array(values, table.name))
    proof = verify_models(original.SerializeToString(), wrong.SerializeToString(), runtime=runtime)
    assert proof.status == "differs"
    assert {case.name for case in differing(proof)} == {"prefill of 90", "4 tokens over past 61"}


def test_the_last_places_of_a_contract_are_run() -> None:
    roles = find_roles(ir.from_proto(exported("llama/dynamo20")))
    lengths = {run.shape.total for run in plan(roles, longest=64)}
    assert {64, 65} <= lengths


def test_every_run_has_tokens_of_its_own() -> None:
    runs = plan(find_roles(ir.from_proto(exported("llama/dynamo20"))))
    assert len({run.seed for run in runs}) == len(runs)
    more = again(runs)
    assert len(more) > len(runs)
    assert not {run.seed for run in more} & {run.seed for run in runs}


def test_a_difference_near_the_tolerance_is_looked_at_again(runtime: Runtime) -> None:
    """Half of the tolerance in the planned runs: others are made, and far smaller ones are not."""
    original = exported("llama/dynamo20")
    counts = {}
    for factor in (1 + 1e-6, 1 + 1.2e-5):
        near = copy.deepcopy(original)
        head = next(t for t in near.graph.initializer if t.name == "m.model.norm.weight")
        values = numpy_helper.to_array(head) * np.float32(factor)
        head.CopyFrom(numpy_helper.from_array(values, head.name))
        proof = verify_models(
            original.SerializeToString(), near.SerializeToString(), runtime=runtime
        )
        counts[factor] = len(proof.cases)
    few, many = counts.values()
    assert many > 2 * few
    assert is_close_call(5e-5, 1e-4)
    assert not any(is_close_call(each, 1e-4) for each in (1.9e-5, 1.1e-4))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("float[b,t,8] new", "float[b,t,8] now"), "the rewritten model has no output 'new'"),
        (("int64[b,s] ids", "int32[b,s] ids"), "input 'ids' was INT64 and is INT32"),
        (("float[b,p,8] old", "float[b,p,2,4] old"), "input 'old' had 3 dims and has 4"),
        (
            ("int64[b,s] ids, float[b,p,8] old", "float[b,p,8] old, int64[b,s] ids"),
            "the inputs stand in another order: old, ids",
        ),
        (("old)", "old, float extra)"), "the rewritten model has input 'extra'"),
    ],
)
def test_other_inputs_or_outputs_differ(change: tuple[str, str], sentence: str) -> None:
    text = LINE.replace(*change, 1)
    proof = verify_models(line(), line(text))
    assert proof.status == "differs"
    assert sentence in proof.reason


def test_roles_of_the_user_are_taken(runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="no such input"):
        verify_models(line(), line(), roles={"nothing": "ids"}, runtime=runtime)


def test_paths_are_read_and_unreadable_ones_refused(runtime: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(line())
    assert verify_models(path, line(), runtime=runtime).status == "proven"
    with pytest.raises(FileError):
        verify_models(path, tmp_path / "missing.onnx", runtime=runtime)
    with pytest.raises(FileError, match="no ONNX model"):
        verify_models(path, b"nothing", runtime=runtime)


# The measure itself.

ROLES = Roles({}, {})
ROWS = OutputRole("y", "rows", ir.DataType.FLOAT, None, ("B", "S", ""))


def measure(a: np.ndarray, b: np.ndarray, shape: RunShape, output: OutputRole = ROWS) -> float:
    return output_difference(ROLES, output, shape, a, b)


def test_padding_rows_are_left_out_and_others_are_not() -> None:
    shape = RunShape(2, 3, padding="left", pads=(1, 0))
    a = np.random.default_rng(0).standard_normal((2, 3, 50)).astype(np.float32)
    padded, real = a.copy(), a.copy()
    padded[0, 0] = np.nan
    real[0, 1, 7] += 2 * a[shape.real_new].std()
    assert measure(a, padded, shape) == 0
    assert measure(padded, a, shape) == 0
    assert measure(a, real, shape) == pytest.approx(2, rel=1e-3)


def test_what_is_not_finite_must_be_so_on_both_sides() -> None:
    shape = RunShape(1, 2)
    a = np.arange(8, dtype=np.float32).reshape(1, 2, 4)
    low, high = a.copy(), a.copy()
    low[0, 0, 0], high[0, 0, 0] = -np.inf, np.inf
    assert measure(low, low.copy(), shape) == 0
    assert math.isinf(measure(low, high, shape))
    assert math.isinf(measure(a, low, shape))
    nan = np.full_like(a, np.nan)
    assert math.isinf(measure(a, nan, shape))
    with pytest.raises(NotANumberError):
        measure(nan, nan, shape)


def test_integers_shapes_and_types_must_be_equal() -> None:
    shape = RunShape(1, 2)
    a = np.arange(8).reshape(1, 2, 4)
    assert measure(a, a.copy(), shape) == 0
    assert math.isinf(measure(a, a + 1, shape))
    assert math.isinf(measure(a, a[:, :1], shape))
    assert math.isinf(measure(a.astype(np.float32), a.astype(np.float64), shape))


def test_an_output_that_hardly_varies_is_measured_by_its_size() -> None:
    shape = RunShape(1, 2)
    a = np.full((1, 2, 4), 3, np.float32)
    assert measure(a, a * np.float32(1.01), shape) == pytest.approx(10, rel=1e-3)
    assert measure(a * 0, a * 0 + np.float32(1e-6), shape) == pytest.approx(1e-6)


def test_runs_that_are_too_large_are_said_to_be(tmp_path: Path) -> None:
    """Caches of a large model over a long past take more memory than is fed."""
    sizes = Sizes(layers=32, hidden=4096, inner=8192, heads=32, kv_heads=32, vocabulary=32000)
    runs = plan(find_roles(read_model(write_decoder(tmp_path, sizes, "sparse"))))
    (far,) = [run for run in runs if run.shape.total == 778]
    assert re.fullmatch(r"not run: its inputs would be \d+ bytes, more than \d+", far.skipped)
    assert not any(run.skipped for run in runs if run.shape.total < 80)
    assert any(run.shape.total == 91 and not run.skipped for run in runs), "in its place"
