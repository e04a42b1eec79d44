"""Groups of nodes, cut until a runtime can run each in one piece.

    wires = Wires.of(graph)
    pieces = settle(wires, groups, usable)      # for every group, the pieces that it became

A piece is run at once: everything that it reads is there before it begins. So no way may leave a
piece and come back, nor lead from one piece into another and back: with every piece drawn as one
node, the graph must have no cycle. A group that has one is given the nodes in between where they
are nobody else's, and is cut otherwise.

Nodes are known by their positions in the graph's list.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxgen.analysis.evaluate import sorted_nodes
from onnxgen.analysis.graph import read_by

NONE = -1
"""The label of a node that is in no piece."""


@dataclass(frozen=True)
class Wires:
    """Which node reads which.

    Attributes:
        sources: of each node the nodes that it reads, those that its subgraphs read too.
        readers: the other way round.
        order: all nodes, each behind its sources.
    """

    sources: list[list[int]]
    readers: list[list[int]]
    order: list[int]

    @classmethod
    def of(cls, graph: ir.Graph) -> Wires:
        """Of a graph's nodes, in whatever order they stand."""
        at = {node: index for index, node in enumerate(graph)}
        sources: list[list[int]] = []
        for node in graph:
            makers = (value.producer() for value in read_by(node))
            sources.append(sorted({at[maker] for maker in makers if maker in at}))
        return cls.between(sources, [at[node] for node in sorted_nodes(graph)])

    @classmethod
    def between(cls, sources: list[list[int]], order: list[int]) -> Wires:
        """Of nodes whose sources are known, and an order in which they follow these."""
        readers: list[list[int]] = [[] for _ in sources]
        for reader, makers in enumerate(sources):
            for maker in makers:
                readers[maker].append(reader)
        return cls(sources, readers, order)


def settle(
    wires: Wires, groups: Sequence[Collection[int]], usable: Collection[int]
) -> list[list[list[int]]]:
    """For every group its pieces, that of the earliest node first; none for an empty group.

    Args:
        groups: disjoint.
        usable: the nodes that may be in a piece.
    """
    work = _Pieces(wires, groups, usable)
    pending = [wires.order]
    while pending:
        for knot in work.knots(pending.pop()):
            # What does not help is tried in turn: nodes are taken in, groups that are their own
            # hindrance are cut, then one of those that wait for one another.
            if not (work.filled(knot) or work.loosened(knot)):
                work.parted(knot)
            pending.append(knot)
    return work.result()


class _Pieces:
    """Which piece each node is in, as far as it is known."""

    def __init__(
        self, wires: Wires, groups: Sequence[Collection[int]], usable: Collection[int]
    ) -> None:
        self.wires, self.usable = wires, frozenset(usable)
        self.groups = len(groups)
        self.group_of = list(range(len(groups)))  # of a piece; at first every group is one
        self.label = [NONE] * len(wires.sources)
        self.convex: set[int] = set()  # pieces that no way leaves and enters again
        for number, group in enumerate(groups):
            for node in group:
                self.label[node] = number

    def result(self) -> list[list[list[int]]]:
        held: dict[int, list[int]] = {}
        for node in self.wires.order:
            if self.label[node] != NONE:
                held.setdefault(self.label[node], []).append(node)
        pieces: list[list[list[int]]] = [[] for _ in range(self.groups)]
        for label, nodes in held.items():
            pieces[self.group_of[label]].append(nodes)
        return pieces

    # --- cycles ---------------------------------------------------------------------------------

    def knots(self, nodes: Sequence[int]) -> list[list[int]]:
        """The pieces and nodes that lie on cycles together, each time as nodes in order."""
        parts = _strongly_connected(self._collapsed(nodes))
        knot_of = {key: at for at, part in enumerate(parts) if len(part) > 1 for key in part}
        knots: dict[int, list[int]] = {}
        for node in nodes:
            at = knot_of.get(self._key(node))
            if at is not None:
                knots.setdefault(at, []).append(node)
        return list(knots.values())

    def _key(self, node: int) -> int:
        """A node's piece, or the node itself, as a number of its own."""
        return self.label[node] if self.label[node] != NONE else NONE - 1 - node

    def _collapsed(self, nodes: Sequence[int]) -> dict[int, dict[int, None]]:
        """Which pieces and nodes follow a piece or node directly, among these."""
        after: dict[int, dict[int, None]] = {self._key(node): {} for node in nodes}
        for node in nodes:
            own = self._key(node)
            for reader in self.wires.readers[node]:
                key = self._key(reader)
                if key != own and key in after:
                    after[own][key] = None
        return after

    # --- what is done about them ----------------------------------------------------------------

    def filled(self, knot: Sequence[int]) -> bool:
        """Take in what lies between nodes of a piece where no other piece has or reads it."""
        done = False
        for piece in self._doubtful(knot):
            between = self._between(piece, knot)
            if not between:
                self.convex.add(piece)
                continue
            free = all(
                self.label[node] == NONE
                and node in self.usable
                and all(self.label[each] in (NONE, piece) for each in self.wires.readers[node])
                for node in between
            )
            if free:
                for node in between:
                    self.label[node] = piece
                done = True
        return done

    def loosened(self, knot: Sequence[int]) -> bool:
        """Cut every piece that is left and entered again, at each return."""
        done = False
        for piece in self._doubtful(knot):
            returns = dict.fromkeys(knot, 0)  # how often a way to a node has left the piece
            for node in knot:
                for source in self.wires.sources[node]:
                    if source in returns:
                        left = self.label[source] == piece != self.label[node]
                        returns[node] = max(returns[node], returns[source] + left)
            nodes = [node for node in knot if self.label[node] == piece]
            self.convex.add(piece)
            for level in sorted({returns[node] for node in nodes})[1:]:
                self._cut_off(piece, [node for node in nodes if returns[node] == level])
                done = True
        return done

    def parted(self, knot: Sequence[int]) -> None:
        """Cut the piece that begins first off what follows from others in it.

        No node of the knot comes before its first one, so that stays behind: both parts hold
        something, and what is cut once is never whole again.
        """
        piece = self.label[knot[0]]
        after = self._collapsed(knot)
        reached: set[int] = set()
        pending = list(after[piece])
        while pending:
            key = pending.pop()
            if key not in reached and key != piece:
                reached.add(key)
                pending += after[key]
        late: set[int] = set()
        for node in knot:
            if self.label[node] == piece:
                makers = self.wires.sources[node]
                if any(each in late or self._key(each) in reached for each in makers):
                    late.add(node)
        self._cut_off(piece, late)

    def _doubtful(self, knot: Sequence[int]) -> list[int]:
        """The pieces of a knot that may be left and entered again."""
        there = dict.fromkeys(self.label[node] for node in knot)
        return [piece for piece in there if piece != NONE and piece not in self.convex]

    def _between(self, piece: int, knot: Sequence[int]) -> list[int]:
        """The nodes that follow from a piece, and that it follows from."""
        before: set[int] = set()
        for node in reversed(knot):
            if any(self.label[r] == piece or r in before for r in self.wires.readers[node]):
                before.add(node)
        behind: set[int] = set()
        for node in knot:
            if any(self.label[s] == piece or s in behind for s in self.wires.sources[node]):
                behind.add(node)
        return [n for n in knot if n in before and n in behind and self.label[n] != piece]

    def _cut_off(self, piece: int, nodes: Collection[int]) -> None:
        self.group_of.append(self.group_of[piece])
        part = len(self.group_of) - 1
        self.convex.add(part)  # as every part is that is cut off
        for node in nodes:
            self.label[node] = part


def _strongly_connected(after: dict[int, dict[int, None]]) -> Iterator[list[int]]:
    """Tarjan's algorithm, without recursion: graphs are deeper than Python's stack."""
    number: dict[int, int] = {}
    lowest: dict[int, int] = {}
    stack: list[int] = []
    waiting: set[int] = set()
    for root in after:
        if root in number:
            continue
        ways = [(root, iter(after[root]))]
        number[root] = lowest[root] = len(number)
        stack.append(root)
        waiting.add(root)
        while ways:
            key, others = ways[-1]
            for other in others:
                if other not in number:
                    number[other] = lowest[other] = len(number)
                    stack.append(other)
                    waiting.add(other)
                    ways.append((other, iter(after[other])))
                    break
                if other in waiting:
                    lowest[key] = min(lowest[key], number[other])
            else:
                ways.pop()
                if ways:
                    above = ways[-1][0]
                    lowest[above] = min(lowest[above], lowest[key])
                if lowest[key] == number[key]:
                    part = []
                    while True:
                        part.append(stack.pop())
                        waiting.discard(part[-1])
                        if part[-1] == key:
                            break
                    yield part
