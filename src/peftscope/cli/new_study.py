"""Writes the experiment file that compares a method from a file with others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from peftscope.cli.console import OWN
from peftscope.errors import InputError, Problem, close_match, needs
from peftscope.layout import EXPERIMENTS, METHOD_FILES, check_experiment_name, shipped

if TYPE_CHECKING:
    from peftscope.planning.experiment import Study

app = typer.Typer()

REFERENCE = "lora"
"""The reference arm of the studies that this repository publishes."""

WORLDS = {"A": "sums", "B": "pronunciation", "C": "pronunciation-gemma"}
"""The study of each world, whose rates and seeds other arms have, so that the runs are its own."""

GRID = (0.1, 0.3, 1, 3, 10)
"""Learning rates to try, as multiples of a method's own: as many for every arm."""


@app.command("new-study", rich_help_panel=OWN)
@needs("train")
def new_study(
    file: Annotated[Path, typer.Argument(help="A Python file with one method; its name becomes the method's.")],
    against: Annotated[
        str,
        typer.Option(help="Methods to compare with, separated by commas; the reference is lora, or else the first."),
    ] = REFERENCE,
    model: Annotated[
        str | None,
        typer.Option(help="A name in models.yaml; default: that of the world. With toy it takes minutes."),
    ] = None,
    world: Annotated[
        str, typer.Option(help="A: sums. B: pronunciation, on real data. C: pronunciation with Gemma-3-270M.")
    ] = "A",
) -> None:
    """Write a study of your own method: equal trials, pairs of seeds, an A/A arm; and say what it costs."""
    from peftscope.methods.from_file import name_of

    name = name_of(file)
    check_experiment_name(name)
    others = [other.strip() for other in against.split(",") if other.strip()]
    study = EXPERIMENTS / f"{name}-study.yaml"
    text = study_text(file, others, model, world)
    contents = {METHOD_FILES / f"{name}.py": file.read_text(encoding="utf-8"), study: text}
    for path, content in contents.items():
        if path.is_file() and path.read_text(encoding="utf-8") != content:
            raise InputError(Problem(str(path), "is there with another content", "remove it, or rename your file"))
    trained = tried(file, model or _study_of(world)[1].get("model"))
    written = [path for path in contents if not path.is_file()]
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(contents[path], encoding="utf-8")
    # Methods are found when a process starts, so that another one must look.
    command = [sys.executable, "-m", "peftscope", "expand", study.stem, "--brief"]
    if code := subprocess.run(command, check=False).returncode:
        for path in written:  # or they would stand in the way of the mended file
            path.unlink()
        sys.exit(code)
    print(trained, *contents, sep="\n")


def tried(file: Path, model: str | None) -> str:
    """Returns what a method trains of a study's model, after it took two steps on the toy model.

    Raises:
        InputError: It cannot be built, or a step fails.
    """
    from peftscope.methods.from_file import load_file
    from peftscope.planning.experiment import read_experiment
    from peftscope.training.trial import trained_values, try_method

    model = model or str(read_experiment(shipped(EXPERIMENTS / "studies" / "base.yaml")).fixed["model"])
    method = load_file(file)[0]
    assert method is not None  # the study's text was made of it
    counted = trained_values(try_method(file, method()), model)
    said = f"{counted[0]:,} of {counted[1]:,} values" if counted else "as many values as a run will say"
    return f"{method.label} took two steps on the toy model. Of {model} it trains {said}."


def _study_of(world: str) -> tuple[Study | None, dict[str, Any]]:
    """Returns the study of a world, and the fields that are fixed there and not in ``studies/base.yaml``."""
    from peftscope.planning.experiment import read_experiment

    names = "base", WORLDS[world]
    base, there = (read_experiment(shipped(EXPERIMENTS / "studies" / f"{name}.yaml")) for name in names)
    return there.study, {field: value for field, value in there.fixed.items() if value != base.fixed.get(field)}


def study_text(file: Path, others: list[str], model: str | None, world: str = "A") -> str:
    """Returns the experiment file of a study in one of ``WORLDS``.

    Raises:
        InputError: The file holds no method or one with a name that is taken, or the world or a method is unknown.
    """
    from peftscope.methods import METHODS, versions_of
    from peftscope.methods.from_file import load_file, name_of
    from peftscope.models.catalog import find_model
    from peftscope.planning.experiment import A_A, read_experiment, rounded

    if not file.is_file():
        raise InputError(
            Problem(str(file), "no such file", "name a Python file with one method; see docs/your-method.md")
        )
    method, wrong = load_file(file)
    own = name_of(file)
    if method is None:
        raise InputError(Problem(str(file), wrong, "see docs/your-method.md"))
    if own in METHODS and (METHOD_FILES / f"{own}.py").as_posix() not in versions_of(own):
        raise InputError(Problem(str(file), f"there is another method {own!r}", "rename your file"))
    trained = [name for name, cls in METHODS.items() if cls.trains and name != own]
    if unknown := [name for name in others if name not in trained] or [""] * (not others):
        message = f"no method to compare with (got {unknown[0]!r})"
        raise InputError(Problem("against", message, close_match(unknown[0], trained)))
    if world not in WORLDS:
        raise InputError(Problem("--world", f"no such world (got {world!r})", f"one of {', '.join(WORLDS)}"))
    if model is not None:
        find_model(model)
    arms = sorted(dict.fromkeys(others), key=lambda name: name != REFERENCE)
    known, fixed = _study_of(world)
    fixed |= {"model": model} if model else {}
    defaults = read_experiment(shipped(EXPERIMENTS / "defaults.yaml")).methods
    assert known is not None

    def rates(name: str) -> list[float]:
        usual = method.run_defaults if name == own else {**METHODS[name].run_defaults, **defaults.get(name, {})}
        return known.learning_rates.get(name) or [rounded(usual["learning_rate"] * factor) for factor in GRID]

    # The runs that the world's study has of these arms are shared: they have the same ids.
    shares = model is None and arms[0] == REFERENCE
    names = [*arms, own]
    study: dict[str, Any] = {
        "arms": {name: {"method": name} | (known.arms.get(name, {}) if shares else {}) for name in names},
        "learning_rates": {name: rates(name) for name in names if name != REFERENCE or fixed},
    }
    drawn = METHODS[arms[0]]().draws_start
    if not shares or fixed:
        study["pilot"] = None  # its A/A pairs are of another world, model or reference
    if shares:
        study |= {"seeds": known.seeds} if fixed else {}
        study["tuning"] = {"retention_tokens": 0, "retention_every": 0}
        study["centres"] = {name: rate for name, rate in known.centres.items() if name.removesuffix(A_A) in arms}
    if arms[0] != REFERENCE:  # what `base` says of the reference is taken back
        study["a_a"] = arms[0] if drawn else None  # what draws nothing at its start would repeat itself
        for field in ("arms", "learning_rates"):
            study[field] = {REFERENCE: None, **study[field]}
        study["controls"] = {REFERENCE: None, arms[0]: ["shuffled-labels"]}
    description = (
        "A method from a file beside others, each at its own best learning rate after as many trials. Pairs of seeds "
        "give every arm the same batches."
    )
    if drawn:
        description += " The reference enters a second time: no smaller difference means anything."
    content = {
        "title": f"{method.label} against {', '.join(METHODS[name].label for name in arms)}",
        "description": description,
        "extends": "base",
        **({"fixed": fixed} if fixed else {}),
        "study": study,
    }
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)
