"""Feeds say what the shape says: a padded run really has padding, in the right places."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxgen.analysis.feeds import Padding, RunShape, make_feeds, misfit
from onnxgen.analysis.roles import InputRole, Roles, find_roles
from onnxgen.testing import corpus


def roles_of(name: str) -> Roles:
    (entry,) = corpus(name)
    return find_roles(ir.from_proto(entry.stored))


def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_left_padding_lies_before_the_tokens() -> None:
    shape = RunShape(2, 3, 4, "left", (5, 0))
    assert shape.real.astype(int).tolist() == [[0, 0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]]
    assert shape.real_new.tolist() == [[False, True, True], [True, True, True]]
    assert shape.positions.tolist() == [[0, 0, 1], [4, 5, 6]]


def test_right_padding_lies_after_them() -> None:
    shape = RunShape(2, 3, 4, "right", (2, 0))
    assert shape.real.astype(int).tolist() == [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]
    assert shape.real_new.tolist() == [[True, False, False], [True, True, True]]
    assert shape.positions.tolist() == [[4, 4, 4], [4, 5, 6]]


def test_holes_lie_behind_the_first_token() -> None:
    shape = RunShape(batch=2, new=3, past=3, padding="holes", pads=(3, 0))
    assert shape.real.tolist() == [[True, False, False, False, True, True], [True] * 6]
    assert shape.positions.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_right_padding_of_a_prompt_stays_in_the_past() -> None:
    shape = RunShape(2, 1, 4, "right", (2, 0))
    assert shape.real.astype(int).tolist() == [[1, 1, 0, 0, 1], [1, 1, 1, 1, 1]]
    assert shape.real_new.all()
    assert shape.positions.tolist() == [[2], [4]]


def test_kept_places_of_cropped_and_static_caches() -> None:
    shape = RunShape(1, 2, 3, "left", (2,))
    assert shape.real_kept(5).astype(int).tolist() == [[0, 0, 1, 1, 1]]
    assert shape.real_kept(4).astype(int).tolist() == [[0, 1, 1, 1]]
    assert shape.real_kept(7).astype(int).tolist() == [[0, 0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("lengths", [(2, 0), (5, 0), (3, 7), (4, 1)])
def test_padding_is_there_and_leaves_every_row_a_new_token(
    padding: Padding, batch: int, lengths: tuple[int, int]
) -> None:
    new, past = lengths
    shape = RunShape(batch, new, past, padding)
    assert not shape.real.all()
    assert shape.real_new.any(axis=1).all()


def test_padding_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="right padding"):
        RunShape(2, 1, 0, "right")
    with pytest.raises(ValueError, match="left padding"):
        RunShape(1, 1, 0, "left")
    with pytest.raises(ValueError, match="left padding"):
        RunShape(2, 1, 4, "left", (0, 0))


def test_a_decoder_is_fed_what_its_graph_declares() -> None:
    roles = roles_of("llama/dynamo20")
    shape = RunShape(2, 3, 5, "left")
    feeds = make_feeds(roles, shape, random())
    assert list(feeds) == list(roles.inputs)
    assert feeds["input_ids"].shape == (2, 3)
    assert feeds["input_ids"].max() < roles.inputs["input_ids"].bound
    assert feeds["attention_mask"].tolist() == shape.real.astype(int).tolist()
    assert feeds["position_ids"].tolist() == shape.positions.tolist()
    past = feeds["past_key_values.0.key"]
    assert past.shape[2] == 5
    assert past.std() == pytest.approx(1, abs=0.1)
    for name, each in roles.inputs.items():
        assert feeds[name].dtype == each.dtype.numpy()


def test_float16_caches_are_fed_float16() -> None:
    feeds = make_feeds(roles_of("llama/torchscript-fp16"), RunShape(1, 2, 3), random())
    assert feeds["past_key_values.0.key"].dtype == np.float16


def test_some_inputs_alone_have_the_values_they_have_among_all() -> None:
    roles = roles_of("llama/dynamo20")
    shape = RunShape(2, 3, 5)
    every = make_feeds(roles, shape, random())
    some = make_feeds(roles, shape, random(), names=["past_key_values.1.value"])
    assert list(some) == ["past_key_values.1.value"]
    np.testing.assert_array_equal(some["past_key_values.1.value"], every["past_key_values.1.value"])


def test_what_a_graph_fixes_is_refused_otherwise() -> None:
    roles = roles_of("llama/dynamo20-decode")
    assert misfit(roles, RunShape(2, 3, 5)) == "the graph fixes new tokens at 1"
    with pytest.raises(ValueError, match="fixes new tokens at 1"):
        make_feeds(roles, RunShape(2, 3, 5), random())
    assert (
        misfit(roles_of("llama/dynamo20-prefill"), RunShape(1, 2, 3)) == "the graph takes no past"
    )


def test_a_static_cache_is_fed_whole_with_a_mask_over_it() -> None:
    roles = roles_of("qwen3/transformers-static")
    length = roles.static_length
    assert length is not None
    shape = RunShape(2, 1, 6, "left")
    feeds = make_feeds(roles, shape, random())
    for pair in roles.pairs:
        assert feeds[pair.past].shape[2] == length
    mask = feeds["attention_mask"]
    assert mask.shape == (2, length)
    assert mask[:, :7].tolist() == shape.real.astype(int).tolist()
    assert not mask[:, 7:].any()
    assert [feeds[each.name] for each in roles.named("cache_length")] == [6, 6]
    assert "hold" in misfit(roles, RunShape(1, 1, length))


def test_a_cropped_cache_is_fed_its_last_places() -> None:
    roles = roles_of("mistral/torchscript-cropped")
    cap = roles.pairs[0].cap
    assert cap is not None
    feeds = make_feeds(roles, RunShape(1, 2, cap + 4), random())
    assert feeds[roles.pairs[0].past].shape[2] == cap
    assert feeds["attention_mask"].shape == (1, cap + 6)


def test_a_mask_for_all_sequences_shows_what_one_of_them_needs() -> None:
    """Else a real token of the second, which is not padded, would see nothing."""
    role = InputRole("m", "mask", ir.DataType.BOOL, (1, 1, "s", "t"), ("B", "", "S", "T"))
    shape = RunShape(2, 4, padding="left", pads=(3, 0))
    feeds = make_feeds(Roles({"m": role}, {}), shape, np.random.default_rng(0))
    assert feeds["m"].shape == (1, 1, 4, 4)
    assert feeds["m"].all()


def test_inputs_beyond_memory_are_not_made() -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[b, 4611686018427387904] x) => (float y) { y = Relu (x) }'
    roles = find_roles(ir.from_onnx_text(text))
    assert "bytes, more than" in misfit(roles, RunShape())
    with pytest.raises(ValueError, match="more than"):
        make_feeds(roles, RunShape(), random())


def test_caches_of_odd_ranks_are_none() -> None:
    """A past without axes, written where a cache is: a file may say so, and nobody can run it."""
    text = '<ir_version: 10, opset_import: ["" : 24]> g (float[b, 1, 4] x, float past, int64[b] at) => (float y) { y = TensorScatter <axis = -2> (past, x, at) }'
    roles = find_roles(ir.from_onnx_text(text))
    assert roles.pairs == ()
    assert roles.static_room is None
