"""A real browser, where there is one: pages are drawn at a given width, and looked at."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--enable-logging=stderr", "--virtual-time-budget=2000"),
)
MEASURE = """
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const wide = [...page.querySelectorAll("body *")].filter(e =>
    e.getBoundingClientRect().right > root.clientWidth + 1 && !e.closest(".scroll"));
  document.title = JSON.stringify({
    client: root.clientWidth, scroll: root.scrollWidth, height: root.scrollHeight,
    wide: wide.slice(0, 5).map(e => e.outerHTML.slice(0, 120)),
  });
};
</script>
"""


def find() -> str | None:
    """The path of a browser, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page: its sizes, what is too wide, and what the console said."""

    width: int
    scrolled: int
    height: int
    wide: tuple[str, ...]
    console: tuple[str, ...]


def look(page: str, width: int) -> Seen:
    """Draw a page, in a frame so wide."""
    framed = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page)}">'
    # The frame first waits for its listener: srcdoc loads after this document's scripts.
    text = f"<!doctype html><title>-</title>{framed}</iframe>{MEASURE}"
    dom, console = _run(text, "--dump-dom", "--window-size=1600,1000")
    found = re.search(r"<title>(.*?)</title>", dom, re.S)
    sizes = json.loads(html.unescape(found[1])) if found else {}
    return Seen(
        sizes["client"], sizes["scroll"], sizes["height"], tuple(sizes["wide"]), tuple(console)
    )


def photograph(page: str, path: Path, width: int, height: int, *, dark: bool = False) -> None:
    """Write what a browser shows of a page."""
    if dark:  # as the page has it for those who prefer that
        page = page.replace("(prefers-color-scheme: dark)", "all")
        page = page.replace("color-scheme: light dark", "color-scheme: dark")
    style = f"width:{width}px;height:{height}px;border:0;display:block"
    framed = (
        f'<body style="margin:0"><iframe style="{style}" srcdoc="{html.escape(page)}"></iframe>'
    )
    _run(
        f"<!doctype html>{framed}",
        f"--screenshot={path.resolve()}",
        f"--window-size={width},{height}",
    )


def _run(text: str, *words: str) -> tuple[str, list[str]]:
    """Standard output, and lines of the page's console."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(text)
        command = [str(find()), *FLAGS, f"--user-data-dir={folder}/user", *words, file.as_uri()]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,
            check=False,
            env={**os.environ, "HOME": folder},
        )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    if done.returncode:
        raise RuntimeError(f"the browser ended with {done.returncode}: {done.stderr[-800:]}")
    return done.stdout, console
