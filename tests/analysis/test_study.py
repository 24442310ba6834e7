"""Studies: what they run, how a rate is chosen, what is concluded, and that a second sitting goes on from the first."""

from __future__ import annotations

import html
import json
import math
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from peftscope.analysis.collect import collect_experiment
from peftscope.analysis.exact_match import points
from peftscope.analysis.stats import of_trimmed_means
from peftscope.analysis.study import HELDOUT, StudyResults
from peftscope.analysis.tuning import choose_rates
from peftscope.claims.checks import training
from peftscope.claims.verdict import Rule, Verdict, judge
from peftscope.cli.main import report
from peftscope.cli.study import describe
from peftscope.errors import InputError
from peftscope.planning.experiment import A_A_SHIFT, BorrowedRate
from peftscope.planning.published import VALIDATION, published_items, published_records
from peftscope.planning.sweep import Sweep, expand
from peftscope.record import Quality, RunRecord, parse_record, write_record
from peftscope.report import export
from peftscope.report.contrasts import (
    CONTROLS,
    contrasts,
    controls,
    counted_line,
    readable_contrasts,
    readable_controls,
    samples_to,
    tuning,
)
from peftscope.report.export import exported
from peftscope.report.overfitting import draw_overfitting, mean_losses, overfitting_sentence
from peftscope.report.plots import draw_figure
from peftscope.report.publish import publish, restore
from peftscope.report.shares import draw_shares, share_table, shares_sentence
from peftscope.report.study import study_facts, write_study

STUDY: dict[str, Any] = yaml.safe_load("""
fixed: {model: toy, task: two-digit-sums, steps: 3, batch_size: 4, validation_items: 8, heldout_items: 8,
  generation_items: 0, retention_tokens: 0, probe_steps: 0, untimed_steps: 1}
runs: [{method: none, seed: 0}]
study:
  arms: {full: {method: full}, lora: {method: lora}, thin: {method: lora, rank: 2}}
  chosen_rates: {full: 1.0e-4, lora: 1.0e-3, thin: 1.0e-3}
  chosen_by: Tossing a coin chose.
  tuning_seeds: [100]
  seeds: [0, 1, 2, 3, 4, 5]
  controls: {lora: [a-a, zero-lr, shuffled-labels]}
""")
ARMS = STUDY["study"]["arms"]
LISTED = {"full": [1e-5, 1e-4, 1e-3], "lora": [1e-4, 1e-3, 1e-2], "thin": [1e-4, 1e-3, 1e-2]}
TUNED: dict[str, Any] = {"learning_rates": LISTED, "chosen_rates": {}}
BASE_LOSS = 3.0
GAINS = {
    "full": [2.0, 2.1, 1.9, 2.05, 1.95, 2.0],
    "lora": [1.9, 2.05, 1.85, 2.06, 1.9, 1.96],
    "thin": [1.5, 1.4, 1.6, 1.55, 1.45, 1.5],
}
"""Of every arm over the base, by seed."""
TASK_GAIN = sum(GAINS["lora"]) / 6 - 0.5
"""What LoRA gains beyond the half nat that shuffled labels teach."""
AGAIN = [1.88, 2.0, 1.9, 2.1, 1.85, 1.95]
CURVE = {"full": [0.6, 0.4, None], "lora": [0.9, 0.5, 0.7], "thin": [0.95, 0.8, 0.85]}
"""Validation loss of every arm, by learning rate; None diverged."""


@pytest.fixture
def write_study_file(write_experiment) -> Callable[..., None]:
    """Writes ``experiments/mine.yaml``; keywords replace fields of its study."""

    def write(**changes: Any) -> None:
        write_experiment("mine", yaml.safe_dump(STUDY | {"study": STUDY["study"] | changes}))

    return write


def mine() -> Sweep:
    """Returns the study as it is expanded now; it is expanded anew only where its file or its rates have changed."""
    files = [Path("experiments/mine.yaml"), *sorted(Path("results/mine").glob("*.json"))]
    return _expanded(Path.cwd(), *(path.read_text() for path in files))


@lru_cache(maxsize=1)
def _expanded(*_: Any) -> Sweep:
    return expand("mine")


def record(run: str, *, status: str = "ok", heldout: float | None = None, **scores: Any) -> None:
    """Writes the record of a run of the study; scores are fields of its quality."""
    quality = Quality(heldout_nll=heldout, **scores)
    losses = [3.0, 2.0, 2.0 if heldout is None else heldout]
    made = RunRecord(run_id=run, status=status, spec=mine().runs[run], quality=quality, train_nll=losses)
    write_record(Path("results/runs") / run / "record.json", made)


def members(comparison: str) -> list[str]:
    return next(list(c.runs) for c in mine().comparisons if c.name == comparison)


def control_runs(control: str) -> list[str]:
    """Returns the runs of a control of LoRA without LoRA's own, with which they are compared."""
    return [run for run in members(f"control-{control}-lora") if run not in members("arm-lora")]


def record_tuning(curves: dict[str, list[float | None]] = CURVE) -> None:
    for arm, curve in curves.items():
        for run, loss in zip(members(f"tune-{arm}"), curve, strict=True):
            record(run, validation_nll=loss, heldout=loss, status="ok" if loss is not None else "diverged")


def record_comparison(gains_of: dict[str, list[float]] = GAINS, **scores: list[dict[str, float]]) -> None:
    """Records the arms and the controls; keywords give further scores of an arm's runs."""
    record(members("runs")[0], heldout=BASE_LOSS)
    for arm, gains in gains_of.items():
        for run, gain, more in zip(members(f"arm-{arm}"), gains, scores.get(arm, [{}] * 6), strict=True):
            record(run, heldout=BASE_LOSS - gain, **more)
    for control, gains in (("a-a", AGAIN), ("zero-lr", [0.0] * 6), ("shuffled-labels", [0.5, 0.4, 0.6] * 2)):
        for run, gain in zip(control_runs(control), gains, strict=True):
            record(run, heldout=BASE_LOSS - gain)


def collected() -> StudyResults:
    collect_experiment(expand("mine"))
    return StudyResults("mine")


def compared(gains_of: dict[str, list[float]] = GAINS, **scores: list[dict[str, float]]) -> StudyResults:
    record_comparison(gains_of, **scores)
    return collected()


def record_rates(gains_of: dict[str, list[float]] = GAINS, beside: float = 0.3, **beside_of: float) -> None:
    """Records all runs of the arms, and decides after each round: the first rates that are known are the best.

    At the rates beside the centre all seeds lose as much as is given, at each rate beyond as much again.
    """
    record(members("runs")[0], heldout=BASE_LOSS)
    centres = {}
    for number in range(4):
        choose_rates(expand("mine"), number)
        for arm, gains in gains_of.items() if number < 3 else ():
            runs, specs = members(f"rates-{arm}"), mine().runs
            rates = sorted({specs[run].learning_rate for run in runs})
            centre = centres.setdefault(arm, rates[1])
            for run in runs:
                steps = round(math.log(specs[run].learning_rate / centre) / math.log(3**0.5))
                loss = BASE_LOSS - gains[specs[run].seed] + beside_of.get(arm, beside) * abs(steps)
                record(run, heldout=loss, validation_nll=loss)


@pytest.fixture
def tuned(write_study_file) -> None:
    """A study at rates that were chosen before."""
    write_study_file()


@pytest.fixture
def untuned(write_study_file) -> None:
    """A study whose listed rates have run, of which none was chosen."""
    write_study_file(**TUNED)
    record_tuning()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[], None]], None]:
    """Makes results in the current folder, or copies them from where they were made before under the same name."""
    folder = tmp_path_factory.mktemp("made")

    def make(name: str, record_all: Callable[[], None]) -> None:
        if not (folder / name).exists():
            record_all()
            collected()
            shutil.copytree("results", folder / name)
        else:
            shutil.copytree(folder / name, "results")

    return make


@pytest.fixture
def at_three_rates(write_study_file, made) -> StudyResults:
    """A study whose arms ran at three rates each, with the best in the middle."""

    def record_all() -> None:
        record_tuning()
        record_rates()
        record_comparison()

    write_study_file(**TUNED)
    made("at three rates", record_all)
    return StudyResults("mine")


@pytest.fixture
def finished(tuned: None, made) -> StudyResults:
    made("finished", record_comparison)
    return StudyResults("mine")


# What a study runs.


def test_first_the_listed_rates_are_known_then_every_arm_runs_at_three_on_the_same_seeds(write_study_file) -> None:
    write_study_file(**TUNED)
    sweep = expand("mine")
    assert {c.name for c in sweep.comparisons} == {"runs", "tune-full", "tune-lora", "tune-thin"}
    assert list(describe(sweep))[-1] == "Power: not known before its own A/A pairs."
    assert len(sweep.runs) == 1 + 9
    assert {spec.seed for run, spec in sweep.runs.items() if "none" not in run} == {100}
    record_tuning()
    choose_rates(expand("mine"), 0)
    sweep = expand("mine")
    for arm, rates in (("full", [5.8e-5, 1e-4, 1.7e-4]), ("lora", [5.8e-4, 1e-3, 1.7e-3])):
        specs = [sweep.runs[run] for run in members(f"rates-{arm}")]
        assert [(s.learning_rate, s.seed) for s in specs] == [(rate, seed) for rate in rates for seed in range(6)]
    assert len(sweep.runs) == 1 + 9 + 3 * 18
    assert not any(c.name.startswith("arm-") for c in sweep.comparisons)


def test_at_chosen_rates_every_arm_runs_at_one_and_shares_further_seeds_with_the_reference(write_study_file) -> None:
    write_study_file(more_seeds={"thin": [6]})
    for arm, rate, seeds in (("full", 1e-4, 7), ("lora", 1e-3, 6), ("thin", 1e-3, 7)):
        specs = [mine().runs[run] for run in members(f"arm-{arm}")]
        assert [(spec.learning_rate, spec.seed) for spec in specs] == [(rate, seed) for seed in range(seeds)]
    assert len(mine().runs) == 1 + 20 + 18
    study = compared(GAINS | {arm: [*GAINS[arm], 1.9] for arm in ("full", "thin")}, full=[{}] * 7, thin=[{}] * 7)
    assert list(study.pairs("lora", "full")) == pytest.approx(list(map(float.__sub__, GAINS["lora"], GAINS["full"])))
    assert len(study.pairs("thin", "full")) == 7


def test_a_control_changes_one_thing(tuned: None) -> None:
    runs = expand("mine").runs
    own = {runs[run].seed: runs[run].canonical() for run in members("arm-lora")}
    for control, change in (
        ("a-a", lambda seed: {"init_seed": seed + A_A_SHIFT}),
        ("zero-lr", lambda seed: {"learning_rate": 0}),
        ("shuffled-labels", lambda seed: {"shuffled_targets": True}),
    ):
        controls_of = [runs[run] for run in control_runs(control)]
        assert len(controls_of) == 6
        for spec in controls_of:
            assert spec.canonical() == own[spec.seed] | change(spec.seed)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chosen_rates": {"full": 1e-4}}, "arms without a rate: lora, thin; each arm"),
        (TUNED | {"learning_rates": LISTED | {"lora": [1e-2, 1e-3, 1e-4]}}, "learning_rates of lora must ascend"),
        (TUNED | {"learning_rates": LISTED | {"lora": [1e-3, 1e-2]}}, "learning_rates of lora must be three or more"),
        (TUNED | {"learning_rates": LISTED | {"lora": []}}, "or none beside a rate in centres"),
        ({"centres": {"lora": 1e-3}}, "centres of what is not tuned: lora"),
        ({"a_a": "full"}, "chosen_rates must have both full and full-a-a, or neither"),
        ({"tuning_seeds": [1]}, "must not overlap"),
        ({"more_seeds": {"dora": [9]}}, "more_seeds name no arm: dora"),
        ({"more_seeds": {"thin": [9, 5]}}, "more_seeds of thin must differ, and be none of"),
        ({"seeds": [0]}, "study.seeds"),
        ({"arms": {"full": {"method": "full"}, "a b": {"method": "lora"}}}, "study.arms"),
        ({"controls": {"dora": ["a-a"]}}, "controls and a_a name no arm: dora"),
        ({"a_a": "dora"}, "controls and a_a name no arm: dora"),
        ({"contrasts": [["lora", "dora"]]}, "contrasts name no arm: dora"),
        ({"contrasts": [["lora", "lora"]]}, "contrasts: lora and lora are compared already, or are one arm"),
        ({"contrasts": [["thin", "lora"], ["lora", "thin"]]}, "lora and thin are compared already"),
        ({"arms": ARMS | {"lora-a-a": {"method": "lora"}}, "given_rates": {"lora-a-a": 1}}, "lora-a-a"),
        ({"arms": ARMS | {"lora": {"method": "lora", "seed": 3}}}, "the study's to set"),
        ({"arms": ARMS | {"lora": {"method": "lora", "rnk": 3}}}, "did you mean `rank`?"),
        ({"given_rates": {"lora": 1e-4}}, "arms with more than one rate: lora; each arm"),
        ({"tuning": {"method": "dora"}}, "tuning may only change what is measured"),
        (TUNED | {"tuning": {"validation_items": 0}}, "fixed.validation_items: a study chooses its rates by"),
        (TUNED | {"arms": ARMS | {"thin": {"method": "lora", "task": "time-intervals"}}}, "no run of the untouched"),
    ],
)
def test_a_wrong_study_is_refused_with_its_place(changes: dict[str, Any], said: str, write_study_file) -> None:
    write_study_file(**changes)
    with pytest.raises(InputError) as caught:
        expand("mine")
    assert said in str(caught.value) and "experiments/mine.yaml" in str(caught.value)


def test_a_study_needs_the_untouched_base(write_experiment) -> None:
    write_experiment("mine", yaml.safe_dump(STUDY | {"runs": [{"method": "none", "base_weights": "nf4"}]}))
    with pytest.raises(InputError, match="a study needs the untouched base"):
        expand("mine")


# How a rate is chosen.


def test_gains_are_counted_from_the_base_in_4_bits_only_if_there_is_no_other() -> None:
    runs = pd.DataFrame({"method": "none", "base_weights": ["nf4", "full"], HELDOUT: [2.0, 3.0]})
    for table, loss in ((runs, 3.0), (runs.iloc[:1], 2.0)):
        study = StudyResults.__new__(StudyResults)
        study.table = table
        assert study.base_loss == loss


def test_the_lowest_validation_loss_is_the_centre_and_everything_tried_is_kept(at_three_rates) -> None:
    for name in ("rates-0.json", "tuned.json"):
        arms = json.loads((Path("results/mine") / name).read_text())["arms"]
        assert {arm: said["rates"][1] for arm, said in arms.items()} == {"full": 1e-4, "lora": 1e-3, "thin": 1e-3}
        assert [tried["validation_nll"] for tried in arms["full"]["tried"]] == CURVE["full"]
    assert {arm: said["learning_rate"] for arm, said in arms.items()} == {"full": 1e-4, "lora": 1e-3, "thin": 1e-3}


def test_a_centre_that_is_known_needs_no_listed_best(write_study_file) -> None:
    write_study_file(**TUNED, centres={"lora": 2e-3})
    record_tuning()
    choose_rates(expand("mine"), 0)
    assert {expand("mine").runs[run].learning_rate for run in members("rates-lora")} == {1.2e-3, 2e-3, 3.5e-3}


def test_an_arm_whose_centre_is_known_may_list_no_rates(write_study_file) -> None:
    write_study_file(**TUNED | {"learning_rates": LISTED | {"lora": []}}, centres={"lora": 2e-3})
    record_tuning({arm: CURVE[arm] for arm in ("full", "thin")})
    assert "tune-lora" not in {comparison.name for comparison in mine().comparisons}
    choose_rates(expand("mine"), 0)
    assert {expand("mine").runs[run].learning_rate for run in members("rates-lora")} == {1.2e-3, 2e-3, 3.5e-3}


def test_an_arm_that_always_diverges_needs_lower_rates(untuned: None) -> None:
    record_tuning({"lora": [None] * 3})
    with pytest.raises(InputError, match="training diverged at all 3 -> add lower ones"):
        choose_rates(expand("mine"), 0)


def test_one_rate_follows_beyond_an_end_at_most_twice_and_the_end_is_told(untuned: None, write_study_file) -> None:
    """LoRA gains at every higher rate, full fine-tuning at one higher rate and no more."""
    record_rates(lora=-0.1)
    rates = [json.loads(Path(f"results/mine/rates-{n}.json").read_text())["arms"]["lora"]["rates"] for n in range(3)]
    assert rates[0] == [5.8e-4, 1e-3, 1.7e-3]
    # Both ends are equally good: the lower one counts first.
    assert rates[1] == [3.3e-4, *rates[0]] and rates[2] == [1.9e-4, *rates[1]]
    record_comparison({arm: GAINS[arm] for arm in ("full", "thin")})
    for run in control_runs("shuffled-labels"):
        record(run, heldout=2.5)
    study = collected()
    assert study.rate("lora").best == 1.9e-4 and len(study.rate("lora").losses) == 5
    assert study.arms_at_an_end == ["lora"]
    assert study_facts(study, expand("mine").experiment.study)["at_an_end"] == "LoRA"
    write_study_file(**TUNED, more_seeds={"lora": [6]})  # further seeds run at all five rates
    assert len({expand("mine").runs[run].learning_rate for run in members("rates-lora")}) == 5


def test_one_lucky_and_one_unlucky_seed_decide_nothing(untuned: None) -> None:
    """At the higher rate one seed is far ahead and the others are behind; at the centre one ended on the steep rise."""
    record_rates()
    for run in members("rates-lora"):
        spec = mine().runs[run]
        if spec.seed == 0 and spec.learning_rate == 1.7e-3:
            record(run, heldout=0.0)
        if spec.seed == 1 and spec.learning_rate == 1e-3:
            record(run, status="diverged")
    choose_rates(expand("mine"), 3)
    gains = [GAINS["lora"][0], 0.0, *GAINS["lora"][2:]]
    study = compared(GAINS | {"lora": gains})
    assert study.rate("lora").best == 1e-3
    kept = sorted(BASE_LOSS - gain for gain in gains)[1:-1]
    assert study.rate("lora").losses[1e-3] == pytest.approx(sum(kept) / 4)
    table = tuning(study).set_index(["arm", "learning_rate"]).loc["lora"]
    assert table["steep"].tolist() == [0, 1, 0] and table["is_best"].tolist() == [False, True, False]


def test_the_interval_of_tuned_arms_chooses_the_rate_anew_without_each_seed(at_three_rates: StudyResults) -> None:
    """Compared with a jackknife in which every step is written out."""
    study = at_three_rates
    losses = {
        arm: {rate: [BASE_LOSS - gain + worse for gain in GAINS[arm]] for rate, worse in ((1, 0.3), (2, 0), (3, 0.3))}
        for arm in ("thin", "full")
    }

    def lowest(arm: str, kept: list[int]) -> float:
        trimmed = [sorted(values[i] for i in kept)[1:-1] for values in losses[arm].values()]
        return min(sum(values) / len(values) for values in trimmed)

    def difference(kept: list[int]) -> float:
        return lowest("full", kept) - lowest("thin", kept)  # above zero, thin is ahead

    without = [difference([i for i in range(6) if i != left]) for left in range(6)]
    error = math.sqrt(5 / 6 * sum((value - sum(without) / 6) ** 2 for value in without))
    found = study.difference("thin", "full")
    assert (found.mean, found.error, found.n) == pytest.approx((difference([*range(6)]), error, 6))
    assert found.half_width() == pytest.approx(stats.t.ppf(0.975, 5) * error)


def test_a_choice_between_rates_that_depends_on_one_seed_widens_the_interval(untuned: None) -> None:
    record_rates()
    for run in members("rates-thin"):  # without seed 5 the higher rate is the best, with it the centre
        spec = mine().runs[run]
        if spec.learning_rate == 1.7e-3:
            record(run, heldout=[1.42, 1.41, 1.43, 1.9, 1.42, 1.9][spec.seed])
    choose_rates(expand("mine"), 3)
    study = compared()
    wide = study.difference("thin", "full").half_width()
    without = StudyResults("mine")
    without.table = study.table[~((study.table["label"] == "LoRA") & (study.table["learning_rate"] == 1.7e-3))]
    assert wide > 1.2 * without.difference("thin", "full").half_width()
    # Beside the loss the choice adds an error: thin is 40 points ahead at the one rate, and 10 at the other.
    is_thin, rates = study.table["label"] == "LoRA", study.table["learning_rate"]
    study.table["greedy_match_fraction"] = np.where(is_thin & (rates == 1.7e-3), 0.8, np.where(is_thin, 0.5, 0.4))
    values = points(study, "thin", "full")
    assert np.mean(values) == pytest.approx(10) and 10 < stats.sem(values) <= 15  # 30 · √(share · (1 − share))
    study.table.loc[is_thin & (rates == 1.7e-3), "greedy_match_fraction"] = None  # not measured there
    assert points(study, "thin", "full") == pytest.approx([10] * 6)


def test_an_arm_that_a_card_cannot_hold_is_left_out_and_told(write_study_file, monkeypatch) -> None:
    write_study_file(**TUNED, controls={})
    monkeypatch.setattr("peftscope.planning.sweep.expand.__defaults__", ("cuda",))
    record_tuning()
    record(members("tune-thin")[0], status="oom")
    gains = {arm: GAINS[arm] for arm in ("full", "lora")}
    record_rates(gains)
    names = {c.name for c in expand("mine").comparisons}
    assert "arm-thin" not in names and {"arm-full", "arm-lora"} <= names
    study = collected()
    study.require_finished()
    found = contrasts(study)
    assert list(found["arm"]) == ["lora"] and set(found["against"]) == {"full"}
    assert study_facts(study, expand("mine").experiment.study)["left_out"] == "“LoRA, thin” (memory ran out)"
    record(members("tune-full")[1], status="oom")
    choose_rates(expand("mine"), 3)
    with pytest.raises(InputError, match="its reference arm `full` is left out"):
        contrasts(collected())
    record(members("tune-lora")[1], status="oom")
    with pytest.raises(InputError, match="memory ran out in every one -> see `peftscope expand mine`"):
        choose_rates(expand("mine"), 3)


def test_fields_of_the_tuning_runs_are_theirs_alone(write_study_file) -> None:
    write_study_file(**TUNED, tuning={"heldout_items": 4})
    record_tuning()
    record_rates()
    sweep = expand("mine")
    items = {c.name.split("-")[0]: {sweep.runs[run].heldout_items for run in c.runs} for c in sweep.comparisons}
    assert items == {"runs": {8}, "tune": {4}, "rates": {8}, "grid": {8}, "arm": {8}, "control": {8}}


def test_choosing_needs_every_record(write_study_file) -> None:
    write_study_file(**TUNED)
    with pytest.raises(InputError, match="no record yet"):
        choose_rates(expand("mine"), 0)
    record_tuning()
    record(members("tune-lora")[1], status="failed")
    with pytest.raises(InputError, match=r"failed: .*remove its record.json to try again"):
        choose_rates(expand("mine"), 0)


def test_an_arm_that_is_left_out_takes_its_rates_and_controls_along(own) -> None:
    own("parent", yaml.safe_dump(STUDY))
    own("child", "extends: parent\nstudy: {arms: {thin: null}}\n")
    assert {c.name for c in expand("child").comparisons} >= {"arm-full", "arm-lora", "control-a-a-lora"}
    assert "arm-thin" not in {c.name for c in expand("child").comparisons}


# An arm that enters again.


def test_the_a_a_arm_has_its_own_listed_runs_and_another_start_for_each_seed_at_every_rate(write_study_file) -> None:
    write_study_file(**TUNED, a_a="full", controls={"lora": ["shuffled-labels"]}, control_seeds=[0, 1])
    assert {spec.seed for run, spec in expand("mine").runs.items() if run in members("tune-full-a-a")} == {1100}
    record_tuning(CURVE | {"full-a-a": [0.4, 0.5, 0.6]})
    record_rates(GAINS | {"full-a-a": GAINS["full"]})
    sweep = expand("mine")
    again = [sweep.runs[run] for run in members("rates-full-a-a")]
    assert {spec.learning_rate for spec in again} == {5.8e-6, 1e-5, 1.7e-5}
    assert all(spec.init_seed == spec.seed + A_A_SHIFT for spec in again)
    shuffled = [sweep.runs[run] for run in members("control-shuffled-labels-lora")]
    assert sorted(spec.seed for spec in shuffled if spec.shuffled_targets) == [0, 1]


def test_the_reference_counts_with_its_a_a(write_study_file) -> None:
    """Compared with a jackknife that leaves each seed out of the arm, of the reference and of its A/A at once."""
    write_study_file(**TUNED, a_a="full", controls={})
    record_tuning(CURVE | {"full-a-a": [0.4, 0.5, 0.6]})
    gains = GAINS | {"full-a-a": [2.3, 1.8, 2.0, 2.25, 1.9, 2.1]}
    record_rates(gains)
    study = collected()

    def loss(arm: str, kept: list[int]) -> float:
        return BASE_LOSS - np.mean(sorted(gains[arm][seed] for seed in kept)[1:-1])

    def difference(kept: list[int]) -> float:
        return (loss("full", kept) + loss("full-a-a", kept)) / 2 - loss("thin", kept)

    without = [difference([i for i in range(6) if i != left]) for left in range(6)]
    error = math.sqrt(5 / 6 * sum((value - sum(without) / 6) ** 2 for value in without))
    found = study.difference("thin", "full")
    assert (found.mean, found.error) == pytest.approx((difference([*range(6)]), error))
    assert study.difference("full", "thin").mean == pytest.approx(-found.mean)
    assert study.difference("full-a-a", "full").mean == pytest.approx(
        loss("full", [*range(6)]) - loss("full-a-a", [*range(6)])
    )
    text = readable_contrasts(contrasts(study), study.labels).set_index("arm")["against"]
    assert set(text.filter(like="A/A")) == {"full fine-tuning alone"}
    assert text["LoRA"] == "full fine-tuning and its A/A"
    fewer = StudyResults("mine")
    fewer.table = study.table[~((study.table["comparisons"].str.contains("full-a-a")) & (study.table["seed"] == 5))]
    assert fewer.difference("thin", "full").n == 5 and fewer.difference("thin", "lora").n == 6


def test_the_lowest_loss_along_shuffled_runs_is_what_the_form_explains(tuned: None) -> None:
    record_comparison()
    for run in control_runs("shuffled-labels"):
        record(run, heldout=2.9, validation_nll=2.8, validation_curve={1: 2.7, 2: 2.4})
    for run in members("arm-lora"):
        record(run, heldout=1.0, validation_nll=1.1, validation_curve={1: 2.0, 2: 1.5})
    study = collected()
    assert study.task_gain == pytest.approx(2.4 - 1.1)
    # Batches of four; 1.3 lies half way between the losses after the second and the third step.
    assert samples_to(study, 1.3, "lora") == pytest.approx([10.0] * 6)
    assert samples_to(study, 1.0, "lora") == [math.inf] * 6


def test_an_arm_may_have_a_given_rate_or_that_of_another(write_study_file) -> None:
    arms = ARMS | {"paper": {"method": "dora"}, "short": {"method": "lora", "steps": 2}}
    borrowed = {"short": {"arm": "lora", "times": 3}}
    write_study_file(arms=arms, given_rates={"paper": 2e-5}, borrowed_rates=borrowed)
    sweep = expand("mine")
    assert {sweep.runs[run].learning_rate for run in members("arm-paper")} == {2e-5}
    assert {sweep.runs[run].learning_rate for run in members("arm-short")} == {3e-3}
    study = compared(GAINS | {"paper": GAINS["thin"], "short": GAINS["lora"]})
    assert study.arms == ["full", "lora", "paper", "short", "thin"]
    assert study.rate("paper").best == 2e-5 and study.rate("short").regret == 0
    study._tuned = {"lora": {"learning_rate": 1e-3, "tried": [], "regret_rms": 0.02}}
    assert study.rate("short").regret == 0  # at three times LoRA's rate
    study.settings.borrowed_rates["short"] = BorrowedRate(arm="lora")
    assert study.rate("short").regret == 0.02 and study.rate("paper").regret == 0
    with pytest.raises(InputError, match="the arm `paper` was not tuned: its rate was given"):
        study.tuning_runs("paper")


def test_power_is_that_of_the_pilots_pairs(in_repository: None) -> None:
    said = list(describe(expand("targets", assume_rates=True)))[-1]
    assert said.startswith("Power: 8 A/A pairs of `variants` spread by")


# What is concluded.


def test_contrasts_are_paired_by_seed_and_corrected_for_their_number(finished: StudyResults) -> None:
    found = contrasts(finished).set_index("arm")
    assert list(found.index) == ["lora", "thin"] and set(found["against"]) == {"full"}
    for arm in found.index:
        wanted = stats.ttest_rel(GAINS[arm], GAINS["full"])
        assert found["difference"][arm] == pytest.approx(sum(GAINS[arm]) / 6 - 2.0)
        assert found["percent"][arm] == pytest.approx(100 * found["difference"][arm] / TASK_GAIN)
        assert found["t_p"][arm] == pytest.approx(wanted.pvalue)
        low, high = wanted.confidence_interval(0.95)
        assert (found["difference_low"][arm], found["difference_high"][arm]) == pytest.approx((low, high))
    assert found["outcome"].tolist() == ["differs, size open", "differs by more than the margin"]
    assert found["sign_flip_p"]["thin"] == 2 / 2**6  # of six pairs on one side
    smaller, larger = sorted(found["t_p"])
    assert sorted(found["holm_p"]) == pytest.approx([2 * smaller, max(2 * smaller, larger)])


def test_a_study_may_compare_two_of_its_arms_as_well(write_study_file) -> None:
    write_study_file(contrasts=[["thin", "lora"]])
    study = compared()
    table = contrasts(study)
    assert table[["arm", "against"]].to_numpy().tolist() == [["lora", "full"], ["thin", "full"], ["thin", "lora"]]
    added = table.iloc[-1]
    assert added["difference"] == pytest.approx((sum(GAINS["thin"]) - sum(GAINS["lora"])) / 6)
    assert added["holm_p"] >= added["t_p"] and added["outcome"] == "differs by more than the margin"
    write_study("mine")
    figure = Path("results/mine/figures/differences.svg").read_text()
    assert "LoRA, thin against" in figure
    upside_down = readable_contrasts(table[::-1], study.labels)  # each block begins with the best arm
    assert upside_down[["arm", "against"]].to_numpy().tolist() == [
        ["LoRA, thin", "LoRA"],
        ["LoRA", "full fine-tuning"],
        ["LoRA, thin", "full fine-tuning"],
    ]
    said = "Beside full: 1 behind by more than 2.5 % of the task gain, 1 behind."
    assert counted_line(table, "full") == said
    better = table.assign(difference=-table["difference"])
    several = counted_line(pd.concat([table, better[:1]]), "full")
    assert several.count("1 behind") == 2 and "1 ahead" in several
    # What the interval alone would decide, and the correction does not.
    said = counted_line(table[:1].assign(outcome="open"), "full fine-tuning")
    assert said == "Beside full fine-tuning: 1 not told apart after Holm's correction."


def test_controls_say_what_the_comparison_makes_of_no_difference(finished: StudyResults) -> None:
    found = controls(finished).set_index("control")
    gained = {"a-a": sum(AGAIN) / 6, "zero-lr": 0, "shuffled-labels": 0.5}
    assert found["control_over_base"].to_dict() == pytest.approx(gained, abs=1e-12)
    assert found["arm_over_base"].tolist() == pytest.approx([sum(GAINS["lora"]) / 6] * 3)
    assert found["difference"]["a-a"] == pytest.approx((sum(AGAIN) - sum(GAINS["lora"])) / 6)


def test_a_study_of_ones_own_has_the_published_arms_of_its_world_below_it(
    finished: StudyResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "WORLDS", {"A": "world"})
    alone = exported("mine", "markdown")
    world = Path("results/published/world")
    shutil.copytree("results/mine", world)
    runs = pd.read_csv(world / "runs.csv")
    runs["comparisons"] = runs["comparisons"].str.replace("arm-thin", "arm-slim")
    runs.to_csv(world / "runs.csv", index=False)
    (world / "tables").mkdir(exist_ok=True)
    contrasts(StudyResults("world", is_published=True)).to_csv(world / "tables/contrasts.csv", index=False)
    head, rule, lora, thin, *_ = alone.splitlines()
    below = exported("mine", "markdown").splitlines()
    assert below[:4] == [head, rule, lora, thin] and "Arms with (world) are published" in below[-1]
    assert below[4] == thin.replace("LoRA, thin", "LoRA, slim (world)") and not below[5]  # LoRA stands there already
    assert exported("mine", "csv").count("\n") == 3 and "(world)" not in exported("world", "markdown")
    # A reference that ran otherwise was judged otherwise.
    runs["run_id"] += "-of-other-steps"
    runs.to_csv(world / "runs.csv", index=False)
    assert exported("mine", "markdown") == alone
    shutil.rmtree(world)


def test_what_is_compared_and_controlled_is_told_in_words(finished: StudyResults) -> None:
    shown = readable_contrasts(contrasts(finished), finished.labels).set_index("arm")
    assert list(shown.index) == ["LoRA", "LoRA, thin"] and set(shown["pairs"]) == {"n = 6"}
    assert shown["what it says"]["LoRA, thin"] == "behind by more than 2.5 % of the task gain"
    again = readable_controls(controls(finished), finished.labels).iloc[0]
    assert again["control"] == "LoRA, another initialisation seed (A/A)"
    assert again["ahead of the arm by (nats/token)"].startswith(
        f"{(sum(AGAIN) - sum(GAINS['lora'])) / 6:+.4f} [".replace("-", "−")
    )


def test_the_section_of_the_report_has_its_tables_and_figures(at_three_rates: StudyResults) -> None:
    write_study("mine")
    folder = Path("results/mine")
    for name, axis in (("tuning", "learning rate"), ("differences", "further right is better")):
        drawn = (folder / "figures" / f"{name}.svg").read_text()
        assert axis in drawn
        assert drawn.count("<use") > 3
    pd.testing.assert_frame_equal(pd.read_csv(folder / "tables" / "contrasts.csv"), contrasts(at_three_rates))
    shown = (folder / "tables" / "controls.html").read_text()
    assert all(f"LoRA, {name}" in html.unescape(shown) for name in CONTROLS.values())
    facts = study_facts(at_three_rates, expand("mine").experiment.study)
    assert facts["chosen"] == "full fine-tuning 0.0001; LoRA 0.001; LoRA, thin 0.001"
    assert (facts["seeds"], facts["fewest_rates"], facts["base_loss"]) == (6, 3, "3.000")
    assert len(pd.read_csv(folder / "tables" / "tuning.csv")) == 9
    shown = (folder / "tables" / "tuning.html").read_text()
    assert "0.001, the best" in shown and "0.0017" in shown


def test_each_rank_keeps_a_share_of_what_full_fine_tuning_gains(finished: StudyResults) -> None:
    table = share_table(finished, "rank").set_index("rank")
    assert list(table.index) == [2, 8] and set(table["method"]) == {"LoRA"} and set(table["rate"]) == {1e-3}
    gains = {arm: sum(of_arm) / 6 - 0.5 for arm, of_arm in GAINS.items()}
    assert table.loc[2, "share"] == pytest.approx(gains["thin"] / gains["full"])
    assert table.loc[8, "share"] == pytest.approx(gains["lora"] / gains["full"])
    assert (table["low"] < table["share"]).all() and (table["share"] < table["high"]).all()
    assert list(table["is_same"]) == [False, finished.difference("lora", "full").is_same]
    draw_figure(Path("shares.svg"), lambda axes: draw_shares(axes, "mine"))
    assert "learning rate" in Path("shares.svg").read_text()
    sentence = shares_sentence("mine")
    assert sentence.startswith(
        "Of what full fine-tuning gains on the task, LoRA reaches 66.7 % at rank 2, 96.9 % at rank"
    )


def test_a_study_of_few_examples_shows_what_is_trained_and_what_is_not(finished: StudyResults) -> None:
    scored = members("arm-lora")
    losses = pd.read_csv("results/mine/losses.csv").set_index(["run_id", "step"])
    runs = pd.read_csv("results/mine/runs.csv").set_index("run_id")
    for run in (*scored, *members("arm-thin")):
        losses.loc[(run, 1), VALIDATION] = 0.25
        runs.loc[run, VALIDATION] = 0.75
    runs.loc[scored, "train_items"] = 64
    losses.to_csv("results/mine/losses.csv")
    runs.to_csv("results/mine/runs.csv")
    curves = mean_losses(StudyResults("mine"))
    assert list(curves) == ["lora"]  # the reference was not scored along the training, and others train on all items
    assert curves["lora"]["validation"].tolist() == [0.25, 0.75]
    first = losses.loc[(scored[0], 1), "nll_nats_per_token"]
    assert curves["lora"]["training"].iloc[0] == pytest.approx(first)
    draw_figure(Path("overfitting.svg"), lambda axes: draw_overfitting(axes, "mine"))
    assert "training loss" in Path("overfitting.svg").read_text()
    assert "0.500 (LoRA) nats per token above its lowest" in overfitting_sentence("mine")


def test_results_are_read_where_they_are_all_that_is_left(at_three_rates: StudyResults) -> None:
    before = contrasts(at_three_rates)
    Path("experiments/mine.yaml").unlink()
    left = StudyResults("mine")
    assert left.settings is None
    pd.testing.assert_frame_equal(contrasts(left), before)
    assert len(share_table(left, "rank")) == 2


def lead(arm: str, other: str) -> list[float]:
    return [(a - b) / TASK_GAIN for a, b in zip(GAINS[arm], GAINS[other], strict=True)]


def test_claims_measure_shares_of_the_task_gain(finished: StudyResults) -> None:
    found = training.heldout_gain("mine", "lora", "full")
    assert found.samples == pytest.approx(lead("lora", "full"))
    assert found.low < found.value < found.high and found.n == 6
    assert set(found.run_ids) == {*members("arm-lora"), *members("arm-full")}
    # Losses of 3, 2 and the held-out loss: a third of the held-out difference.
    learned = training.training_gain("mine", "lora", "full")
    assert learned.samples == pytest.approx([value / 3 for value in found.samples])


def test_a_narrow_difference_outside_the_margin_speaks_louder_than_a_wide_one(tuned: None) -> None:
    gains = {"lora": [2.0, 2.8, 1.2, 2.6, 1.4, 2.2], "thin": [1.7, 1.71, 1.69, 1.7, 1.71, 1.69]}
    compared(GAINS | {"full": [2.0] * 6} | gains)
    lora, thin = (training.heldout_gain("mine", arm, "full") for arm in ("lora", "thin"))
    assert max(-lora.low, lora.high) > max(-thin.low, thin.high)
    found = training.furthest("mine", {"lora": "full", "thin": "full"}, 0.05)
    assert found.samples == thin.samples
    assert judge(Rule(same_within=0.05), found)[0] == Verdict.WRONG


def test_claims_compare_gains_with_gains(finished: StudyResults) -> None:
    found = training.difference_of_gains("mine", ["thin", "lora"], ["full", "lora"])
    assert found.samples == pytest.approx(lead("thin", "full"))
    assert judge(Rule(better_by=0), found)[0] == Verdict.WRONG
    other_way = training.difference_of_gains("mine", ["full", "lora"], ["thin", "lora"])
    assert judge(Rule(better_by=0), other_way)[0] == Verdict.HOLDS


def test_claims_find_the_smallest_rank_that_is_enough(tuned: None) -> None:
    level = [2.0, 2.01, 1.99, 2.0, 2.01, 1.99]
    ranks = {"thin": 2, "lora": 8, "full": 64}

    def smallest(thin: float, noise: float) -> training.Measurement:
        compared({"full": level, "lora": level[::-1], "thin": [thin + noise * (-1) ** k for k in range(6)]})
        return training.smallest_rank("mine", ranks, 0.05)

    behind = smallest(1.5, 0.01)
    assert (behind.low, behind.value, behind.high) == (8, 8, 8)
    assert judge(Rule(at_most=8), behind)[0] == Verdict.HOLDS and judge(Rule(at_most=4), behind)[0] == Verdict.WRONG
    enough = smallest(1.98, 0.01)
    assert (enough.low, enough.value, enough.high) == (2, 2, 2)
    unsure = smallest(1.98, 0.5)
    assert (unsure.low, unsure.value, unsure.high) == (2, 8, 8) and judge(Rule(at_most=4), unsure)[0] == Verdict.OPEN


def test_claims_count_answers_in_points(tuned: None) -> None:
    compared(lora=[{"exact_match": share} for share in [0.5, 0.6, 0.55] * 2], full=[{"exact_match": 0.4}] * 6)
    found = training.accuracy_gain("mine", "lora", "full")
    assert found.samples == pytest.approx([10, 20, 15, 10, 20, 15])
    assert judge(Rule(better_by=0), found)[0] == Verdict.HOLDS
    assert judge(Rule(better_by=0), training.accuracy_gain("mine", "full", "lora"))[0] == Verdict.WRONG


def test_what_a_claim_tells_of_each_arm_is_over_the_seeds_that_both_have(write_study_file) -> None:
    write_study_file(more_seeds={"thin": [6]})
    scored = {"full": [0.4] * 6 + [0.9], "lora": [0.5] * 6, "thin": [0.4] * 7}
    rows = {arm: [{"exact_match": share} for share in shares] for arm, shares in scored.items()}
    compared(GAINS | {arm: [*GAINS[arm], 1.9] for arm in ("full", "thin")}, **rows)
    told = list(training.accuracy_gain("mine", "lora", "full").evidence.values())
    assert told[:2] == pytest.approx([50, 40])


def test_points_of_exact_match_are_those_of_the_whole_split_where_both_arms_have_it(tuned: None) -> None:
    whole = {arm: [{"exact_match": 0.5, "greedy_match": greedy}] * 6 for arm, greedy in (("full", 0.4), ("lora", 0.45))}
    record_comparison(**whole, thin=[{"exact_match": 0.25}] * 6)
    record(members("arm-lora")[0], status="diverged")
    table = contrasts(collected()).set_index("arm")["accuracy"]
    # The untouched base gets none right.
    assert table[["lora", "thin"]].tolist() == pytest.approx([(5 * 5 - 40) / 6, -25])


def test_answers_that_are_lists_are_told_by_tokens_and_by_symbols(write_experiment) -> None:
    write_experiment("mine", yaml.safe_dump(STUDY | {"fixed": STUDY["fixed"] | {"task": "pronunciation"}}))
    record_comparison(full=[{"token_accuracy": 0.6}] * 6, lora=[{"token_accuracy": 0.5}] * 6)
    items = [{"target": "K AE T", "answer": "K AE D Z"}, {"target": "AH", "answer": "AH"}, {"target": "Z"}]
    (Path("results/runs") / members("arm-lora")[0] / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    study = collected()
    assert "−10.0" in set(readable_contrasts(contrasts(study), study.labels)["by (points of argmax tokens)"])
    assert tuning(study).iloc[1][["argmax_tokens_percent", "wrong_phones_percent"]].tolist() == [50, 50]


def test_points_of_arms_at_several_rates_are_without_the_best_and_the_worst_seed(at_three_rates: StudyResults) -> None:
    greedy = {"thin": [0.0, 0.5, 0.52, 0.48, 0.5, 1.0], "full": [0.4, 0.42, 0.38, 0.41, 0.39, 0.9]}
    table = at_three_rates.table
    for arm, values in greedy.items():
        for run, value in zip(members(f"arm-{arm}"), values, strict=True):
            table.loc[table["run_id"] == run, "greedy_match_fraction"] = value
    found = points(at_three_rates, "thin", "full")
    assert sum(found) / 6 == pytest.approx(100 * (0.5 - 0.405)) and len(found) == 6
    # One rate of each is the best whichever seeds are drawn, so that nothing is added.
    assert found == pytest.approx(of_trimmed_means(float.__sub__, *(100 * np.array(greedy[arm]) for arm in greedy)))


def test_a_run_that_diverged_stays_in_its_pair_as_the_untouched_base(tuned: None) -> None:
    record_comparison()
    record(members("arm-lora")[2], status="diverged")
    study = collected()
    row = contrasts(study).set_index("arm").loc["lora"]
    assert (row["n"], row["diverged"]) == (6, 1)
    assert row["difference"] == pytest.approx((sum(GAINS["lora"]) - GAINS["lora"][2]) / 6 - 2.0)
    assert training.heldout_gain("mine", "lora", "full").evidence["runs that diverged"] == 1


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("interrupted", r"not finished \(5 of 6 runs done\)"),
        ("failed", r"{run}: failed: \S+ -> see its train.log; remove its record.json"),
        ("oom", r"{run}: oom: \S+ -> see its train.log; remove its record.json"),
    ],
)
def test_a_run_that_did_not_end_well_is_still_to_be_made(status: str, said: str, tuned: None) -> None:
    record_comparison()
    run = members("arm-lora")[2]
    record(run, status=status)
    with pytest.raises(InputError, match=said.format(run=run)):
        contrasts(collected())


def test_without_a_task_gain_there_is_no_yardstick(tuned: None) -> None:
    study = compared(GAINS | {"lora": [0.4] * 6})
    with pytest.raises(InputError, match="it learned no more than shuffled labels teach"):
        training.heldout_gain("mine", "lora", "full")
    assert len(contrasts(study))
    assert counted_line(contrasts(study), "full") == ""  # a share of nothing is no number
    shown = readable_contrasts(contrasts(study), study.labels)
    assert set(shown["ahead of full fine-tuning by (% of the task gain)"]) == {"-"}
    assert "samples to the reference's loss and the margin" not in shown


def test_rates_that_were_chosen_under_other_settings_do_not_count(at_three_rates: StudyResults) -> None:
    path = Path("experiments/mine.yaml")
    path.write_text(path.read_text().replace("steps: 3", "steps: 5"))
    assert len(expand("mine").runs) == 1 + 9
    with pytest.raises(InputError, match="chosen under other settings"):
        collected().tuning_runs("lora")


def test_the_report_of_half_a_study_says_so(untuned: None, toy: Path) -> None:
    Path("resources").symlink_to(toy / "resources")
    record(members("runs")[0], heldout=BASE_LOSS)
    choose_rates(expand("mine"), 0)
    report("mine")
    page = Path("reports/mine/report.html").read_text()
    assert "its last runs have not begun" in page and 'id="tuning"' not in page


# A second sitting.


def test_what_was_published_of_half_a_study_is_where_the_next_sitting_begins(untuned: None) -> None:
    choose_rates(expand("mine"), 0)
    record(members("rates-lora")[0], heldout=1.0)
    publish("mine")
    measured = Path("results/published/mine/directions.json")
    measured.write_text("{}")
    publish("mine")
    assert measured.read_text() == "{}"  # although the adapters that it was measured on may be gone
    before = {p.parent.name: p.read_bytes() for p in Path("results/runs").glob("*/record.json")}
    assert len(before) == 10
    Path("results/runs").rename("results/lost")
    chosen = Path("results/mine/rates-0.json")
    rates = chosen.read_text()
    chosen.unlink()
    record(members("tune-lora")[0], validation_nll=0.9)
    with pytest.raises(InputError, match=r"9 published runs are missing here.*peftscope restore mine"):
        publish("mine")
    assert restore("mine") == 10
    assert chosen.read_text() == rates
    drawn = Path("results/published/mine/figures/updates.svg")
    drawn.touch()  # as if the weights of adapters that are gone had been measured
    with pytest.raises(InputError, match=r"updates.svg: what is here is not enough.*make report EXPERIMENT=mine"):
        publish("mine")
    drawn.unlink()
    after = {p.parent.name: p.read_bytes() for p in Path("results/runs").glob("*/record.json")}
    # What is there already is left alone.
    assert [run for run in before if after[run] != before[run]] == [members("tune-lora")[0]]
    spec = expand("mine").runs[members("tune-lora")[1]]
    written = Path("results/runs") / members("tune-lora")[1] / "spec.json"
    assert json.loads(written.read_text()) == json.loads(spec.model_dump_json())
    with pytest.raises(InputError, match="no published runs"):
        restore("smoke")


def test_an_arm_that_has_run_is_published_with_its_further_rates_before_the_others(untuned: None) -> None:
    choose_rates(expand("mine"), 0)
    for run in members("rates-lora"):
        record(run, heldout=1.0 - 100 * expand("mine").runs[run].learning_rate)  # the best rate is the highest
    record(members("runs")[0], heldout=2.0)
    publish("mine")
    assert {expand("mine").runs[run].learning_rate for run in members("rates-lora")} == {5.8e-4, 1e-3, 1.7e-3, 3e-3}
    assert {expand("mine").runs[run].learning_rate for run in members("rates-full")} == {5.8e-5, 1e-4, 1.7e-4}
    assert not Path("results/mine/rates-2.json").exists()  # nothing ran at the rate that was added


def test_arms_that_have_their_best_rate_are_compared_before_the_others_have_run(write_study_file) -> None:
    """The p of a comparison is corrected as if all that are missing had come out worst."""
    write_study_file(**TUNED)
    with pytest.raises(InputError, match="not finished"):
        publish("mine")
    record(members("tune-lora")[1], validation_nll=0.5)
    publish("mine")
    assert list(published_records("mine")) == [members("tune-lora")[1]]
    record_tuning({arm: CURVE[arm] for arm in ("full", "lora")})
    publish("mine")
    record(members("runs")[0], heldout=BASE_LOSS)
    for arm in ("lora", "full"):
        for run in members(f"rates-{arm}"):
            spec = mine().runs[run]
            middle = spec.learning_rate in (1e-3, 1e-4)
            record(run, heldout=BASE_LOSS - GAINS[arm][spec.seed] + 0.1 * (not middle))
        publish("mine")
        page = Path("reports/published/mine/report.html").read_text()
        assert ("its reference arm `full` is left out (not finished)" in page) == (arm == "lora")
    for run in [run for control in ("a-a", "zero-lr", "shuffled-labels") for run in control_runs(control)]:
        record(run, heldout=2.5)
    publish("mine")
    page = Path("reports/published/mine/report.html").read_text()
    assert "Not compared: “LoRA, thin” (not finished)." in page and "<td>full fine-tuning</td>" in page
    study = collected()
    assert study.left_out == {"thin": "not finished"} and study.rate("full").best == 1e-4
    found = training.heldout_gain("mine", "full", "lora")
    assert found.p_adjusted == pytest.approx(2 * study.difference("full", "lora").p)
    with pytest.raises(InputError, match="not finished"):
        training.heldout_gain("mine", "thin", "lora")
    record_tuning({"thin": CURVE["thin"]})
    choose_rates(expand("mine"), 0)
    assert collected().rate("full").best == 1e-4 and len(members("rates-full")) == len(members("rates-thin")) == 18
    for run in members("rates-thin"):
        record(run, heldout=BASE_LOSS - 0.1)
    study = collected()  # its best rate is not chosen yet
    assert study.corrected_p("full", "lora") == pytest.approx(2 * study.difference("full", "lora").p)
    with pytest.raises(InputError, match=r"the arm `thin` is left out \(not finished\)"):
        study.rate("thin")


@pytest.mark.slow
def test_a_finished_study_is_published_with_runs_that_diverged(at_three_rates: StudyResults) -> None:
    report("mine")
    page = Path("reports/mine/report.html").read_text()
    assert "not finished" not in page and 'id="tuning"' in page
    Path("results/mine/all-runs-ended-well").touch()
    publish("mine")
    published = Path("results/published/mine")
    assert (published / "tuned.json").is_file() and (published / "tables" / "controls.csv").is_file()
    diverged = members("tune-full")[2]
    assert parse_record(published_records("mine")[diverged], diverged).status == "diverged"
    assert diverged not in published_items("mine")
    assert len(list(published.rglob("*.*"))) <= 23
    here = training.training_gain("mine", "thin", "lora")
    Path("results/mine").rename("results/gone")
    assert training.training_gain("mine", "thin", "lora") == here


@pytest.mark.slow
def test_a_study_of_one_arm_shows_no_comparison(write_study_file) -> None:
    rates = {"learning_rates": {"lora": LISTED["lora"]}, "chosen_rates": {}}
    write_study_file(arms={"lora": {"method": "lora"}}, **rates, controls={}, a_a=None)
    record_tuning({"lora": CURVE["lora"]})
    record_rates({"lora": GAINS["lora"]})
    report("mine")
    page = Path("reports/mine/report.html").read_text()
    assert '<figure id="tuning">' in page and '<figure id="differences">' not in page
    assert not Path("results/mine/figures/differences.svg").exists()  # which the page of findings would show
    assert "the training loss of LoRA" in page and "the highest" not in page and "a factor of" not in page
