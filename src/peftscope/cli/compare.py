"""``peftscope compare``: is this difference real? Two sides, or many systems at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peftscope.cli.console import TRUE, print_json, wide_console
from peftscope.errors import InputError, Problem, needs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peftscope.analysis.ranking import Ranking, Trust
    from peftscope.analysis.scored import Scored

app = typer.Typer()


@app.command(rich_help_panel=TRUE)
@needs("report")
def compare(
    a: Annotated[str, typer.Argument(help="Run ids, folders or files, with commas; STUDY:ARM; with --all STUDY.")],
    b: Annotated[str | None, typer.Argument(help="The same, to compare with.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Compare all systems in A with each other.")] = False,
    margin: Annotated[str | None, typer.Option(help="Of sameness: 2pp, 2.5%gain (of the task gain), or 0.02.")] = None,
    metric: Annotated[str | None, typer.Option(help="The score, as the files name it; default: the main one.")] = None,
    base: Annotated[str | None, typer.Option(help="For a margin in %gain: runs that learned nothing, as A.")] = None,
    seed_spread: Annotated[str | None, typer.Option(help="With --all: the deviation between seeds, as 1pp.")] = None,
    items: Annotated[int | None, typer.Option(min=2, help="With --all: the items behind each single number.")] = None,
    figure: Annotated[Path | None, typer.Option(help="With --all: draw the ranking into this PNG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs; the keys are stable.")] = False,
) -> None:
    """Say whether a difference is real: its interval, chance, sameness within a margin, and what would decide.

    Reads runs of the suite, lm-eval's samples_*.jsonl, results of PEFT's method comparison, and CSV files with a score
    and the columns name, seed or item.
    """
    from peftscope.analysis.scores import read_scores

    console = wide_console()
    if every:
        for name, value in (("B", b), ("--margin", margin), ("--base", base)):
            if value is not None:
                raise InputError(Problem(name, "does not go with --all", "leave it out"))
        _rank(read_scores(a, metric), seed_spread, items, figure, None if as_json else console)
        return
    if b is None:
        raise InputError(Problem("B", "is missing", "name what A is compared with, or give --all"))
    for name, given in (("--seed-spread", seed_spread), ("--items", items), ("--figure", figure)):
        if given is not None:
            raise InputError(Problem(name, "goes with --all only", "leave it out"))
    from peftscope.analysis.paired import check_spread, pair
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
        console.print(line, soft_wrap=True, markup=False)


def _rank(
    runs: Sequence[Scored], seed_spread: str | None, items: int | None, figure: Path | None, console: Console | None
) -> None:
    """Ranks systems for each spread of seeds that is asked for; prints JSON if there is no console."""
    from peftscope.analysis.ranking import STATED_SPREADS, rank, trust
    from peftscope.analysis.scored import FRACTION, by_system, unit_of
    from peftscope.report.comparison import amount, draw_ranking, ranking_json

    systems, unit = by_system(runs), unit_of(runs)
    has_single = min(map(len, systems.values())) == 1
    spreads: list[float | None] = [None]
    if seed_spread is not None:
        spreads = [amount(seed_spread, "--seed-spread", unit)]
    elif has_single and unit == FRACTION:
        spreads = [spread for spread in STATED_SPREADS if spread or items or runs[0].has_items]
    rankings = {spread: rank(systems, spread, items) for spread in spreads}
    chances = {s: None if s is None and has_single else trust(ranking) for s, ranking in rankings.items()}
    if console:
        counts = {name: len(of_one) for name, of_one in systems.items()}
        _print_rankings(rankings, chances, counts, unit, console)
        if has_single and seed_spread is None:
            told = "the range above is no estimate" if len(spreads) > 1 else "a ranking may be chance for all we know"
            said = f"One run of a system does not show how far seeds spread: {told}. --seed-spread gives yours."
            console.print(said, soft_wrap=True)
    else:
        rows = [ranking_json(ranking, spread, unit, chances[spread]) for spread, ranking in rankings.items()]
        print_json(rows)
    if figure:
        draw_ranking(rankings[spreads[-1]], unit, figure)


def _print_rankings(
    rankings: dict[float | None, Ranking],
    chances: dict[float | None, Trust | None],
    counts: dict[str, int],
    unit: str,
    console: Console,
) -> None:
    """Prints the places of the last ranking, and what each one says."""
    from peftscope.report.comparison import spoken, spoken_groups, summarise_ranking

    last, ranking = list(rankings.items())[-1]
    places = Table("place", "system", "runs", "mean over runs", "standard error", "places it can have", box=None)
    for place, (name, (best, worst)) in enumerate(zip(ranking.systems, ranking.places, strict=True), 1):
        score, error = spoken(ranking.scores[place - 1], unit, "%"), spoken(ranking.errors[place - 1], unit)
        places.add_row(str(place), escape(name), str(counts[name]), score, error, f"{best} to {worst}")
    console.print(places)
    told = "" if last is None else f", if single runs spread by {spoken(last, unit)} between seeds"
    console.print(f"Groups in which no two can be told apart{told}: {spoken_groups(ranking)}.", soft_wrap=True)
    rows = [
        {"spread of seeds": "as it was seen" if spread is None else spoken(spread, unit)}
        | summarise_ranking(of_spread, chances[spread])
        for spread, of_spread in rankings.items()
    ]
    summary = Table(*rows[0], box=None)
    for row in rows:
        summary.add_row(*row.values())
    console.print("", summary, sep="\n")
