"""What lies beside a model for onnxruntime-genai: genai_config.json and the tokenizer's files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onnxgen.errors import FileError, UsageError
from onnxgen.targets.genai import Said

CONFIG = "genai_config.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
READ = ("config.json", "generation_config.json", *TOKENIZER)
"""What is read beside a model, where it is there."""


def genai_files(
    make: Callable[[Said], Mapping[str, Any]], source: Path, output: Path, *, force: bool
) -> dict[str, bytes]:
    """The files to write beside `output`, by name: the tokenizer's, and the config as the last.

    Args:
        make: genai_config.json, of what the files beside the source say.
        source: the model as exported; the tokenizer's files and config.json lie beside it.
        output: where the model will be written to.
        force: allow replacing files of the same names that are not this model's.

    Raises:
        RefusedError: onnxruntime-genai cannot run the model.
        FileError: a file beside the model cannot be read.
        UsageError: a file of that name, and not this model's, is there already.
    """
    said = Said(*(_object(source.with_name(f"{part}config.json")) for part in ("", "generation_")))
    config = make(said)
    files: dict[str, bytes] = {}
    for name in TOKENIZER:
        content = _read(source.with_name(name))
        there = _read(output.with_name(name))
        if content is None or content == there:
            continue
        if there is not None and not force:
            raise UsageError(
                f"{output.with_name(name)} is another tokenizer's: choose another folder, "
                "or replace it with --force"
            )
        files[name] = content
    old = {} if force else _object(output.with_name(CONFIG))
    if old and _filename(old) != output.name:
        raise UsageError(
            f"{output.with_name(CONFIG)} is another model's: choose another folder, "
            "or replace it with --force"
        )
    files[CONFIG] = (json.dumps(config, indent=4) + "\n").encode()
    return files


def _filename(config: Mapping[str, Any]) -> Any:
    """The decoder that a genai_config.json is about."""
    found: Any = config
    for key in ("model", "decoder", "filename"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _object(path: Path) -> dict[str, Any]:
    """A JSON file's object; {} where there is no such file."""
    content = _read(path)
    if content is None:
        return {}
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is no JSON: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise FileError(f"{path} holds no JSON object")
    return found


def _read(path: Path) -> bytes | None:
    """A file's content, None where there is none."""
    if path.exists() and not path.is_file():
        raise FileError(f"{path} cannot be read: it is not a regular file")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
