"""The pages in a real browser: search, filters, links, sorting and keys, on narrow screens too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import launched
from ledger_parts import claims, published_findings

pytestmark = pytest.mark.browser

Open = Callable[..., Any]


@pytest.fixture
def open_page(chromium: str, repository: Path) -> Iterator[Open]:
    """Opens a page of the repository; whatever goes wrong in it fails the test."""
    errors: list[str] = []
    with launched(chromium, "--disable-background-networking") as browser:

        def loaded(address: str, own: str) -> None:
            if not address.startswith((own, "data:")):
                errors.append(f"{address} was asked for")

        def opened(path: str, anchor: str = "", width: int = 1200, **options: Any) -> Any:
            file = repository / path
            assert file.is_file(), f"{path} is missing: make smoke"
            page = browser.new_page(viewport={"width": width, "height": 900}, **options)
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("requestfailed", lambda request: errors.append(f"{request.url[:80]} failed"))
            page.on("request", lambda request: loaded(request.url, file.as_uri()))
            page.goto(file.as_uri() + anchor)
            return page

        yield opened
    assert errors == []


CLAIMS = "reports/published/claims.html"
PUBLISHED = [f"reports/published/{name}/report.html" for name in ("quick", "variants-60")]
REPORTS = ["reports/smoke/report.html", *PUBLISHED]


@pytest.mark.parametrize("path", REPORTS)
def test_report_opens_without_errors(path: str, open_page: Open, tmp_path: Path) -> None:
    page = open_page(path)
    figures = page.evaluate(
        "[...document.querySelectorAll('figure')].map(f => [f.querySelector('svg').getBoundingClientRect().width,"
        " f.querySelector('svg').getAttribute('aria-label'), f.querySelector('figcaption').textContent.trim()])"
    )
    assert len(figures) >= 5
    for width, alt, caption in figures:
        assert width > 300
        assert alt == caption
    assert page.locator("img").count() == 0
    assert page.locator("table").count() >= 2
    page.screenshot(path=tmp_path / "report.png", full_page=True)
    assert (tmp_path / "report.png").stat().st_size > 50_000


@pytest.mark.parametrize("path", [CLAIMS, *PUBLISHED])
def test_pages_fit_a_phone_and_both_colour_schemes(path: str, open_page: Open, repository: Path) -> None:
    assert (repository / path).stat().st_size < 3_000_000
    backgrounds = set()
    for width, scheme in ((375, "light"), (1280, "dark")):
        page = open_page(path, width=width, color_scheme=scheme)
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        inks = page.evaluate(
            "[...document.querySelectorAll('figure text')].slice(0, 50).map(text => getComputedStyle(text).fill)"
        )
        assert inks
        assert not {"rgb(0, 0, 0)", *backgrounds} & set(inks)
    assert len(backgrounds) == 2


def test_tables_are_sorted_with_mouse_and_keyboard(open_page: Open) -> None:
    page = open_page("reports/published/quick/report.html")

    def losses() -> list[str]:
        rows = "[...document.querySelectorAll('#runs tbody tr')]"
        cells = page.evaluate(f"{rows}.map(row => row.cells[column].textContent)")
        return [cell for cell in cells if cell != "-"]

    heading = page.locator("#runs th", has_text="held-out NLL")
    page.evaluate("at => { window.column = at }", heading.evaluate("one => one.cellIndex"))
    before = losses()
    ordered = sorted(before, key=float)
    assert before != ordered
    heading.locator("button").click()
    assert losses() == ordered
    assert heading.get_attribute("aria-sort") == "ascending"
    heading.locator("button").press("Enter")
    assert losses() == ordered[::-1]
    assert heading.get_attribute("aria-sort") == "descending"


def test_claims_are_filtered(open_page: Open) -> None:
    page = open_page(CLAIMS)
    total = page.locator("details").count()
    assert total == len(claims())

    def shown() -> int:
        return page.locator("details:visible").count()

    assert shown() == total
    for field, attribute in (("topic", "topic"), ("verdict", "verdict"), ("kind", "kind"), ("world", "world")):
        choices = page.locator(f"select[name={field}] option").all_inner_texts()[1:]
        assert len(choices) > 2
        for choice in choices:
            page.select_option(f"select[name={field}]", label=choice)
            wanted = page.evaluate(
                "([name, value]) => [...document.querySelectorAll('details')]"
                ".filter(d => d.dataset[name].split('|').includes(value)).length",
                [attribute, choice],
            )
            assert 0 < shown() == wanted < total
            assert page.locator("output").inner_text() == f"{wanted} of {total} claims"
        page.select_option(f"select[name={field}]", label="all")
    assert shown() == total
    assert page.locator("section:visible h2").count() == len(page.locator("select[name=topic] option").all()) - 1


def test_claims_are_found_by_words_and_keys(open_page: Open, repository: Path) -> None:
    page = open_page(CLAIMS)
    page.keyboard.press("/")
    page.keyboard.type("dora MERGED")
    shown = page.locator("details:visible")
    found = shown.evaluate_all("all => all.map(one => one.id)")
    assert "P21" in found
    assert len(found) < 20
    assert all("dora" in text.lower() and "merged" in text.lower() for text in shown.all_text_contents())
    assert page.locator("output").inner_text() == f"{len(found)} of {len(claims())} claims"
    page.keyboard.press("Escape")
    page.select_option("select[name=verdict]", "open")
    drawn = page.locator("details:visible .drawn")
    assert drawn.count() == shown.count() > 0
    findings = published_findings()
    with_interval = [each for each in findings if each["verdict"] == "open" and each["low"] is not None]
    assert drawn.filter(has=page.locator("svg .whisker")).count() == len(with_interval) > 0


def test_every_claim_has_a_link_that_opens_it(open_page: Open) -> None:
    page = open_page(CLAIMS, anchor="#S64")
    assert page.locator("#S64").get_attribute("open") is not None
    page.fill("input[name=words]", "no claim has qwxz in it")
    assert page.locator("details:visible").count() == 0
    page.locator(".learned a", has_text="S75").first.click()
    page.locator("#S75[open]").wait_for()  # the browser tells of a new anchor after the click has returned
    assert page.locator("#S75").get_attribute("open") is not None
    assert page.locator("#S75").is_visible()
    assert page.evaluate("document.querySelector('#S75').getBoundingClientRect().top") < 300
    first = page.locator("details").first
    first.locator("summary").press("Enter")
    assert first.get_attribute("open") is not None
    links = "[...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.getAttribute('href'))"
    assert page.evaluate(f"{links}.filter(to => !document.querySelector(to))") == []


def test_the_claims_page_is_ready_at_once_and_nothing_moves(open_page: Open) -> None:
    page = open_page(CLAIMS)
    session = page.context.new_cdp_session(page)
    # Processor time, and not the clock: other processes may have the processor.
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.reload()
    took = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    assert 0 < took["TaskDuration"] < 1
    moved = page.evaluate(
        "new Promise(done => { let sum = 0;"
        "const add = list => list.getEntries().forEach(one => { sum += one.value });"
        "new PerformanceObserver(add).observe({type: 'layout-shift', buffered: true});"
        "setTimeout(() => done(sum), 300) })"
    )
    assert moved == 0


def test_claims_read_without_javascript(open_page: Open) -> None:
    page = open_page(CLAIMS, java_script_enabled=False)
    assert page.locator("details:visible").count() == len(claims())
    assert page.locator("form:visible").count() == 0
    first = page.locator("details").first
    assert not first.locator(".parts").is_visible()
    first.locator("summary .statement").click()
    assert first.locator(".parts").is_visible()
    assert page.locator("#for-people-who-learned-from-the-chapter + p + ul li").count() > 3
