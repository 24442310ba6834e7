"""Every experiment file of the repository, and what expanding one promises."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import REPOSITORY

from peftscope.layout import MEMORY_FOLDER, PUBLISHED_RESULTS, RUNS
from peftscope.methods import METHODS
from peftscope.planning.checks import check_runs
from peftscope.planning.experiment import NOT_EXPERIMENTS, RESERVED_NAMES, experiment_names
from peftscope.planning.plan import Workflow, plan_experiment
from peftscope.planning.published import all_published_records
from peftscope.planning.resolve import RUN_FIELDS, spec_from
from peftscope.planning.sweep import Sweep, expand
from peftscope.spec import RUN_ID_PATTERN, RunSpec, run_id

FILES = sorted((REPOSITORY / "experiments").rglob("*.yaml"))


def test_every_yaml_file_is_covered() -> None:
    assert len(FILES) > 5
    names = {path.stem for path in FILES if path.parent.name in ("experiments", "studies")}
    assert names == {*experiment_names(), *NOT_EXPERIMENTS}


def test_no_experiment_can_have_the_folder_of_other_results() -> None:
    folders = {path.name for path in (REPOSITORY / "results" / "published").iterdir() if path.is_dir()}
    assert folders <= {*experiment_names(), *RESERVED_NAMES}
    assert {MEMORY_FOLDER.name, RUNS.name} <= {*RESERVED_NAMES}


@pytest.mark.parametrize("name", sorted({p.stem for p in FILES if p.parent.name == "experiments"} - {*NOT_EXPERIMENTS}))
def test_an_experiment_expands_into_valid_runs_that_differ_where_it_says(name: str) -> None:
    sweep = expand(name)
    assert sweep.runs and check_runs(sweep.runs, name) == []
    assert all(re.fullmatch(RUN_ID_PATTERN, identity) for identity in sweep.runs)
    assert [run_id(spec) for spec in sweep.runs.values()] == list(sweep.runs)
    defaults = yaml.safe_load(Path("experiments/defaults.yaml").read_text())
    by_method = {key for settings in defaults["methods"].values() for key in settings}
    for comparison in sweep.comparisons:
        allowed = {*comparison.varies, "seed", *(by_method if "method" in comparison.varies else ())}
        assert differing_fields(sweep, comparison.runs) <= allowed, comparison.name


def differing_fields(sweep: Sweep, runs: tuple[str, ...]) -> set[str]:
    flat = []
    for identity in runs:
        fields = sweep.runs[identity].model_dump(mode="json")
        method = fields.pop("method")
        flat.append({**fields, "method": method.pop("name"), **method})
    keys = {key for row in flat for key in row}
    return {key for key in keys if len({json.dumps(row.get(key)) for row in flat}) > 1}


def test_quick_has_what_the_readme_promises() -> None:
    sweep = expand("quick")
    specs = list(sweep.runs.values())
    six = {"full", "lora", "qlora", "dora", "adalora", "loftq"}
    assert {(s.method.name, s.seed) for s in specs} >= {(m, seed) for m in six for seed in (0, 1)}
    assert len([s for s in specs if s.method.name == "none"]) == 2
    ladders = {c.name.rpartition("-")[2]: c.runs for c in sweep.comparisons if c.name.startswith("ladder-")}
    assert len(ladders["rank"]) >= 3
    assert len(ladders["alpha"]) >= 3
    assert len(ladders["targets"]) == 4
    assert all(s.model == "smollm2-135m" for s in specs)


def test_the_pages_examples_are_experiments(write_experiment) -> None:
    page = (REPOSITORY / "experiments" / "README.md").read_text()
    grid, study = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    write_experiment("grid", grid)
    write_experiment("study", study.replace("my-task", "time-intervals"))
    assert len(expand("grid", "cpu").runs) == 46
    assert len(expand("study", "cpu", assume_rates=True).runs) == 1 + 3 * (5 + 3 * 8) + 3


def test_full_fine_tuning_is_compared_with_fp32_master_weights() -> None:
    assert {s.precision for s in expand("quick").runs.values() if s.method.name == "full"} <= {"amp", "fp32"}


def test_defaults_name_every_field_once_with_its_default() -> None:
    defaults = yaml.safe_load(Path("experiments/defaults.yaml").read_text())
    in_code = {name: RunSpec.model_fields[name].default for name in RUN_FIELDS}
    for name, value in in_code.items():
        if name not in ("model", "task", "learning_rate"):
            written = defaults["fixed"][name]
            assert (tuple(written) if isinstance(written, list) else written) == value, name
    assert set(defaults["fixed"]) == {*RUN_FIELDS, "method"} - {"learning_rate"}
    assert list(defaults["methods"]) == list(METHODS)
    for name, cls in METHODS.items():
        settings = defaults["methods"][name]
        assert settings["learning_rate"] >= 0
        for field, info in cls.model_fields.items():
            if field != "name":
                # What a method chooses by itself unless told (null) needs no line.
                assert settings.get(field) == info.default, (name, field)


def test_schema_is_in_step() -> None:
    assert json.loads(Path("experiments/spec.schema.json").read_text()) == RunSpec.model_json_schema(), (
        "run: make schema"
    )


def test_a_changed_rung_renames_only_its_own_run(write_experiment) -> None:
    quick = Path("experiments/quick.yaml").read_text()
    before = set(expand("quick").runs)
    write_experiment("quick", quick.replace("rank: [2, 8, 32]", "rank: [2, 8, 16]"))
    after = set(expand("quick").runs)
    assert len(before - after) == 1
    assert len(after - before) == 1


def test_an_axis_a_method_lacks_leaves_it_one_run(write_experiment) -> None:
    write_experiment("mine", "fixed: {model: toy}\naxes: {method: [full, lora], rank: [2, 4]}\n")
    assert sorted(s.method.name for s in expand("mine").runs.values()) == ["full", "lora", "lora"]


def test_linked_values_move_together_and_exclusions_hold(write_experiment) -> None:
    linked = "linked: [[{rank: 2, alpha: 4}, {rank: 4, alpha: 8}]]\naxes: {dropout: [0.0, 0.1]}\n"
    exclude = "exclude: [{match: {rank: 4, dropout: 0.1}, reason: enough}]\n"
    write_experiment("mine", "fixed: {model: toy, method: lora}\n" + linked + exclude)
    found = {(s.method.rank, s.method.alpha, s.method.dropout) for s in expand("mine").runs.values()}
    assert found == {(2, 4, 0.0), (2, 4, 0.1), (4, 8, 0.0)}


def test_what_a_job_is_given_is_the_spec_of_its_id(write_experiment) -> None:
    """Also where an experiment goes back from a method's default to the code's, as pure bf16 full fine-tuning does."""
    write_experiment("mine", "fixed: {model: toy}\nmethods: {full: {precision: bf16}}\naxes: {method: [full, pissa]}\n")
    plan = plan_experiment("mine")
    for identity, spec in plan.sweep.runs.items():
        given = json.loads(Workflow([plan]).spec_json(SimpleNamespace(run_id=identity)))
        assert spec_from(given, Path("spec"), "cpu") == spec
    assert {s.precision for s in plan.sweep.runs.values()} == {"bf16"}


def test_the_device_is_part_of_a_gpu_runs_id() -> None:
    cpu, gpu = set(expand("quick", "cpu").runs), set(expand("quick", "cuda").runs)
    assert not cpu & gpu
    assert all("-cuda-" in identity for identity in gpu)


def test_what_earlier_studies_ran_is_what_their_files_ask_for_and_what_sums_begins_with(in_repository: None) -> None:
    """Their runs are kept: the listed rates that tuned their arms, and the runs at the rates that were chosen."""
    published = {run for _, run, _ in all_published_records()}
    for path in PUBLISHED_RESULTS.glob("*/tuned.json"):
        sweep = expand(path.parent.name)
        is_new = bool(sweep.experiment.study.learning_rates)
        assert is_new or (sweep.experiment.study.chosen_rates and set(sweep.runs) <= published)
    comparisons = {c.name: c.runs for c in expand("sums", assume_rates=True).comparisons}
    for name, runs in comparisons.items():
        if name.startswith("tune-"):
            assert set(runs) <= published, name
    known = {c.name: c.runs for study in ("ranks", "targets", "variants") for c in expand(study).comparisons}
    for arm in ("attention-r21", "mlp-r13", "r4", "r64", "r1", "dora", "pissa", "qlora", "lora-plus"):
        assert set(known[f"arm-{arm}"]) < set(comparisons[f"rates-{arm}"])
