"""What the measurements share: exports that are kept in a folder, and tables.

Nothing heavy is imported here: a child's peak memory is at least that of the process it was
started from.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
EXPORT = ROOT / "tests" / "corpus" / "export.py"


def exported(folder: Path, model: str, form: str, dims: Mapping[str, int]) -> Path:
    """A model of the corpus with other dims, weights in, made unless the folder has it."""
    path = folder / f"{_stem(model, dims)}-{form}.onnx"
    _export(path, ["--model", model, "--form", form, *_words(dims), "--full", "-o"])
    return path


def checkpoint(folder: Path, model: str, dims: Mapping[str, int]) -> Path:
    """The same model as transformers saves it, for tools that start from weights."""
    path = folder / f"{_stem(model, dims)}-checkpoint"
    _export(path, ["--model", model, *_words(dims), "--checkpoint"])
    return path


def built(folder: Path, model: str, dims: Mapping[str, int]) -> Path:
    """The model that onnxruntime-genai's builder writes from the same weights, on CPU in fp32."""
    source = checkpoint(folder, model, dims)
    output = source.with_name(source.name.replace("checkpoint", "genai"))
    if not (output / "genai_config.json").exists():
        print(f"making {output.name} …", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        quietly([*command, "-i", source, "-o", output, "-p", "fp32", "-e", "cpu"])
    return output / "model.onnx"


def fused(path: Path, target: str) -> Path:
    """What `onnxgen fuse --target` writes of a file, fused anew at each call.

    Args:
        target: the words behind --target, such as "ort --padding none".
    """
    words = target.split()
    output = path.with_name(f"{path.stem}.{''.join(words)}.onnx")
    command = [sys.executable, "-m", "onnxgen", "fuse", path, "-o", output, "--no-verify"]
    quietly([*command, "--target", *words])
    return output


def paged(path: Path, words: str = "") -> Path:
    """What `onnxgen to-paged` writes of a file, anew at each call.

    Args:
        words: further ones of the command, such as "--logits last".
    """
    folder = path.with_name(f"{path.stem}.paged{''.join(words.split())}")
    command = [sys.executable, "-m", "onnxgen", "to-paged", path, "-o", folder, "--no-verify"]
    quietly([*command, *words.split()])
    return folder / "model.onnx"


def quietly(command: Sequence[str | Path], hint: str = "") -> None:
    """Run a command; where it fails, end with what it said and the hint."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(map(str, command[:5]))} … failed{hint}")


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A markdown table, its columns aligned."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |")
    print(flush=True)


def _stem(model: str, dims: Mapping[str, int]) -> str:
    return "-".join([model, *(f"{name[0]}{size}" for name, size in sorted(dims.items()))])


def _words(dims: Mapping[str, int]) -> list[str]:
    return [w for name, size in dims.items() for w in (f"--{name.replace('_', '-')}", str(size))]


def _export(path: Path, words: Sequence[str]) -> None:
    if path.exists():
        return
    print(f"making {path.name} …", file=sys.stderr, flush=True)
    new = path.with_name(f"new-{os.getpid()}-{path.name}")
    quietly([sys.executable, EXPORT, *words, new], "; it needs: pip install -e '.[corpus]'")
    new.replace(path)
