"""What a model is, as plain values; `onnxgen.inspection` fills them in, `report.inspected` shows them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Port:
    """An input or an output: name, type, shape, and role (`analysis.roles`; "" of a paged model)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    role: str


@dataclass(frozen=True)
class Attending:
    """Attentions that are alike.

    Attributes:
        layers: how many there are.
        heads, kv_heads, head_size: H, K and D; 0 where a size is not fixed.
        mask: the mask's family, such as "causal, key padding"; "none"; "general: " and why; "" of
            a paged model.
        rotary: how queries and keys are rotated, such as "20 of 40, halves"; "none"; "" of a
            paged model.
        softcap: what bounds the scores; 0.0 for nothing.
        sinks: whether a number a head joins the scores.
    """

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mask: str
    rotary: str
    softcap: float = 0.0
    sinks: bool = False


@dataclass(frozen=True)
class Takes:
    """Whether a target could be written, and what it would give or what stands in the way."""

    target: str
    possible: bool
    said: str


@dataclass
class Inspection:
    """What a model is.

    Attributes:
        input: the path as given.
        bytes: of the model's file and the data files that it names.
        written_by: exporter or tool, and its version, as the file says.
        opset: version of the default domain.
        domains: versions of the other domains.
        nodes: functions' bodies included, once a call.
        ops: how many of each op type.
        kind: "decoder with caches", "decoder", "encoder" or "other".
        inputs, outputs: in their order.
        attentions: the equal ones once.
        kept: what looks like attention, a norm, ... and cannot be fused, by kind.
        hidden_size, vocabulary: H and V; 0 where nothing shows them.
        experts: experts of a mixture; 0 where there is none.
        experts_per_token: how many of them a token goes to; 0 for all.
        cache: "growing", "static, 128 places", "cropped to 4095", "paged"; "" for none.
        cache_dtype: of keys and values.
        kv_bytes_per_token: bytes that one token of one sequence takes in all caches; 0 where sizes
            are not fixed.
        parameters: elements of all weights.
        weights: bytes by element type.
        precision: the type that most weights have.
        quantised: how many nodes read quantised weights or compute in integers, by op type.
        contract: what the model says that it assumes; "" for nothing.
        backends: whose compiled objects it holds, see docs/contexts.md.
        targets: what it could become.
        warnings: one sentence each.
    """

    input: str
    bytes: int = 0
    written_by: str = ""
    opset: int = 0
    domains: dict[str, int] = field(default_factory=dict)
    nodes: int = 0
    ops: dict[str, int] = field(default_factory=dict)
    kind: str = "other"
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    attentions: list[Attending] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)
    hidden_size: int = 0
    vocabulary: int = 0
    experts: int = 0
    experts_per_token: int = 0
    cache: str = ""
    cache_dtype: str = ""
    kv_bytes_per_token: int = 0
    parameters: int = 0
    weights: dict[str, int] = field(default_factory=dict)
    precision: str = ""
    quantised: dict[str, int] = field(default_factory=dict)
    contract: str = ""
    backends: list[str] = field(default_factory=list)
    targets: list[Takes] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
