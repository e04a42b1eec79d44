"""A twin has no bfloat16 anywhere, computes what the model computes, and its file may be large."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import helper

from onnxgen import twin
from onnxgen.passes.normalize import normalize
from onnxgen.runtime import Runtime
from onnxgen.twin import BFLOAT16, float32_twin, unrunnable_types, widen, widened
from tests.graphs import parse

NARROW = ir.DataType.BFLOAT16.numpy()
# In a branch, a function, a constant, casts, attributes, an input, an output and between. The text
# holds the bits of a bfloat16: 16256 is 1, 16384 is 2, 16448 is 3.
EVERYWHERE = """
    <ir_version: 10, opset_import: ["" : 23, "own" : 1]>
    g (bfloat16[n,8] x, bool c) => (bfloat16[n,8] y, float[n,8] z)
    <bfloat16[n,8] a, bfloat16[8] w = {16256, 16384, 16448, 16512, 16544, 16576, 16608, 16640}>
    {
      a = Cast<to = 16>(x)
      b = own.Narrow<kind = 16>(a)
      three = Constant<value = bfloat16[1] {16448}>()
      like = CastLike(b, three)
      filled = ConstantOfShape<value = bfloat16[1] {16384}>(one)
      m = Mul(like, filled)
      n0 = LayerNormalization<axis = -1, stash_type = 16>(m, w)
      y = If(c) <
        then_branch = t () => (bfloat16[n,8] u) <bfloat16[8] k = {16256, 16256, 16256, 16256, 16256, 16256, 16256, 16384}> {
          u = Mul(n0, k) },
        else_branch = e () => (bfloat16[n,8] v) { v = Add(n0, three) }>
      z = Cast<to = 1>(y)
    }
    <domain: "own", opset_import: ["" : 23]>
    Narrow <kind>(x) => (y) { y = Cast<to : int = @kind>(x) }
"""


def everywhere() -> onnx.ModelProto:
    model = onnx.parser.parse_model(EVERYWHERE)
    model.graph.initializer.append(helper.make_tensor("one", onnx.TensorProto.INT64, [1], [1]))
    return model


def test_nothing_stays_bfloat16() -> None:
    model = ir.from_proto(everywhere())
    assert unrunnable_types(model)
    widen(model, BFLOAT16)
    assert not unrunnable_types(model)
    text = onnx.printer.to_text(ir.to_proto(model))
    assert "bfloat16" not in text
    assert "= 16" not in text
    assert "float[n,8] x" in text


def test_models_without_it_are_left_alone() -> None:
    model = parse("(float[n,8] x) => (float16[n,8] y) { y = Cast<to = 10>(x) }")
    assert not unrunnable_types(ir.from_proto(model))


@pytest.mark.parametrize("embedded", [twin.EMBEDDED, 0], ids=["embedded", "in a file"])
@pytest.mark.parametrize("as_path", [False, True], ids=["bytes", "path"])
def test_a_twin_runs(
    embedded: int, as_path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twin, "EMBEDDED", embedded)
    (tmp_path / "model.onnx").write_bytes(everywhere().SerializeToString())
    source = tmp_path / "model.onnx" if as_path else everywhere().SerializeToString()
    made = float32_twin(source, tmp_path, BFLOAT16)
    assert isinstance(made, Path) == (embedded == 0)
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(NARROW)
    wide = widened(x)
    mean = (2 * wide).mean(-1, keepdims=True)
    spread = np.sqrt((2 * wide).var(-1, keepdims=True) + 1e-5)
    normed = (2 * wide - mean) / spread * np.arange(1, 9, dtype=np.float32)
    with Runtime(threads=1, twins=BFLOAT16) as runtime:
        session = runtime.load(source)
        for taken, wanted in ((True, normed * [1, 1, 1, 1, 1, 1, 1, 2]), (False, normed + 3)):
            found = runtime.run(session, {"x": x, "c": np.array(taken)})
            assert found["y"].dtype == np.float32
            np.testing.assert_allclose(found["y"], wanted, atol=1e-5)
            np.testing.assert_array_equal(found["y"], found["z"])


@pytest.mark.parametrize(
    ("made", "folded"),
    [
        ("k = Add(two, half)", 2.5),  # exact in any type
        ("k = Sqrt(two)", None),  # 1.4142.. is rounded
        ("r = Sqrt(two)  k = Mul(r, r)", None),  # follows from what was rounded
        ("r = Sqrt(two)  f = Cast<to = 1>(r)  k = Cast<to = 16>(f)", None),
        ("f = Cast<to = 1>(two)  r = Sqrt(f)  q = Mul(r, r)  k = Cast<to = 16>(q)", None),
        ("f = Cast<to = 1>(two)  r = Mul(f, f)  k = Cast<to = 16>(r)", 4.0),
    ],
)
def test_constants_are_folded_where_nothing_is_rounded(made: str, folded: float | None) -> None:
    """What bfloat16 would round on the way is left to whoever runs the model."""
    model = ir.from_proto(
        parse(
            f"(bfloat16[n,8] x) => (bfloat16[n,8] y) <bfloat16 two, bfloat16 half> "
            f"{{ {made}  y = Mul(x, k) }}",
            weights={"two": np.array(2, NARROW), "half": np.array(0.5, NARROW)}
            if "half)" in made
            else {"two": np.array(2, NARROW)},
        )
    )
    with Runtime(threads=1, twins=BFLOAT16) as runtime:
        normalize(model, 24, runtime)
    (mul,) = [node for node in model.graph if node.outputs[0].name == "y"]
    constant = mul.inputs[1]
    assert constant is not None
    if folded is None:
        assert constant.producer() is not None
    else:
        assert constant.const_value is not None
        assert constant.const_value.dtype == ir.DataType.BFLOAT16
        assert float(constant.const_value.numpy()) == folded
