"""What a rewrite replaces, and what by, cut out of the graph: two models with the same inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from onnxgen.analysis.edges import COMPARISONS, LIMITS, edges_among
from onnxgen.analysis.evaluate import cut
from onnxgen.analysis.facts import Facts
from onnxgen.analysis.graph import ancestors
from onnxgen.derived import DerivedTensor
from onnxgen.patterns.rule import Rewrite

MAX_NODES = 20_000  # of a part: a loop over 256 experts, written out
SMALL = 256  # elements: constants up to here are written into a part, larger ones are fed


@dataclass(frozen=True)
class Part:
    """What a rewrite replaces, and what by, cut out.

    Attributes:
        before, after: the old and the new nodes, with what makes their masks and tables.
        free: the values both are cut off at, by name.
        farthest: the largest number that integers among the old nodes are compared with, 0 for none.
        weights: those of them that the fused node reads directly: any numbers will do, so that
            norms with weights of their own are one structure. Other constants keep theirs.
    """

    before: onnx.ModelProto
    after: onnx.ModelProto
    free: Mapping[str, ir.Value]
    weights: frozenset[ir.Value]
    farthest: int

    @classmethod
    def of(
        cls, facts: Facts, rewrite: Rewrite, nodes: Sequence[ir.Node], *, drawn: bool = True
    ) -> Part:
        """Cut the part out.

        Args:
            drawn: whether weights that the fused node reads may be any numbers.

        Raises:
            CutError: the old nodes read activations that the new ones do not.
        """
        made = {output for node in nodes for output in node.outputs}
        read = [v for node in nodes for v in node.inputs if v is not None and v not in made]
        weights = frozenset(v for v in rewrite.node.inputs if v is not None and _elements(v) > 1)
        weights = weights if drawn else frozenset()
        stop = dict.fromkeys(
            v
            for v in read
            if facts.is_activation(v) or v.is_graph_input() or v in weights or _is_fed(v)
        )
        old = [old for old, _ in rewrite.outputs]
        # Masks, tables and sizes are computed from the graph's inputs inside the part; sizes read
        # off activations from outside of it, and large constants, are fed.
        inside = _following(facts, stop)
        for node in ancestors(read + old, frozenset(stop)):
            for each in node.inputs:
                if each is None or each in stop:
                    continue
                if each.is_graph_input() or _is_fed(each):
                    stop[each] = None
                elif (
                    node.op_type in ("Shape", "Size")
                    and facts.is_activation(each)
                    and each not in inside
                ):
                    stop[node.outputs[0]] = None
        opsets = facts.graph.opset_imports
        new = [new for _, new in rewrite.outputs]
        for each in (rewrite.mask, rewrite.counts):
            if each is not None and each not in new:
                new.append(each)
        before = cut(stop, old, opsets, max_nodes=MAX_NODES, max_bytes=1 << 30)
        after = cut(stop, new, opsets, max_nodes=MAX_NODES, max_bytes=1 << 30)
        read_before = {each.name for each in before.graph.input}
        used = read_before | {each.name for each in after.graph.input}
        shared = frozenset(v for v in weights if v.name in read_before)
        compared = {*COMPARISONS, *LIMITS}
        deciding = (node for node in ancestors(old, frozenset(stop)) if node.op_type in compared)
        farthest = max((edge for edge in edges_among(deciding)), default=0)
        free = {v.name or "": v for v in stop if v.name in used}
        return cls(before, after, free, shared, farthest)

    def structure(self, facts: Facts) -> str:
        """A key that is equal for parts that differ in names and in weights only.

        Weights that new ones are derived from count by how these are made.
        """
        places = {id(v.const_value): f"#{at}" for at, v in enumerate(self.free.values())}
        sources: set[str] = set()

        def source(tensor: ir.TensorProtocol) -> str:
            place = places.get(id(tensor), tensor.name or "")
            sources.add(place)
            return place

        made = {
            value: value.const_value.rows.outline(source)
            for value in self.free.values()
            if isinstance(value.const_value, DerivedTensor)
        }
        keys = [_structure(self.before), _structure(self.after)]
        for at, value in enumerate(self.free.values()):
            kept = value.const_value is None or value in self.weights or f"#{at}" in sources
            name = "" if kept else value.name
            keys.append(f"{facts.shapes.of(value)}{made.get(value, name)}")
        return "".join(keys)


def _following(facts: Facts, stop: Collection[ir.Value]) -> set[ir.Value]:
    """The activations that follow from these values and from no other activation."""
    found = {value for value in stop if facts.is_activation(value)}
    pending = list(found)
    while pending:
        for use in pending.pop().uses():
            new = [v for v in use.node.outputs if v not in found]
            if new and all(v in found for v in use.node.inputs if facts.is_activation(v)):
                found.update(new)
                pending.extend(new)
    return found


def _is_fed(value: ir.Value) -> bool:
    """Whether a constant is fed to a part: a large one that the runtime's Python takes."""
    whole = value.dtype is not None and value.dtype.bitwidth >= 8
    return whole and _elements(value) > SMALL


def _elements(value: ir.Value) -> int:
    """How many elements a constant has; 0 for what is no constant."""
    if value.const_value is None or value.is_graph_input():
        return 0
    return int(value.const_value.size)


def _structure(part: onnx.ModelProto) -> str:
    """A key that is equal for parts that differ in names only."""
    names: dict[str, str] = {"": ""}

    def name(value: str) -> str:
        return names.setdefault(value, str(len(names)))

    digest = hashlib.sha256()
    for value in part.graph.input:
        digest.update(f"in {name(value.name)} {value.type.tensor_type.elem_type};".encode())
    for tensor in part.graph.initializer:
        content = tensor.SerializeToString() if not tensor.name else _content(tensor)
        digest.update(f"const {name(tensor.name)};".encode() + content)
    for node in part.graph.node:
        inputs = ",".join(map(name, node.input))
        outputs = ",".join(map(name, node.output))
        digest.update(
            f"{node.domain}:{node.op_type}:{node.overload}({inputs})->{outputs};".encode()
        )
        for each in sorted(node.attribute, key=lambda attribute: attribute.name):
            digest.update(each.SerializeToString(deterministic=True))
    digest.update(",".join(name(value.name) for value in part.graph.output).encode())
    return digest.hexdigest()


def _content(tensor: onnx.TensorProto) -> bytes:
    unnamed = onnx.TensorProto()
    unnamed.CopyFrom(tensor)
    unnamed.ClearField("name")
    content: bytes = unnamed.SerializeToString(deterministic=True)
    return content
