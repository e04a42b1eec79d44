"""Derived weights: bytes against numpy, and how much is made at a time."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from onnxgen import derived
from onnxgen.analysis.facts import Facts
from onnxgen.derived import DerivedTensor, Rows, joined, stacked, whole
from onnxgen.model_io import read_model, staged
from onnxgen.patterns.building import Builder
from onnxgen.staging import DataFile

Array = np.ndarray[Any, Any]
E, INNER, H = 5, 3, 4
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.uint8)


def woven(array: Array) -> Array:
    """a0 b0 a1 b1 ... of a0 a1 ... b0 b1 ... along the second axis, written out."""
    half = array.shape[1] // 2
    turns = [array[:, at : at + 1] for row in range(half) for at in (row, half + row)]
    return np.concatenate(turns, axis=1)


CASES: dict[str, tuple[Callable[[Any], Rows], Callable[[Any], Array]]] = {
    "whole": (lambda t: whole(t[0]), lambda a: a[0]),
    "stacked": (lambda t: stacked(t), lambda a: np.stack(a)),
    "transposed": (lambda t: whole(t[0]).transposed(), lambda a: a[0].swapaxes(1, 2)),
    "stacked and transposed": (
        lambda t: stacked(t).transposed(),
        lambda a: np.stack(a).swapaxes(-1, -2),
    ),
    "reversed": (lambda t: whole(t[0]).reversed(), lambda a: a[0][::-1]),
    "interleaved": (lambda t: whole(t[0]).interleaved(), lambda a: woven(a[0])),
    "interleaved of transposed": (
        lambda t: whole(t[0]).transposed().interleaved(),
        lambda a: woven(a[0].swapaxes(1, 2)),
    ),
    "interleaved of two": (
        lambda t: joined([whole(t[0]), whole(t[1])], 1).interleaved().reversed(),
        lambda a: woven(np.concatenate(a[:2], axis=1))[::-1],
    ),
    "exchanged": (
        lambda t: whole(t[0]).interleaved().exchanged(),
        lambda a: woven(np.concatenate([a[0][:, INNER:], a[0][:, :INNER]], axis=1)),
    ),
    "joined in front": (
        lambda t: joined([whole(t[0]), whole(t[1]).reversed(), whole(t[2])], 0),
        lambda a: np.concatenate([a[0], a[1][::-1], a[2]]),
    ),
    "joined behind": (
        lambda t: joined([whole(each) for each in t], 2),
        lambda a: np.concatenate(a, axis=2),
    ),
    "of a derived one": (
        lambda t: whole(DerivedTensor(stacked(t).reversed(), "inner")).reversed(),
        lambda a: np.stack(a),
    ),
}


@pytest.mark.parametrize("piece", [1, 200, derived.PIECE])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_its_bytes_are_numpys(
    case: str, dtype: Any, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derived, "PIECE", piece)
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 200, (E, 2 * INNER, H)).astype(dtype) for _ in range(3)]
    rows, wanted = CASES[case][0]([ir.tensor(each) for each in arrays]), CASES[case][1](arrays)
    tensor = DerivedTensor(rows, "weight")
    assert tuple(tensor.shape.numpy()) == wanted.shape
    assert tensor.nbytes == wanted.nbytes
    assert (tensor.numpy() == wanted).all()
    assert b"".join(tensor.pieces()) == wanted.tobytes() == tensor.tobytes()


@pytest.mark.parametrize("external", [False, True])
def test_one_expert_is_made_at_a_time(external: bool, tmp_path: Path) -> None:
    """16 experts of 4 MiB: the weights they come from are never read into memory as a whole."""
    one, count = (512, 2048), 16
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(one).astype(np.float32) for _ in range(count)]
    tensors = [numpy_helper.from_array(each, f"w{at}") for at, each in enumerate(weights)]
    info = helper.make_tensor_value_info("x", 1, ["t", one[0]])
    out = helper.make_tensor_value_info("y", 1, ["t", one[1]])
    nodes = [helper.make_node("MatMul", ["x", "w0"], ["y"])]
    graph = helper.make_graph(nodes, "g", [info], [out], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=external, location="model.data")
    model = read_model(path)
    read = [model.graph.initializers[f"w{at}"].const_value for at in range(count)]
    rows = stacked([each for each in read if each is not None]).transposed().interleaved()
    tensor = DerivedTensor(rows, "experts")
    value = ir.Value(name="experts", const_value=tensor)
    value.shape, value.dtype = ir.Shape(rows.shape), rows.dtype
    model.graph.register_initializer(value)
    wanted = woven(np.stack(weights).swapaxes(1, 2)).tobytes()
    output = tmp_path / "out.onnx"
    tracemalloc.start()
    try:
        with staged(model, output, source=path, force=False) as stage:
            stage.commit()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * np.prod(one) * 4, peak  # a row, its copies, and no more
    written = onnx.load(output)
    (found,) = [each for each in written.graph.initializer if each.name == "experts"]
    assert found.raw_data == wanted


def test_a_piece_is_no_larger_than_a_row_or_the_limit() -> None:
    tensor = DerivedTensor(whole(ir.tensor(np.zeros((64, 1 << 18), np.float32))), "w")
    sizes = [len(piece) for piece in tensor.pieces()]
    assert max(sizes) <= derived.PIECE
    assert sum(sizes) == tensor.nbytes


def test_nothing_in_it_is_nothing() -> None:
    tensor = DerivedTensor(whole(ir.tensor(np.zeros((0, 3), np.float32))), "w")
    assert b"".join(tensor.pieces()) == b""
    assert tensor.numpy().shape == (0, 3)


def test_zeros_are_holes_that_read_as_zeros(tmp_path: Path) -> None:
    created: list[Path] = []
    data = DataFile(tmp_path, "model", created)
    first = DerivedTensor(whole(ir.tensor(np.ones((4, 1 << 18), np.float32))), "a")
    last = DerivedTensor(whole(ir.tensor(np.zeros((16, 1 << 20), np.float32))), "b")
    places = [data.add(each) for each in (first, last)]
    path = tmp_path / data.finish()
    assert path.stat().st_size == sum(places[1])
    assert path.stat().st_blocks * 512 < 8 << 20
    content = path.read_bytes()
    assert content[places[1][0] :] == bytes(places[1][1])
    assert content[: places[0][1]] == first.tobytes()


def test_what_is_derived_alike_is_written_once(tmp_path: Path) -> None:
    sources = [ir.tensor(np.ones((4, 8, 2), np.float32) * at) for at in range(2)]
    made = [whole(sources[0]), whole(sources[0]).interleaved(), whole(sources[1]).interleaved()]
    data = DataFile(tmp_path, "model", [])
    places = [data.add(DerivedTensor(rows, "w")) for rows in made]
    assert len(set(places)) == 3
    assert [data.add(DerivedTensor(rows, "again")) for rows in made] == places
    (tmp_path / data.finish()).unlink()
    graph = ir.Graph([], [], nodes=[])
    builder = Builder(graph, Facts(graph).shapes)
    values = [builder.derived(rows) for rows in (*made, whole(sources[0]).interleaved())]
    assert values[3] is values[1]
    assert len(graph.initializers) == 3
