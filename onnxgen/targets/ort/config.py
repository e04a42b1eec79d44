"""What a transformers config.json beside a model says."""

from __future__ import annotations

import json
from pathlib import Path


def context_length(config: Path) -> int:
    """max_position_embeddings of a config.json, that of its text model where it has one; else 0."""
    if not config.is_file():
        return 0
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        text = found.get("text_config") or found
        length = text.get("max_position_embeddings") or found.get("max_position_embeddings")
    except (OSError, ValueError, AttributeError, RecursionError):
        return 0
    return length if isinstance(length, int) and length > 0 else 0
