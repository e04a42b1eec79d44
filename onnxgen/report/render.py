"""Which kind of report a file holds: told by its ending, in this one place."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from onnxgen.errors import UsageError
from onnxgen.report.values import Outcome

STARTS = {
    ".json": '{\n  "schema": ',
    ".html": "<!doctype html>\n<!-- report of onnxgen -->\n",
    ".xml": '<?xml version="1.0" encoding="UTF-8"?>\n<!-- report of onnxgen -->\n',
    ".md": "<!-- report of onnxgen -->\n",
}
"""By ending: what every document of the kind begins with."""
_MODULES = {".json": "as_json", ".html": "html", ".xml": "junit", ".md": "markdown"}


def check_ending(path: Path) -> None:
    """Whether there is such a kind of report.

    Raises:
        UsageError: there is none.
    """
    if path.suffix.lower() not in STARTS:
        *most, last = STARTS
        raise UsageError(
            f"--report {path} ends in none of {', '.join(most)} and {last}, which say what kind "
            "of report is written"
        )


def render(outcome: Outcome, path: Path) -> str:
    """The outcome as text of the kind that the file's ending asks for."""
    kind = import_module(f"onnxgen.report.{_MODULES[path.suffix.lower()]}")
    text: str = kind.render(outcome)
    return text
