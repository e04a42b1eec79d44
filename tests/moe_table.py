"""The table of mixtures of experts: what is raised and lowered in every stored export that has them.

    python -m tests.moe_table                          # measure everything, print the table
    python -m tests.moe_table --only 'mixtral/*'       # some exports
    python -m tests.moe_table --write                  # tests/corpus/MOE.md
    python -m tests.moe_table --check                  # exit 1 where a row says less than the table

Each export goes through `onnxgen fuse` for both targets, and so does a copy of it whose routers find
all experts equal. Some exports are measured in CI, by `tests/test_moe_table.py`.

Shapes: B batch, S new tokens, T = B * S, E experts, k slots.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from onnxgen import functions, testing
from onnxgen.analysis.expert_routing import CHOOSING
from onnxgen.errors import OnnxgenError
from onnxgen.functions import moe
from onnxgen.pipeline import FuseOptions, fuse
from onnxgen.report.values import Report
from onnxgen.twin import twin_types, widen, widened
from tests.graphs import run

Array = np.ndarray[Any, Any]
TABLE = Path(__file__).resolve().parent / "corpus" / "MOE.md"
TARGETS = ("onnx", "ort")
HEADER = (
    *("model", "form", "fused", "slots", "activation", "router", "onnx", "ort"),
    *("nodes", "one token", "empty expert", "ties"),
)
TITLE = """\
# Mixtures of experts

Every stored export that has experts, for both targets. Written by
`python -m tests.moe_table --write`; CI measures some of the rows, and fails where one says less.

- *fused*: mixtures that became `onnxgen::MoE` / routers that the exported graph has, counted without
  asking any rule: products of the tokens that a TopK or ArgMax over experts follows from.
- *router*: where ORT004 took it: *inside* com.microsoft MoE, *outside* as ordinary operators before
  it; or why the mixture stays `onnxgen::MoE` for that target too.
- *onnx*, *ort*: the largest difference of the whole written model from the original, in standard
  deviations of the original's output. 1e-4 is allowed. Exports in float16 are compared as float32
  twins, as `onnxgen fuse` does it. *nodes*: before → after, for onnx / for ort.
- *one token*: both targets' differences at B = 1 and S = 1.
- *empty expert*: a run of several tokens that some experts of a layer get none of: how many, and both
  targets' differences.
- *ties*: the export with its routers' weights at zero and all their biases equal, so that a router
  finds all experts equal. That model is fused for both targets and proven: the experts that it chose,
  and both differences.

Of equal numbers ONNX's TopK and ArgMax take the lowest index, so the original chooses the first
experts. The CPU kernel of com.microsoft MoE takes the highest. With the router inside, it is given
experts and logits from the last to the first: its highest index is the original's lowest, and the
same experts are chosen. With the router outside, TopK itself has chosen, and the kernel gets the
weights as logits, -inf where an expert was not chosen: what it ties over weighs nothing. What stays
`onnxgen::MoE` is given TopK's indices."""


@dataclass(frozen=True)
class Row:
    """One export's line, as the texts of its cells, in the order of `HEADER`."""

    model: str
    form: str
    fused: str
    slots: str = "-"
    activation: str = "-"
    router: str = "-"
    onnx: str = "-"
    ort: str = "-"
    nodes: str = "-"
    one_token: str = "-"
    empty: str = "-"
    ties: str = "-"

    @property
    def name(self) -> str:
        return f"{self.model}/{self.form}"


@dataclass(frozen=True)
class Written:
    """A model as one target's `onnxgen fuse` wrote it; nothing where it wrote nothing."""

    report: Report
    model: onnx.ModelProto | None
    error: str = ""

    @property
    def difference(self) -> str:
        proof = self.report.proof
        if self.model is None or proof is None or proof.worst is None or proof.status != "proven":
            return self.error or "unproven"
        return f"{proof.worst.difference:.1e}"


def measure(entry: testing.CorpusEntry) -> Row:
    """Fuse one stored export for both targets, and once more with its experts tied."""
    model = entry.load()
    found = routers(model)
    written = {target: written_for(model, target) for target in TARGETS}
    sites = [site for site in written["onnx"].report.sites if site.kind == "moe"]
    fused = [site for site in sites if site.status == "fused"]
    slots = Counter(f"{s.details['slots']} of {s.details['experts']}" for s in fused)
    router = Counter(map(_router, written["ort"].report.lowered))
    nodes = {target: each.report.nodes_after for target, each in written.items()}
    before = written["onnx"].report.nodes_before
    models = [each.model for each in written.values() if each.model is not None]
    whole = len(models) == len(TARGETS) and fused
    return Row(
        entry.model,
        entry.form,
        f"{len(fused)}/{len(found)}",
        ", ".join(slots),
        ", ".join(dict.fromkeys(str(site.details["activation"]) for site in fused)),
        ", ".join(each for each in router if each),
        *(written[target].difference for target in TARGETS),
        f"{before:,} → {nodes['onnx']:,} / {nodes['ort']:,}",
        one_token(entry, model, models) if whole else "-",
        empty_expert(entry, model, models) if whole else "-",
        ties(entry, tied(model, found)) if whole else "-",
    )


def _router(site: Any) -> str:
    if site.kind != "experts":
        return ""
    if site.status == "fused":
        return str(site.details["router"])
    return f"kept: {site.decline.reason}" if site.decline else site.status


def written_for(model: onnx.ModelProto, target: str) -> Written:
    """Fuse a model as a user would."""
    with tempfile.TemporaryDirectory(prefix="onnxgen-") as folder:
        path, output = Path(folder) / "model.onnx", Path(folder) / "fused.onnx"
        onnx.save(model, path)
        try:
            report = fuse(path, FuseOptions(output=output, target=target), lambda message: None)
        except OnnxgenError as failure:
            left = getattr(failure, "report", None) or Report(input="", output="", target=target)
            return Written(left, None, f"declined: {failure}".replace(f"{path}: ", ""))
        return Written(report, onnx.load(output))


# --- runs ---------------------------------------------------------------------------------------


def one_token(
    entry: testing.CorpusEntry, before: onnx.ModelProto, after: Sequence[onnx.ModelProto]
) -> str:
    """Differences at B = 1, S = 1."""
    past = next((past for batch, new, past in entry.info["runs"] if batch * new == 1), 0)
    feeds = entry.feeds(1, 1, past)
    return _differences([differs(before, each, feeds)[0] for each in after])


def empty_expert(
    entry: testing.CorpusEntry, before: onnx.ModelProto, after: Sequence[onnx.ModelProto]
) -> str:
    """Differences of a run that leaves an expert without tokens, and how many it leaves so.

    Where no run of the export's own does, its tokens are all made the same one. ONNX Runtime's
    attention continues one sequence at a time, by several tokens.
    """
    runs = [each for each in entry.info["runs"] if each[0] == 1 or each[2] == 0]
    runs = sorted(runs, key=lambda each: each[0] * each[1], reverse=True)
    for alike in (False, True):
        for batch, new, past in runs:
            if batch * new < 2:
                continue
            feeds = entry.feeds(batch, new, past)
            if alike:
                ids = [n for n, each in entry.info["inputs"].items() if each["role"] == "ids"]
                feeds |= {name: np.full_like(feeds[name], 7) for name in ids}
            first, chosen = differs(before, after[0], feeds)
            most = max(experts - len(which) for which, experts in chosen)
            if most:
                rest = [differs(before, each, feeds)[0] for each in after[1:]]
                said = _differences([first, *rest])
                return f"{batch * new} tokens leave {most} of {chosen[0][1]}: {said}"
    return "none is left empty"


def ties(entry: testing.CorpusEntry, model: onnx.ModelProto) -> str:
    """The experts that are chosen of equal ones, and both targets' proofs."""
    written = [written_for(model, target) for target in TARGETS]
    fused = written[0].model
    said = " / ".join(each.difference for each in written)
    if fused is None:
        return said
    batch, new, past = entry.info["runs"][0]
    _, chosen = differs(model, fused, entry.feeds(batch, new, past))
    sets = {tuple(sorted(which)) for which, _ in chosen}
    return f"{' or '.join(' '.join(map(str, each)) for each in sorted(sets))}: {said}"


def _differences(numbers: Sequence[float]) -> str:
    return " / ".join(f"{number:.1e}" for number in numbers)


def differs(
    before: onnx.ModelProto, after: onnx.ModelProto, feeds: Mapping[str, Array]
) -> tuple[float, list[tuple[set[int], int]]]:
    """The largest difference of a run; the experts that each MoE of ours chose, and how many it has."""
    told = onnx.ModelProto()
    told.CopyFrom(after)
    calls = [n for n in told.graph.node if (n.domain, n.op_type) == (functions.DOMAIN, moe.NAME)]
    given = {value.name for value in told.graph.output}
    for node in calls:
        for name in {node.input[moe.INDICES] or node.input[moe.WEIGHTS]} - given:
            told.graph.output.append(helper.make_empty_tensor_value_info(name))
            given.add(name)
    types = twin_types(ir.from_proto(before)) | twin_types(ir.from_proto(after))
    fed = {name: widened(array, types) for name, array in feeds.items()}
    old, new = (run(_twin(each, types), fed) for each in (before, told))
    worst = max(_difference(old[name], new[name]) for name in old)
    sizes = {each.name: each.dims for each in told.graph.initializer}
    chosen = []
    for node in calls:
        indices = node.input[moe.INDICES]
        found = new[indices] if indices else np.nonzero(new[node.input[moe.WEIGHTS]])[-1]
        chosen.append(({int(each) for each in found.flat}, int(sizes[node.input[moe.FC1]][0])))
    return worst, chosen


def _twin(model: onnx.ModelProto, types: Any) -> onnx.ModelProto:
    if not types:
        return model
    wide = ir.from_proto(model)
    widen(wide, types)
    return ir.to_proto(wide)


def _difference(a: Array, b: Array) -> float:
    if a.shape != b.shape:
        return float("inf")
    wide = a.astype(np.float64)
    return float(np.abs(wide - b).max(initial=0.0) / (wide.std() or 1.0))


# --- routers of an exported graph ---------------------------------------------------------------


@dataclass(frozen=True)
class Router:
    """What finds experts good in an exported graph: the names of constants."""

    weight: str
    biases: tuple[str, ...]


def routers(model: onnx.ModelProto) -> list[Router]:
    """The routers of an export: what the TopK and ArgMax over experts follow from, each once."""
    graph = model.graph
    made = {name: node for node in graph.node for name in node.output}
    held = {each.name: each for each in graph.initializer}
    held |= {
        node.output[0]: attribute.t
        for node in graph.node
        for attribute in node.attribute
        if node.op_type == "Constant" and attribute.name == "value"
    }

    def constant(name: str) -> str | None:
        """The constant that a value is a view of."""
        while name not in held and name in made and made[name].op_type in _VIEWS:
            name = made[name].input[0]
        return name if name in held else None

    found: dict[str, dict[str, None]] = {}
    for node in graph.node:
        if node.op_type not in CHOOSING:
            continue
        pending, seen, weights = [node.input[0]], {node.input[0]}, []
        biases: dict[str, None] = {}
        while pending:
            current = made.get(pending.pop())
            if current is None or current.op_type in ("Shape", "Size"):
                continue
            constants = [constant(name) for name in current.input if name]
            product = current.op_type in ("MatMul", "Gemm")
            if product:
                weights += [each for each in constants[:2] if each is not None]
            for each in constants[2 if product else 0 :]:
                if each is not None and _is_float(held[each]) and np.prod(held[each].dims) > 1:
                    biases[each] = None
            for name in () if product else current.input:
                if name not in seen:
                    seen.add(name)
                    pending.append(name)
        if len(weights) == 1:
            experts = min(held[weights[0]].dims)
            own = [each for each in biases if np.prod(held[each].dims) == experts]
            found.setdefault(weights[0], {}).update(dict.fromkeys(own))
    return [Router(weight, tuple(biases)) for weight, biases in found.items()]


_VIEWS = ("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Cast", "Identity")


def _is_float(tensor: onnx.TensorProto) -> bool:
    return helper.tensor_dtype_to_np_dtype(tensor.data_type).kind not in "iub"


def tied(model: onnx.ModelProto, found: Sequence[Router]) -> onnx.ModelProto:
    """A copy whose routers give every expert the same number, whatever the token."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    levels = dict.fromkeys((each.weight for each in found), 0.0)
    levels |= {name: 0.25 for each in found for name in each.biases}
    tensors = [(each.name, each) for each in copy.graph.initializer]
    for node in copy.graph.node:
        if node.op_type == "Constant":
            tensors += [(node.output[0], a.t) for a in node.attribute if a.name == "value"]
    for name, tensor in tensors:
        if name in levels:
            array = np.full_like(numpy_helper.to_array(tensor), levels[name])
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return copy


def has_experts(entry: testing.CorpusEntry) -> bool:
    """Whether an export chooses anything: every one that does has experts."""
    return any(node.op_type in CHOOSING for node in entry.stored.graph.node)


# --- the table ----------------------------------------------------------------------------------


def worse(now: Row, then: Row | None) -> Iterator[str]:
    """In what a row says less than it did, one sentence each."""
    if then is None:
        yield "not in the table: python -m tests.moe_table --write"
        return
    (fused, there), before = map(int, now.fused.split("/")), int(then.fused.split("/")[0])
    if fused < before:
        yield f"{fused} of {there} fused, {before} before"
    for column in ("slots", "activation", "router"):
        if getattr(now, column) != getattr(then, column):
            yield f"{column}: {getattr(now, column)}, was {getattr(then, column)}"
    for column in ("onnx", "ort", "one_token", "empty", "ties"):
        text = getattr(now, column)
        differences = text.rpartition(": ")[2].split(" / ")
        proven = all(_number(each) <= 1e-4 for each in differences)
        if not proven or text.rpartition(": ")[0] != getattr(then, column).rpartition(": ")[0]:
            yield f"{column}: {text}, was {getattr(then, column)}"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")


def as_text(rows: Iterable[Row]) -> str:
    rows = sorted(rows, key=lambda row: row.name)
    lines = [" | ".join(HEADER), " | ".join("---" for _ in HEADER)]
    lines += [" | ".join(astuple(row)) for row in rows]
    table = "\n".join(f"| {line} |" for line in lines)
    pairs = [row.fused.split("/") for row in rows]
    fused, there = (sum(int(pair[at]) for pair in pairs) for at in (0, 1))
    return f"{TITLE}\n\n{len(rows)} exports, {fused} of {there} mixtures fused.\n\n{table}\n"


def read(text: str) -> Mapping[str, Row]:
    """The rows of a table, by name."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [Row(*(cell.strip() for cell in line.strip("|").split(" | "))) for line in lines[2:]]
    return {row.name: row for row in rows}


def chosen(only: str = "*") -> list[testing.CorpusEntry]:
    """The corpus's exports that have experts."""
    fitting = (e for e in testing.corpus() if fnmatch.fnmatchcase(e.name, only))
    return [entry for entry in fitting if has_experts(entry)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", default="*", metavar="GLOB")
    parser.add_argument("--write", action="store_true", help="MOE.md")
    parser.add_argument("--check", action="store_true", help="exit 1 where a row says less")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (2)")
    options = parser.parse_args()
    known = dict(read(TABLE.read_text("utf-8"))) if TABLE.exists() else {}
    rows, problems = {}, []
    stored = {entry.name for entry in chosen()}
    kept = {name: row for name, row in known.items() if name in stored}
    with ProcessPoolExecutor(options.jobs) as pool:
        for row in pool.map(measure, chosen(options.only)):
            rows[row.name] = row
            wrong = list(worse(row, known.get(row.name))) if options.check else []
            print(" | ".join(astuple(row)), *wrong, sep="\n    ", flush=True)
            problems += wrong
            if options.write:
                TABLE.write_text(as_text((kept | rows).values()), "utf-8")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
