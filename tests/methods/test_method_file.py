"""A method from a single file: the page about it is walked through, and what is wrong with a file is said."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
from conftest import Command, in_one_process, is_shown, python

from peftscope.cli.new_study import study_text, tried
from peftscope.errors import InputError
from peftscope.files.manifest import file_sha256
from peftscope.methods.from_file import load_file
from peftscope.planning.estimate import ONE_THREAD_SLOWER
from peftscope.planning.experiment import read_experiment
from peftscope.planning.sweep import expand
from peftscope.spec import run_id

PAGE = "docs/your-method.md"
SHORT = """fixed: {model: toy, steps: 6, warmup_steps: 1, batch_size: 8, validation_items: 16, validation_every: 3,
  heldout_items: 16, generation_items: 0, eval_batch_size: 16}"""


def blocks(repository: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (repository / PAGE).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def file(repository: Path, tmp_path: Path) -> Path:
    path = tmp_path / "lora_fa.py"
    path.write_text(blocks(repository, "python")[0])
    return path


def run(*words: str) -> str:
    done = python("-m", *words, env=os.environ | {"COLUMNS": "160"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_from_a_file_to_a_verdict(own: Callable[[str, str], Path], repository: Path) -> None:
    Path("lora_fa.py").write_text(blocks(repository, "python")[0])
    command, *shown = blocks(repository, "console")[0].splitlines()
    commands = [shlex.split(line) for block in [command[2:], *blocks(repository, "sh")] for line in block.splitlines()]
    assert [words[1] for words in commands] == ["new-study", "sweep", "report"]
    printed = run(*commands[0])
    assert is_shown(shown, printed.splitlines())
    name = Path(shown[-1]).stem
    assert re.search(rf"^ smollm2-135m, LoRA-FA +14 .*\n{name}: 46 runs, 0 done, about .* to go", printed, re.MULTILINE)

    study = Path(f"experiments/{name}.yaml")
    text = re.sub(r"fixed: \{.*\}", SHORT, study.read_text())
    text = re.sub(r"(lora|lora-fa): \[.*\]", r"\1: [3.0e-3, 1.0e-2, 3.0e-2]", text)
    study.write_text(text.replace("[0, 1, 2]", "[0, 1]", 1).replace("[0, 1, 2]", "[0]"))
    later = [" ".join(words[1:]) for words in commands[1:]]
    done = in_one_process(*later)
    assert done.returncode == 0, done.stderr
    table = Path(f"results/{name}/tables/contrasts.csv").read_text().splitlines()
    rows = {row["arm"]: row for row in csv.DictReader(table)}
    assert {"lora-fa", "lora-a-a"} <= rows.keys()
    assert "LoRA-FA" in Path(f"reports/{name}/report.html").read_text()

    digest = file_sha256(Path("lora_fa.py"))
    records = [json.loads(path.read_text()) for path in Path("results/runs").glob("lora-fa-*/record.json")]
    assert len(records) in (3 + 3 * 2, 3 + 4 * 2, 3 + 5 * 2)  # with up to two rates beyond an end
    for record in records:
        fields = {"rank": 8, "targets": "all-linear"}
        assert record["spec"]["method"] == {"name": "lora-fa", "file_sha256": digest, **fields}
        assert record["provenance"]["packages"]["experiments/methods/lora-fa.py"] == digest
        assert record["size"]["initial_trainable_parameters"] == 10240


def test_the_page_says_how_long_the_study_takes(repository: Path) -> None:
    with (repository / "results/published/variants/runs.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] in ("lora", "none")]
    paired, base = [], []
    for row in rows:
        if row["generation_items"] == "64":
            (base if row["method"] == "none" else paired).append(float(row["wall_seconds"]) / 60)
        assert row["threads"] == "1" and row["cores"] == "2"
    pair = median(paired)
    page = (repository / PAGE).read_text().replace("\n", " ")
    assert f"took {pair:.1f} minutes (median of {len(paired)})" in page
    assert f"takes {(90 * pair + base[0]) / 2 / 60:.1f} hours on two cores" in page
    assert f"`sweep` takes about {2 / ONE_THREAD_SLOWER:.1f} times as long" in page
    assert f"the 29 runs of your method on SmolLM2-135M alone, which take {29 * pair / 2:.0f} minutes" in page


def test_the_content_of_the_file_is_part_of_the_id(file: Path, make_spec) -> None:
    method, wrong = load_file(file)
    assert method is not None, wrong
    spec = make_spec().model_copy(update={"method": method(rank=4)})
    file.write_text(file.read_text() + "\n")
    changed, _ = load_file(file)
    assert changed is not None
    assert run_id(spec) != run_id(spec.model_copy(update={"method": changed(rank=4)}))
    old = changed.model_validate(spec.method.model_dump(mode="json"))
    assert run_id(spec.model_copy(update={"method": old})) == run_id(spec)
    with pytest.raises(InputError, match="its file has changed since"):
        old.build(None, spec)


def test_a_file_with_a_tuners_options(repository: Path, tmp_path: Path) -> None:
    path = tmp_path / "hra-wide.py"
    path.write_text(blocks(repository, "python")[1])
    cls, wrong = load_file(path)
    assert cls is not None, wrong
    assert cls().options["r"] == 32 and cls().options["init_weights"] is True  # PEFT's default
    assert cls().full_label() == "HRA, 32 reflections"
    assert cls(options={"r": 4}).full_label() == "HRA, 32 reflections (r 4)"
    assert cls().canonical()["name"] == "hra-wide"


def test_the_file_with_a_tuners_options_becomes_a_study(
    own: Callable[[str, str], Path], repository: Path, peftscope: Command
) -> None:
    _, file = blocks(repository, "python")  # the slow test above runs the first, and every command
    Path("hra_wide.py").write_text(file)
    code, _, said = peftscope("new-study", "hra_wide.py", "--model", "toy", "--steps", "4", "--seeds", "2")
    assert (code, said) == (0, "")
    assert Path("experiments/hra-wide-study-toy-4-steps-2-seeds.yaml").is_file()


IMPORTS_PEFT = """
from bitsandbytes.cextension import lib
lib.has_avx512bf16_cpu = lambda: True  # as on a processor on which bitsandbytes asks for the kernels of a hub
import peft
from peftscope.methods.peft_tuner import PeftTuner
class Mine(PeftTuner):
    label = "Mine"
"""


def test_a_file_that_imports_peft_makes_no_command_talk(in_tmp: None) -> None:
    Path("experiments/methods").mkdir(parents=True)
    Path("experiments/methods/mine.py").write_text(IMPORTS_PEFT)
    done = python("-m", "peftscope", "memory", "toy", "--method", "mine")
    assert (done.returncode, done.stderr) == (0, "") and "mine has no closed form" in done.stdout


WRONG = {
    "no class": ("", "must have one subclass of peftscope.methods.fields.Method (it has 0)"),
    "a mistake": ("import nothing_here", "cannot be loaded: ModuleNotFoundError: No module named 'nothing_here'"),
    "no label": ("class A(Method): ...", "needs a `label: ClassVar[str]`"),
    "wrong rate": (
        "class A(Method):\n    label: ClassVar[str] = 'A'\n    run_defaults: ClassVar[dict] = {'learning_rate': -1e-3}",
        "its learning_rate in `run_defaults` must be a number above 0 (got -0.001)",
    ),
    "no rate": ("class A(Method):\n    label: ClassVar[str] = 'A'", "needs `run_defaults: ClassVar[dict]`"),
    "nothing built": (
        "class A(Method):\n    label: ClassVar[str] = 'A'\n    run_defaults: ClassVar[dict] = {'learning_rate': 1}",
        "needs `build`, which makes the model to train",
    ),
    "a default that its bounds refuse": (
        "class A(PeftTuner):\n    label: ClassVar[str] = 'A'\n    rank: Rank = 0",
        "cannot be loaded: ValidationError: 1 validation error for A rank Input should be greater than or equal to 1",
    ),
    "a tuner's option": (
        "class A(PeftTuner):\n    label: ClassVar[str] = 'A'\n    options: dict = {'rr': 1}",
        "vera has no such option (got 1) (did you mean `r`?)",
    ),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_file_that_cannot_be_used_is_refused(text: str, message: str, tmp_path: Path, refusal) -> None:
    imports = "from typing import ClassVar\nfrom peftscope.methods.fields import Method, Rank\n"
    (tmp_path / "mine.py").write_text(f"{imports}from peftscope.methods.peft_tuner import PeftTuner\n{text}\n")
    assert message in refusal("new-study", str(tmp_path / "mine.py"))


FAILS = {
    "a mistake": ("return wrapped", "return wrappd", "my_method.py:23: build on the toy model fails: NameError"),
    "nothing trained": (" in name:", " in name or True:", "my_method.py: leaves nothing to train -> set requires_grad"),
    "a diverging loss": ("alpha=2", "alpha=float('nan')", "my_method.py: the loss of two steps on the toy model is"),
    "a bad step": (
        "    def build(",
        "    def after_optimizer_step(self, model, step):\n        model.prune(step)\n\n    def build(",
        "my_method.py:17: a step of training on the toy model fails: AttributeError",
    ),
}


@pytest.mark.parametrize(("before", "after", "message"), FAILS.values(), ids=FAILS)
def test_a_method_that_cannot_be_trained_is_refused_at_its_line(
    before: str, after: str, message: str, file: Path, own: Callable[[str, str], Path], refusal
) -> None:
    Path("my_method.py").write_text(file.read_text().replace(before, after))
    assert message in refusal("new-study", "my_method.py", "--model", "toy")
    assert not [*Path("experiments").rglob("my?method*")]


def test_what_a_method_trains_of_a_large_model_is_counted_without_its_weights(file: Path, own) -> None:
    # The B of LoRA of rank 8: 32 layers, each with five outputs of 4,096 and two of 11,008.
    assert tried(file, "llama-2-7b").endswith("Of llama-2-7b it trains 10,878,976 of 6,758,404,096 values.")
    file.write_text(
        file.read_text().replace("return wrapped", "model.lm_head.weight[0].tolist()\n        return wrapped")
    )
    assert tried(file, "llama-2-7b").endswith("it trains as many values as a run will say.")


def test_a_file_whose_study_is_refused_leaves_nothing_behind(in_tmp: None) -> None:
    imports = "from typing import ClassVar\nfrom peftscope.methods.peft_tuner import PeftTuner\n"
    Path("mine.py").write_text(f"{imports}\nclass A(PeftTuner):\n    label: ClassVar[str] = 'A'\n    steps: int = 3\n")
    done = python("-m", "peftscope", "new-study", "mine.py", "--model", "toy")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "method `mine`: its fields steps have the names of a run's own -> give them other names\n"
    assert not [path for path in Path("experiments").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("name", "said"),
    [("mine.md", "is no Python file"), ("dora.py", "there is another method 'dora' -> rename your file")],
)
def test_a_name_that_no_method_can_have_is_refused(name: str, said: str, file: Path, refusal) -> None:
    assert said in refusal("new-study", str(file.rename(file.with_name(name))))


@pytest.mark.parametrize(("world", "of"), [("A", "sums"), ("B", "pronunciation"), ("C", "pronunciation-gemma")])
def test_a_study_of_a_world_shares_its_runs(world: str, of: str, file: Path, own) -> None:
    arms = ["lora"] if world == "C" else ["lora", "full"]
    own("mine", study_text(file, arms, world).replace("method: lora-fa", "method: ia3"))
    ours, theirs = (expand(name, assume_rates=True).runs for name in ("mine", of))
    assert {run for run in ours if not run.startswith("ia3")} <= theirs.keys()


def test_every_arm_has_as_many_trials_and_the_reference_its_controls(file: Path, own) -> None:
    def study_of(*others: str):
        path = own("lora-fa-study", study_text(file, list(others)))
        study = read_experiment(path).study
        assert study is not None and len({len(rates) for rates in study.learning_rates.values()}) == 1
        return study

    usual = study_of("full", "lora")
    assert (list(usual.arms), usual.a_a, usual.pilot) == (["lora", "full", "lora-fa"], "lora", "variants")
    sums = read_experiment(Path("experiments/studies/sums.yaml")).study
    assert (usual.learning_rates["full"], usual.seeds) == (sums.learning_rates["full"], sums.seeds)
    assert usual.learning_rates["lora-fa"] == [3e-4, 9e-4, 3e-3, 9e-3, 3e-2]
    other = study_of("ia3")
    assert (list(other.arms), other.a_a, other.pilot) == (["ia3", "lora-fa"], None, None)
    assert other.controls == {"ia3": ["shuffled-labels"]}
    assert study_of("dora").a_a == "dora"  # which draws its start; IA3's is always the same
    with pytest.raises(InputError, match=r"no method to compare with \(got 'lra'\) -> did you mean `lora`"):
        study_text(file, ["lra"])
    with pytest.raises(InputError, match=r"world: no such world \(got 'b'\) -> one of A, B, C"):
        study_text(file, ["lora"], "b")


def test_a_shorter_study_in_another_world_has_its_own_runs(file: Path, own) -> None:
    home = read_experiment(Path("experiments/studies/pronunciation.yaml"))
    short = read_experiment(own("mine", study_text(file, ["lora"], "B", 2, steps=40)))
    assert short.study.pilot == home.study.pilot
    assert short.fixed == home.fixed | {"steps": 40, "warmup_steps": 2, "validation_every": 10}
    assert short.study.seeds == short.study.control_seeds == [0, 1] and short.study.arms["lora"] == {"method": "lora"}
