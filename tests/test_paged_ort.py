"""`to-paged --flavor ort`: what is written, what is refused, and that the proof sees what is wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from onnxgen import pipeline_paged
from onnxgen.analysis.paging import UnpageableError
from onnxgen.cli import main
from onnxgen.errors import ModelDiffersError, RefusedError, UsageError
from onnxgen.report import as_json, text
from onnxgen.report.values import Report
from onnxgen.runtime import RuntimeFailure
from onnxgen.targets import paged_inside, paged_ort
from onnxgen.targets.paged import PagedOptions
from onnxgen.targets.paged_schema import LiveSchema, live_schema
from onnxgen.testing import corpus, load_corpus_model
from onnxgen.verify import paged_kernel
from onnxgen.verify.paged_twin import expand_attention
from tests.graphs import assert_same_graph, parse, runtime, weight

# Four query heads, two key heads, head size 16; rotary tables of 40 positions.
TABLES = {name: weight(name, (40, 8)).astype(np.float32) for name in ("cosines", "sines")}


def decoder(
    turned: bool = True,
    normed: bool = False,
    attributes: str = "",
    size: int = 16,
    width: int = 0,
) -> str:
    """One layer; `size` columns a head, values of `width`."""
    width = width or size
    rotary = (
        "c = Gather(cosines, position_ids)  n = Gather(sines, position_ids)"
        "  q4 = RotaryEmbedding(q3, c, n)  k4 = RotaryEmbedding(k3, c, n)"
        if turned
        else "q4 = Identity(q3)  k4 = Identity(k3)"
    )
    norms = (
        "q2 = RMSNormalization<epsilon = 0.01>(q1, gq)  k2 = RMSNormalization<epsilon = 0.01>(k1, gk)"
        if normed
        else "q2 = Identity(q1)  k2 = Identity(k1)"
    )
    tables = ", float[40,8] cosines, float[40,8] sines" if turned else ""
    gains = f", float[{size}] gq, float[{size}] gk" if normed else ""
    positions = "int64[b,s] position_ids, " if turned else ""
    weights = (
        f"float[31,24] embed, float[24,{4 * size}] wq, float[24,{2 * size}] wk, "
        f"float[24,{2 * width}] wv, float[{4 * width},31] wo"
    )
    return f"""
        (int64[b,s] input_ids, {positions}float[b,2,p,{size}] past_k, float[b,2,p,{width}] past_v)
        => (float[b,s,31] logits, float[b,2,t,{size}] present_k, float[b,2,t,{width}] present_v)
        <{weights}{tables}{gains}>
        {{ x = Gather(embed, input_ids)
        q = MatMul(x, wq)  q1 = Reshape(q, [0, 0, 4, {size}])
        k = MatMul(x, wk)  k1 = Reshape(k, [0, 0, 2, {size}])
        v = MatMul(x, wv)  v1 = Reshape(v, [0, 0, 2, {width}])
        {norms}
        q3 = Transpose<perm = [0, 2, 1, 3]>(q2)  k3 = Transpose<perm = [0, 2, 1, 3]>(k2)
        v3 = Transpose<perm = [0, 2, 1, 3]>(v1)
        {rotary}
        y, present_k, present_v =
            Attention<is_causal = 1, scale = 0.3 {attributes}>(q4, k4, v3, , past_k, past_v)
        y1 = Transpose<perm = [0, 2, 1, 3]>(y)  y2 = Reshape(y1, [0, 0, {4 * width}])
        logits = MatMul(y2, wo) }}"""


def page(
    model: onnx.ModelProto, folder: Path, *, verify: bool = True, **options: Any
) -> tuple[Report, onnx.ModelProto]:
    """The report and what was written."""
    path = folder / "m.onnx"
    onnx.save(model, path)
    paged = PagedOptions(flavor="ort", **options)
    asked = pipeline_paged.PageOptions(output=folder / "paged", paged=paged, verify=verify)
    report = pipeline_paged.to_paged(path, asked, lambda message: None)
    return report, onnx.load(folder / "paged" / "model.onnx")


def operators(model: onnx.ModelProto) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """(inputs by name, attributes) of every com.microsoft::PagedAttention."""
    schema = live_schema()
    assert schema is not None
    return [
        (
            {name: given for name, given in zip(schema.inputs, node.input, strict=False) if given},
            {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute},
        )
        for node in model.graph.node
        if node.domain == "com.microsoft"
    ]


WANTED = """
    <ir_version: 10, opset_import: ["" : 24, "com.microsoft" : 1]> g
    (int64[n] input_ids, int32[c] cumulative_sequence_lengths, int32[b] past_sequence_lengths,
     int32[b,m] block_table, float16[nb,16,2,16] key_pool, float16[nb,16,2,16] value_pool)
    => (float[n,31] logits, float16[nb,16,2,16] key_out, float16[nb,16,2,16] value_out)
    <float[31,24] embed, float[24,64] wq, float[24,32] wk, float[24,32] wv, float[64,31] wo,
     float16[40,8] cos, float16[40,8] sin, int32[1] most, int32[1] none, int32[1] one>
    { row = Unsqueeze(input_ids, [0])  x = Gather(embed, row)
    q = MatMul(x, wq)  q1 = Reshape(q, [-1, 64])  q2 = Cast<to = 10>(q1)
    k = MatMul(x, wk)  k1 = Reshape(k, [-1, 32])  k2 = Cast<to = 10>(k1)
    v = MatMul(x, wv)  v1 = Reshape(v, [-1, 32])  v2 = Cast<to = 10>(v1)
    ends = Slice(cumulative_sequence_lengths, [1], [1073741824])
    starts = Slice(cumulative_sequence_lengths, [0], [-1])
    new = Sub(ends, starts)  total = Add(past_sequence_lengths, new)
    longest = ReduceMax<keepdims = 1>(total)  over = Sub(longest, most)
    above = Max(over, none)  wrong = Min(above, one)
    guard = Gather<axis = 0>(none, wrong)  past = Add(past_sequence_lengths, guard)
    y, key_out, value_out = com.microsoft.PagedAttention
        <do_rotary = 1, kv_num_heads = 2, num_heads = 4, rotary_interleaved = 0, scale = 0.3>
        (q2, k2, v2, key_pool, value_pool, cumulative_sequence_lengths, past, block_table, cos, sin)
    z = Cast<to = 1>(y)  z1 = Reshape(z, [1, -1, 64])
    s = MatMul(z1, wo)  logits = Squeeze(s, [0]) }
"""


def test_a_layer_becomes_the_operator_with_its_rotary_embedding_inside(tmp_path: Path) -> None:
    before = parse(decoder(), opset=24, weights=TABLES)
    report, found = page(before, tmp_path)
    numbers = {"most": 40, "none": 0, "one": 1}
    halves = {"cos": TABLES["cosines"], "sin": TABLES["sines"]}
    wanted = parse(
        WANTED,
        weights={
            **{name: np.array([n], np.int32) for name, n in numbers.items()},
            **{name: table.astype(np.float16) for name, table in halves.items()},
        },
    )
    names = {"key_pool": "past_key_values.0.key", "value_pool": "past_key_values.0.value"}
    names |= {"key_out": "present.0.key", "value_out": "present.0.value"}
    rename(wanted, names)
    assert_same_graph(found, wanted)
    types = {each.name: each.type.tensor_type for each in found.graph.value_info}
    (y,) = [node.output[0] for node in found.graph.node if node.domain == "com.microsoft"]
    dims = [dim.dim_param or dim.dim_value for dim in types[y].shape.dim]
    assert (types[y].elem_type, dims) == (10, ["num_tokens", 64])
    assert {each.domain for each in found.opset_import} == {"", "com.microsoft"}
    assert report.contract == "at most 40 tokens a sequence"


def test_the_report_says_whether_the_kernel_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_kernel, "PACKAGE", "no_such_provider")
    report, _ = page(parse(decoder(), opset=24, weights=TABLES), tmp_path)
    why = "not run: no provider that has it is installed here (extra webgpu)"
    document = as_json.report_document("to-paged", report, 0, None)
    assert document["report"]["paging"]["kernel"] == why
    console = text.console()
    with console.capture() as shown:
        console.print(text.render(report))
    assert f"The operator's kernel: {why}" in shown.get()
    unproven, _ = page(parse(decoder(), opset=24, weights=TABLES), tmp_path, verify=False)
    assert unproven.paging is not None
    assert unproven.paging.kernel == "not run: nothing was"


def test_how_long_tables_are_is_said_by_a_configuration_or_an_option(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(parse(decoder(), opset=24, weights=TABLES), path)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 24}')
    words = ["to-paged", str(path), "--flavor", "ort", "--no-verify"]
    assert "at most 24 tokens" in CliRunner().invoke(main, words).output
    run = CliRunner().invoke(main, [*words, "--max-length", "30"])
    assert "at most 30 tokens" in run.output
    alone = CliRunner().invoke(main, ["to-paged", str(path), "--max-length", "30"])
    assert alone.exit_code == 2
    assert "--max-length is for --flavor ort" in alone.output


def rename(model: onnx.ModelProto, names: dict[str, str]) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]


def test_norms_over_heads_go_inside(tmp_path: Path) -> None:
    _, found = page(parse(decoder(normed=True), opset=24, weights=TABLES), tmp_path)
    ((inputs, attributes),) = operators(found)
    assert {"q_norm_weight", "k_norm_weight", "cos_cache"} <= set(inputs)
    assert attributes["qk_norm_epsilon"] == pytest.approx(0.01)
    assert not any(node.op_type == "RMSNormalization" for node in found.graph.node)


def test_without_rotary_embedding_nothing_limits_a_sequence(tmp_path: Path) -> None:
    model = parse(decoder(turned=False, attributes=", softcap = 3.0"), opset=24)
    report, found = page(model, tmp_path, slot_mapping=True, logits="last")
    ((inputs, attributes),) = operators(found)
    assert inputs["past_seqlens"] == "past_sequence_lengths"
    assert inputs["slot_mapping"] == "slot_mapping"
    assert attributes["softcap"] == 3.0
    assert "tokens a sequence" not in report.contract


def test_layers_of_shorter_tables_are_guarded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = paged_inside.Insides.of
    lengths = itertools.cycle((40, 24))  # paged for two sizes of blocks

    def shorter(*given: Any) -> paged_inside.Inside:
        found = whole(*given)
        limit = next(lengths)
        tables = {}
        for name, value in found.inputs.items():
            assert value.const_value is not None
            rows = value.const_value.numpy()[:limit]
            tables[name] = ir.Value(name=f"{name}.{limit}", const_value=ir.tensor(rows))
            given[0]._graph.register_initializer(tables[name])
        return replace(found, inputs=tables, limit=limit)

    monkeypatch.setattr(paged_inside.Insides, "of", shorter)
    report, found = page(load_corpus_model("llama/dynamo20"), tmp_path, verify=False)
    makers = {name: node for node in found.graph.node for name in node.output}
    guards = [makers[makers[given["past_seqlens"]].input[1]].name for given, _ in operators(found)]
    assert [name.partition("most ")[2] for name in guards] == [
        "40 tokens a sequence",
        "24 tokens a sequence",
    ]
    assert report.contract == "at most 24 tokens a sequence"


def test_beyond_its_tables_a_model_fails(tmp_path: Path) -> None:
    _, found = page(parse(decoder(), opset=24, weights=TABLES), tmp_path)
    twin = ir.from_proto(found)
    assert expand_attention(twin) == 1
    session = runtime().load(ir.to_proto(twin).SerializeToString())
    pool = np.zeros((4, 16, 2, 16), np.float16)
    feeds = {
        "input_ids": np.array([3]),
        "cumulative_sequence_lengths": np.array([0, 1], np.int32),
        "block_table": np.array([[0, 1, 2]], np.int32),
        "past_key_values.0.key": pool,
        "past_key_values.0.value": pool,
    }
    runtime().run(session, {**feeds, "past_sequence_lengths": np.array([39], np.int32)})
    with pytest.raises(RuntimeFailure, match="at most 40 tokens a sequence"):
        runtime().run(session, {**feeds, "past_sequence_lengths": np.array([40], np.int32)})
    runtime().unload(session)


CORPUS = {
    "llama/dynamo20": {"do_rotary", "cos_cache"},
    "mistral/dynamo20": {"local_window_size", "cos_cache"},
    "gpt_oss/transformers": {"local_window_size", "head_sink", "cos_cache"},
    "qwen3/dynamo20": {"q_norm_weight", "qk_norm_epsilon", "cos_cache"},
    "gpt2/dynamo20": set(),
    "gemma2/dynamo20": {"softcap", "local_window_size"},
    "llama/dynamo20-bf16": set(),
    "phi3_longrope/dynamo20": set(),
}


@pytest.mark.parametrize("name", CORPUS)
def test_exports_are_proven_by_what_is_written(name: str, tmp_path: Path) -> None:
    (entry, *_) = corpus(name)
    report, found = page(entry.load(), tmp_path)
    assert report.proof is not None
    assert report.proof.status == "proven"
    assert report.paging is not None
    assert report.paging.kernel.startswith(("not run: ", "run on "))
    nodes = operators(found)
    assert len(nodes) == report.paging.layers
    assert not any(node.op_type == "PagedKeys" for node in found.graph.node)
    said = {word for inputs, attributes in nodes for word in (*inputs, *attributes)}
    assert said >= CORPUS[name]
    assert ("cos_cache" in said) == ("tokens a sequence" in report.contract)


def _scale(node: ir.Node) -> None:
    node.attributes["scale"] = ir.AttrFloat32("scale", node.attributes["scale"].as_float() * 1.2)


def _window(by: int) -> Callable[[ir.Node], None]:
    def broken(node: ir.Node) -> None:
        size = node.attributes["local_window_size"].as_int() + by
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", size)

    return broken


def _past(node: ir.Node) -> None:
    """Past lengths are where the sequences begin."""
    graph, edges = node.graph, node.inputs[5]
    assert graph is not None
    bounds = [ir.tensor(np.array([number])) for number in (0, -1)]
    constants = [ir.node("Constant", [], {"value": each}) for each in bounds]
    wrong = ir.node("Slice", [edges, *(each.outputs[0] for each in constants)])
    for each in (*constants, wrong):
        each.outputs[0].name = f"broken_{id(each)}"
    graph.insert_before(node, [*constants, wrong])
    node.replace_input_with(6, wrong.outputs[0])


def _caches(node: ir.Node) -> None:
    """Cosines and sines change places."""
    cos, sin = node.inputs[8:10]
    node.replace_input_with(8, sin)
    node.replace_input_with(9, cos)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("llama/dynamo20", _scale),
        ("mistral/dynamo20", _window(1)),
        ("mistral/dynamo20", _window(-1)),
        ("gpt2/dynamo20", _past),
        ("llama/dynamo20", _caches),
    ],
)
def test_a_model_that_says_something_else_is_not_written(
    name: str,
    broken: Callable[[ir.Node], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lower(*given: Any) -> Any:
        result, sites = paged_ort.lower_paged(*given)
        for node in list(result.model.graph):
            if node.domain == "com.microsoft":
                broken(node)
        return result, sites

    monkeypatch.setattr(pipeline_paged, "lower_paged", lower)
    (entry,) = corpus(name)
    with pytest.raises(ModelDiffersError):
        page(entry.load(), tmp_path)
    assert not (tmp_path / "paged").exists()


def test_block_sizes_and_types_that_the_operator_does_not_take(tmp_path: Path) -> None:
    model = parse(decoder(), opset=24, weights=TABLES)
    with pytest.raises(RefusedError, match="PAG011: blocks have 8 slots"):
        page(model, tmp_path, block_size=8)
    with pytest.raises(UsageError, match="block has a power of two"):
        page(model, tmp_path, block_size=24)
    with pytest.raises(UsageError, match="--kv-dtype fp32"):
        page(model, tmp_path, kv_dtype=ir.DataType.FLOAT)


def test_a_head_of_another_size_is_refused_by_check_too(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(parse(decoder(turned=False, size=12), opset=24), path)
    run = CliRunner().invoke(main, ["to-paged", str(path), "--flavor", "ort", "--check"])
    assert run.exit_code == 3
    assert "PAG011" in run.output
    assert "a head has 12 columns, which is no multiple of 8" in run.output
    assert "/PagedAttention]" in run.output
    assert CliRunner().invoke(main, ["to-paged", str(path), "--check"]).exit_code == 0


def test_latent_caches_are_refused_by_layer(tmp_path: Path) -> None:
    (entry,) = corpus("deepseek_v3/dynamo20-batched")
    with pytest.raises(RefusedError, match=r"PAG011: .*MLA.*--flavor portable") as caught:
        page(entry.load(), tmp_path, verify=False)
    report = caught.value.report
    assert report is not None
    assert report.paging is not None
    assert [each.code for each in report.paging.obstacles] == ["PAG011", "PAG011"]


def test_values_of_another_width_are_refused(tmp_path: Path) -> None:
    model = parse(decoder(turned=False, width=24), opset=24)
    with pytest.raises(RefusedError, match="PAG011: keys have 16 and values 24 columns a head"):
        page(model, tmp_path, verify=False)


@pytest.mark.parametrize(
    ("op_type", "overload", "words"),
    [
        ("PagedKeys", "chunk", "its mask is of chunks"),
        ("PagedKeys", "slopes", r"its mask is added by distance \(ALiBi\)"),
        ("PagedAttention", "shared", "it reads another layer's pools"),
    ],
)
def test_other_overloads_are_refused(
    op_type: str, overload: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lower(result: Any, *given: Any) -> Any:
        for node in result.model.graph:
            if node.op_type == op_type:
                node.overload = overload
        return paged_ort.lower_paged(result, *given)

    monkeypatch.setattr(pipeline_paged, "lower_paged", lower)
    with pytest.raises(RefusedError, match=f"PAG011: {words}"):
        page(parse(decoder(turned=False), opset=24), tmp_path, verify=False)


def _lowered(model: onnx.ModelProto, folder: Path, schema: LiveSchema, monkey: Any) -> Report:
    monkey.setattr(paged_ort, "live_schema", lambda: schema)
    return page(model, folder, verify=False)[0]


def test_what_an_older_schema_lacks_stays_outside_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = live_schema()
    assert schema is not None

    def without(*gone: str) -> LiveSchema:
        return LiveSchema(
            "0.1",
            tuple(name for name in schema.inputs if name not in gone),
            schema.required,
            schema.attributes - set(gone),
        )

    model = parse(decoder(normed=True), opset=24, weights=TABLES)
    older = without("q_norm_weight", "k_norm_weight", "qk_norm_epsilon")
    (site,) = _lowered(model, tmp_path, older, monkeypatch).lowered
    assert site.details == {"rotary": "inside"}
    (site,) = _lowered(model, tmp_path, without("cos_cache"), monkeypatch).lowered
    assert str(site.details["rotary"]).startswith("outside, since the operator of ONNX Runtime")
    with pytest.raises(RefusedError, match=r"ONNX Runtime 0\.1 differs in 'scale'"):
        _lowered(model, tmp_path, without("scale"), monkeypatch)


def test_a_runtime_without_the_operator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_ort, "live_schema", lambda: None)
    with pytest.raises(UnpageableError, match=r"has no com\.microsoft::PagedAttention"):
        paged_ort.lower_paged(None, runtime())
