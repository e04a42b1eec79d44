"""Rules that onnxgen's users write: in onnxscript's pattern language, or as rules of our own kind.

A `RewriteRule` of onnxscript is shown nodes by our engine and gives what it would put in their
place; nothing of the graph is changed before that is checked. A match that fails says why:

    the pattern fits, `check` or `rewrite` says no      a site that is kept, with their reason
    a part of the pattern fits                          a near miss; of each rule the nearest ones

A pattern of one node that `check` refuses is no site: there the check is part of the pattern.

Declines
    no-match: a node is not what the pattern has in its place.
        Expected: the node that the pattern names.
        Change: another spelling is another pattern; normalized, the model reads as
            `python -m onnxgen.rule_writing MODEL` prints it.
    check: the pattern fits, and the rule's check refuses.
        Expected: what the rule's check asks for.
        Change: the rule's check.
    rewrite: the pattern fits, and the rule's rewrite gives nothing.
        Expected: what the rule's rewrite asks for.
        Change: the rule's rewrite.
    other-type: what the rule makes has another type than what it replaces.
        Expected: outputs of the same types.
        Change: a Cast in the rule's rewrite.
    check-failed: the rewrite was run beside what it replaces, and differed or failed.
        Expected: equal results on ONNX Runtime, within the tolerance.
        Change: the rule: what it makes is not what it replaces.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir
from onnxscript.optimizer import basic_constant_propagation
from onnxscript.rewriter import MatchingTracer, MatchResult, MatchStatus, RewriteRule

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.scopes import scope_of
from onnxgen.errors import UsageError
from onnxgen.patterns.building import Builder
from onnxgen.patterns.rule import Declined, Rewrite, Rule
from onnxgen.report.values import Site

Stage = Literal["before", "after"]
STAGES: tuple[Stage, ...] = ("before", "after")


@dataclass(frozen=True)
class Origin:
    """Where a rule comes from.

    Attributes:
        name: the file, or the package, for a person.
        file: the file that it was read from, "" where it was given otherwise.
    """

    name: str
    file: str = ""


class OwnRule(Rule):
    """A user's rule; whatever it raises ends the command in a sentence that names it.

    Attributes:
        stage: whether it is applied before ours, to the normalized graph, or after them, to the
            canonical form.
        misses: the places where it nearly matched, of those that it was shown last.
    """

    def __init__(self, code: str, kind: str, stage: Stage, origin: Origin) -> None:
        self.code = code
        self.kind = kind
        self.stage = stage
        self.origin = origin
        self.misses: list[Site] = []

    @contextmanager
    def said(self, node: ir.Node | None = None) -> Iterator[None]:
        """What the user's code raises within becomes a sentence.

        Raises:
            UsageError: it raised something, with the file's line where that is known.
        """
        try:
            yield
        except (Declined, UsageError):
            raise
        except Exception as error:
            where = "" if node is None else f" at node '{node.name}' ({node.op_type})"
            raise UsageError(
                f"{self.origin.name}: the rule {self.code} fails{where}: "
                f"{raised(error, self.origin.file)}"
            ) from error


class GivenRule(OwnRule):
    """A rule of our own kind, `onnxgen.patterns.rule.Rule`, that a user wrote."""

    def __init__(self, rule: Rule, stage: Stage, origin: Origin) -> None:
        super().__init__(rule.code, rule.kind, stage, origin)
        self._rule = rule

    def looks_at(self, node: ir.Node) -> bool:
        with self.said(node):
            return self._rule.looks_at(node)

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        with self.said(node):
            found = self._rule.rewrite(facts, builder, node)
            if not isinstance(found, Rewrite | None):
                raise TypeError(f"it gives {type(found).__name__}, not a Rewrite or None")
            return found

    def begin(self, model: ir.Model) -> None:
        with self.said():
            self._rule.begin(model)

    def end(self) -> None:
        with self.said():
            self._rule.end()

    def applied(self, rewrite: Rewrite) -> None:
        with self.said(rewrite.node):
            self._rule.applied(rewrite)


class ScriptRule(OwnRule):
    """A rule in onnxscript's pattern language, anchored at the node that its pattern ends in.

    Args:
        variants: tried in order: one rule's pattern, with operands of commutative operators in
            either order, makes several.
    """

    def __init__(
        self, variants: Sequence[RewriteRule], code: str, kind: str, stage: Stage, origin: Origin
    ) -> None:
        super().__init__(code, kind, stage, origin)
        self._variants = variants
        self._roots = {_root(variant) for variant in variants}
        self._model: ir.Model | None = None
        self._tried: list[tuple[int, ir.Node, Site]] = []
        self._hits = 0

    def looks_at(self, node: ir.Node) -> bool:
        return None in self._roots or (node.domain, node.op_type) in self._roots

    def begin(self, model: ir.Model) -> None:
        self._model = model
        self._tried, self._hits = [], 0
        for variant in self._variants:
            with self.said():
                if variant.graph_pre_visitor is not None:
                    variant.graph_pre_visitor()

    def end(self) -> None:
        for variant in self._variants:
            with self.said():
                if variant.graph_post_visitor is not None:
                    variant.graph_post_visitor()
        tried = [(matched, site) for matched, node, site in self._tried if node.graph is not None]
        nearest = max((matched for matched, _ in tried), default=0)
        # Where it found its sites, nodes that its pattern only ends like are none.
        far = self._hits > 0 and nearest < 2
        self.misses = [site for matched, site in tried if matched == nearest and not far]

    def applied(self, rewrite: Rewrite) -> None:
        self._hits += 1

    def rewrite(self, facts: Facts, builder: Builder, node: ir.Node) -> Rewrite | None:
        assert self._model is not None
        nearest: tuple[int, int, MatchResult] | None = None
        for variant in self._variants:
            tracer = MatchingTracer()
            with self.said(node):
                found = variant.try_rewrite(self._model, facts.graph, node, tracer=tracer)
            if found is not None:
                return self._made(found, builder, node)
            for info in tracer.best_matches_map.get(variant, [])[:1]:
                tried = (int(info.status), len(info.match_result.nodes), info.match_result)
                nearest = tried if nearest is None or tried[:2] > nearest[:2] else nearest
        if nearest is None:
            return None
        status, matched, result = nearest
        code = _CODES[MatchStatus(status)]
        declined = Declined(self, code, _reason(code, result), *_stopped(result, node))
        if code != "no-match" and matched > 1:
            raise declined
        site = Site(self.kind, self.code, node.name or "", scope_of([node]), "kept")
        site.decline, site.details = declined.decline, {"matched": matched}
        self._tried.append((matched, node, site))
        return None

    def _made(self, found: Any, builder: Builder, node: ir.Node) -> Rewrite:
        """What the rule would put in the place of what it matched, named and typed as ours is."""
        for value in found.new_initializers:
            self._register(value, builder)
        basic_constant_propagation(found.new_nodes)
        outputs = list(found.new_outputs)
        for new in found.new_nodes:
            if new.op_type == "Constant" and new.domain in ("", "ai.onnx"):
                lifted = self._lifted(new, builder)
                outputs = [lifted if value in new.outputs else value for value in outputs]
                continue
            for value in new.inputs:
                if value is not None and not _is_made(value):
                    raise UsageError(
                        f"{self.origin.name}: the rule {self.code} makes a node ({new.op_type}) that "
                        f"reads '{value.name}', which nothing makes"
                    )
            builder.adopt(new)
        pairs: list[tuple[ir.Value, ir.Value]] = []
        made = {value for new in builder.nodes for value in new.outputs}
        for old, new_value in zip(found.match.outputs, outputs, strict=True):
            if new_value not in made:  # a value that is there already, or stands for two
                new_value = builder.op("Identity", [new_value])
            made.discard(new_value)
            new_value.dtype = new_value.dtype or old.dtype
            if None is not old.dtype != new_value.dtype:
                reason = f"'{old.name}' is {old.dtype}, and its replacement {new_value.dtype}"
                raise Declined(self, "other-type", reason, node)
            pairs.append((old, new_value))
        fused = pairs[0][1].producer()
        assert fused is not None
        return Rewrite(fused, tuple(pairs), particular=True)

    def _lifted(self, node: ir.Node, builder: Builder) -> ir.Value:
        """A Constant's value as an initializer, which is what normalized graphs hold."""
        output = node.outputs[0]
        value = ir.Value(name="constant", const_value=output.const_value)
        self._register(value, builder)
        output.replace_all_uses_with(value)
        return value

    def _register(self, value: ir.Value, builder: Builder) -> None:
        tensor = value.const_value
        if tensor is None:
            raise UsageError(
                f"{self.origin.name}: the rule {self.code} makes an initializer "
                f"'{value.name}' that has no value"
            )
        value.name = builder.unique(f"{self.code}/{value.name}")
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        builder.graph.register_initializer(value)


_CODES = {
    MatchStatus.NO_MATCH: "no-match",
    MatchStatus.CONDITION_FAILED: "check",
    MatchStatus.REPLACEMENT_FAILED: "rewrite",
    MatchStatus.SUCCESS: "rewrite",  # logged of a match before its replacement failed
}


def raised(error: BaseException, file: str) -> str:
    """An exception as words, with the line of the user's file that it came from."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__) if file else []
    lines = [frame.lineno for frame in frames if frame.filename == file]
    words = " ".join(str(error).split())[:300]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}{f': {words}' if words else ''}"


def _root(rule: RewriteRule) -> tuple[str, str] | None:
    """Domain and op type of the node that a pattern ends in; None where these are patterns too."""
    known: ir.OperatorIdentifier | None = rule._target_pattern.output_nodes[0].op_identifier()
    return None if known is None else (known[0], known[1])


def _reason(code: str, result: MatchResult) -> str:
    if code != "no-match" and result.reason in ("", "Condition function check failed"):
        return f"its {code} says no, and gives no reason"
    return " ".join(str(result.reason).split()) or "the pattern does not fit"


def _stopped(result: MatchResult, anchor: ir.Node) -> list[ir.Node]:
    """The nodes that stopped a match, the decisive ones first, then its anchor."""
    nodes = [
        each.producer() if isinstance(each, ir.Value) else each
        for each in result.failure_nodes_and_values
    ]
    return list(dict.fromkeys(node for node in (*nodes, anchor) if isinstance(node, ir.Node)))


def _is_made(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()
