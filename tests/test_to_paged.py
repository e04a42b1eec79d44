"""to-paged, from a file to a folder: what pages is proven, what does not says why, wrong is seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from onnxgen import pipeline_paged
from onnxgen.cli import main
from onnxgen.errors import ModelDiffersError, RefusedError, UsageError
from onnxgen.paged import Sequences
from onnxgen.pipeline import FuseOptions, fuse
from onnxgen.pipeline_paged import PageOptions, to_paged
from onnxgen.report.values import Report
from onnxgen.targets.paged import PagedModel, PagedOptions
from onnxgen.testing import CorpusEntry, corpus, load_corpus_model
from tests import paged_table
from tests.graphs import parse, run
from tests.merging import merged

KNOWN = paged_table.read(paged_table.TABLE.read_text("utf-8"))
FP16 = ir.DataType.FLOAT16


def written(folder: Path, name: str | onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    model = load_corpus_model(name) if isinstance(name, str) else name
    path.write_bytes(model.SerializeToString())
    return path


def page(path: Path, *, inline: bool = False, **options: Any) -> tuple[Report, onnx.ModelProto]:
    out = path.parent / "out"
    asked = PageOptions(output=out, paged=PagedOptions(**options), inline=inline)
    report = to_paged(path, asked, lambda message: None)
    return report, onnx.load(out / "model.onnx")


def shapes(values: Sequence[onnx.ValueInfoProto]) -> dict[str, list[int | str]]:
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in values
    }


@pytest.mark.parametrize("entry", corpus(), ids=lambda entry: entry.name)
def test_every_export_pages_as_the_table_says(entry: CorpusEntry) -> None:
    assert not paged_table.worse(paged_table.measure(entry), KNOWN.get(entry.name))


def test_the_table_is_whole() -> None:
    assert set(KNOWN) == {entry.name for entry in corpus()}
    text = paged_table.TABLE.read_text("utf-8")
    assert paged_table.as_text(KNOWN.values()) == text


def test_inputs_and_outputs_are_those_that_the_engine_reads(tmp_path: Path) -> None:
    report, model = page(written(tmp_path, "llama/dynamo20"), block_size=32)
    pool = ["num_blocks", 32, 3, 48]
    names = [f"past_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    assert shapes(model.graph.input) == {
        "input_ids": ["num_tokens"],
        "cumulative_sequence_lengths": ["batch_size + 1"],
        "past_sequence_lengths": ["batch_size"],
        "block_table": ["batch_size", "max_num_blocks"],
        **dict.fromkeys(names, pool),
    }
    presents = [name.replace("past_key_values", "present") for name in names]
    assert shapes(model.graph.output) == {
        "logits": ["num_tokens", 131],
        **dict.fromkeys(presents, pool),
    }
    ops = [node.op_type for node in model.graph.node]
    assert (ops.count("PagedTokens"), ops.count("PagedKeys"), ops.count("PagedAttention")) == (
        1,
        1,
        2,
    )
    assert "Attention" not in ops
    assert report.paging is not None
    assert (report.paging.layers, report.paging.token_bytes) == (2, 2304)


@pytest.mark.parametrize(
    ("options", "logits", "extra"),
    [
        ({"logits": "last"}, ["batch_size", 131], []),
        ({"logits": "indices"}, ["num_logits", 131], ["logits_indices"]),
        ({"slot_mapping": True}, ["num_tokens", 131], ["slot_mapping"]),
        ({"kv_dtype": FP16, "inline": True}, ["num_tokens", 131], []),
        ({"block_size": 1}, ["num_tokens", 131], []),
        (
            {"logits": "last", "slot_mapping": True, "kv_dtype": FP16, "block_size": 4},
            ["batch_size", 131],
            ["slot_mapping"],
        ),
    ],
    ids=lambda each: str(each) if isinstance(each, dict) else "",
)
@pytest.mark.parametrize("name", ["llama/dynamo20", "gpt_oss/transformers"])
def test_what_is_asked_for_is_proven(
    name: str, options: dict[str, Any], logits: list[Any], extra: list[str], tmp_path: Path
) -> None:
    report, model = page(written(tmp_path, name), **options)
    assert report.proof is not None
    assert report.proof.status == "proven"
    assert shapes(model.graph.output)["logits"] == logits
    given = [value.name for value in model.graph.input if "past_key" not in value.name]
    assert given[4:] == extra
    kinds = {v.type.tensor_type.elem_type for v in model.graph.input if "past_key" in v.name}
    assert kinds == {onnx.TensorProto.FLOAT16 if "kv_dtype" in options else onnx.TensorProto.FLOAT}
    assert bool(model.functions) == ("inline" not in options)
    told = json.loads({prop.key: prop.value for prop in model.metadata_props}["onnxgen.paged"])
    assert told["block_size"] == options.get("block_size", 16)
    assert ("row of zeros" in report.contract) == (options.get("logits") == "last")
    assert "; ".join(told["contract"]) == report.contract


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_a_fused_model_pages_like_its_original(target: str, tmp_path: Path) -> None:
    path = written(tmp_path, "mistral/dynamo20")
    fused = tmp_path / "fused.onnx"
    fuse(path, FuseOptions(output=fused, target=target, padding="any"), lambda message: None)
    report, model = page(fused)
    assert report.proof is not None
    assert report.proof.status == "proven"
    assert [node.op_type for node in model.graph.node].count("PagedAttention") == 2


def test_of_a_merged_decoder_the_branch_that_continues_is_paged(tmp_path: Path) -> None:
    llama = load_corpus_model("llama/dynamo20")
    report, model = page(written(tmp_path, merged(llama, llama)))
    assert report.proof is not None
    assert report.proof.status == "proven"
    assert "use_cache_branch" not in shapes(model.graph.input)


def test_embeddings_come_in_rows_of_tokens(tmp_path: Path) -> None:
    model = ir.from_proto(load_corpus_model("llama/dynamo20"))
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    gather = next(node for node in model.graph if node.op_type == "Gather" and ids in node.inputs)
    width = (gather.outputs[0].shape or ())[-1]
    dims = [*(ids.shape or ()), width]
    embeds = ir.Value(name="embeds", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(dims))
    ir.convenience.replace_all_uses_with(gather.outputs[0], embeds)
    ir.convenience.replace_all_uses_with(ids, embeds)
    model.graph.remove(gather, safe=True)
    model.graph.inputs[list(model.graph.inputs).index(ids)] = embeds
    report, paged = page(written(tmp_path, ir.to_proto(model)))
    assert report.proof is not None
    assert report.proof.status == "proven"
    assert shapes(paged.graph.input)["inputs_embeds"] == ["num_tokens", width]


# --- what is wrong is seen -------------------------------------------------------------------


def nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


def set_int(node: ir.Node, name: str, number: int) -> None:
    node.attributes[name] = ir.AttrInt64(name, number)


def window_longer(model: ir.Model) -> None:
    set_int(nodes(model, "PagedKeys")[0], "window", 7)


def window_shorter(model: ir.Model) -> None:
    set_int(nodes(model, "PagedKeys")[0], "window", 5)


def blocks_misread(model: ir.Model) -> None:
    node = nodes(model, "PagedKeys")[0]
    set_int(node, "block_size", node.attributes["block_size"].as_int() // 2)


def blocks_miswritten(model: ir.Model) -> None:
    node = nodes(model, "PagedTokens")[0]
    set_int(node, "block_size", node.attributes["block_size"].as_int() // 2)


def scale_off(model: ir.Model) -> None:
    node = nodes(model, "PagedAttention")[1]
    scale = node.attributes["scale"].as_float()
    node.attributes["scale"] = ir.AttrFloat32("scale", scale * 1.01)


def pools_swapped(model: ir.Model) -> None:
    node = nodes(model, "PagedAttention")[0]
    key, value = node.inputs[3], node.inputs[4]
    node.replace_input_with(3, value)
    node.replace_input_with(4, key)


def rows_shuffled(model: ir.Model) -> None:
    node = nodes(model, "PagedAttention")[0]
    node.replace_input_with(9, nodes(model, "PagedTokens")[0].outputs[0])  # positions for places


def past_forgotten(model: ir.Model) -> None:
    """Positions that count from each run's start."""
    plan = nodes(model, "PagedTokens")[0]
    graph = model.graph
    zero = ir.node("Sub", [plan.inputs[1], plan.inputs[1]])
    wrong = ir.node(
        "PagedTokens",
        [plan.inputs[0], zero.outputs[0], *plan.inputs[2:]],
        plan.attributes,
        domain="onnxgen",
        num_outputs=5,
    )
    graph.insert_before(plan, [zero, wrong])
    wrong.outputs[0].name, zero.outputs[0].name = "wrong", "zero"
    for index, output in enumerate(wrong.outputs):
        output.name = f"wrong{index}"
    ir.convenience.replace_all_uses_with(plan.outputs[0], wrong.outputs[0])


BREAKS = (
    window_longer,
    window_shorter,
    blocks_misread,
    blocks_miswritten,
    scale_off,
    pools_swapped,
    rows_shuffled,
    past_forgotten,
)


@pytest.mark.parametrize("spoil", BREAKS, ids=lambda spoil: spoil.__name__)
def test_a_wrong_model_is_not_written(
    spoil: Callable[[ir.Model], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = pipeline_paged.page_model

    def wrong(model: ir.Model, *given: Any) -> PagedModel:
        made = right(model, *given)
        spoil(made.model)
        return made

    monkeypatch.setattr(pipeline_paged, "page_model", wrong)
    with pytest.raises(ModelDiffersError, match=r"differs by|fails in|is written where"):
        page(written(tmp_path, "mistral/dynamo20"))
    assert not (tmp_path / "out").exists()


# --- what cannot be paged says why -----------------------------------------------------------


def command(*words: str) -> tuple[int, Any, str]:
    result = CliRunner().invoke(main, ["to-paged", *words, "--json"])
    return result.exit_code, json.loads(result.stdout), result.stderr


def test_check_converts_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, "gpt2/torchscript")
    code, document, _ = command(str(path), "--check")
    assert code == 0
    assert document["report"]["paging"]["layers"] == 2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("bert/dynamo20", "PAG002", "continues no cache"),
        ("llama/dynamo20-prefill", "PAG002", "continues no cache"),
        ("t5_decoder/dynamo20-eager", "PAG004", "no family that can be paged"),
        ("whisper_decoder/dynamo20", "PAG006", "an encoder's"),
        ("vit/dynamo20", "PAG005", "Conv mixes tokens"),
    ],
)
def test_a_refusal_has_a_code(name: str, code: str, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, name)
    for check in ([], ["--check"]):
        status, document, error = command(str(path), *check)
        assert status == 3
        assert f"cannot be paged: {document['report']['paging']['obstacles'][0]['code']}" in error
        found = document["report"]["paging"]["obstacles"]
        assert any(each["code"] == code and words in each["reason"] for each in found)
        assert all(each["node"] for each in found)
    assert list(tmp_path.iterdir()) == [path]


def small(
    state: str = "", more: str = "", outputs: str = "", causal: bool = True, weights: str = ""
) -> onnx.ModelProto:
    """A decoder of one layer, with whatever else it keeps."""
    seen = (
        "  n = Shape<start = 1, end = 2>(ids)  p = Shape<start = 2, end = 3>(past_key)"
        "  t = Add(n, p)  ps = Squeeze(p)  ts = Squeeze(t)  at = Range(ps, ts, 1)"
        "  ks = Range(0, ts, 1)  row = Unsqueeze(at, [1])  mask = LessOrEqual(ks, row)"
        "  m = Where(mask, c, -30000.0)"
    )
    everything = "  m = Identity(c)"
    return parse(
        f"(int64[b,s] ids, float[b,6,p,20] past_key, float[b,6,p,20] past_value{state})"
        " => (float[b,s,120] y, float[b,6,t,20] present_key, float[b,6,t,20] present_value"
        f"{outputs}) <float[37,120] table, float[120,120] wq, float[120,120] wk, float[120,120] wv,"
        f" float[120,1,4] wc{weights}> {{ x = Gather(table, ids)"
        "  qp = MatMul(x, wq)  kp = MatMul(x, wk)  vp = MatMul(x, wv)"
        "  q4 = Reshape(qp, [0, 0, 6, 20])  q = Transpose<perm = [0, 2, 1, 3]>(q4)"
        "  k4 = Reshape(kp, [0, 0, 6, 20])  k = Transpose<perm = [0, 2, 1, 3]>(k4)"
        "  v4 = Reshape(vp, [0, 0, 6, 20])  v = Transpose<perm = [0, 2, 1, 3]>(v4)"
        "  present_key = Concat<axis = 2>(past_key, k)  present_value = Concat<axis = 2>(past_value, v)"
        "  kt = Transpose<perm = [0, 1, 3, 2]>(present_key)  sc = MatMul(q, kt)  c = Mul(sc, 0.25)"
        f"{seen if causal else everything}  pr = Softmax<axis = -1>(m)  o = MatMul(pr, present_value)"
        f"  tr = Transpose<perm = [0, 2, 1, 3]>(o)  merged = Reshape(tr, [0, 0, 120]) {more} }}"
    )


def test_a_small_decoder_before_and_after(tmp_path: Path) -> None:
    _, model = page(written(tmp_path, small(more="y = Add(merged, x)")))
    ops = [node.op_type for node in model.graph.node]
    assert sorted(ops) == [
        "Add",
        "Gather",
        *["MatMul"] * 3,
        "PagedAttention",
        "PagedKeys",
        "PagedTokens",
        *["Reshape"] * 4,
        "Squeeze",
        "Unsqueeze",
    ]


STATES = "z = Add(merged, x)  y = MatMul(z, head)  states = Identity(merged)"
HEAD = ", float[120,37] head"


def with_states() -> onnx.ModelProto:
    """Hidden states, that are the attention's own, before the scores."""
    model = small(more=STATES, outputs=", float[b,s,120] states", weights=HEAD)
    outputs = {value.name: value for value in model.graph.output}
    outputs["y"].type.tensor_type.shape.dim[2].dim_value = 37
    del model.graph.output[:]
    model.graph.output.extend(outputs[n] for n in ("states", "y", "present_key", "present_value"))
    return model


@pytest.mark.parametrize("logits", ["all", "last"])
def test_other_rows_are_answered_beside_the_scores(logits: str, tmp_path: Path) -> None:
    report, model = page(written(tmp_path, with_states()), logits=logits)
    assert report.proof is not None
    assert report.proof.status == "proven"
    found = shapes(model.graph.output)
    assert list(found)[:2] == ["logits", "states"]
    assert found["states"] == ["num_tokens", 120]
    assert found["logits"] == ["num_tokens" if logits == "all" else "batch_size", 37]


def test_other_rows_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = pipeline_paged.page_model

    def wrong(model: ir.Model, *given: Any) -> PagedModel:
        made = right(model, *given)
        output = next(value for value in made.model.graph.outputs if value.name == "states")
        node = output.producer()
        assert node is not None
        twice = ir.node("Add", [output, output])
        made.model.graph.append(twice)
        output.name, twice.outputs[0].name = "half", "states"
        twice.outputs[0].type, twice.outputs[0].shape = output.type, output.shape
        index = list(made.model.graph.outputs).index(output)
        made.model.graph.outputs[index] = twice.outputs[0]
        return made

    monkeypatch.setattr(pipeline_paged, "page_model", wrong)
    with pytest.raises(ModelDiffersError, match="states of a differs by"):
        page(written(tmp_path, with_states()))


def test_positions_that_are_limited_stay_so(tmp_path: Path) -> None:
    """Rows of a table of 12, the last for every position beyond."""
    more = "last = Min(at, 11)  rows = Gather(places, last)  z = Add(merged, rows)  y = Add(z, x)"
    model = small(more=more, weights=", float[12,120] places")
    report, paged = page(written(tmp_path, model))
    assert report.proof is not None
    assert report.proof.status == "proven"
    assert any("over 12" in case.name or "over 13" in case.name for case in report.proof.cases)
    assert "Min" in [node.op_type for node in paged.graph.node]


@pytest.mark.parametrize(
    "limited",
    [
        "real = Cast<to = 1>(at)  low = Min(real, 70.0)  last = Cast<to = 7>(low)",
        "half = Cast<to = 10>(at)  last = Cast<to = 7>(half)",
        "real = Cast<to = 1>(at)  h = Mul(real, 0.01)  f = Floor(h)  w = Mul(f, 100.0)"
        "  low = Sub(real, w)  last = Cast<to = 7>(low)",
        "last = Gather(clamped, at)",
    ],
    ids=["float limit", "half precision", "remainder", "table"],
)
def test_positions_that_change_far_away_are_kept(limited: str, tmp_path: Path) -> None:
    """What short runs show are positions; what is written says what the original says at 3,000."""
    more = f"{limited}  rows = Gather(places, last)  z = Add(merged, rows)  y = Add(z, x)"
    model = small(more=more, weights=", float[4000,120] places, int64[4000] clamped")
    table = np.minimum(np.arange(4000), 70)
    for index, tensor in enumerate(model.graph.initializer):
        if tensor.name == "clamped":
            model.graph.initializer[index].CopyFrom(onnx.numpy_helper.from_array(table, "clamped"))
    path = written(tmp_path, model)
    _, paged = page(path)
    rng = np.random.default_rng(0)
    caches = rng.standard_normal((2, 6, 3000, 20), np.float32)
    feeds = {"ids": np.array([[5]]), "past_key": caches[:1], "past_value": caches[1:]}
    wanted = run(model, feeds)["y"]
    sequences = Sequences(200, 16)
    one = sequences.add([5] * 3001)
    sequences.feeds({one: 3000})
    pools = {
        f"past_key_values.0.{kind}": np.zeros((200, 16, 6, 20), np.float32)
        for kind in ("key", "value")
    }
    for pool, cache in zip(pools.values(), caches, strict=True):
        pool.reshape(-1, 6, 20)[sequences.slots(one)] = cache.transpose(1, 0, 2)
    found = run(paged, {**sequences.feeds({one: 1}), **pools})["logits"]
    assert np.abs(found - wanted[0]).max() < 1e-4


def test_a_place_in_the_run_is_no_position(tmp_path: Path) -> None:
    more = (
        "ns = Squeeze(n)  place = Range(0, ns, 1)  most = Max(place, 100)  real = Cast<to = 1>(most)"
        "  column = Unsqueeze(real, [1])  z = Mul(merged, column)  y = Add(z, x)"
    )
    with pytest.raises(RefusedError, match="PAG008: Cast takes a place in the run"):
        page(written(tmp_path, small(more=more)))


@pytest.mark.parametrize("length", ["t", "n"])
@pytest.mark.parametrize("beyond", [2.0, 2048.0])
def test_a_length_that_scales_is_refused(length: str, beyond: float, tmp_path: Path) -> None:
    """Each sequence has its own; what short runs show may be one for all."""
    more = (
        f"real = Cast<to = 1>({length})  most = Max(real, {beyond})  root = Log(most)"
        "  z = Mul(merged, root)  y = Add(z, x)"
    )
    with pytest.raises(RefusedError, match="PAG008: Cast takes a length for more than a size"):
        page(written(tmp_path, small(more=more)))


def with_temperature() -> onnx.ModelProto:
    """Logits that a number of the caller's divides."""
    model = ir.from_proto(load_corpus_model("llama/dynamo20"))
    logits = model.graph.outputs[0]
    given = ir.Value(name="temperature", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
    model.graph.inputs.append(given)
    divided = ir.node("Div", [logits, given])
    model.graph.append(divided)
    scores = divided.outputs[0]
    scores.type, scores.shape = logits.type, logits.shape
    logits.name, scores.name = "raw", "logits"
    model.graph.outputs[0] = scores
    return ir.to_proto(model)


@pytest.mark.parametrize("words", [[], ["--check"], ["--no-verify"]], ids=" ".join)
def test_an_input_that_paging_does_not_know_is_not_left_out(
    words: list[str], tmp_path: Path
) -> None:
    path = written(tmp_path, with_temperature())
    code, document, error = command(str(path), *words)
    assert code == 3
    (obstacle,) = document["report"]["paging"]["obstacles"]
    assert (obstacle["code"], obstacle["node"]) == ("PAG008", "temperature")
    assert "depends on input 'temperature', which a paged model lacks" in error
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "placed",
    [
        "moved = Mul(at, given)",
        "twice = Mul(given, at)  moved = Sub(twice, given)",
        "far = Mul(ts, given)  rest = Sub(far, ns)  more = Sub(at, ps)  moved = Add(more, rest)",
    ],
    ids=["spread", "moved", "length"],
)
def test_positions_that_an_input_moves_are_none(placed: str, tmp_path: Path) -> None:
    """Runs feed such an input with ones alone: they do not show what it does."""
    more = f"ns = Squeeze(n)  {placed}  rows = Gather(places, moved)  z = Add(merged, rows)"
    model = small(", int64 given", f"{more}  y = Add(z, x)", weights=", float[4000,120] places")
    with pytest.raises(RefusedError, match=r"PAG008: .*input 'given'"):
        page(written(tmp_path, model))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (small(more="y = Add(merged, x)", causal=False), "PAG004: its mask is full: tokens see"),
        (
            small(
                ", float[b,120,3] conv_state",
                "xt = Transpose<perm = [0, 2, 1]>(x)  cat = Concat<axis = 2>(conv_state, xt)"
                "  new_state = Slice(cat, [-3], [9223372036854775807], [2])"
                "  cv = Conv<group = 120>(cat, wc)  back = Transpose<perm = [0, 2, 1]>(cv)"
                "  y = Add(merged, back)",
                ", float[b,120,3] new_state",
            ),
            "PAG005: Conv mixes tokens outside attention",
        ),
        (
            small(
                ", float[b,120] state",
                "mean = ReduceMean<keepdims = 0>(x, [1])  new_state = Add(state, mean)"
                "  wide = Unsqueeze(new_state, [1])  y = Add(merged, wide)",
                ", float[b,120] new_state",
            ),
            "PAG005: ReduceMean mixes tokens",
        ),
        (
            small(more="mean = ReduceMean<keepdims = 1>(x, [1])  y = Add(merged, mean)"),
            "PAG005: ReduceMean mixes tokens outside attention",
        ),
    ],
    ids=["bidirectional", "convolution", "state", "mean"],
)
def test_what_no_block_holds_is_refused(model: onnx.ModelProto, words: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=words):
        page(written(tmp_path, model))
    assert not (tmp_path / "out").exists()


def test_a_paged_model_is_not_paged_again(tmp_path: Path) -> None:
    page(written(tmp_path, "llama/dynamo20"))
    with pytest.raises(RefusedError, match="PAG001: the model is paged already"):
        page(tmp_path / "out" / "model.onnx")


def test_a_cache_without_a_partner_is_refused(tmp_path: Path) -> None:
    model = load_corpus_model("llama/dynamo20")
    kept = [value for value in model.graph.output if value.name != "present.1.value"]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    with pytest.raises(RefusedError, match=r"cannot be paged: PAG00\d: .*\["):
        page(written(tmp_path, model))


@pytest.mark.parametrize("size", [0, -16, 3, 1 << 31])
def test_blocks_have_a_power_of_two_of_slots(size: int, tmp_path: Path) -> None:
    path = written(tmp_path, "llama/dynamo20")
    with pytest.raises(UsageError, match=f"--block-size {size}: a block has a power of two"):
        page(path, block_size=size)
    assert not (tmp_path / "out").exists()


def test_a_mask_that_is_not_understood_is_not_dropped(tmp_path: Path) -> None:
    """Every third key is hidden: no family says so."""
    model = ir.from_proto(load_corpus_model("llama/dynamo20"))
    graph = model.graph
    mask = next(node.outputs[0] for node in graph if node.op_type == "And")
    third = ir.Value(
        name="third",
        type=ir.TensorType(ir.DataType.BOOL),
        shape=ir.Shape([1 << 14]),
        const_value=ir.tensor(np.arange(1 << 14) % 3 != 1),
    )
    graph.register_initializer(third)
    zero, last = (
        ir.Value(
            name=f"number{n}",
            const_value=ir.tensor(np.array([n], np.int64)),
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape([1]),
        )
        for n in (0, 3)
    )
    graph.register_initializer(zero)
    graph.register_initializer(last)
    size = ir.node("Shape", [mask], {"start": 3, "end": 4})
    part = ir.node("Slice", [third, zero, size.outputs[0]])
    both = ir.node("And", [mask, part.outputs[0]])
    for index, node in enumerate((size, part, both)):
        node.outputs[0].name = f"sparse{index}"
    both.outputs[0].type, both.outputs[0].shape = mask.type, mask.shape
    ir.convenience.replace_all_uses_with(mask, both.outputs[0])
    both.replace_input_with(0, mask)
    size.replace_input_with(0, mask)
    graph.insert_after(mask.producer(), [size, part, both])
    with pytest.raises(RefusedError, match="PAG004: its mask is of no family that can be paged"):
        page(written(tmp_path, ir.to_proto(model)))
