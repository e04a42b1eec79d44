"""The faults, one after another."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.proof import file_models as models
from tests.proof.files import BESIDE, FORCE, FUSE, OLD, PAGED, Judge

Change = Callable[[Path], object]


def all_of(judge: Judge, *, long: bool) -> None:
    moments(judge, long=long)
    places(judge)
    references(judge)
    meanwhile(judge)


def moments(judge: Judge, *, long: bool) -> None:
    """Killed, out of space, or failing, at every moment; and limits that the system enforces."""
    words = {"killed": ("kill", (-9,), ""), "no space from here on": ("full", (0, 4), "No space")}
    words["one failure"] = ("error", (0, 4), "Input/output error")
    for fault, (kind, codes, says) in words.items():
        forced = {"replaces": ("in/model.onnx",)}
        judge.run(fault, models.external, FUSE, codes, says, fault=kind)
        judge.run(fault, models.embedded, FUSE, codes, says, fault=kind)
        judge.run(fault, models.external, FORCE, codes, says, fault=kind, **forced)
        judge.run(fault, models.embedded, FORCE, codes, says, fault=kind, **forced)
        if long or kind == "kill":
            judge.run(fault, models.decoder, PAGED, codes, says, fault=kind)
        if long or kind == "full":
            judge.run(fault, models.decoder, BESIDE, codes, says, fault=kind)
    judge.run("a read fails", models.external, FUSE, (4,), "Input/output error", fault="unread")
    for limit in (2000, 20_000, 200_000):
        fault = f"files of at most {limit} bytes (RLIMIT_FSIZE)"
        judge.run(fault, models.external, FUSE, (4,), "File too large", limit=limit)
    tmpfs(judge)


def tmpfs(judge: Judge) -> None:
    """A disk that is full, where one can be mounted."""
    with tempfile.TemporaryDirectory(prefix="onnxgen-proof-") as name:
        mount = ["mount", "-t", "tmpfs", "-o", "size=450k", "tmpfs", name]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            return
        try:
            row = "a full disk (tmpfs)"
            small = [*FUSE[:4], f"{name}/model.fused.onnx"]
            (Path(name) / "filling").write_bytes(bytes(300_000))
            (Path(name) / "model.fused.onnx").write_bytes(b"old")
            judge.run(row, models.external, small, (4,), "No space left", news=False)
            if sorted(os.listdir(name)) != ["filling", "model.fused.onnx"]:
                judge.rows[-1].wrong.append(f"leaves {os.listdir(name)}")
            if (Path(name) / "model.fused.onnx").read_bytes() != b"old":
                judge.rows[-1].wrong.append("the old output changed")
        finally:
            subprocess.run(["umount", name], check=True)


def changed(*changes: Change, base: Change = models.external) -> Change:
    """A folder's content, and what is changed in it."""

    def build(folder: Path) -> None:
        base(folder)
        for change in changes:
            change(folder)

    return build


def _output(make: Callable[[Path], object]) -> Change:
    """The old output as another kind of thing."""

    def change(folder: Path) -> None:
        path = folder / OLD
        path.unlink()
        make(path)

    return change


def _mode(name: str, mode: int) -> Change:
    return lambda folder: (folder / name).chmod(mode)


def places(judge: Judge) -> None:
    """Outputs that cannot be, or must not be, written."""
    run = partial(judge.run, words=FUSE, codes=(4,), news=False)
    run("the output is a folder", changed(_output(Path.mkdir)), says="it is a folder")
    run("the output is a pipe", changed(_output(os.mkfifo)), says="not a regular file")
    judge.run(
        "the output is /dev/null", models.external, [*FUSE[:4], "/dev/null"], (4,), news=False
    )
    for fault, target in (("a link", "old.onnx"), ("a link to nothing", "gone.onnx")):
        build = changed(_linked(target))
        judge.run(f"the output is {fault}: it is replaced", build, FUSE, (0,))
    run("no folder for it", changed(lambda f: shutil.rmtree(f / "out")), says="there is no folder")
    run("its folder is read-only", changed(_mode("out", 0o555)), says="not writable", plain=True)
    run("the data file may not be read", changed(_mode("in/model.data", 0)), plain=True)
    run("the model may not be read", changed(_mode("in/model.onnx", 0)), plain=True)
    open_report = _mode("report.json", 0o666)
    build = changed(_mode("in", 0o555), open_report)
    judge.run("the model's folder is read-only", build, FUSE, (0,), plain=True)
    over = partial(judge.run, codes=(2,), news=False)
    over("the input, not forced", models.external, FORCE[:-1], says="needs --force")
    data = [*FUSE[:4], "in/model.data"]
    over("the input's weights", models.external, [*data, "--force"], says="input's weights")
    report = [*FUSE[:5], "--report", OLD]
    over("the report over the output", models.external, report, says="another file")
    report = [*FUSE[:5], "--report", "in/model.data"]
    over("the report over weights", models.external, report, says="no report")


def _linked(target: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / OLD
        path.rename(path.with_name("old.onnx"))
        path.symlink_to(target)

    return change


def references(judge: Judge) -> None:
    """External data that is not where, or what, it is said to be."""
    run = partial(judge.run, words=FUSE, codes=(4,), news=False)

    def located(**entries: object) -> Change:
        return changed(lambda folder: models.locate(folder / "in" / "model.onnx", **entries))

    def data(make: Callable[[Path], object]) -> Change:
        return changed(lambda folder: make(folder / "in" / "model.data"))

    run("an absolute path", located(location="/etc/hostname"), says="outside the model's folder")
    run("a path above", located(location="../report.json"), says="outside the model's folder")
    run("a path above, inside", located(location="a/../../in/model.data"), says="outside")
    run("a link out of the folder", data(_moved_out), says="outside")
    run("a hard link", data(lambda p: os.link(p, p.with_name("other"))), says="hard-linked")
    run("an offset past the end", located(offset=1 << 40), says="truncated")
    run("an offset below 0", located(offset=-4), says="bytes at -4")
    run("an offset that is no number", located(offset="many"), says="no number")
    run("a length that does not fit", located(length=8), says="its type and shape say")
    run("a data file that is missing", data(Path.unlink), says="missing")
    run("a data file that is cut off", data(lambda p: os.truncate(p, 5000)), says="truncated")
    run("a data file that is a pipe", data(_piped), says="not a regular file")
    judge.run("ranges that overlap: both are kept", located(offset=4096), FUSE, (0,))


def _moved_out(path: Path) -> None:
    path.rename(path.parents[1] / "model.data")
    path.symlink_to("../model.data")


def _piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def meanwhile(judge: Judge) -> None:
    """What others do to the files while a command runs."""
    cut = {"staged": "os.truncate('in/model.data', 5000)"}
    said = "the data is cut off meanwhile"
    judge.run(said, models.external, FUSE, (4,), spoils="in/model.data", meanwhile=cut)
    cut = {"staged": "os.truncate('in/model.onnx', 5000)"}
    said = "the model is cut off meanwhile"
    judge.run(said, models.embedded, FUSE, (4,), spoils="in/model.onnx", meanwhile=cut)
    twice = "assert again() == 0"
    for build, kind in ((models.external, "external"), (models.embedded, "embedded")):
        for moment in ("staged", "commit"):
            fault = f"a second run from start to end before the first's {moment} ({kind})"
            judge.run(fault, build, FUSE, (0,), meanwhile={moment: twice})
        fault = f"the first is then ended by SIGTERM ({kind})"
        ended = {"commit": f"{twice}; os.kill(os.getpid(), signal.SIGTERM); signal.pause()"}
        judge.run(fault, build, FUSE, (143,), meanwhile=ended)
        same = {
            "commit": "old = open('out/model.fused.onnx', 'rb'); import mmap; "
            "m = mmap.mmap(old.fileno(), 0, prot=1); was = m[:]; assert again() == 0; "
            "assert m[:] == was and old.read() == was"
        }
        judge.run(f"a reader has the old output mapped ({kind})", build, FUSE, (0,), meanwhile=same)
