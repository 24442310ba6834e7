"""``peftscope contribute``: packs what a card measured for a pull request."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from peftscope.cli.console import OWN, wide_console
from peftscope.cli.rules import ExperimentName
from peftscope.errors import needs

app = typer.Typer()

MOST_SHOWN = 4
"""The different texts of one field that are shown in words; of more, the number follows."""


@app.command(rich_help_panel=OWN)
@needs("report")
def contribute(
    experiment: ExperimentName = "gpu-check",
    yes: Annotated[bool, typer.Option("--yes", help="Write the file; without it, it is only shown.")] = False,
) -> None:
    """Pack what an experiment measured on your card into one file for a pull request, without names and paths."""
    from peftscope.analysis.contributed import pack, write
    from peftscope.report.tables import readable_card_runs

    console = wide_console()
    for contribution in pack(experiment):
        console.print(f"{contribution.card}: {len(contribution.records)} runs of {experiment}", markup=False)
        console.print(_as_table(readable_card_runs(contribution.runs())))
        table = Table("every text of the file, by field", "", box=None)
        for field, texts in _texts(contribution.content()).items():
            more = f" and {len(texts) - MOST_SHOWN} more" if len(texts) > MOST_SHOWN else ""
            table.add_row(escape(field), escape(", ".join(texts[:MOST_SHOWN])) + more)
        console.print(table)
        console.print("Everything else in it is a number, a truth value or null.")
        if yes:
            console.print(f"Written: {write(contribution)}", soft_wrap=True)
        else:
            console.print(f"Nothing was written. With --yes: {contribution.path()}", soft_wrap=True)


def _texts(content: Any, field: str = "") -> dict[str, list[str]]:
    """Returns the different texts of JSON content by the path of their field, without the numbers of lists."""
    if not isinstance(content, dict | list):
        return {field: [content]} if isinstance(content, str) else {}
    found: dict[str, list[str]] = {}
    for name, value in content.items() if isinstance(content, dict) else [("", value) for value in content]:
        for key, texts in _texts(value, f"{field}.{name}".strip(".")).items():
            found[key] = list(dict.fromkeys([*found.get(key, []), *texts]))
    return found


def _as_table(frame: Any) -> Table:
    table = Table(*map(escape, frame.columns), box=None)
    table.columns[0].no_wrap = True
    for row in frame.astype(str).itertuples(index=False):
        table.add_row(*map(escape, row))
    return table
