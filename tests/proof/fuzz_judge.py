"""What a command may end with, and what it may not: the rules that fuzzing holds it to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.proof.fork_server import UNCAUGHT, Ended, Outcome, command, run_forked
from tests.proof.fuzz_cases import Case, make_case

SECONDS = 10.0
MEMORY = 1_000_000_000
CODES = {0: "done", 1: "differs", 2: "usage", 3: "refused", 4: "file", 5: "expected"}
LONGEST = 2000  # characters of an error's sentence


def outcome(
    kind: str,
    number: int,
    seed: int,
    folder: Path,
    instead: Callable[[], int] | None = None,
) -> Outcome:
    """Make a case in a folder that does not exist yet, run it, and judge it.

    Args:
        instead: is run in the place of the command, to see what the judge says of it.
    """
    try:
        case = make_case(kind, number, seed)
    except Exception as error:
        return Outcome(kind, number, 0, 0.0, 0, [f"the case cannot be made: {error!r}"])
    work, scratch = folder / "work", folder / "scratch"
    for each in (work, scratch / "tmp"):
        each.mkdir(parents=True)
    for name, content in case.files.items():
        (work / name).write_bytes(content)
    ended = run_forked(instead or command(case.words, case.own_worker), work, scratch)
    said = (scratch / "stderr").read_text("utf-8", "replace")
    failures = [*_ended_well(ended), *_said_well(ended, said), *_left_well(case, ended, work)]
    # ".ses" is a note that ONNX Runtime writes wherever it is imported.
    if any(path.name != ".ses" for path in (scratch / "tmp").iterdir()):
        failures.append("temporary files were left behind")
    failures += _json_well(case, work, (scratch / "stdout").read_text("utf-8", "replace"))
    if ended.status == 0 and not failures:
        failures += _loads(case, work, scratch)
    last = said.strip().rpartition("\n")[2][:LONGEST]
    return Outcome(kind, number, ended.status, ended.seconds, ended.peak, failures, last)


def _ended_well(ended: Ended) -> list[str]:
    found = []
    if ended.late or ended.seconds > SECONDS:
        found.append(f"it took {ended.seconds:.0f} s" + (" and did not end" if ended.late else ""))
    if ended.status < 0 and not ended.late:
        found.append(f"it was killed by signal {-ended.status}")
    elif ended.status not in CODES and not ended.late:
        found.append("it raised" if ended.status == UNCAUGHT else f"exit code {ended.status}")
    if ended.peak > MEMORY:
        found.append(f"it held {ended.peak / 1e6:.0f} MB")
    if ended.left:
        found.append("a process was left behind")
    return found


def _said_well(ended: Ended, said: str) -> list[str]:
    found = []
    if "Traceback" in said or "failed unexpectedly" in said:
        found.append("it failed unexpectedly")
    if "not enough memory" in said or "out of memory" in said or "bad_alloc" in said:
        found.append("it asked for more memory than there is")
    lines = [line for line in said.splitlines() if not line.startswith(("Usage:", "Try "))]
    lines = [line for line in lines if line.strip()]
    if ended.status > 0 and not (len(lines) == 1 and lines[0].startswith("Error: ")):
        found.append(f"it said {len(lines)} lines, not one that begins with Error:")
    if ended.status == 0 and lines:
        found.append("it is done, and said something on stderr")
    if any(len(line) > LONGEST or not line.isprintable() for line in lines):
        found.append("its sentence is too long, or holds what cannot be printed")
    return found


def _left_well(case: Case, ended: Ended, work: Path) -> list[str]:
    """Inputs as they were; nothing new but the report, and what was asked for where it is done."""
    found = []
    allowed = {"report.json", *case.files}
    if ended.status == 0:
        allowed |= {"out.onnx", "out", "genai_config.json"}
    for path in work.iterdir():
        data = path.name.startswith("out.") and path.suffix == ".data" and ended.status == 0
        if path.name not in allowed and not data:
            found.append(f"it left {path.name} behind")
    if ended.status == 0 and case.words[0] == "fuse" and not (work / "out.onnx").is_file():
        found.append("it is done, and there is no output")
    if any((work / name).read_bytes() != content for name, content in case.files.items()):
        found.append("an input was changed")
    return found


def _json_well(case: Case, work: Path, printed: str) -> list[str]:
    texts = [printed] if "--json" in case.words else []
    if "--report" in case.words:
        report = work / "report.json"
        texts.append(report.read_text("utf-8") if report.is_file() else "")
    try:
        for text in texts:
            json.loads(text, parse_constant=_refuse)
    except ValueError:
        return ["its report is no JSON"]
    return []


def _refuse(name: str) -> None:
    raise ValueError(name)


def _loads(case: Case, work: Path, scratch: Path) -> list[str]:
    """What was written must load wherever the input does: onnx, its checker, ONNX Runtime."""
    output = work / ("out/model.onnx" if case.words[0] == "to-paged" else "out.onnx")
    if not output.is_file():
        return []
    ended = run_forked(lambda: _load(work / "in.onnx", output), work, scratch)
    if ended.status == 0:
        return []
    if ended.status < 0:  # onnx or ONNX Runtime crashed: in the original, or in ours?
        alone = run_forked(lambda: _load(work / "in.onnx", work / "in.onnx"), work, scratch)
        if alone.status == ended.status:
            return []
    said = (scratch / "stderr").read_text("utf-8", "replace").strip()
    return [f"the output does not load: {said.rpartition(chr(10))[2][:300]}"]


def _load(original: Path, written: Path) -> int:
    import onnx
    import onnxruntime

    def check(path: Path) -> None:
        onnx.checker.check_model(onnx.load(path))

    def load(path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        try:
            onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            if "implementation for PagedAttention" not in str(error):  # which no CPU has
                raise

    onnx.load(written)
    for way in (check, load):
        try:
            way(original)
        except Exception:
            continue
        way(written)
    return 0
