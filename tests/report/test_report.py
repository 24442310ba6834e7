"""Tables, figures, sentences and the page, from runs that were really made."""

from __future__ import annotations

import ast
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from conftest import quartiles, run_here

from peftscope.analysis.collect import collect_experiment, read_runs, row_of
from peftscope.errors import InputError
from peftscope.files.lock import locked
from peftscope.methods import METHODS
from peftscope.planning.plan import Plan
from peftscope.planning.sweep import expand
from peftscope.record import Memory, PhaseMemory, RunRecord, Timing
from peftscope.report import tables
from peftscope.report.looks import LOOKS, SAFE_COLOURS, arm_looks, looks
from peftscope.report.page import write_all
from peftscope.report.plots import draw_figure, draw_memory, draw_pareto, draw_throughput
from peftscope.report.publish import publish
from peftscope.report.sentences import FIGURES, NOTHING, sentence
from peftscope.report.serving import latencies, limited_runs

EXPERIMENT = """
title: Report test
fixed: {model: toy, task: two-digit-sums, steps: 4, batch_size: 4, heldout_items: 8, generation_items: 0,
  eval_batch_size: 8, retention_tokens: 32, untimed_steps: 1}
axes: {method: [lora, full]}
methods: {full: {learning_rate: 1.0e+30, max_grad_norm: null}}
seeds: [0, 1]
runs: [{method: none}, {method: none, base_weights: nf4}]
ladders: [{centre: {method: lora}, seeds: [0], axes: {rank: [2, 8], targets: [minimal, all-linear]}}]
"""


@pytest.fixture
def finished(toy: Path, write_experiment, shared_folder: Path) -> str:
    """An experiment of which all runs but one are done, and full fine-tuning diverged."""
    write_experiment("mine", EXPERIMENT)
    Path("resources").symlink_to(toy / "resources")
    sweep = expand("mine")
    *done, _ = sweep.runs.items()
    for identity, spec in done:
        made = shared_folder / identity
        with locked(shared_folder / f"{identity}.lock", seconds=300):
            if not (made / "record.json").exists():
                run_here(spec, made)
        shutil.copytree(made, Path("results/runs") / identity)
    collect_experiment(sweep)
    return "mine"


def test_from_records_to_a_self_contained_page(finished: str) -> None:
    html = write_all(Plan(expand(finished))).read_text()
    assert not re.findall(r'\b(?:src|href)="(?!data:|#)', html)
    assert html.count("<figure") == len(FIGURES) + 2
    assert "Report test" in html
    assert f"make report EXPERIMENT={finished}" in html
    assert " runs did not end well" in html


def test_tables_say_n_and_show_every_ending(finished: str) -> None:
    runs = read_runs(finished)
    assert sorted(runs["status"].unique()) == ["diverged", "missing", "ok"]
    methods = tables.method_summary(runs).set_index("label")
    assert methods.loc["LoRA", "n"] == 2
    lora = methods.loc["LoRA"]
    assert lora["heldout_nll_low"] <= lora["heldout_nll"] <= lora["heldout_nll_high"]
    assert methods.loc["full fine-tuning", "n"] == 0
    assert pd.isna(methods.loc["full fine-tuning", "heldout_nll_low"])
    shown = tables.readable_methods(tables.method_summary(runs)).set_index("method")
    assert shown.loc["full fine-tuning", "runs"] == "n = 0 (diverged, diverged)"
    assert shown.loc["base", "runs"] == "n = 1"
    good = runs[(runs["label"] == "LoRA") & (runs["rank"] == 8) & (runs["targets"] == "all-linear")]
    assert methods.loc["LoRA", "heldout_nll"] == pytest.approx(good["heldout_nll_nats_per_token"].mean())


def test_runs_with_other_settings_are_never_pooled_as_seeds(finished: str) -> None:
    runs = read_runs(finished)
    lora = runs[(runs["label"] == "LoRA") & runs["comparisons"].str.contains("grid")].index
    runs.loc[lora[0], "batch_size"] = 99
    methods = tables.method_summary(runs)
    assert methods.loc[methods["label"] == "LoRA", "n"].tolist() == [1, 1]
    assert sorted(tables.variants(runs.loc[lora])) == ["LoRA (batch size 4)", "LoRA (batch size 99)"]


def test_starts_that_differ_by_the_seed_alone_are_pooled(finished: str) -> None:
    runs = read_runs(finished)
    lora = runs[(runs["label"] == "LoRA") & runs["comparisons"].str.contains("grid")].index
    starts = [f"lora-r8-s{seed}-0123456{seed}" for seed in runs.loc[lora, "seed"]]
    runs = runs.assign(start_from=pd.Series(starts, index=lora))
    assert sorted(tables.variants(runs.loc[lora])) == ["LoRA", "LoRA"]
    runs.loc[lora[0], "start_from"] = "full-s9-01234567"
    assert len(set(tables.variants(runs.loc[lora]))) == 2
    pooled = sentence("pareto", runs, pd.read_csv("results/mine/losses.csv"))
    assert "LoRA (start from full" in pooled or "LoRA (start from lora" in pooled
    runs.loc[lora, "start_from"] = "full-s0-01234567"  # of both seeds
    assert len(set(tables.variants(runs.loc[lora]))) == 1
    runs.loc[lora[0], ["start_from", "start_as"]] = None, "adapter"
    runs.loc[lora[1], "start_as"] = "merged"
    assert sorted(tables.variants(runs.loc[lora])) == ["LoRA", "LoRA (start from full-s0-01234567, start as merged)"]


def test_a_small_card_shows_as_oom(finished: str) -> None:
    runs = read_runs(finished)
    runs.loc[0, "status"] = "oom"
    assert tables.readable_runs(runs)["ended"].iloc[0] == "OOM"


def test_ladders_hold_their_own_rungs_only(finished: str) -> None:
    ladder = tables.ladder_summary(read_runs(finished))
    assert sorted(ladder.loc[ladder["field"] == "rank", "value"].astype(int)) == [2, 8]
    assert sorted(ladder.loc[ladder["field"] == "targets", "value"]) == ["all-linear", "minimal"]


def test_lines_of_ladders_share_a_name_if_seeds_alone_differ(finished: str) -> None:
    runs = read_runs(finished)
    rungs = runs[runs["comparisons"].str.contains("ladder-0-rank")]

    def lines(**settings: int) -> pd.Series:
        another = rungs.assign(comparisons="ladder-1-rank", **settings)
        ladder = tables.ladder_summary(pd.concat([runs, another], ignore_index=True))
        return ladder[ladder["field"] == "rank"].groupby("line")["n"].sum()

    assert lines(seed=1).to_dict() == {"LoRA": 4}
    assert lines(batch_size=99).to_dict() == {"LoRA (batch size 4)": 2, "LoRA (batch size 99)": 2}


def test_sentences_follow_the_data(finished: str) -> None:
    runs, losses = read_runs(finished), pd.read_csv("results/mine/losses.csv")
    before = sentence("pareto", runs, losses)
    assert "LoRA reached a held-out loss of" in before
    runs.loc[runs["label"] == "LoRA", "heldout_nll_nats_per_token"] = 0.123
    assert "LoRA reached a held-out loss of 0.123" in sentence("pareto", runs, losses)
    for figure in ("memory", "throughput", "losses", "prediction", "ladder-rank"):
        assert len(sentence(figure, runs, losses)) > 60
    assert sentence("ladder-alpha", runs, losses) == NOTHING


def test_predictions_stand_beside_what_was_measured(finished: str) -> None:
    found = tables.predictions(read_runs(finished))
    assert set(found["peak"]) == {"forward", "backward", "optimizer", "training", "evaluation"}
    assert found["error_percent"].abs().max() < 0.5
    runs = read_runs(finished)
    trained = runs.loc[(runs["method"] != "none") & (runs["status"] == "ok"), "run_id"]
    assert (found.groupby("run_id").size()[trained] == 5).all()
    died = runs.assign(status=runs["status"].where(runs["run_id"] != trained.iloc[0], "oom"))
    assert set(found["run_id"]) - set(tables.predictions(died)["run_id"]) == {trained.iloc[0]}
    table = tables.readable_predictions(found)
    assert set(table["method"]) == set(found["label"])
    worse = found.assign(error_percent=found["error_percent"].where(found["peak"] != "backward", -3.0))
    assert "3.000, worst 3.000" in set(tables.readable_predictions(worse)["backward (%)"])


def test_a_method_looks_the_same_in_every_figure() -> None:
    assert set(LOOKS) == set(METHODS)
    assert len({look.marker for look in LOOKS.values()}) == len(LOOKS)
    assert {look.colour for look in LOOKS.values()} <= set(SAFE_COLOURS)
    drawn = arm_looks({"lora": "LoRA", "r64": "LoRA, r64", "plus": "LoRA+"})
    assert (drawn["lora"], drawn["plus"]) == (LOOKS["lora"], LOOKS["lora-plus"]) and drawn["r64"] not in LOOKS.values()
    again = looks({"base": "base", "lora": "LoRA", "a-a": "LoRA against itself (A/A)"})["a-a"]
    assert again not in LOOKS.values() and again.colour == LOOKS["none"].colour


def test_speeds_and_curves_stand_at_the_names_of_their_own() -> None:
    """Two variants of a method, with another method between them."""
    methods, ranks = ["lora", "dora"] * 2, [8, 8, 16, 16]
    runs = pd.DataFrame({"method": methods, "rank": ranks, "tokens_per_second": [100.0, 200.0, 300.0, 400.0]})
    runs = runs.assign(comparisons="grid", status="ok", label=runs["method"].map({"lora": "LoRA", "dora": "DoRA"}))
    axes = plt.figure().add_subplot()
    draw_throughput(axes, runs)
    names = [text.get_text() for text in axes.get_yticklabels()]
    speeds = {names[int(line.get_ydata()[0])]: line.get_xdata()[-1] for line in axes.lines}
    assert speeds == {"LoRA (rank 8)": 100, "DoRA (rank 8)": 200, "LoRA (rank 16)": 300, "DoRA (rank 16)": 400}
    plt.close("all")


def test_peaks_that_no_run_measured_are_predicted_ones_and_marked(finished: str) -> None:
    runs, losses = read_runs(finished), pd.read_csv("results/mine/losses.csv")
    assert "predicted" not in sentence("memory", runs, losses) + sentence("pareto", runs, losses)
    unprobed = runs.assign(train_peak_tensor_bytes=float("nan"))
    assert "Hatched bars are predicted" in sentence("memory", unprobed, losses)
    assert "Hollow points" in sentence("pareto", unprobed, losses)
    assert "(predicted)" in tables.readable_methods(tables.method_summary(unprobed)).to_string()
    for draw, is_marked in ((draw_memory, "pattern"), (draw_pareto, "fill-opacity: 0;")):
        draw_figure(Path("measured.svg"), lambda axes, draw=draw: draw(axes, runs))
        draw_figure(Path("predicted.svg"), lambda axes, draw=draw: draw(axes, unprobed))
        assert is_marked in Path("predicted.svg").read_text()
        assert is_marked not in Path("measured.svg").read_text()


def test_two_runs_are_two_values_and_empty_columns_are_left_out(finished: str) -> None:
    runs = read_runs(finished)
    lora = runs[(runs["label"] == "LoRA") & runs["comparisons"].str.contains("grid")]["heldout_nll_nats_per_token"]
    row = tables.readable_methods(tables.method_summary(runs)).set_index("method").loc["LoRA"]
    assert row["held-out NLL (nats/token)"] == f"{lora.min():.3f} and {lora.max():.3f}"
    third = runs[runs["run_id"] == runs.loc[lora.index[0], "run_id"]].assign(run_id="third", seed=2)
    row = tables.readable_methods(tables.method_summary(pd.concat([runs, third]))).set_index("method").loc["LoRA"]
    assert re.fullmatch(r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", row["held-out NLL (nats/token)"])
    shown = tables.html(pd.DataFrame({"run": ["a", "b"], "speed": ["-", "-"], "loss": ["1", "-"]}), "t")
    assert "speed" not in shown
    assert "loss" in shown


def test_no_number_is_typed_into_prose(repository: Path) -> None:
    report = repository / "src" / "peftscope" / "report"
    texts = {path.name: path.read_text() for path in report.glob("**/*.j2")}
    assert len(texts) > 4
    for name, text in texts.items():
        prose = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|<[^>]*>|bf16", "", text, flags=re.DOTALL)
        assert not re.search(r"\d", prose), name
    figures = ast.parse((report / "sentences.py").read_text())
    forms = {id(node.format_spec) for node in ast.walk(figures) if isinstance(node, ast.FormattedValue)}
    said = [node for node in ast.walk(figures) if isinstance(node, ast.JoinedStr) and id(node) not in forms]
    words = [part.value for node in said for part in node.values if isinstance(part, ast.Constant)]
    assert len(words) > 30
    assert not [text for text in words if re.search(r"\d", text)]


def test_the_dictionary_of_published_results_has_every_column(repository: Path) -> None:
    published = repository / "results" / "published"
    text = (published / "README.md").read_text().partition("## Columns")[2]
    patterns = re.findall(r"`([\w*]+)`", text)
    files = [*published.glob("*/runs.csv")]
    assert len(files) > 3
    columns = {column for path in files for column in pd.read_csv(path, nrows=0)}
    assert not [name for name in columns if not any(fnmatch(name, pattern) for pattern in patterns)]


def test_a_folder_of_results_is_published_whole_or_not_at_all(tmp_path: Path, in_tmp: None) -> None:
    with pytest.raises(InputError, match="not finished"):
        publish("memory")
    half = tmp_path / "results" / "memory" / "bars.svg"
    half.parent.mkdir(parents=True)
    half.write_text("")
    with pytest.raises(InputError, match=r"no grid\.svg"):
        publish("memory")
    (half.parent / "grid.svg").write_bytes(bytes(5_000_001))
    with pytest.raises(InputError, match="too large"):
        publish("memory")
    assert not (tmp_path / "results" / "published" / "memory").exists()


def test_published_files_are_small_and_hold_no_paths_of_a_machine(repository: Path) -> None:
    folders = (repository / "results/published", repository / "reports/published")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert path.stat().st_size < 5_000_000
        if path.suffix in (".json", ".csv", ".md", ".html"):
            assert not re.search(r"/(?:home|root|tmp|work)/", path.read_text()), path


# The tables of what fits on a smaller card, and of latency.

GIB = 2**30


@pytest.mark.parametrize(
    ("device", "ended"), [("cuda", ["fits", "does not fit"]), ("cpu", 2 * ["not enforced on a processor"])]
)
def test_a_run_that_was_limited_says_how_it_ended(device: str, ended: list[str]) -> None:
    specs = [spec for spec in expand("gpu-check", device).runs.values() if spec.memory_limit_gib == 23.988]
    took = Memory(train=PhaseMemory(peak_tensor_bytes=12 * GIB, peak_reserved_bytes=13 * GIB))
    statuses = ["ok", "oom" if device == "cuda" else "ok"]
    ends = [RunRecord(run_id="", status=s, spec=spec, memory=took) for spec, s in zip(specs, statuses, strict=True)]
    rows = [row_of(end.spec, end) for end in ends]
    unlimited = next(spec for spec in expand("gpu-check", device).runs.values() if spec.memory_limit_gib is None)
    table = limited_runs(pd.DataFrame([*rows, row_of(unlimited, None)]))
    assert table["outcome"].tolist() == ended
    assert table["limit (GiB)"].tolist() == ["24.0"] * 2 and table["peak reserved, train (GiB)"][0] == "13.00"
    assert table["run"].nunique() == 2
    assert limited_runs(pd.DataFrame([row_of(unlimited, None)])).empty


def test_latency_is_shown_with_the_ratio_that_serving_asks_for() -> None:
    spec = next(spec for spec in expand("gpu-check", "cuda").runs.values() if spec.latency_tokens)
    seconds = {"base": 0.01, "apart": 0.03, "merged": 0.02}
    one = {state: Timing(repeats=9, **quartiles(value)) for state, value in seconds.items()}
    timed = {f"{state}_{name}": time for state, time in one.items() for name in ("prompt", "token")}
    row = row_of(spec, RunRecord(run_id="", status="ok", spec=spec, latency=timed))
    table = latencies(pd.DataFrame([row, row_of(spec, None)]))
    assert len(table) == 1 and table["token, apart over merged"][0] == "1.500"
    assert table["prompt, base (ms)"][0] == "10" and table["prompts at once"][0] == "1"
    assert latencies(pd.DataFrame([row_of(spec, None)])).empty
