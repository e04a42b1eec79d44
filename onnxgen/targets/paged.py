"""What a paged model is: its inputs and outputs, as onnxruntime-genai's Engine reads them.

| name | type | shape |
|---|---|---|
| input_ids (or inputs_embeds) | int64 (float) | [num_tokens] ([num_tokens, H]) |
| cumulative_sequence_lengths | int32 | [batch + 1] |
| past_sequence_lengths | int32 | [batch] |
| block_table | int32 | [batch, max_num_blocks], -1 where there is no block |
| slot_mapping, where asked for | int32 | [num_tokens], -1 for a token that is not written |
| logits_indices, where asked for | int32 | [num_logits] |
| past_key_values.N.key, .value | the caches' | [num_blocks, block_size, K, D] |
| logits | the original's | [num_tokens, V], [batch, V] or [num_logits, V] |
| present.N.key, .value | the caches' | as the pools |
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from onnxgen.analysis.masks import MaskFamily
from onnxgen.errors import UsageError
from onnxgen.report.values import Paging

KEY = "onnxgen.paged"
"""Of the metadata."""

Logits = Literal["all", "last", "indices"]
Flavor = Literal["portable", "ort"]
LARGEST_BLOCK = 1 << 16
KV_DTYPES = {"fp16": ir.DataType.FLOAT16, "fp32": ir.DataType.FLOAT}
"""Types of pools, as they are asked for."""


@dataclass(frozen=True)
class PagedOptions:
    """How a model is paged.

    Attributes:
        block_size: BS, slots of a block.
        logits: "all", "last" or "indices": which rows of logits are made.
        kv_dtype: of the pools; None for the caches' own.
        slot_mapping: whether an input of that name says where tokens are written.
        flavor: what attends: "portable", onnxgen::PagedAttention, whose body is standard
            operators; "ort", com.microsoft::PagedAttention.
    """

    block_size: int = 16
    logits: Logits = "all"
    kv_dtype: ir.DataType | None = None
    slot_mapping: bool = False
    flavor: Flavor = "portable"


@dataclass(frozen=True)
class Pool:
    """The keys or the values of one layer.

    Attributes:
        past, present: the cache's names in the original.
        name: its input in the paged model.
        output: its output in the paged model.
        heads, size: K and D.
        dtype: of its elements.
    """

    past: str
    present: str
    name: str
    output: str
    heads: int
    size: int
    dtype: ir.DataType


@dataclass(frozen=True)
class PagedModel:
    """What a model became.

    Attributes:
        model: it.
        options: as asked for.
        pools: in layer order, keys before values.
        layers: how many attentions there are, and the families of their masks.
        tokens: the input of the tokens, "input_ids" or "inputs_embeds".
        rows: outputs that have a row for each token, (name in the original, name), the scores first.
        switches: whether tables switch on a sequence's length (longrope): then keys of one
            beginning differ with what follows, and cannot be shared beyond that length.
        dropped: outputs of the original that it has not, caches aside.
        max_length: most tokens of a sequence, past and new; None where nothing limits them.
    """

    model: ir.Model
    options: PagedOptions
    pools: tuple[Pool, ...]
    layers: int
    families: tuple[MaskFamily, ...]
    tokens: str
    rows: tuple[tuple[str, str], ...]
    switches: bool = False
    dropped: tuple[str, ...] = ()
    max_length: int | None = None

    @property
    def contract(self) -> tuple[str, ...]:
        """What a client has to know, a sentence each."""
        said = []
        if self.max_length is not None:
            said.append(f"at most {self.max_length} tokens a sequence")
        if self.options.logits == "last":
            said.append("a sequence without new tokens is answered with a row of zeros")
        if self.switches:
            said.append("a beginning is shared only below the length at which its tables switch")
        return tuple(said)

    def write_metadata(self) -> None:
        """Leave in the model how it was paged."""
        told = {
            "block_size": self.options.block_size,
            "flavor": self.options.flavor,
            "logits": self.options.logits,
            "contract": self.contract,
        }
        self.model.metadata_props[KEY] = json.dumps(told)

    def described(self) -> Paging:
        """The same for the report."""
        kinds = {pool.dtype for pool in self.pools}
        return Paging(
            block_size=self.options.block_size,
            tokens=self.tokens,
            logits=self.options.logits,
            layers=self.layers,
            pools=[pool.name for pool in self.pools],
            kv_dtype=", ".join(sorted(kind.name for kind in kinds)),
            token_bytes=sum(int(p.heads * p.size * p.dtype.itemsize) for p in self.pools),
            families=[str(family) for family in self.families],
            flavor=self.options.flavor,
            max_length=self.max_length,
            kernel="not run: nothing was" if self.options.flavor == "ort" else "",
            dropped=list(self.dropped),
        )


def check_paged_options(options: PagedOptions) -> None:
    """Refuse sizes that no runtime takes.

    Raises:
        UsageError: the size of a block is no power of two, or too large; a type of pools that the
            flavor has not.
    """
    size = options.block_size
    if not 1 <= size <= LARGEST_BLOCK or size & (size - 1):
        raise UsageError(
            f"--block-size {size}: a block has a power of two of slots, at most {LARGEST_BLOCK}"
        )
    if options.flavor == "ort" and options.kv_dtype == ir.DataType.FLOAT:
        raise UsageError("--kv-dtype fp32: pools of --flavor ort are fp16")
