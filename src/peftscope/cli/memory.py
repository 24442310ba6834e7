"""``peftscope memory`` and ``peftscope fit``: what a run takes, and what fits on a card."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic import BaseModel
from rich.console import Console

from peftscope.cli.console import FITS, print_json, wide_console, with_progress
from peftscope.errors import InputError, Problem, how_to_install, needs
from peftscope.execution.libraries import offline, quiet_libraries
from peftscope.files.content import parse_json
from peftscope.memory.base import describe_model
from peftscope.memory.question import DEFAULTS, OPTIONS, Beside, Question, ask, preset_or_modules
from peftscope.methods import METHODS
from peftscope.spec import RunSpec

if TYPE_CHECKING:
    from peftscope.memory.answer import Peaks
    from peftscope.sizing.changes import Remedy

app = typer.Typer()

Command = TypeVar("Command", bound=Callable[..., Any])

MemoryModel = Annotated[str | None, typer.Argument(help="A preset (llama-2-7b, ...), a config.json, or a hub id.")]
MethodName = Annotated[str | None, typer.Option(help="full, lora, qlora, dora, adalora, loftq, ...; default lora.")]
Gpus = Annotated[int, typer.Option(help="Shard weights, gradients and states over so many cards.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs; the keys are stable.")]

TIME_PANEL = "Time and price"
"""The heading of the options about time."""
TIME: dict[str, Any] = {
    "examples": Annotated[int | None, typer.Option(help="In an epoch: its time.", rich_help_panel=TIME_PANEL)],
    "epochs": Annotated[float | None, typer.Option(help="Of the training; default 1.", rich_help_panel=TIME_PANEL)],
    "price_per_hour": Annotated[float | None, typer.Option(help="Of one card: the cost.", rich_help_panel=TIME_PANEL)],
    "tflops": Annotated[float | None, typer.Option(help="Of the card: dense, in bf16.", rich_help_panel=TIME_PANEL)],
    "bandwidth": Annotated[float | None, typer.Option(help="Of its memory, in GB/s.", rich_help_panel=TIME_PANEL)],
}
"""The options about time."""

PANEL = "Fields of the run and its method"
"""The heading of their options in the help."""
FLAGS = {"packing": "--packed/--padded", "as_trainer": "--as"}
"""Names of options that differ from their field's."""
SAID_DEFAULTS = DEFAULTS | {
    "eval_batch_size": "that of --batch-size",
    "loss_path": "hf, as in a plain script; in runs of this project response_only",
    "keep_logits": "on with loss_path hf",
    "modules_to_save": "none",
    "options": "PEFT's; as JSON",
}
"""The help's text of defaults that are not the field's own."""
NOT_OF_FIT = ("optimizer_implementation", "eval_batch_size", "eval_gathers_logits", "eval_accumulation_steps")
"""Options that the command ``fit`` does not have: it asks about training alone."""
READERS: dict[str, Callable[[str | None], Any]] = {
    **dict.fromkeys(("targets", "feedforward", "modules_to_save"), preset_or_modules),
    "options": lambda text: text and parse_json(text, "options"),
}
"""The parsers of options that are no plain values."""


def run_options(*names: str) -> Callable[[Command], Command]:
    """Returns a decorator that gives a command an option for each field of a run or a method that is named.

    The command takes them as ``**options``; None: not given.
    """

    def add(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        kinds = {name: TIME[name] if name in TIME else _option(name) for name in names}
        keyword = inspect.Parameter.KEYWORD_ONLY
        options = [inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in kinds.items()]
        command.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        return command

    return add


@cache  # four commands have it
def _option(name: str) -> Any:
    """Returns a field's option as typer wants it; what values it takes is checked with the rest of the run."""
    owners: tuple[type[BaseModel], ...] = (RunSpec, *METHODS.values(), Beside)
    fields = [owner.model_fields[name] for owner in owners if name in owner.model_fields]
    kinds = [kind for kind in get_args(fields[0].annotation) if kind is not type(None)]
    annotation = kinds[0] if fields[0].default is None and len(kinds) == 1 else fields[0].annotation
    said = [fields[0].description or ""]
    if get_origin(annotation) is Literal:
        said.append(f"one of {', '.join(get_args(annotation))}")
    defaults = {SAID_DEFAULTS.get(name, field.default) for field in fields}
    default = next(iter(defaults))
    if len(defaults) == 1 and default is not None:  # else it differs from method to method, or there is none
        said.append(f"default {('off', 'on')[default] if isinstance(default, bool) else default}")
    flag = name.replace("_", "-")
    names = FLAGS.get(name, f"--{flag}/--no-{flag}" if annotation is bool else "")
    return Annotated[
        (annotation if annotation in (bool, int, float) else str) | None,
        typer.Option(
            *([names] if names else []), help="; ".join(said), callback=READERS.get(name), rich_help_panel=PANEL
        ),
    ]


@app.command("memory", rich_help_panel=FITS)
@run_options(*OPTIONS, *TIME)
@needs("simulate")
def memory_command(
    model: MemoryModel = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A file of axolotl, LLaMA-Factory, TRL, alignment-handbook or torchtune, or an adapter_config.json. "
            "Other options replace what it says. With --gpu, the exit code is 1 if it does not fit."
        ),
    ] = None,
    method: MethodName = None,
    response_len: Annotated[int | None, typer.Option(help="Positions with a loss; default half of --seq-len.")] = None,
    gpu: Annotated[str | None, typer.Option(help="The card: whether it fits. rtx4090, a100, ..., or 24GiB.")] = None,
    gpus: Annotated[int | None, typer.Option(help="Shard weights, gradients and states over so many cards.")] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Run the step itself on tensors without data.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Every term with its formula and source.")] = False,
    depth: Annotated[int, typer.Option(help="Levels of the tree of modules.")] = 0,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Say what a training run takes on a card, without one: allocated, reserved and device memory.

    A method or a model without a closed form is always simulated. With --gpu, say whether it fits, and how long a step
    takes. The longest batch of your data decides: give its length as --seq-len.
    """
    from peftscope.cli.show import show_answer, show_headroom, show_reading, show_remedies, show_time
    from peftscope.hardware.cards import find_gpu
    from peftscope.memory.answer import answer_of
    from peftscope.sizing.duration import Schedule, duration, time_json

    schedule = Schedule(**{name: options.pop(name) for name in TIME})
    card, given = None if gpu is None else find_gpu(gpu), {"method": method, **options}
    schedule.speed(card)
    reading = None
    if config:
        from peftscope.sizing.config_file import question_of, read_config

        reading = read_config(config, given, model)
        question = question_of(reading, responses=response_len, gpu=card, gpus=gpus)
    elif model:
        question = ask(describe_model(model), given, responses=response_len, gpu=card, gpus=1 if gpus is None else gpus)
    else:
        raise InputError(Problem("model", "none given", "peftscope memory llama-2-7b, or --config FILE"))
    peaks = peaks_of_question(question, simulate=simulate)
    simulate = simulate or not question.has_closed_form
    answer = answer_of(question, peaks, "simulation" if simulate else "formula")
    fits = card.fits(answer.least_device_bytes, answer.peak_device_bytes) if card else None
    time = duration(question, schedule)
    remedies: list[Remedy] = []
    left = ""
    if card and fits and fits != "yes":
        from peftscope.sizing.changes import Asked, remedies_of, untested
        from peftscope.sizing.needs import Needs

        asked = Asked(question, given, response_len, gpus, reading)
        remedies = remedies_of(asked, peaks, Needs(card))
        left = untested(asked, fits, peaks, card.usable_bytes)
    if as_json:
        more: dict[str, Any] = {"config": reading.to_json()} if reading else {}
        if card:
            more |= card.room(answer.least_device_bytes, answer.peak_device_bytes) | time_json(time)
            more["remedies"] = [asdict(remedy) for remedy in remedies]
        print_json({**answer.to_json(), **more})
    else:
        console = wide_console()
        if reading:
            show_reading(reading, console)
        show_answer(answer, console, explain=explain, depth=depth)
        if card:
            show_headroom(card, answer, console)
            show_time(time, card, console)
        show_remedies(remedies or filter(None, [left]), console)
    if reading and fits == "no":
        raise typer.Exit(1)


@app.command(rich_help_panel=FITS)
def models(as_json: AsJson = False) -> None:
    """List the models that are known by name: size, kind, and the public code that lists their shape."""
    from peftscope.cli.show import show_models
    from peftscope.models.presets import PRESETS

    if as_json:
        rows = [
            {
                "name": name,
                "parameters": preset.parameters,
                **preset._asdict(),
                "shape": preset.shape.model_dump(),
                "vision": preset.vision and preset.vision._asdict(),
            }
            for name, preset in PRESETS.items()
        ]
        print_json(rows)
        return
    show_models(wide_console())


@app.command(rich_help_panel=FITS)
@run_options(*(name for name in (*OPTIONS, *TIME) if name not in NOT_OF_FIT))
@needs("simulate")
def fit(
    model: Annotated[str | None, typer.Argument(help="A preset, a config.json, or a hub id.")] = None,
    gpu: Annotated[str, typer.Option(help="rtx4090, a100, ..., or its memory, as in 24GiB.")] = ...,  # type: ignore[assignment]
    models: Annotated[str | None, typer.Option(help="Several models, separated by commas.")] = None,
    methods: Annotated[str | None, typer.Option("--methods", "--method", help="Names, by commas; default all.")] = None,
    gpus: Gpus = 1,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Say which methods fit on a card, with what is left, the largest sizes, and what to do where nothing fits."""
    from peftscope.hardware.cards import find_gpu
    from peftscope.sizing.duration import Schedule
    from peftscope.sizing.fit import fit_methods, known_methods

    names = [name.strip() for name in f"{model or ''},{models or ''}".split(",") if name.strip()]
    if not names:
        raise InputError(Problem("model", "none given", "peftscope fit --gpu 24GiB llama-2-7b"))
    card, chosen = find_gpu(gpu), known_methods(methods)
    found = [describe_model(name) for name in names]
    schedule = Schedule(**{name: options.pop(name) for name in TIME})
    asked = fit_methods(found, chosen, options, card, gpus, schedule)
    fits = list(with_progress(asked, len(found) * len(chosen), "fitting"))
    if as_json:
        print_json([one.to_json() for one in fits])
        return
    from peftscope.cli.show import show_fits

    console = wide_console()
    show_fits(fits, card, console)
    others = [name for name, method in METHODS.items() if method.trains and not method.closed_form]
    if others and not methods:
        console.print(f"simulated when asked for by --methods, because they have no closed form: {', '.join(others)}")


@app.command(rich_help_panel=FITS)
@run_options(*OPTIONS, "examples", "epochs")
def cheapest(
    model: Annotated[str, typer.Argument(help="A preset, a config.json, or a hub id.")],
    method: MethodName = None,
    prices: Annotated[str | None, typer.Option(help="As in rtx4090=0.4.", rich_help_panel=TIME_PANEL)] = None,
    gpus: Gpus = 1,
    figure: Annotated[Path | None, typer.Option(help="Draw the cost over the time.")] = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Say on which known card a run is cheapest: the cards that it fits on, with its time and cost on each."""
    from peftscope.sizing.cheapest import on_cards, read_prices
    from peftscope.sizing.duration import Schedule

    priced, schedule = read_prices(prices), Schedule(options.pop("examples"), options.pop("epochs"))
    if figure and not priced:
        raise InputError(Problem("figure", "shows costs, and no prices are given", "give --prices"))
    found = on_cards(ask(describe_model(model), {"method": method, **options}, gpus=gpus), schedule, priced)
    if figure:
        with needs("report"):
            from peftscope.report.memory import draw_cheapest

            draw_cheapest(found, figure)
    if as_json:
        print_json([one.to_json() for one in found])
        return
    from peftscope.cli.show import show_cheapest

    show_cheapest(found, wide_console())


def peaks_of_question(question: Question, *, simulate: bool = False) -> Peaks:
    """Returns the peaks by the closed form; by simulation where there is none, or where that is asked for."""
    from peftscope.memory.answer import peaks_by_formula

    if question.has_closed_form and not simulate:
        return peaks_by_formula(question)
    if not simulate and find_spec("torch") is None:
        model, method = question.model, question.spec.method.name
        why = f"{method} has none" if question.spec.method.closed_form is None else model.why_no_shape
        message = f"no closed form: {why}; torch, which simulates it, is not installed"
        raise InputError(Problem("model" if model.shape is None else "method", message, how_to_install("simulate")))
    with Console(stderr=True).status("simulating two training steps, some seconds"), quiet_libraries():
        from peftscope.memory.simulate import peaks_by_simulation

        with offline():
            return peaks_by_simulation(question)
