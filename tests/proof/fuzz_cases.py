"""A case of fuzzing: the files that are written, and the command that is run on them.

case = make_case("cycles", 17, seed=0)
case.files["in.onnx"], case.words
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnx import ModelProto

from tests.proof import fuzz_bodies, fuzz_bytes, fuzz_damage, fuzz_graphs, fuzz_naming
from tests.proof.fuzz_seeds import Draw

_MODULES = (fuzz_bytes, fuzz_damage, fuzz_naming, fuzz_graphs, fuzz_bodies)
_NAMES = [
    "truncated",
    "flipped",
    "garbage",
    "nested",
    "fields",
    "cycles",
    "types",
    "disagreeing",
    "constants",
    "axes",
    "attributes",
    "wiring",
    "names",
    "duplicates",
    "domains",
    "opsets",
    "metadata",
    "surroundings",
    "external",
    "huge",
    "zeros",
    "narrow",
    "functions",
    "ends",
    "subgraphs",
    "containers",
    "skeletons",
]
KINDS: dict[str, Callable[[Draw], bytes | ModelProto]] = {
    name: next(getattr(module, name) for module in _MODULES if hasattr(module, name))
    for name in _NAMES
}
"""What makes a damaged model, by name; its docstring says what the damage is."""


@dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        kind, number, seed: what everything else follows from.
        files: contents by name; "in.onnx" is the damaged model.
        words: of the command, after `onnxgen`.
        own_worker: whether ONNX Runtime is started as users start it, not forked.
    """

    kind: str
    number: int
    seed: int
    files: dict[str, bytes]
    words: tuple[str, ...]
    own_worker: bool

    @property
    def again(self) -> str:
        """The command that runs this case again."""
        seed = f" --seed {self.seed}" if self.seed else ""
        return f"python -m tests.proof.fuzz {self.kind} {self.number}{seed}"


def make_case(kind: str, number: int, seed: int = 0) -> Case:
    """The case of that kind and number: the same on every machine."""
    draw = Draw(f"{seed}/{kind}/{number}")
    words, pair = _command(draw)
    damaged = KINDS[kind](draw)
    data = damaged if isinstance(damaged, bytes) else damaged.SerializeToString()
    files = {"in.onnx": data, **draw.files}
    if pair:
        files["other.onnx"] = data if draw.random() < 0.5 else draw.model().SerializeToString()
    return Case(kind, number, seed, files, tuple(words), draw.random() < 0.02)


def _command(draw: Draw) -> tuple[list[str], bool]:
    """Words of a command, and whether it takes a second model."""
    pick = draw.random()
    fewer = ["--no-verify"] if draw.random() < 0.7 else []
    if pick < 0.12:
        return ["verify", *draw.sample(["in.onnx", "other.onnx"], 2), *_report(draw)], True
    if pick < 0.32:
        words = ["to-paged", "in.onnx", "-o", "out", *fewer, "--flavor"]
        words.append(draw.choice(("portable", "ort")))
        extra = (["--check"], ["--inline"], ["--slot-mapping"], ["--logits", "last"], [], [], [])
        return [*words, *draw.choice(extra), *_report(draw)], False
    words = [
        "fuse",
        "in.onnx",
        "-o",
        "out.onnx",
        *fewer,
        "--target",
        draw.choice(("onnx", "onnx", "ort")),
    ]
    extra = (
        ["--inline"],
        ["--genai-config"],
        ["--opset", "23"],
        ["--opset", "24"],
        ["--opset", "21"],
    )
    words += draw.choice((*extra, [], [], [], [], []))
    return [*words, *_report(draw)], False


def _report(draw: Draw) -> list[str]:
    return draw.choice(([], [], ["--json"], ["--report", "report.json"]))
