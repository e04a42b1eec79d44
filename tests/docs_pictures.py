"""Writes the screenshots and the recorded terminal run that docs/reports.md shows.

    python -m tests.docs_pictures

Needs a Chromium; see tests/browser.py.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from onnxgen.report import html
from onnxgen.report.values import Outcome
from tests import browser
from tests.reports import fused, grown, layered, paged

DOCS = Path(__file__).parent.parent / "docs"
DESKTOP, PHONE = 1240, 390


def main() -> None:
    pictures = DOCS / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = grown("llama/dynamo20", folder)
        moe = grown("qwen3_moe/dynamo20-batched", folder)
        shots = {
            "page": (html.render(fused(moe)), DESKTOP, 2200, False),
            "page-dark": (html.render(paged(plain)), DESKTOP, 1500, True),
            "page-phone": (html.render(fused(plain)), PHONE, 1500, False),
            "page-layers": (html.render(Outcome("fuse", report=layered(32))), DESKTOP, 1100, False),
            "page-failed": (html.render(fused(folder / "missing.onnx")), DESKTOP, 420, False),
        }
        for shot, (page, width, height, dark) in shots.items():
            page = page.replace(name, "/models")
            browser.photograph(page, pictures / f"{shot}.png", width, height, dark=dark)
        (DOCS / "terminal.txt").write_text(_recorded(plain))


def _recorded(model: Path) -> str:
    """What `onnxgen fuse` says in a terminal of 100 columns, without colours."""
    words = ["fuse", model.name, "--report", "report.html"]
    done = subprocess.run(
        [sys.executable, "-m", "onnxgen", *words],
        cwd=model.parent,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(DOCS.parent), "COLUMNS": "100"},
    )
    return f"$ onnxgen {' '.join(words)}\n{done.stdout}{done.stderr}"


if __name__ == "__main__":
    main()
