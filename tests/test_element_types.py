"""The widths of element types are those that onnx-ir knows."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from onnxgen.element_types import bits_of

WITHOUT = (ir.DataType.UNDEFINED, ir.DataType.STRING)


@pytest.mark.parametrize("kind", sorted({*ir.DataType} - {*WITHOUT}), ids=lambda kind: kind.name)
def test_every_type_has_the_width_that_onnx_ir_says(kind: ir.DataType) -> None:
    assert bits_of(int(kind)) == kind.bitwidth


def test_what_is_no_number_has_no_width() -> None:
    assert bits_of(int(ir.DataType.STRING)) == 0
    assert bits_of(int(ir.DataType.UNDEFINED)) is None
    assert bits_of(977) is None
