"""The widths of element types are those that onnx-ir knows."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from onnxgen.element_types import bits_of


@pytest.mark.parametrize("kind", list(ir.DataType), ids=lambda kind: kind.name)
def test_every_type_has_the_width_that_onnx_ir_says(kind: ir.DataType) -> None:
    known = {ir.DataType.UNDEFINED: None, ir.DataType.STRING: 0}
    assert bits_of(int(kind)) == (known[kind] if kind in known else kind.bitwidth)


def test_a_number_that_is_no_type_has_no_width() -> None:
    assert bits_of(977) is None
