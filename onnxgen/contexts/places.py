"""Folders of the user's: what onnxgen remembers, and which blobs may be used.

The cache holds nothing that cannot be made again; `ONNXGEN_CACHE` or `XDG_CACHE_HOME` moves it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """`ONNXGEN_CACHE`, else `onnxgen` in the user's cache folder; nobody made it yet."""
    own = os.environ.get("ONNXGEN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "onnxgen"


def config_folder() -> Path:
    """`ONNXGEN_CONFIG`, else `onnxgen` in the user's folder of settings."""
    own = os.environ.get("ONNXGEN_CONFIG")
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(own) if own else Path(base) / "onnxgen"


def read_json(kind: str, name: str) -> Any:
    """What was remembered; None where there is nothing that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((cache_folder() / kind / name).read_text("utf-8"))
    return None


def remember(kind: str, name: str, content: Any) -> None:
    """Remember something, atomically; a cache that cannot be written is none."""
    folder = cache_folder() / kind
    scratch = folder / f".{name}.{secrets.token_hex(6)}"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        scratch.write_text(json.dumps(content), "utf-8")
        os.replace(scratch, folder / name)
