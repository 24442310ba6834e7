"""The report in a real browser: no console errors, no missing images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("no Chromium: apt-get install chromium")


@pytest.mark.parametrize("page_path", ["reports/smoke/report.html", "reports/published/quick/report.html"])
def test_report_opens_without_errors(page_path: str, chromium: str, repository: Path, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    path = repository / page_path
    assert path.is_file(), f"{page_path} is missing: make smoke"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        errors: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("requestfailed", lambda request: errors.append(f"{request.url[:80]} failed"))
        page.goto(path.as_uri())
        images = page.evaluate("[...document.images].map(i => [i.alt, i.complete && i.naturalWidth > 100])")
        assert len(images) >= 5
        assert all(shown for _, shown in images), images
        assert page.locator("table").count() >= 2
        assert page.locator("figcaption").count() == len(images)
        page.screenshot(path=tmp_path / "report.png", full_page=True)
        browser.close()
    assert errors == []
    assert (tmp_path / "report.png").stat().st_size > 50_000
