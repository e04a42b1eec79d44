"""What a model holds for backends, as values; how a file spells it is `contexts.forms`' concern."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from onnxgen.backends.interface import Identity

DOMAIN = "onnxgen.backend"  # of the functions that hold regions and blobs
VERSION = 1  # of the format, see docs/contexts.md


@dataclass(frozen=True)
class Blob:
    """What a backend compiled: known by its content.

    Attributes:
        sha256: of the bytes, in hexadecimal; its name in the file too.
        size: bytes.
    """

    sha256: str
    size: int


@dataclass(frozen=True)
class Context:
    """One compiled object for one region and one backend.

    Attributes:
        backend: `name:device`, "openvino:CPU".
        identity: who compiled it, for what.
        blob: which bytes.
        form: the kind of bytes, the backend's own word.
        parameters: positions of the region's weights that are given to it, not inside of it.
    """

    backend: str
    identity: Identity
    blob: Blob
    form: str
    parameters: tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """A part of the graph that backends have compiled; its nodes stay in the model.

    Attributes:
        name: of the place, unique in the model.
        nodes: positions in the original graph's list of nodes, ascending.
        inputs, weights, outputs: names of values of the original graph: what comes in from nodes
            and graph inputs, initializers, and what others read.
        input_types, output_types: what it was compiled for, in the words of `contexts.types`.
        subgraph: sha256 of the canonical form, see `contexts.canonical`.
        weights_sha256: of the contents of all weights.
        contexts: in the order in which they were added.
    """

    name: str
    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]
    input_types: tuple[str, ...]
    output_types: tuple[str, ...]
    subgraph: str
    weights_sha256: str
    contexts: tuple[Context, ...] = ()

    def without(self, backend: str | None) -> Region:
        """Without what one backend compiled; None: every backend."""
        kept = () if backend is None else tuple(c for c in self.contexts if c.backend != backend)
        return replace(self, contexts=kept)


@dataclass
class Table:
    """Everything that a model holds for backends.

    Attributes:
        regions: in the order of their first nodes.
        types: of values that nodes and regions share, where the graph does not declare them; in the
            words of `contexts.types`.
    """

    regions: list[Region] = field(default_factory=list)
    types: dict[str, str] = field(default_factory=dict)

    @property
    def backends(self) -> list[str]:
        """Every backend that compiled something, each once, in the order of the file."""
        return list(dict.fromkeys(c.backend for region in self.regions for c in region.contexts))
