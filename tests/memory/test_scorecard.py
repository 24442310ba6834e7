"""The scorecard: its scope follows its rule, its page its table, and its table the calculator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks import outcomes
from benchmarks.estimators import ESTIMATORS
from benchmarks.points import RULE, Point, by_formula, question_of, why_out
from benchmarks.scorecard import errors, in_scope, measured, one_a_run, read_scores, render
from benchmarks.threads import SIMULATED, line, read_threads
from peftscope.hardware.cards import find_gpu
from peftscope.memory.answer import MEASURED_FILE, answer_by_formula
from peftscope.memory.base import describe_model
from peftscope.memory.question import ask

POINTS = {point.id: point for point in Point.read(Path(__file__).parents[2] / "benchmarks" / "published_points.csv")}


@pytest.fixture(scope="module")
def published() -> tuple[pd.DataFrame, pd.DataFrame]:
    return read_scores(Path(__file__).parents[2] / "results" / "published" / "scorecard")


def test_the_page_shows_the_published_table(repository: Path, published: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    page = (repository / "docs" / "scorecard.md").read_text()
    text = render(*published)
    assert f"<!-- scorecard -->\n{text}\n<!-- /scorecard -->\n" in page
    assert all(sentence in text for sentence in RULE)
    scores, tools = published
    changed = scores.assign(**{"closed form_bytes": scores["closed form_bytes"] * 2})
    assert render(changed, tools) != text
    full = scores["kind"] == "out of memory"
    lost = scores["id"] == scores.loc[full & (scores["out_of_scope"] == ""), "id"].iloc[0]
    unanswered = scores.assign(**{"closed form_bytes": scores["closed form_bytes"].mask(lost)})
    assert "| - |" in render(unanswered, tools).partition("## Out of memory")[2].partition("##")[0]
    assert "Not installed: ftuneai 0.4.1 (no: pip)" in render(
        scores, tools.assign(installed=["no: pip" if name == "ftuneai" else "yes" for name in tools["name"]])
    )


def test_an_answer_quotes_the_published_errors_of_its_kind(published: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    found = json.loads(MEASURED_FILE.read_text())
    assert found == measured(published[0])
    assert found != measured(published[0].assign(**{"closed form_bytes": published[0]["closed form_bytes"] * 2}))

    def quoted(**options: Any) -> str:
        gpu = find_gpu(options.pop("gpu", "rtx4080"))
        return answer_by_formula(ask(describe_model("llama-3.2-1b"), options, gpu=gpu)).agreement

    said = quoted(method="qlora")
    for kind, one in found["qlora"].items():
        assert f"{one['points']} {kind} peaks measured on " in said
        assert f"off by {one['mean_percent']:.1f} % on average, {one['worst_percent']:+.1f} % at worst" in said
    assert "none on" not in said and said.endswith(" %") and said.rindex("simulations: ") > said.index("measured")
    assert "none on RTX 4090" in quoted(method="qlora", gpu="rtx4090")
    for options in ({"method": "dora"}, {"method": "qlora", "loss": "liger"}):
        told = quoted(**options)
        assert told.startswith("no peak of such a run was measured on a card; ") and "in 17 simulations: " in told


@pytest.mark.slow
def test_the_page_shows_how_published_runs_ended(in_repository: None) -> None:
    judged = outcomes.judge(outcomes.Outcome.read(outcomes.OUTCOMES_FILE))
    block = f"<!-- outcomes -->\n{outcomes.render(judged)}\n<!-- /outcomes -->\n"
    assert block in Path("docs/scorecard.md").read_text()
    published = pd.read_csv("results/published/scorecard/outcomes.csv", keep_default_na=False)
    assert list(published["fits"]) == list(judged["fits"])
    modelled = judged[judged["not_modelled"] == ""]
    assert len(modelled) >= 60
    assert modelled["right"].mean() >= 0.95


def test_every_point_is_there_and_every_run_in_scope_is_predicted(
    published: tuple[pd.DataFrame, pd.DataFrame], in_repository: None
) -> None:
    scores, tools = published
    assert list(scores["id"]) == list(POINTS)
    assert list(scores["out_of_scope"]) == [why_out(point) for point in POINTS.values()]
    assert all(why_out(p.model_copy(update={"measured_bytes": 1})) == why_out(p) for p in POINTS.values())
    assert list(tools["version"]) == [one.version for one in ESTIMATORS]
    inside = in_scope(scores)
    assert len(inside) > 30
    assert inside["closed form_bytes"].notna().all()
    ratio = inside["simulation_bytes"].astype(float) / inside["closed form_bytes"].astype(float)
    assert ratio.dropna().between(0.98, 1.02).all()
    assert one_a_run(inside)["run"].is_unique
    assert {"full", "lora", "qlora"} == set(inside["method"])


REPRODUCED = (
    "fms-mistral-7b-lora-b4-allocated",
    "fms-mistral-7b-qlora-b4-allocated",
    "canifinetune-qwen2.5-1.5b-qlora-b1-s1024-no-recomputation-allocated",
    "canifinetune-qwen2.5-0.5b-lora-b1-s1024-reserved",
    "fms-llama-3-8b-foak-fast-kernels-liger-lora-b8-allocated",
)


@pytest.mark.parametrize("name", REPRODUCED)
def test_the_closed_form_still_says_what_was_published(name: str, published: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    row = published[0].set_index("id").loc[name]
    assert by_formula(POINTS[name]) == row["closed form_bytes"]


def test_the_closed_form_is_within_a_percent_of_tensors(published: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    """LoRA and QLoRA of 0.5B to 7B by one author, with recomputation and 16 ranks."""
    inside = in_scope(published[0])
    known = inside[inside["id"].str.startswith("canifinetune") & inside["what"].str.contains("recomputed")]
    found = errors(known[known["kind"] == "allocated"], "closed form")
    assert len(found) == 10
    assert found.abs().max() < 0.005


@pytest.mark.parametrize("point", [p for p in POINTS.values() if p.asked], ids=lambda point: point.id)
def test_a_point_can_be_asked_and_says_what_cannot(point: Point) -> None:
    question, unasked = question_of(point)
    assert question.has_closed_form
    assert question.spec.batch_size == point.asked["batch_size"]
    assert set(unasked) <= set(point.asked)


SLOW = [pytest.mark.slow]
THREADS = [pytest.param(row, marks=SLOW * any(name in row["command"] for name in SIMULATED)) for row in read_threads()]


@pytest.mark.parametrize("row", THREADS, ids=lambda row: row["command"])
def test_a_thread_is_answered_as_its_page_says(row: dict[str, str], in_repository: None) -> None:
    assert f"{line(row)}\n" in Path("docs/threads.md").read_text()
