"""genai_config.json of a paged model, which onnxruntime-genai's Engine runs.

Its `engine.dynamic_batching` gives the Engine's own limits, a batch of 16 sequences and 2,048
tokens a run, and the pools' size: as many blocks as hold 16 sequences of 1,024 tokens, or of the
model's context length where that is shorter. One sequence may take all of them. The pools are
allocated when the model is loaded; edit num_blocks for other machines.

The format is that of onnxruntime-genai 0.18 (its src/config.h and docs/paged_attention_engine.md).
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from onnxgen.analysis.role_values import Roles
from onnxgen.analysis.shapes import Shapes
from onnxgen.targets.genai import Said, assembled, context_length, hidden_size, refused
from onnxgen.targets.paged import PagedModel

MAX_BATCH_SIZE = 16
MAX_SCHEDULED_TOKENS = 2048
TOKENS_EACH = 1024  # of every sequence of a batch, for the size of the pools
ATTENTION = "PagedAttention"
# What the Engine feeds beside the pools; it finds each by the config's word for it.
FED = (
    "input_ids",
    "cumulative_sequence_lengths",
    "past_sequence_lengths",
    "block_table",
    "logits_indices",
)


def engine_config(paged: PagedModel, roles: Roles, said: Said, *, filename: str) -> dict[str, Any]:
    """The contents of genai_config.json for a paged model.

    Args:
        paged: with its functions still in it.
        roles: of the original.
        filename: of the model, in the folder of genai_config.json.

    Raises:
        RefusedError: the Engine cannot feed the model.
    """
    graph = paged.model.graph
    pools = paged.pools
    names = [str(each.name) for each in graph.inputs if each.name not in graph.initializers]
    inputs = [name for name in names if name not in {pool.name for pool in pools}]
    for name in inputs:
        if name not in FED:
            raise refused(f"onnxruntime-genai's Engine does not feed the input '{name}'")
    for pool in pools[1:]:
        if (pool.heads, pool.size, pool.dtype) != (pools[0].heads, pools[0].size, pools[0].dtype):
            raise refused(
                "onnxruntime-genai's Engine makes all pools alike, and "
                + " and ".join(
                    f"'{each.name}' has {each.heads} heads of {each.size} {each.dtype.name.lower()}"
                    for each in (pools[0], pool)
                )
            )
    length = context_length(roles, said, paged.max_length)
    config = assembled(
        said,
        decoder={
            "filename": filename,
            "head_size": pools[0].size,
            "hidden_size": hidden_size(graph, {"input_ids"}, Shapes(graph)),
            "inputs": {
                **{name: name for name in inputs},
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
            "num_attention_heads": _heads(graph),
            "num_hidden_layers": len(pools) // 2,
            "num_key_value_heads": pools[0].heads,
        },
        vocabulary=_vocabulary(graph),
        length=length,
        shares=True,
    )
    size = paged.options.block_size
    batching = {
        "block_size": size,
        "num_blocks": MAX_BATCH_SIZE * -(-min(length, TOKENS_EACH) // size),
        "max_batch_size": MAX_BATCH_SIZE,
        "max_scheduled_tokens": MAX_SCHEDULED_TOKENS,
    }
    return {**config, "engine": {"dynamic_batching": batching}}


def _heads(graph: ir.Graph) -> int | None:
    """Query heads of the first attention."""
    for node in graph:
        if node.op_type == ATTENTION:
            return int(node.attributes["num_heads"].value)
    return None


def _vocabulary(graph: ir.Graph) -> int:
    """V of the logits."""
    value = next((each for each in graph.outputs if each.name == "logits"), None)
    last = None if value is None or value.shape is None else value.shape[-1]
    if not isinstance(last, int):
        raise refused("the output 'logits' is not [num_tokens,V] of a V that is fixed")
    return last
