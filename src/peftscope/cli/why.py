"""``peftscope why`` and ``peftscope oom``: what two runs differ by, and what an out-of-memory error was about."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftscope.cli.console import FITS, print_json, wide_console
from peftscope.cli.memory import AsJson, Gpus, MethodName, peaks_of_question, run_options
from peftscope.errors import InputError, Problem, close_match, needs, raise_any
from peftscope.memory.base import Model, describe_model
from peftscope.memory.question import BESIDE_OPTIONS, METHOD_OPTIONS, OPTIONS, Question, ask, options_of
from peftscope.methods import METHODS
from peftscope.spec import RunSpec

if TYPE_CHECKING:
    from peftscope.hardware.cards import Gpu

app = typer.Typer()
_settings = typer.Typer(add_completion=False)

SharedModel = Annotated[str | None, typer.Option("--model", help="A preset, a config.json, or a hub id.")]
GpuName = Annotated[str | None, typer.Option(help="For its CUDA context: rtx4090, a100, ..., or 24GiB.")]
UsageError: Any = typer.BadParameter.__mro__[1]
"""The error that typer raises for wrong words: newer versions carry a click of their own."""
SPEC_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Setting:
    """The subject of a question: a model, or None if none was named, and options as ``ask`` takes them."""

    model: Model | str | None
    options: dict[str, Any]
    gpus: int | None = None


@_settings.command()
@run_options(*OPTIONS)
def _parse(method: str = typer.Argument("lora"), model: SharedModel = None, **options: Any) -> dict[str, Any]:
    """Return the words of a setting as options."""
    return {"model": model, "method": method, **options}


def read_setting(text: str, shared: Mapping[str, Any], gpus: int) -> Setting | None:
    """Returns what a text stands for: a setting, a spec file or a trainer's file; None: none of these, as a model.

    ``shared`` and ``gpus`` are what the command line says, for what a trainer's file does not say.

    Raises:
        InputError: The text is a setting with a mistake, or a file that is not a spec.
    """
    first = text.split(maxsplit=1)[0] if text.strip() else ""
    if first in METHODS or first.startswith("--"):
        return _of_words(text)
    if Path(text).suffix in SPEC_SUFFIXES and os.path.exists(text):
        return _of_file(Path(text), shared, gpus)
    if " " in text.strip():
        raise InputError(Problem(text, f"{first!r} is not a method", close_match(first, METHODS)))
    return None


def _of_words(text: str) -> Setting:
    try:
        command = typer.main.get_command(_settings)
        found = command.main(shlex.split(text), prog_name="setting", standalone_mode=False)
    except UsageError as error:
        raise InputError(Problem(text, error.format_message(), "see peftscope why --help")) from None
    except ValueError as error:
        raise InputError(Problem(text, f"cannot be read: {error}")) from None
    if not isinstance(found, dict):  # it was asked for help
        raise InputError(Problem(text, "is not a setting", 'for example "qlora --rank 64"'))
    model = found.pop("model")
    return Setting(model, {name: value for name, value in found.items() if value is not None})


def _of_file(path: Path, shared: Mapping[str, Any], gpus: int) -> Setting | None:
    from peftscope.sizing.reading import read_content

    values = read_content(path)
    if isinstance(values, dict) and "model_type" in values:
        return None  # the config.json of a model
    fields = set(RunSpec.model_fields).union(*(method.model_fields for method in METHODS.values()))
    if isinstance(values, dict) and "method" not in values and not values.keys() <= fields:
        from peftscope.sizing.config_file import question_of, read_config

        said = read_config(path, {})
        unsaid = {name: value for name, value in shared.items() if name not in said.keys}
        reading = read_config(path, _fitting(unsaid, said.options["method"]))
        question = question_of(reading, gpus=said.cards or (gpus if gpus > 1 else None))
        beside = {name: getattr(question.beside, name) for name in BESIDE_OPTIONS}
        return Setting(question.model, options_of(question.spec) | beside, question.gpus)
    from peftscope.planning.resolve import spec_from

    if isinstance(values, dict) and isinstance(values.get("method"), dict):
        values = {**values, "device": "cuda"}
    spec = spec_from(values, path, "cuda")
    return Setting(spec.model, options_of(spec), spec.shards)


def _fitting(shared: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Returns the options that were given, without those of other methods; `ask` refuses a method that is not known."""
    fields = METHODS[method].model_fields if method in METHODS else {}
    given = {name: value for name, value in shared.items() if value is not None}
    return {name: value for name, value in given.items() if name not in METHOD_OPTIONS or name in fields}


def asked(setting: Setting, model: str | None, shared: Mapping[str, Any], gpu: Gpu | None, gpus: int) -> Question:
    """Returns the question about a setting. Its own words win over what is shared.

    Raises:
        InputError: No model was named, or an option is wrong.
    """
    name = setting.model or model
    if name is None:
        raise InputError(Problem("model", "none given", "peftscope why llama-2-7b qlora lora, or --model llama-2-7b"))
    common = _fitting(shared, setting.options["method"])
    base = name if isinstance(name, Model) else describe_model(name)
    return ask(base, common | setting.options, gpu=gpu, gpus=setting.gpus or gpus)


@app.command(rich_help_panel=FITS)
@run_options(*OPTIONS)
@needs("simulate")
def why(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] A [B]",
            help='A and B: settings ("qlora --rank 64"), or spec files. Without B: why a phase has the peak.',
        ),
    ],
    model: SharedModel = None,
    gpu: GpuName = None,
    gpus: Gpus = 1,
    figure: Annotated[Path | None, typer.Option(help="Draw the difference as a waterfall, as PNG.")] = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Say why A has another peak than B, term by term; or why a phase of A has the peak.

    Options hold for both, unless a setting says otherwise.
    """
    from peftscope.hardware.cards import find_gpu
    from peftscope.sizing.why import compare, explain

    found = [read_setting(word, options, gpus) for word in words]
    if found[0] is None and len(found) > 1 and model is None:
        model, found, words = words[0], found[1:], words[1:]
    unknown = [word for word, setting in zip(words, found, strict=True) if setting is None]
    raise_any(Problem(word, "is no setting or spec file", 'as in "qlora --rank 64"') for word in unknown)
    if len(found) > 2:
        raise InputError(Problem("why", f"compares two settings (got {len(found)})", 'quote each: "qlora --rank 64"'))
    card = None if gpu is None else find_gpu(gpu)
    questions = [asked(setting, model, options, card, gpus) for setting in found if setting]
    runs = [(question, peaks_of_question(question)) for question in questions]
    answer = explain(runs[0]) if len(runs) == 1 else compare(runs[0], runs[1])
    if figure:
        with needs("report"):
            from peftscope.report.memory import draw_waterfall

            draw_waterfall(answer, figure)
    if as_json:
        print_json(asdict(answer))
        return
    from peftscope.cli.show import show_why

    show_why(answer, wide_console())


@app.command(rich_help_panel=FITS)
@run_options(*OPTIONS)
@needs("simulate")
def oom(
    model: Annotated[str, typer.Argument(help="A preset, a config.json, a hub id, or a spec file.")],
    error: Annotated[str, typer.Argument(help="torch's whole message, a file that has it, or - for stdin.")] = "-",
    method: MethodName = None,
    gpu: GpuName = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Say what torch's out-of-memory error was about: which allocations match, and the smallest changes that fit.

    What fits is known if the message names the card's capacity. Options replace what a file says.
    """
    from peftscope.cli.show import show_diagnosis
    from peftscope.hardware.cards import find_gpu
    from peftscope.sizing.oom import diagnose, read_refusal

    refusal = read_refusal(_error_text(error))
    given = {name: value for name, value in options.items() if value is not None}
    setting = read_setting(model, options, 1)
    if setting and method:
        raise InputError(Problem("--method", f"{model} says it already", "leave it out"))
    setting = setting or Setting(model, {"method": method or "lora"})
    card = None if gpu is None else find_gpu(gpu)
    answer = diagnose(asked(replace(setting, options=setting.options | given), None, {}, card, 1), refusal)
    if as_json:
        print_json(asdict(answer))
        return
    show_diagnosis(answer, wide_console())


def _error_text(error: str) -> str:
    if error == "-":
        if sys.stdin.isatty():
            raise InputError(Problem("error", "no text given", "give it as an argument, a file, or on stdin"))
        return sys.stdin.buffer.read().decode(errors="replace")
    with suppress(OSError, ValueError):  # a text may be too long for a path
        if Path(error).is_file():
            return Path(error).read_text(encoding="utf-8", errors="replace")
    return error
