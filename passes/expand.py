"""Expand: operators of ONNX Runtime that are another spelling of standard ones.

    SimplifiedLayerNormalization(x, w)     -> RMSNormalization(x, w)
    Skip(Simplified)LayerNormalization     -> Add, norm; its sum is the Add
    EmbedLayerNormalization                -> Gather, Add, LayerNormalization
    BiasGelu(x, b), FastGelu, Gelu         -> Gelu(x + b), erf or tanh
    QuickGelu(x; a)                        -> x * Sigmoid(a * x)
    FusedMatMul(a, b; alpha, transA ...)   -> Transpose, MatMul, Mul
    FusedGemm, FusedConv                   -> Gemm, Conv, Add, activation
    BiasAdd(x, b, skip)                    -> x + b + skip
    RotaryEmbedding (com.microsoft)        -> RotaryEmbedding-23

ONNX Runtime's optimizer, optimum and the genai model builder write them. What holds attention is
not expanded here: rules raise it. Quantized operators (MatMulNBits) stay: no standard one says
the same. Numerics: the same operations in the same precision; a sum may be rounded once more.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxgen.analysis.facts import sizes_in_use
from onnxgen.analysis.graph import CONTRIB, is_read
from onnxgen.analysis.roles import Roles
from onnxgen.analysis.shapes import Shapes
from onnxgen.passes.expand_ops import DEFAULT_DOMAIN, EXPANSIONS, Expansion, KeptError
from onnxgen.patterns.building import Builder


def expand_contrib(model: ir.Model, roles: Roles | None = None) -> list[str]:
    """Expand such nodes of the main graph, in place.

    Args:
        roles: what the inputs are for; sizes that are equal in use are.

    Returns:
        A sentence for each node that has an expansion and keeps its spelling, with the reason.
    """
    graph = model.graph
    found = [(node, expansion) for node in graph if (expansion := _expansion(node)) is not None]
    if not found:
        return []
    builder = Builder(graph, Shapes(graph, sizes_in_use(roles)))
    kept: list[str] = []
    for node, expansion in found:
        try:
            outputs = expansion(builder, node)
            for index, old in enumerate(node.outputs):
                if is_read(old) and (index >= len(outputs) or outputs[index] is None):
                    raise KeptError(f"output {index} has no standard form")
        except KeptError as reason:
            builder.drop()
            kept.append(f"{node.name}: {node.op_type} stays as it is: {reason}")
            continue
        both = zip(node.outputs, outputs, strict=False)
        _put(graph, builder, node, [(a, b) for a, b in both if b is not None and is_read(a)])
    return kept


def _expansion(node: ir.Node) -> Expansion | None:
    if node.domain == CONTRIB:
        return EXPANSIONS.get(node.op_type)
    return DEFAULT_DOMAIN.get(node.op_type) if node.domain in ("", "ai.onnx") else None


def _put(
    graph: ir.Graph,
    builder: Builder,
    node: ir.Node,
    outputs: Sequence[tuple[ir.Value, ir.Value]],
) -> None:
    """The new nodes in the old one's place, under its name and with its metadata."""
    nodes = builder.keep(new for _, new in outputs)
    builder.take()
    graph.insert_before(node, nodes)
    for each in nodes:
        each.metadata_props.update(node.metadata_props)
    for old, new in outputs:
        if new.shape is None:
            new.shape = old.shape
        # What is computed keeps its name, as in `passes.rewriting`.
        old.name, new.name = builder.unique(f"{old.name}:expanded"), old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    main = outputs[0][1].producer() if outputs else None
    if main in nodes and main is not None:
        main.name = node.name
    graph.remove(node, safe=True)
