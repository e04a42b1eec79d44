"""Pages in a real browser: nothing is said on the console, and nothing is wider than a phone."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxgen.report import html
from onnxgen.report.page import page
from onnxgen.report.values import Outcome
from tests import browser
from tests.reports import fused, grown, hostile, layered, paged

pytestmark = pytest.mark.skipif(browser.find() is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    moe = grown("qwen3_moe/dynamo20-batched", folder)
    outcomes = {
        "moe": fused(moe),
        "paged": paged(moe),
        "broken": fused(folder / "missing.onnx"),
        "many": Outcome("fuse", report=layered(100, "m" * 200)),
        "hostile": hostile(),
    }
    return {name: html.render(outcome) for name, outcome in outcomes.items()}


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", ["moe", "paged", "broken", "many", "hostile"])
def test_it_is_drawn_without_errors_and_fits(pages: dict[str, str], name: str, width: int) -> None:
    seen = browser.look(pages[name], width)
    assert seen.console == ()
    assert seen.width == width
    assert seen.scrolled <= width, seen.wide
    assert seen.wide == ()
    assert seen.height > 300


def test_the_browser_tells_what_is_wrong(tmp_path: Path) -> None:
    wide = browser.look('<!doctype html><p style="width:900px">wide', 390)
    assert wide.scrolled > 390
    loud = page("loud").replace("</body>", "<script>console.error('no')</script></body>")
    assert browser.look(loud, 390).console
