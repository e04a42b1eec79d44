"""What a model holds for backends, and what would run it here, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field

from onnxgen.report.values import Proof


@dataclass(frozen=True)
class Held:
    """One compiled object of one region.

    Attributes:
        region: the place.
        backend: `name:device`.
        source, version, device, driver, compatibility: who compiled it, for what.
        form: the kind of bytes, the backend's own word.
        blob: sha256 of its bytes.
        bytes: how many.
        given, inside: weights that it is given when it is loaded, and those inside of it.
        inside_bytes: of the latter; 0 for constants of a few bytes.
        picked: whether it runs the region here; None where nobody asked.
        reason: why it does not.
    """

    region: str
    backend: str
    source: str
    version: str
    device: str
    driver: str
    compatibility: str
    form: str
    blob: str
    bytes: int
    given: int
    inside: int
    inside_bytes: int
    picked: bool | None = None
    reason: str = ""


@dataclass(frozen=True)
class Place:
    """One region.

    Attributes:
        name: its name.
        nodes: of the original graph.
        inputs, weights, outputs: how many.
        subgraph, weights_sha256: hashes.
        alike: how many regions before it are the same but for their weights.
    """

    name: str
    nodes: int
    inputs: int
    weights: int
    outputs: int
    subgraph: str
    weights_sha256: str
    alike: int


@dataclass
class Contexts:
    """What a command of `onnxgen context` saw or did.

    Attributes:
        input, output: paths; output "" where nothing was written.
        encoding: "function" or "metadata"; "" for a model that holds nothing.
        places: the regions.
        held: what is compiled, region by region.
        bytes_before, bytes_after: of the model, its data and its blobs; after 0 where none was
            written.
        proofs: by backend, that the model run by it computes what the original does.
        dropped: backends whose objects were taken out.
        warnings: one sentence each.
        seconds: by stage.
    """

    input: str
    output: str = ""
    encoding: str = ""
    places: list[Place] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    proofs: dict[str, Proof] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
