"""``peftscope compare``: is this difference real?"""

from __future__ import annotations

from typing import Annotated

import typer

from peftscope.cli.console import TRUE, print_json, wide_console
from peftscope.errors import InputError, Problem, needs

app = typer.Typer()


@app.command(rich_help_panel=TRUE)
@needs("report")
def compare(
    a: Annotated[str, typer.Argument(help="Run ids or files, with commas, or STUDY:ARM.")],
    b: Annotated[str, typer.Argument(help="The same, to compare with.")],
    margin: Annotated[str | None, typer.Option(help="Of sameness: 2pp, 2.5%gain (of the task gain), or 0.02.")] = None,
    metric: Annotated[str | None, typer.Option(help="The score, as the files name it; default: the main one.")] = None,
    base: Annotated[str | None, typer.Option(help="For a margin in %gain: runs that learned nothing, as A.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs; the keys are stable.")] = False,
) -> None:
    """Say whether a difference is real: its interval, chance, sameness within a margin, and what would decide.

    Reads runs of the suite, lm-eval's samples_*.jsonl, and CSV files with a score and the columns name, seed or item.
    """
    from peftscope.analysis.paired import check_spread, pair
    from peftscope.analysis.scores import read_scores
    from peftscope.report.comparison import comparison_json, describe, number_and_unit, read_margin

    if margin is not None:
        number_and_unit(margin, "--margin")
    if base is not None and not (margin or "").strip().endswith("%gain"):
        remedy = "leave it out, or give --margin 2.5%gain"
        raise InputError(Problem("--base", "goes with a margin in %gain only", remedy))
    if a == b:
        raise InputError(Problem("B", f"is A itself (got {b!r})", "name what A is compared with"))
    first, second = (read_scores(text, metric) for text in (a, b))
    pairing = pair(first, second)
    check_spread(pairing)
    asked = read_margin(margin, (first, second), read_scores(base, metric) if base else None)
    if as_json:
        print_json(comparison_json(first, second, pairing, asked))
    for line in [] if as_json else describe(first, second, pairing, asked):
        wide_console().print(line, soft_wrap=True, markup=False)
