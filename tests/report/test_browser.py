"""The pages in a real browser: no console errors, no missing images, filters that filter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from peftscope.claims.ledger import read_ledger

pytestmark = pytest.mark.browser

Open = Callable[..., Any]


@pytest.fixture
def open_page(chromium: str, repository: Path) -> Iterator[Open]:
    """Opens a page of the repository; whatever goes wrong in it fails the test."""
    from playwright.sync_api import sync_playwright

    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )

        def opened(path: str, **options: Any) -> Any:
            file = repository / path
            assert file.is_file(), f"{path} is missing: make smoke"
            page = browser.new_page(viewport={"width": 1200, "height": 900}, **options)
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("requestfailed", lambda request: errors.append(f"{request.url[:80]} failed"))
            page.goto(file.as_uri())
            return page

        yield opened
        browser.close()
    assert errors == []


@pytest.mark.parametrize(
    "path",
    ["reports/smoke/report.html", "reports/published/quick/report.html", "reports/published/variants-60/report.html"],
)
def test_report_opens_without_errors(path: str, open_page: Open, tmp_path: Path) -> None:
    page = open_page(path)
    images = page.evaluate("[...document.images].map(i => [i.alt, i.complete && i.naturalWidth > 100])")
    assert len(images) >= 5
    assert all(shown for _, shown in images), images
    assert page.locator("table").count() >= 2
    assert page.locator("figcaption").count() == len(images)
    page.screenshot(path=tmp_path / "report.png", full_page=True)
    assert (tmp_path / "report.png").stat().st_size > 50_000


CLAIMS = "reports/published/claims.html"


def test_claims_are_filtered(open_page: Open) -> None:
    page = open_page(CLAIMS)
    claims = page.locator("details")
    total = claims.count()
    assert total == len(read_ledger())

    def shown() -> int:
        return page.locator("details:visible").count()

    assert shown() == total
    for field, attribute in (("section", "section"), ("verdict", "verdict"), ("kind", "kind")):
        choices = page.locator(f"select[name={field}] option").all_inner_texts()[1:]
        assert len(choices) > 2
        for choice in choices:
            page.select_option(f"select[name={field}]", label=choice)
            wanted = page.evaluate(
                "([name, value]) => [...document.querySelectorAll('details')]"
                ".filter(d => d.dataset[name].trim().split(name === 'kind' ? ' ' : '|').includes(value)).length",
                [attribute, choice],
            )
            assert 0 < shown() == wanted < total
            assert page.locator("output").inner_text() == f"{wanted} of {total} claims"
        page.select_option(f"select[name={field}]", label="all")
    assert shown() == total
    assert page.locator("section:visible h2").count() == len(page.locator("select[name=section] option").all()) - 1


def test_claims_read_without_javascript(open_page: Open) -> None:
    page = open_page(CLAIMS, java_script_enabled=False)
    assert page.locator("details:visible").count() == len(read_ledger())
    assert page.locator("form:visible").count() == 0
    first = page.locator("details").first
    assert not first.locator("table").is_visible()
    first.locator("summary").click()
    assert first.locator("table").is_visible()
    assert page.locator("#corrections + p + ul li").count() > 3
