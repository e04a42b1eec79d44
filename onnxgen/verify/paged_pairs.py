"""The original and what it was paged to, for each size of blocks, as far as the budget goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from onnxgen.analysis.roles import CachePair, InputRole, OutputRole, Roles, find_roles
from onnxgen.targets.paged import PagedModel
from onnxgen.verify.layers import shorten
from onnxgen.verify.opened import Source, read


@dataclass(frozen=True)
class PagedPairs:
    """What is compared with what.

    Attributes:
        originals, written, results: of each size of blocks: the original, where the paged model
            is, and what it is.
        roles: of the original.
        layers, layers_run: as in the report's proof.
    """

    originals: Sequence[Source]
    written: Sequence[Source]
    results: Sequence[PagedModel]
    roles: Roles
    layers: int = 0
    layers_run: int = 0

    def first(self) -> PagedPairs:
        """Those of the size of blocks that was asked for."""
        originals, written, results = self.originals[:1], self.written[:1], self.results[:1]
        return replace(self, originals=originals, written=written, results=results)

    def shortened(self) -> PagedPairs:
        """Cut down to one layer of each kind; see `onnxgen.verify.layers`."""
        originals: list[Source] = []
        written: list[Source] = []
        results = []
        layers = run = 0
        for original, path, result in zip(self.originals, self.written, self.results, strict=True):
            names = {
                own: theirs
                for pool in result.pools
                for own, theirs in ((pool.name, pool.past), (pool.output, pool.present))
            }
            short = shorten(original, path, self.roles, _roles_of(result), names)
            # One original for all sizes of blocks, where they are cut alike.
            same = bool(originals) and originals[0] == short.original
            originals.append(originals[0] if same else short.original)
            written.append(short.rewritten)
            there = {value.name for value in read(short.rewritten).graph.inputs}
            pools = tuple(pool for pool in result.pools if pool.name in there)
            results.append(replace(result, pools=pools))
            layers, run = short.layers, max(run, short.kept)
        model = read(originals[0])
        kept = {value.name for value in model.graph.inputs}
        given = {n: each.role for n, each in self.roles.inputs.items() if n in kept}
        return PagedPairs(originals, written, results, find_roles(model, given), layers, run)


def _roles_of(result: PagedModel) -> Roles:
    """What the inputs and outputs of a paged model are for."""
    inputs, outputs = {}, {}
    pools = {pool.name for pool in result.pools}
    for value in result.model.graph.inputs:
        name = str(value.name)
        tokens = "embeds" if name == "inputs_embeds" else "ids"
        role = "static_past" if name in pools else tokens if name == result.tokens else "unknown"
        dims = () if value.shape is None else tuple(value.shape)
        assert value.dtype is not None
        sizes = tuple(dim if isinstance(dim, int) else None for dim in dims)
        inputs[name] = InputRole(name, role, value.dtype, sizes, ("",) * len(sizes))
    rows = {name for _, name in result.rows}
    for value in result.model.graph.outputs:
        name = str(value.name)
        role = "rows" if name in rows else "present"
        outputs[name] = OutputRole(name, role, value.dtype, None)
    pairs = tuple(CachePair(pool.name, pool.output, 0, static=True) for pool in result.pools)
    return Roles(inputs, outputs, pairs)
