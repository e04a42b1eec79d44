"""What a fused model still holds that should have become one operator, counted without any rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import onnx
import onnx_ir as ir

from onnxgen.analysis.resemblance import resemblances


def leftovers(model: onnx.ModelProto, growing: Collection[str] = ()) -> Counter[str]:
    """How many sites of each kind the main graph still holds in parts; empty for none.

    Args:
        growing: names of the past inputs that an output continues.
    """
    graph = ir.from_proto(model).graph
    return Counter(found.kind for found in resemblances(graph, growing))
