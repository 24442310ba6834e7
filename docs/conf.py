"""Settings of Sphinx for ``make site``. The site's folders are the repository's, so that links between files hold."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from pydantic import BaseModel
from pygments.lexers.special import TextLexer
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.highlighting import lexers
from sphinx.util.osutil import relative_uri

ROOT = Path(__file__).parents[1]
REPORTS = "reports/published"
REPORTS_HERE = "<!-- reports -->"
TITLE = re.compile("<title>(.*?)(?: - peftscope)?</title>")

project = "peftscope"
author = "the peftscope authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = [
    "*.md",
    "docs/*.md",
    "docs/hubs/*.md",
    "experiments/*.md",
    "results/published/*.md",
    *(f"{REPORTS}/{page}.md" for page in ("findings", "studies", "chapter")),
]
exclude_patterns = ["README.md", ".*", "resources", "results/[!p]*", "site", "src", "tests"]
"""README.md is shown in index.md; the folders are left out because they take long to look through."""
myst_heading_anchors = 3
lexers["mermaid"] = TextLexer()
"""Hosts of code draw such a block. What draws it in a page comes from another host, so the site shows its text."""
add_module_names = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"

html_theme = "furo"
html_title = "peftscope"
html_favicon = "theme/icon.svg"
html_static_path = ["theme/site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
templates_path = ["theme"]
html_sidebars = {"**": ["sidebar/brand.html", "sidebar/search.html", "sidebar/scroll-start.html", "beside.html"]}
html_sidebars["**"] += ["sidebar/navigation.html", "sidebar/scroll-end.html"]


def keep_links(app: Sphinx, document: nodes.document) -> None:
    """Keeps links to files that are no page of Sphinx's, and copies these files to the same place in the site.

    Links to ``claims.md`` go to ``claims.html``, which says the same with figures and a search.
    """
    for link in [*document.findall(addnodes.download_reference), *document.findall(addnodes.pending_xref)]:
        page, target = app.env.docname, link["reftarget"]
        if isinstance(link, addnodes.download_reference):
            path = (ROOT / page).parent.joinpath(target).resolve().relative_to(ROOT)
            (app.outdir / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, app.outdir / path)
        elif target == f"{REPORTS}/claims":
            target = relative_uri(page, f"{target}.html")
            target += f"#{link['reftargetid']}" if link["reftargetid"] else ""
        else:
            continue
        link.replace_self(nodes.reference("", "", *link.children, refuri=target))


def list_reports(app: Sphinx, page: str, source: list[str]) -> None:
    """Writes a link to every report where a page asks for them."""
    if REPORTS_HERE in source[0]:
        paths = sorted(ROOT.glob(f"{REPORTS}/*/report.html"))
        titles = [f"- [{TITLE.search(path.read_text())[1]}](../../{path.relative_to(ROOT)})" for path in paths]
        source[0] = source[0].replace(REPORTS_HERE, "\n".join(titles))


def copy_reports(app: Sphinx) -> None:
    """Copies the page of claims and the reports, each one file, to the same place in the site."""
    shutil.copytree(ROOT / REPORTS, app.outdir / REPORTS, ignore=shutil.ignore_patterns("*.md"), dirs_exist_ok=True)


def list_fields(app: Sphinx, what: str, name: str, described: Any, options: Any, lines: list[str]) -> None:
    """Adds the fields of a spec to its docstring, each with its description and its default."""
    if what == "class" and issubclass(described, BaseModel):
        for field, info in described.model_fields.items():
            if info.description:
                default = "" if info.is_required() else f" Default: ``{info.default!r}``."
                lines.append(f"* ``{field}``: {info.description}.{default}")


def leave_out_fields(app: Sphinx, what: str, name: str, described: Any, *_: Any) -> tuple[str, None] | None:
    """Returns an empty signature for a spec or a record, whose fields would fill a screen."""
    return ("", None) if what == "class" and issubclass(described, BaseModel) else None


def setup(app: Sphinx) -> None:
    """Connects these steps; links are kept before Sphinx gives downloads addresses of its own."""
    app.connect("builder-inited", copy_reports)
    app.connect("source-read", list_reports)
    app.connect("doctree-read", keep_links, priority=400)
    app.connect("autodoc-process-docstring", list_fields)
    app.connect("autodoc-process-signature", leave_out_fields)
