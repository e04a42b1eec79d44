"""What a command did, as plain values: the one source of the text, the JSON and every other view.

Every class here is data only: passes and the verifier fill them, the other modules of
`onnxgen.report` read them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from onnxgen.report.pictures import MaskPicture, Picture

SCHEMA_VERSION = 1
Budget = Literal["quick", "full", "layers"]
BUDGETS: tuple[Budget, ...] = ("quick", "full", "layers")


@dataclass(frozen=True)
class Decline:
    """Why a rule did not rewrite what it was looking at.

    Attributes:
        rule: the rule's code, such as "ATT001".
        code: a stable slug, such as "no-value-product".
        reason: one sentence for a person.
        nodes: names of the nodes that stopped the rule, the decisive one first.
        reached: what the rule looks for and found, in its order.
        ahead: what it looks for and did not find, the first being where it stopped.
        expected: what the rule would have taken there; "" where its page does not say.
        found: the first of `nodes` with the types and shapes of what it reads.
        change: what a user can do about it.
    """

    rule: str
    code: str
    reason: str
    nodes: tuple[str, ...] = ()
    reached: tuple[str, ...] = ()
    ahead: tuple[str, ...] = ()
    expected: str = ""
    found: str = ""
    change: str = ""


@dataclass
class Site:
    """One place in the model that a rule looked at.

    Attributes:
        kind: "attention", "rms_norm", "layer_norm", "rotary" or "cache"; lowered: "attention",
            "projection" or "norm".
        rule: the code of the rule that fused it, or came nearest.
        node: name of the fused node, or of the anchor node that was kept.
        scope: the module path that the exporter left, "" where it left none.
        status: "fused"; "kept" (declined, see decline); "undone" (the rewrite's own check
            failed and the nodes were put back, see decline).
        decline: why it was kept or undone.
        replaced: how many nodes the fused node stands for.
        details: what was found: heads, kv_heads, head_size, scale, mask, ...
    """

    kind: str
    rule: str
    node: str
    scope: str
    status: Literal["fused", "kept", "undone"]
    decline: Decline | None = None
    replaced: int = 0
    details: dict[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One comparison of the original and the rewritten model.

    Attributes:
        name: what the case is about, such as "decode over past 7, left padding".
        batch, new, past: B, S and P of the run.
        padding: "none", "left" or "right".
        difference: largest |original - rewritten| over the standard deviation of the
            original output, over every output; NaN never occurs: a NaN on one side counts as inf.
        output: the output where the largest difference is.
        skipped: why the case could not be run (the original itself fails on it), else "".
        outside: what the model's contract says against it, where it failed as it must; else "".
    """

    name: str
    batch: int
    new: int
    past: int
    padding: str
    difference: float = 0.0
    output: str = ""
    skipped: str = ""
    outside: str = ""

    @property
    def compared(self) -> bool:
        """Whether the two models' outputs were compared."""
        return not self.skipped and not self.outside


@dataclass(frozen=True)
class Origin:
    """Where two models that differ start to: the first value inside that is apart.

    Attributes:
        value: its name, in both models.
        layer: the exporter's module that computes it, "" where no node says.
        node, op: the rewritten model's node that is to blame, and its op type.
        rule: the code of the rule that made that node, "" where none did.
        difference: how far the value is apart, in standard deviations.
        place, places: it is this one, counted from 1, of so many values that were compared.
    """

    value: str
    layer: str
    node: str
    op: str
    rule: str
    difference: float
    place: int
    places: int

    def __str__(self) -> str:
        made = f"rewrite {self.rule}, " if self.rule else ""
        where = f"in layer {self.layer} " if self.layer else ""
        return (
            f"the difference starts {where}at value {self.value!r} "
            f"({made}node {self.node!r}, {self.op})"
        )


@dataclass(frozen=True)
class Faint:
    """Something that the original's outputs hardly depend on, so that they show little of it.

    Attributes:
        what: "past", "positions" or "mask".
        effect: how far changing it moved the outputs, in standard deviations.
    """

    what: str
    effect: float


@dataclass
class Proof:
    """What was run to show that the written model equals the original.

    Attributes:
        status: "proven", "differs", "unproven" (told not to run) or "unverifiable".
        tolerance: largest allowed difference, relative to the output's standard deviation.
        cases: whole-model comparisons.
        rewrites: how many rewrites were checked where they happened.
        structures: how many distinct rewrites among them were run (equal ones once).
        rewrite_difference: the largest difference seen in those checks.
        reason: one sentence where the status is not "proven".
        note: one sentence where the compared models are not what is written, bit for bit.
        twins: the types for which float32 was run in the whole models' comparison.
        budget: "quick", "full" or "layers": what was asked for.
        inner: how many values inside both models were compared, and `inner_difference`, the
            largest difference of one.
        faint: what the outputs hardly depend on.
        origin: where the difference starts, of models that differ; None where that is not known.
        not_run: what the budget left out, one sentence each.
        layers: with the budget "layers": how many parts the models come apart into, and
            `layers_run`, how many of them were run: one of each kind.
        seconds: that ONNX Runtime loaded and ran models, those of analysis and of the rewrites'
            checks too.
        memory: bytes of anonymous memory that its process was seen to have at most; 0 where the
            system does not say.
    """

    status: Literal["proven", "differs", "unproven", "unverifiable"]
    tolerance: float
    cases: list[Case] = field(default_factory=list)
    rewrites: int = 0
    structures: int = 0
    rewrite_difference: float = 0.0
    reason: str = ""
    note: str = ""
    twins: tuple[str, ...] = ()
    budget: Budget = "full"
    inner: int = 0
    inner_difference: float = 0.0
    faint: list[Faint] = field(default_factory=list)
    origin: Origin | None = None
    not_run: list[str] = field(default_factory=list)
    layers: int = 0
    layers_run: int = 0
    seconds: float = 0.0
    memory: int = 0

    @property
    def worst(self) -> Case | None:
        """The case with the largest difference, None when no case ran."""
        ran = [case for case in self.cases if case.compared]
        return max(ran, key=lambda case: case.difference, default=None)


@dataclass(frozen=True)
class Obstacle:
    """One thing that stands in the way of paging a model.

    Attributes:
        code: stable, such as "PAG004".
        reason: one sentence for a person.
        node: name of the node or the tensor it is about.
    """

    code: str
    reason: str
    node: str = ""


@dataclass
class Paging:
    """What `onnxgen to-paged` made, or why it could not.

    Attributes:
        block_size: slots of a block.
        tokens: the input that the tokens come in by.
        logits: which rows are answered: "all", "last" or "indices".
        layers: attentions that read pools.
        pools: names of the pools' inputs.
        kv_dtype: of the pools.
        token_bytes: bytes that one token takes in all pools.
        families: what the masks mean, each once.
        dropped: outputs of the original that the paged model has not, caches aside.
        obstacles: what stands in the way; nothing was written then.
        flavor: "portable" or "ort".
        max_length: most tokens of a sequence; None where nothing limits them.
        kernel: of flavor "ort": what the operator's own kernel was run on and how far it differed,
            or "not run: " and why.
    """

    block_size: int
    tokens: str = ""
    logits: str = "all"
    layers: int = 0
    pools: list[str] = field(default_factory=list)
    kv_dtype: str = ""
    token_bytes: int = 0
    families: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    obstacles: list[Obstacle] = field(default_factory=list)
    flavor: str = "portable"
    max_length: int | None = None
    kernel: str = ""


@dataclass
class Report:
    """What `onnxgen fuse`, or `to-paged`, did to one model.

    Attributes:
        input, output: paths as given; output is "" when nothing was written.
        beside: names of the files that were written beside the output.
        target: "onnx", "ort" or "paged".
        paging: what was paged; None of `fuse`.
        contract: what the written model assumes, as text; "" where it assumes nothing.
        opset_before, opset_after: versions of the default domain.
        nodes_before: nodes of the model as read, functions' bodies included once a call.
        nodes_after: nodes of the model as written.
        ops_before, ops_after: how many nodes of each op type.
        bytes_before, bytes_after: of the model's file and of the data files that it names, as read
            and as written; 0 where nothing got so far.
        sites: every place a rule looked at, in graph order.
        already: by kind: places that the exporter itself wrote in the operator that a site of the
            kind becomes, and that no rule looked at.
        lowered: the same for the target's rules, which start from what raising gave.
        own_rules: where the user's rules come from, by code.
        near_misses: where one of these nearly matched: the pattern fits in part. Of each rule the
            nearest; `details` says how many nodes "matched".
        warnings: one sentence each.
        picture: one layer before and after; None where nothing was fused, or nothing written.
        masks: what the attentions' masks show, each distinct one once.
        seconds: wall time by stage ("read", "normalize", "raise", "verify", "write").
    """

    input: str
    output: str
    target: str
    opset_before: int = 0
    opset_after: int = 0
    nodes_before: int = 0
    nodes_after: int = 0
    ops_before: dict[str, int] = field(default_factory=dict)
    ops_after: dict[str, int] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    sites: list[Site] = field(default_factory=list)
    already: dict[str, int] = field(default_factory=dict)
    lowered: list[Site] = field(default_factory=list)
    contract: str = ""
    paging: Paging | None = None
    beside: list[str] = field(default_factory=list)
    proof: Proof | None = None
    own_rules: dict[str, str] = field(default_factory=dict)
    near_misses: list[Site] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    picture: Picture | None = None
    masks: list[MaskPicture] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a command ended: what a report file holds, whatever its kind.

    Attributes:
        command: "fuse", "to-paged" or "verify".
        exit_code: what the command ends with (see README.md).
        error: the sentence that it ends with; None where it succeeded.
        report: of fuse and to-paged; None where the command failed before there was one.
        original, rewritten: of verify: the two models, as given.
        compared: of verify: what was run; None where the command failed before.
    """

    command: str
    exit_code: int = 0
    error: str | None = None
    report: Report | None = None
    original: str = ""
    rewritten: str = ""
    compared: Proof | None = None

    @property
    def proof(self) -> Proof | None:
        """What was run, of any command."""
        return self.report.proof if self.report is not None else self.compared

    @property
    def model(self) -> str:
        """The model that the command was about, "" where it did not get so far."""
        return self.report.input if self.report is not None else self.original
