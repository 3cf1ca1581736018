"""The HTML page: what it holds, and how a browser shows it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.analysis.html_page import Picture, Plot, Section, Table, render_page
from distill.training.curves import draw_curves

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def page(tmp_path: Path) -> str:
    table = Table(("", *(f"AP{number}" for number in range(12))), [["<b>student</b> & co", *["12.3"] * 12]], "percent")
    draw_curves({"loss": {"total": [(1, 3.0), (2, 1.0)]}}).savefig(tmp_path / "curves.png")
    Image.new("RGB", (2400, 300), (200, 30, 30)).save(tmp_path / "image.png")
    curves, picture = Plot(tmp_path / "curves.png", "losses"), Picture(tmp_path / "image.png", "an image")
    return render_page(
        "A run",
        "Student alone against distilled.",
        [Section("Result, test", ["A sentence."], [table], [curves], [picture]), Section("Empty")],
    )


def test_texts_are_escaped_and_empty_sections_left_out(page: str) -> None:
    assert "&lt;b&gt;student&lt;/b&gt; &amp; co" in page
    assert "<b>student" not in page
    assert 'id="result-test"' in page
    assert "Empty" not in page


def test_the_page_needs_no_network(page: str) -> None:
    assert 'src="http' not in page
    assert 'href="http' not in page
    assert "<script" not in page


def test_pictures_are_reduced(page: str) -> None:
    assert len(page) < 100_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("left out: no Chromium on this machine (apt install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as tool:
        started = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_a_browser_shows_the_page(width: int, scheme: Any, browser: Any, page: str, tmp_path: Path) -> None:
    """On a phone in dark mode, and on a screen: nothing is wider than the window, all pictures load, no error."""
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    view = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    faults: list[str] = []
    view.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    view.on("pageerror", lambda error: faults.append(str(error)))
    view.on("request", lambda sent: faults.append(sent.url) if sent.url.startswith("http") else None)
    view.goto((tmp_path / "page.html").as_uri())
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    assert view.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    ink, ground = (view.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    bright = [sum(map(int, color.strip("rgb()").split(", "))) for color in (ink, ground)]
    assert (bright[0] > bright[1]) == (scheme == "dark")
    assert faults == []
    view.close()
