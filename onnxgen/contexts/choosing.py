"""Which blob runs each region here, and why not another.

    chooser = Chooser(opened, held, prefer=["openvino:CPU"], trust=None)
    for region in held.table.regions:
        choice = chooser.choose(region)
        choice.context, choice.passed          # None: the nodes themselves

What costs least is asked first; the hashes of gigabytes last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from onnxgen.backends.interface import BackendError, Loaded
from onnxgen.backends.registry import find
from onnxgen.contexts.blobs import LARGEST, BlobError, read_blob
from onnxgen.contexts.canonical import subgraph_sha256
from onnxgen.contexts.cutting import cut_out, reads_of
from onnxgen.contexts.forms import Held
from onnxgen.contexts.trust import Given, trusted
from onnxgen.contexts.types import as_text
from onnxgen.contexts.values import Context, Region
from onnxgen.contexts.weights import Weights
from onnxgen.errors import RefusedError, UsageError
from onnxgen.reading import Opened


@dataclass(frozen=True)
class Passed:
    """A context that is not used, and why, as a clause."""

    context: Context
    reason: str


@dataclass(frozen=True, repr=False)
class Choice:
    """What runs a region: a context, or None for its nodes; and contexts that were passed over."""

    region: Region
    context: Context | None
    passed: tuple[Passed, ...]

    def __repr__(self) -> str:
        by = self.context.backend if self.context is not None else "its nodes"
        others = "".join(f"; not by {each.context.backend}: {each.reason}" for each in self.passed)
        return f"<region '{self.region.name}' is run by {by}{others}>"


class Chooser:
    """Asks of each context whether it can be used here.

    Args:
        prefer: backends that may run something, the best first; None for all, as the file has them.
        trust: blobs that may be used beside this user's own; see `contexts.trust`.
        largest: bytes of a blob, at most.

    Raises:
        FileError, UsageError: as of `trust.trusted`.
    """

    def __init__(
        self,
        opened: Opened,
        held: Held,
        prefer: Sequence[str] | None = None,
        trust: Given | None = None,
        largest: int = LARGEST,
    ) -> None:
        self._opened = opened
        self._held = held
        self._prefer = prefer
        self._trusted = trusted(trust)
        self._largest = largest
        self._weights = Weights(opened)
        self._loaded: dict[tuple[str, str], Loaded | str] = {}
        self._barred: dict[tuple[str, str], str] = {}
        self._stale: dict[str, str] = {}

    @property
    def weights(self) -> Weights:
        """The model's initializers."""
        return self._weights

    def choose(self, region: Region) -> Choice:
        """The first context that nothing speaks against."""
        passed: list[Passed] = []
        for context in self._candidates(region):
            reason = self.objection(region, context)
            if not reason:
                return Choice(region, context, tuple(passed))
            passed.append(Passed(context, reason))
        return Choice(region, None, tuple(passed))

    def loaded(self, context: Context) -> Loaded:
        """What was made of a context's blob, once for all regions that share it.

        Raises:
            BackendError: it could not be read.
        """
        found = self._load(context)
        if isinstance(found, str):
            raise BackendError(found)
        return found

    def bar(self, region: Region, context: Context, reason: str) -> None:
        """Do not use a context for a region any more: it failed there."""
        self._barred[region.name, context.backend] = reason

    def unbar(self, region: Region, context: Context) -> None:
        """It was not its fault."""
        self._barred.pop((region.name, context.backend), None)

    def _candidates(self, region: Region) -> Iterator[Context]:
        if self._prefer is None:
            yield from region.contexts
            return
        for name in self._prefer:
            yield from (each for each in region.contexts if each.backend == name)

    def objection(self, region: Region, context: Context) -> str:
        """Why a context cannot be used for a region; "" where it can."""
        if barred := self._barred.get((region.name, context.backend)):
            return barred
        if context.blob.sha256 not in self._trusted:
            return f"its blob {context.blob.sha256[:12]}… is not trusted (see --trust, trust=)"
        if context.blob.size > self._largest:
            return f"its blob has {context.blob.size} bytes, more than {self._largest}"
        try:
            backend, device = find(context.backend)
            refused: str = backend.refuses(context.identity, device)
        except (BackendError, UsageError) as error:
            return str(error)
        except Exception as error:  # a backend of somebody else's may raise anything
            return f"it failed to say what is here: {type(error).__name__}: {error}"
        if refused:
            return refused
        if stale := self._is_stale(region):
            return stale
        found = self._load(context)
        return found if isinstance(found, str) else ""

    def _is_stale(self, region: Region) -> str:
        """Why what was compiled is not what stands in the graph now."""
        if region.name not in self._stale:
            try:
                self._stale[region.name] = self._find_stale(region)
            except Exception as error:  # a file may say anything of its values
                cause = " ".join(f"{type(error).__name__}: {error}".split())
                self._stale[region.name] = f"it cannot be seen whether it has changed: {cause}"
        return self._stale[region.name]

    def _find_stale(self, region: Region) -> str:
        for name, kind in zip(region.inputs, region.input_types, strict=True):
            declared = self._declared.get(name, kind)
            if declared != kind:
                return f"its input '{name}' was {kind} and is {declared}"
        if changed := self._edge(region):
            return changed
        try:
            found = subgraph_sha256(cut_out(self._opened.proto, region))
        except (RefusedError, KeyError, ValueError) as error:
            return f"its nodes have changed: {error}"
        if found != region.subgraph:
            return "its nodes have changed: the sha256 of the subgraph differs"
        if self._weights.sha256(region.weights) != region.weights_sha256:
            return "its weights have changed: their sha256 differs"
        return ""

    def _edge(self, region: Region) -> str:
        """What passes between a region and the rest of the graph, where it is not as the table says."""
        readers, makers, fed = self._flow
        inside = set(region.nodes)
        for position in region.nodes:
            for name in set(self._opened.proto.graph.node[position].output) - set(region.outputs):
                if name and not readers.get(name, set()) <= inside:
                    return f"'{name}', which is made within it, is read from elsewhere now"
        for name in region.inputs:
            if name not in fed and name not in makers:
                return f"its input '{name}' is not computed any more"
        given = next((name for name in region.weights if name in fed), None)
        return f"its weight '{given}' may be fed now" if given is not None else ""

    @cached_property
    def _flow(self) -> tuple[dict[str, set[int]], set[str], set[str]]:
        """Which nodes read a value, -1 for who runs the model; what nodes make; what is fed."""
        graph = self._opened.proto.graph
        readers = {each.name: {-1} for each in graph.output}
        for position, node in enumerate(graph.node):
            for name in reads_of(node):
                readers.setdefault(name, set()).add(position)
        makers = {name for node in graph.node for name in node.output}
        return readers, makers, {each.name for each in graph.input}

    @cached_property
    def _declared(self) -> dict[str, str]:
        return {each.name: as_text(each) for each in self._opened.proto.graph.input}

    def _load(self, context: Context) -> Loaded | str:
        key = (context.backend, context.blob.sha256)
        if key not in self._loaded:
            try:
                data = read_blob(self._opened, self._held, context.blob, self._largest)
                backend, device = find(context.backend)
                self._loaded[key] = backend.load(data, context.form, device)
            except (BlobError, BackendError) as error:
                self._loaded[key] = str(error)
            except Exception as error:  # a backend of somebody else's may raise anything
                self._loaded[key] = f"it failed to load: {type(error).__name__}: {error}"
        return self._loaded[key]
