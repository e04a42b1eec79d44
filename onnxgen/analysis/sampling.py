"""Reading a value by running what makes it: masks, rotary tables, positions.

    sampler = Sampler(graph, roles, runtime)
    for shape, array in sampler.samples(mask, shapes): ...

Only for values that follow from the graph's inputs without the model's layers in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxgen.analysis.edges import edges_among
from onnxgen.analysis.evaluate import Array, CutError, cut, sorted_nodes
from onnxgen.analysis.feeds import RunShape, input_sizes, make_feeds, nearest_shape
from onnxgen.analysis.reads import reads_of
from onnxgen.analysis.roles import Roles
from onnxgen.analysis.shapes import Shapes
from onnxgen.analysis.symbols import evaluate
from onnxgen.runtime import Runtime, RuntimeFailure

# Enough to tell two lanes of a table apart: several positions, past ones, a padded row.
TABLE_SHAPES = (
    RunShape(batch=2, new=5, past=7, padding="left"),
    RunShape(batch=1, new=2, past=300),
    RunShape(batch=2, new=4),
)

LONGEST = 1 << 17
"""A switch at more tokens (T) is not run."""

FAR = (20_000, 70_000, 130_000)
MOST_ELEMENTS = 1 << 27
MOST_SAMPLED = 1 << 29  # bytes of all samples of a value
MOST_EDGES = 12


class Sampler:
    """Computes values for chosen lengths, as a user would feed the model; remembers them."""

    def __init__(self, graph: ir.Graph, roles: Roles, runtime: Runtime) -> None:
        self.roles = roles
        self._graph = graph
        self._runtime = runtime
        self._known: dict[tuple[ir.Value, tuple[RunShape, ...]], list[tuple[RunShape, Array]]] = {}

    def samples(
        self, value: ir.Value, shapes: Sequence[RunShape] = TABLE_SHAPES
    ) -> list[tuple[RunShape, Array]]:
        """The value's arrays in those of the shapes that the model takes; none where it fails.

        Raises:
            CutError: the value cannot be computed from the inputs alone.
        """
        key = (value, tuple(shapes))
        if key not in self._known:
            self._known[key] = self._run(value, shapes)
        return self._known[key]

    def further(self, value: ir.Value) -> tuple[RunShape, ...] | str:
        """Runs on both sides of every length that the value may switch at, as far as the model
        goes; the reason as text where it goes further than what can be run.
        """
        edges = edges_among(reads_of(value).nodes)
        if len(edges) > MOST_EDGES:
            return f"it may switch at {len(edges)} lengths"
        shapes: list[RunShape] = []
        for edge in edges:
            wanted = [RunShape(1, edge + 3)]
            if self.roles.pairs:
                pasts = [(6, max(edge - 3, 0)), (3, edge + 7), (2, 2 * edge - 1)]
                if (edge + 8) ** 2 <= MOST_ELEMENTS:  # it may be a number of new tokens
                    pasts += [(edge + 3, 0), (edge + 3, 5)]
                wanted = [RunShape(1, new, past) for new, past in pasts]
            found = (nearest_shape(self.roles, each) for each in wanted)
            shapes += [shape for shape in found if shape is not None]
        if shapes and self._too_large(value, shapes):
            return (
                f"it may switch at {', '.join(map(str, edges))} tokens, which is more than is run"
            )
        return tuple(dict.fromkeys(shapes))

    def far(self, value: ir.Value) -> tuple[RunShape, ...]:
        """Runs over long pasts, as long as the value can be run for: limits may be spelled so that
        no number of the graph shows them.
        """
        if not self.roles.pairs:
            return ()
        wanted = (nearest_shape(self.roles, RunShape(1, 3, past)) for past in FAR)
        shapes = [shape for shape in wanted if shape is not None and shape.total > 1]
        return tuple(dict.fromkeys(s for s in shapes if not self._too_large(value, [s])))

    def _too_large(self, value: ir.Value, shapes: Sequence[RunShape]) -> bool:
        """Whether something that the value is computed from is too large to be run for one of the
        shapes; what is of no known size is taken for a square of all tokens.
        """
        if max(shape.total for shape in shapes) > 2 * LONGEST:
            return True
        shapes = [shape for shape in shapes if shape.total**2 > MOST_ELEMENTS]
        if not shapes:
            return False
        known, nodes = Shapes(self._graph), sorted_nodes(reads_of(value).nodes)
        for node in nodes:  # in a graph that is being rewritten they may stand anywhere
            if any(known.of(output) is None for output in node.outputs):
                known.infer(node)
        read = dict.fromkeys(v for node in nodes for v in (*node.inputs, *node.outputs))
        for shape in shapes:
            sizes = input_sizes(self.roles, shape)
            for each in read:
                if each is None or each.const_value is not None:
                    continue
                dims = known.of(each)
                numbers = None if dims is None else [evaluate(dim, sizes) for dim in dims]
                if numbers is None or None in numbers:
                    return True
                if math.prod(number or 0 for number in numbers) > MOST_ELEMENTS:
                    return True
        return False

    def along(self, value: ir.Value, positions: str, length: int) -> list[Array]:
        """The value for positions 0 to length-1 of one row; none where that cannot be run.

        Only the positions are fed: lengths that an export fixes elsewhere do not matter.
        """
        given = next(each for each in self._graph.inputs if each.name == positions)
        dims = self.roles.inputs[positions].axes
        feed = np.arange(length, dtype=given.dtype.numpy() if given.dtype else np.int64)
        try:
            part = cut([given], [value], self._graph.opset_imports)
            session = self._runtime.load(part.SerializeToString())
        except (CutError, RuntimeFailure):
            return []
        try:
            feeds = {positions: feed.reshape((1,) * (len(dims) - 1) + (length,))}
            return [self._runtime.run(session, feeds)[value.name or ""]]
        except RuntimeFailure:
            return []
        finally:
            self._runtime.unload(session)

    def _run(self, value: ir.Value, shapes: Sequence[RunShape]) -> list[tuple[RunShape, Array]]:
        inputs = [each for each in self._graph.inputs if each.name in self.roles.inputs]
        part = cut(inputs, [value], self._graph.opset_imports)
        names = [each.name for each in part.graph.input]
        try:
            session = self._runtime.load(part.SerializeToString())
        except RuntimeFailure as error:
            raise CutError(f"ONNX Runtime refuses it: {error}") from error
        found: list[tuple[RunShape, Array]] = []
        left = MOST_SAMPLED
        for seed, wanted in enumerate(shapes):
            shape = nearest_shape(self.roles, wanted)
            if shape is None or any(shape == known for known, _ in found):
                continue
            feeds = make_feeds(self.roles, shape, np.random.default_rng(seed), names=names)
            try:
                sample = self._runtime.run(session, feeds, most=left)[value.name or ""]
            except RuntimeFailure:
                continue  # a length that the export itself does not take
            left -= sample.nbytes
            found.append((shape, sample))
        self._runtime.unload(session)
        return found
