"""The site: no link leads nowhere, its pages are the repository's files, and nothing is loaded from elsewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from test_page import Visit, visiting

import peftscope
from peftscope.report.front import BEGIN, END

REPORTS = "reports/published"


class Links(HTMLParser):
    """The addresses that a page names, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: set[str] = set()
        self.anchors = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.addresses.add(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def dead_links(site: Path) -> list[str]:
    """Returns the links within a folder of pages that lead to no file, or to no anchor of a page."""
    pages = {path: Links(path.read_text()) for path in site.rglob("*.html")}
    dead = []
    for page, links in pages.items():
        for address in links.addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            known = pages[target].anchors if target in pages else {""}
            if not target.is_file() or unquote(parts.fragment) not in known:
                dead.append(f"{page.relative_to(site)}: {address}")
    return sorted(dead)


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="b.html#here">1</a><a href="b.html#there">2</a><img src="c.png">')
    (tmp_path / "b.html").write_text('<p id="here"><a href="#">3</a><a href="https://example.org/x">4</a>')
    assert dead_links(tmp_path) == ["a.html: b.html#there", "a.html: c.png"]


def test_what_others_read_about_the_project_agrees(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    codemeta = json.loads((repository / "codemeta.json").read_text())
    assert citation["version"] == codemeta["version"] == peftscope.__version__
    assert citation["license"] == project["license"] == codemeta["license"].rpartition("/")[2]
    authors = [{"name": author["name"]} for author in codemeta["author"]]
    assert citation["authors"] == authors == project["authors"]
    assert citation["keywords"] == codemeta["keywords"]
    forms = sorted((repository / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    for form in (yaml.safe_load(path.read_text()) for path in forms if path.name != "config.yml"):
        assert {"name", "description", "body"} <= form.keys()
        assert len({field["id"] for field in form["body"]}) == len(form["body"])


def test_the_page_on_records_shows_code_that_runs(repository, capsys, in_repository: None) -> None:
    text = (repository / "docs/records.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), {})
    said = capsys.readouterr().out
    assert said.startswith("['grid', 'ladder-0-alpha', 'ladder-0-rank'") and " bytes\n['S" in said


@pytest.fixture(scope="module")
def site(repository: Path, calculator: Path) -> Path:
    """The site, built as ``make site`` does."""
    pytest.importorskip("furo", reason="needs the extra docs")
    recipe = re.search(r"\$\(BIN\)/sphinx-build (.*)", (repository / "Makefile").read_text())
    assert recipe
    environment = {**os.environ, "PYTHONPATH": str(repository / "src")}
    command = [sys.executable, "-m", "sphinx", *shlex.split(recipe[1])]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert calculator.parent == repository / "site"
    return calculator.parent


@pytest.fixture(scope="module")
def visit(chromium: str, site: Path) -> Iterator[Visit]:
    with visiting(site, chromium, 375) as one:
        yield one


@pytest.mark.browser
class TestSite:
    def test_no_link_leads_nowhere(self, site: Path) -> None:
        assert dead_links(site) == []

    def test_its_pages_are_the_files_of_the_repository(self, site: Path, repository: Path) -> None:
        reports = [path.relative_to(repository) for path in (repository / REPORTS).rglob("*.html")]
        assert len(reports) > 2
        for report in reports:
            assert (site / report).read_bytes() == (repository / report).read_bytes()
        first = (site / "index.html").read_text()
        shown = (repository / "README.md").read_text().partition(BEGIN)[2].partition(END)[0]
        claims = re.findall(r"claims\.md(#\w+)", shown)
        assert claims and "worlds.svg" in first
        assert [claim for claim in claims if f'href="{REPORTS}/claims.html{claim}"' not in first] == []
        pages = [page.with_suffix("").name for page in (repository / "docs").glob("*.md")]
        assert [page for page in pages if f'href="docs/{page}.html"' not in first] == []

    def test_it_reads_on_a_phone_and_loads_nothing_from_elsewhere(self, visit: Visit, site: Path) -> None:
        pages = [path.relative_to(site).as_posix() for path in site.rglob("*.html")]
        pages = [page for page in pages if not page.startswith((f"{REPORTS}/", "calculator/", "_static/"))]
        assert len(pages) > 20
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        for page in pages:
            visit.page.goto(visit.address + page)
            assert visit.page.evaluate(wide) <= 0, page
        assert {url for url in visit.requests if not url.startswith((visit.address, "data:"))} == set()
        assert visit.errors == []

    def test_the_doors_open_and_the_search_finds(self, visit: Visit) -> None:
        page: Any = visit.page
        page.goto(visit.address)
        doors = page.locator("h2 a.reference")
        titles = []
        for number in range(doors.count()):
            doors.nth(number).click()
            titles.append(page.title())
            page.go_back()
        assert titles[0].startswith("Findings") and titles[1].startswith("What will it take on my card?")
        assert len(titles) == 3
        page.goto(f"{visit.address}search.html?q=reserved")
        page.locator("#search-results li a", has_text="What will it take").first.click()
        assert page.title().startswith("What will it take on my card?")
        assert visit.errors == []

    def test_it_follows_the_light(self, visit: Visit) -> None:
        visit.page.goto(visit.address)
        background = "getComputedStyle(document.body).backgroundColor"
        colours = []
        for scheme in ("light", "dark"):
            visit.page.emulate_media(color_scheme=scheme)
            colours.append(visit.page.evaluate(background))
        assert colours[0] != colours[1]
