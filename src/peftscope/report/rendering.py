"""Renders pages from the templates in ``templates/``, as HTML or Markdown. No torch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from peftscope.report.tables import markdown_cell, markdown_text


def asset(name: str) -> str:
    """Returns the text of a style or a script of pages."""
    return files("peftscope.report").joinpath("templates", name).read_text(encoding="utf-8")


def rendered(template: str, **content: Any) -> str:
    """Returns a page. ``Markup`` stands in it as it is.

    Other values are escaped in HTML; in Markdown, they are brought to one line without HTML.

    Args:
        template: The name of a template, which ends in ``.html.j2`` or ``.md.j2``.
        content: The values of the template's names, all of which are needed.
    """
    is_html = template.endswith(".html.j2")
    environment = Environment(
        loader=PackageLoader("peftscope.report"),
        undefined=StrictUndefined,
        autoescape=is_html,
        finalize=None if is_html else _plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = markdown_cell
    return environment.get_template(template).render(**content)


def write_page(path: Path, template: str, **content: Any) -> Path:
    """Writes a page, as ``rendered`` gives it, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rendered(template, **content))
    return path


def _plain(value: Any) -> str:
    return value if isinstance(value, Markup) else markdown_text(str(value))
