"""CAC001: rows written into a cache of fixed length, graph before and graph after.

Three key heads of size 20 in a cache of 24 places: B 2, S 5 when it is run, from place 3 on.
"""

from __future__ import annotations

import numpy as np
import pytest

from onnxgen.analysis.sampling import Sampler
from onnxgen.passes.raise_ import raise_model
from onnxgen.passes.tidy import tidy
from onnxgen.testing import CorpusEntry, corpus
from onnxgen.verify.rewrites import RewriteChecker
from tests import test_attention as attention
from tests.graphs import (
    assert_kept,
    assert_raised,
    assert_untouched,
    normalized,
    raised,
    run,
    runtime,
)

SIGNATURE = (
    "(int64[b,s] ids, int64 at, float[b,3,24,20] past) => (float[b,3,24,20] present)"
    " <float[37,50] table, float[50,60] wk>"
)
NEW = (
    "x = Gather(table, ids)  kp = MatMul(x, wk)  k3 = Reshape(kp, [0, 0, 3, 20])"
    "  k = Transpose<perm = [0, 2, 1, 3]>(k3)"
)
COUNT = (
    "sl = Shape<start = 1, end = 2>(ids)  ss = Squeeze(sl, [0])  bl = Shape<start = 0, end = 1>(ids)"
    "  bb = Squeeze(bl, [0])  row = Range(0, ss, 1)"
)
PLACES = "places = Add(row, at)"
FRONT = (
    "index = Unsqueeze(places, [-1])  front = Transpose<perm = [2, 0, 1, 3]>(past)"
    "  rows = Transpose<perm = [2, 0, 1, 3]>(k)  written = ScatterND(front, index, rows)"
    "  present = Transpose<perm = [1, 2, 0, 3]>(written)"
)
EACH = (
    "full = Concat<axis = 0>(bl, [3], sl, [20])  pu = Unsqueeze(places, [0, 1, 3])"
    "  index = Expand(pu, full)  present = ScatterElements<axis = 2>(past, index, k)"
)
COLUMNS = (
    "three = Concat<axis = 0>(bl, [3], sl)  batch = Range(0, bb, 1)  bu = Unsqueeze(batch, [1, 2])"
    "  be = Expand(bu, three)  bi = Unsqueeze(be, [-1])  he = Expand([[0], [1], [2]], three)"
    "  hi = Unsqueeze(he, [-1])  pe = Expand(places, three)  pi = Unsqueeze(pe, [-1])"
    "  index = Concat<axis = -1>(bi, hi, pi)  present = ScatterND(past, index, k)"
)
AROUND = (
    "start = Unsqueeze(at, [0])  end = Add(start, sl)  before = Slice(past, [0], start, [2])"
    "  behind = Slice(past, end, [9223372036854775807], [2])"
    "  present = Concat<axis = 2>(before, k, behind)"
)
AFTER = (
    f"{SIGNATURE} {{ {NEW}  bl = Shape<start = 0, end = 1>(ids)  start = Expand(at, bl)"
    "  present = TensorScatter<axis = 2>(past, k, start) }"
)


def write(written: str, *, places: str = PLACES, signature: str = SIGNATURE, new: str = NEW) -> str:
    """A graph that writes the new rows."""
    return f"{signature} {{ {new}  {COUNT}  {places}  {written} }}".replace(
        "[[0], [1], [2]]", "heads"
    ).replace("<float[37,50] table", "<int64[3,1] heads = {0, 1, 2}, float[37,50] table")


@pytest.mark.parametrize("written", [FRONT, EACH, COLUMNS, AROUND])
def test_every_spelling_of_a_write_becomes_one(written: str) -> None:
    result = assert_raised(write(written), AFTER, "CAC001")
    (site,) = result.sites
    assert dict(site.details) == {"length": "24", "new": "ids[1]", "mode": "linear"}


@pytest.mark.parametrize("written", [FRONT, EACH, COLUMNS, AROUND])
def test_a_written_model_is_not_written_again(written: str) -> None:
    once = assert_raised(write(written), None, "CAC001").after
    assert_untouched(once, opset=24)


@pytest.mark.parametrize(
    "places",
    [
        "steps = Range(0, 24, 1)  se = Unsqueeze(at, [0])  ee = Add(se, sl)"
        "  places = Slice(steps, se, ee, [0])",
        "ones = Expand(1, sl)  ends = CumSum(ones, 0)  less = Sub(ends, 1)  places = Add(less, at)",
        "past_rows = Add(at, ss)  r0 = Range(at, past_rows, 1)  places = Identity(r0)",
        "two = Add(row, 2)  more = Add(two, at)  places = Sub(more, 2)",
        # A negative start would count from the table's end, and what is added would hide it: the
        # first place is read where it is made.
        "steps = Range(0, 24, 1)  se = Unsqueeze(at, [0])  ee = Add(se, sl)"
        "  cut = Slice(steps, se, ee, [0])  places = Add(cut, 3)",
        "table2 = Range(0, 24, 1)  p0 = Add(row, at)  places = Gather(table2, p0)",
    ],
)
def test_places_that_count_however_they_are_made(places: str) -> None:
    result = assert_raised(write(FRONT, places=places), None, "CAC001")
    assert result.count("ScatterND") == 0


def test_a_place_of_its_own_for_each_sequence() -> None:
    signature = SIGNATURE.replace("int64 at", "int64[b] at")
    places = "au = Unsqueeze(at, [1])  places = Add(au, row)"
    pairs = (
        "two = Concat<axis = 0>(bl, sl)  batch = Range(0, bb, 1)  bu = Unsqueeze(batch, [1])"
        "  be = Expand(bu, two)  bi = Unsqueeze(be, [-1])  pi = Unsqueeze(places, [-1])"
        "  index = Concat<axis = -1>(bi, pi)  second = Transpose<perm = [0, 2, 1, 3]>(past)"
        "  written = ScatterND(second, index, k3)"
        "  present = Transpose<perm = [0, 2, 1, 3]>(written)"
    )
    after = f"{signature} {{ {NEW}  present = TensorScatter<axis = 2>(past, k, at) }}"
    assert_raised(write(pairs, places=places, signature=signature), after, "CAC001")
    each = (
        "full = Concat<axis = 0>(bl, [3], sl, [20])  pu = Unsqueeze(places, [1, 3])"
        "  index = Expand(pu, full)  present = ScatterElements<axis = 2>(past, index, k)"
    )
    assert_raised(write(each, places=places, signature=signature), after, "CAC001")


def test_a_place_of_its_own_for_each_head() -> None:
    """The operator's first axis is then the heads'."""
    signature = SIGNATURE.replace("int64 at", "int64[3] at")
    places = "au = Unsqueeze(at, [1])  places = Add(au, row)"
    each = EACH.replace("(places, [0, 1, 3])", "(places, [0, 3])")
    result = assert_raised(write(each, places=places, signature=signature), None, "CAC001")
    assert list(result.node("TensorScatter").input)[2] == "at"


def test_a_negative_index_into_a_table_counts_from_its_end() -> None:
    places = (
        "steps = Range(0, 24, 1)  se = Unsqueeze(at, [0])  ee = Add(se, sl)"
        "  cut = Slice(steps, se, ee, [0])  places = Add(cut, 10)"
    )
    result = assert_raised(write(FRONT, places=places), None, "CAC001")
    for rows, at in ((2, 3), (2, -15)):
        old, new = (run(model, feeds_at(rows, at)) for model in (result.before, result.after))
        np.testing.assert_array_equal(old["present"], new["present"])


def test_a_quantized_cache_is_written_as_it_is() -> None:
    signature = SIGNATURE.replace("float[b,3,24,20]", "int8[b,3,24,20]").replace(
        "<float[37,50] table", "<int8 zero, float[37,50] table"
    )
    coded = FRONT.replace("(k)", "(coded)")
    text = write(f"coded = QuantizeLinear(k, 0.05, zero)  {coded}", signature=signature)
    result = assert_raised(text, None, "CAC001")
    assert result.count("ScatterND") == 0


def test_one_row_that_is_chosen() -> None:
    signature = SIGNATURE.replace("b,s] ids", "b,1] ids")
    after = AFTER.replace("b,s] ids", "b,1] ids").replace("[0, 0, 3, 20]", "[0, 1, 3, 20]")
    chosen = (
        "all = Range(0, 24, 1)  here = Equal(all, at)  hu = Unsqueeze(here, [0, 1, 3])"
        "  present = Where(hu, k, past)"
    )
    others = (
        "all = Range(0, 24, 1)  here = Equal(at, all)  there = Not(here)"
        "  hu = Unsqueeze(there, [1])  present = Where(hu, past, k)"
    )
    for written in (chosen, others):
        assert_raised(write(written, signature=signature), after, "CAC001")


def test_one_row_goes_wherever_an_input_says() -> None:
    signature = SIGNATURE.replace("b,s] ids", "b,1] ids").replace("int64 at", "int64[1] at")
    after = (
        f"{signature} {{ {NEW}  bl = Shape<start = 0, end = 1>(ids)  start = Expand(at, bl)"
        "  present = TensorScatter<axis = 2>(past, k, start) }"
    ).replace("[0, 0, 3, 20]", "[0, 1, 3, 20]")
    places = "places = Identity(at)"
    assert_raised(write(FRONT, places=places, signature=signature), after, "CAC001")


def test_the_sequence_in_the_middle() -> None:
    signature = SIGNATURE.replace("[b,3,24,20]", "[b,24,3,20]")
    front = (
        "index = Unsqueeze(places, [-1])  front = Transpose<perm = [1, 0, 2, 3]>(past)"
        "  rows = Transpose<perm = [1, 0, 2, 3]>(k3)  written = ScatterND(front, index, rows)"
        "  present = Transpose<perm = [1, 0, 2, 3]>(written)"
    )
    after = (
        f"{signature} {{ {NEW}  bl = Shape<start = 0, end = 1>(ids)  start = Expand(at, bl)"
        "  present = TensorScatter<axis = 1>(past, k3, start) }"
    )
    assert_raised(write(front, signature=signature), after, "CAC001")


def test_the_sequence_in_front_is_brought_behind_the_batch() -> None:
    """TensorScatter's first axis is the sequences'."""
    signature = SIGNATURE.replace("[b,3,24,20]", "[24,b,3,20]")
    front = (
        "index = Unsqueeze(places, [-1])  rows = Transpose<perm = [1, 0, 2, 3]>(k3)"
        "  present = ScatterND(past, index, rows)"
    )
    result = assert_raised(write(front, signature=signature), None, "CAC001")
    assert result.count("TensorScatter") == 1


def test_a_prefill_starts_at_the_first_place() -> None:
    signature = SIGNATURE.replace("int64 at, ", "")
    after = f"{signature} {{ {NEW}  present = TensorScatter<axis = 2>(past, k) }}"
    places = "places = Identity(row)"
    for written in (FRONT, EACH, COLUMNS):
        assert_raised(write(written, places=places, signature=signature), after, "CAC001")


def test_places_that_start_over_are_circular() -> None:
    places = "p0 = Add(row, at)  places = Mod(p0, 24)"
    after = AFTER.replace("<axis = 2>", '<axis = 2, mode = "circular">')
    result = assert_raised(write(FRONT, places=places), after, "CAC001")
    assert result.sites[0].details["mode"] == "circular"
    feeds = feeds_at(5, 21)
    old, new = run(result.before, feeds), run(result.after, feeds)
    np.testing.assert_array_equal(old["present"], new["present"])
    # Modulo another number it is not the operator's: it is what the indices say, row by row.
    other = raised(write(FRONT, places=places.replace("24)", "30)")))
    assert {site.details.get("mode", "linear") for site in other.sites} == {"linear"}


def feeds_at(rows: int, at: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "ids": rng.integers(0, 37, (2, rows)),
        "at": np.array(at),
        "past": rng.standard_normal((2, 3, 24, 20)).astype(np.float32),
    }


@pytest.mark.parametrize("written", [FRONT, EACH, COLUMNS])
def test_what_does_not_fit_fails_as_before(written: str) -> None:
    result = assert_raised(write(written), None, "CAC001")
    for rows, at in ((5, 19), (1, 23), (24, 0), (3, 7)):
        feeds = feeds_at(rows, at)
        old, new = run(result.before, feeds), run(result.after, feeds)
        np.testing.assert_array_equal(old["present"], new["present"])
    for rows, at in ((5, 20), (1, 24), (5, 30)):
        for model in (result.before, result.after):
            with pytest.raises(Exception, match=r"ScatterND|ScatterElements|TensorScatter"):
                run(model, feeds_at(rows, at))
    # The one thing that is lost, and it is said: places counted from the end.
    assert run(result.before, feeds_at(1, -1))
    with pytest.raises(Exception, match="TensorScatter"):
        run(result.after, feeds_at(1, -1))


# --- what is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "places",
    [
        "twice = Mul(row, 2)  places = Add(twice, at)",
        "back = Sub(ss, row)  places = Add(back, at)",
        "at1 = Unsqueeze(at, [0])  places = Expand(at1, sl)",
        # It counts until it is nearly full, and the probe that holds out is there.
        "p0 = Add(row, at)  far = GreaterOrEqual(p0, 11)  fi = Cast<to = 7>(far)"
        "  places = Add(p0, fi)",
    ],
)
def test_places_that_do_not_follow_one_another(places: str) -> None:
    assert_kept(write(FRONT, places=places), "CAC001", "positions")


def test_places_that_differ_from_sequence_to_sequence_by_a_number() -> None:
    places = "bu = Unsqueeze(batch, [1])  p0 = Add(row, at)  places = Add(bu, p0)"
    each = EACH.replace("(places, [0, 1, 3])", "(places, [1, 3])")
    text = write(each, places=f"batch = Range(0, bb, 1)  {places}")
    assert_kept(text, "CAC001", "positions")


@pytest.mark.parametrize("heads", ["2, 1, 0", "0, 2, 1", "0, 0, 0"])
def test_heads_in_another_order(heads: str) -> None:
    text = write(COLUMNS).replace("{0, 1, 2}", f"{{{heads}}}")
    assert_kept(text, "CAC001", "rows")


def test_places_that_an_input_gives_may_be_any() -> None:
    signature = SIGNATURE.replace("int64 at", "int64[s] at")
    places = "places = Identity(at)"
    for written in (FRONT, COLUMNS):
        decline = assert_kept(
            write(written, places=places, signature=signature), "CAC001", "positions"
        )
        assert decline.reason == "'at' says where each new row goes, and may say any place"


def test_places_that_a_mask_gives_may_be_any() -> None:
    signature = SIGNATURE.replace("int64 at", "int64[b,s] mask")
    places = "counted = CumSum(mask, 1)  less = Sub(counted, 1)  places = Identity(less)"
    each = (
        "full = Concat<axis = 0>(bl, [3], sl, [20])  pu = Unsqueeze(places, [1, 3])"
        "  index = Expand(pu, full)  present = ScatterElements<axis = 2>(past, index, k)"
    )
    assert_kept(write(each, places=places, signature=signature), "CAC001", "positions")


def test_parts_of_rows() -> None:
    half = (
        "full = Concat<axis = 0>(bl, [3], sl, [8])  pu = Unsqueeze(places, [0, 1, 3])"
        "  index = Expand(pu, full)  part = Slice(k, [0], [8], [3])"
        "  present = ScatterElements<axis = 2>(past, index, part)"
    )
    assert_kept(write(half), "CAC001", "rows")
    two = COLUMNS.replace("heads, three", "[[0], [1]], three").replace("[3], sl)", "[2], sl)")
    two = two.replace("he = Expand([[0], [1], [2]], three)", "he = Expand(hs, three)").replace(
        "three = ", "hs = Unsqueeze([1, 2], [1])  some = Slice(k, [0], [2], [1])  three = "
    )
    assert_kept(write(two.replace("index, k)", "index, some)")), "CAC001", "rows")


def test_rows_that_are_added() -> None:
    added = FRONT.replace("ScatterND(", 'ScatterND<reduction = "add">(')
    assert_kept(write(added), "CAC001", "rows")


def test_a_gap_of_another_size() -> None:
    wide = AROUND.replace("end = Add(start, sl)", "e0 = Add(start, sl)  end = Add(e0, [1])")
    signature = SIGNATURE.replace("(float[b,3,24,20] present)", "(float[b,3,n,20] present)")
    assert_kept(write(wide, signature=signature), "CAC001", "rows")


def test_what_is_no_cache_is_left_alone() -> None:
    assert_untouched(
        "(int64[b,s] ids) => (float[b,s,50] y) <float[37,50] table>"
        "{ x = Gather(table, ids)  sl = Shape(x)  z = ConstantOfShape(sl)"
        "  zt = Transpose<perm = [1, 0, 2]>(z)  xt = Transpose<perm = [1, 0, 2]>(x)"
        "  one = Slice(xt, [0], [1], [0])  w = ScatterND(zt, [[0]], one)"
        "  y = Transpose<perm = [1, 0, 2]>(w) }".replace("[[0]]", "zero").replace(
            "<float[37,50] table>", "<float[37,50] table, int64[1,1] zero = {0}>"
        )
    )


# --- attention over the cache ----------------------------------------------------------------------


def attended(written: str, places: str = PLACES, cache: str = "[b,3,24,20]") -> str:
    """A block whose keys and values are written into caches."""
    signature = attention.SIGNATURE.replace("[b,t] attention_mask", "[b,24] attention_mask")
    signature = signature.replace("int64[b,s] ids,", "int64[b,s] ids, int64 at,")
    signature = signature.replace("[b,3,p,20]", cache).replace("[b,3,t,20]", cache)
    both = [
        written.replace("past", f"past_{c}")
        .replace("present", f"present_{c}")
        .replace("(k)", f"({c})")
        .replace("(k3)", f"({c}3)")
        for c in "kv"
    ]
    for name in ("index", "front", "rows", "written"):
        both[1] = both[1].replace(name, f"{name}2")
    keep = (
        "cols = Range(0, 24, 1)  ru = Unsqueeze(places, [1])  causal = LessOrEqual(cols, ru)"
        "  am = Cast<to = 9>(attention_mask)  au = Unsqueeze(am, [1, 2])  keep = And(causal, au)"
    )
    cached = "  ".join([COUNT, places, *both, "kc = Identity(present_k)  vc = Identity(present_v)"])
    return attention.block(signature=signature, cached=cached, keep=keep)


def test_attention_reads_what_tensor_scatter_wrote() -> None:
    result = assert_raised(attended(FRONT), None, "ATT001", "CAC001", "CAC001")
    node = result.node("Attention")
    assert list(node.input[1:3]) == ["present_k", "present_v"]
    assert len(node.input) == 4
    assert result.count("Transpose") == 4  # q, k, v and the output
    (site,) = [site for site in result.sites if site.kind == "attention"]
    assert site.details["cache"] == "static"
    assert_untouched(result.after, opset=24)


def test_attention_over_places_that_an_input_gives() -> None:
    text = attended(FRONT, "places = Identity(at)").replace("int64 at", "int64[s] at")
    result = raised(text)
    assert {(site.kind, site.status) for site in result.sites} == {
        ("cache", "kept"),
        ("attention", "fused"),
    }
    (site,) = result.fused
    assert site.details["cache"] == "outside"


@pytest.mark.parametrize("entry", corpus("*/*-static"), ids=lambda entry: entry.name)
def test_every_static_export(entry: CorpusEntry) -> None:
    model, roles = normalized(entry.load())
    checker = RewriteChecker(runtime(), roles)
    sampler = Sampler(model.graph, roles, runtime())
    sites = raise_model(model, roles, sampler=sampler, check=checker)
    tidy(model)
    assert {site.status for site in sites} == {"fused"}
    ops = [node.op_type for node in model.graph]
    assert not {"ScatterND", "ScatterElements"} & set(ops)
    assert ops.count("TensorScatter") == 2 * ops.count("Attention")
    assert {site.details["cache"] for site in sites if site.kind == "attention"} == {"static"}
