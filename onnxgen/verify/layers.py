"""Two models cut down, alike, to one layer of each kind.

    short = shorten(original, rewritten, roles)
    short.original, short.rewritten      # to be compared as any two models are

Both come apart at the same joints (`onnxgen.verify.joints`), into layers. Layers of one kind have
one structure in the original and one in the rewritten model, and every weight stands in the same
place in both. The first layer of each kind stays, with its weights where they are on disk; the
others are taken out, their caches too, and the models go on as if they had never been there. What
holds for every kind of layer holds for a chain of them.

Shapes: B batch, S new tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import CONTRIB, attribute
from onnxgen.analysis.roles import Roles
from onnxgen.verify.joints import find_joints
from onnxgen.verify.landmarks import carrying
from onnxgen.verify.opened import Placed, Source, opened, read
from onnxgen.verify.outline import Places, form_of, outline


@dataclass(frozen=True)
class Shortened:
    """The two models that are left.

    Attributes:
        original, rewritten: to be run.
        layers: how many parts the models came apart into.
        kept: how many of them are left.
    """

    original: Source
    rewritten: Source
    layers: int
    kept: int


def shorten(
    original: Source,
    rewritten: Source,
    roles: Roles,
    others: Roles | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Shortened:
    """Cut two models down; what has no joints, or no two layers alike, stays as it is.

    Args:
        roles: the original's.
        others: the rewritten model's, where they are not the same.
        aliases: of caches that the rewritten model has other names for, the original's, by these.
    """
    sides = (
        _Cut.of(original, roles),
        _Cut.of(rewritten, others or roles, aliases or {}),
    )
    names = [name for name in sides[0].joints if name in sides[1].joints]
    if sorted(names, key=list(sides[1].joints).index) != names or len(names) < 2:
        return Shortened(original, rewritten, 1, 1)
    for side in sides:
        side.divide(names)
    digests: dict[Any, str] = {}
    seen: set[tuple[str, str]] = set()
    gone = []
    for at in range(1, len(names)):
        places = Places(digests)
        answers = sides[0].answers(at)
        before = sides[0].outline(at, answers, places)
        key = before, sides[1].outline(at, answers, Places(digests), places)
        if key in seen and all(side.can_go(at) for side in sides):
            gone.append(at)
        seen.add(key)
    if not gone:
        return Shortened(original, rewritten, len(names) - 1, len(names) - 1)
    first, second = (side.without(gone) for side in sides)
    return Shortened(first, second, len(names) - 1, len(names) - 1 - len(gone))


class _Cut:
    """One of the models, and its joints by name."""

    def __init__(
        self,
        model: ir.Model,
        folder: Path | None,
        roles: Roles,
        aliases: Mapping[str, str] | None,
    ) -> None:
        self.model, self.folder = model, folder
        self.aliases, self.rewritten = aliases or {}, aliases is not None
        _split_norms(model.graph)
        self.facts = Facts(model.graph, roles)
        self.carries = set(carrying(model.graph, self.facts))
        self.joints = {str(v.name): v for v in find_joints(model.graph, self.facts)}
        self.parts: list[list[ir.Value]] = []

    @classmethod
    def of(cls, source: Source, roles: Roles, aliases: Mapping[str, str] | None = None) -> _Cut:
        proto, folder = opened(source)
        data = proto.SerializeToString()
        return cls(
            read(data if folder is None else Placed(data, folder)),
            folder,
            roles,
            aliases,
        )

    def divide(self, names: Sequence[str]) -> None:
        """Keep these joints, and give every other output to the layer that makes it."""
        self.joints = {name: self.joints[name] for name in names}
        self.parts = [[joint] for joint in self.joints.values()]
        latest: dict[ir.Value, int] = {joint: at for at, joint in enumerate(self.joints.values())}
        for node in self.model.graph:
            known = max((latest.get(v, -1) for v in node.inputs if v is not None), default=-1)
            for output in node.outputs:
                latest.setdefault(output, known)
        for output in self.model.graph.outputs:
            at = latest.get(output, -1) + 1
            if output not in self.joints.values() and 0 < at < len(self.parts):
                self.parts[at].append(output)

    def answers(self, at: int) -> list[str]:
        """The names of a layer's outputs, as the original has them."""
        return [self.aliases.get(str(v.name), str(v.name)) for v in self.parts[at][1:]]

    def outline(
        self, at: int, answers: Sequence[str], places: Places, original: Places | None = None
    ) -> str:
        """A layer's structure; its outputs in the order in which the original has them."""
        joint, *outputs = self.parts[at]
        own = dict(zip(self.answers(at), outputs, strict=True))
        if set(own) != set(answers):
            return f"answers {sorted(own)}"
        targets = [joint, *(own[name] for name in answers)]
        start = self.parts[at - 1][0]
        return outline(self.facts, targets, start, self.carries, places, original, self.aliases)

    def can_go(self, at: int) -> bool:
        """Whether what comes in is of the form that goes out, and no answer is lost."""
        before, after = self.parts[at - 1][0], self.parts[at][0]
        if after.is_graph_output():
            return False
        shapes = self.facts.shapes
        came, goes = shapes.of(before), shapes.of(after)
        if not self.rewritten:
            kinds = {before.dtype, after.dtype} - {None}
            return shapes.same_shape(came, goes) and len(kinds) < 2
        # Values are the original's; of their layout more may not be known than its fixed sizes.
        if came is None or goes is None:
            return True
        fixed = [(a, b) for a, b in zip(came, goes, strict=False) if {type(a), type(b)} == {int}]
        return len(came) == len(goes) and all(a == b for a, b in fixed)

    def without(self, gone: Sequence[int]) -> Source:
        """The model without these layers."""
        graph = self.model.graph
        stands = [part[0] for part in self.parts]
        lost: set[ir.Value] = set()
        for at in gone:
            self.parts[at][0].replace_all_uses_with(stands[at - 1])
            stands[at] = stands[at - 1]
            lost.update(self.parts[at][1:])
        graph.outputs[:] = [value for value in graph.outputs if value not in lost]
        self._read_lengths_elsewhere(lost)
        used = [value for value in graph.inputs if value.uses()]
        while dead := [
            n for n in graph if not any(o.uses() or o.is_graph_output() for o in n.outputs)
        ]:
            for node in dead:
                for index in range(len(node.inputs)):
                    node.replace_input_with(index, None)
            graph.remove(dead)
        unused = {value for value in used if not value.uses() and not value.is_graph_output()}
        graph.inputs[:] = [value for value in graph.inputs if value not in unused]
        for name in [n for n, v in graph.initializers.items() if not v.uses()]:
            if not graph.initializers[name].is_graph_output():
                del graph.initializers[name]
        data = ir.serde.serialize_model(self.model).SerializeToString()
        return data if self.folder is None else Placed(data, self.folder)

    def _read_lengths_elsewhere(self, lost: Collection[ir.Value]) -> None:
        """Read the lengths of caches that go with their layers off caches of the same form."""
        roles = self.facts.roles
        inputs = {str(value.name): value for value in self.model.graph.inputs}
        names = {value.name for value in lost}
        gone = [pair.past for pair in roles.pairs if pair.present in names]
        for name in gone:
            form = form_of(roles, name)
            stays = (
                inputs[other]
                for other in roles.inputs
                if other not in gone and form_of(roles, other) == form
            )
            instead = next(stays, None)
            for use in list(inputs[name].uses()):
                if instead is not None and use.node.op_type in ("Shape", "Size"):
                    use.node.replace_input_with(use.idx, instead)


def _split_norms(graph: ir.Graph) -> None:
    """Write norms that add first as a sum and a norm: a layer ends between the two."""
    opset = graph.opset_imports.get("", 24)
    for node in list(graph):
        simple = node.op_type == "SkipSimplifiedLayerNormalization"
        if node.domain != CONTRIB or not (simple or node.op_type == "SkipLayerNormalization"):
            continue
        outputs = [*node.outputs]
        if any(value.uses() or value.is_graph_output() for value in outputs[1:3]):
            continue
        x, skip, weight, *rest = node.inputs
        bias = rest[-1] if len(rest) == (1 if simple else 2) else None
        beta = rest[0] if rest and not simple else None
        made = [ir.node("Add", [x, skip])]
        if bias is not None:
            made.append(ir.node("Add", [made[-1].outputs[0], bias]))
        total = made[-1].outputs[0]
        kind = "RMSNormalization" if opset >= 23 else "SimplifiedLayerNormalization"
        attributes = {"axis": -1, "epsilon": attribute(node, "epsilon", 1e-12), "stash_type": 1}
        norm = ir.node(
            kind if simple else "LayerNormalization",
            [total, weight] if simple or beta is None else [total, weight, beta],
            attributes,
        )
        graph.insert_before(node, [*made, norm])
        for old, new in (
            (outputs[0], norm.outputs[0]),
            *([(outputs[3], total)] if len(outputs) > 3 else ()),
        ):
            new.name, new.shape, new.type = old.name, old.shape, old.type
            old.name = f"{old.name}:split"
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        if len(outputs) < 4:
            total.name = f"{node.name}:sum"
        graph.remove(node, safe=True)
