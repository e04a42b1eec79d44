"""The table of exports that backends run: each by each backend, and wherever a blob cannot be used.

    python -m tests.contexts_table                         # measure everything, print the table
    python -m tests.contexts_table --only 'llama/*'        # some exports
    python -m tests.contexts_table --write                 # tests/corpus/CONTEXTS.md

Each stored export goes through `onnxgen context add` as a user would run it, and what comes out is
loaded as a user would load it. CI measures some rows again, `tests/test_contexts_table.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime as ort

import onnxgen
from onnxgen import testing
from onnxgen.bounds import Bounds
from onnxgen.contexts.forms import decode
from onnxgen.errors import OnnxgenError
from onnxgen.pipeline_contexts import AddOptions, add
from onnxgen.reading import open_model
from onnxgen.runtime import Picking, Runtime, RuntimeFailure
from tests import context_trials as trials
from tests.context_reference import Reference
from tests.context_trials import OPENVINO, Outcome

TABLE = Path(__file__).resolve().parent / "corpus" / "CONTEXTS.md"
ORT = "ort:cpu"
HEADER = (
    "model",
    "form",
    "kB",
    "plain ORT",
    "OpenVINO",
    "ORT blob",
    "damaged",
    "damaged, believed",
    "other version",
    "other machine",
    "no package",
    "other weight",
    "not trusted",
    "attention",
)
TITLE = """\
# Exports with backend contexts

Every stored export, given by `onnxgen context add` to `openvino:CPU` and to `ort:cpu` and proven
(`--verify full`), then loaded by `onnxgen.load`. Written by `python -m tests.contexts_table --write`;
CI fails where less comes out than here. A cell says which backend ran the model, "original" where
ONNX Runtime ran the nodes themselves, and the largest difference to the original file run by ONNX
Runtime over prefill, padded batches, several tokens and one over a past: in standard deviations of
the original's output, of which 1e-4 is allowed, 1e-2 in fp16.

- kB: the original, OpenVINO's blob, ONNX Runtime's; the file with both is at most 1 % more.
- plain ORT: ONNX Runtime itself opens the file with both.
- OpenVINO, ORT blob: the loader is told to prefer that backend.
- damaged: 16 bytes of OpenVINO's blob are flipped; believed: and the table's hash is that of the
  damaged bytes, and the user trusts it, as nobody would. "refused": OpenVINO's own reader finds it.
  "taken": it does not, and may differ or crash, which is why a blob must be trusted.
- other version, other machine: what the table says of version, or of compatibility, is not so here.
- no package: `openvino` cannot be imported.
- other weight: the largest weight of the region was changed in the file; the difference is to the
  original with that weight changed.
- not trusted: the user who loads it did not add it.
- attention: only attention, one region for each layer, in the metadata form: regions, the largest
  difference by OpenVINO and by the ORT blob."""
REASONS = {
    "damaged": "is damaged: the sha256 differs",
    "version": "it was compiled by OpenVINO 2019.1.0",
    "machine": "it was compiled for 'another machine'",
    "package": "is not installed",
    "weight": "its weights have changed",
    "trust": "is not trusted",
}
_MUCH = 1e-2
Missing = Callable[[Path, Sequence[Mapping[str, Any]]], Outcome]


@dataclass(frozen=True)
class Row:
    """One export's line, as the texts of its cells, in the order of `HEADER`."""

    model: str
    form: str
    size: str = "-"
    plain: str = "-"
    openvino: str = "-"
    ort: str = "-"
    damaged: str = "-"
    believed: str = "-"
    version: str = "-"
    machine: str = "-"
    package: str = "-"
    weight: str = "-"
    trust: str = "-"
    attention: str = "-"

    @property
    def name(self) -> str:
        return f"{self.model}/{self.form}"


class _Measuring:
    """One export in a folder of its own."""

    def __init__(self, folder: Path, entry: testing.CorpusEntry, missing: Missing) -> None:
        self.folder = folder
        self.missing = missing
        self.original = folder / "model.onnx"
        self.original.write_bytes(entry.load().SerializeToString())
        self.reference = Reference.of(self.original)

    def row(self, row: Row) -> Row:
        if not self.reference.feeds:
            return replace(row, plain="ONNX Runtime cannot run the original")
        path, refused = self._added()
        texts = {name: refused.get(backend, "") for name, backend in _BACKENDS.items()}
        if path is None:
            return replace(row, **texts)
        row = replace(row, size=self._size(path), plain=self._plain(path))
        for name, backend in _BACKENDS.items():
            texts[name] = texts[name] or self._cell(path, backend)
        row = replace(row, **texts)
        if self.reference.twins or OPENVINO in refused:
            return replace(row, attention=self._attention())
        return replace(row, **self._fallbacks(path), attention=self._attention())

    def _added(self) -> tuple[Path | None, dict[str, str]]:
        """The model with what both backends made, or one; and why another made nothing."""
        path, refused = self.folder / "added.onnx", {}
        source = self.original
        for backend in _BACKENDS.values():
            try:
                add(
                    source,
                    AddOptions((backend,), path, "all", "function", force=True),
                    lambda _: None,
                )
                source = path
            except OnnxgenError as error:
                refused[backend] = _short(str(error), self.folder)
        return (source if source == path else None), refused

    def _size(self, path: Path) -> str:
        """The original and each blob; and what else there is, where that is more than 1 %."""
        held = decode(open_model(path).proto)
        blobs = {c.backend: c.blob.size for region in held.table.regions for c in region.contexts}
        parts = [self.original.stat().st_size, *(blobs.get(each, 0) for each in _BACKENDS.values())]
        more = path.stat().st_size / sum(parts) - 1
        return " + ".join(map(_kilobytes, parts)) + (f", and {more:.1%}" if more > 0.01 else "")

    def _plain(self, path: Path) -> str:
        if self.reference.twins:
            return "no kernels for " + ", ".join(sorted(each.name for each in self.reference.twins))
        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_outputs()]
        found = [dict(zip(names, session.run(None, x), strict=True)) for x in self.reference.feeds]
        return _digits(self.reference.worst(found))

    def _cell(self, path: Path, backend: str) -> str:
        return self._said(trials.loaded(path, [backend], self.reference.feeds))

    def _said(
        self, outcome: Outcome, reason: str | None = None, reference: Reference | None = None
    ) -> str:
        """Which backend, how far off; and why, where that is not the reason there should be."""
        found = (reference or self.reference).worst(outcome.outputs)
        text = f"{' and '.join(outcome.picked)} {_digits(found)}"
        reasons = "; ".join(outcome.reasons)
        good = not reasons if reason is None else reason in reasons
        return text if good else f"{text} ({_short(reasons, self.folder) or 'for no reason'})"

    def _fallbacks(self, path: Path) -> dict[str, str]:
        found: dict[str, str] = {}
        other = self.folder / "other.onnx"
        feeds = self.reference.feeds
        for name, change in (
            ("damaged", trials.damaged),
            ("version", trials.of_another_version),
            ("machine", trials.for_another_machine),
        ):
            change(path, other)
            found[name] = self._said(trials.loaded(other, [OPENVINO], feeds), REASONS[name])
        found["believed"] = self._believed(other, trials.rehashed(path, other))
        found["package"] = self._said(self.missing(path, feeds), REASONS["package"])
        with trials.not_trusted(self.folder):
            found["trust"] = self._said(trials.loaded(path, [OPENVINO], feeds), REASONS["trust"])
        changed = self.folder / "changed.onnx"
        if trials.reweighted(path, self.original, other, changed):
            reference = Reference.of(changed)
            if self.reference.outputs and not self.reference.worst(reference.outputs) > _MUCH:
                found["weight"] = "the change changes nothing"
            else:
                outcome = trials.loaded(other, [OPENVINO], reference.feeds)
                found["weight"] = self._said(outcome, REASONS["weight"], reference)
        return found

    def _believed(self, path: Path, sha256: str) -> str:
        """A blob that is not what was compiled, and is trusted: it may do anything, to a child."""
        with Runtime(bounds=Bounds(timeout=60)) as runtime:
            try:
                session = runtime.load(path, picking=Picking(OPENVINO, (sha256,)))
                found = [runtime.run(session, feed) for feed in self.reference.feeds]
            except RuntimeFailure as error:
                if "openvino:CPU does not run region" not in str(error):
                    return _short(str(error), self.folder)
            else:
                difference = self.reference.worst(found)
                return f"taken, {'differs ' if difference > _MUCH else ''}{_digits(difference)}"
        session = onnxgen.load(path, prefer=[OPENVINO], trust=[sha256])
        names = [each.name for each in session.get_outputs()]
        runs = [dict(zip(names, session.run(None, x), strict=True)) for x in self.reference.feeds]
        picked = " and ".join(dict.fromkeys(session.picked.values()))
        return f"refused, {picked} {_digits(self.reference.worst(runs))}"

    def _attention(self) -> str:
        path = self.folder / "attention.onnx"
        backends = tuple(_BACKENDS.values())
        options = AddOptions(backends, path, "attention", "metadata", force=True)
        try:
            count = len(add(self.original, options, lambda _: None).places)
        except OnnxgenError as error:
            return _short(str(error), self.folder)
        cells = [self._cell(path, backend) for backend in backends]
        plain = zip(cells, backends, strict=True)
        return f"{count}: " + ", ".join(cell.removeprefix(f"{name} ") for cell, name in plain)


_BACKENDS = {"openvino": OPENVINO, "ort": ORT}


def measure(entry: testing.CorpusEntry, missing: Missing) -> Row:
    """Try one stored export in every way."""
    with tempfile.TemporaryDirectory(prefix="onnxgen-") as folder:
        return _Measuring(Path(folder), entry, missing).row(Row(entry.model, entry.form))


def _short(text: str, folder: Path) -> str:
    """A reason without the file's name, on one line, without what would end a cell."""
    text = text.removeprefix(f"{folder}/model.onnx: ").removeprefix(f"{folder}/added.onnx: ")
    return " ".join(text.replace(f"{folder}/", "").replace("|", "/").split())[:200]


def _digits(difference: float) -> str:
    return "0" if difference == 0 else f"{difference:.1e}"


def _kilobytes(size: int) -> str:
    return f"{round(size / 1000):,}"


def worse(row: Row, before: Row | None) -> list[str]:
    """How a row says less than before, a sentence each."""
    if before is None:
        return [f"{row.name} has no row in {TABLE.name}: write it"]
    said = []
    for name in ("plain", "openvino", "ort", *REASONS, "attention"):
        now, then = getattr(row, name), getattr(before, name)
        if _what(now) != _what(then):
            said.append(f"{name}: {now}, was {then}")
    return said


def _what(cell: str) -> list[str]:
    """A cell without the digits of differences that are as good as each other."""
    words = cell.replace(",", "").split()
    return [
        "ok" if _number(word) <= _MUCH and ("e" in word or word == "0") else word for word in words
    ]


def _number(word: str) -> float:
    with contextlib.suppress(ValueError):
        return float(word)
    return float("inf")


def as_text(rows: Iterable[Row]) -> str:
    rows = sorted(rows, key=lambda row: row.name)
    lines = [" | ".join(HEADER), " | ".join("---" for _ in HEADER)]
    lines += [" | ".join(astuple(row)) for row in rows]
    table = "\n".join(f"| {line} |" for line in lines)
    runs = Counter(name for row in rows for name in _BACKENDS if _is_run(row, name))
    said = f"OpenVINO runs {runs['openvino']} of {len(rows)}, an ORT blob {runs['ort']}."
    return f"{TITLE}\n\n{said}\n\n{table}\n"


def _is_run(row: Row, name: str) -> bool:
    backend, _, difference = getattr(row, name).partition(" ")
    return bool(backend == _BACKENDS[name] and _number(difference) <= _MUCH)


def read(text: str) -> Mapping[str, Row]:
    """The rows of a table, by name."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [Row(*(cell.strip() for cell in line.strip("|").split(" | "))) for line in lines[2:]]
    return {row.name: row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--only", default="*", metavar="GLOB")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows = dict(read(TABLE.read_text("utf-8"))) if TABLE.exists() else {}
    stored = {entry.name for entry in testing.corpus()}
    rows = {name: row for name, row in rows.items() if name in stored}
    with tempfile.TemporaryDirectory(prefix="onnxgen-") as folder:
        os.environ |= {"ONNXGEN_CONFIG": f"{folder}/config", "ONNXGEN_CACHE": f"{folder}/cache"}
        with trials.without_openvino() as missing:
            for entry in testing.corpus():
                if fnmatch.fnmatch(entry.name, options.only):
                    try:
                        row = measure(entry, missing)
                    except Exception as error:  # the other rows are worth having
                        row = Row(entry.model, entry.form, plain=f"{type(error).__name__}: {error}")
                    rows[entry.name] = row
                    print(" | ".join(astuple(row)), flush=True)
    if options.write:
        TABLE.write_text(as_text(rows.values()), "utf-8")


if __name__ == "__main__":
    main()
