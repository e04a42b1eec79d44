"""genai_config.json: what onnxruntime-genai has to be told of a decoder to generate with it.

Everything that the runtime relies on is read from the model: which inputs it feeds, what the
caches are called, their sizes, whether past and present may share a buffer. What a graph cannot
tell, such as the ids of special tokens, comes from config.json and generation_config.json beside
the model.

The format is that of onnxruntime-genai 0.18 (its src/config.h, and what its model builder writes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from onnxgen.analysis.graph import names, producer
from onnxgen.analysis.role_values import InputRole, OutputRole, Roles
from onnxgen.analysis.shapes import Shapes
from onnxgen.errors import RefusedError
from onnxgen.targets.genai_names import Cache, name_templates

Json = Mapping[str, Any]

DEFAULT_LENGTH = 32768
# Where an attention takes its past key and value, by operator; the presents are outputs 1 and 2.
PASTS = {"Attention": (4, 5), "GroupQueryAttention": (3, 4), "MultiHeadAttention": (6, 7)}
# Model types that the runtime treats as it does "decoder". Others it knows, such as gpt2 and phi3,
# have habits of their own that are not the model's.
PLAIN_TYPES = names(
    """
    chatglm ernie4_5 gemma gemma2 gemma3_text granite internlm2 llama mistral nemotron olmo phi
    qwen2 qwen3 smollm3
    """
)
SEARCH: Json = {
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}


@dataclass(frozen=True)
class Said:
    """What files beside the model say.

    Attributes:
        config: config.json, {} where there is none.
        generation: generation_config.json, {} where there is none.
    """

    config: Json
    generation: Json

    def text(self, key: str) -> Any:
        """A value of config.json, that of its text model where it has one."""
        part = self.config.get("text_config")
        found = part.get(key) if isinstance(part, Mapping) else None
        return self.config.get(key) if found is None else found

    def size(self, key: str) -> int | None:
        """A positive number of config.json."""
        found = self.text(key)
        usable = isinstance(found, int) and not isinstance(found, bool) and found > 0
        return found if usable else None

    def token(self, key: str) -> int | list[int] | None:
        """The id or ids of a special token; None where nothing says it as numbers."""
        for found in (self.generation.get(key), self.text(key)):
            ids = found if isinstance(found, list) else [found]
            if ids and all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
                return found
        return None


def genai_config(
    model: ir.Model, roles: Roles, said: Said, *, filename: str, max_length: int | None
) -> dict[str, Any]:
    """The contents of genai_config.json for a finished model.

    Args:
        model: as it will be written.
        roles: of its inputs and outputs.
        filename: of the model, in the folder of genai_config.json.
        max_length: the most tokens that the model takes; None where nothing limits them.

    Raises:
        RefusedError: the runtime cannot feed the model, or cannot make its names.
    """
    graph = model.graph
    shapes = Shapes(graph)
    inputs = _inputs(roles)
    attentions = _attentions(graph, roles)
    caches = [_cache(node) for node in attentions]
    template = name_templates(caches, list(roles.inputs))
    if isinstance(template, str):
        raise _refused(template)
    logits, vocabulary = _logits(graph, roles, shapes)
    heads, kv_heads, head_size = _heads(roles, shapes, attentions[0])
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": filename,
        "head_size": head_size,
        "hidden_size": _hidden_size(graph, roles, shapes) or said.size("hidden_size"),
        "inputs": {
            **inputs,
            "past_key_names": template.past_key,
            "past_value_names": template.past_value,
        },
        "outputs": {
            "logits": logits,
            "present_key_names": template.present_key,
            "present_value_names": template.present_value,
        },
        "num_attention_heads": heads,
        "num_hidden_layers": len(caches),
        "num_key_value_heads": kv_heads,
    }
    length = _context_length(roles, said, max_length)
    return {
        "model": {
            **_tokens(said),
            "context_length": length,
            "decoder": {key: value for key, value in decoder.items() if value is not None},
            "type": _type(said),
            "vocab_size": vocabulary,
        },
        "search": {
            **{key: _default(said, key, value) for key, value in SEARCH.items()},
            "max_length": length,
            "past_present_share_buffer": _may_share(attentions),
        },
    }


def _refused(reason: str) -> RefusedError:
    return RefusedError(f"no genai_config.json can be written: {reason}")


def _inputs(roles: Roles) -> dict[str, str]:
    """The inputs that the runtime feeds beside the caches, by its words for them."""
    fed = {"ids": "input_ids", "mask": "attention_mask", "positions": "position_ids"}
    found: dict[str, InputRole] = {}
    for each in roles.inputs.values():
        if each.role == "past":
            continue
        word = fed.get(each.role)
        if word is None or word in found:
            raise _refused(f"onnxruntime-genai does not feed the input '{each.name}' ({each.role})")
        if len(each.shape) != 2 or each.dtype not in (ir.DataType.INT32, ir.DataType.INT64):
            raise _refused(f"the input '{each.name}' ({each.role}) is not int32 or int64 [B,S]")
        found[word] = each
    if "input_ids" not in found:
        raise _refused("no input takes token ids")
    counted = [found[word] for word in ("attention_mask", "position_ids") if word in found]
    if len({each.dtype for each in counted}) > 1:
        raise _refused("positions and mask have different element types")
    for letter, what in (("S", "number of new tokens"), ("P", "length of the past")):
        if letter in roles.fixed:
            raise _refused(f"the {what} is fixed at {roles.fixed[letter]}")
    return {word: each.name for word, each in found.items()}


def _attentions(graph: ir.Graph, roles: Roles) -> list[ir.Node]:
    """The nodes that read the caches, in graph order; every cache is read by one of them."""
    if not roles.pairs:
        raise _refused("the model continues no cache that grows")
    found: list[ir.Node] = []
    covered: set[str] = set()
    for node in graph:
        places = PASTS.get(node.op_type)
        if places is None or len(node.inputs) <= places[1] or len(node.outputs) < 3:
            continue
        pasts = [node.inputs[place] for place in places]
        pairs = [None if past is None else roles.pair_of(past.name or "") for past in pasts]
        presents = [output.name for output in node.outputs[1:3]]
        if None in pairs or [pair.present for pair in pairs if pair] != presents:
            continue
        found.append(node)
        covered |= {str(past.name) for past in pasts if past is not None}
    for pair in roles.pairs:
        if pair.cap is not None:
            raise _refused(f"the cache '{pair.past}' is cropped")
        if pair.past not in covered:
            raise _refused(f"the cache '{pair.past}' is not that of an attention, [B,K,P,D]")
    return found


def _cache(node: ir.Node) -> Cache:
    key, value = PASTS[node.op_type]
    pasts = (node.inputs[key], node.inputs[value])
    names = [str(each.name) for each in (*pasts, *node.outputs[1:3]) if each is not None]
    return Cache(*names)


def _heads(roles: Roles, shapes: Shapes, node: ir.Node) -> tuple[int, int, int]:
    """Query heads, key heads and head size of an attention."""
    key, value = (node.inputs[place] for place in PASTS[node.op_type])
    pairs = [roles.pair_of(str(each.name)) for each in (key, value) if each is not None]
    sizes = {(pair.heads, pair.head_size) for pair in pairs if pair is not None}
    if len(sizes) != 1 or 0 in next(iter(sizes)):
        raise _refused("keys and values are not [B,K,P,D] of one K and one D that are fixed")
    kv_heads, head_size = sizes.pop()
    for name in ("num_heads", "q_num_heads"):
        if name in node.attributes:
            return int(node.attributes[name].value), kv_heads, head_size
    queries = shapes.of(node.inputs[0])
    if queries is None or len(queries) != 4 or not isinstance(queries[1], int):
        raise _refused("the number of query heads is not known")
    return queries[1], kv_heads, head_size


def _logits(graph: ir.Graph, roles: Roles, shapes: Shapes) -> tuple[str, int]:
    """The output that scores the next token, and how many tokens it scores."""
    rows = [each for each in roles.outputs.values() if each.role == "rows"]
    named = [each for each in rows if "logits" in each.name]
    found: list[OutputRole] = rows if len(rows) == 1 else named
    if len(found) != 1:
        raise _refused(f"which output is the logits is open: {[each.name for each in rows]}")
    value = next(each for each in graph.outputs if each.name == found[0].name)
    shape = shapes.of(value) or found[0].shape
    if shape is None or len(shape) != 3 or not isinstance(shape[2], int):
        raise _refused(f"the output '{found[0].name}' is not [B,S,V] of a V that is fixed")
    return found[0].name, shape[2]


def _hidden_size(graph: ir.Graph, roles: Roles, shapes: Shapes) -> int | None:
    """H, as the table says that the tokens index."""
    tokens = {each.name for each in roles.named("ids")}
    for value in graph.inputs:
        if value.name not in tokens:
            continue
        for use in value.uses():
            table = use.node.inputs[0]
            if producer(use.node.outputs[0], "Gather") is None or use.idx != 1:
                continue
            shape = shapes.of(table)
            if shape is not None and len(shape) == 2 and isinstance(shape[1], int):
                return shape[1]
    return None


def _may_share(attentions: list[ir.Node]) -> bool:
    """Whether past and present may be one buffer, longer than what it holds.

    They may where the operator is told how much of it counts, and nothing else asks.
    """
    for node in attentions:
        if node.op_type != "GroupQueryAttention":
            return False
        for place in PASTS[node.op_type]:
            past = node.inputs[place]
            if past is None or {use.node for use in past.uses()} != {node}:
                return False
    return True


def _context_length(roles: Roles, said: Said, max_length: int | None) -> int:
    """The most tokens, past and new, that the model was made for."""
    tables = [each.bound for each in roles.named("positions") if each.bound]
    told = said.size("max_position_embeddings") or said.size("n_positions")
    lengths = [length for length in (max_length, told, *tables) if length]
    return min(lengths, default=DEFAULT_LENGTH)


def _tokens(said: Said) -> dict[str, Any]:
    """The ids of special tokens that the files say; padding is done with the end's if need be."""
    ids = {key: said.token(f"{key}_token_id") for key in ("bos", "eos", "pad")}
    if ids["pad"] is None:
        ids["pad"] = ids["eos"]
    for key in ("bos", "pad"):  # the runtime takes one
        found = ids[key]
        ids[key] = found[0] if isinstance(found, list) else found
    return {f"{key}_token_id": value for key, value in ids.items() if value is not None}


def _type(said: Said) -> str:
    found = said.text("model_type")
    return found if found in PLAIN_TYPES else "decoder"


def _default(said: Said, key: str, value: Any) -> Any:
    """A search option as generation_config.json states it, where it is of the same kind."""
    found = said.generation.get(key)
    number = isinstance(found, int | float) and not isinstance(found, bool)
    fits = isinstance(found, bool) if isinstance(value, bool) else number
    return type(value)(found) if fits else value
