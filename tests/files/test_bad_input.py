"""Bad input: one clear message each, with place, value and remedy, all of a file at once, before any job starts."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import python

from peftscope.api import run
from peftscope.data.scoring import lm_eval_file
from peftscope.data.tasks import make_task, read_split, task_folder
from peftscope.errors import InputError
from peftscope.planning.disk import check_disk
from peftscope.planning.plan import plan_experiment
from peftscope.planning.sweep import expand

CASES = {
    "unknown key": ("fixed: {model: toy, stepz: 3}", "fixed.stepz", "did you mean `steps`?"),
    "wrong type": ("fixed: {model: toy, steps: many}", "fixed.steps", "'many'"),
    "rank 0": ("fixed: {model: toy}\naxes: {rank: [4, 0]}", "axes.rank[1]", "greater than or equal to 1"),
    "no such module": ("fixed: {model: toy}\nmethods: {lora: {targets: [q_prj]}}", "targets", "did you mean `q_proj`?"),
    "no such preset": ("methods: {lora: {targets: everything}}", "methods.lora.targets", "minimal, attention"),
    "a grown rank": ("fixed: {method: adalora}\nmethods: {adalora: {target_r: 80}}", "target_r", "smaller than init_r"),
    "QLoRA with full": ("fixed: {method: full, quant_type: nf4}", "fixed.quant_type", "choose method `qlora`"),
    "rank for full": ("runs: [{method: full, rank: 4}]", "runs[0].rank", "under methods.<name> for: lora"),
    "4-bit in fp32": ("fixed: {method: qlora, precision: fp32}", "fixed.precision: precision=fp32", "use bf16"),
    "missing model": ("fixed: {model: smollm-135m}", "mine.yaml: model:", "did you mean `smollm2-135m`?"),
    "missing task": ("fixed: {model: toy, task: two-digit-sumz}", "mine.yaml: task:", "did you mean `two-digit-sums`?"),
    "unknown method": ("axes: {method: [lora, qlra]}", "axes.method[1]", "did you mean `qlora`?"),
    "a key twice": ("fixed: {model: toy}\nfixed: {model: toy}", "line 2", "appears twice"),
    "not YAML": ("fixed: [", "line", "not valid YAML"),
    "extends itself": ("extends: mine", "extends", "extends itself"),
    "a list for a method": ("fixed: {method: [lora]}", "method", "unknown method"),
    "a mapping for a method": ("runs: [{method: {name: nothing}}]", "runs[0].method.name", "unknown method"),
    "infinite": ("fixed: {model: toy, max_grad_norm: .inf}", "fixed.max_grad_norm", "finite"),
    "a key that is no text": ("fixed: {8: 3}", "line 1", "must be text"),
    "a seed that is fixed": ("fixed: {model: toy, seed: 3}", "fixed.seed", "write `seeds"),
    "a seed for a method": ("methods: {lora: {seed: 3}}", "methods.lora.seed", "under axes or seeds"),
    "nothing to exclude": ("exclude: [{match: {rnak: 4}, reason: none}]", "exclude[0].match", "matches no run"),
    "extends nothing": ("extends: quickk", "extends", "did you mean `quick`?"),
    "flash on a CPU": ("fixed: {model: toy, attention: flash_attention_2}", "fixed.attention", "use sdpa"),
    "a token of prose": ("fixed: {retention_tokens: 1}", "retention_tokens", "use 0, or more"),
    "more answers than items": ("fixed: {heldout_items: 8}", "heldout_items", "must not exceed heldout_items=8"),
    "a truth value for a number": ("fixed: {model: toy, steps: true}", "fixed.steps", "must be a number (got True)"),
    "an axis of another method": ("axes: {method: [lora, full], iterations: [1, 5]}", "axes.iterations", "no run's"),
    "seeds twice": ("axes: {seed: [1, 2]}\nseeds: [3]", "mine.yaml: seeds", "no effect beside the seeds of axes"),
    "a long warm-up": ("fixed: {steps: 4, warmup_steps: 5}", "fixed.warmup_steps", "=5 must not exceed steps=4"),
    "device": ("fixed: {model: toy, device: cuda}", "fixed.device", "the machine decides"),
}


@pytest.mark.parametrize(("text", "place", "words"), CASES.values(), ids=CASES)
def test_message_names_place_and_remedy(write_experiment, text: str, place: str, words: str) -> None:
    write_experiment("mine", text + "\n")
    with pytest.raises(InputError) as caught:
        plan_experiment("mine")
    message = str(caught.value)
    assert "experiments/mine.yaml" in message or "generation_items" in message
    assert place in message
    assert words in message


def test_all_problems_of_a_file_at_once(write_experiment) -> None:
    write_experiment("mine", "fixed: {model: toy, stepz: 3, batch_size: 0}\naxes: {rank: [0], alpha: [-1]}\n")
    with pytest.raises(InputError) as caught:
        plan_experiment("mine")
    assert len(caught.value.problems) == 4


def test_a_task_that_changed_after_it_was_made(write_experiment) -> None:
    write_experiment("mine", "fixed: {model: toy, task: time-intervals}\n")
    make_task("time-intervals")
    assert plan_experiment("mine").run_ids
    write_experiment("tasks", Path("experiments/tasks.yaml").read_text().replace("size: 4000", "size: 3000"))
    for ask in (lambda: plan_experiment("mine"), lambda: make_task("time-intervals")):
        with pytest.raises(InputError, match=r"tasks.yaml: time-intervals.source: changed since the task was made"):
            ask()


def test_data_of_ones_own_that_changed_after_its_task_was_made(write_experiment, tmp_path: Path, peftscope) -> None:
    data = tmp_path / "mine.jsonl"
    lines = [json.dumps({"prompt": f"q {n}", "response": "x"}) for n in range(60)]
    data.write_text("\n".join([*lines, lines[0]]))
    write_experiment("tasks", f"mine: {{source: {{kind: jsonl, path: {data}}}}}\n")
    lm_eval_file("mine").write_text("task: mine\n")
    write_experiment("mine", "fixed: {model: toy, task: mine}\n")
    manifest = json.loads((make_task("mine") / "manifest.json").read_text())
    assert sum(manifest["items"].values()) == 60 and manifest["duplicates_dropped"] == 1
    assert make_task("mine") == task_folder("mine") and plan_experiment("mine").run_ids
    _, printed, _ = peftscope("expand", "mine", "--brief")
    test = len(read_split("mine", "test"))
    assert f"The task mine has {test} test items (heldout_items: 256): the runs use all of them." in printed
    assert "validation items" not in printed
    data.write_text(data.read_text().replace("q 7", "p 7"))
    spec = {"model": "toy", "task": "mine", "method": "lora", "steps": 1}
    for ask in (lambda: plan_experiment("mine"), lambda: make_task("mine"), lambda: run(spec, tmp_path / "run")):
        with pytest.raises(InputError, match=r"mine.jsonl: changed since the task mine was made from it .*remove"):
            ask()


@pytest.mark.parametrize("name", ["published", "memory", "My_Study"])
def test_reserved_and_impossible_names(name: str) -> None:
    with pytest.raises(InputError, match=r"reserved|not a name"):
        expand(name)


def test_no_room_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, usage = expand("quick").runs, SimpleNamespace(free=2 * 10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    (problem,) = check_disk(runs)
    assert "need about" in problem.message
    usage.free = 10**12
    assert check_disk(runs) == []


WRONG_COMMANDS = {
    "no file": ("run nothing.yaml", "no such file"),
    "model not fetched": ("""run '{"method": "lora", "model": "nobody/nothing"}'""", "->"),
    "no experiment": ("expand nothing", "->"),
    "no run": ("merge nothing", "->"),
    "no study": ("tune quick", "the experiment `quick`: is no study: it has no arms -> name a study"),
    "no run that has ended": ("report mine", "mine: none of its runs has ended -> peftscope sweep mine && "),
}


@pytest.mark.parametrize(("words", "said"), WRONG_COMMANDS.values(), ids=WRONG_COMMANDS)
def test_a_command_that_cannot_work_ends_with_a_message(words: str, said: str, write_experiment, peftscope) -> None:
    write_experiment("mine", "fixed: {model: toy}\n")
    code, _, error = peftscope(*shlex.split(words))
    assert code == 2 and said in error
    assert not Path("reports").exists()


def test_a_broken_link_in_place_of_a_folder_is_named(tmp_path: Path, in_tmp: None) -> None:
    Path("resources").symlink_to(tmp_path / "gone")
    done = python("-m", "peftscope", "make-task", "two-digit-sums")
    assert done.returncode == 2
    assert done.stderr.startswith("File exists (resources") and "mend the link" in done.stderr


def test_the_workflow_says_what_is_wrong_without_a_traceback(write_experiment, repository: Path) -> None:
    write_experiment("mine", "fixed: {model: toy, stepz: 3}\n")
    for name in ("Snakefile", "profiles"):
        Path(name).symlink_to(repository / name)
    done = python("-m", "snakemake", "-n", "--cores", "1", "--config", "experiment=mine")
    assert done.returncode != 0
    assert "Traceback" not in done.stdout + done.stderr
    assert "did you mean `steps`?" in done.stdout + done.stderr
