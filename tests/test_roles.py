"""Roles are read from structure: they agree with what the exporters were told, names or not."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from onnxgen.analysis.feeds import RunShape, make_feeds
from onnxgen.analysis.roles import Roles, find_roles
from onnxgen.errors import UsageError
from onnxgen.testing import CorpusEntry, corpus

# The corpus's own words for the roles, where they are others.
SAME = {
    "types": "type_ids",
    "past_key": "past",
    "past_value": "past",
    "static_key": "static_past",
    "static_value": "static_past",
    "past_length": "cache_length",
    "cache_positions": "cache_position",
    "constant": "constant_like",
    "cross_key": "cross_past",
    "cross_value": "cross_past",
    "hidden": "encoder_states",
}
ENTRIES = corpus()


def by_id(entry: CorpusEntry) -> str:
    return entry.name


def roles_of(text: str) -> Roles:
    """Roles of a model in ONNX text; what it declares without a value is a weight of zeros."""
    model = onnx.parser.parse_model(text)
    for value in model.graph.value_info:
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        zeros = np.zeros(dims, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(zeros, value.name))
    return find_roles(ir.serde.deserialize_model(model))


@pytest.mark.parametrize("entry", ENTRIES, ids=by_id)
def test_every_input_has_the_role_that_its_exporter_knew(entry: CorpusEntry) -> None:
    roles = find_roles(ir.from_proto(entry.stored))
    found = {name: each.role for name, each in roles.inputs.items()}
    described = entry.info["inputs"]
    known = {name: SAME.get(each["role"], each["role"]) for name, each in described.items()}
    words = set(known.values())
    for name, role in known.items():
        if role != "features":  # the corpus's word for whatever a model is given as floats
            continue
        if len(described[name]["shape"]) == 4:
            known[name] = "pixels"
        elif "cross_past" in words:  # the caches hold what would be read: it is passed through
            known[name] = "constant_like"
        elif "ids" in words:
            known[name] = "encoder_states"
    assert found == known


@pytest.mark.parametrize("entry", ENTRIES, ids=by_id)
def test_names_do_not_matter(entry: CorpusEntry) -> None:
    model = ir.from_proto(entry.stored)
    named = find_roles(model)
    for index, value in enumerate(model.graph.inputs):
        value.name = f"x{index}"
    for index, value in enumerate(model.graph.outputs):
        value.name = f"y{index}"
    blind = find_roles(model)
    # An input that nothing reads (positions of a model without rotary layers) has but its name.
    read = [bool(value.uses()) for value in model.graph.inputs]
    roles = [
        [r.role for r, there in zip(each.inputs.values(), read, strict=True) if there]
        for each in (blind, named)
    ]
    assert roles[0] == roles[1]
    assert [r.role for r in blind.outputs.values()] == [r.role for r in named.outputs.values()]
    assert [(p.axis, p.cap) for p in blind.pairs] == [(p.axis, p.cap) for p in named.pairs]


@pytest.mark.parametrize("entry", corpus("*/*"), ids=by_id)
def test_pasts_are_paired_with_their_own_presents(entry: CorpusEntry) -> None:
    roles = find_roles(ir.from_proto(entry.stored))
    known = entry.info["inputs"]
    pasts = [n for n, e in known.items() if SAME.get(e["role"]) in ("past", "static_past")]
    assert [pair.past for pair in roles.pairs] == pasts
    for pair in roles.pairs:
        past, present = pair.past.split(".")[1:], pair.present.split(".")[1:]
        assert past == present, "layer and kind are in the names here"
        assert pair.axis == 2
        assert pair.heads == known[pair.past]["shape"][1]
        assert pair.head_size == known[pair.past]["shape"][3]
        assert pair.static == known[pair.past]["role"].startswith("static")


def test_a_cropped_cache_knows_its_length() -> None:
    (entry,) = corpus("mistral/torchscript-cropped")
    roles = find_roles(ir.from_proto(entry.stored))
    assert {pair.cap for pair in roles.pairs} == {entry.info["dims"]["window"] - 1}
    (free,) = corpus("mistral/torchscript")
    assert {pair.cap for pair in find_roles(ir.from_proto(free.stored)).pairs} == {None}


def test_a_vocabulary_and_fixed_lengths_are_known() -> None:
    (entry,) = corpus("llama/dynamo20-decode")
    roles = find_roles(ir.from_proto(entry.stored))
    assert roles.named("ids")[0].bound == entry.info["dims"]["vocab"]
    assert dict(roles.fixed) == {"S": 1}
    (static,) = corpus("llama/transformers-static")
    roles = find_roles(ir.from_proto(static.stored))
    assert roles.static_length == entry_length(static)


def entry_length(entry: CorpusEntry) -> int:
    known = entry.info["inputs"].values()
    return int(next(e["shape"][2] for e in known if e["role"] == "static_key"))


def test_symbols_are_resolved_by_role() -> None:
    (entry,) = corpus("llama/dynamo20")
    roles = find_roles(ir.from_proto(entry.stored))
    # Batch of ids and batch of the mask are different symbols, and so are the pasts.
    letters = list(roles.symbols.values())
    assert letters.count("B") > 1
    assert letters.count("P") > 1
    assert roles.outputs["logits"].axes == ("B", "S", "")


def test_an_override_wins_and_a_wrong_one_is_refused() -> None:
    (entry,) = corpus("llama/dynamo20")
    model = ir.from_proto(entry.stored)
    roles = find_roles(model, {"position_ids": "constant_like"})
    assert roles.inputs["position_ids"].role == "constant_like"
    with pytest.raises(UsageError, match=r"no such input; inputs: input_ids, attention_mask"):
        find_roles(model, {"nothing": "ids"})
    with pytest.raises(UsageError, match=r"no such role; roles: ids, type_ids"):
        find_roles(model, {"input_ids": "tokens"})


def test_fused_caches_are_paired() -> None:
    roles = roles_of("""
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (int64[b,s] tokens, int64[b,t] a, float[b,2,p,16] c1, float[b,2,p,16] c2)
          => (float[b,s,64] y, float[b,2,t,16] k, float[b,2,t,16] v)
        <float[50,64] table, float[64,128] w, int64[1] one = {1}, int64[1] last = {1}, int64 at = {1}>
        {
            x = Gather(table, tokens)
            qkv = MatMul(x, w)
            counted = ReduceSum(a, last)
            less = Sub(counted, one)
            lens = Cast<to = 6>(less)
            shape = Shape(a)
            long = Gather(shape, at)
            total = Cast<to = 6>(long)
            y, k, v = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>(
                qkv, , , c1, c2, lens, total)
        }""")
    assert [(p.past, p.present, p.axis) for p in roles.pairs] == [("c1", "k", 2), ("c2", "v", 2)]
    assert {n: r.role for n, r in roles.inputs.items()} == {
        "tokens": "ids",
        "a": "mask",
        "c1": "past",
        "c2": "past",
    }


def test_a_standard_attention_with_cache_and_a_float_mask() -> None:
    roles = roles_of("""
        <ir_version: 10, opset_import: ["" : 24]>
        g (float[b,s,24] h, float[b,1,s,t] m, float[b,3,p,8] c1, float[b,3,p,8] c2)
          => (float[b,s,24] y, float[b,3,t,8] k, float[b,3,t,8] v)
        <float[24] g1, float[24,24] w>
        {
            n = RMSNormalization(h, g1)
            q = MatMul(n, w)
            y, k, v = Attention<q_num_heads = 3, kv_num_heads = 3>(q, q, q, m, c1, c2)
        }""")
    assert {n: r.role for n, r in roles.inputs.items()} == {
        "h": "embeds",
        "m": "mask",
        "c1": "past",
        "c2": "past",
    }
    assert roles.inputs["m"].axes == ("B", "", "S", "T")
    assert roles.inputs["m"].additive
    assert roles.pair_of("k") == roles.pair_of("c1")


def test_a_merged_decoder_is_read_in_both_branches() -> None:
    roles = roles_of("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (int64[b,s] tokens, float[b,p,8] old, float[b,e,8] cross, bool[1] past)
          => (float[b,t,8] new, float[b,e,8] kept)
        <float[50,8] table, float[8,8] w>
        { x = Gather(table, tokens)
          new, kept = If(past) <
            then_branch = with_past () => (n1, k1)
              { n1 = Concat<axis = 1>(old, x) k1 = Identity(cross) },
            else_branch = without () => (n2, k2)
              { n2 = Identity(x) k2 = MatMul(x, w) }>
        }""")
    assert roles.inputs["past"].role == "use_cache_branch"
    assert [(p.past, p.present, p.axis) for p in roles.pairs] == [("old", "new", 1)]
    assert roles.outputs["kept"].role == "copy"


def test_functions_are_looked_into() -> None:
    roles = roles_of("""
        <ir_version: 10, opset_import: ["" : 20, "local" : 1]>
        g (int64[b,s] tokens, float[b,p,8] old) => (float[b,t,8] new)
        <float[50,8] table>
        { new = local.embed(table, tokens, old) }
        <domain: "local", opset_import: ["" : 20]>
        embed (table, tokens, old) => (new)
        { x = Gather(table, tokens)
          y = Relu(x)
          new = Concat<axis = 1>(old, y) }""")
    assert roles.inputs["tokens"].role == "ids"
    assert roles.inputs["tokens"].bound == 50
    assert [(p.past, p.present, p.axis) for p in roles.pairs] == [("old", "new", 1)]


def test_unused_inputs_are_read_by_name_and_copies_are_known() -> None:
    roles = roles_of("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (int64[b,s] ids, int64[b,s] attention_mask, int64 window, int64 nothing)
          => (float[b,s,8] y, int64 kept)
        <float[50,8] table>
        { y = Gather(table, ids)
          kept = Identity(window) }""")
    assert [r.role for r in roles.inputs.values()] == [
        "ids",
        "mask",
        "constant_like",
        "constant_like",
    ]
    assert roles.outputs["kept"].role == "copy"


def test_a_symbol_that_is_a_number_is_fixed() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (int64[b,s] ids) => (float[b,s,8] y) <float[50,8] table> { y = Gather(table, ids) }""")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "2"
    assert dict(find_roles(ir.serde.deserialize_model(model)).fixed) == {"B": 2}


STATIC = (
    '<ir_version: 10, opset_import: ["" : 20]>'
    " g (int64[b,s] tokens, float[b,3,24,8] c, {at}) => (float[b,3,24,8] n)"
    " <float[50,24] table, int64[4] split = {{0, 0, 3, 8}}, int64[1] last = {{-1}},"
    " int64[1] one = {{1}}, int64[2] two = {{1, 2}}, int64[3] three = {{0, 1, 3}}, int64 zero = {{0}},"
    " int64 step = {{1}}, int64 long = {{24}}, int64[1] first = {{0}}, int64[1] end = {{24}},"
    " int64[1] along = {{2}}> {{ x = Gather(table, tokens)  y = Reshape(x, split)"
    "  k = Transpose<perm = [0, 2, 1, 3]>(y)  sl = Shape<start = 1, end = 2>(tokens)"
    "  ss = Squeeze(sl)  row = Range(zero, ss, step)  bl = Shape<start = 0, end = 1>(tokens)"
    "  bb = Squeeze(bl)  batch = Range(zero, bb, step)  {write} }}"
)
WRITES = {
    # Columns for batch, head and place: what the input says is the last.
    "int64 at": "p = Add(row, at)  full = Concat<axis = 0>(bl, along, sl)"
    "  b1 = Unsqueeze(batch, two)  b2 = Expand(b1, full)  b3 = Unsqueeze(b2, last)"
    "  h3 = Sub(b3, b3)  p2 = Expand(p, full)  p3 = Unsqueeze(p2, last)"
    "  i = Concat<axis = -1>(b3, h3, p3)  n = ScatterND(c, i, k)",
    "int64[] at": "all = Range(zero, long, step)  e = Equal(all, at)  u = Unsqueeze(e, three)"
    "  n = Where(u, k, c)",
    "int64[1] at": "stop = Add(at, sl)  a = Slice(c, first, at, along)"
    "  z = Slice(c, stop, end, along)  n = Concat<axis = 2>(a, k, z)",
    "int64[b] at": "u = Unsqueeze(at, one)  p = Add(u, row)  p1 = Unsqueeze(p, last)"
    "  b1 = Unsqueeze(batch, one)  two2 = Concat<axis = 0>(bl, sl)  b2 = Expand(b1, two2)"
    "  b3 = Unsqueeze(b2, last)  i = Concat<axis = -1>(b3, p1)"
    "  t = Transpose<perm = [0, 2, 1, 3]>(c)  w = ScatterND(t, i, y)"
    "  n = Transpose<perm = [0, 2, 1, 3]>(w)",
}


@pytest.mark.parametrize("at", WRITES)
def test_a_static_cache_is_known_by_its_write(at: str) -> None:
    text = STATIC.format(at=at.replace("[]", ""), write=WRITES[at])
    roles = roles_of(text)
    assert [(p.past, p.present, p.axis, p.static) for p in roles.pairs] == [("c", "n", 2, True)]
    assert roles.inputs["c"].axes == ("B", "K", "L", "D")
    assert roles.inputs["at"].role == "cache_length"
    assert roles.inputs["at"].axes == {"[1]": ("B",), "[b]": ("B",)}.get(at[5:8], ())
    assert roles.static_room == 24
    assert "S" not in roles.fixed


STARTS = """<ir_version: 10, opset_import: ["" : 24]>
    g (int64[b,{new}] tokens, int64[{sizes}] at) => (float[b,{new},8] y)
    <float[50,8] table, float[8,8] w, float[1] f, int64 zero = {{0}}, int64 one = {{1}},
    int64[1] u = {{-1}}>
    {{ sh = Shape(tokens)  s = Gather(sh, one)  row = Range(zero, s, one)  e = Gather(table, tokens)
      x = MatMul(e, w)  p = Add(row, at)  r = Cast<to = 1>(p)  a = Mul(r, f)  c = Cos(a)  t = Unsqueeze(c, u)
      y = Mul(x, t) }}"""


@pytest.mark.parametrize(
    ("sizes", "new", "role", "fixed"),
    [
        ("1", "s", "cache_length", None),
        ("1", "1", "positions", 1),
        ("1,1", "s", "positions", None),
        ("s", "s", "positions", None),
    ],
)
def test_one_number_beside_free_tokens_is_where_the_first_stands(
    sizes: str, new: str, role: str, fixed: int | None
) -> None:
    roles = roles_of(STARTS.format(sizes=sizes, new=new))
    assert roles.inputs["at"].role == role
    assert roles.fixed.get("S") == fixed
    new_tokens = fixed or 3
    feeds = make_feeds(roles, RunShape(1, new_tokens), np.random.default_rng(0))
    assert feeds["tokens"].shape == (1, new_tokens)
    assert feeds["at"].flat[0] == 0


def test_a_number_for_each_sequence_is_no_mask() -> None:
    roles = roles_of("""<ir_version: 10, opset_import: ["" : 24]>
        g (int64[b,s] tokens, int64[b] lens) => (float[b,s,s] y)
        <float[50,8] table, int64 zero = {0}, int64 one = {1}, int64[2] two = {1, 2}, float low>
        { x = Gather(table, tokens)  xt = Transpose<perm = [0, 2, 1]>(x)  q = MatMul(x, xt)
          sh = Shape(tokens)  s = Gather(sh, one)  row = Range(zero, s, one)
          n = Unsqueeze(lens, two)  keep = Less(row, n)  m = Where(keep, q, low)
          y = Softmax<axis = -1>(m) }""")
    assert roles.inputs["lens"].role == "unknown"
    feeds = make_feeds(roles, RunShape(2, 3), np.random.default_rng(0))
    assert feeds["lens"].shape == (2,)


def test_tensor_scatter_is_a_write() -> None:
    roles = roles_of("""
        <ir_version: 10, opset_import: ["" : 24]>
        g (int64[b,s] tokens, float[b,24,3,8] c, int64 at) => (float[b,24,3,8] n)
        <float[50,24] table, int64[4] split = {0, 0, 3, 8}>
        { x = Gather(table, tokens)  k = Reshape(x, split)  bl = Shape<start = 0, end = 1>(tokens)
          start = Expand(at, bl)  n = TensorScatter<axis = 1>(c, k, start) }""")
    assert [(p.past, p.present, p.axis, p.static) for p in roles.pairs] == [("c", "n", 1, True)]
    assert roles.inputs["at"].role == "cache_length"


def test_a_quantized_cache_is_a_cache() -> None:
    roles = roles_of("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (int64[b,s] tokens, int8[b,3,p,8] c) => (float[b,3,t,8] n)
        <float[50,24] table, int64[4] split = {0, 0, 3, 8}, float scale>
        { x = Gather(table, tokens)  y = Reshape(x, split)  k = Transpose<perm = [0, 2, 1, 3]>(y)
          d = DequantizeLinear(c, scale)  n = Concat<axis = 2>(d, k) }""")
    assert [(p.past, p.present, p.axis, p.static) for p in roles.pairs] == [("c", "n", 2, False)]
