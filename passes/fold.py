"""Fold constants: everything that depends on no input becomes an initializer.

Index arithmetic is solved symbolically first (a Shape whose sizes are known, a Gather of it);
the rest is cut out and run on ONNX Runtime, all of it in one run, instead of node by node.

What is bfloat16 runs as float32 (`onnxgen.twin`), without the rounding after each node. It is folded
where that makes no difference: every number on the way is one that bfloat16 has.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.evaluate import CutError, cut
from onnxgen.analysis.graph import NONDETERMINISTIC, has_subgraph
from onnxgen.analysis.shapes import Shapes
from onnxgen.analysis.symbols import product
from onnxgen.runtime import Runtime, RuntimeFailure

# Larger constants are weights: not read, and not multiplied into new ones.
MAX_INPUT_BYTES = 1 << 16
MAX_OUTPUT_BYTES = 1 << 20
# Folding these would undo a quantization.
QUANTIZED = frozenset({"DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear"})


def fold_constants(model: ir.Model, runtime: Runtime) -> None:
    """Replace nodes of the main graph that are constant by initializers, in place."""
    graph = model.graph
    shapes = Shapes(graph)
    constants = {
        value
        for value in graph.initializers.values()
        if value.const_value is not None
        and value.const_value.nbytes <= MAX_INPUT_BYTES
        and not value.is_graph_input()
    }
    solved: dict[ir.Value, np.ndarray] = {}
    computed: set[ir.Value] = set()
    for node in graph:
        output = node.outputs[0] if node.outputs else None
        if output is None:
            continue
        content = shapes.content(output)
        if (
            content is not None
            and all(isinstance(element, (int, np.integer)) for element in content.flat)
            and output.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
        ):
            solved[output] = content.astype(output.dtype.numpy())
            constants.add(output)
        elif (
            _foldable(node)
            and all(v in constants for v in node.inputs if v is not None)
            and not any(_large(shapes, each) for each in node.outputs)
        ):
            constants.update(node.outputs)
            computed.update(node.outputs)
    inexact = _inexact(computed, solved, model, runtime)
    constants -= inexact
    computed -= inexact
    # Only what the rest of the graph reads has to be known.
    wanted = [v for v in computed if v.is_graph_output() or _read_outside(v, constants)]
    wanted.sort(key=lambda value: value.name or "")
    for value, array in {**solved, **_run(wanted, solved, model, runtime)}.items():
        if (value in solved and not _read_outside(value, constants)) or value.is_graph_output():
            continue
        if array.nbytes <= MAX_OUTPUT_BYTES:
            if value.dtype == ir.DataType.BFLOAT16:
                array = array.astype(value.dtype.numpy())
            _replace(graph, value, array)


def _inexact(
    computed: set[ir.Value],
    solved: dict[ir.Value, np.ndarray],
    model: ir.Model,
    runtime: Runtime,
) -> set[ir.Value]:
    """The computed values that bfloat16 rounds, and what follows from them."""
    narrow = [v for v in computed if v.dtype == ir.DataType.BFLOAT16]
    narrow.sort(key=lambda value: value.name or "")
    found = _run(narrow, solved, model, runtime)
    inexact: set[ir.Value] = set()
    for node in model.graph if narrow else ():
        follows = any(value in inexact for value in node.inputs)
        inexact.update(
            output
            for output in node.outputs
            if output in computed
            and (follows or (output in narrow and not _has(ir.DataType.BFLOAT16, found, output)))
        )
    return inexact


def _has(dtype: ir.DataType, found: dict[ir.Value, np.ndarray], value: ir.Value) -> bool:
    """Whether a value was computed and a type has each of its numbers."""
    array = found.get(value)
    return array is not None and np.array_equal(
        array.astype(dtype.numpy()).astype(array.dtype), array, equal_nan=True
    )


def _foldable(node: ir.Node) -> bool:
    """A node without inputs that is no known source of randomness is constant as well."""
    return (
        node.op_type not in NONDETERMINISTIC | QUANTIZED
        and node.domain in ("", "ai.onnx")
        and not has_subgraph(node)
        and all(output.name for output in node.outputs)
    )


def _large(shapes: Shapes, value: ir.Value) -> bool:
    """Whether a value is known to be too large before it is made."""
    shape = shapes.of(value)
    size = 1 if shape is None else product(shape)
    return not isinstance(size, int) or size * 8 > MAX_OUTPUT_BYTES


def _read_outside(value: ir.Value, constants: set[ir.Value]) -> bool:
    return any(not any(output in constants for output in use.node.outputs) for use in value.uses())


def _run(
    wanted: list[ir.Value],
    solved: dict[ir.Value, np.ndarray],
    model: ir.Model,
    runtime: Runtime,
) -> dict[ir.Value, np.ndarray]:
    """The wanted values, computed; none of them where the runtime refuses."""
    if not wanted:
        return {}
    try:
        part = cut(solved, wanted, model.graph.opset_imports)
        feeds = {value.name or "": array for value, array in solved.items()}
        given = {each.name for each in part.graph.input}
        session = runtime.load(part.SerializeToString())
        found = runtime.run(session, {n: a for n, a in feeds.items() if n in given})
        runtime.unload(session)
    except (CutError, RuntimeFailure):
        return {}  # nothing is folded: less is known, nothing is wrong
    return {value: found[value.name or ""] for value in wanted if value.name in found}


def _replace(graph: ir.Graph, value: ir.Value, array: np.ndarray) -> None:
    name = f"{value.name}_folded"
    while name in graph.initializers:
        name += "_"
    folded = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(value.dtype or ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(np.array(array, order="C"), name=name),  # keeps rank 0
    )
    graph.register_initializer(folded)
    value.replace_all_uses_with(folded)
