"""Builds the site: ``make site``. Its folders are those of the repository, so that links between files stay as they are."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.osutil import relative_uri

ROOT = Path(__file__).parents[1]
REPORTS = Path("reports/published")

project = "peftscope"
author = "the peftscope authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = ["index.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md", "CHANGELOG.md", "docs/*.md"]
include_patterns += ["experiments/README.md", "results/published/README.md", "reports/published/findings.md"]
exclude_patterns = [".*", "site", "src", "tests", "resources", "results/runs"]
"""Folders that are never looked into; all but the first for speed alone."""
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"

html_theme = "furo"
html_title = "peftscope"
html_static_path = ["theme/site.css"]
html_css_files = ["site.css"]
html_copy_source = False
templates_path = ["theme"]
html_sidebars = {
    "**": [f"sidebar/{part}.html" for part in ("brand", "search", "scroll-start")]
    + ["pages.html"]
    + [f"sidebar/{part}.html" for part in ("navigation", "scroll-end")]
}
html_context = {
    "studies": [
        (path.relative_to(ROOT).as_posix(), re.search("<title>(.*?)( - peftscope)?</title>", path.read_text())[1])
        for path in sorted((ROOT / REPORTS).glob("*/report.html"))
    ]
}


def keep_links(app: Sphinx, doctree: nodes.document) -> None:
    """Keeps links to files that are no page of Sphinx's, and puts these files beside the pages.

    ``claims.md`` and ``claims.html`` say the same: links to the first go to the second.
    """
    for node in list(doctree.findall(lambda node: node.get("reftype") == "myst" if isinstance(node, nodes.Element) else False)):
        page = node["refdoc"]
        if isinstance(node, addnodes.download_reference):
            path = (ROOT / page).parent / node["reftarget"]
            target = path.resolve().relative_to(ROOT)
            (app.outdir / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / target, app.outdir / target)
            address = node["reftarget"]
        elif node["reftarget"] == f"{REPORTS}/claims":
            address = relative_uri(page, f"{REPORTS}/claims.html") + (f"#{node['reftargetid']}" if node["reftargetid"] else "")
        else:
            continue
        node.replace_self(nodes.reference("", "", *node.children, refuri=address))


def copy_reports(app: Sphinx) -> None:
    """Copies the reports and the page of claims, each one file, to the same place in the site."""
    shutil.copytree(ROOT / REPORTS, app.outdir / REPORTS, ignore=shutil.ignore_patterns("*.md"), dirs_exist_ok=True)


def setup(app: Sphinx) -> None:
    """Connects the two steps above; the first before Sphinx gives downloads addresses of its own."""
    app.connect("builder-inited", copy_reports)
    app.connect("doctree-read", keep_links, priority=400)
