"""Writes the experiment file that compares a method from a file with others."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from peftscope.cli.console import OWN
from peftscope.errors import InputError, Problem, close_match, needs
from peftscope.layout import EXPERIMENTS, METHOD_FILES, STUDIES, check_experiment_name, shipped

app = typer.Typer()

REFERENCE = "lora"
"""The reference arm of the studies that this repository publishes."""

GRID = (0.1, 0.3, 1, 3, 10)
"""Learning rates to try, as multiples of a method's own: as many for every arm."""


@app.command("new-study", rich_help_panel=OWN)
@needs("train")
def new_study(
    file: Annotated[Path, typer.Argument(help="A Python file with one method; its name becomes the method's.")],
    against: Annotated[str, typer.Option(help="Methods, by commas; the reference is lora or the first.")] = REFERENCE,
    world: Annotated[str, typer.Option(help="A: SmolLM2-135M on sums, B: on pronunciation; C: Gemma there.")] = "A",
    model: Annotated[str | None, typer.Option(help="Of models.yaml; default: the world's. toy takes minutes.")] = None,
    task: Annotated[str | None, typer.Option(help="A name in tasks.yaml; default: the world's.")] = None,
    steps: Annotated[int | None, typer.Option(min=4, help="Steps of a run; default: the world's, 160.")] = None,
    seeds: Annotated[int | None, typer.Option(min=2, help="Pairs of runs; default: the world's, 8 in A.")] = None,
) -> None:
    """Write a study of your own method: equal trials, pairs of seeds, an A/A arm; and say what it costs."""
    from peftscope.methods.from_file import name_of
    from peftscope.planning.experiment import WORLDS, read_experiment

    others = [other.strip() for other in against.split(",") if other.strip()]
    fixed = {field: value for field, value in (("model", model), ("task", task), ("steps", steps)) if value}
    # A second call with other options writes another study.
    told = [*(others if others != [REFERENCE] else []), *_options(world, seeds, fixed)]
    name = "-".join([name_of(file), "study", *(re.sub(r"\W+|_", "-", word).lower() for word in told)])
    check_experiment_name(name)
    text = study_text(file, others, world, seeds, **fixed)
    contents = {
        METHOD_FILES / f"{name_of(file)}.py": file.read_text(encoding="utf-8"),
        EXPERIMENTS / f"{name}.yaml": text,
    }
    for path, content in contents.items():
        if path.is_file() and path.read_text(encoding="utf-8") != content:
            raise InputError(Problem(str(path), "is there with another content", "remove it, or rename your file"))
    trained = tried(file, model or read_experiment(shipped(STUDIES / f"{WORLDS[world]}.yaml")).fixed["model"])
    written = [path for path in contents if not path.is_file()]
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(contents[path], encoding="utf-8")
    # Methods are found when a process starts, so that another one must look.
    command = [sys.executable, "-m", "peftscope", "expand", name, "--brief"]
    if code := subprocess.run(command, check=False).returncode:
        for path in written:  # or they would stand in the way of the mended file
            path.unlink()
        sys.exit(code)
    print(trained, *contents, sep="\n")


def tried(file: Path, model: str) -> str:
    """Returns what a method trains of a study's model, after it took two steps on the toy model.

    Raises:
        InputError: It cannot be built, or a step fails.
    """
    from peftscope.methods.from_file import load_file
    from peftscope.training.trial import trained_values, try_method

    method = load_file(file)[0]
    assert method is not None  # the study's text was made of it
    counted = trained_values(try_method(file, method()), model)
    said = f"{counted[0]:,} of {counted[1]:,} values" if counted else "as many values as a run will say"
    return f"{method.label} took two steps on the toy model. Of {model} it trains {said}."


def study_text(file: Path, others: list[str], world: str = "A", seeds: int | None = None, **fixed: Any) -> str:
    """Returns the experiment file of a study.

    The world's study has the learning rates of other arms, so that runs are shared, and the number of pairs, unless
    ``seeds`` is another. Fixed settings, ``model``, ``task`` and ``steps``, replace the world's.

    Raises:
        InputError: The file holds no method or one with a name that is taken, or another method, the world, the model
            or the task is unknown.
    """
    import yaml

    from peftscope.data.tasks import find_task
    from peftscope.methods import METHODS, versions_of
    from peftscope.methods.from_file import load_file, name_of
    from peftscope.models.catalog import find_model
    from peftscope.planning.experiment import WORLDS

    if not file.is_file():
        raise InputError(Problem(str(file), "no such file", "name one with a method; see docs/your-method.md"))
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
        raise InputError(Problem("world", f"no such world (got {world!r})", f"one of {', '.join(WORLDS)}"))
    for field, find in (("model", find_model), ("task", find_task)):
        if field in fixed:
            find(fixed[field])
    arms = sorted(dict.fromkeys(others), key=lambda name: name != REFERENCE)
    settings, study = _settings(method, own, arms, world, seeds, **fixed)
    description = (
        "A method from a file beside others, each at its own best learning rate after as many trials. Pairs of seeds "
        "give every arm the same batches. What a reference differs by from itself means nothing."
    )
    told = [*(METHODS[name].label for name in arms), *_options(world, seeds, fixed)]
    content = {
        "title": f"{method.label} against {', '.join(told)}",
        "description": description,
        "extends": "base",
        **({"fixed": settings} if settings else {}),
        "study": study,
    }
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)


def _options(world: str, seeds: int | None, fixed: dict[str, Any]) -> list[str]:
    """Returns in words the options of a study that differ from the defaults."""
    own = [f"{value} steps" if field == "steps" else value for field, value in fixed.items()]
    return [f"world {world}"] * (world != "A") + own + [f"{seeds} seeds"] * bool(seeds)


def _settings(method: Any, own: str, arms: list[str], world: str, seeds: int | None, **fixed: Any) -> tuple[Any, Any]:
    """Returns what a study fixes and its arms with their rates, as far as ``base`` says something else."""
    from peftscope.methods import METHODS
    from peftscope.planning.experiment import A_A, WORLDS, read_experiment, rounded

    base, home = (read_experiment(shipped(STUDIES / f"{name}.yaml")) for name in ("base", WORLDS[world]))
    defaults = read_experiment(shipped(EXPERIMENTS / "defaults.yaml")).methods
    known = home.study
    assert known is not None and base.study is not None

    def rates(name: str) -> list[float]:
        usual = method.run_defaults if name == own else {**METHODS[name].run_defaults, **defaults.get(name, {})}
        return known.learning_rates.get(name) or [rounded(usual["learning_rate"] * factor) for factor in GRID]

    # The runs that the world's study has of these arms are shared: they have the same ids.
    shares = not fixed and arms[0] == REFERENCE
    study: dict[str, Any] = {
        "arms": {name: {"method": name} | (known.arms.get(name, {}) if shares else {}) for name in [*arms, own]},
        "learning_rates": {name: rates(name) for name in [*arms, own] if (world, name) != ("A", REFERENCE)},
    }
    paired = list(range(seeds)) if seeds else known.seeds
    if paired != base.study.seeds:
        study |= {"seeds": paired, "control_seeds": [seed for seed in base.study.control_seeds or () if seed in paired]}
    if not (shares and known.pilot):
        study["pilot"] = None  # its A/A pairs are of another model, task or reference
    if shares:
        centres = {name: rate for name, rate in known.centres.items() if name.removesuffix(A_A) in arms}
        study |= ({"centres": centres} if centres else {}) | {"tuning": {"retention_tokens": 0, "retention_every": 0}}
    if arms[0] != REFERENCE:  # what `base` says of the reference is taken back
        study["a_a"] = arms[0] if METHODS[arms[0]]().draws_start else None  # else it would repeat itself
        for field in ("arms", "learning_rates"):
            study[field] = {REFERENCE: None, **study[field]}
        study["controls"] = {REFERENCE: None, arms[0]: ["shuffled-labels"]}
    if "steps" in fixed:
        fixed |= {"warmup_steps": fixed["steps"] // 20, "validation_every": fixed["steps"] // 4}
    return {field: value for field, value in home.fixed.items() if value != base.fixed.get(field)} | fixed, study
