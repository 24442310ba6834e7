"""A method of a file: found, run, measured and reported without a change to any file of this package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from conftest import python
from test_method_file import blocks

from peftscope.layout import record_path
from peftscope.models.catalog import find_model


@pytest.fixture
def lora_fa(own: Callable[[str, str], Path], repository: Path) -> Callable[[str, str], Path]:
    """A folder with the page's method, as the current one; writes experiment files into it."""
    Path("experiments/methods").mkdir()
    Path("experiments/methods/lora-fa.py").write_text(blocks(repository, "python")[0])
    return own


ONE_RUN = """
fixed: {model: toy, steps: 6, batch_size: 8, heldout_items: 16, generation_items: 4, eval_batch_size: 8,
  retention_tokens: 64, untimed_steps: 1}
axes: {method: [lora-fa], rank: [4]}
"""


def test_an_experiment_knows_it_and_says_that_its_memory_is_not_known(lora_fa) -> None:
    lora_fa("mine", ONE_RUN)
    done = python("-m", "peftscope", "expand", "mine", "--gpu", "24GiB")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.strip().startswith("lora-fa-r4-all-linear-s0")]
    assert " LoRA-FA " in line and " 0.003 " in line
    assert "not known: lora-fa has no closed form" in line
    assert "of GPU to go, peak not known of 1 (`peftscope memory` simulates it)." in done.stdout
    code = "from peftscope.methods import METHODS; import sys; print(list(METHODS)[-2:], 'torch' in sys.modules)"
    assert python("-c", code).stdout == "['peft', 'lora-fa'] False\n"
    code_of_demands = "from peftscope.planning.demands import host_bytes; from peftscope.planning.sweep import expand; "
    code_of_demands += "print(*map(host_bytes, expand('both').runs.values()))"
    lora_fa("both", ONE_RUN.replace("[lora-fa]", "[lora-fa, lora]"))
    own, lora = map(int, python("-c", code_of_demands).stdout.split())
    assert own >= lora > 2**31  # what every process takes, and tensors


@pytest.mark.slow
def test_it_runs_and_is_reported_and_its_memory_is_simulated(lora_fa, repository: Path) -> None:
    lora_fa("mine", ONE_RUN)
    for name in ("Snakefile", "profiles", "src"):
        Path(name).symlink_to(repository / name)
    done = python("-m", "snakemake", "-n", "--cores", "1", "--config", "experiment=mine")
    assert done.returncode == 0, done.stdout + done.stderr

    code = "import json; from peftscope.planning.sweep import expand; "
    code += "print(json.dumps({i: s.canonical() for i, s in expand('mine').runs.items()}))"
    ((run, spec),) = json.loads(python("-c", code).stdout).items()
    done = python("-m", "peftscope", "run", json.dumps(spec), "--threads", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(record_path(run).read_text())
    assert (record["status"], record["reason"]) == ("ok", None)
    memory = record["memory"]
    assert memory["predicted"]["backward_peak_tensor_bytes"] == memory["backward_peak_tensor_bytes"] > 0

    done = python("-m", "peftscope", "report", "mine")
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = pd.read_csv("results/mine/runs.csv").to_dict("records")
    assert (row["label"], row["method"], row["status"]) == ("LoRA-FA", "lora-fa", "ok")


@pytest.mark.slow
def test_questions_about_its_memory_are_simulated_and_say_so(lora_fa) -> None:
    ask = ["-m", "peftscope", "memory", "toy", "--method", "lora-fa", "--seq-len", "64", "--rank", "4"]
    found = json.loads(python(*ask, "--simulate", "--json").stdout)
    assert found["how"] == "simulation"
    assert "lora-fa has no closed form: its peaks are simulated" in found["assumptions"]
    shape = find_model("toy").shape
    frozen = 4 * shape.num_layers * sum(layer.inputs for layer in shape.block)
    assert found["components"]["weights"] >= 2 * found["parameters"] + 4 * frozen  # in 32 bits
    assert "simulated on tensors without data, because lora-fa has no closed form" in python(*ask).stdout
    done = python(*ask, "--gpus", "2")
    assert done.returncode == 2
    assert "only the closed form can answer for several cards, and lora-fa has none" in done.stderr
    fit = ["-m", "peftscope", "fit", "toy", "--gpu", "4GiB", "--methods", "lora,lora-fa", "--seq-len", "64"]
    lora, own = json.loads(python(*fit, "--rank", "4", "--json").stdout)
    assert (lora["how"], own["how"]) == ("formula", "simulation")
    assert own["fits"] and own["largest_batch_size"] is None
    assert own["phases"].keys() == lora["phases"].keys()
    assert own["phases"]["backward"] == found["phases"]["backward"]
