"""Blocks, who owns them, and a runner whose pools are written in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from onnxgen.errors import RefusedError
from onnxgen.paged import BlockAllocator, OutOfBlocksError, PagedRunner, Sequences
from tests.generating import PROMPTS, entry, page, step_by_step, written

NEW = 9
FORMS = ["llama/dynamo20", "gpt2/dynamo20"]


@pytest.fixture(scope="module", params=FORMS)
def models(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """The name of a corpus model, where it lies, and where it lies paged in blocks of four."""
    return (request.param, *paged(tmp_path_factory.mktemp("paged"), request.param))


def paged(folder: Path, name: str, **options: Any) -> tuple[Path, Path]:
    """A corpus model and its paged form."""
    path = written(folder / "in", name)
    page(path, folder / "out", **options)
    return path, folder / "out" / "model.onnx"


def greedy(runner: PagedRunner, limit: int | None = None) -> None:
    """Run a step; each sequence of which all tokens have run gets the likeliest next one."""
    for sequence, logits in runner.step(limit).items():
        assert np.isfinite(logits).all()
        if not runner.sequences.waiting(sequence):
            runner.extend(sequence, [int(logits[-1].argmax())])


def made(runner: PagedRunner, sequence: int, prompt: Sequence[int]) -> list[int]:
    """The tokens behind a prompt."""
    return runner.sequences.tokens(sequence)[len(prompt) :]


# --- blocks --------------------------------------------------------------------------------------


def test_blocks_are_taken_and_given_back() -> None:
    blocks = BlockAllocator(5, 4, order=[3, 1, 4, 0, 2])
    first = blocks.take(2)
    assert first == [3, 1]
    assert blocks.take(2) == [4, 0]
    assert blocks.free == 1
    assert blocks.give_back(first) == first
    assert blocks.free == 3
    assert sorted(blocks.take(3)) == [1, 2, 3]


def test_no_block_is_taken_where_there_are_too_few() -> None:
    blocks = BlockAllocator(3, 4)
    blocks.take(1)
    with pytest.raises(OutOfBlocksError, match="3 blocks are needed and 2 are free"):
        blocks.take(3)
    assert blocks.free == 2
    assert blocks.take(0) == []


def test_a_shared_block_is_free_when_its_last_owner_goes() -> None:
    blocks = BlockAllocator(3, 4)
    both = blocks.take(2)
    blocks.share(both[:1])
    assert blocks.give_back(both) == both[1:]
    assert blocks.free == 2
    assert blocks.give_back(both[:1]) == both[:1]
    assert blocks.free == 3


def test_what_is_nobodys_is_neither_shared_nor_given_back() -> None:
    blocks = BlockAllocator(3, 4)
    (mine,) = blocks.take(1)
    for wrong in ([mine, mine + 1], [mine, mine + 7], [mine, -1]):
        with pytest.raises(ValueError, match="is nobody's"):
            blocks.give_back(wrong)
        with pytest.raises(ValueError, match="is nobody's"):
            blocks.share(wrong)
    with pytest.raises(ValueError, match="is nobody's"):
        blocks.give_back([mine, mine])
    assert blocks.free == 2
    assert blocks.give_back([mine]) == [mine]


# --- sequences -----------------------------------------------------------------------------------


def test_what_is_fed() -> None:
    all_of_them = Sequences(8, 4, order=[5, 2, 7, 0, 1, 3, 4, 6])
    a, b = all_of_them.add([10, 11, 12, 13, 14, 15]), all_of_them.add([20])
    feeds = all_of_them.feeds({a: 3, b: 1})
    assert [array.dtype for array in feeds.values()] == [np.int64, np.int32, np.int32, np.int32]
    assert {name: array.tolist() for name, array in feeds.items()} == {
        "input_ids": [10, 11, 12, 20],
        "cumulative_sequence_lengths": [0, 3, 4],
        "past_sequence_lengths": [0, 0],
        "block_table": [[5], [2]],
    }
    all_of_them.extend(b, [21])
    feeds = all_of_them.feeds({b: 0, a: 3})
    assert {name: array.tolist() for name, array in feeds.items()} == {
        "input_ids": [13, 14, 15],
        "cumulative_sequence_lengths": [0, 0, 3],
        "past_sequence_lengths": [1, 3],
        "block_table": [[2, -1], [5, 7]],
    }
    assert all_of_them.slots(a).tolist() == [20, 21, 22, 23, 28, 29]
    assert [all_of_them.waiting(each) for each in all_of_them] == [0, 1]
    assert all_of_them.tokens(b) == [20, 21]


def test_a_beginning_is_shared_by_whole_blocks_that_have_run() -> None:
    all_of_them = Sequences(8, 4)
    a = all_of_them.add(list(range(12)))
    all_of_them.feeds({a: 10})
    alike = all_of_them.add([*range(12), 50], prefix=a)
    assert all_of_them.blocks(alike) == all_of_them.blocks(a)[:2]  # two ran in full
    assert all_of_them.length(alike) == 8
    same = all_of_them.add(list(range(8)), prefix=a)
    assert all_of_them.length(same) == 4  # one token is left to run
    assert all_of_them.length(all_of_them.add([0, 1, 2, 9, 4], prefix=a)) == 0
    assert all_of_them.remove(a) == [2]
    assert all_of_them.remove(alike) == [1]
    assert all_of_them.remove(same) == [0]
    assert all_of_them.allocator.free == 8


def test_nothing_changes_where_blocks_run_out() -> None:
    all_of_them = Sequences(3, 4)
    a, b = all_of_them.add(list(range(5))), all_of_them.add(list(range(8)))
    with pytest.raises(OutOfBlocksError):
        all_of_them.feeds({a: 5, b: 8})
    assert all_of_them.allocator.free == 3
    assert [all_of_them.length(each) for each in (a, b)] == [0, 0]
    assert [all_of_them.blocks(each) for each in (a, b)] == [[], []]
    with pytest.raises(ValueError, match="5 tokens of 1 wait, not 6"):
        all_of_them.feeds({a: 6})
    with pytest.raises(KeyError):
        all_of_them.feeds({a: 1, 9: 1})
    assert all_of_them.feeds({a: 5})["block_table"].tolist() == [[0, 1]]


# --- running -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "blocks"), [(None, 30), (5, 24)])
def test_generated_as_by_the_original(
    models: tuple[str, Path, Path], limit: int | None, blocks: int
) -> None:
    name, original, path = models
    runner = PagedRunner(path, num_blocks=blocks)
    going = {runner.add(prompt): prompt for prompt in PROMPTS}
    found: dict[int, list[int]] = {}
    steps = 0
    while going:
        greedy(runner, limit)
        steps += 1
        for number, prompt in list(going.items()):
            if len(made(runner, number, prompt)) == NEW:
                found[number] = made(runner, number, going.pop(number))
                runner.remove(number)
    assert list(dict(sorted(found.items())).values()) == step_by_step(original, name, PROMPTS, NEW)
    assert steps > 3 * NEW if limit else steps == NEW
    assert runner.sequences.allocator.free == blocks
    assert runner.step() == {}


def test_blocks_are_shared_and_reused(models: tuple[str, Path, Path]) -> None:
    name, original, path = models
    prompts = {"first": PROMPTS[5], "alike": [*PROMPTS[5][:18], 3, 1]}
    prompts |= {"other": PROMPTS[3], "late": PROMPTS[4]}
    answers = step_by_step(original, name, list(prompts.values()), NEW)
    wanted = dict(zip(prompts, answers, strict=True))
    runner = PagedRunner(path, num_blocks=18)
    for pool in runner.pools.values():
        pool[:] = np.nan

    numbers = {"first": runner.add(prompts["first"])}
    greedy(runner)
    numbers["alike"] = runner.add(prompts["alike"], prefix=numbers["first"])
    assert runner.sequences.length(numbers["alike"]) == 16
    for _ in range(4):
        greedy(runner)
    numbers["other"] = runner.add(prompts["other"])
    greedy(runner)
    free = runner.sequences.allocator.free
    for number in numbers.values():
        assert runner.sequences.waiting(number) == 1
    numbers["late"] = runner.add([*prompts["late"], *[1] * 4 * free])
    lengths = [runner.sequences.length(number) for number in numbers.values()]
    with pytest.raises(OutOfBlocksError):
        runner.step()
    assert [runner.sequences.length(number) for number in numbers.values()] == lengths
    assert runner.sequences.allocator.free == free
    runner.remove(numbers.pop("late"))

    was = runner.sequences.blocks(numbers["first"])
    assert made(runner, numbers["first"], prompts["first"]) == wanted["first"][:6]
    runner.remove(numbers.pop("first"))  # "alike" keeps what it shares
    assert runner.sequences.blocks(numbers["alike"])[:4] == was[:4]
    numbers["late"] = runner.add(prompts["late"])
    greedy(runner)
    assert set(runner.sequences.blocks(numbers["late"])) & set(was[4:])
    for _ in range(NEW):
        greedy(runner)
    for key, number in numbers.items():
        assert made(runner, number, prompts[key])[:NEW] == wanted[key]
        runner.remove(number)
    assert runner.sequences.allocator.free == 18


def test_nothing_is_copied(models: tuple[str, Path, Path]) -> None:
    _, _, path = models
    runner = PagedRunner(path, num_blocks=12)
    number = runner.add(PROMPTS[0])
    outputs = [each.name for each in runner.session.get_outputs()]
    for count in (7, 1, 1):
        before = {name: pool.copy() for name, pool in runner.pools.items()}
        past = runner.sequences.length(number)
        rows = runner.step()
        runner.extend(number, [int(rows[number][-1].argmax())])
        found = dict(zip(outputs, runner._binding.get_outputs(), strict=True))
        for name, pool in runner.pools.items():
            bound = found[name.replace("past_key_values", "present")]
            assert bound.data_ptr() == pool.ctypes.data
            changed = (pool != before[name]).any(axis=(2, 3)).reshape(-1)
            assert (
                np.flatnonzero(changed).tolist() == runner.sequences.slots(number)[past:].tolist()
            )
        assert np.shares_memory(rows[number], found["logits"].numpy())
        assert rows[number].shape == (count, 131)


def test_a_run_that_fails_can_be_run_again(models: tuple[str, Path, Path]) -> None:
    name, original, path = models
    runner = PagedRunner(path, num_blocks=12)
    number = runner.add([*PROMPTS[0], 10_000])  # no such token
    with pytest.raises(Exception, match=r"(?i)indices|index"):
        runner.step()
    assert runner.sequences.waiting(number) == 8
    rows = runner.run({number: 7})
    assert int(rows[number][-1].argmax()) == step_by_step(original, name, PROMPTS[:1], 1)[0][0]


def test_pools_in_float16(tmp_path: Path) -> None:
    name = "llama/dynamo20-fp16"
    original, path = paged(tmp_path, name)
    runner = PagedRunner(path, num_blocks=40)
    assert {pool.dtype for pool in runner.pools.values()} == {np.dtype(np.float16)}
    numbers = [runner.add(prompt) for prompt in PROMPTS]
    rows = runner.step()
    session = onnxruntime.InferenceSession(str(original), providers=["CPUExecutionProvider"])
    for number, prompt in zip(numbers, PROMPTS, strict=True):
        feeds = entry(name).feeds(1, len(prompt), 0)
        feeds[session.get_inputs()[0].name] = np.array([prompt])
        wanted = session.run(None, feeds)[0][0].astype(np.float32)
        assert np.abs(rows[number] - wanted).max() <= 1e-2 * wanted.std()


def test_rows_of_last_tokens(tmp_path: Path) -> None:
    name = "llama/dynamo20"
    original, path = paged(tmp_path, name, logits="last")
    runner = PagedRunner(path, num_blocks=40)
    numbers = [runner.add(prompt) for prompt in PROMPTS]
    rows = runner.step()
    wanted = step_by_step(original, name, PROMPTS, 1)
    assert [rows[number].shape for number in numbers] == [(1, 131)] * 6
    assert [[int(rows[number][0].argmax())] for number in numbers] == wanted


# --- what is refused -----------------------------------------------------------------------------


def session_of(*inputs: tuple[str, str, list[Any]]) -> Any:
    """A stand-in for a session of a model that cannot be run here."""
    values = [SimpleNamespace(name=name, type=kind, shape=shape) for name, kind, shape in inputs]
    return SimpleNamespace(get_inputs=lambda: values)


FED = [
    ("input_ids", "tensor(int64)", ["n"]),
    ("cumulative_sequence_lengths", "tensor(int32)", ["b"]),
    ("past_sequence_lengths", "tensor(int32)", ["b"]),
    ("block_table", "tensor(int32)", ["b", "m"]),
]
POOL = ("past_key_values.0.key", "tensor(bfloat16)", ["n", 4, 3, 48])


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ([*FED, POOL], "'past_key_values.0.key' is bfloat16, and a PagedRunner has float and"),
        (FED[:3], "the model is not paged: it has no input 'block_table'"),
        (FED, "the model is not paged: it has no pools"),
        (
            [*FED, ("slot_mapping", "tensor(int32)", ["n"])],
            "does not feed the input 'slot_mapping'",
        ),
        ([("inputs_embeds", "tensor(float)", ["n", 84]), *FED[1:]], "the input 'inputs_embeds'"),
    ],
)
def test_what_a_runner_does_not_run(inputs: list[Any], reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        PagedRunner(session_of(*inputs), num_blocks=4)


def test_what_onnxruntime_does_not_run(tmp_path: Path) -> None:
    _, path = paged(tmp_path, "llama/dynamo20-bf16")
    with pytest.raises(RefusedError, match=r"model\.onnx cannot be run on ONNX Runtime's CPU"):
        PagedRunner(path, num_blocks=4)
    with pytest.raises(RefusedError, match=r"none\.onnx cannot be run"):
        PagedRunner(tmp_path / "none.onnx", num_blocks=4)


def test_no_blocks_are_refused(models: tuple[str, Path, Path]) -> None:
    with pytest.raises(ValueError, match="0 blocks hold nothing"):
        PagedRunner(models[2], num_blocks=0)
