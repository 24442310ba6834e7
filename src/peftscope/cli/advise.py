"""``peftscope advise``: what to train and how, with what every line rests on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peftscope.cli.console import FITS, print_json, wide_console
from peftscope.errors import InputError, Problem, close_match
from peftscope.files.content import LARGEST_COUNT
from peftscope.words import counted, spoken_bytes, spoken_time

if TYPE_CHECKING:
    from peftscope.report.advice.advise import Advice

app = typer.Typer()

TITLES = {"learning_rate": "learning rate", "precision": "base precision", "variants": "other methods"}
"""The names of settings that a table shows in other words."""


@app.command("advise", rich_help_panel=FITS)
def advise_command(
    model: Annotated[str, typer.Option(help="A preset (llama-3-8b, ...), a config.json, or a hub id.")],
    gpu: Annotated[str, typer.Option(help="The card: rtx4090, a100, ..., or its memory: 24GiB.")],
    examples: Annotated[int, typer.Option(help="Training examples.")],
    gpus: Annotated[int, typer.Option(min=1, help="The number of such cards.")] = 1,
    priority: Annotated[str, typer.Option(help="quality, memory, speed or retention.")] = "quality",
    seq_len: Annotated[int | None, typer.Option(min=1, help="Longest example, in tokens; default 512.")] = None,
    claims: Annotated[Path | None, typer.Option(help="A claims.json; default: your own, or ours.")] = None,
    as_trainer: Annotated[str | None, typer.Option("--as", help="Also a file for trl, axolotl, llama-factory.")] = None,
    why: Annotated[bool, typer.Option("--why", help="Every setting with its claims, and what else fits.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs; the keys are stable.")] = False,
) -> None:
    """Say which method, rank, targets and learning rate to take, what each rests on, and what the run takes."""
    from peftscope.hardware.cards import find_gpu
    from peftscope.memory.base import describe_model
    from peftscope.report.advice.advise import advise
    from peftscope.report.advice.rules import Priority, known_findings, read_rules
    from peftscope.report.advice.settings import USUAL_LENGTH, Situation
    from peftscope.sizing.trainer_file import Pasted

    for flag, word, known in (("--priority", priority, Priority), ("--as", as_trainer, Pasted)):
        if word is not None and word not in get_args(known):
            raise InputError(Problem(flag, f"unknown (got {word!r})", close_match(word, get_args(known))))
    if not 1 <= examples <= LARGEST_COUNT:
        message = f"must be from 1 to {LARGEST_COUNT:,} (got {examples})"
        raise InputError(Problem("--examples", message, "say how many there are"))
    base, card = describe_model(model), find_gpu(gpu)
    longest = seq_len or min(USUAL_LENGTH, base.max_seq_len or USUAL_LENGTH)
    asked: Any = {"priority": priority, "trainer": as_trainer}
    situation = Situation(base, card, examples, gpus, seq_len=longest, **asked)
    findings, where = known_findings(claims)
    advice = advise(situation, read_rules(), findings, where)
    if as_json:
        print_json(advice.to_json())
    else:
        show_advice(advice, wide_console(), why=why)
    raise typer.Exit(0 if advice.options else 1)


def show_advice(advice: Advice, console: Console, *, why: bool) -> None:
    """Prints the advice: what to take, what that takes, and a trainer's file; or every line with its reasons."""
    asked = advice.situation
    cards = f"{asked.gpus} × " if asked.gpus > 1 else ""
    on = f"{asked.model.name} on {cards}{asked.gpu.name}"
    console.print(f"{on}, {asked.examples:,} examples, {asked.priority} first", style="bold", markup=False)
    if not advice.options:
        console.print("[red]Nothing fits.[/]")
        for line in advice.nearest:
            console.print(f"  {line}", markup=False)
        return
    if why:
        show_reasons(advice, console)
    else:
        short = Table("", "take", "rests on", box=None)
        for row in advice.brief():
            short.add_row(*map(escape, row))
        console.print(short)
        best, lines = advice.options[0], {line.setting: line for line in advice.lines}
        spec = best.question.spec
        says = [f"{spec.batch_size} × {spec.gradient_accumulation} examples a step on a card", f"{spec.seq_len} tokens"]
        says += ["recomputation"] if spec.checkpointing else []
        says += ["Liger's loss"] if best.liger else []
        says += ["experts in 4 bits too"] if best.question.beside.quantize_moe_experts else []
        says += [counted(best.settings.value("epochs"), "epoch")]
        console.print(f"It takes {lines['peak'].text} and {lines['time'].text}: {', '.join(says)}.", soft_wrap=True)
        if best.changes:
            console.print(f"So that it fits: {advice.costs(best)}.", soft_wrap=True, markup=False)
        paste = "" if advice.file else "; --as TRAINER gives a file to paste"
        paste = "; a file to paste would have adapters on the vision tower too" if asked.model.vision else paste
        console.print(f"--why says what each rests on and what else fits{paste}.")
    if advice.file:
        console.print(f"\n{advice.file}", soft_wrap=True, markup=False, end="")


def show_reasons(advice: Advice, console: Console) -> None:
    """Prints every line with what it rests on, and the other ways in order with what each costs."""
    table = Table("", "advice", "why", "rests on", box=None, padding=(0, 1, 1, 0))
    for each in advice.lines:
        name = TITLES.get(each.setting, each.setting)
        cells = map(escape, (name, each.text, each.says, each.evidence))
        table.add_row(*cells, style="bold" if name == "method" else "")
    console.print(table)
    console.print("Ways that fit, in order of what they cost in quality, and then of your priority:")
    columns = ("", "batch", "length", "recomputed", "peak", "time", "costs in quality")
    others = Table(*columns, box=None, padding=(0, 1, 1, 0))
    for option in advice.options:
        spec, changed = option.question.spec, [name for name in option.changes if name != option.method]
        others.add_row(
            ", ".join([option.method, *changed, *(["Liger's loss"] if option.liger else [])]),
            f"{spec.batch_size} × {spec.gradient_accumulation}",
            str(spec.seq_len),
            "yes" if spec.checkpointing else "no",
            spoken_bytes(option.peak_device_bytes, 1),
            " to ".join(map(spoken_time, option.seconds)),
            escape(advice.costs(option)),
        )
    console.print(others)
    named = (name for line in advice.lines for name in line.claims if name in advice.findings)
    more = next((f"; `peftscope claims --id {name}` says more" for name in named), "")
    console.print(f"Verdicts on claims: {advice.claims_from}{more}.")
