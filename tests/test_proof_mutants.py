"""The verifier rejects what is damaged, and the measurement of that can fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxgen.report.values import Proof
from onnxgen.testing import corpus
from tests.proof import mutants, search, tables
from tests.proof.damage import damages
from tests.proof.subjects import Subject, subjects
from tests.proof.view import View

# Kinds that every decoder with grouped heads, a rotary embedding and a cache can be damaged in.
KINDS = """
    scale|epsilon|rotary interleaved|half a rotary|rotary width|sine and cosine|table shifted
    causal|mask dropped|mask inverted|mask shifted|heads swapped|heads of other groups
    k and v swapped|past of another layer|present of another layer|present moved
    logits of another row|padding side|input off by one|norm weight dropped|layer skipped
    norm weight of another layer|any edge|any attribute|small constant|inputs exchanged
    input left out|node left out|another op|weight moved|weight by 1 %|weight's row wrong
    precision lost|integer off by one|moved along an axis
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Subject]]:
    (entry,) = corpus("llama/dynamo20")
    folder = tmp_path_factory.mktemp("made") / "llama"
    with subjects(entry, ("onnx", "paged"), folder, 0) as found:
        yield found


def test_every_live_mutant_of_a_few_models_is_rejected() -> None:
    table = mutants.measure(long=False, jobs=1, seed=0)
    assert not table.failures
    total = [int(cell) for cell in table.rows[-1][1:]]
    assert total[0] >= 60
    assert total[3] >= 45


def test_models_are_damaged_in_every_kind(made: list[Subject]) -> None:
    fused = made[0]
    found = damages(View(fused.model, mutants.kinds_of(fused)))
    assert {kind.strip() for line in KINDS.split("\n") for kind in line.split("|")} - {""} <= {
        *found
    }
    before = fused.model.SerializeToString()
    for kind, each in found.items():
        changed = each[-1].made(fused.model)
        assert changed.SerializeToString() != before, kind
    assert fused.model.SerializeToString() == before


def test_the_same_seed_damages_alike(made: list[Subject]) -> None:
    found = damages(View(made[0].model, mutants.kinds_of(made[0])))
    one, other, third = (
        [each.where for each in mutants.drawn(found, np.random.default_rng(seed), 12)]
        for seed in (4, 4, 5)
    )
    assert one == other != third


@pytest.mark.parametrize("at", [0, 1])
def test_what_a_blind_verifier_lets_pass_survives(
    made: list[Subject], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = made[at]
    assert subject.baseline.status == "proven"
    truth = search.search_of(subject, np.random.default_rng(0), 16)
    assert not truth.odd
    found = damages(View(subject.model, mutants.kinds_of(subject)))
    bias = found["norm weight dropped"][0]
    assert mutants.judged(subject, truth, bias).state == "rejected"
    monkeypatch.setattr(Subject, "verify", lambda *_: Proof("proven", 1e-4))
    outcome = mutants.judged(subject, truth, bias)
    assert outcome.state == "survivor"
    table = mutants.table([mutants.Found([outcome], 1)], long=False)
    assert any(line.startswith("survived: ") for line in table.failures)
    assert table.rows[-1][1:] == ("1", "0", "0", "1", "0", "1")


def test_a_verifier_that_rejects_everything_fails_too() -> None:
    found = mutants.Found([], 2, ["one: no", "two: no"])
    assert any("undamaged" in line for line in mutants.table([found], long=False).failures)


def test_what_changes_nothing_is_equivalent(made: list[Subject]) -> None:
    subject = made[0]
    truth = search.search_of(subject, np.random.default_rng(0), 16)
    assert truth.differs(subject.model) == ""
    broken = onnx.ModelProto()
    broken.CopyFrom(subject.model)
    broken.graph.node[0].op_type = "NoSuchOp"
    with pytest.raises(search.NotRunError):
        truth.differs(broken)


def test_the_readme_says_what_the_table_says() -> None:
    proof, readme = (path.read_text("utf-8") for path in (tables.FILE, mutants.README))
    assert mutants.with_short_line(readme, proof) == readme, "python -m tests.proof.mutants"


def test_the_committed_table_is_of_a_long_run() -> None:
    section = tables.sections(tables.FILE.read_text("utf-8"))["mutants"]
    line = next(line for line in section.splitlines() if mutants.ALL in line)
    count, _, _, live, rejected, _ = (int(n.replace(",", "")) for n in line.split("|")[2:-1])
    assert count >= live >= mutants.LEAST
    assert rejected >= mutants.FLOOR * live


def test_readmes_without_markers_are_refused() -> None:
    with pytest.raises(ValueError, match="mutants"):
        mutants.with_short_line("nothing", Path(tables.FILE).read_text("utf-8"))
