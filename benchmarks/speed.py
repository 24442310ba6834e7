"""Fits the constants of the time model to measured speeds, and compares its predictions with them: ``make speed``.

Writes ``src/peftscope/sizing/speed.json``, ``results/published/speed/speeds.csv`` and the tables of ``docs/time.md``.
``speeds.csv`` beside this file holds the speeds with their settings and source. The constants are fitted to the
sources marked ``fitted`` alone; the others were found later, and are only predicted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from benchmarks.page import write_blocks
from peftscope.hardware.cards import SPEEDS, Speed
from peftscope.memory.base import Model, describe_model
from peftscope.memory.question import Question, ask
from peftscope.models.shapes import ModelShape
from peftscope.planning.estimate import RESPONSE_SHARE
from peftscope.planning.published import published_records
from peftscope.record import RunRecord, parse_record
from peftscope.sizing.processor import ProcessorConstants, processor_passes, processor_step
from peftscope.sizing.speed import DEQUANTISED_BYTES, FITTED_FILE, Constants, Passes, fitted, passes_of, step_time

SPEEDS_FILE = Path("benchmarks/speeds.csv")
PUBLISHED = Path("results/published/speed/speeds.csv")
STEPS = "step-times"
"""The experiment whose steps on a processor are predicted too."""
LEFT_OUT = ("method", "batch_size", "model")
PUBLISHED_STEPS = Path("results/published/speed/steps.csv")
PAGE = Path("docs/time.md")
RULE = 0.45
"""The share of the peak rate that a common calculator assumes."""
GPTQ_BYTES = 24
"""The bytes of a 4-bit weight that AutoGPTQ unpacks in torch, a kernel for each shift, mask, difference, product."""
IMPOSSIBLE = 0.9
"""A speed whose arithmetic is over this share of the card's peak, without recomputation, is not of that card."""
WIDEST = 3.0
"""The largest factor between the ends of the interval."""
INSIDE = 0.8
"""The share of left-out speeds in the interval."""
START = (0.6, 0.7, 1.5e-5)
"""Where fitting begins: what was guessed before any speed was looked at."""
START_STEPS = ((0.8, 0.6, 0.1), (0.9, 1.0, 0.13), (0.6, 0.5, 0.2))

OTHER_CARDS = {
    "h100 fp8": Speed(1979e12, 67e12, 3350e9, 450e9),
    "l40": Speed(181e12, 90.5e12, 864e9),
    "rtx pro 6000": Speed(503.8e12, 126e12, 1792e9, 64e9),
}
"""Cards of the sources that the calculator does not know, and the H100's rate in FP8. Source: NVIDIA's data sheets."""


def _qwen(hidden: int, layers: int, heads: int, inner: int, vocabulary: int) -> ModelShape:
    return ModelShape(
        family="qwen2",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=128,
        tied_embeddings=False,
    )


OTHER_MODELS = {
    "qwen-1.8b": _qwen(2048, 24, 16, 5504, 151936),
    "qwen-7b": _qwen(4096, 32, 32, 11008, 151936),
    "qwen-14b": _qwen(5120, 40, 40, 13696, 152064),
    "qwen-72b": _qwen(8192, 80, 64, 24576, 152064),
}
"""The first Qwen models, from their config.json; an intermediate size there counts both halves."""


@dataclass(frozen=True)
class Measured:
    """A speed that somebody published."""

    row: dict[str, str]

    @property
    def source(self) -> str:
        """Where it was published, without the file."""
        return self.row["source"].split()[0]

    @property
    def cards(self) -> int:
        """The number of cards."""
        return int(self.row["cards"])

    @property
    def tokens_per_second(self) -> float:
        """The speed of one card."""
        return float(self.row["tokens_per_second"])

    @property
    def card(self) -> Speed:
        """What the card can do."""
        return OTHER_CARDS.get(self.row["card"]) or SPEEDS[self.row["card"]]

    @cached_property
    def question(self) -> Question:
        """The run."""
        shape = OTHER_MODELS.get(self.row["model"]) or describe_model(self.row["model"]).shape
        assert shape is not None
        shape = shape.model_copy(update={"max_seq_len": None})
        model = Model(self.row["model"], shape.to_config() | {"max_position_embeddings": None}, shape)
        return ask(model, json.loads(self.row["options"]), gpus=self.cards)

    @cached_property
    def passes(self) -> Passes:
        """The passes of a step."""
        return passes_of(self.question, GPTQ_BYTES if self.row["kernels"] == "gptq" else DEQUANTISED_BYTES)

    @cached_property
    def kind(self) -> str:
        """The method, with 4-bit weights that are not bitsandbytes' kind; or that the run had several cards."""
        name = self.question.spec.method.name
        name += " on GPTQ" if self.row["kernels"] == "gptq" else ""
        return name if self.cards == 1 else "several cards"

    @cached_property
    def why_out(self) -> str:
        """Why the speed is out of scope; empty if it is in scope."""
        if self.row["out_of_scope"]:
            return self.row["out_of_scope"]
        flops = sum(one.flops * (1 + one.backward) * one.times for one, _ in self.passes[0][0])
        tokens = self.question.spec.batch_size * self.question.spec.seq_len
        share = flops / tokens * self.tokens_per_second / self.card.bf16_flops
        said = f"over {100 * IMPOSSIBLE:.0f} % of the card's peak, even without recomputation"
        return said if share > IMPOSSIBLE else ""

    def predicted(self, constants: Constants) -> float:
        """Returns the tokens a second of one card."""
        step = step_time(self.question, self.card, constants, self.passes)
        return step.tokens / step.seconds

    def by_rule(self) -> float:
        """Returns the tokens a second at ``RULE`` of the peak: 6 operations a parameter, 4 if the base is frozen, and
        2 more with recomputation."""
        spec, shape = self.question.spec, self.question.model.shape
        assert shape is not None
        passes = (6 if spec.method.trains_base else 4) + 2 * spec.checkpointing
        return RULE * self.card.bf16_flops / (passes * shape.parameters)


@dataclass(frozen=True)
class Timed:
    """A step on a processor: the median of the repeats of one setting of the experiment ``step-times``."""

    model: str
    method: str
    batch_size: int
    passes: Passes
    flops: float
    copied_bytes: float
    seconds: float

    def off(self, constants: ProcessorConstants) -> float:
        """Returns the logarithm of predicted over measured time."""
        return float(np.log(self.predicted(constants) / self.seconds))

    def predicted(self, constants: ProcessorConstants) -> float:
        """Returns the seconds of the step."""
        return processor_step(self.passes, self.flops, self.copied_bytes, constants)[0]


def read_steps() -> list[Timed]:
    """Returns the published steps on a processor, one for each setting."""
    found: dict[tuple[str, str, int], list[RunRecord]] = {}
    for run, text in published_records(STEPS).items():
        record = parse_record(text, run)
        found.setdefault((record.spec.model, record.spec.method.name, record.spec.batch_size), []).append(record)
    steps = []
    for setting, records in sorted(found.items()):
        spec = records[0].spec
        model, responses = describe_model(spec.model), round(RESPONSE_SHARE * spec.seq_len)
        middle = [float(np.median([values[place] for values in map(_measured_of, records)])) for place in range(3)]
        steps.append(Timed(*setting, processor_passes(Question(model, spec, responses, None, 1)), *middle))
    return steps


def _measured_of(record: RunRecord) -> tuple[float, float, float]:
    ceilings, seconds = record.ceilings, record.speed.step_seconds_median
    assert ceilings.matmul_flops_per_second and ceilings.copy_bytes_per_second and seconds
    return ceilings.matmul_flops_per_second, ceilings.copy_bytes_per_second, seconds


def fit_steps(steps: Sequence[Timed]) -> ProcessorConstants:
    """Returns the constants with the least mean size of the logarithm of predicted over measured time."""

    def loss(point: Any) -> float:
        constants = ProcessorConstants(*np.exp(point))
        return float(np.mean([abs(one.off(constants)) for one in steps])) + 10 * max(0.0, point[0])

    options = {"xatol": 0.003, "fatol": 3e-4}
    every = [minimize(loss, np.log(start), method="Nelder-Mead", options=options) for start in START_STEPS]
    found = min(every, key=lambda one: one.fun)
    return ProcessorConstants(*(float(value) for value in np.exp(found.x)))


def compare_steps() -> tuple[pd.DataFrame, ProcessorConstants]:
    """Returns the measured and predicted steps on a processor, also with a method, a batch size or a model left out."""
    every, rows = read_steps(), []
    constants = fit_steps(every)
    for one in every:
        row = {"model": one.model, "method": one.method, "batch_size": one.batch_size, "measured": one.seconds}
        rows.append(row | {"predicted": one.predicted(constants)})
    for name in LEFT_OUT:
        for value in {getattr(one, name) for one in every}:
            without = fit_steps([one for one in every if getattr(one, name) != value])
            for row, one in zip(rows, every, strict=True):
                if getattr(one, name) == value:
                    row[f"{name}_left_out"] = one.predicted(without)
    return pd.DataFrame(rows), constants


def read_speeds(path: Path = SPEEDS_FILE) -> list[Measured]:
    """Returns the published speeds."""
    return [Measured(row) for row in pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")]


def fit(speeds: Sequence[Measured]) -> Constants:
    """Returns the constants with the least mean size of the logarithm of predicted over measured speed."""

    def constants_of(point: Any) -> Constants:
        return Constants(*(float(value) for value in np.exp(point)))

    def loss(point: Any) -> float:
        constants = constants_of(point)
        beyond = max(0.0, constants.rate_share - 1) + max(0.0, constants.memory_share - 1)
        logs = [np.log(one.predicted(constants) / one.tokens_per_second) for one in speeds]
        return float(np.abs(logs).mean() + 10 * beyond)

    found = minimize(loss, np.log(START), method="Nelder-Mead", options={"xatol": 0.005, "fatol": 5e-4})
    return constants_of(found.x)


def compare() -> tuple[pd.DataFrame, Constants]:
    """Returns every speed beside its predictions, with the constants of all fitted sources.

    ``left_out`` is by constants without the row's source; ``model_left_out`` by those without the rows of its model.
    """
    every = read_speeds()
    inside = [one for one in every if not one.why_out]
    used = [one for one in inside if one.row["fitted"] == "yes"]
    constants = fit(used)
    by_source = {source: fit([one for one in used if one.source != source]) for source in {one.source for one in used}}
    qwen = {one.row["model"] for one in inside if one.row["model"] in OTHER_MODELS}
    by_model = {model: fit([one for one in used if one.row["model"] != model]) for model in qwen}
    rows = []
    for one in every:
        row: dict[str, Any] = {name: one.row[name] for name in ("source", "fitted", "run", "card", "cards")}
        row |= {"kind": "" if one.why_out else one.kind, "out_of_scope": one.why_out, "unstated": one.row["unstated"]}
        row["measured"] = one.tokens_per_second
        if not one.why_out:
            row["predicted"] = one.predicted(constants)
            row["left_out"] = one.predicted(by_source.get(one.source, constants))
            row["rule"] = one.by_rule()
            if one.row["model"] in by_model:
                row["model_left_out"] = one.predicted(by_model[one.row["model"]])
        rows.append(row)
    return pd.DataFrame(rows), constants


def interval(ratios: pd.Series) -> tuple[float, float]:
    """Returns the narrowest interval, as factors, that holds ``INSIDE`` of the ratios; no wider than ``WIDEST``."""
    values = np.sort(ratios.to_numpy())
    held = int(np.ceil(INSIDE * len(values)))
    starts = range(len(values) - held + 1)
    first = min(starts, key=lambda start: values[start + held - 1] / values[start])
    low, high = values[first], values[first + held - 1]
    if high / low > WIDEST:
        low = max(values, key=lambda start: ((values >= start) & (values <= WIDEST * start)).sum())
        high = WIDEST * low
    return float(low), float(high)


def _row(name: str, part: pd.DataFrame, column: str) -> str:
    ratio = part[column] / part["measured"]
    off = (ratio - 1).abs()
    within = (np.abs(np.log(ratio)) <= np.log(1.6)).mean()
    cells = f"{100 * off.median():.0f} | {100 * off.quantile(0.9):.0f} | {100 * within:.0f}"
    return f"| {name} | {len(part)} | {cells} | {ratio.median():.2f} |"


HEAD = ["| {} | speeds | median error (%) | nine of ten within (%) | within a factor of 1.6 (%) | typical ratio |"]
HEAD += ["|---|---:|---:|---:|---:|---:|"]


def _table(name: str, rows: list[str]) -> list[str]:
    return [HEAD[0].format(name), HEAD[1], *rows, ""]


def render(speeds: pd.DataFrame, content: dict[str, Any]) -> dict[str, str]:
    """Returns the blocks of the page: the constants, and predicted beside measured speeds."""
    constants, (low, high) = content["constants"], content["interval"]
    inside = speeds[speeds["out_of_scope"] == ""]
    fitted, apart = inside[inside["fitted"] == "yes"], inside[inside["fitted"] == "no"]
    lines = [
        "| constant | value |",
        "|---|---:|",
        f"| share of a card's rate that products reach | {constants['rate_share']:.2f} |",
        f"| share of its bandwidth that kernels reach | {constants['memory_share']:.2f} |",
        f"| seconds of a launch | {1e6 * constants['launch_seconds']:.1f} µs |",
        "",
        f"They are fitted to {len(fitted)} speeds of {_sources(fitted)}. {len(apart)} speeds of {_sources(apart)} were "
        "found while the model was written, and no constant is fitted to them.",
    ]
    ratios = inside["measured"] / inside["left_out"]
    covered = ((ratios >= low) & (ratios <= high)).mean()
    qwen = inside[inside["model_left_out"].notna()]
    five = inside[inside["source"].str.split().str[0] != "ljm565/universal-llm-trainer"]
    named = inside["source"].str.split().str[0]
    errors = [
        "One source left out: the constants are fitted to the other sources. Below each, the rule of "
        f"{100 * RULE:.0f} % of the peak on the same speeds. The ratio is predicted over measured.",
        "",
        *_table(
            "source",
            [line for source in dict.fromkeys(named) for line in _both(source, inside[named == source])]
            + _both("all", inside)
            + _both("all but ljm565/universal-llm-trainer", five),
        ),
        "By kind of run, one source left out:",
        "",
        *_table("kind", [line for kind, part in inside.groupby("kind") for line in _both(str(kind), part)]),
        "Qwen's table with one model left out:",
        "",
        *_table(
            "kind",
            [_row(str(kind), part, "model_left_out") for kind, part in qwen.groupby("kind")]
            + [_row("all", qwen, "model_left_out")],
        ),
        f"The interval of an answer reaches from {low:.2f} to {high:.2f} times the predicted speed. "
        f"{100 * covered:.0f} % of the speeds of left-out sources lie in it; it is the narrowest that holds so many.",
    ]
    outside = speeds[speeds["out_of_scope"] != ""].groupby("out_of_scope", sort=False).size()
    points = [
        "| source | run | card | measured | predicted | source left out | rule | not stated |",
        "|---|---|---|---:|---:|---:|---:|---|",
        *(
            f"| {row['source'].split()[0]} | {row['run']} | {row['card']} | {row['measured']:,.0f} | "
            f"{row['predicted']:,.0f} | {row['left_out']:,.0f} | {row['rule']:,.0f} | {row['unstated']} |"
            for _, row in inside.iterrows()
        ),
        "",
        "Out of scope:",
        "",
        "| why | speeds |",
        "|---|---:|",
        *(f"| {why} | {number} |" for why, number in outside.items()),
    ]
    return {"constants": "\n".join(lines), "errors": "\n".join(errors), "speeds": "\n".join(points)}


def render_steps(steps: pd.DataFrame, constants: dict[str, float]) -> str:
    """Returns the block of the page on steps on a processor."""
    held = [f"{name}_left_out" for name in LEFT_OUT]
    errors = (steps[held].div(steps["measured"], axis=0) - 1).abs()
    lines = [
        "| model | method | rows | measured (s) | predicted (s) | method left out | batch left out | model left out |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {row['model']} | {row['method']} | {row['batch_size']} | "
            + " | ".join(f"{row[name]:.2f}" for name in ("measured", "predicted", *held))
            + " |"
            for _, row in steps.iterrows()
        ),
        "",
        "Median error: "
        + ", ".join(f"{100 * errors[name].median():.0f} % with a {name.split('_')[0]} left out" for name in held)
        + "; largest: "
        + ", ".join(f"{100 * errors[name].max():.0f} %" for name in held)
        + ".",
        "",
        f"The constants are {constants['rate_share']:.2f} of the rate at a large product, "
        f"{constants['memory_share']:.2f} of the rate of a large copy, and {constants['large_share']:.2f} of it for "
        "kernels of 100 MB and more.",
    ]
    return "\n".join(lines)


def _both(name: str, part: pd.DataFrame) -> list[str]:
    return [_row(name, part, "left_out"), _row(f"{name}: rule of {100 * RULE:.0f} %", part, "rule")]


def _sources(part: pd.DataFrame) -> str:
    return ", ".join(dict.fromkeys(part["source"].str.replace(" @", " at ")))


def read_comparison(path: Path = PUBLISHED) -> pd.DataFrame:
    """Returns what ``compare`` found, as it was published."""
    found = pd.read_csv(path)
    return found.fillna({name: "" for name in ("kind", "out_of_scope", "unstated")})


def main() -> None:
    """Fits the constants and writes them, the comparison and the page."""
    found, constants = compare()
    PUBLISHED.parent.mkdir(parents=True, exist_ok=True)
    found.to_csv(PUBLISHED, index=False, float_format="%.6g")
    found = read_comparison()
    inside = found[found["out_of_scope"] == ""]
    sources = inside.assign(of=inside["source"].str.split().str[0]).groupby("kind")["of"].nunique()
    kinds = [
        str(kind)
        for kind, number in sources.items()
        if number > 1 and kind != "several cards" and "GPTQ" not in str(kind)
    ]
    content = {
        "constants": {name: float(f"{value:.3g}") for name, value in asdict(constants).items()},
        "interval": [round(end, 2) for end in interval(inside["measured"] / inside["left_out"])],
        "methods": kinds,
    }
    FITTED_FILE.write_text(json.dumps(content) + "\n")
    fitted.cache_clear()  # steps on a processor take its time of a launch
    steps, on_processor = compare_steps()
    content["processor"] = {name: float(f"{value:.3g}") for name, value in asdict(on_processor).items()}
    steps.to_csv(PUBLISHED_STEPS, index=False, float_format="%.4g")
    FITTED_FILE.write_text(json.dumps(content) + "\n")
    write_blocks(render(found, content) | {"steps": render_steps(steps, content["processor"])}, PAGE)


if __name__ == "__main__":
    main()
