"""How long a step takes: the model against measured speeds, its laws, its answers, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks.speed import PUBLISHED_STEPS, read_comparison, read_speeds, read_steps, render, render_steps
from peftscope.errors import InputError
from peftscope.hardware.cards import GPUS, SPEEDS, Speed, find_gpu
from peftscope.memory.base import describe_model
from peftscope.memory.question import Question, ask
from peftscope.sizing.cheapest import on_cards, read_prices
from peftscope.sizing.duration import Schedule, duration
from peftscope.sizing.processor import ProcessorConstants
from peftscope.sizing.speed import FITTED_FILE, fitted, passes_of, step_time


def asked(gpu: str = "a100-80gb", gpus: int = 1, **options: Any) -> Question:
    return ask(describe_model("llama-3.1-8b"), {"seq_len": 1024, **options}, gpu=find_gpu(gpu), gpus=gpus)


def seconds(gpu: str = "a100-80gb", gpus: int = 1, **options: Any) -> float:
    return step_time(asked(gpu, gpus, **options), SPEEDS[gpu]).seconds


@pytest.fixture(scope="module")
def published() -> pd.DataFrame:
    return read_comparison(Path(__file__).parents[2] / "results" / "published" / "speed" / "speeds.csv")


def test_the_page_shows_what_the_published_table_renders(repository: Path, published: pd.DataFrame) -> None:
    page, content = (repository / "docs" / "time.md").read_text(), json.loads(FITTED_FILE.read_text())
    for name, text in render(published, content).items():
        assert f"<!-- {name} -->\n{text}\n<!-- /{name} -->\n" in page
    assert render(published.assign(left_out=2 * published["left_out"]), content)["errors"] not in page


def test_the_published_table_is_what_the_code_predicts_now(repository: Path, published: pd.DataFrame) -> None:
    speeds = read_speeds(repository / "benchmarks" / "speeds.csv")
    assert [one.row["run"] for one in speeds] == list(published["run"])
    constants = fitted()[0]
    for one, (_, row) in list(zip(speeds, published.iterrows(), strict=True))[::5]:
        assert one.why_out == row["out_of_scope"]
        if not one.why_out:
            assert one.predicted(constants) == pytest.approx(row["predicted"], rel=0.01)


def test_steps_on_a_processor_are_within_15_percent_of_what_was_left_out(in_repository: None) -> None:
    steps, content = pd.read_csv(PUBLISHED_STEPS), fitted()[1]["processor"]
    assert f"<!-- steps -->\n{render_steps(steps, content)}\n<!-- /steps -->\n" in Path("docs/time.md").read_text()
    for one, (_, row) in zip(read_steps(), steps.iterrows(), strict=True):
        assert one.seconds == pytest.approx(row["measured"], rel=0.001)
        assert one.predicted(ProcessorConstants(**content)) == pytest.approx(row["predicted"], rel=0.01)
    for left_out in ("method_left_out", "batch_size_left_out"):
        assert (steps[left_out] / steps["measured"] - 1).abs().median() <= 0.15


def test_predictions_are_nearer_than_the_rule_of_a_fixed_share(published: pd.DataFrame) -> None:
    inside = published[published["out_of_scope"] == ""]
    off = {name: (inside[name] / inside["measured"] - 1).abs().median() for name in ("left_out", "rule")}
    assert off["left_out"] < 0.2 < off["rule"]
    low, high = fitted()[1]["interval"]
    assert (inside["measured"] / inside["left_out"]).between(low, high).mean() > 0.75 and high / low <= 3


def test_products_are_counted_as_four_operations_a_weight_and_six_where_it_is_trained() -> None:
    for method, passes in (("lora", 4), ("full", 6)):
        question = asked(method=method)
        shape = question.model.shape
        flops = sum(
            one.flops * one.times * factor
            for content, _ in passes_of(question)
            for one, factor in content
            if one.part in ("products of the base", "logits and loss")
        )
        weights = shape.linear_parameters + shape.vocab_size * shape.hidden_size
        assert flops == pytest.approx(passes * weights * 1024)


def test_each_term_makes_a_step_longer() -> None:
    lora = seconds()
    assert 1.2 * lora < seconds(checkpointing=True) < 1.5 * lora
    assert seconds(gradient_accumulation=4) == pytest.approx(4 * lora, rel=0.05)
    for dearer in ("qlora", "dora", "full"):
        assert seconds(method=dearer) > 1.05 * lora
    assert seconds(loss="liger") < lora < seconds(rank=64, targets="all-linear")
    assert seconds("h100") < lora < seconds("a10") < seconds("a10", precision="fp32")
    assert seconds(seq_len=8) > 0.3 * seconds(seq_len=64)  # launches, whatever the length
    slow = replace(SPEEDS["a100-80gb"], link_bytes=1e9)
    assert "waiting for other cards" in step_time(asked(gpus=2), slow).parts
    assert step_time(asked(gpus=2), slow).seconds > 2 * lora


def test_a_rate_and_a_bandwidth_bound_the_time_from_below() -> None:
    question, one = asked(batch_size=8), SPEEDS["a100-80gb"]
    before = step_time(question, one).seconds
    twice = Speed(2 * one.bf16_flops, 2 * one.fp32_flops, 2 * one.memory_bytes)
    assert step_time(question, twice).seconds == pytest.approx(before / 2, rel=0.05)


def test_an_answer_has_time_and_cost_with_their_interval() -> None:
    time = duration(asked(batch_size=2, gradient_accumulation=4), Schedule(examples=1000, epochs=2, price_per_hour=1.5))
    assert time and time.training_seconds and time.epoch_seconds and time.cost and time.steps == 250
    assert time.tokens_per_second.low < time.tokens_per_second.value < time.tokens_per_second.high
    assert time.tokens_per_second.high * time.step_seconds.low == pytest.approx(8 * 1024)
    assert time.training_seconds.value == pytest.approx(2 * time.epoch_seconds.value)
    assert time.cost.high == pytest.approx(1.5 * time.training_seconds.high / 3600)
    assert not time.unvalidated
    OFFLOADED = {"method": "full", "checkpointing": True, "offload": "parameters"}
    for options, why in (
        ({"method": "dora"}, "dora"),
        ({"precision": "fp32"}, "fp32"),
        ({"gpus": 2}, "2 cards"),
        (OFFLOADED, "to the host"),
    ):
        other = duration(asked(**options), Schedule())
        assert other and why in other.unvalidated
    assert duration(asked("24GiB"), Schedule()) is None
    given = duration(asked("24GiB"), Schedule(tflops=312, bandwidth=2039))
    assert given and given.cost is None and given.steps is None


@pytest.mark.parametrize(
    ("gpu", "schedule", "says"),
    [
        ("24GiB", {"examples": 10}, "--tflops"),
        ("t4", {"price_per_hour": 1.0, "tflops": 65}, "--bandwidth"),
        (None, {"price_per_hour": 1.0}, "give --gpu"),
        ("a100", {"price_per_hour": -1.0}, "below 1e12 (got -1)"),
        ("a100", {"examples": 0}, "below 1e12 (got 0)"),
        ("a100", {"bandwidth": float("nan")}, "below 1e12 (got nan)"),
        ("a100", {"examples": 10, "epochs": 1e308}, "below 1e12 (got 1e+308)"),
        ("a100", {"epochs": 2.0}, "give --examples"),
    ],
)
def test_bad_input_is_one_clear_line(gpu: str | None, schedule: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        Schedule(**schedule).speed(find_gpu(gpu) if gpu else None)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_cheapest_card_comes_first_among_those_that_it_fits_on() -> None:
    question = asked(method="full")
    found = on_cards(question, Schedule(examples=100), read_prices("a100-80gb=1,h100=9"))
    assert [one.gpu.name for one in found[:2]] == ["A100 80 GB", "H100 80 GB"]
    assert found[2].time.cost is None and {one.gpu.name for one in found} <= {GPUS[name].name for name in SPEEDS}
    for prices, says in (("a100", "a card and a price"), ("a100=-1", "above 0"), ("t4=1", "not known")):
        with pytest.raises(InputError, match=says):
            read_prices(prices)
    with pytest.raises(InputError, match="fits on none"):
        on_cards(asked(method="full", batch_size=512), Schedule(), {})
    with pytest.raises(InputError, match="time is not modelled: its experts"):
        on_cards(ask(describe_model("mixtral-8x7b"), {}), Schedule(), {})
