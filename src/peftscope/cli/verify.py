"""The command that runs published runs again and says whether they give the same."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from peftscope.cli.console import PUBLISHED, wide_console
from peftscope.errors import InputError, Problem, needs
from peftscope.layout import how_to_run
from peftscope.words import spoken_time

app = typer.Typer()


@app.command(rich_help_panel=PUBLISHED)
@needs("train")
def verify(
    experiments: Annotated[list[str] | None, typer.Argument(help="Published experiments; default: all.")] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="How many runs, drawn at random; default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
) -> None:
    """Run published runs again, and say which of their numbers come out the same to the last digit.

    Another processor, or other versions, may give other last digits: this is said, and is no failure.
    """
    from peftscope.execution.verify import COMPARED, Repeat, choose_published, lacks_start, repeat_runs

    chosen = choose_published(experiments or [], runs, seed)
    console, screen = wide_console(), Console(stderr=True, highlight=False)
    table = Table("run", *COMPARED, "made on", box=None)
    done: list[Repeat] = []

    def cell(repeat: Repeat, name: str) -> str:
        if name not in repeat.equal:
            return "-"
        if repeat.equal[name]:
            return "equal"
        return f"within {repeat.largest[name]:.1e}" if name in repeat.largest else "other"

    if lacking := [entry for entry in chosen if lacks_start(entry[1])]:
        said = f"{len(lacking)} of {len(chosen)} runs start from others whose weights are not in the store"
        chosen = [entry for entry in chosen if entry not in lacking]
        if not chosen:
            remedy = f"remove them and those others from results/runs, then {how_to_run(lacking[0][0])}"
            raise InputError(Problem(", ".join(sorted({name for name, _ in lacking})), said, remedy))
        screen.print(f"{said}, and are left out", soft_wrap=True)
    screen.print(f"{len(chosen)} runs to repeat")
    try:
        for repeat in repeat_runs(chosen):
            done.append(repeat)
            changed = ", ".join(f"{name}: {change}" for name, change in repeat.elsewhere.items())
            table.add_row(repeat.run, *(cell(repeat, name) for name in COMPARED), changed or "the same")
            left = sum(each.seconds for each in done) / len(done) * (len(chosen) - len(done))
            verdict = "equal" if repeat.is_equal else "differs"
            screen.print(f"{len(done)}/{len(chosen)} {repeat.run}: {verdict} (about {spoken_time(left)} to go)")
    finally:
        if done:
            console.print(table)
    equal, failed = sum(repeat.is_equal for repeat in done), [repeat for repeat in done if repeat.is_failure]
    moved = len(done) - equal - len(failed)
    console.print(
        f"{equal} of {len(done)} runs are equal in everything that both have"
        + (f"; {moved} differ, made on another machine or with other versions" if moved else "")
        + (f"; {len(failed)} differ although the machine and the versions are the same" if failed else "")
    )
    sys.exit(bool(failed))
