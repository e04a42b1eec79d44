"""Where the nodes of a small graph stand: in ranks from top to bottom, few crossings, straight.

Sugiyama's method (K. Sugiyama et al., 1981): ranks from longest paths, long edges through places
kept free on the ranks between, order within ranks by barycentres, then each as near to the
middle of its neighbours as its own neighbours on the rank leave room, in the least squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

PITCH = 42.0  # from rank to rank
GAP = 14.0  # between nodes of a rank
LANE = 6.0  # width of an edge that passes a rank
SWEEPS = 12


@dataclass
class Layout:
    """Centres of nodes, and the points that edges pass.

    Attributes:
        centres: x and y of each node.
        edges: from which node, to which, and the points between, top to bottom.
    """

    width: float
    height: float
    centres: list[tuple[float, float]]
    edges: list[tuple[int, int, list[tuple[float, float]]]] = field(default_factory=list)


def lay_out(widths: Sequence[float], reads: Sequence[Sequence[int]]) -> Layout:
    """Lay a graph out.

    Args:
        widths: of each node.
        reads: which nodes each one reads; all of them stand before it.
    """
    if not widths:
        return Layout(0, 0, [])
    ranks = _ranks(reads)
    places = list(widths)
    at = list(ranks)
    upper: list[list[int]] = [[] for _ in widths]
    lanes: dict[tuple[int, int], int] = {}
    chains: list[tuple[int, int, list[int]]] = []
    for node, sources in enumerate(reads):
        for source in sources:
            last, chain = source, []
            for rank in range(ranks[source] + 1, ranks[node]):
                lane = lanes.get((source, rank))  # edges from one node share their way
                if lane is None:
                    lane = lanes[source, rank] = len(places)
                    places.append(LANE)
                    at.append(rank)
                    upper.append([last])
                chain.append(lane)
                last = lane
            upper[node].append(last)
            chains.append((source, node, chain))
    lower: list[list[int]] = [[] for _ in places]
    for node, above in enumerate(upper):
        for each in above:
            lower[each].append(node)
    rows = _ordered(at, upper, lower)
    x = _placed(rows, places, upper, lower)
    left = min(centre - width / 2 for centre, width in zip(x, places, strict=True))
    right = max(centre + width / 2 for centre, width in zip(x, places, strict=True))
    centres = [
        (centre - left, rank * PITCH + PITCH / 2) for centre, rank in zip(x, at, strict=True)
    ]
    edges = [(a, b, [centres[lane] for lane in chain]) for a, b, chain in chains]
    return Layout(right - left, len(rows) * PITCH, centres[: len(widths)], edges)


def _ranks(reads: Sequence[Sequence[int]]) -> list[int]:
    """As far down as the longest path to the end leaves it; what ends early stays near its source."""
    ranks = [0] * len(reads)
    readers: list[list[int]] = [[] for _ in reads]
    for node, sources in enumerate(reads):
        ranks[node] = max((ranks[source] + 1 for source in sources), default=0)
        for source in sources:
            readers[source].append(node)
    ends = [not users for users in readers]
    for node in reversed(range(len(reads))):
        below = [ranks[user] for user in readers[node] if not ends[user] or len(reads[user]) > 1]
        if below:
            ranks[node] = min(below) - 1
    for node, sources in enumerate(reads):
        if ends[node] and sources:
            ranks[node] = max(ranks[source] for source in sources) + 1
    first = min(ranks)
    return [rank - first for rank in ranks]


def _ordered(
    at: Sequence[int], upper: Sequence[Sequence[int]], lower: Sequence[Sequence[int]]
) -> list[list[int]]:
    """The nodes of each rank from left to right, with as few crossings as sweeps find."""
    rows: list[list[int]] = [[] for _ in range(max(at) + 1)]
    for node, rank in enumerate(at):
        rows[rank].append(node)
    best, fewest = [list(row) for row in rows], None
    position = {node: float(i) for row in rows for i, node in enumerate(row)}
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for row in rows[1:] if down else rows[-2::-1]:
            near = upper if down else lower
            middle = {
                node: sum(position[n] for n in near[node]) / len(near[node])
                if near[node]
                else position[node]
                for node in row
            }
            row.sort(key=lambda node: (middle[node], position[node]))
            position.update((node, float(i)) for i, node in enumerate(row))
        crossings = sum(_crossings(row, lower, position) for row in rows)
        if fewest is None or crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _crossings(
    row: Sequence[int], lower: Sequence[Sequence[int]], position: dict[int, float]
) -> int:
    ends = [end for node in row for end in sorted(position[n] for n in lower[node])]
    return sum(a > b for i, a in enumerate(ends) for b in ends[i + 1 :])


def _placed(
    rows: Sequence[Sequence[int]],
    widths: Sequence[float],
    upper: Sequence[Sequence[int]],
    lower: Sequence[Sequence[int]],
) -> list[float]:
    """Centres: near the mean of the neighbours, without overlap."""
    x = [0.0] * len(widths)
    for row in rows:
        _spread(row, [0.0] * len(row), widths, x)
    for sweep in range(2 * SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            near = upper if down else lower
            if sweep >= 2 * SWEEPS - 2:
                wanted = [_mean([x[n] for n in (*upper[v], *lower[v])], x[v]) for v in row]
            else:
                wanted = [_mean([x[n] for n in near[v]], x[v]) for v in row]
            _spread(row, wanted, widths, x)
    return x


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _spread(
    row: Sequence[int], wanted: Sequence[float], widths: Sequence[float], x: list[float]
) -> None:
    """The places nearest to the wanted ones, in the least squares, that keep order and gaps.

    Isotonic regression by pooling neighbours that are too near.
    """
    offsets, total = [], 0.0
    for before, node in zip([None, *row], row, strict=False):
        if before is not None:
            total += (widths[before] + widths[node]) / 2 + GAP
        offsets.append(total)
    pools: list[tuple[float, int]] = []  # mean of wanted minus offset, how many
    for want, offset in zip(wanted, offsets, strict=True):
        mean, count = want - offset, 1
        while pools and pools[-1][0] > mean:
            above, more = pools.pop()
            mean = (mean * count + above * more) / (count + more)
            count += more
        pools.append((mean, count))
    found = [mean for mean, count in pools for _ in range(count)]
    for node, mean, offset in zip(row, found, offsets, strict=True):
        x[node] = mean + offset
